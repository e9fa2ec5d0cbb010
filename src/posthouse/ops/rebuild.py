"""A dead node comes back: machine, converge, and its data from its peers."""

from __future__ import annotations

import time
from typing import Any

from posthouse import image, lab
from posthouse.model import Site, Store
from posthouse.ops import failover, queues, quorum, service, spool, state
from posthouse.ops.state import State
from posthouse.ops.steps import Refused, Step, carry_out, way_on
from posthouse.remote import Remote

# Of a disk, for what is copied back: a spool that fills it takes no mail.
FILL = 0.9


def holders(site: Site, have: State, node: str) -> dict[str, str]:
    """Of each store on a node: another node that has a copy, the one that serves it now if there is one.

    Raises Refused where there is none.
    """
    found = {}
    for store in stores_of(site, node):
        members = [store.primary, *store.replicas]
        # One that lacks something is the last resort: it is better than nothing, and nothing else is there.
        candidates = [
            have.primaries.get(store.name, ""),
            *sorted(members, key=have.behind(store.name)),
        ]
        other = next((name for name in candidates if name != node and name in have.answers), None)
        if not other:
            raise Refused(
                f"{store.name}: no node that answers has a copy; bring one of {', '.join(members)} back; if their "
                "disks are lost, let others begin the store anew and fill it from the backup: docs/nodes.md, 'What "
                "has no other copy'; nothing was changed"
            )
        found[store.name] = other
    return found


def need_complete(site: Site, have: State, node: str, records: dict[str, failover.State]) -> None:
    """Refuses if the cluster says that a node may have mail alone, for its disk is not to be wiped on that."""
    for store in stores_of(site, node) if site.cluster else []:
        record = records.get(store.name)
        if record and record.primary == node and not have.answers.intersection(record.in_sync):
            others = [name for name in (store.primary, *store.replicas) if name != node]
            raise Refused(
                f"{store.name}: {node} served it last, and nobody who answers has all of it, so mail may be on {node} "
                f"alone; start it, or bring {', '.join(record.in_sync or others)} back; if its disk is lost, let "
                f"another node serve what it has first: posthouse failover {store.name} --to NODE --force --site "
                f"{site.name}; nothing was changed"
            )


def stores_of(site: Site, node: str) -> list[Store]:
    """The stores that have their primary or a replica on a node."""
    return [store for store in site.stores.values() if node in (store.primary, *store.replicas)]


def plan(site: Site, have: State, node: str, sizes: dict[str, int], waiting: int = 0) -> list[Step]:
    """The steps that make a node anew. Raises Refused.

    sizes: MiB of each store to be copied back; waiting: messages in the node's queues, as far as it can be asked.
    """
    state.known(site, node)
    others = [name for name in site.nodes if name != node]
    entry = site.nodes[node]
    if node in have.deployed and node not in have.drained:
        raise Refused(
            f"{node}: is alive, and a rebuild wipes its disk; if you mean it, take it out of service first: "
            f"posthouse drain {node} --site {site.name}; nothing was changed"
        )
    if waiting:
        raise Refused(
            f"{node}: {waiting} message(s) wait in its queues, and would be lost with its disk; release those on hold "
            f"(postsuper -H) or delete them there, then hand on the rest: posthouse undrain {node}, posthouse drain "
            f"{node} --site {site.name}; nothing was changed"
        )
    if not site.lab and node not in have.answers:
        raise Refused(
            f"{node}: does not answer; have it installed first: posthouse provision reinstall {node} --site "
            f"{site.name}; nothing was changed"
        )
    if "directory" in entry.tiers:
        state.need_answers(site, have, (name for name in site.directory.providers if name != node))
        if not any(name in have.answers for name in site.directory.providers if name != node):
            if have.deployed - {node}:
                fix = "write another node that answers at the end of directory.providers in site.yml, for it has them "
                fix += f"too, run: posthouse deploy {site.name}, and this again"
            else:
                fix = f"bring all of the site back from the backup: posthouse rebuild --site {site.name}"
            raise Refused(
                f"{node}: is the only provider of the directory, so nobody can give it its entries; {fix}; nothing was "
                "changed"
            )
    sources = holders(site, have, node)
    for name, source in sources.items():
        # Who serves lacks nothing, whatever a former primary has noted.
        if node in have.deployed and have.primaries.get(name) != source and (name, source) in have.late:
            raise Refused(
                f"{name}: {source} lacks some of what {node} has; wait until it has everything, or where it never "
                f"will, switch {node} off: what {source} has comes back then; nothing was changed"
            )
    room = site.lab.srv_mib if site.lab else site.classes[entry.klass].disk_gib * 1024
    if sum(sizes.values()) > room * FILL:
        raise Refused(
            f"{node}: no room: {', '.join(sizes)} are {sum(sizes.values())} MiB and /srv has {room:.0f} MiB, of which "
            f"{FILL:.0%} may be used; give it a larger disk; nothing was changed"
        )
    steps = []
    if site.lab:
        steps.append(Step("machine", node, "throw away what is left of it, start it from the image of its class"))
    steps += [Step("copy", node, f"copy {name} from {source}", name) for name, source in sources.items()]
    if node in quorum.members(site):
        helper = _helper(site, have, node)
        steps.append(Step("quorum", node, f"have {helper} take it into the cluster anew", helper))
    steps.append(Step("deploy", node, "converge it; its directory fills itself from a provider"))
    if "lb" in entry.tiers:
        steps += [
            Step("pools", node, f"tell its balancer that {name} is drained", name)
            for name in others
            if name in have.drained
        ]
    # Its primaries still believe in connections to the node that died, and would until the next change.
    steps += [
        Step("link", source, f"connect {name}'s replication to {node} anew", name)
        for name, source in sources.items()
        if have.primaries.get(name) == source
    ]
    if node in have.drained or node not in have.deployed:
        steps.append(service.ready(site, have, node))
    return [
        *steps,
        Step("serve", node, "wait until the balancers send it clients"),
        Step("verify", node, "verify all of its tiers"),
    ]


def _helper(site: Site, have: State, node: str) -> str:
    """A member of the cluster that can take the node in. Raises Refused if the others have no majority."""
    members = quorum.members(site)
    well = [name for name in members if name != node and name in have.answers]
    if 2 * len(well) <= len(members):
        raise Refused(
            f"{node}: of the cluster's members ({', '.join(members)}) only {', '.join(well) or 'none'} answers, "
            "which is no majority; bring another one back first; nothing was changed"
        )
    return well[0]


def rebuild(site: Site, node: str, check: bool = False, measure: bool = False) -> dict[str, Any]:
    """Makes a dead node anew from image, site file, secrets and its peers. Raises Refused, Stopped.

    measure: copies each store's files a second time without care, to have something to compare with.
    Returns the report of `carry_out`, and "copies": {store: see spool.report}.
    """
    started = time.monotonic()
    state.known(site, node)
    if site.lab:
        image.build(site, site.nodes[node].klass)  # from here on this process is in the lab's network
    remote = Remote(site)
    have = state.read(site, remote)
    sources = holders(site, have, node)
    waiting = queues.left(site, remote, node) if node in have.deployed else 0
    sizes = {name: spool.sizes(remote, source, [name])[name] for name, source in sources.items()}
    steps = plan(site, have, node, sizes, waiting)
    if stores_of(site, node):
        need_complete(site, have, node, failover.states(site, remote))
    copies: dict[str, Any] = {}

    def machine(step: Step) -> str:
        lab.wipe(site.name, step.node)
        what = service.machine(site, step.node)
        # Until it serves it counts as drained: who stops half-way may run the same command again.
        state.mark(remote, step.node, {"for": "rebuild", "since": time.strftime("%FT%T%z")})
        return what

    def copy(step: Step) -> str:
        copied = spool.copy(remote, step.what, sources[step.what], step.node)
        beside = spool.raw(remote, step.what, sources[step.what], step.node) if measure else None
        copies[step.what] = spool.report(copied, beside)
        return ", ".join(f"{name}: {value}" for name, value in copies[step.what].items())

    def ready(step: Step) -> str:
        state.unmark(remote, step.node)
        return service.put_into_pools(site, step)

    def serve(step: Step) -> str:
        service.await_service(site, remote, step.node)
        return f"serving {time.monotonic() - started:.0f} s after the command"

    report = carry_out(
        f"rebuild {node}",
        steps,
        {
            "machine": machine,
            "copy": copy,
            "deploy": lambda step: service.deploy(site, step.node),
            "link": lambda step: remote.run(step.node, f"systemctl try-restart 'cyrus-sync-{step.what}@{node}'"),
            "quorum": lambda step: quorum.rejoin(site, remote, step.node, step.what),
            "pools": lambda step: service.pools(site, step.what, "drain", 0, limit=step.node, force=True),
            "ready": ready,
            "serve": serve,
            "verify": lambda step: service.verify(site, step.node),
        },
        check,
        lambda _: way_on(lambda: plan(site, state.read(site, remote), node, sizes)),
    )
    return report | {"copies": copies}
