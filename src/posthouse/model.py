"""The site model: what `site.yml` may say, and everything that follows from it.

`sitefile.load` reads a site file into a `Site`. Addresses, names, groups, pools and firewall sets are properties of
the `Site`; nothing derived is written down anywhere. What is wrong between parts of a site is found by `problems`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from netaddr import IPAddress, IPNetwork, IPRange
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, create_model

from posthouse import roles


def _ip(value: Any) -> IPAddress:
    try:
        return IPAddress(str(value), version=4)
    except Exception:
        raise ValueError(f"{value!r} is not an IPv4 address; write it like 10.77.0.5") from None


def _cidr(value: Any) -> IPNetwork:
    try:
        network = IPNetwork(str(value), version=4)
    except Exception:
        raise ValueError(f"{value!r} is not an IPv4 network; write it like 10.77.0.0/24") from None
    if network.ip != network.network:
        raise ValueError(f"{value} has host bits set; did you mean {network.cidr}?")
    return network


def _range(value: Any) -> IPRange:
    first, dash, last = str(value).partition("-")
    try:
        if not dash:
            raise ValueError
        return IPRange(_ip(first.strip()), _ip(last.strip()))
    except Exception:
        raise ValueError(f"{value!r} is not an address range; write it like 10.77.0.11-10.77.0.99") from None


_text = PlainSerializer(str, return_type=str)
Address = Annotated[Any, BeforeValidator(_ip), _text]
Cidr = Annotated[Any, BeforeValidator(_cidr), _text]
AddressRange = Annotated[Any, BeforeValidator(_range), _text]

# The names under `nodes`; a range stands for several.
NodeNames = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}(\[\d+:\d+\])?$")]
StoreName = Annotated[str, Field(pattern=r"^s\d{2,3}$")]

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
Domain = Annotated[str, Field(pattern=rf"^({_LABEL}\.)+{_LABEL}$", max_length=253)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")]


class Strict(BaseModel):
    """Unknown keys are refused everywhere; a typo must never silently change nothing."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, ignored_types=(cached_property,)
    )


class Network(Strict):
    """The network that all nodes share."""

    cidr: Cidr
    controller: Address = Field(description="where operators' commands come from; the nodes' ssh is open to it alone")
    nodes: AddressRange = Field(description="addresses of nodes")
    stores: AddressRange = Field(description="service addresses of stores: s01 has the first, s02 the second, …")
    gateway: Address | None = Field(None, description="default route of the nodes; the controller if left out")
    interface: str = Field("eth0", pattern=r"^[a-z][a-z0-9.]{0,14}$")
    resolvers: list[Address] = Field(min_length=1, description="DNS servers that the nodes ask")


class NodeClass(Strict):
    """Nodes that are built identically from one image."""

    tiers: list[Literal["directory", "store", "filter", "mx", "submission", "outbound", "lb", "access"]]


class NodeEntry(Strict):
    """One node, or several under a name such as `mail[1:3]`, which then have consecutive addresses."""

    klass: Name = Field(alias="class")
    address: Address | None = Field(None, description="the (first) address; by default the next free one of the range")


class StoreEntry(Strict):
    """Where a store lives."""

    primary: Name
    replicas: list[Name] = Field(default_factory=list)
    weight: float = Field(1.0, gt=0, description="share of new accounts, relative to other stores")


class Directory(Strict):
    """The directory's providers: the nodes that take writes. Every other node carries a read replica."""

    providers: list[Name] = Field(min_length=1)


class Accounts(Strict):
    """Defaults of new accounts."""

    quota: int = Field(1024, ge=0, description="MiB; 0 is without limit")
    spam_threshold: int = Field(5, ge=1, le=100, description="points from which mail is filed into Junk")
    password_length: int = Field(10, ge=8, description="shortest password that is accepted")


class Tls(Strict):
    """Transport encryption on every listener and between all nodes."""

    minimum_version: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    certificate_days: int = Field(825, ge=30, le=3650, description="how long node certificates are valid")


class Load(Strict):
    """What the site is built for; `posthouse plan` sets it beside what the nodes can do."""

    accounts: int = Field(1000, ge=1)
    messages_per_account: float = Field(14, ge=0, description="messages received by an account in a day")
    peak: float = Field(3, ge=1, description="busiest hour, as a multiple of the average one")
    mailbox_mib: float = Field(200, gt=0, description="average size of a mailbox")


class Lab(Strict):
    """Makes this a site that runs on this machine, in network namespaces of its own."""

    outside: Cidr = Field(description="addresses of the rest of the world inside the lab")
    listed: list[Address] = Field(default_factory=list, description="outside addresses on the lab's DNS blocklist")
    srv_mib: int = Field(2048, ge=256, description="size of each node's /srv file system")


class Node(Strict):
    """One machine of the site, with everything derived."""

    name: str
    fqdn: str
    address: str
    klass: str
    tiers: tuple[str, ...]
    provider: bool


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


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}


@cache
def settings_model(tier: str) -> type[Strict]:
    """The part of `site.yml` that is named after a tier, made from its role's argument_specs."""
    fields: dict[str, Any] = {}
    for name, spec in roles.settings(tier).items():
        kind: Any = _TYPES[spec.get("type", "str")]
        if kind is list:
            kind = list[_TYPES[spec.get("elements", "str")]]  # type: ignore[misc]
        if "choices" in spec:
            kind = Literal[tuple(spec["choices"])]
        required = spec.get("required", False)
        fields[name] = (kind, Field(... if required else spec.get("default")))
    return create_model(f"{tier}_settings", __base__=Directory if tier == "directory" else Strict, **fields)


def expand(name: str) -> list[str]:
    """`mail[08:10]` → mail08, mail09, mail10; a name without a range stays as it is."""
    match = re.fullmatch(r"([a-z][a-z0-9-]*)\[(\d+):(\d+)\]", name)
    if not match:
        return [name]
    head, first, last = match.groups()
    return [f"{head}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


Problem = tuple[tuple[str, ...], str]
"""Where (the path of keys into site.yml), and what is wrong with how to mend it."""


class Site(Strict):
    """One mail platform. The tiers' settings are added from the roles by `site_model`."""

    name: Name
    domains: list[Domain] = Field(min_length=1, description="mail domains; the first one names the nodes")
    network: Network
    classes: dict[Name, NodeClass] = Field(
        default_factory=lambda: {
            "mail": NodeClass(tiers=["directory", "store", "filter", "mx", "submission", "outbound"]),
            "lb": NodeClass(tiers=["directory", "lb", "access"]),
        }
    )
    node_entries: dict[NodeNames, NodeEntry] = Field(alias="nodes", min_length=1)
    vips: dict[Literal["mail"], Address] = Field(min_length=1, description="virtual addresses held by the lb nodes")
    store_entries: dict[StoreName, StoreEntry] = Field(alias="stores", min_length=1)
    accounts: Accounts = Accounts()
    tls: Tls = Tls()
    load: Load = Load()
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
    def nodes(self) -> dict[str, Node]:
        """All nodes by name, in the order of the site file."""
        taken = {
            str(entry.address + i)
            for key, entry in self.node_entries.items()
            if entry.address
            for i in range(len(expand(key)))
        }
        free = (str(address) for address in self.network.nodes if str(address) not in taken)
        nodes = {}
        for key, entry in self.node_entries.items():
            tiers = self.classes[entry.klass].tiers if entry.klass in self.classes else []
            for i, name in enumerate(expand(key)):
                nodes[name] = Node(
                    name=name,
                    fqdn=f"{name}.{self.domain}",
                    address=str(entry.address + i) if entry.address else next(free, "exhausted"),
                    klass=entry.klass,
                    tiers=tuple(tier for tier in roles.TIERS if tier == "base" or tier in tiers),
                    provider=name in self.directory.providers,  # type: ignore[attr-defined]
                )
        return nodes

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
                **entry.model_dump(),
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
        if "any" in names:
            return []
        found = set()
        for name in names:
            if name == "controller":
                found.add(str(self.network.controller))
            else:
                members = self.nodes.values() if name == "nodes" else self.groups[name]
                found.update(node.address for node in members)
        # A store's answers and its replication may come from its service address, which lives on a store node.
        if {"store", "nodes"} & set(names):
            found.update(store.address for store in self.stores.values())
        return [str(IPAddress(address)) for address in sorted(IPAddress(a) for a in found)]

    def firewall(self, node: Node) -> list[dict[str, Any]]:
        """What the node's tiers let in: [{"port" or "protocol": …, "sources": [address…], empty for any}]."""
        rules = []
        for tier in node.tiers:
            for port in roles.manifest(tier).get("ports", []):
                rules.append(
                    {k: str(v) for k, v in port.items() if k != "from"} | {"sources": self.sources(port["from"])}
                )
        return rules

    def problems(self) -> Iterator[Problem]:
        """What is wrong between the parts of the site; each part by itself is already known to be sound."""
        yield from self._network_problems()
        yield from self._node_problems()
        yield from self._store_problems()

    def _network_problems(self) -> Iterator[Problem]:
        net = self.network
        ranges = {"nodes": net.nodes, "stores": net.stores}
        for name, addresses in ranges.items():
            if addresses not in net.cidr:
                yield ("network", name), f"{addresses} is not inside {net.cidr}; choose addresses of that network"
        if (
            set(net.nodes.cidrs())
            and IPAddress(net.nodes.first) <= IPAddress(net.stores.last)
            and IPAddress(net.stores.first) <= IPAddress(net.nodes.last)
        ):
            yield ("network", "stores"), f"{net.stores} overlaps nodes ({net.nodes}); give each a range of its own"
        singles = {("network", "controller"): net.controller} | {("vips", k): v for k, v in self.vips.items()}
        for place, address in singles.items():
            if address not in net.cidr:
                yield place, f"{address} is not inside {net.cidr}; choose an address of that network"
            for name, addresses in ranges.items():
                if address in addresses:
                    yield place, f"{address} lies in network.{name} ({addresses}); choose one outside of it"
        for name, vip in self.vips.items():
            if vip == net.controller:
                yield ("vips", name), f"{vip} is the controller's address; choose another"
        if self.lab and (self.lab.outside in net.cidr or net.cidr in self.lab.outside):
            yield ("lab", "outside"), f"{self.lab.outside} overlaps network.cidr ({net.cidr}); choose another network"

    def _node_problems(self) -> Iterator[Problem]:
        seen: dict[str, str] = {}
        addresses: dict[str, str] = {}
        for key, entry in self.node_entries.items():
            if not expand(key):
                yield ("nodes", key), "the range is empty; write the smaller number first, like mail[1:3]"
            if entry.klass not in self.classes:
                yield ("nodes", key, "class"), f"no class {entry.klass!r}; the classes are {', '.join(self.classes)}"
            for name in expand(key):
                if name in seen:
                    yield ("nodes", key), f"{name} is named by {seen[name]!r} already; name every node once"
                seen[name] = key
        for node in self.nodes.values():
            place = ("nodes", next((k for k in self.node_entries if node.name in expand(k)), node.name))
            if node.address == "exhausted":
                yield place, f"{node.name}: network.nodes ({self.network.nodes}) has no address left; widen it"
            elif IPAddress(node.address) not in self.network.nodes:
                yield place, f"{node.name}: {node.address} is not in network.nodes ({self.network.nodes})"
            elif node.address in addresses:
                yield place, f"{node.name}: {node.address} is {addresses[node.address]}'s already; choose a free one"
            addresses[node.address] = node.name
        for klass, definition in self.classes.items():
            for tier in definition.tiers:
                needed, why = roles.NEEDS.get(tier, ("", ""))
                if needed and needed not in definition.tiers:
                    yield ("classes", klass, "tiers"), f"{tier} needs {needed} on the same node ({why}); add {needed}"
        for tier in ("directory", "store", "mx", "lb", "access"):
            if not self.groups[tier]:
                yield ("nodes",), f"no node carries the tier {tier}; add a node of a class that does"
        for name in self.directory.providers:  # type: ignore[attr-defined]
            place = ("directory", "providers")
            if name not in self.nodes:
                yield place, f"no node {name!r}; name nodes of this site"
            elif "directory" not in self.nodes[name].tiers:
                yield place, f"{name} does not carry the tier directory; choose another node or add the tier"

    def _store_problems(self) -> Iterator[Problem]:
        for name, entry in self.store_entries.items():
            if int(name[1:]) < 1 or int(name[1:]) > self.network.stores.size:
                yield (
                    ("stores", name),
                    (
                        f"network.stores ({self.network.stores}) holds {self.network.stores.size} stores, s01 to "
                        f"s{self.network.stores.size:02d}; widen it or choose a lower number"
                    ),
                )
            for role, member in [("primary", entry.primary), *(("replicas", replica) for replica in entry.replicas)]:
                if member not in self.nodes:
                    yield ("stores", name, role), f"no node {member!r}; name a node of this site"
                elif "store" not in self.nodes[member].tiers:
                    yield ("stores", name, role), f"{member} does not carry the tier store; choose a node that does"
            if entry.primary in entry.replicas:
                yield (
                    ("stores", name, "replicas"),
                    (f"{entry.primary} is the store's primary; a replica there dies with it: choose another node"),
                )
            if len(set(entry.replicas)) < len(entry.replicas):
                yield ("stores", name, "replicas"), "a node is listed twice; list each once"


@cache
def site_model() -> type[Site]:
    """`Site` with a section for each tier that has settings."""
    sections: dict[str, Any] = {}
    for tier in roles.TIERS:
        section = settings_model(tier)
        if not section.model_fields:
            continue
        required = any(field.is_required() for field in section.model_fields.values())
        sections[tier] = (section, ... if required else section())
    return create_model("Site", __base__=Site, **sections)
