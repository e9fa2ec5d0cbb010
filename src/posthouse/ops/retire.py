"""A node leaves for good. The site file says where stores live, so it is asked to say so first, and told how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from posthouse import lab
from posthouse.model import Site
from posthouse.ops import drain, failover, queues, quorum, service, state
from posthouse.ops.rebuild import stores_of
from posthouse.ops.state import State
from posthouse.ops.steps import Refused, Step, Stopped, carry_out
from posthouse.remote import Remote


def placement(site: Site, have: State, node: str) -> dict[str, dict[str, Any]]:
    """Where the stores of a node could live instead, as site.yml would have it: {store: {"primary", "replicas"}}.

    A replica becomes the primary; who carries the fewest copies gets the new replica. The node keeps its copy until
    two others have one: the answer then is another one. Raises Refused if nobody can.
    """
    copies = Counter({name.name: 0 for name in site.groups["store"] if name.name != node})
    for store in site.stores.values():
        copies.update(name for name in (store.primary, *store.replicas) if name != node)
    found: dict[str, dict[str, Any]] = {}
    for store in stores_of(site, node):
        stay = [name for name in (store.primary, *store.replicas) if name != node]
        if not any(name in have.answers and (store.name, name) not in have.late for name in stay):
            raise Refused(
                f"{store.name}: {node} has the only complete copy; give it a replica in site.yml, deploy, wait until "
                "it has everything; nothing was changed"
            )
        able = [name for name in copies if name not in stay and name in have.answers and not site.nodes[name].spare]
        if able and len(stay) < 2:
            chosen = min(able, key=lambda name: copies[name])
            copies[chosen] += 1
            stay += [chosen, node]
        found[store.name] = {"primary": stay[0], "replicas": stay[1:]}
    return found


def plan(
    site: Site, have: State, node: str, lacking: dict[str, list[str]] | None = None, cluster: Collection[str] = ()
) -> list[Step]:
    """The steps that take a node away. Raises Refused while anything in the site file still leans on it.

    lacking: {store: nodes that do not have all of it yet}; cluster: the nodes that the cluster itself counts as its
    members.
    """
    state.known(site, node)
    if node in site.directory.providers:
        raise Refused(
            f"directory.providers: {node} is one of them; put another node in its place in site.yml and deploy, then "
            "run this again; nothing was changed"
        )
    for store, names in (lacking or {}).items():
        raise Refused(
            f"{store}: {', '.join(names)} does not have all of it yet; deploy, wait until posthouse stores "
            f"{site.name} says that it is in sync, and run this again; nothing was changed"
        )
    for store, primary in have.primaries.items():
        if primary == node and site.stores[store].primary != node:
            raise Refused(
                f"{store}: {node} serves it, and site.yml has it on {site.stores[store].primary}; run: posthouse "
                f"failback {store} --site {site.name}, and this again; nothing was changed"
            )
    if stores_of(site, node):
        lines = "".join(
            f"\n  {name}: {{primary: {entry['primary']}, replicas: [{', '.join(entry['replicas'])}]}}"
            for name, entry in placement(site, have, node).items()
        )
        raise Refused(
            f"{node}: carries {', '.join(store.name for store in stores_of(site, node))}; write this into site.yml, "
            f"deploy, and run this again:{lines}\nnothing was changed"
        )
    if node in quorum.members(site):
        raise Refused(
            f"cluster.members: {node} is one of them; put another node in its place in site.yml, and run this again "
            "before any deploy: the cluster itself has to learn of it first; nothing was changed"
        )
    others = [name.name for name in site.groups["lb"] if name.name != node]
    if "lb" in site.nodes[node].tiers and not others:
        raise Refused(f"{node}: is the only balancer; add another one first; nothing was changed")
    steps = []
    if node not in have.drained:
        drain.plan(site, have, node)
        steps.append(Step("drain", node, "take it out of service"))
    new = [name for name in quorum.members(site) if name not in cluster]
    # Where it was killed between the two, the cluster has forgotten the one and does not know the other yet.
    if node in cluster or len(new) == 1:
        if len(new) != 1:
            raise Refused(
                f"cluster.members: one node has to take the place of {node}, and new in site.yml are "
                f"{', '.join(new) or 'none'}; name one; nothing was changed"
            )
        state.need_answers(site, have, quorum.members(site))
        steps.append(Step("quorum", node, f"have {new[0]} take its place in the cluster", new[0]))
    if site.cluster and "store" in site.nodes[node].tiers:
        # What it served it hands over only as long as it knows of it: this comes after the drain.
        steps.append(Step("deploy", node, "bring all nodes to what site.yml says of stores and cluster"))
    return [*steps, Step("off", node, "switch it off, for good")]


def lacking(site: Site, remote: Remote) -> dict[str, list[str]]:
    """Of each store: nodes that site.yml gives it, and that do not have all of it; in a site with a cluster."""
    if not site.cluster:
        return {}
    states = failover.states(site, remote)
    found = {}
    for name, store in site.stores.items():
        complete = {states[name].primary, *states[name].in_sync} if name in states else set()
        if missing := [node for node in (store.primary, *store.replicas) if node not in complete]:
            found[name] = missing
    return found


def retire(site: Site, node: str, check: bool = False, wait: int = 60) -> dict[str, Any]:
    """Takes a node out of service and switches it off. Raises Refused, Stopped. Returns the report of `carry_out`."""
    state.known(site, node)
    remote = Remote(site)
    addresses = quorum.listed(site, remote)
    cluster = [name for name, entry in site.nodes.items() if str(entry.address) in addresses]
    steps = plan(site, state.read(site, remote), node, lacking(site, remote), cluster)

    def off(step: Step) -> str:
        # What was on its way when the others were handed on.
        able = state.read(site, remote)
        queues.move(site, remote, step.node, sorted(able.answers - able.drained - {step.node}))
        if left := queues.left(site, remote, step.node):
            raise Stopped(
                f"{left} message(s) still wait in its queues, and would be lost with its disk: release those on hold "
                "(postsuper -H) or delete them there, then run this again"
            )
        if site.lab:
            lab.wipe(site.name, step.node)
        else:
            remote.run(step.node, "systemctl --no-block poweroff")
        return f"now take {step.node} out of site.yml, then: posthouse deploy {site.name}"

    return carry_out(
        f"retire {node}",
        steps,
        {
            "quorum": lambda step: quorum.replace(site, remote, step.node, step.what),
            "deploy": lambda _: service.deploy(site),
            "drain": lambda step: str(drain.Drains(site, remote, wait).drain(step.node)["seconds"]) + " s",
            "off": off,
        },
        check,
    )
