"""Bare machines: refused, installed, started from their disks, and used."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from machines import IN_USE, NAME, NODE, SPARE, STRANGERS_MAC, Lanes, timed

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
def test_a_blank_disk_becomes_a_machine_with_a_host_key_of_its_own(lanes: Lanes, step: str):
    assert set(lanes.seen(step)["key"]) == {"public"}  # the private one never left it


def test_powered_on_again_it_starts_from_its_disk(lanes: Lanes):
    seen = lanes.seen("again")
    assert seen["after"].attempts == seen["before"].attempts
    assert seen["after"].installed


@pytest.fixture(scope="module")
def in_use(lanes: Lanes, cluster: Callable[[str], None], posthouse: Callable[..., str]) -> dict[str, Any]:
    """The BIOS machine is the cluster's fourth mail node, with a store of its own; what verify says of all nodes."""
    for step in ("installed", "again"):
        lanes.seen(step)
    cluster(IN_USE)
    posthouse("lab", "up", NAME)  # the UEFI machine goes
    assert {node["name"]: node["state"] for node in lab.status(NAME)}[NODE] == "running"
    with timed("deploy with the machine and its store"):
        posthouse("deploy", NAME)
    with timed("verify"):
        return dict(json.loads(posthouse("verify", NAME, "--json", status=None)))


def test_every_node_is_verified_the_machine_too(in_use: dict[str, Any]):
    failed = [check for check in in_use["checks"] if check["outcome"] == "failed"]
    assert failed == []
    assert any(check["node"] == NODE and check["tier"] == "store" for check in in_use["checks"])


def test_a_hot_spare_is_converged_and_holds_no_store(in_use: dict[str, Any]):
    tiers = {check["tier"] for check in in_use["checks"] if check["node"] == SPARE and check["outcome"] == "passed"}
    assert tiers >= {"mx", "filter", "directory", "submission"}
    listed = subprocess.run([*lab.command(NAME, SPARE), "ls", "/srv/store"], capture_output=True, text=True, check=True)
    assert listed.stdout == ""


def test_a_message_comes_to_the_machines_store(in_use: dict[str, Any], lanes: Lanes, posthouse: Callable[..., str]):
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
            try:
                # Postfix tries again after one minute or two what an emulated machine was too slow for.
                eventually(lambda: imap.messages(sent.id), 300, "the message on the new machine's store")
            except AssertionError as error:
                queues = [[*lab.command(NAME, node), "postqueue", "-j"] for node in ("mail1", "mail2", NODE, SPARE)]
                waiting = [subprocess.run(queue, capture_output=True, text=True).stdout for queue in queues]
                raise AssertionError(f"{error}; in queues: {''.join(waiting)}") from None
