"""The site model: what `site.yml` may say, and everything that follows from it.

`sitefile.load` reads a site file into a `Site`. Addresses, names, groups, pools and firewall sets are properties of
the `Site`; nothing derived is written down anywhere. What is wrong between its parts is found by `soundness.problems`.
"""

from __future__ import annotations

from collections.abc import Set
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from netaddr import IPAddress
from pydantic import AfterValidator, BeforeValidator, Field, create_model

from posthouse import roles
from posthouse.machines import BOOT_GIB, Install, Macs
from posthouse.strict import Strict
from posthouse.values import (
    Address,
    AddressRange,
    Cidr,
    Domain,
    Name,
    NodeNames,
    RepositoryPlace,
    StoreName,
    Text,
    Tier,
    checked,
    expand,
)

# A class that a site does not describe carries these tiers.
STANDARD_CLASSES = {
    "mail": ["directory", "store", "filter", "mx", "submission", "outbound"],
    "lb": ["directory", "lb", "access"],
}


class Network(Strict):
    """The network that all nodes share."""

    cidr: Cidr = Field(description="the network itself")
    controller: Address = Field(description="where operators' commands come from; the nodes' ssh is open to it alone")
    nodes: AddressRange = Field(description="addresses of nodes, given out in the order of the site file")
    stores: AddressRange = Field(description="service addresses of stores: s01 has the first, s02 the second, …")
    gateway: Address | None = Field(None, description="default route of the nodes; the controller if left out")
    interface: Annotated[
        str, AfterValidator(checked(r"[a-z][a-z0-9.]{0,14}", "an interface; write it like eth0 or enp1s0.20"))
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

    repository: RepositoryPlace | None = Field(
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
    def places(self) -> list[tuple[str, str, int]]:
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
        macs = {name: mac for _, name, mac in self.macs}
        for key, name, address in self.places:
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
    def macs(self) -> list[tuple[str, str, str]]:
        """Every MAC address: (the node's key in the site file, its name, the address)."""
        return [
            (key, name, mac)
            for key, entry in self.node_entries.items()
            for name, mac in zip(expand(key), entry.mac or (), strict=False)
        ]

    def least_disk_gib(self, klass: str) -> float:
        """How large a disk of a node of this class must be: as the site says, or as large as its file systems are."""
        return self.classes[klass].install.disk.min_gib or self.file_systems_gib(self.classes[klass])

    def file_systems_gib(self, entry: NodeClass) -> float:
        """How much room the file systems of a node of a class take."""
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

    @cached_property
    def tiers_of(self) -> dict[str, list[str]]:
        """What each node carries; everything, if its class is unknown: that is one problem and not many."""
        tiers = {name: entry.tiers for name, entry in self.classes.items()}
        return {name: tiers.get(self.node_entries[key].klass, [*roles.TIERS]) for key, name, _ in self.places}


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
