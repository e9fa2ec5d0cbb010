"""How far each machine is: one small file for each, so that the server may be stopped and started at any time.

One more file, `strangers`, has the machines that booted here and are no nodes of the site.

    waiting → booting → checking → dividing → streaming → identity → boot loader → installed → reached
                           └ refused: why          any of them └ failed: why

`waiting` is a node that never booted here. What a machine may do follows from its record alone: it is installed
unless it was, or somebody armed it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets as random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posthouse.model import Site

STATE = Path("/var/lib/posthouse/provision")
LABS = Path("/var/lib/posthouse/lab")
# In these a machine needs the server without a break: where its image ends too soon, it gives up.
READING = ("checking", "dividing", "streaming", "identity", "boot loader")
STRANGERS = 50  # so many are kept, for anybody on the network may ask


def folder(site: Site) -> Path:
    """Where a site's records are. Those of a lab go with the lab, for so do its disks."""
    return LABS / site.name / "provision" if site.lab else STATE / site.name


@dataclass
class Record:
    """One machine's record. Times are seconds since 1970."""

    node: str
    mac: str
    phase: str = "waiting"
    reason: str = ""  # why it was refused, or failed
    phases: list[tuple[str, float]] = field(default_factory=list)  # of the last boot that installs: (name, begun)
    token: str = ""  # SHA-256 of the one under which the machine may speak; none where nothing is to be said
    disks: list[dict[str, Any]] = field(default_factory=list)  # that were written, are being, or would be if empty
    layout: dict[str, Any] = field(default_factory=dict)  # how they are divided, by disks.Layout
    begun: bool = False  # their installation was begun and has not ended
    installed: bool = False  # by the last boot that installs
    armed: bool = False  # the operator said that what is on the disks may go
    attempts: int = 0

    def enter(self, phase: str, reason: str = "") -> None:
        """Notes a phase and when it began. One that is told again keeps its first time."""
        if self.phase != phase:
            self.phases.append((phase, time.time()))
        self.phase, self.reason = phase, reason

    def admit(self) -> str:
        """Begins an installation anew; returns the token for it, after which every older one is worth nothing."""
        token = random.token_hex(16)
        self.token = _digest(token)
        self.phases, self.phase, self.reason = [], "", ""
        self.installed = False
        self.attempts += 1
        self.enter("booting")
        return token

    def knows(self, token: str) -> bool:
        """Whether this is the token of the boot that goes on."""
        return bool(self.token) and random.compare_digest(self.token, _digest(token))

    def finish(self) -> None:
        """Notes that the installation is done: from now on the machine starts from its disk."""
        self.token, self.begun, self.armed, self.installed = "", False, False, True
        self.enter("installed")

    def seconds(self) -> dict[str, float]:
        """How long each phase of the last installation took; the one it is in is not among them."""
        starts = [start for _, start in self.phases]
        return {name: round(end - start, 1) for (name, start), end in zip(self.phases, starts[1:], strict=False)}


class Records:
    """All records of a site."""

    def __init__(self, site: Site) -> None:
        self.folder = folder(site)
        self._macs = {node.name: node.mac for node in site.nodes.values() if node.mac}

    def read(self, node: str) -> Record:
        """A node's record; an empty one if it never booted here, or has another machine now."""
        mac = self._macs[node]
        try:
            data = json.loads((self.folder / f"{node}.json").read_text())
        except FileNotFoundError:
            return Record(node, mac)
        data["phases"] = [(name, begun) for name, begun in data["phases"]]
        # A new board under an old name: nothing that is known of the old one is true of it.
        return Record(**data) if data["mac"] == mac else Record(node, mac)

    def all(self) -> list[Record]:
        """The records of all nodes that have a MAC address."""
        return [self.read(node) for node in self._macs]

    @contextmanager
    def change(self, node: str) -> Iterator[Record]:
        """Gives a node's record, and keeps what was made of it. One at a time, over all processes."""
        with self._locked():
            record = self.read(node)
            yield record
            self._write(f"{node}.json", asdict(record))

    def strangers(self) -> dict[str, tuple[float, str]]:
        """Machines that booted here and are no nodes, the last one last: {MAC address: (when, whose it is, or "")}."""
        try:
            found = json.loads((self.folder / "strangers").read_text())
        except FileNotFoundError:
            return {}
        return {mac: (when, whose) for mac, (when, whose) in found.items() if mac not in self._macs.values()}

    def note_stranger(self, mac: str, whose: str) -> None:
        """Notes that a machine booted here that is no node of the site. whose: `lb1 of the site corp`, or nothing."""
        with self._locked():
            found = self.strangers()
            found.pop(mac, None)
            found[mac] = (time.time(), whose)
            self._write("strangers", dict(list(found.items())[-STRANGERS:]))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, name: str, data: dict[str, Any]) -> None:
        beside = self.folder / f".{name}.new"
        with beside.open("w") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / name)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
