"""What happens to the machines of the suite, step by step, and what was seen of it.

Two lanes: a BIOS machine that is to carry a store, and a UEFI machine. First the server hands out an image of
which one byte was changed; then it is replaced by the real one, and the machines are installed, one after the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from posthouse import contact, lab, roles, secrets, sitefile
from posthouse.lab import machine, network, processes, requirements
from posthouse.lab.layout import Layout
from posthouse.lab.machine import Machine
from posthouse.model import Site
from posthouse.provision.records import Records

NAME = "tmp-vm"
PATIENCE = 900  # seconds for what takes one minute where nothing else runs
NODE, SECOND, SPARE, STRANGER = "mail3", "mail4", "spare1", "stranger"
STRANGERS_MAC = "02:70:00:00:00:63"
HEAD = """\
name: NAME
domains: [lab.test]
network:
  cidr: 10.77.0.0/24
  controller: 10.77.0.1
  nodes: 10.77.0.11-10.77.0.99
  stores: 10.77.0.101-10.77.0.199
  resolvers: [10.77.0.1]
"""
SITE = f"""\
{HEAD.replace("NAME", NAME)}\
nodes:
  lb1: {{class: lb, address: 10.77.0.11}}
  mail[1:2]: {{class: mail, address: 10.77.0.21}}
  {SPARE}: {{class: mail, address: 10.77.0.31, spare: true}}
vips: {{mail: 10.77.0.5}}
directory: {{providers: [mail1, mail2]}}
stores:
  s01: {{primary: mail1, replicas: [mail2]}}
mx: {{dnsbl: [dnsbl.lab.test], greet_wait: 2}}
filter: {{signature_urls: ["http://10.77.0.1/clamav/lab.ndb"]}}
lab: {{outside: 198.51.100.0/24, srv_mib: 1024}}
load: {{accounts: 200, mailbox_mib: 5}}
# Machines of the lab are small, and take the disks that were bought for them.
classes: {{mail: {{install: {{root_gib: 3, disk: {{serial: "ours-*"}}}}}}}}
provision: {{guests: 10.77.0.201-10.77.0.210}}
"""
_NODE = f'  {NODE}: {{class: mail, address: 10.77.0.23, mac: "02:70:00:00:00:03"}}\n'
_SECOND = f'  {SECOND}: {{class: mail, address: 10.77.0.24, mac: "02:70:00:00:00:04"}}\n'
MACHINES = SITE.replace("vips:", f"{_NODE}{_SECOND}vips:")
# The UEFI machine has served its purpose, and the other one gets a store.
IN_USE = SITE.replace("vips:", f"{_NODE}vips:").replace("mx:", f"  s02: {{primary: {NODE}, replicas: [mail1]}}\nmx:")

# The real server, but one byte in the middle of each image is another one.
_TAMPERED = """
import dataclasses, sys
from pathlib import Path
from posthouse import lab, provision, sitefile
site, folder = sitefile.load(sys.argv[1]), Path(sys.argv[2])
made = {}
for name, media in provision.prepare(site).items():
    data = bytearray(media.stream.read_bytes())
    data[len(data) // 2] ^= 1
    stream = folder / "tampered"
    stream.write_bytes(data)
    made[name] = dataclasses.replace(media, stream=stream)
lab.enter(site.name)
provision.serve(site, made)
"""


# What took how long, in seconds; printed when all is done.
TIMES: list[tuple[str, float]] = []


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Notes how long something takes."""
    begun = time.monotonic()
    yield
    TIMES.append((what, time.monotonic() - begun))


# What a site of machines alone must have besides; none of it is started.
_TAIL = """\
vips: {mail: 10.77.0.5}
directory: {providers: [mail1]}
stores: {s01: {primary: mail1}}
lab: {outside: 198.51.100.0/24, srv_mib: 512}
"""


@contextlib.contextmanager
def machine_lab(name: str, rest: str) -> Iterator[Site]:
    """A lab for machines that need no other node: a site with what `rest` says of them, and the controller's side."""
    requirements.ensure(requirements.MACHINES)
    lab.ensure_requirements()
    folder = roles.ROOT / "inventory" / name
    lab.down(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        (folder / "site.yml").write_text(HEAD.replace("NAME", name) + rest + _TAIL)
        site = sitefile.load(name)
        lab.hub(site, secrets.ensure(site))
        yield site
    finally:
        lab.down(name)
        shutil.rmtree(folder)


def console(layout: Layout, name: str) -> str:
    """All that a machine said, without what moves its cursor."""
    file = layout.node_state(name) / "console"
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read_text(errors="replace")) if file.exists() else ""


def until(layout: Layout, name: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Waits for something to happen to a machine; fails with what it said last."""
    deadline = time.monotonic() + seconds
    while not condition():
        last = f"{console(layout, name)[-1500:]}{log_tail(layout)}"
        assert time.monotonic() < deadline, f"{name} goes no further:\n{last}"
        time.sleep(0.5)


class Lanes:
    """The steps, each done by name: `lanes.seen("refused")` waits for it and gives what was seen, or raises."""

    def __init__(self, site: Site) -> None:
        self.site, self.layout, self.records = site, Layout(site.name), Records(site)
        self._lanes = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._steps: dict[str, Future[dict[str, Any]]] = {}
        lab.refresh(site, secrets.ensure(site))
        self._tampered_server()
        bios, uefi = self._lanes
        self._step(bios, "refused", self._refused)
        self._step(bios, "stranger", self._stranger)
        self._step(bios, "cut", self._cut)
        self._step(uefi, "tampered", self._tampered)
        # Both lanes are past the tampered image before the real server takes its place.
        for name in ("cut", "tampered"):
            self._steps[name].exception()
        self._stop_server()
        lab.provide(site)
        # What is timed is alone on this machine's processors: one after another.
        self._step(uefi, "uefi", self._uefi)
        self._step(uefi, "again", self._again)
        self._step(uefi, "installed", self._installed)

    def seen(self, name: str) -> dict[str, Any]:
        """What was seen of a step; waits for it. Raises what the step raised."""
        return self._steps[name].result()

    def stop(self) -> None:
        """Ends the lanes; the machines themselves end with the lab."""
        for lane in self._lanes:
            lane.shutdown(wait=True, cancel_futures=True)

    def _step(self, lane: ThreadPoolExecutor, name: str, work: Callable[[], dict[str, Any]]) -> None:
        def run() -> dict[str, Any]:
            with timed(f"step {name}"):
                return work()

        self._steps[name] = lane.submit(run)

    # --- steps

    def _refused(self) -> dict[str, Any]:
        """One disk is ours and too small, the other large enough and not ours."""
        self._power_on(NODE, Machine(self.site.nodes[NODE].mac or "", False, 1024, ((1, "ours-0"), (8, "other-0"))))
        before = self._disks(NODE)
        self._until(NODE, lambda: self.records.read(NODE).phase == "refused")
        self._until(NODE, lambda: "NOT INSTALLED" in self.console(NODE))
        seen = {"reason": self.records.read(NODE).reason, "console": self.console(NODE), "disks": self._disks(NODE)}
        lab.kill(NAME, NODE)
        return seen | {"before": before}

    def _stranger(self) -> dict[str, Any]:
        """A machine that is not in the site file, with something on its disk."""
        hardware = Machine(STRANGERS_MAC, False, 512, ((0.25, "theirs"),))
        machine.make(self.layout, STRANGER, hardware)
        (self.layout.node_state(STRANGER) / "disk0.img").write_bytes(os.urandom(1 << 16) * 4096)
        before = self._disks(STRANGER)
        machine.power_on(self.layout, STRANGER, hardware)
        try:
            self._until(STRANGER, lambda: "no machine of" in self.console(STRANGER))
            # With nobody at the keyboard it goes on to its disk, where there is nothing to boot.
            self._until(STRANGER, lambda: "ooting from" in self.console(STRANGER).partition("no machine of")[2])
            return {"before": before, "after": self._disks(STRANGER), "console": self.console(STRANGER)}
        finally:
            network.unplug(self.layout, STRANGER)
            processes.end(self.layout.node_cgroup(STRANGER))

    def _cut(self) -> dict[str, Any]:
        """The power fails while the image is written."""
        self._power_on(NODE, self._machine(NODE, efi=False))
        disk = self.layout.node_state(NODE) / "disk0.img"
        self._until(NODE, lambda: self.records.read(NODE).phase == "streaming" and disk.stat().st_blocks * 512 > 40e6)
        lab.kill(NAME, NODE)
        record = self.records.read(NODE)
        return {"phase": record.phase, "attempts": record.attempts, "installed": record.installed}

    def _tampered(self) -> dict[str, Any]:
        self._power_on(SECOND, self._machine(SECOND, efi=True))
        self._until(SECOND, lambda: self.records.read(SECOND).phase == "failed")
        self._until(SECOND, lambda: "NOT INSTALLED" in self.console(SECOND))
        seen = {"reason": self.records.read(SECOND).reason, "console": self.console(SECOND)}
        lab.kill(NAME, SECOND)
        return seen | {"installed": self.records.read(SECOND).installed}

    def _installed(self) -> dict[str, Any]:
        return self._to_first_contact(NODE)

    def _uefi(self) -> dict[str, Any]:
        return self._to_first_contact(SECOND)

    def _again(self) -> dict[str, Any]:
        """Power off and on."""
        before = self.records.read(SECOND)
        lab.kill(NAME, SECOND)
        lab.start(NAME, SECOND)
        self._contact(SECOND)
        lab.kill(NAME, SECOND)
        return {"before": before, "after": self.records.read(SECOND)}

    # --- what steps are made of

    def _to_first_contact(self, name: str) -> dict[str, Any]:
        begun = time.monotonic()
        self._power_on(name)
        self._until(name, lambda: self.records.read(name).installed)
        installed = time.monotonic() - begun
        waited = self._contact(name)
        TIMES.append((f"blank disk to first contact, {'UEFI' if name == SECOND else 'BIOS'}", time.monotonic() - begun))
        TIMES.extend((f"  {phase}", seconds) for phase, seconds in self.records.read(name).seconds().items())
        TIMES.append(("  from its disk to ssh", waited))
        key = secrets.load(self.site).ssh["host_keys"][name]
        record = self.records.read(name)
        return {"installed": installed, "contact": waited, "key": key, "phases": record.seconds(), "record": record}

    def _contact(self, name: str) -> float:
        with network.inside(self.layout.namespace):
            return contact.wait(self.site.nodes[name], secrets.load(self.site), PATIENCE)

    def _machine(self, name: str, efi: bool) -> Machine:
        return Machine(self.site.nodes[name].mac or "", efi, 1536, ((7, "ours-0"),))

    def _power_on(self, name: str, hardware: Machine | None = None) -> None:
        lab.power_on(self.site, name, hardware)

    def console(self, name: str) -> str:
        return console(self.layout, name)

    def _disks(self, name: str) -> list[str]:
        digests = []
        for disk in sorted(self.layout.node_state(name).glob("disk*.img")):
            with disk.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests

    def _until(self, name: str, condition: Callable[[], bool]) -> None:
        until(self.layout, name, condition)

    def _tampered_server(self) -> None:
        command = [sys.executable, "-c", _TAMPERED, NAME, str(self.layout.state)]
        processes.spawn(self.layout.services / "provision", command, self.layout.state / "provision.log")
        lab.provide(self.site)  # it runs: only waits until it answers

    def _stop_server(self) -> None:
        processes.end(self.layout.services / "provision")


def log_tail(layout: Layout) -> str:
    """The end of what the server said, for a failure's message."""
    file = layout.state / "provision.log"
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(["", "the server:", *(line for line in lines if "dnsmasq" not in line)][-15:])
