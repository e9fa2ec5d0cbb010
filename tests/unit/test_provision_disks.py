"""Which disk is written, and how it is laid out."""

from __future__ import annotations

import json

import pytest

from posthouse import roles
from posthouse.machines import Install
from posthouse.provision import disks
from posthouse.provision.disks import GIB, Disk, Hardware, Refused

SMALL = Disk("sda", 4 * GIB, "Flash Drive", "F1")
SSD = Disk("nvme0n1", 200 * GIB, "SAMSUNG MZ7", "S1")
TWIN = Disk("nvme1n1", 200 * GIB, "SAMSUNG MZ7", "S2")
USED = Disk("vda", 200 * GIB, "", "V1", "gpt")


def chosen(rule, *found, least=20, memory=8.0, allowed=(), armed=False):
    install = Install.model_validate(rule)
    picked = disks.choose(install, least, Hardware(found, memory, False), list(allowed), armed)
    return [disk.name for disk in picked]


@pytest.mark.parametrize(
    ("rule", "found", "names"),
    [
        ({}, [SMALL, SSD], ["nvme0n1"]),
        ({"disk": {"serial": "S2"}}, [SSD, TWIN], ["nvme1n1"]),
        ({"disk": {"model": "SAMSUNG*", "serial": "S1"}}, [SMALL, SSD, TWIN], ["nvme0n1"]),
        ({"mirror": True}, [SMALL, SSD, TWIN], ["nvme0n1", "nvme1n1"]),
        ({"memory_gib": 8}, [SSD], ["nvme0n1"]),
    ],
)
def test_the_disk_that_fits_is_taken(rule, found, names):
    assert chosen(rule, *found) == names


@pytest.mark.parametrize(
    ("rule", "found", "reason"),
    [
        ({}, [SSD, TWIN], "2 disks fit its class's rule, and 1 must: nvme0n1 (200.0 GiB, SAMSUNG MZ7, serial S1) f"),
        ({}, [SMALL], "no disks fit its class's rule, and 1 must: sda (4.0 GiB, Flash Drive, serial F1) is smaller"),
        ({}, [], "it has no disk at all"),
        ({"mirror": True}, [SSD], "1 disk fits its class's rule, and 2 must"),
        ({"disk": {"max_gib": 100}}, [SSD], "is larger than 100 GiB"),
        ({"disk": {"model": "WD*"}}, [SSD], "its model is not WD*"),
        ({"disk": {"serial": "X"}}, [SSD], "its serial number is not X"),
        ({"memory_gib": 16}, [SSD], "8.0 GiB of memory, and its class asks for 16"),
        ({}, [USED], "is not empty (it holds gpt), and nobody said that it may be wiped"),
    ],
)
def test_anything_else_is_refused_with_the_reason(rule, found, reason):
    with pytest.raises(Refused) as refusal:
        chosen(rule, *found)
    assert reason in str(refusal.value)


def test_memory_may_lack_what_firmware_and_kernel_keep():
    assert chosen({"memory_gib": 64}, SSD, memory=62.4) == ["nvme0n1"]
    with pytest.raises(Refused):
        chosen({"memory_gib": 64}, SSD, memory=60)


def test_a_disk_that_holds_something_is_written_if_the_operator_says_so_or_its_installation_was_cut_short():
    assert chosen({}, USED, armed=True) == ["vda"]
    renamed = USED.record() | {"name": "vdb", "holds": ""}
    assert chosen({}, USED, allowed=[renamed]) == ["vda"]
    with pytest.raises(Refused):
        chosen({}, USED, allowed=[renamed | {"serial": "V2"}])
    with pytest.raises(Refused) as refusal:
        chosen({}, USED, allowed=[renamed | {"serial": "V2"}], armed=True)
    assert refusal.value.disks == (USED,)


REPORT = {
    "blockdevices": [
        {"name": "sr0", "type": "rom", "size": 2**30, "ro": False, "rm": True},
        {"name": "sdz", "type": "disk", "size": 2**34, "ro": False, "rm": True, "model": "USB"},
        {"name": "vda", "type": "disk", "size": 2**34, "ro": False, "rm": False, "model": None, "serial": " A  "},
        {"name": "sdb", "type": "disk", "size": 2**35, "ro": False, "rm": False, "model": "A  B ", "pttype": "gpt"},
        {
            "name": "sdc",
            "type": "disk",
            "size": 2**35,
            "ro": False,
            "rm": False,
            "pttype": "gpt",
            "children": [{"label": "posthouse-srv"}],
        },
    ]
}


def test_a_report_becomes_hardware_without_what_can_be_pulled_out():
    text = f"firmware efi\nmemory_kib 2097152\ndisks\n{json.dumps(REPORT)}"
    found = disks.hardware(text)
    assert (found.memory_gib, found.efi) == (2, True)
    assert [(d.name, d.model, d.serial, d.holds, d.srv) for d in found.disks] == [
        ("vda", "", "A", "", False),
        ("sdb", "A B", "", "gpt", False),
        ("sdc", "", "", "gpt", True),
    ]


@pytest.mark.parametrize("text", ["", "disks\n{}", "firmware bios\nmemory_kib x\ndisks\n[]", "disks\n{"])
def test_a_report_that_is_none_is_refused(text):
    with pytest.raises(Refused, match="cannot be read"):
        disks.hardware(text)


def layout(rule, *found):
    return disks.layout(Install.model_validate(rule), found)


def test_a_plain_disk_has_both_boot_loaders_root_and_srv():
    made = layout({"root_gib": 3}, SSD)
    table = next(command for command in made.commands if "sfdisk" in command)
    assert "size=3072MiB" in table and table.endswith("/dev/nvme0n1")
    assert (made.root, made.srv, made.esps) == ("/dev/nvme0n1p3", "/dev/nvme0n1p4", ("/dev/nvme0n1p2",))
    start = (roles.ROOT / "templates/boot/installer/start.cfg").read_text()
    assert f"search --no-floppy --label {disks.ESP_LABEL} " in start
    assert f"mkfs.vfat -F 32 -n {disks.ESP_LABEL} /dev/nvme0n1p2" in made.commands
    # /dev/nvme0n1?* would be another namespace's, and /dev/sda?* another disk's.
    assert "wipefs --all --force /dev/nvme0n1p[0-9]* || true" in made.commands
    assert "wipefs --all --force /dev/sda[0-9]* || true" in layout({"root_gib": 3}, SMALL).commands
    assert made.root_source.startswith("UUID=") and made.root_source[5:] in made.commands[-2]
    assert made.srv_source[5:] in made.commands[-1]


def test_a_mirror_has_each_file_system_on_both_disks_and_starts_from_either():
    made = layout({"mirror": True}, SSD, TWIN)
    created = [command for command in made.commands if command.startswith("mdadm --create")]
    assert [command.split()[-2:] for command in created] == [
        ["/dev/nvme0n1p3", "/dev/nvme1n1p3"],
        ["/dev/nvme0n1p4", "/dev/nvme1n1p4"],
    ]
    for command in created:
        device = command.split()[2]
        assert made.commands[made.commands.index(command) + 1 :][:2] == (
            "udevadm settle",
            f"wipefs --all --force {device}",
        )
    assert made.boot_disks == ("/dev/nvme0n1", "/dev/nvme1n1") and len(made.esps) == 2
    assert made.commands[-1].endswith(" /dev/md/4")


@pytest.mark.parametrize(("mirror", "below"), [(False, "/dev/vda3"), (True, "/dev/md/3")])
def test_volumes_lie_on_the_disk_or_on_the_mirror(mirror, below):
    found = [USED, Disk("vdb", 200 * GIB)] if mirror else [USED]
    made = layout({"lvm": True, "mirror": mirror}, *found)
    assert f"lvm pvcreate --yes {below}" in made.commands
    assert made.root == made.root_source == "/dev/mapper/posthouse-root"


def test_a_diskless_machine_makes_its_srv_once():
    install = Install.model_validate({"method": "diskless"})
    blank = Disk("vda", 200 * GIB)
    made, picked = disks.diskless(install, 20, Hardware((blank,), 8, False), [], False)
    assert picked == (blank,) and made.root is None and made.commands[-1].endswith("/dev/vda1")
    own = Disk("vda", 200 * GIB, holds="gpt", srv=True)
    kept, _ = disks.diskless(install, 20, Hardware((own,), 8, False), [], False)
    assert kept.commands == ()
    anew, _ = disks.diskless(install, 20, Hardware((own,), 8, False), [], True)
    assert anew.commands
