"""First contact: waits until a new machine can be worked on, by the host key that it reported and no other."""

from __future__ import annotations

import base64
import io
import logging
import time

import paramiko

from posthouse import PosthouseError
from posthouse.model import Node
from posthouse.secrets import Secrets

logging.getLogger("paramiko").setLevel(logging.ERROR)  # a machine that does not answer yet is nothing to report


class ContactError(PosthouseError):
    """A machine that is not reached, or that is another one than it should be."""


def wait(node: Node, secrets: Secrets, seconds: float) -> float:
    """Waits until the node lets root in by ssh; returns how long that took, in seconds. Raises ContactError.

    Its key is known before it is asked for, so there is no first use to trust: a machine with another key is an error
    at once, and not one more try.
    """
    kind, key = secrets.ssh["host_keys"][node.name]["public"].split()[:2]
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    client.get_host_keys().add(node.address, kind, paramiko.Ed25519Key(data=base64.b64decode(key)))
    login = paramiko.Ed25519Key.from_private_key(io.StringIO(secrets.ssh["private"]))
    begun = time.monotonic()
    complaint = "nothing answers"
    while time.monotonic() - begun < seconds:
        try:
            client.connect(
                node.address,
                username="root",
                pkey=login,
                timeout=5,
                banner_timeout=30,
                auth_timeout=30,
                allow_agent=False,
                look_for_keys=False,
            )
            return time.monotonic() - begun
        except paramiko.BadHostKeyException:
            raise ContactError(
                f"{node.name}: {node.address} has another host key than the one that {node.name} reported: find out "
                "which machine that is; if it was installed anew by hand, run: posthouse provision reinstall "
                f"{node.name}"
            ) from None
        except (paramiko.SSHException, OSError, EOFError) as error:
            complaint = str(error) or type(error).__name__
            time.sleep(1)
        finally:
            client.close()
    raise ContactError(
        f"{node.name}: no ssh at {node.address} within {seconds:.0f} s: {complaint}; look at its console"
    )
