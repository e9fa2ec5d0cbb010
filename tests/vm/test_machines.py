"""Bare machines: refused, installed, started from their disks, and used."""

from __future__ import annotations

import json

import pytest
from machines import IN_USE, NAME, NODE, STRANGERS_MAC, Lanes

from posthouse import lab, sitefile
from posthouse.lab import network
from posthouse.probe.clients import Imap, Person, Platform, Smtp, eventually, introduce, letter

pytestmark = pytest.mark.vm


def test_disks_that_do_not_fit_the_rule_are_left_alone(lanes: Lanes):
    seen = lanes.seen("refused")
    assert "is smaller than" in seen["reason"]
    assert "its serial number is not ours-*" in seen["reason"]
    assert "no disks fit its class's rule" in seen["console"]
    assert seen["disks"] == seen["before"]


def test_a_machine_that_is_no_node_is_left_alone(lanes: Lanes):
    seen = lanes.seen("stranger")
    assert STRANGERS_MAC.replace(":", "-") in seen["console"]
    assert seen["after"] == seen["before"]


def test_an_image_with_one_changed_byte_is_refused_by_the_machine(lanes: Lanes):
    seen = lanes.seen("tampered")
    assert "it was changed, or cut short" in seen["reason"]
    assert "it was changed, or cut short" in seen["console"]
    assert not seen["installed"]


def test_after_a_power_cut_while_streaming_the_next_boot_completes(lanes: Lanes):
    cut, installed = lanes.seen("cut"), lanes.seen("installed")
    assert (cut["phase"], cut["installed"]) == ("streaming", False)
    assert installed["record"].attempts == cut["attempts"] + 1


@pytest.mark.parametrize("step", ["installed", "uefi"])
def test_a_blank_disk_becomes_a_machine_with_a_host_key_of_its_own(lanes: Lanes, step: str, capsys):
    seen = lanes.seen(step)
    assert set(seen["key"]) == {"public"}  # the private one never left it
    took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in seen["phases"].items())
    with capsys.disabled():
        firmware = "BIOS" if step == "installed" else "UEFI"
        print(
            f"\n{firmware}: installed {seen['installed']:.0f} s ({took}), then ssh {seen['contact']:.0f} s", flush=True
        )


def test_powered_on_again_it_starts_from_its_disk(lanes: Lanes):
    seen = lanes.seen("again")
    assert seen["after"].attempts == seen["before"].attempts
    assert seen["after"].installed


def test_it_becomes_a_mail_node_with_a_store_of_its_own_that_takes_mail(lanes: Lanes, cluster, posthouse):
    for step in ("installed", "again"):
        lanes.seen(step)
    cluster(IN_USE)
    posthouse("lab", "up", NAME)  # the spare goes
    assert {node["name"]: node["state"] for node in lab.status(NAME)}[NODE] == "running"
    posthouse("deploy", NAME)
    checks = json.loads(posthouse("verify", NAME, "--json"))
    assert not checks["failed"]
    assert any(check["node"] == NODE and check["tier"] == "store" for check in checks["checks"])
    site = sitefile.load(NAME)
    person = Person(f"eve@{site.domain}", "correct horse battery", "s02")
    options = ["--store", person.store, "--site", NAME, "--password-stdin"]
    posthouse("account", "add", person.address, *options, text=person.password)
    with network.inside(lanes.layout.namespace):
        platform = Platform(site)
        introduce(platform, platform.outside(20))
        sent = letter("stranger@example.net", person.address)
        with Smtp(platform, source=platform.outside(20)) as client:
            assert client.transaction("stranger@example.net", person.address, sent.data).code == 250
        with Imap(platform, person) as imap:
            eventually(lambda: imap.messages(sent.id), 60, "the message on the new machine's store")
