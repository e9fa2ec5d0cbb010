"""DNS zones of a site, rendered from templates/zones. A site in the lab gets the rest of the world's zones as well."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2
from netaddr import IPAddress, IPNetwork, cidr_merge

from posthouse import roles
from posthouse.model import Site

WORLD = "example.net"  # where strangers' mail comes from and goes to, in the lab


def zones(site: Site, dkim: Sequence[dict[str, str]] = (), serial: int = 1) -> dict[str, str]:
    """All zones of a site: {name without the last dot, or "." for the root: text of the zone file}.

    dkim: [{"domain", "selector", "record"}], as `Secrets.dkim` has them.
    """
    records = _addresses(site)
    vips = {name: str(address) for name, address in site.vips.items()}
    shared: dict[str, Any] = {
        "serial": serial,
        "domain": site.domain,
        "name_servers": [
            {"name": f"ns{i}.{site.domain}", "address": str(address)}
            for i, address in enumerate(site.network.resolvers, 1)
        ],
        "spf": _spf(site),
    }
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for domain in site.domains:
        keys = [
            {"name": f"{key['selector']}._domainkey", "text": quoted(key["record"])}
            for key in dkim
            if key["domain"] == domain
        ]
        addresses = records if domain == site.domain else vips
        found[domain] = "domain", {"name": domain, "addresses": addresses, "dkim": keys}
    pointers = {address: f"{name}.{site.domain}" for name, address in records.items()}
    found |= _reverse(site.network.cidr, pointers)
    if site.lab:
        hosts = {f"host-{address.words[-1]}": str(address) for address in list(site.lab.outside[1:255])}
        mx = str(site.lab.outside[min(25, site.lab.outside.size - 2)])
        hosts |= {"mx": mx}
        on_list = ["127.0.0.2", *map(str, site.lab.listed)]
        listed = [{"name": ".".join(reversed(address.split("."))), "address": address} for address in on_list]
        found[WORLD] = "world", {"addresses": hosts, "network": str(site.lab.outside)}
        found |= _reverse(site.lab.outside, {address: f"{name}.{WORLD}" for name, address in hosts.items()})
        found[f"dnsbl.{site.domain}"] = "dnsbl", {"listed": listed}
        found["."] = "root", {}
    environment = _environment()
    return {
        name: environment.get_template(f"{template}.zone.j2").render(shared | own)
        for name, (template, own) in found.items()
    }


def quoted(text: str) -> str:
    """A TXT record's value as a zone file has it: in pieces of the 255 bytes that DNS takes."""
    return " ".join(f'"{text[i : i + 255]}"' for i in range(0, len(text), 255))


def _addresses(site: Site) -> dict[str, str]:
    """Every name in the site's first domain that has an address."""
    return (
        {"controller": str(site.network.controller)}
        | {name: str(address) for name, address in site.vips.items()}
        | {node.name: node.address for node in site.nodes.values()}
        | {store.name: store.address for store in site.stores.values()}
    )


def _spf(site: Site) -> str:
    """Who may send the domains' mail: the outbound nodes' addresses; names would cost receivers further look-ups."""
    merged = cidr_merge([IPAddress(node.address) for node in site.groups["outbound"]])
    terms = [f"ip4:{network.ip if network.prefixlen == 32 else network}" for network in merged]
    return quoted(" ".join(["v=spf1", *terms, "-all"]))


def _reverse(network: IPNetwork, pointers: dict[str, str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The reverse zones of a network. Zones end at octets, so a /22 has four of them."""
    octets = max(1, min(3, -(-network.prefixlen // 8)))
    parts = list(network.subnet(octets * 8)) if network.prefixlen <= octets * 8 else [network.supernet(octets * 8)[0]]
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for part in parts:
        inside = {address: name for address, name in pointers.items() if IPAddress(address) in part}
        labels = [
            {"label": ".".join(reversed(address.split(".")[octets:])), "name": name} for address, name in inside.items()
        ]
        found[".".join(reversed(str(part.ip).split(".")[:octets])) + ".in-addr.arpa"] = "reverse", {"pointers": labels}
    return found


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(roles.ROOT / "templates" / "zones"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
