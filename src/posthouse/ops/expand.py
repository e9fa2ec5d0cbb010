"""A node more: it comes up, is converged, the others learn of it, and it serves."""

from __future__ import annotations

import time
from typing import Any

from posthouse import PosthouseError, image, provision, secrets
from posthouse.model import Site
from posthouse.ops import rebalance, service, state
from posthouse.ops.rebuild import stores_of
from posthouse.ops.state import State
from posthouse.ops.steps import Refused, Step, carry_out, way_on
from posthouse.provision.records import Records
from posthouse.remote import Remote

# A machine of metal: its firmware alone takes minutes, and a large disk or an installer takes longer.
INSTALL_SECONDS = 1800


def plan(site: Site, have: State, node: str, phase: str = "waiting") -> list[Step]:
    """The steps from `have` to a site in which the node serves; none if it does. Raises Refused.

    phase: how far provisioning has come with its machine.
    """
    state.known(site, node)
    state.need_answers(site, have, (name for name in site.nodes if name != node))
    new = node not in have.answers
    if new and not site.lab and phase in ("waiting", "reached"):
        raise Refused(
            f"{node}: does not answer; switch it on (a new machine is installed by posthouse provision serve "
            f"{site.name}), and run this again; nothing was changed"
        )
    if node in have.drained:
        raise Refused(
            f"{node}: is drained; put it back with: posthouse undrain {node} --site {site.name}; nothing was changed"
        )
    serves = not new and node in have.deployed and service.in_service(have, node) and _in_all_pools(site, have, node)
    # A spare, say, serves already when it is given its first store.
    if serves and all((store.name, node) in have.carries for store in stores_of(site, node)):
        return []
    how = "start it, from the image of its class" if site.lab else "wait until it is installed and lets us in"
    steps = [Step("machine", node, how)] if new else []
    return [
        *steps,
        Step("deploy", node, "converge it, and tell the others of it: names, firewalls, balancers' pools"),
        Step("serve", node, "wait until the balancers send it clients"),
        Step("verify", node, "verify all of its tiers"),
    ]


def _in_all_pools(site: Site, have: State, node: str) -> bool:
    """Whether every balancer knows the node, as far as it carries a tier that is in a pool."""
    if not service.pooled(site, node):
        return True
    return all(any(node in servers for servers in pools.values()) for pools in have.pools.values())


def expand(site: Site, node: str, check: bool = False) -> dict[str, Any]:
    """Puts a node of the site file into service. Raises Refused, Stopped.

    Returns the report of `carry_out`, and "next": what `posthouse rebalance` would do then, in words.
    """
    started = time.monotonic()
    state.known(site, node)
    if site.lab:
        image.build(site, site.nodes[node].klass)  # from here on this process is in the lab's network
    remote = Remote(site)
    have = state.read(site, remote)
    asked = site.nodes[node].mac and not site.lab and node not in have.answers
    steps = plan(site, have, node, Records(site).read(node).phase if asked else "waiting")

    def machine(step: Step) -> str:
        if site.lab:
            return service.machine(site, step.node)
        provision.reach(site, step.node, INSTALL_SECONDS)
        return ""

    def serve(step: Step) -> str:
        service.await_service(site, remote, step.node)
        return f"serving {time.monotonic() - started:.0f} s after the command"

    report = carry_out(
        f"expand {node}",
        steps,
        {
            "machine": machine,
            "deploy": lambda _: service.deploy(site),
            "serve": serve,
            "verify": lambda step: service.verify(site, step.node),
        },
        check,
        lambda _: way_on(lambda: plan(site, state.read(site, remote), node)),
    )
    return report if check else report | {"next": _rebalance(site, remote)}


def _rebalance(site: Site, remote: Remote) -> list[str]:
    """What `posthouse rebalance` would do now. The node serves, so what stands against it is no failure."""
    try:
        steps = rebalance.plan(*rebalance.loads(site, secrets.load(site), remote))
    except PosthouseError as error:
        return [f"posthouse rebalance {site.name} would be refused: {error}"]
    if not steps:
        return ["every store is within a tenth of its share: posthouse rebalance has nothing to do"]
    return [f"posthouse rebalance {site.name} would move {len(steps)} accounts:", *rebalance.summary(steps)]
