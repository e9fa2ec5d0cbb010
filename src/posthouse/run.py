"""Starts what does the work: ansible-playbook and pytest. Nothing else in posthouse starts them."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posthouse import PosthouseError, inventory, lab, roles, secrets
from posthouse.model import Site

BIN = Path(sys.executable).parent

# A worker for each node as far as six go: most of a check is waiting for ssh.
VERIFY = ["-n", "6", "--dist", "loadgroup", "--no-header", "-p", "no:cacheprovider"]


class Busy(PosthouseError):
    """Somebody else is changing the site; the message says who."""


def reach(site: Site) -> Path:
    """Gets ready to talk to the site's nodes: inside the lab for a lab site. Returns the ssh configuration to use.

    Raises SecretsError for a site without secrets: none of its nodes would know new ones.
    """
    config = inventory.write_ssh(site, secrets.ensure(site, new=False))
    if site.lab:
        lab.enter(site.name)
    return config


@contextmanager
def exclusive(site: Site, lock: str = "lock") -> Iterator[None]:
    """Holds a lock of the site's on this controller; raises Busy with the holder's name if it is taken.

    lock: `lock` is what changes the site; `drill` and `probe` go on beside that, each once.
    """
    folder = inventory.RUNTIME / site.name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / lock).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Busy(f"{site.name}: locked by {file.read()}; wait for it to end, then run this again") from None
        file.truncate(0)
        file.write(
            f"{getpass.getuser()} (pid {os.getpid()}, {' '.join(sys.argv[1:])}, since {time.strftime('%H:%M:%S')})"
        )
        file.flush()
        yield


def environment(site: Site) -> dict[str, str]:
    """What Ansible and pytest need to know about the site."""
    return os.environ | {
        "ANSIBLE_CONFIG": str(roles.ROOT / "ansible.cfg"),
        "POSTHOUSE_SITE": site.name,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        # On the controller Python is this environment's; it has posthouse, which the plugins import.
        "PYTHONDONTWRITEBYTECODE": "",
    }


def playbook(
    site: Site, name: str, *arguments: str, variables: dict[str, Any] | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Runs `playbooks/NAME.yml` on the site.

    Returns {"ok": bool, "nodes": {name: {"ok", "changed", "restarted": [unit], "seconds"}}}.

    With `quiet`, what Ansible prints goes to standard error, so that standard output can carry JSON.
    """
    reach(site)
    with tempfile.NamedTemporaryFile(prefix="posthouse-report-") as report:
        command: list[str | Path] = [BIN / "ansible-playbook", roles.ROOT / "playbooks" / f"{name}.yml", *arguments]
        if variables:
            command += ["--extra-vars", json.dumps(variables)]
        done = subprocess.run(
            command,
            env=environment(site) | {"POSTHOUSE_REPORT": report.name},
            stdout=sys.stderr if quiet else None,
            cwd=roles.ROOT,
            check=False,
        )
        text = Path(report.name).read_text()
    return {"ok": done.returncode == 0, **(json.loads(text) if text else {"nodes": {}})}


def pytest(
    *arguments: str | Path, env: dict[str, str] | None = None, quiet: bool = False
) -> tuple[int, list[dict[str, Any]]]:
    """Runs pytest.

    Returns (exit status, [{"name", "where", "outcome" (passed|failed|skipped), "seconds", "message"}]).
    """
    with tempfile.NamedTemporaryFile(prefix="posthouse-junit-", suffix=".xml") as report:
        command = [BIN / "pytest", f"--junitxml={report.name}", *arguments]
        done = subprocess.run(
            command, env=env, cwd=roles.ROOT, stdout=subprocess.DEVNULL if quiet else None, check=False
        )
        text = Path(report.name).read_text()
    return done.returncode, list(_cases(text)) if text else []


def _cases(junit: str) -> Iterator[dict[str, Any]]:
    for case in ET.fromstring(junit).iter("testcase"):
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped") is not None
        yield {
            "name": case.get("name"),
            "where": case.get("classname"),
            "outcome": "failed" if failure is not None else "skipped" if skipped else "passed",
            "seconds": float(case.get("time", 0)),
            "message": (failure.text or "") if failure is not None else "",
        }


def verify(site: Site, tiers: list[str] | None = None, quiet: bool = False, node: str | None = None) -> dict[str, Any]:
    """Runs the read-only verify suite, on all nodes or on one.

    Returns {"passed": n, "failed": n, "checks": [{"tier", "check", "node", "outcome", "seconds", "message"}]}.
    """
    reach(site)
    arguments = ["tests/verify", "--site", site.name, *VERIFY]
    for tier in tiers or []:
        arguments += ["--tier", tier]
    if node:
        arguments += ["--node", node]
    _, cases = pytest(*arguments, env=environment(site), quiet=quiet)
    checks = []
    for case in cases:
        name, _, parameters = str(case["name"]).rstrip("]").partition("[")
        node = next((n for n in site.nodes if n in parameters.split("-")), "")
        rest = "-".join(part for part in parameters.split("-") if part != node)
        check = name.removeprefix("test_").replace("_", " ") + (f": {rest}" if rest else "")
        tier = str(case["where"]).rpartition("test_")[2]
        checks.append(
            {"tier": tier, "check": check, "node": node, **{k: case[k] for k in ("outcome", "seconds", "message")}}
        )
    return {
        "passed": sum(check["outcome"] == "passed" for check in checks),
        "failed": sum(check["outcome"] == "failed" for check in checks),
        "checks": checks,
    }
