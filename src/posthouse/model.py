"""The site model: what `site.yml` may say, and everything that follows from it.

`sitefile.load` reads a site file into a `Site`. Addresses, names, groups, pools and firewall sets are properties of
the `Site`; nothing derived is written down anywhere. What is wrong between parts of a site is found by `problems`.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Set
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from netaddr import IPAddress, IPNetwork, IPRange
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, create_model

from posthouse import roles
from posthouse.machines import BOOT_GIB, Install, Macs
from posthouse.strict import Place, Problem, Strict, did_you_mean

# A class that a site does not describe carries these tiers.
STANDARD_CLASSES = {
    "mail": ["directory", "store", "filter", "mx", "submission", "outbound"],
    "lb": ["directory", "lb", "access"],
}
# More under one name is a slip of the keyboard; it must be refused before anything is made of it.
LARGEST_RANGE = 4096
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


def _ip(value: Any) -> IPAddress:
    try:
        return IPAddress(str(value), version=4)
    except Exception:
        raise ValueError(f"{reprlib.repr(value)} is not an IPv4 address; write it like 10.77.0.5") from None


def _cidr(value: Any) -> IPNetwork:
    try:
        network = IPNetwork(str(value), version=4)
    except Exception:
        raise ValueError(f"{reprlib.repr(value)} is not an IPv4 network; write it like 10.77.0.0/24") from None
    if network.ip != network.network:
        raise ValueError(f"{value} has host bits set; did you mean {network.cidr}?")
    return network


def _range(value: Any) -> IPRange:
    first, dash, last = str(value).partition("-")
    if not dash:
        raise ValueError(f"{reprlib.repr(value)} is not an address range; write it like 10.77.0.11-10.77.0.99")
    low, high = _ip(first.strip()), _ip(last.strip())
    if high < low:
        raise ValueError(f"{value} ends before it begins; write the smaller address first")
    return IPRange(low, high)


def _tier(value: str) -> str:
    if value == "base":
        raise ValueError("base is on every node; leave it out here")
    if value not in roles.TIERS:
        raise ValueError(f"no tier {value!r}; {did_you_mean(value, roles.TIERS[1:])}")
    return value


def _node_names(value: str) -> str:
    match = re.fullmatch(r"([a-z][a-z0-9-]{0,30})\[(\d{1,99}):(\d{1,99})\]", value)
    if not match:
        return _checked(NAME, "the name of a node; write it like mail1, or mail[1:3] for three of them")(value)
    count = int(match[3]) - int(match[2]) + 1
    if count < 1:
        raise ValueError("the range is empty; write the smaller number first, like mail[1:3]")
    if count > LARGEST_RANGE:
        raise ValueError(f"the range stands for {count} nodes, and {LARGEST_RANGE} is the most; did you mean fewer?")
    return value


def _checked(pattern: str | re.Pattern[str], what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{reprlib.repr(value)} is not {what}")
        return value

    return check


NAME = re.compile(r"[a-z]([a-z0-9-]{0,29}[a-z0-9])?")
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
# The last label has a letter in it: 10.77.0.1 is no domain.
_DOMAIN = rf"(?=.{{1,253}}$)({_LABEL}\.)+(?=[a-z0-9-]*[a-z]){_LABEL}"

_text = PlainSerializer(str, return_type=str)
Address = Annotated[Any, BeforeValidator(_ip), _text]
Cidr = Annotated[Any, BeforeValidator(_cidr), _text]
AddressRange = Annotated[Any, BeforeValidator(_range), _text]
Name = Annotated[str, AfterValidator(_checked(NAME, "a name; use a to z, 0 to 9 and hyphens, a letter first: mail1"))]
NodeNames = Annotated[str, AfterValidator(_node_names)]
StoreName = Annotated[str, AfterValidator(_checked(r"s\d{2,3}", "the name of a store; they are s01, s02, … s999"))]
Tier = Annotated[str, AfterValidator(_tier)]
Domain = Annotated[
    str,
    AfterValidator(_checked(_DOMAIN, "a mail domain; write it in lower case, like example.org (others as xn--…)")),
]
# What a site says ends up in configuration files of many kinds; none of them means a line break by it.
Text = Annotated[str, AfterValidator(_checked(r"[^\x00-\x1f\x7f]*", "text of one line; leave out control characters"))]


_REPOSITORY = "a backup repository; write it like /srv/backup/corp, or rclone:REMOTE:PATH for one of rclone's remotes"


class Network(Strict):
    """The network that all nodes share."""

    cidr: Cidr = Field(description="the network itself")
    controller: Address = Field(description="where operators' commands come from; the nodes' ssh is open to it alone")
    nodes: AddressRange = Field(description="addresses of nodes, given out in the order of the site file")
    stores: AddressRange = Field(description="service addresses of stores: s01 has the first, s02 the second, …")
    gateway: Address | None = Field(None, description="default route of the nodes; the controller if left out")
    interface: Annotated[
        str, AfterValidator(_checked(r"[a-z][a-z0-9.]{0,14}", "an interface; write it like eth0 or enp1s0.20"))
    ] = Field("eth0", description="the nodes' interface in this network")
    resolvers: list[Address] = Field(min_length=1, description="DNS servers that the nodes ask")


class NodeClass(Strict):
    """Nodes that are built identically from one image."""

    tiers: list[Tier] = Field(description="what the nodes do; `mail` and `lb` have their tiers if this is left out")
    cores: int = Field(2, ge=1, description="CPU cores of each node; `posthouse plan` counts with them")
    disk_gib: float = Field(500, gt=0, description="GiB of each node's /srv, where mail, queues and directory are")
    install: Install = Install()


class NodeEntry(Strict):
    """One node, or several under a name such as `mail[1:3]`, which then have consecutive addresses."""

    klass: Name = Field(alias="class", description="one of `classes`")
    address: Address | None = Field(None, description="the (first) address; by default the next free one of the range")
    mac: Macs | None = Field(None, description="MAC address of the interface that it boots from; a list for a range")
    spare: bool = Field(False, description="a hot spare: does all that its class does, but no store may be put on it")


class StoreEntry(Strict):
    """Where a store lives."""

    primary: Name = Field(description="the node that serves it")
    replicas: list[Name] = Field(default_factory=list, description="nodes that hold a copy, always up to date")
    weight: float = Field(1.0, gt=0, description="share of new accounts, relative to other stores")


class Cluster(Strict):
    """Nodes that decide who serves a store when its primary fails. A majority of them has to be up for that."""

    members: list[Name] = Field(description="store nodes that run etcd; an odd number, at least 3")


class Directory(Strict):
    """The directory's providers: the nodes that take writes. Every other node carries a read replica."""

    providers: list[Name] = Field(min_length=1, description="nodes that take writes; two, so that one may be down")


class Accounts(Strict):
    """Defaults of new accounts."""

    quota: int = Field(1024, ge=0, description="MiB; 0 is without limit")
    spam_threshold: int = Field(5, ge=1, le=100, description="points from which mail is filed into Junk")
    password_length: int = Field(10, ge=8, le=128, description="shortest password that is accepted")


class Tls(Strict):
    """Transport encryption on every listener and between all nodes."""

    minimum_version: Literal["TLSv1.2", "TLSv1.3"] = Field("TLSv1.2", description="older ones are refused")
    certificate_days: int = Field(825, ge=60, le=3650, description="how long node certificates are valid")


class Load(Strict):
    """What the site is built for; `posthouse plan` sets it beside what the nodes can do."""

    accounts: int = Field(1000, ge=1, description="people with a mailbox")
    messages_per_account: float = Field(14, ge=0, description="messages received by an account in a day")
    logins_per_account: float = Field(20, ge=0, description="logins of an account in a day, from all its devices")
    peak: float = Field(3, ge=1, description="busiest hour, as a multiple of the average one")
    mailbox_mib: float = Field(200, gt=0, description="average size of a mailbox, in MiB")


class Provision(Strict):
    """How `posthouse provision serve` brings up bare machines of this site."""

    dhcp: Literal["server", "proxy"] = Field(
        "server", description="`proxy` where another DHCP server gives the addresses, and posthouse only the boot file"
    )
    guests: AddressRange | None = Field(
        None, description="addresses lent to machines that are no nodes, so that they get a menu; without, no answer"
    )
    http_port: int = Field(8480, ge=1, le=65535, description="where boot files and images are fetched")
    https_port: int = Field(8481, ge=1, le=65535, description="where machines report, by the site's own CA")


class Keep(Strict):
    """How many backups stay: the last one of each of so many days, weeks and months."""

    daily: int = Field(7, ge=1, description="days")
    weekly: int = Field(5, ge=0, description="weeks")
    monthly: int = Field(12, ge=0, description="months")


class Backup(Strict):
    """Where backups go, how long they stay, and how often one must have been proved good."""

    repository: (
        Annotated[str, AfterValidator(_checked(r"(/|rclone:[\w.-]+:)[^\x00-\x1f\x7f]*", _REPOSITORY))] | None
    ) = Field(
        None,
        description="a folder of the controller's, or rclone:REMOTE:PATH; by default /var/lib/posthouse/backup/SITE",
    )
    keep: Keep = Keep()
    drill_days: int = Field(31, ge=1, description="after so many days without a drill, `drill --status` is red")

    def place(self, site: str) -> str:
        """The repository of a site, as restic names it."""
        return self.repository or f"/var/lib/posthouse/backup/{site}"


class Lab(Strict):
    """Makes this a site that runs on this machine, in network namespaces of its own."""

    outside: Cidr = Field(description="addresses of the rest of the world inside the lab")
    listed: list[Address] = Field(default_factory=list, description="outside addresses on the lab's DNS block list")
    srv_mib: int = Field(2048, ge=256, description="size of each node's /srv file system, in MiB")


class Node(Strict):
    """One machine of the site, with everything derived."""

    name: str
    fqdn: str
    address: str
    klass: str
    tiers: tuple[str, ...]
    provider: bool
    mac: str | None
    spare: bool


class Store(Strict):
    """One store of the site, with everything derived."""

    name: str
    number: int
    host: str
    address: str
    replication_port: int
    primary: str
    replicas: tuple[str, ...]
    weight: float


# Ansible's types of a role's settings. None of posthouse's settings means anything below zero.
_TYPES: dict[str, Any] = {
    "str": Text,
    "int": Annotated[int, Field(ge=0)],
    "float": Annotated[float, Field(ge=0)],
    "bool": bool,
}


@cache
def settings_model(tier: str) -> type[Strict]:
    """The part of `site.yml` that is named after a tier, made from its role's argument_specs."""
    fields: dict[str, Any] = {}
    for name, spec in roles.settings(tier).items():
        kind: Any = _TYPES[spec["elements"] if spec["type"] == "list" else spec["type"]]
        if spec["type"] == "list":
            kind = list[kind]
        if "choices" in spec:
            kind = Literal[tuple(spec["choices"])]
        default = ... if spec.get("required") else spec["default"]
        fields[name] = (kind, Field(default, description=spec["description"], validate_default=True))
    return create_model(f"{tier}_settings", __base__=Directory if tier == "directory" else Strict, **fields)


def expand(name: str) -> list[str]:
    """`mail[08:10]` → mail08, mail09, mail10; a name without a range stays as it is."""
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", name)
    if not match:
        return [name]
    head, first, last = match.groups()
    return [f"{head}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _with_standard_classes(value: Any) -> Any:
    """`mail` and `lb` exist without being named, and keep their tiers where a site describes only their machines."""
    if not isinstance(value, dict):
        return value
    classes: dict[Any, Any] = {name: {"tiers": list(tiers)} for name, tiers in STANDARD_CLASSES.items()}
    for name, entry in value.items():
        classes[name] = {**classes.get(name, {}), **entry} if isinstance(entry, dict) else entry
    return classes


class Site(Strict):
    """One mail platform. The tiers' settings are added from the roles by `site_model`."""

    name: Name = Field(description="the name of its folder in inventory/")
    domains: list[Domain] = Field(min_length=1, description="mail domains; the first one names the nodes")
    network: Network
    classes: Annotated[dict[Name, NodeClass], BeforeValidator(_with_standard_classes)] = Field(
        default_factory=dict, validate_default=True, description="kinds of nodes; `mail` and `lb` need not be described"
    )
    node_entries: dict[NodeNames, NodeEntry] = Field(alias="nodes", min_length=1, description="the machines")
    vips: dict[Literal["mail"], Address] = Field(min_length=1, description="virtual addresses held by the lb nodes")
    directory: Directory
    store_entries: dict[StoreName, StoreEntry] = Field(alias="stores", min_length=1, description="where accounts live")
    cluster: Cluster | None = Field(None, description="without it, stores do not fail over by themselves")
    accounts: Accounts = Accounts()
    tls: Tls = Tls()
    load: Load = Load()
    provision: Provision = Provision()
    backup: Backup = Backup()
    lab: Lab | None = None

    @property
    def domain(self) -> str:
        """The domain that names the nodes."""
        return self.domains[0]

    @property
    def suffix(self) -> str:
        """The directory's suffix: dc=example,dc=com."""
        return ",".join(f"dc={label}" for label in self.domain.split("."))

    @cached_property
    def _places(self) -> list[tuple[str, str, int]]:
        """Every node in the order of the site file: (its key there, its name, its address; 0 where none is left)."""
        given = [(key, entry.address, expand(key)) for key, entry in self.node_entries.items()]
        fixed = {int(address) + i for _, address, names in given if address for i in range(len(names))}
        free = (
            number for number in range(self.network.nodes.first, self.network.nodes.last + 1) if number not in fixed
        )
        return [
            (key, name, int(address) + i if address else next(free, 0))
            for key, address, names in given
            for i, name in enumerate(names)
        ]

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """All nodes by name, in the order of the site file."""
        nodes = {}
        macs = {name: mac for _, name, mac in self._macs}
        for key, name, address in self._places:
            klass = self.node_entries[key].klass
            carried = self.classes[klass].tiers if klass in self.classes else []
            nodes[name] = Node(
                name=name,
                fqdn=f"{name}.{self.domain}",
                address=str(IPAddress(address)),
                klass=klass,
                tiers=tuple(tier for tier in roles.TIERS if tier == "base" or tier in carried),
                provider=name in self.directory.providers,
                mac=macs.get(name),
                spare=self.node_entries[key].spare,
            )
        return nodes

    @property
    def _macs(self) -> list[tuple[str, str, str]]:
        """Every MAC address: (the node's key in the site file, its name, the address)."""
        return [
            (key, name, mac)
            for key, entry in self.node_entries.items()
            for name, mac in zip(expand(key), entry.mac or (), strict=False)
        ]

    def least_disk_gib(self, klass: str) -> float:
        """How large a disk of a node of this class must be: as the site says, or as large as its file systems are."""
        return self.classes[klass].install.disk.min_gib or self._file_systems_gib(self.classes[klass])

    def _file_systems_gib(self, entry: NodeClass) -> float:
        srv = self.lab.srv_mib / 1024 if self.lab else entry.disk_gib
        return srv if entry.install.method == "diskless" else entry.install.root_gib + BOOT_GIB + srv

    @cached_property
    def stores(self) -> dict[str, Store]:
        """All stores by name."""
        stores = {}
        for name, entry in self.store_entries.items():
            number = int(name[1:])
            stores[name] = Store(
                name=name,
                number=number,
                host=f"{name}.{self.domain}",
                address=str(IPAddress(self.network.stores.first + number - 1)),
                replication_port=2100 + number,
                primary=entry.primary,
                replicas=tuple(entry.replicas),
                weight=entry.weight,
            )
        return stores

    @cached_property
    def groups(self) -> dict[str, list[Node]]:
        """The nodes of each class and of each tier."""
        names = [*self.classes, *roles.TIERS]
        return {name: [n for n in self.nodes.values() if name == n.klass or name in n.tiers] for name in names}

    def settings(self, tier: str) -> dict[str, Any]:
        """A tier's settings as its role's variables: {"mx_message_size": …}."""
        section = getattr(self, tier, None)
        names = roles.settings(tier)
        return {f"{tier}_{name}": getattr(section, name) for name in names}

    def sources(self, names: list[str]) -> list[str]:
        """Addresses behind the words of a manifest's `from`: tiers, `nodes`, `controller`, or `any` (an empty list)."""
        key = frozenset(names)
        if key not in self._sources:
            self._sources[key] = [] if "any" in key else [str(address) for address in sorted(self._addresses(key))]
        return self._sources[key]

    @cached_property
    def _sources(self) -> dict[frozenset[str], list[str]]:
        """What `sources` found before: every node asks for the same few sets, and in a large site they are large."""
        return {}

    def _addresses(self, names: Set[str]) -> set[IPAddress]:
        found = {self.network.controller} if "controller" in names else set()
        for name in names - {"controller"}:
            members = self.nodes.values() if name == "nodes" else self.groups[name]
            found.update(IPAddress(node.address) for node in members)
        # A store's answers and its replication may come from its service address, which lives on a store node.
        if {"store", "nodes"} & names:
            found.update(IPAddress(store.address) for store in self.stores.values())
        return found

    def firewall(self, node: Node) -> list[dict[str, Any]]:
        """What the node's tiers let in: [{"port" or "protocol": …, "sources": [address…], empty for any}]."""
        rules = []
        for tier in node.tiers:
            for port in roles.manifest(tier).get("ports", []):
                rules.append(
                    {k: str(v) for k, v in port.items() if k != "from"} | {"sources": self.sources(port["from"])}
                )
        return rules

    def problems(self, broken: Set[str] = frozenset()) -> Iterator[Problem]:
        """What is wrong between the parts of the site; each part by itself is already known to be sound.

        broken: top-level keys of the site file below which something had to be left out. What leans on them is not
        looked at, for it would only echo what is wrong there.
        """
        checks = {
            self._network_problems: {"network", "vips", "lab"},
            self._class_problems: {"classes"},
            self._node_problems: {"network", "classes", "nodes"},
            self._machine_problems: {"classes", "nodes", "lab"},
            self._provision_problems: {"network", "vips", "provision"},
            self._name_problems: {"domains", "vips", "classes", "nodes", "stores"},
            self._provider_problems: {"classes", "nodes", "directory"},
            self._store_problems: {"network", "classes", "nodes", "stores"},
            self._cluster_problems: {"classes", "nodes", "cluster"},
        }
        for check, leans_on in checks.items():
            if not leans_on & broken:
                yield from check()

    def _network_problems(self) -> Iterator[Problem]:
        net = self.network
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
        vips: dict[Place, Any] = {("vips", name): address for name, address in self.vips.items()}
        resolvers: dict[Place, Any] = {
            ("network", "resolvers", str(i)): address for i, address in enumerate(net.resolvers)
        }
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
        for i, domain in enumerate(self.domains):
            if domain in self.domains[:i]:
                yield ("domains", str(i)), f"{domain} stands in the list twice; keep one"
        if self.lab:
            yield from self._lab_problems(self.lab)

    def _lab_problems(self, lab: Lab) -> Iterator[Problem]:
        if lab.outside in self.network.cidr or self.network.cidr in lab.outside:
            yield (
                ("lab", "outside"),
                f"{lab.outside} overlaps network.cidr ({self.network.cidr}); choose another network",
            )
        if lab.outside.prefixlen > 28:
            yield ("lab", "outside"), f"{lab.outside} is too small for the rest of the world; a /28 is the least"
        for i, address in enumerate(self.network.resolvers):
            if address != self.network.controller:
                yield (
                    ("network", "resolvers", str(i)),
                    f"in the lab only the controller answers DNS; write {self.network.controller}",
                )
        for i, address in enumerate(lab.listed):
            if address not in lab.outside:
                yield (
                    ("lab", "listed", str(i)),
                    f"{address} is not in lab.outside ({lab.outside}); choose one of that network",
                )

    def _class_problems(self) -> Iterator[Problem]:
        for klass, entry in self.classes.items():
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

    def _node_problems(self) -> Iterator[Problem]:
        net = self.network
        seen: dict[str, str] = {}
        owners: dict[int, str] = {}
        for key, entry in self.node_entries.items():
            if entry.klass not in self.classes:
                yield ("nodes", key, "class"), f"no class {entry.klass!r}; {did_you_mean(entry.klass, self.classes)}"
        full = False
        for key, name, address in self._places:
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
            count = len(self._places)
            reason = (
                f"{net.nodes} holds {net.nodes.size} nodes, and this site has {count}: no address is left; widen it"
            )
            yield ("network", "nodes"), reason
        carried = {tier for tiers in self._tiers_of.values() for tier in tiers}
        lacking = [tier for tier in roles.TIERS[1:] if tier not in carried]
        if lacking:
            yield ("nodes",), f"no node carries {', '.join(lacking)}; add nodes of a class that does"

    def _machine_problems(self) -> Iterator[Problem]:
        for name, klass in self.classes.items():
            yield from klass.install.problems(("classes", name, "install"), self._file_systems_gib(klass))
        owners: dict[str, str] = {}
        for key, entry in self.node_entries.items():
            count = len(expand(key))
            if entry.mac is not None and len(entry.mac) != count:
                reason = f"addresses of {len(entry.mac)} machines for {count} of them"
                yield ("nodes", key, "mac"), f"{reason}; give one for each, in their order"
        for key, name, mac in self._macs:
            if mac in owners:
                reason = f"{mac} is {owners[mac]}'s already; look at the machine's label, or at `ip link`"
                yield ("nodes", key, "mac"), f"{name}: {reason}"
            owners.setdefault(mac, name)

    def _provision_problems(self) -> Iterator[Problem]:
        net, guests = self.network, self.provision.guests
        place = ("provision", "guests")
        if self.provision.http_port == self.provision.https_port:
            yield ("provision", "https_port"), f"{self.provision.https_port} is http_port as well; choose another"
        if not guests:
            return
        if self.provision.dhcp == "proxy":
            yield place, "with `dhcp: proxy` the other server gives the addresses; leave it out"
        if guests not in net.cidr:
            yield place, f"{guests} is not inside {net.cidr}; choose addresses of that network"
        for name, taken in {"nodes": net.nodes, "stores": net.stores}.items():
            if guests.first <= taken.last and taken.first <= guests.last:
                yield place, f"{guests} overlaps network.{name} ({taken}); give it a range of its own"
        single = {f"vips.{name}": address for name, address in self.vips.items()}
        single |= {f"network.resolvers.{i}": address for i, address in enumerate(net.resolvers)}
        single |= {"network.controller": net.controller}
        single |= {"network.gateway": net.gateway} if net.gateway else {}
        for name, address in single.items():
            if address in guests:
                yield place, f"{guests} takes in {address}, which is {name}; leave it out"
        for address in (net.cidr.network, net.cidr.broadcast):
            if address and address in guests:
                yield place, f"{guests} takes in {address}, which no machine may have; leave it out"

    def _name_problems(self) -> Iterator[Problem]:
        taken = RESERVED | dict.fromkeys(roles.TIERS, "a tier's") | dict.fromkeys(self.classes, "a class's")
        taken |= dict.fromkeys(self.vips, "a VIP's") | dict.fromkeys(self.store_entries, "a store's")
        taken |= {f"ns{i}": "a resolver's" for i in range(1, len(self.network.resolvers) + 1)}
        for key, name, _ in self._places:
            if name in taken:
                yield (
                    ("nodes", key),
                    f"the name {name} is {taken[name]}; call the node otherwise, for instance {name}-1",
                )
        for name in RESERVED.keys() & self.classes.keys():
            yield ("classes", name), f"the name {name} is {RESERVED[name]}; call the class otherwise"
        longest = max((name for _, name, _ in self._places), key=len)
        if len(f"{longest}.{self.domain}") > LONGEST_FQDN:
            reason = f"{longest}.{self.domain} is longer than the {LONGEST_FQDN} characters that a host's name may have"
            yield ("domains", "0"), f"{reason}; put a shorter domain first, which then names the nodes"

    def _provider_problems(self) -> Iterator[Problem]:
        place = ("directory", "providers")
        for name in dict.fromkeys(self.directory.providers):
            if name not in self._tiers_of:
                yield place, f"no node {name!r}; {did_you_mean(name, self._tiers_of)}"
            elif "directory" not in self._tiers_of[name]:
                yield place, f"{name} does not carry the tier directory; choose another node or add the tier"
            if self.directory.providers.count(name) > 1:
                yield place, f"{name} is listed twice; list each node once"

    def _store_problems(self) -> Iterator[Problem]:
        space = self.network.stores
        spares = {name for key, name, _ in self._places if self.node_entries[key].spare}
        numbers: dict[int, str] = {}
        for name, entry in self.store_entries.items():
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
                if member not in self._tiers_of:
                    yield ("stores", name, role), f"no node {member!r}; {did_you_mean(member, self._tiers_of)}"
                elif "store" not in self._tiers_of[member]:
                    yield ("stores", name, role), f"{member} does not carry the tier store; choose a node that does"
                elif member in spares:
                    reason = f"{member} is a spare, which holds no store"
                    fix = f"take `spare: true` from its line, then run: posthouse expand {member}"
                    yield ("stores", name, role), f"{reason}; {fix}"
                if entry.replicas.count(member) > 1:
                    yield ("stores", name, role), f"{member} is listed twice; list each node once"
            if entry.primary in entry.replicas:
                reason = f"{entry.primary} is the store's primary; a replica there dies with it: choose another node"
                yield ("stores", name, "replicas"), reason

    def _cluster_problems(self) -> Iterator[Problem]:
        if self.cluster is None:
            return
        place, members = ("cluster", "members"), self.cluster.members
        for name in dict.fromkeys(members):
            if name not in self._tiers_of:
                yield place, f"no node {name!r}; {did_you_mean(name, self._tiers_of)}"
            elif "store" not in self._tiers_of[name]:
                yield place, f"{name} does not carry the tier store; choose a node that does"
            if members.count(name) > 1:
                yield place, f"{name} is listed twice; list each node once"
        if len(members) < 3 or len(members) % 2 == 0:
            yield (
                place,
                f"{len(members)} members: a majority of them has to be up; name 3 to spare one, or 5 to spare two",
            )

    @cached_property
    def _tiers_of(self) -> dict[str, list[str]]:
        """What each node carries; everything, if its class is unknown: that is one problem and not many."""
        tiers = {name: entry.tiers for name, entry in self.classes.items()}
        return {name: tiers.get(self.node_entries[key].klass, [*roles.TIERS]) for key, name, _ in self._places}


@cache
def site_model() -> type[Site]:
    """`Site` with a section for each tier that has settings."""
    sections: dict[str, Any] = {}
    for tier in roles.TIERS:
        section = settings_model(tier)
        if section.model_fields:
            required = any(field.is_required() for field in section.model_fields.values())
            sections[tier] = (section, ... if required else section())
    return create_model("Site", __base__=Site, **sections)
