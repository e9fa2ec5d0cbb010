"""What every node has: names, firewall, certificate, SSH, time, journal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.tier("base")

Variables = dict[str, Any]


def test_release_is_the_one_deployed(host: Any, ctx: Variables) -> None:
    assert host.file("/etc/posthouse-release").content_string.strip() == ctx["release"]


def test_no_unit_has_failed(host: Any) -> None:
    assert host.check_output("systemctl list-units --failed --plain --no-legend") == ""


def test_it_knows_all_names_without_dns(host: Any, ctx: Variables) -> None:
    want = {node["fqdn"]: node["address"] for node in ctx["nodes"]}
    want |= {store["host"]: store["address"] for store in ctx["stores"]}
    want |= {ctx["vip_hosts"][name]: address for name, address in ctx["vips"].items()}
    lines = host.check_output(f"getent -s files ahostsv4 {' '.join(want)} | grep STREAM").splitlines()
    assert {name: line.split()[0] for name, line in zip(want, lines, strict=True)} == want


def test_it_is_called_what_the_site_calls_it(host: Any, node: SimpleNamespace) -> None:
    assert host.check_output("hostname") == node.name
    assert host.check_output("hostname --fqdn") == node.fqdn


def test_firewall_lets_in_what_the_site_says_and_nothing_else(host: Any, ctx: Variables) -> None:
    rules = host.check_output("nft --stateless list chain inet posthouse input")
    assert "policy drop;" in rules
    opened = [line.strip() for line in rules.splitlines() if "dport" in line or "meta l4proto" in line]
    # One line for each rule, and the one that is always there: ICMP.
    assert len(opened) == len(ctx["firewall"]) + 1
    for rule in ctx["firewall"]:
        what = f"tcp dport {rule['port']} " if "port" in rule else f"meta l4proto {rule['protocol']} "
        assert any(what in line and all(source in line for source in rule["sources"]) for line in opened), rule


def test_firewall_comes_back_after_a_reboot(host: Any) -> None:
    assert host.service("nftables").is_enabled


def test_certificate_is_good_for_two_more_weeks(host: Any, node: SimpleNamespace) -> None:
    folder = "/etc/ssl/posthouse"
    host.run_expect([0], f"openssl x509 -in {folder}/node.pem -noout -checkend 1209600")
    host.run_expect([0], f"openssl verify -CAfile {folder}/ca.pem -verify_hostname {node.fqdn} {folder}/node.pem")


def test_key_belongs_to_the_certificate_and_is_not_for_all_eyes(host: Any) -> None:
    folder = "/etc/ssl/posthouse"
    key = host.file(f"{folder}/node.key")
    assert (key.user, key.group, key.mode) == ("root", "ssl-cert", 0o640)
    of_key = host.check_output(f"openssl pkey -in {folder}/node.key -pubout")
    assert of_key == host.check_output(f"openssl x509 -in {folder}/node.pem -noout -pubkey")


def test_ssh_takes_keys_alone(host: Any) -> None:
    settings = host.check_output("sshd -T").splitlines()
    assert {"passwordauthentication no", "kbdinteractiveauthentication no"} <= set(settings)
    assert "permitrootlogin without-password" in settings


def test_addresses_can_be_served_before_they_are_here(host: Any) -> None:
    assert host.sysctl("net.ipv4.ip_nonlocal_bind") == 1


def test_clock_is_kept(host: Any) -> None:
    if host.check_output("systemctl show -p ConditionResult --value chrony") == "no":
        pytest.skip("a container has its host's clock")
    assert host.service("chrony").is_running


def test_journal_survives_a_reboot(host: Any) -> None:
    assert host.file("/var/log/journal").is_directory
