"""`posthouse demo`: a whole cluster on this machine, verified, and mail sent through it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posthouse import lab, run, secrets
from posthouse.apart import apart
from posthouse.model import Site

LOGS = Path("/var/log/posthouse")
# Of the lab suite, what shows that the cluster does its work; the verbs of day two have their tests beside these.
MAIL = ("delivery", "refusals", "mailbox", "submission", "changes", "outages")


def demo(site: Site, keep: bool) -> int:
    """Builds the cluster, deploys, verifies, sends mail, and takes the cluster down unless `keep`.

    Prints one line per check and `demo: N passed, N failed` last. Returns the exit status.
    """
    started = time.monotonic()
    counts = {"passed": 0, "failed": 0}
    try:
        for sentence, step in PHASES.items():
            if not _phase(sentence, step, site, counts):
                break
        else:
            _mail(site, counts)
    finally:
        if counts["failed"]:
            print(f"what went wrong is above; the nodes' journals are in {_keep_journals(site)}")
        if keep:
            print(f"the cluster goes on running; see it with: posthouse lab status {site.name}")
        else:
            lab.down(site.name)
    print(f"all of it took {time.monotonic() - started:.0f} s")
    print(f"demo: {counts['passed']} passed, {counts['failed']} failed", flush=True)
    return 1 if counts["failed"] else 0


def prepare(site: Site) -> bool:
    """Installs what the controller lacks, and starts afresh."""
    lab.ensure_requirements()
    lab.down(site.name)
    return True


def build(site: Site) -> bool:
    """Images, and all nodes up."""
    lab.up(site, secrets.ensure(site))
    return True


def deploy(site: Site) -> bool:
    """All nodes converged."""
    return bool(run.playbook(site, "deploy", quiet=True)["ok"])


def verify(site: Site) -> bool:
    """The verify suite is green."""
    result = run.verify(site, quiet=True)
    for check in result["checks"]:
        if check["outcome"] == "failed":
            print(f"        {check['tier']}: {check['check']} on {check['node']}\n{check['message']}")
    return bool(result["passed"] and not result["failed"])


PHASES: dict[str, Callable[[Site], bool]] = {
    "The controller has what it needs": prepare,
    "All nodes run, each from the image of its class": build,
    "All nodes are converged": deploy,
    "Every tier is verified": verify,
}


def _phase(sentence: str, step: Callable[[Site], bool], site: Site, counts: dict[str, int]) -> bool:
    started = time.monotonic()
    # In a process of its own: it enters the lab's network for good, and the next one is to build things outside of it.
    good = apart(lambda: step(site))
    counts["passed" if good else "failed"] += 1
    print(f"{'ok' if good else 'FAILED':<8}{time.monotonic() - started:6.1f} s  {sentence}", flush=True)
    return good


def _keep_journals(site: Site) -> Path:
    """Saves the journal of every node that still runs, for the cluster is about to go; returns the folder."""
    folder = LOGS / time.strftime("demo-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    for node in lab.status(site.name):
        if node["state"] == "running":
            command = [*lab.command(site.name, node["name"]), "journalctl", "--no-pager", "--output=short-precise"]
            with (folder / f"{node['name']}.log").open("wb") as file:
                subprocess.run(command, stdout=file, check=False)
    return folder


def _mail(site: Site, counts: dict[str, Any]) -> None:
    suites = [f"tests/lab/test_{part}.py" for part in MAIL]
    status, cases = run.pytest(*suites, "--site", site.name, "--lines", env=os.environ | run.environment(site))
    for outcome in ("passed", "failed"):
        counts[outcome] += sum(case["outcome"] == outcome for case in cases)
    if status and not any(case["outcome"] == "failed" for case in cases):
        counts["failed"] += 1
        print(f"FAILED            the lab suite did not run (pytest's exit status is {status})")
