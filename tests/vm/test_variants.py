"""Other ways for a machine to have its disks: RAID 1 with LVM on it, and none for its system at all."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator

import pytest
from machines import console, machine_lab, until

from posthouse import contact, inventory, lab, provision, secrets
from posthouse.lab import machine, network
from posthouse.lab.layout import Layout
from posthouse.model import Site
from posthouse.provision.records import Records

pytestmark = [pytest.mark.vm, pytest.mark.full]

NAME, PAIR, RAM = "tmp-variants", "pair1", "ram1"
PATIENCE = 600
MOUNTED = "findmnt -no {0} /; findmnt -no {0} /srv"
SITE = f"""\
classes:
  pair: {{tiers: [], install: {{mirror: true, lvm: true, root_gib: 2}}}}
  ram: {{tiers: [], install: {{method: diskless}}}}
nodes:
  lb1: {{class: lb}}
  mail1: {{class: mail}}
  {PAIR}: {{class: pair, mac: "02:70:00:00:03:01"}}
  {RAM}: {{class: ram, mac: "02:70:00:00:03:02"}}
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with machine_lab(NAME, SITE) as site:
        lab.provide(site)
        yield site


@pytest.fixture
def on(site: Site) -> Callable[[str, str], str]:
    """Runs a command on a machine."""

    def run(node: str, command: str) -> str:
        config = inventory.write_ssh(site, secrets.load(site))
        with network.inside(Layout(NAME).namespace):
            ssh = ["ssh", "-F", str(config), "-o", "ControlMaster=no", node, command]
            return subprocess.run(ssh, check=True, capture_output=True, text=True).stdout

    return run


def come_up(site: Site, node: str) -> None:
    """Waits until the machine is installed and lets the site's key in, by the host key that it reported."""
    layout, records = Layout(NAME), Records(site)

    def ready() -> bool:
        assert not records.read(node).reason, records.read(node).reason
        return records.read(node).installed

    until(layout, node, ready, PATIENCE)
    with network.inside(layout.namespace):
        contact.wait(site.nodes[node], secrets.load(site), PATIENCE)


def come_up_anew(site: Site, node: str) -> None:
    """Cuts the power and gives it back to a machine that is to be installed then."""
    records = Records(site)
    before = records.read(node).attempts
    lab.kill(NAME, node)
    lab.start(NAME, node)
    until(Layout(NAME), node, lambda: records.read(node).attempts > before, PATIENCE)
    come_up(site, node)


def test_on_RAID_and_LVM_either_disk_starts_the_machine(site: Site, on: Callable[[str, str], str]):
    layout = Layout(NAME)
    lab.power_on(site, PAIR, lab.hardware(site, PAIR))
    come_up(site, PAIR)
    assert on(PAIR, MOUNTED.format("SOURCE")).split() == ["/dev/mapper/posthouse-root", "/dev/mapper/posthouse-srv"]
    assert "raid1 vd" in on(PAIR, "cat /proc/mdstat")
    assert on(PAIR, "mdadm --wait /dev/md/*; grep -o '\\[UU\\]' /proc/mdstat").strip() == "[UU]"
    # The same disks once more: array and volumes of the first time are in the way, and on the same places.
    on(PAIR, "echo gone >/srv/note; sync")
    provision.arm(site, PAIR)
    come_up_anew(site, PAIR)
    assert on(PAIR, "test -e /srv/note || echo gone").strip() == "gone"
    on(PAIR, "mdadm --wait /dev/md/*; echo kept >/srv/note; sync")
    lab.kill(NAME, PAIR)
    # The first disk is gone.
    whole = machine.load(layout, PAIR)
    assert whole
    state = layout.node_state(PAIR)
    (state / "disk0.img").unlink()
    (state / "disk1.img").rename(state / "disk0.img")
    machine.note(layout, PAIR, dataclasses.replace(whole, disks=whole.disks[1:]))
    lab.start(NAME, PAIR)
    come_up(site, PAIR)
    said = on(PAIR, "cat /srv/note; grep -o '\\[[U_]*U[U_]*\\]' /proc/mdstat").split()
    assert said in (["kept", "[U_]"], ["kept", "[_U]"])


def test_without_a_disk_for_its_system_it_keeps_srv_and_its_host_key(site: Site, on: Callable[[str, str], str]):
    lab.power_on(site, RAM, lab.hardware(site, RAM))
    come_up(site, RAM)
    first = secrets.load(site).ssh["host_keys"][RAM]
    assert on(RAM, MOUNTED.format("FSTYPE")).split() == ["tmpfs", "ext4"]
    on(RAM, "echo kept >/srv/note; echo gone >/note; sync")
    come_up_anew(site, RAM)
    assert secrets.load(site).ssh["host_keys"][RAM] == first
    assert on(RAM, "cat /srv/note; test -e /note || echo gone").split() == ["kept", "gone"]
    assert "dividing" not in console(Layout(NAME), RAM).rpartition("iPXE")[2]
