"""What several operations do to a node: converge it, put it into the pools, wait until it serves, verify it."""

from __future__ import annotations

import logging
import time
from typing import Any

from posthouse import PosthouseError, lab, run, secrets
from posthouse.model import Site
from posthouse.ops import state
from posthouse.ops.steps import Step, Stopped
from posthouse.remote import Remote

log = logging.getLogger(__name__)

# A balancer looks at a server that is down every 2 s and wants two good answers; a directory may be longer in filling.
SERVING_SECONDS = 180
# A replica's primary tries again every 5 s; until then the two are not connected, and verify says so.
SETTLED_SECONDS = 90


def machine(site: Site, node: str) -> str:
    """Has a node of a lab running; says what had to be done. Raises LabError."""
    return lab.add(site, secrets.ensure(site), node)[node]


def deploy(site: Site, limit: str | None = None, tiers: list[str] | None = None, filling: bool = False) -> str:
    """Brings nodes to what the site says; returns which changed. Raises Stopped with what Ansible reported.

    filling: the directory's data comes later.
    """
    variables: dict[str, Any] = {"deploy_tiers": tiers} if tiers else {}
    variables |= {"deploy_filling": True} if filling else {}
    result = run.playbook(site, "deploy", *(["--limit", limit] if limit else []), variables=variables, quiet=True)
    failed = {name: node.get("error", "failed") for name, node in result["nodes"].items() if not node["ok"]}
    if failed or not result["ok"]:
        errors = "; ".join(f"{name}: {error}" for name, error in failed.items()) or "ansible-playbook failed"
        raise Stopped(f"{errors}; all that Ansible said stands above")
    changed = [name for name, node in result["nodes"].items() if node["changed"]]
    return f"changed: {', '.join(changed) or 'nothing'}"


def pools(site: Site, node: str, wanted: str, wait: int = 60, limit: str | None = None, force: bool = False) -> str:
    """Drains a node in the balancers' pools, or makes it ready there. wait: seconds for its sessions to end."""
    variables: dict[str, Any] = {"drain_node": node, "drain_state": wanted, "drain_wait": wait, "drain_force": force}
    result = run.playbook(site, "drain", *(["--limit", limit] if limit else []), variables=variables, quiet=True)
    if not result["ok"]:
        errors = [data["error"] for data in result["nodes"].values() if data.get("error")]
        complaints = "; ".join(errors) or "the balancers' pools could not be changed"
        raise Stopped(f"{complaints}; all that Ansible said stands above")
    return ""


def ready(site: Site, have: state.State, node: str) -> Step:
    """The step that puts a node into the pools of the balancers that answer; those that do not are named."""
    balancers = [lb.name for lb in site.groups["lb"]]
    told = [name for name in balancers if name in have.answers or name == node]
    silent = [name for name in balancers if name not in told]
    later = f"posthouse undrain {node} --site {site.name}"
    rest = f"; {' and '.join(silent)} cannot be told now: run {later} once that is back" if silent else ""
    return Step("ready", node, f"put it into the balancers' pools{rest}", ",".join(told))


def put_into_pools(site: Site, step: Step) -> str:
    """Does what `ready` has planned."""
    return pools(site, step.node, "ready", limit=step.what) if step.what and pooled(site, step.node) else ""


def pooled(site: Site, node: str) -> bool:
    """Whether a node carries a tier that is in one of the balancers' pools."""
    return bool({"mx", "submission", "access"} & set(site.nodes[node].tiers))


def in_service(have: state.State, node: str) -> bool:
    """Whether the balancers send clients to a node, in all pools that it is in; true for one that is in none."""
    states = [servers[node] for pools in have.pools.values() for servers in pools.values() if node in servers]
    return all(how == "up" for how in states)


def await_service(site: Site, remote: Remote, node: str) -> str:
    """Waits until a node serves. Raises Stopped after three minutes."""
    started = time.monotonic()
    while True:
        have = state.read(site, remote)
        if node in have.deployed and in_service(have, node):
            return ""
        if time.monotonic() - started > SERVING_SECONDS:
            raise Stopped(
                f"the balancers do not see it serve after {SERVING_SECONDS} s; see: posthouse verify {site.name}"
            )
        time.sleep(1)


def verify(site: Site, node: str | None = None) -> str:
    """Proves every tier of a node, or of all nodes. What is not yet connected gets a while. Raises Stopped."""
    deadline = time.monotonic() + SETTLED_SECONDS
    while True:
        result = run.verify(site, quiet=True, node=node)
        failed = [check for check in result["checks"] if check["outcome"] == "failed"]
        if result["passed"] and not failed:
            return f"{result['passed']} checks passed"
        if time.monotonic() > deadline:
            lines = [f"{check['tier']}: {check['check']}: {_last_line(check['message'])}" for check in failed]
            raise Stopped(f"{'; '.join(lines) or 'no check ran'}; all of it says: posthouse verify {site.name}")
        time.sleep(2)


def _last_line(text: str) -> str:
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E  ")]
    return lines[0] if lines else text.strip().splitlines()[-1] if text.strip() else ""


def quietly(work: Any) -> str:
    """What an attempt to put something back complains of; the attempts after it shall be made all the same."""
    try:
        work()
    except PosthouseError as error:
        return str(error)
    return ""
