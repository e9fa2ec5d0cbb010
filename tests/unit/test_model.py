from posthouse import roles
from posthouse.model import Site
from posthouse.sitefile import load, parse
from posthouse.values import expand


def test_expand() -> None:
    assert expand("mail1") == ["mail1"]
    assert expand("mail[1:3]") == ["mail1", "mail2", "mail3"]
    assert expand("mail[08:10]") == ["mail08", "mail09", "mail10"]
    assert expand("rack-1-mail[2:2]") == ["rack-1-mail2"]


def test_addresses_are_given_out_in_order_around_those_that_are_named(sound: str) -> None:
    site = parse(sound.replace("{class: lb}", "{class: lb}\n  mail[8:9]: {class: mail, address: 10.77.0.12}"))
    assert {node.name: node.address for node in site.nodes.values()} == {
        "lb1": "10.77.0.11",
        "mail8": "10.77.0.12",
        "mail9": "10.77.0.13",
        "lb2": "10.77.0.14",
        "mail1": "10.77.0.21",
        "mail2": "10.77.0.22",
        "mail3": "10.77.0.23",
    }


def test_nodes(site: Site) -> None:
    mail1 = site.nodes["mail1"]
    assert (mail1.fqdn, mail1.klass, mail1.provider) == ("mail1.lab.test", "mail", True)
    assert mail1.tiers == ("base", "directory", "store", "filter", "mx", "submission", "outbound")
    assert site.nodes["lb1"].tiers == ("base", "directory", "lb", "access")
    assert not site.nodes["mail3"].provider


def test_stores_have_addresses_and_ports_by_their_number(sound: str) -> None:
    site = parse(sound.replace("s03:", "s42:"))
    assert {store.name: (store.host, store.address, store.replication_port) for store in site.stores.values()} == {
        "s01": ("s01.lab.test", "10.77.0.101", 2101),
        "s02": ("s02.lab.test", "10.77.0.102", 2102),
        "s42": ("s42.lab.test", "10.77.0.142", 2142),
    }


def test_standard_classes_keep_their_tiers_beside_those_of_the_site(sound: str) -> None:
    site = parse(sound + "classes: {mail: {cores: 8}, spare: {tiers: []}}\n")
    assert "store" in site.nodes["mail1"].tiers
    assert (site.classes["mail"].cores, site.classes["lb"].cores) == (8, 2)
    assert site.classes["spare"].tiers == []


def test_groups_are_classes_and_tiers(site: Site) -> None:
    names = {group: [node.name for node in nodes] for group, nodes in site.groups.items()}
    assert names["mail"] == names["store"] == ["mail1", "mail2", "mail3"]
    assert names["lb"] == names["access"] == ["lb1", "lb2"]
    assert names["base"] == names["directory"] == ["lb1", "lb2", "mail1", "mail2", "mail3"]


def test_suffix_is_the_first_domain(sound: str) -> None:
    assert parse(sound.replace("[lab.test]", "[mail.example.org, lab.test]")).suffix == "dc=mail,dc=example,dc=org"


def test_settings_are_the_sites_or_the_roles_default(site: Site) -> None:
    settings = site.settings("mx")
    assert settings["mx_message_size"] == 50
    assert set(settings) == {f"mx_{name}" for name in roles.settings("mx")}
    assert settings["mx_queue_lifetime"] == roles.settings("mx")["queue_lifetime"]["default"]


def test_sources(site: Site) -> None:
    assert site.sources(["any", "lb"]) == []
    assert site.sources(["controller"]) == ["10.77.0.1"]
    assert site.sources(["lb"]) == ["10.77.0.11", "10.77.0.12"]
    stores = ["10.77.0.101", "10.77.0.102", "10.77.0.103"]
    assert site.sources(["store"]) == ["10.77.0.21", "10.77.0.22", "10.77.0.23", *stores]


def test_firewall_opens_what_the_nodes_tiers_declare_and_nothing_else(site: Site) -> None:
    for node in site.nodes.values():
        ports = [port for tier in node.tiers for port in roles.manifest(tier)["ports"]]
        declared = {str(port.get("port", port.get("protocol"))) for port in ports}
        assert {rule.get("port", rule.get("protocol")) for rule in site.firewall(node)} == declared
    smtp = [rule["sources"] for rule in site.firewall(site.nodes["mail1"]) if rule.get("port") == "25"]
    assert smtp == [["10.77.0.11", "10.77.0.12"]], "only the balancers may claim a client's address"


def opened(site: Site, node: str, port: int) -> bool:
    for rule in site.firewall(site.nodes[node]):
        first, _, last = rule.get("port", "0").partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


def test_replication_of_every_store_gets_through_the_firewall() -> None:
    for site in (load("lab"), load("million")):
        for store in site.stores.values():
            assert all(opened(site, replica, store.replication_port) for replica in store.replicas), store


def test_million_spreads_the_load_of_a_dead_node() -> None:
    site = load("million")
    assert len(site.nodes) > 100
    assert site.load.accounts == 1_000_000
    for node in site.groups["store"]:
        served = [store for store in site.stores.values() if store.primary == node.name]
        copies = [store for store in site.stores.values() if node.name in store.replicas]
        if node.spare:
            assert not served + copies
            continue
        assert len(served) == len(copies) == 4
        assert len({store.replicas for store in served}) == 4, "four other nodes take over what this one served"
        assert len({store.primary for store in copies}) == 4
    pairs = [{store.primary, *store.replicas} for store in site.stores.values()]
    assert max(pairs.count(pair) for pair in pairs) == 1, "two dead nodes never take two stores with them"


def test_macs_are_one_for_each_node_of_a_range_in_one_notation(sound: str) -> None:
    macs = "[52-54-00-AA-00-01, 5254.00aa.0002, 525400aa0003]"
    site = parse(sound.replace("address: 10.77.0.21}", f"address: 10.77.0.21, mac: {macs}}}"))
    assert {node.name: node.mac for node in site.nodes.values()} == {
        "lb1": None,
        "lb2": None,
        "mail1": "52:54:00:aa:00:01",
        "mail2": "52:54:00:aa:00:02",
        "mail3": "52:54:00:aa:00:03",
    }


def test_a_spare_does_all_that_its_class_does(sound: str) -> None:
    site = parse(sound.replace("{class: lb}", "{class: lb}\n  mail9: {class: mail, spare: true, address: 10.77.0.90}"))
    assert site.nodes["mail9"].spare
    assert site.nodes["mail9"].tiers == site.nodes["mail1"].tiers
    assert "10.77.0.90" in site.sources(["mx"])
    assert not site.nodes["mail1"].spare


def test_a_disk_must_hold_what_is_planned_for_it(sound: str) -> None:
    def least(install: str, klass: str = "mail") -> float:
        text = sound.replace("lab: {outside: 198.51.100.0/24}", f"classes: {{mail: {{disk_gib: 300, {install}}}}}")
        return parse(text).least_disk_gib(klass)

    assert least("cores: 2") == 300 + 20 + 2
    assert least("install: {root_gib: 50}") == 300 + 50 + 2
    assert least("install: {disk: {min_gib: 100}}") == 100
    assert least("install: {method: diskless}") == 300
    assert parse(sound).least_disk_gib("mail") == 2 + 20 + 2, "in the lab /srv is as large as the lab says"
