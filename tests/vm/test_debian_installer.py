"""Debian's own installer, booted from the network, takes what posthouse answers for it.

How far it comes is the mirror's part: where that lacks pieces of the installer, or their signature, it stops to ask
what to do, and that is the first question it may ask.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from machines import machine_lab

from posthouse import image, lab
from posthouse.lab.layout import Layout
from posthouse.lab.machine import Machine
from posthouse.provision.records import Record, Records

pytestmark = [pytest.mark.vm, pytest.mark.full]

NAME, NODE, ADDRESS = "tmp-installer", "box1", "10.77.0.31"
PATIENCE = 2400  # seconds; two minutes or three where nothing else runs
# What the installer says when it waits for a key, in the text that it shows on a serial line.
QUESTION = re.compile(r"Prompt:|\[Press enter to continue\]")
SITE = f"""\
classes:
  box:
    tiers: []
    install: {{method: preseed, source: "SOURCE", root_gib: 3, disk: {{min_gib: 8, serial: "ours-*"}}}}
nodes:
  lb1: {{class: lb}}
  mail1: {{class: mail}}
  {NODE}: {{class: box, address: {ADDRESS}, mac: "02:70:00:00:01:01"}}
"""


@dataclass
class Seen:
    """What was there to be seen when the installer had gone as far as it could."""

    console: str
    server: str
    fetched: list[str]
    record: Record
    written: int


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    layout = Layout(NAME)
    source = image.mirror().sources[0].split()[2].replace("https://", "http://")
    with machine_lab(NAME, SITE.replace("SOURCE", source)) as site:
        lab.provide(site)
        disks = ((8, "ours-1"), (8, "another-1"))
        lab.power_on(site, NODE, Machine(str(site.nodes[NODE].mac), False, 1024, disks))
        state = layout.node_state(NODE)
        (state / "console").touch()  # QEMU makes it a moment later, and adds to what is there
        records = Records(site)
        deadline = time.monotonic() + PATIENCE
        while not QUESTION.search(console := (state / "console").read_text(errors="replace")):
            record = records.read(NODE)
            assert not record.reason, record.reason
            assert time.monotonic() < deadline, console[-2000:]
            if record.phase == "installing":
                break
            time.sleep(2)
        requests = (layout.state / "updates.log").read_text().splitlines()
        yield Seen(
            console,
            (layout.state / "provision.log").read_text(),
            [line.split('"')[1].split()[1].removeprefix(source) for line in requests if line.startswith(f"{ADDRESS} ")],
            records.read(NODE),
            sum((state / f"disk{number}.img").stat().st_blocks for number in range(2)),
        )


def test_it_comes_by_its_network_to_its_answers(seen: Seen):
    for file in (f"{NODE}-pcbios.preseed", f"{NODE}.sh"):
        assert f"{NODE}: its installer has {file}" in seen.server
    # From its own address, through the proxy, to the mirror that the site file names.
    assert "/dists/trixie/Release" in seen.fetched


def test_it_asks_nothing_that_is_answered(seen: Seen):
    """A first question there may be: what to do about a mirror that does not have what it should."""
    asked = QUESTION.split(seen.console)[0]
    if seen.record.phase != "installing":
        assert "Download installer components" in asked
    for part in ("language", "hostname", "keyboard", "password"):
        assert f"{part}:" not in asked.lower()


def test_it_writes_to_no_disk_before_the_server_has_chosen_it(seen: Seen):
    if seen.record.phase == "installing":
        assert [disk["serial"] for disk in seen.record.disks] == ["ours-1"]
    else:
        assert seen.written == 0
