"""A node of a lab as a QEMU machine: blank disks, a card in the lab's bridge, and firmware that boots from the network.

What there is of it lies beside what other nodes keep: machine.json (its hardware), disk0.img…, vars.fd, console. Its
process is in the node's cgroup, so it is stopped, killed and cleared away as a container is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from posthouse.lab import network, processes
from posthouse.lab.layout import Layout

OVMF = Path("/usr/share/OVMF")

# A restart of the guest ends QEMU, and a new one starts: emulated, a cold start takes half the time of a warm one.
_POWER = 'while "$@"; do echo "-- power on --"; done'


@dataclass(frozen=True)
class Machine:
    """The hardware of a machine."""

    mac: str
    efi: bool
    memory_mib: int
    disks: tuple[tuple[float, str], ...]  # (GiB, serial number)


def make(layout: Layout, name: str, machine: Machine) -> None:
    """Buys the machine: its disks are blank and take no room before they are written."""
    state = layout.node_state(name)
    state.mkdir(parents=True, exist_ok=True)
    for number, (gib, _) in enumerate(machine.disks):
        disk = state / f"disk{number}.img"
        disk.unlink(missing_ok=True)
        disk.touch()
        os.truncate(disk, int(gib * 2**30))
    if machine.efi:
        shutil.copyfile(OVMF / "OVMF_VARS_4M.fd", state / "vars.fd")
    (state / "console").unlink(missing_ok=True)
    note(layout, name, machine)


def note(layout: Layout, name: str, machine: Machine) -> None:
    """Notes what hardware a machine has, while it is off."""
    (layout.node_state(name) / "machine.json").write_text(json.dumps(asdict(machine), indent=1))


def load(layout: Layout, name: str) -> Machine | None:
    """A node's hardware; None where the node is a container."""
    try:
        data = json.loads((layout.node_state(name) / "machine.json").read_text())
    except FileNotFoundError:
        return None
    return Machine(**data | {"disks": tuple((gib, serial) for gib, serial in data["disks"])})


def power_on(layout: Layout, name: str, machine: Machine) -> None:
    """Starts the machine, which must be off; returns at once. What it says goes to its console file."""
    port = network.plug_machine(layout, name)
    processes.spawn(
        layout.node_cgroup(name),
        ["ip", "netns", "exec", layout.namespace, "sh", "-c", _POWER, "machine", *command(layout, name, machine, port)],
        layout.node_state(name) / "power.log",
    )


def command(layout: Layout, name: str, machine: Machine, port: str) -> list[str]:
    """QEMU's command line. Emulated, for stock kernels hang under KVM in some virtual machines."""
    state = layout.node_state(name)
    made = ["qemu-system-x86_64", "-name", name, "-machine", "q35,graphics=off", "-accel", "tcg,thread=multi"]
    # Emulated, cmpxchg16b kills guests now and then (seen with QEMU 7.2), and what is meant to be the fastest way to
    # copy goes byte by byte; with AVX, SHA-256 takes three times as long. Without these flags guests do it otherwise.
    made += ["-cpu", "max,-cx16,-erms,-fsrm,-avx,-avx2", "-smp", "2", "-m", str(machine.memory_mib)]
    # No screen, no CD: what the firmware says goes to the console file too.
    made += ["-nodefaults", "-display", "none", "-no-reboot"]
    made += ["-chardev", f"file,id=console,path={state / 'console'},append=on", "-serial", "chardev:console"]
    made += ["-device", "virtio-rng-pci"]
    # UEFI firmware has a network boot of its own and does not look at the card's.
    rom = ",romfile=" if machine.efi else ""
    made += ["-netdev", f"tap,id=net,ifname={port},script=no,downscript=no"]
    made += ["-device", f"virtio-net-pci,netdev=net,mac={machine.mac},bootindex=1{rom}"]
    for number, (_, serial) in enumerate(machine.disks):
        # The machine's files are thrown away with the lab; what they hold need not survive this machine's power cut.
        drive = f"file={state}/disk{number}.img,if=none,id=disk{number},format=raw,cache=unsafe,discard=unmap"
        device = f"virtio-blk-pci,drive=disk{number},serial={serial},bootindex={number + 2}"
        made += ["-drive", drive, "-device", device]
    if machine.efi:
        made += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"]
        made += ["-drive", f"if=pflash,format=raw,unit=1,file={state}/vars.fd"]
    return made
