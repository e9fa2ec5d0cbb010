"""A node's mail queues: delivered now, and what cannot be delivered handed to the same instance on another node."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from posthouse.model import Site
from posthouse.ops.steps import Refused
from posthouse.remote import Remote, RemoteError

# The Postfix instances of each tier: where their configuration is.
INSTANCES = {"mx": "/etc/postfix", "submission": "/etc/postfix-submission", "outbound": "/etc/postfix-outbound"}

# What `postsuper -r` does on one node, between two: pickup takes a whole queue file that belongs to Postfix and is
# executable out of maildrop, and gives it a name of its own. The source's file is on hold from here on, so nobody
# delivers it meanwhile, and goes when the other is on disk. Killed in between, the message is there twice and not lost.
_GIVE = 'dir=$(postconf -c {conf} -h queue_directory) && file=$(find "$dir/hold" -name {id}) && cat "$file"'
_TAKE = """
set -eu
dir=$(postconf -c {conf} -h queue_directory)
umask 077
cat >"$dir/maildrop/.{id}"
test -s "$dir/maildrop/.{id}"
chown postfix:postdrop "$dir/maildrop/.{id}"
sync "$dir/maildrop/.{id}"
mv "$dir/maildrop/.{id}" "$dir/maildrop/{id}"
sync "$dir/maildrop"
chmod 0700 "$dir/maildrop/{id}"
postkick -c {conf} public pickup W 2>/dev/null || true
"""


def instances(site: Site, node: str) -> dict[str, str]:
    """The Postfix instances of a node: {tier: configuration}."""
    return {tier: conf for tier, conf in INSTANCES.items() if tier in site.nodes[node].tiers}


def waiting(remote: Remote, node: str, conf: str) -> list[dict[str, Any]]:
    """What is in an instance's queue, as postqueue says it; nothing where the instance was never set up."""
    printed = remote.run(node, f"test ! -e {conf}/main.cf || postqueue -c {conf} -j")
    return [json.loads(line) for line in printed.splitlines()]


def left(site: Site, remote: Remote, node: str) -> int:
    """How many messages are in a node's queues, in whatever state. Raises Refused if it cannot say."""
    try:
        return sum(len(waiting(remote, node, conf)) for conf in instances(site, node).values())
    except RemoteError as error:
        raise Refused(
            f"{node}: does not say what waits in its queues ({error}); mend that, or switch it off if that may be "
            "lost, and run this again; nothing was changed"
        ) from None


def flush(site: Site, remote: Remote, node: str, seconds: float) -> int:
    """Tries all waiting mail of a node now; returns how many messages are left when it is empty or the time is up."""
    deadline = time.monotonic() + seconds
    confs = instances(site, node).values()
    remote.run(node, "; ".join(f"postqueue -c {conf} -f" for conf in confs))
    while True:
        count = left(site, remote, node)
        if not count or time.monotonic() > deadline:
            return count
        time.sleep(1)


def move(site: Site, remote: Remote, node: str, others: Iterable[str]) -> tuple[int, int]:
    """Hands what waits in a node's queues to another node of the same tier: (messages moved, messages that stay).

    Mail that an operator has put on hold stays, and so does what is just being delivered.
    """
    moved, stay = 0, 0
    for tier, conf in instances(site, node).items():
        target = next((name for name in others if tier in site.nodes[name].tiers), None)
        for entry in waiting(remote, node, conf):
            if not target or entry["queue_name"] != "deferred":
                stay += 1
                continue
            name = entry["queue_id"]
            remote.run(node, f"postsuper -c {conf} -h {name}")
            if name not in {held["queue_id"] for held in waiting(remote, node, conf) if held["queue_name"] == "hold"}:
                continue  # it was delivered at this very moment
            try:
                remote.pipe(node, _GIVE.format(conf=conf, id=name), target, _TAKE.format(conf=conf, id=name), 600)
            except BaseException:
                remote.run(node, f"postsuper -c {conf} -H {name}")
                raise
            remote.run(node, f"postsuper -c {conf} -d {name}")
            moved += 1
    return moved, stay
