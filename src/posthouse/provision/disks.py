"""Which disk of a machine is written, and how it is laid out: from what the machine reports to commands, or a refusal.

Nothing here touches a disk. The layout is sfdisk's own script, RAID is mdadm's and volumes are LVM's: each tool is
called by its own name, and there is no partitioner of ours.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from posthouse import PosthouseError
from posthouse.machines import Install

GIB = 2**30
# GPT's names for what is on a partition.
BIOS_BOOT, EFI, LINUX, RAID, LVM = (
    "21686148-6449-6E6F-744E-656564454649",
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "A19D880F-05FC-4D3B-A006-743F0F84911E",
    "E6D6D379-F507-44C2-A23C-238F2A3DF928",
)
VOLUMES = "posthouse"  # the volume group's name
ESP_LABEL = "POSTHOUSE"  # what templates/boot/installer/start.cfg looks for, so that no other disk's is started
SRV_LABEL = "posthouse-srv"  # by which a diskless machine knows its own disk again


class Refused(PosthouseError):
    """A machine that is not to be installed; nothing was written. The message is shown on it and in the status.

    disks: those that would have been written, if only what they hold stands against it.
    """

    def __init__(self, message: str, disks: Sequence[Disk] = ()) -> None:
        super().__init__(message)
        self.disks = tuple(disks)


@dataclass(frozen=True)
class Disk:
    """A disk as the machine sees it. `holds` is what is on it (a partition table, a file system), or empty."""

    name: str
    size: int
    model: str = ""
    serial: str = ""
    holds: str = ""
    srv: bool = False  # it is the disk of a diskless machine, set up before

    def __str__(self) -> str:
        known = [f"{self.size / GIB:.1f} GiB", self.model, self.serial and f"serial {self.serial}"]
        return f"{self.name} ({', '.join(filter(None, known))})"

    def same(self, other: dict[str, Any]) -> bool:
        """Whether it is the disk of an earlier report; names change from boot to boot, these do not."""
        return (self.size, self.model, self.serial) == (other["size"], other["model"], other["serial"])

    def record(self) -> dict[str, Any]:
        """As kept between boots."""
        return asdict(self)


@dataclass(frozen=True)
class Hardware:
    """What a machine reports of itself before anything is decided."""

    disks: tuple[Disk, ...]
    memory_gib: float
    efi: bool


@dataclass(frozen=True)
class Layout:
    """What is done to the disks: shell commands in order, and what they leave behind."""

    commands: tuple[str, ...]
    root: str | None  # device; None where the root file system is memory
    srv: str
    root_source: str  # as fstab and the kernel name them
    srv_source: str
    boot_disks: tuple[str, ...]
    esps: tuple[str, ...]


def hardware(report: str) -> Hardware:
    """Reads a machine's report: `KEY VALUE` lines, and `lsblk --json --bytes` from the line `disks` on.

    Raises Refused where it is none.
    """
    head, _, devices = report.partition("disks\n")
    try:
        given = dict(line.split(" ", 1) for line in head.splitlines())
        found = tuple(
            Disk(
                entry["name"],
                int(entry["size"]),
                " ".join((entry.get("model") or "").split()),
                (entry.get("serial") or "").strip(),
                entry.get("pttype") or entry.get("fstype") or "",
                [part.get("label") for part in entry.get("children", [])] == [SRV_LABEL],
            )
            for entry in json.loads(devices)["blockdevices"]
            if entry["type"] == "disk" and not entry["ro"] and not entry["rm"] and int(entry["size"])
        )
        return Hardware(found, int(given["memory_kib"]) / 2**20, given["firmware"] == "efi")
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"the report on its hardware cannot be read ({error!r}); boot it with this server's files"
        ) from None


def choose(
    install: Install, least_gib: float, found: Hardware, allowed: Sequence[dict[str, Any]], armed: bool
) -> tuple[Disk, ...]:
    """The disk to write, or both of a mirror. Raises Refused, with every disk and what is against it.

    A disk that holds anything is left alone, unless it is one of `allowed`: its installation was begun and not
    finished, or the operator was told its name and armed the machine. armed: where no disk is known, any that fits.
    """
    rule = install.disk
    wanted = 2 if install.mirror else 1
    # The kernel counts neither what firmware keeps nor its own table of pages, which is 1/64 of all.
    if found.memory_gib < install.memory_gib * 0.95 - 0.25:
        raise Refused(
            f"it has {found.memory_gib:.1f} GiB of memory, and its class asks for {install.memory_gib:g}; "
            "add memory, or change install.memory_gib in the site file and start `provision serve` again"
        )
    verdicts: dict[str, list[str]] = {}
    for disk in found.disks:
        verdicts[disk.name] = [
            reason
            for applies, reason in (
                (disk.size < least_gib * GIB, f"is smaller than {least_gib:g} GiB"),
                (rule.max_gib and disk.size > rule.max_gib * GIB, f"is larger than {rule.max_gib or 0:g} GiB"),
                (rule.model and not fnmatchcase(disk.model, rule.model), f"its model is not {rule.model}"),
                (rule.serial and not fnmatchcase(disk.serial, rule.serial), f"its serial number is not {rule.serial}"),
            )
            if applies
        ]
    fitting = tuple(disk for disk in found.disks if not verdicts[disk.name])
    if len(fitting) != wanted:
        several = "disk fits" if len(fitting) == 1 else "disks fit"
        listed = "; ".join(f"{disk} {', '.join(verdicts[disk.name]) or 'fits'}" for disk in found.disks)
        raise Refused(
            f"{len(fitting) or 'no'} {several} its class's rule, and {wanted} must: "
            f"{listed or 'it has no disk at all'}; "
            "change the machine's disks, or install.disk in the site file and start `provision serve` again"
        )
    for disk in fitting:
        if disk.holds and not (any(disk.same(other) for other in allowed) if allowed else armed):
            raise Refused(
                f"{disk} is not empty (it holds {disk.holds}), and nobody said that it may be wiped; "
                "if it may: posthouse provision reinstall NODE --site SITE",
                fitting,
            )
    return fitting


def partition(disk: str, number: int | str) -> str:
    """The device of a partition: /dev/vda2, /dev/nvme0n1p2. `number` may be a pattern of the shell's."""
    return f"/dev/{disk}{'p' if disk[-1].isdigit() else ''}{number}"


def layout(install: Install, disks: Sequence[Disk]) -> Layout:
    """How the disks are divided: BIOS boot and EFI, so that either firmware can start it, then root, then /srv.

    With `lvm`, root and /srv are volumes of one group. With `mirror`, each is on RAID 1 over both disks, and each disk
    can start the machine by itself.
    """
    kind = RAID if install.mirror else LVM if install.lvm else LINUX
    root_mib = round(install.root_gib * 1024)
    lines = [f"size=1MiB, type={BIOS_BOOT}", f"size=64MiB, type={EFI}"]
    lines += [f"type={kind}"] if install.lvm else [f"size={root_mib}MiB, type={kind}", f"type={kind}"]
    names = [disk.name for disk in disks]
    commands = [*_emptied(names), *(_divided(name, lines) for name in names), "udevadm settle"]
    commands += [f"mkfs.vfat -F 32 -n {ESP_LABEL} {partition(name, 2)}" for name in names]
    parts = {number: partition(names[0], number) for number in (3, 4)}
    if install.mirror:
        for number in (3,) if install.lvm else (3, 4):
            device = f"/dev/md/{number}"
            members = " ".join(partition(name, number) for name in names)
            commands += [
                f"mdadm --create {device} --run --level=1 --raid-devices=2 --metadata=1.2 --bitmap=internal "
                f"--homehost=any --name={number} {members}",
                "udevadm settle",
                # An array of the same size has what an older one held, its volumes too.
                f"wipefs --all --force {device}",
            ]
            parts[number] = device
    root_id, srv_id = str(uuid.uuid4()), str(uuid.uuid4())
    root, srv = parts[3], parts[4]
    root_source, srv_source = f"UUID={root_id}", f"UUID={srv_id}"
    if install.lvm:
        commands += [
            f"lvm pvcreate --yes {parts[3]}",
            f"lvm vgcreate {VOLUMES} {parts[3]}",
            f"lvm lvcreate --yes --name root --size {root_mib}m {VOLUMES}",
            f"lvm lvcreate --yes --name srv --extents 100%FREE {VOLUMES}",
        ]
        # By these names the initramfs knows which volumes it has to start.
        root, srv = root_source, srv_source = f"/dev/mapper/{VOLUMES}-root", f"/dev/mapper/{VOLUMES}-srv"
    commands += [f"mkfs.ext4 -q -F -U {root_id} -L posthouse-root {root}", _srv(srv_id, srv)]
    esps = tuple(partition(name, 2) for name in names)
    boot_disks = tuple(f"/dev/{name}" for name in names)
    return Layout(tuple(commands), root, srv, root_source, srv_source, boot_disks, esps)


def diskless(
    install: Install, least_gib: float, found: Hardware, allowed: Sequence[dict[str, Any]], armed: bool
) -> tuple[Layout, tuple[Disk, ...]]:
    """The layout of a machine that runs from memory: /srv over a whole disk. One that has it already keeps it.

    Raises Refused as `choose` does.
    """
    own = next((disk for disk in found.disks if disk.srv), None)
    disks = (own,) if own and not armed else choose(install, least_gib, found, allowed, armed)
    name = disks[0].name
    device = partition(name, 1)
    made: list[str] = []
    if armed or not own:
        divided = _divided(name, [f"type={LINUX}"])
        made = [*_emptied([name]), divided, "udevadm settle", _srv(str(uuid.uuid4()), device)]
    return Layout(tuple(made), None, device, "", f"LABEL={SRV_LABEL}", (), ()), disks


def _emptied(names: Sequence[str]) -> list[str]:
    """Ends what an old system's RAID and volumes hold, and takes the signatures off every partition."""
    return [
        "lvm vgchange --activate n || true",  # there may be none
        "mdadm --stop --scan || true",
        *(f"wipefs --all --force {partition(name, '[0-9]*')} || true" for name in names),
        *(f"wipefs --all --force /dev/{name}" for name in names),
    ]


def _divided(name: str, lines: Sequence[str]) -> str:
    script = "".join(f"{line}\\n" for line in ("label: gpt", *lines))
    return f"printf '{script}' | sfdisk --quiet --wipe always --wipe-partitions always /dev/{name}"


def _srv(identifier: str, device: str) -> str:
    # No blocks are kept for root: nobody but the platform writes there, and it watches how full it is.
    return f"mkfs.ext4 -q -F -m 0 -U {identifier} -L {SRV_LABEL} {device}"
