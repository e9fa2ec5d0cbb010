"""What is wrong between the parts of a site; each part by itself is known to be sound by then.

A problem is a place in the site file, and a sentence that says what is wrong there and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from typing import Any

from netaddr import IPAddress

from posthouse import roles
from posthouse.model import Lab, Site
from posthouse.strict import Place, Problem, did_you_mean
from posthouse.values import expand

# Names in the first domain, or in Ansible's inventory, that a node would take away from something else.
RESERVED = {
    "all": "Ansible's group of everything",
    "ungrouped": "a group of Ansible's own",
    "providers": "the group of the directory's providers",
    "localhost": "every machine's own",
    "controller": "the controller's",
    "dnsbl": "the lab's block list's",
}
# A host's name and a certificate's subject have room for this many characters.
LONGEST_FQDN = 64


def problems(site: Site, broken: Set[str] = frozenset()) -> Iterator[Problem]:
    """What is wrong between the parts of the site; each part by itself is already known to be sound.

    broken: top-level keys of the site file below which something had to be left out. What leans on them is not
    looked at, for it would only echo what is wrong there.
    """
    checks = {
        _network: {"network", "vips", "lab"},
        _class: {"classes"},
        _node: {"network", "classes", "nodes"},
        _machine: {"classes", "nodes", "lab"},
        _provision: {"network", "vips", "provision"},
        _name: {"domains", "vips", "classes", "nodes", "stores"},
        _provider: {"classes", "nodes", "directory"},
        _store: {"network", "classes", "nodes", "stores"},
        _cluster: {"classes", "nodes", "cluster"},
    }
    for check, leans_on in checks.items():
        if not leans_on & broken:
            yield from check(site)


def _network(site: Site) -> Iterator[Problem]:
    net = site.network
    ranges = {"nodes": net.nodes, "stores": net.stores}
    edges = {net.cidr.network, net.cidr.broadcast} - {None}
    for name, addresses in ranges.items():
        if addresses not in net.cidr:
            yield ("network", name), f"{addresses} is not inside {net.cidr}; choose addresses of that network"
        for edge in sorted(edge for edge in edges if edge in addresses):
            yield ("network", name), f"{addresses} takes in {edge}, which no machine may have; leave it out"
    if net.nodes.first <= net.stores.last and net.stores.first <= net.nodes.last:
        yield ("network", "stores"), f"{net.stores} overlaps nodes ({net.nodes}); give each a range of its own"
    here: dict[Place, Any] = {("network", "controller"): net.controller}
    if net.gateway:
        here["network", "gateway"] = net.gateway
    vips: dict[Place, Any] = {("vips", name): address for name, address in site.vips.items()}
    resolvers: dict[Place, Any] = {("network", "resolvers", str(i)): address for i, address in enumerate(net.resolvers)}
    for place, address in (here | vips).items():
        if address not in net.cidr:
            yield place, f"{address} is not inside {net.cidr}; choose an address of that network"
        elif address in edges:
            yield place, f"{address} is one that no machine in {net.cidr} may have; choose another"
    for place, address in (here | vips | resolvers).items():
        for name, addresses in ranges.items():
            if address in addresses:
                yield place, f"{address} lies in network.{name} ({addresses}); choose one outside of it"
    for place, vip in vips.items():
        for other, address in (here | resolvers).items():
            if vip == address:
                yield place, f"{vip} is {'.'.join(other)} already; choose a free address"
    for i, domain in enumerate(site.domains):
        if domain in site.domains[:i]:
            yield ("domains", str(i)), f"{domain} stands in the list twice; keep one"
    if site.lab:
        yield from _lab(site, site.lab)


def _lab(site: Site, lab: Lab) -> Iterator[Problem]:
    if lab.outside in site.network.cidr or site.network.cidr in lab.outside:
        yield (
            ("lab", "outside"),
            f"{lab.outside} overlaps network.cidr ({site.network.cidr}); choose another network",
        )
    if lab.outside.prefixlen > 28:
        yield ("lab", "outside"), f"{lab.outside} is too small for the rest of the world; a /28 is the least"
    for i, address in enumerate(site.network.resolvers):
        if address != site.network.controller:
            yield (
                ("network", "resolvers", str(i)),
                f"in the lab only the controller answers DNS; write {site.network.controller}",
            )
    for i, address in enumerate(lab.listed):
        if address not in lab.outside:
            yield (
                ("lab", "listed", str(i)),
                f"{address} is not in lab.outside ({lab.outside}); choose one of that network",
            )


def _class(site: Site) -> Iterator[Problem]:
    for klass, entry in site.classes.items():
        place = ("classes", klass, "tiers")
        for tier in entry.tiers:
            for needed, why in roles.NEEDS.get(tier, {}).items():
                if needed not in entry.tiers:
                    yield place, f"{tier} needs {needed} on the same node ({why}); add {needed}"
            for other, why in roles.CONFLICTS.get(tier, {}).items():
                if other in entry.tiers:
                    yield place, f"{tier} and {other} cannot share a node ({why}); give each a class of its own"
        for tier, times in Counter(entry.tiers).items():
            if times > 1:
                yield place, f"{tier} is listed twice; list it once"
        # Groups of nodes are called after classes and after tiers; of one name there can be only one group.
        if klass in roles.TIERS and klass not in ("base", *entry.tiers):
            yield (
                ("classes", klass),
                f"{klass} is the name of a tier that this class does not carry; call it otherwise",
            )


def _node(site: Site) -> Iterator[Problem]:
    net = site.network
    seen: dict[str, str] = {}
    owners: dict[int, str] = {}
    for key, entry in site.node_entries.items():
        if entry.klass not in site.classes:
            yield ("nodes", key, "class"), f"no class {entry.klass!r}; {did_you_mean(entry.klass, site.classes)}"
    full = False
    for key, name, address in site.places:
        place = ("nodes", key)
        if name in seen:
            yield place, f"{name} is named by {seen[name]!r} already; name every node once"
        elif not address:
            full = True
        elif not net.nodes.first <= address <= net.nodes.last:
            where = IPAddress(address) if address < 2**32 else "an address beyond the last one there is"
            yield place, f"{name}: {where} is not in network.nodes ({net.nodes}); choose one that is, or widen it"
        elif address in owners:
            yield place, f"{name}: {IPAddress(address)} is {owners[address]}'s already; choose a free one"
        seen.setdefault(name, key)
        owners.setdefault(address, name)
    if full:
        count = len(site.places)
        reason = f"{net.nodes} holds {net.nodes.size} nodes, and this site has {count}: no address is left; widen it"
        yield ("network", "nodes"), reason
    carried = {tier for tiers in site.tiers_of.values() for tier in tiers}
    lacking = [tier for tier in roles.TIERS[1:] if tier not in carried]
    if lacking:
        yield ("nodes",), f"no node carries {', '.join(lacking)}; add nodes of a class that does"


def _machine(site: Site) -> Iterator[Problem]:
    for name, klass in site.classes.items():
        yield from klass.install.problems(("classes", name, "install"), site.file_systems_gib(klass))
    owners: dict[str, str] = {}
    for key, entry in site.node_entries.items():
        count = len(expand(key))
        if entry.mac is not None and len(entry.mac) != count:
            reason = f"addresses of {len(entry.mac)} machines for {count} of them"
            yield ("nodes", key, "mac"), f"{reason}; give one for each, in their order"
    for key, name, mac in site.macs:
        if mac in owners:
            reason = f"{mac} is {owners[mac]}'s already; look at the machine's label, or at `ip link`"
            yield ("nodes", key, "mac"), f"{name}: {reason}"
        owners.setdefault(mac, name)


def _provision(site: Site) -> Iterator[Problem]:
    net, guests = site.network, site.provision.guests
    place = ("provision", "guests")
    if site.provision.http_port == site.provision.https_port:
        yield ("provision", "https_port"), f"{site.provision.https_port} is http_port as well; choose another"
    if not guests:
        return
    if site.provision.dhcp == "proxy":
        yield place, "with `dhcp: proxy` the other server gives the addresses; leave it out"
    if guests not in net.cidr:
        yield place, f"{guests} is not inside {net.cidr}; choose addresses of that network"
    for name, taken in {"nodes": net.nodes, "stores": net.stores}.items():
        if guests.first <= taken.last and taken.first <= guests.last:
            yield place, f"{guests} overlaps network.{name} ({taken}); give it a range of its own"
    single = {f"vips.{name}": address for name, address in site.vips.items()}
    single |= {f"network.resolvers.{i}": address for i, address in enumerate(net.resolvers)}
    single |= {"network.controller": net.controller}
    single |= {"network.gateway": net.gateway} if net.gateway else {}
    for name, address in single.items():
        if address in guests:
            yield place, f"{guests} takes in {address}, which is {name}; leave it out"
    for address in (net.cidr.network, net.cidr.broadcast):
        if address and address in guests:
            yield place, f"{guests} takes in {address}, which no machine may have; leave it out"


def _name(site: Site) -> Iterator[Problem]:
    taken = RESERVED | dict.fromkeys(roles.TIERS, "a tier's") | dict.fromkeys(site.classes, "a class's")
    taken |= dict.fromkeys(site.vips, "a VIP's") | dict.fromkeys(site.store_entries, "a store's")
    taken |= {f"ns{i}": "a resolver's" for i in range(1, len(site.network.resolvers) + 1)}
    for key, name, _ in site.places:
        if name in taken:
            yield (
                ("nodes", key),
                f"the name {name} is {taken[name]}; call the node otherwise, for instance {name}-1",
            )
    for name in RESERVED.keys() & site.classes.keys():
        yield ("classes", name), f"the name {name} is {RESERVED[name]}; call the class otherwise"
    longest = max((name for _, name, _ in site.places), key=len)
    if len(f"{longest}.{site.domain}") > LONGEST_FQDN:
        reason = f"{longest}.{site.domain} is longer than the {LONGEST_FQDN} characters that a host's name may have"
        yield ("domains", "0"), f"{reason}; put a shorter domain first, which then names the nodes"


def _provider(site: Site) -> Iterator[Problem]:
    place = ("directory", "providers")
    for name in dict.fromkeys(site.directory.providers):
        if name not in site.tiers_of:
            yield place, f"no node {name!r}; {did_you_mean(name, site.tiers_of)}"
        elif "directory" not in site.tiers_of[name]:
            yield place, f"{name} does not carry the tier directory; choose another node or add the tier"
        if site.directory.providers.count(name) > 1:
            yield place, f"{name} is listed twice; list each node once"


def _store(site: Site) -> Iterator[Problem]:
    space = site.network.stores
    spares = {name for key, name, _ in site.places if site.node_entries[key].spare}
    numbers: dict[int, str] = {}
    for name, entry in site.store_entries.items():
        number = int(name[1:])
        if number in numbers:
            yield ("stores", name), f"{numbers[number]} has the same number; give each store a number of its own"
        numbers[number] = name
        if not 1 <= number <= space.size:
            reason = f"network.stores ({space}) has addresses for s01 to s{space.size:02d}"
            yield ("stores", name), f"{reason}; widen it, or choose one of those"
        for role, member in [
            ("primary", entry.primary),
            *(("replicas", name) for name in dict.fromkeys(entry.replicas)),
        ]:
            if member not in site.tiers_of:
                yield ("stores", name, role), f"no node {member!r}; {did_you_mean(member, site.tiers_of)}"
            elif "store" not in site.tiers_of[member]:
                yield ("stores", name, role), f"{member} does not carry the tier store; choose a node that does"
            elif member in spares:
                reason = f"{member} is a spare, which holds no store"
                fix = f"take `spare: true` from its line, then run: posthouse expand {member} --site {site.name}"
                yield ("stores", name, role), f"{reason}; {fix}"
            if entry.replicas.count(member) > 1:
                yield ("stores", name, role), f"{member} is listed twice; list each node once"
        if entry.primary in entry.replicas:
            reason = f"{entry.primary} is the store's primary; a replica there dies with it: choose another node"
            yield ("stores", name, "replicas"), reason


def _cluster(site: Site) -> Iterator[Problem]:
    if site.cluster is None:
        return
    place, members = ("cluster", "members"), site.cluster.members
    for name in dict.fromkeys(members):
        if name not in site.tiers_of:
            yield place, f"no node {name!r}; {did_you_mean(name, site.tiers_of)}"
        elif "store" not in site.tiers_of[name]:
            yield place, f"{name} does not carry the tier store; choose a node that does"
        if members.count(name) > 1:
            yield place, f"{name} is listed twice; list each node once"
    if len(members) < 3 or len(members) % 2 == 0:
        yield (
            place,
            f"{len(members)} members: a majority of them has to be up; name 3 to spare one, or 5 to spare two",
        )
