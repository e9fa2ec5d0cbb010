"""The zones of a site, read back by a DNS library rather than compared as text."""

import base64

import dns.name
import dns.reversename
import dns.zone
import pytest
from netaddr import IPNetwork

from posthouse.model import Site
from posthouse.zones import _reverse, zones

RECORD = "v=DKIM1; k=rsa; p=" + base64.b64encode(bytes(300)).decode()
DKIM = [{"domain": "lab.test", "selector": "ph1", "record": RECORD}]


class Dns:
    """All zones of a site, asked like a server."""

    def __init__(self, site: Site) -> None:
        texts = zones(site, DKIM)
        self.zones = {
            dns.name.from_text(name): dns.zone.from_text(text, origin=dns.name.from_text(name), relativize=False)
            for name, text in texts.items()
        }

    def ask(self, name: str, kind: str) -> list[str]:
        """The answers of the closest zone; none if the name does not exist there."""
        asked = dns.name.from_text(name)
        zone = self.zones[max((origin for origin in self.zones if asked.is_subdomain(origin)), key=len)]
        found = zone.get_rdataset(asked, kind)
        return sorted(answer.to_text() for answer in found) if found else []


@pytest.fixture(scope="module")
def server(site: Site) -> Dns:
    return Dns(site)


def test_every_node_and_store_has_its_address_forward_and_back(server: Dns, site: Site) -> None:
    for thing in [*site.nodes.values(), *site.stores.values()]:
        name = thing.fqdn if hasattr(thing, "fqdn") else thing.host
        assert server.ask(name, "A") == [thing.address]
        assert server.ask(str(dns.reversename.from_address(thing.address)), "PTR") == [f"{name}."]


def test_mail_for_every_domain_goes_to_the_vip(server: Dns, site: Site) -> None:
    for domain in site.domains:
        assert server.ask(domain, "MX") == [f"10 mail.{domain}."]
        assert server.ask(f"mail.{domain}", "A") == [str(site.vips["mail"])]
        assert server.ask(f"_imaps._tcp.{domain}", "SRV") == [f"0 1 993 mail.{domain}."]


def test_spf_names_exactly_the_outbound_nodes(server: Dns, site: Site) -> None:
    (policy,) = server.ask(site.domain, "TXT")
    version, *terms, rest = policy.strip('"').split()
    allowed = {str(address) for term in terms for address in IPNetwork(term.removeprefix("ip4:"))}
    assert (version, rest) == ("v=spf1", "-all")
    assert allowed == {node.address for node in site.groups["outbound"]}


def test_long_key_is_split_into_strings_that_join_to_itself(server: Dns) -> None:
    (text,) = server.ask("ph1._domainkey.lab.test", "TXT")
    parts = [part.strip('"') for part in text.split('" "')]
    assert all(len(part) <= 255 for part in parts)
    assert "".join(parts) == RECORD


def test_strangers_have_matching_names_and_a_mail_server(server: Dns, site: Site) -> None:
    assert site.lab
    for address in (site.lab.outside[1], site.lab.outside[-2]):
        (name,) = server.ask(str(dns.reversename.from_address(str(address))), "PTR")
        assert server.ask(name, "A") == [str(address)]
    (exchange,) = server.ask("example.net", "MX")
    assert server.ask(exchange.split()[1], "A")


def test_blocklist_answers_for_what_is_listed_and_for_its_own_test(server: Dns, site: Site) -> None:
    assert site.lab
    for address in ["127.0.0.2", *map(str, site.lab.listed)]:
        reverse = ".".join(reversed(address.split(".")))
        assert server.ask(f"{reverse}.dnsbl.{site.domain}", "A") == ["127.0.0.2"]
    assert server.ask(f"1.0.0.127.dnsbl.{site.domain}", "A") == []


def test_a_site_outside_the_lab_gets_no_zones_of_the_world(site: Site) -> None:
    names = zones(site.model_copy(update={"lab": None}))
    assert set(names) == {*site.domains, "0.77.10.in-addr.arpa"}


def test_serial_is_the_only_difference_between_two_renderings(site: Site) -> None:
    first, second = zones(site, DKIM, 5), zones(site, DKIM, 6)
    assert {name: text.replace(" 5 3600", " 6 3600") for name, text in first.items()} == second


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("10.77.0.0/24", ["0.77.10.in-addr.arpa"]),
        ("10.77.0.128/25", ["0.77.10.in-addr.arpa"]),
        ("10.77.4.0/22", [f"{i}.77.10.in-addr.arpa" for i in (4, 5, 6, 7)]),
        ("10.20.0.0/16", ["20.10.in-addr.arpa"]),
        ("10.20.0.0/15", ["20.10.in-addr.arpa", "21.10.in-addr.arpa"]),
        ("10.0.0.0/8", ["10.in-addr.arpa"]),
    ],
)
def test_reverse_zones_end_at_octets(network: str, expected: list[str]) -> None:
    assert list(_reverse(IPNetwork(network), {})) == expected


def test_pointers_lie_in_the_zone_of_their_address() -> None:
    found = _reverse(IPNetwork("10.77.4.0/22"), {"10.77.5.9": "a.test", "10.78.0.1": "elsewhere.test"})
    pointers = {name: zone["pointers"] for name, (_, zone) in found.items() if zone["pointers"]}
    assert pointers == {"5.77.10.in-addr.arpa": [{"label": "9", "name": "a.test"}]}
