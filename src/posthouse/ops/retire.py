"""A node leaves for good. The site file says where stores live, so it is asked to say so first, and told how."""

from __future__ import annotations

from collections import Counter
from typing import Any

from posthouse import lab
from posthouse.model import Site
from posthouse.ops import drain, quorum, state
from posthouse.ops.rebuild import stores_of
from posthouse.ops.state import State
from posthouse.ops.steps import Refused, Step, carry_out
from posthouse.remote import Remote


def placement(site: Site, have: State, node: str) -> dict[str, dict[str, Any]]:
    """Where the stores of a node could live instead, as site.yml would have it: {store: {"primary", "replicas"}}.

    A replica becomes the primary; who carries the fewest copies gets the new replica. Raises Refused if nobody can.
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
        if able:
            chosen = min(able, key=lambda name: copies[name])
            copies[chosen] += 1
            stay.append(chosen)
        found[store.name] = {"primary": stay[0], "replicas": stay[1:]}
    return found


def plan(site: Site, have: State, node: str) -> list[Step]:
    """The steps that take a node away. Raises Refused while anything in the site file still leans on it."""
    state.known(site, node)
    if node in site.directory.providers:
        raise Refused(
            f"directory.providers: {node} is one of them; put another node in its place in site.yml and deploy, then "
            "run this again; nothing was changed"
        )
    if node in quorum.members(site):
        raise Refused(
            f"cluster.members: {node} is one of them; put another node in its place in site.yml and deploy, then run "
            "this again; nothing was changed"
        )
    if stores_of(site, node):
        lines = "".join(
            f"\n  {name}: {{primary: {entry['primary']}, replicas: [{', '.join(entry['replicas'])}]}}"
            for name, entry in placement(site, have, node).items()
        )
        raise Refused(
            f"{node}: carries {', '.join(store.name for store in stores_of(site, node))}; write this into site.yml, "
            f"deploy, wait until the new replicas have everything, and run this again:{lines}\nnothing was changed"
        )
    others = [name.name for name in site.groups["lb"] if name.name != node]
    if "lb" in site.nodes[node].tiers and not others:
        raise Refused(f"{node}: is the only balancer; add another one first; nothing was changed")
    steps = []
    if node not in have.drained:
        drain.plan(site, have, node)
        steps.append(Step("drain", node, "take it out of service"))
    return [*steps, Step("off", node, "switch it off, for good")]


def retire(site: Site, node: str, check: bool = False, wait: int = 60) -> dict[str, Any]:
    """Takes a node out of service and switches it off. Raises Refused, Stopped. Returns the report of `carry_out`."""
    state.known(site, node)
    remote = Remote(site)

    def off(step: Step) -> str:
        if site.lab:
            lab.wipe(site.name, step.node)
        else:
            remote.run(step.node, "systemctl --no-block poweroff")
        return f"now take {step.node} out of site.yml, then: posthouse deploy {site.name}"

    return carry_out(
        f"retire {node}",
        plan(site, state.read(site, remote), node),
        {"drain": lambda step: str(drain.Drains(site, remote, wait).drain(step.node)["seconds"]) + " s", "off": off},
        check,
    )
