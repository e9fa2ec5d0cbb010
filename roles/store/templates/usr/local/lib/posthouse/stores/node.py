"""What the programs of a store's node share: where things are, the clock, and what the keeper tells the gate."""

import json
import os
import time
import uuid
from pathlib import Path


class Place:
    """One store on this node."""

    def __init__(self, store):
        self.store = store
        self.folder = Path("/etc/cyrus") / store
        self.now = self.folder / "now"  # → primary or replica: the configuration that the instance runs with
        self.data = Path("/srv/store") / store
        self.lmtpd = Path("/run/cyrus") / store / "lmtp"
        self.told = Path("/run/posthouse/stores") / f"{store}.json"
        conf = json.loads((self.folder / "store.json").read_text())
        self.node, self.nodes = conf["node"], conf["nodes"]
        self.address, self.interface = conf["address"], conf["interface"]

    @property
    def peers(self):
        """The store's other nodes."""
        return [name for name in self.nodes if name != self.node]

    def backlog(self, peer):
        """Where Cyrus notes what a peer has to be told."""
        return self.data / "config/sync" / peer

    def tell(self, **what):
        """The keeper's word to the gate: role, until (clock), confirm (replicas to wait for)."""
        write(self.told, what)

    def heard(self):
        """What the keeper said last; nothing may be acknowledged if it said nothing."""
        try:
            return json.loads(self.told.read_text())
        except FileNotFoundError:
            return {"role": "replica", "until": 0.0, "confirm": []}

    def copy(self):
        """The name of this node's copy of the mail: a new one after a power cut, or if there is none yet."""
        file, boot = self.data / "copy.json", Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        try:
            have = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            have = {"copy": "", "boot": "", "clean": False}
        sound = have["copy"] and (have["clean"] or have["boot"] == boot)
        copy = have["copy"] if sound else uuid.uuid4().hex[:12]
        write(file, {"copy": copy, "boot": boot, "clean": False}, sync=True)
        return copy

    def closed(self):
        """Notes that the instance was stopped in order, and all is on disk."""
        file = self.data / "copy.json"
        have = json.loads(file.read_text())
        os.sync()
        write(file, {**have, "clean": True}, sync=True)


def clock():
    """Seconds since the node booted, time asleep included. No other clock may be asked about a lease."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def members():
    """The nodes that run etcd, by name: their addresses. Empty where nodes do not fail over by themselves."""
    try:
        return json.loads(Path("/etc/posthouse/cluster.json").read_text())
    except FileNotFoundError:
        return {}


def nearest(node, names):
    """Addresses of the members, this node's own first."""
    return [names[name] for name in sorted(names, key=lambda name: name != node)]


def write(file, what, sync=False):
    """Replaces a file whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.new")
    with beside.open("w") as handle:
        json.dump(what, handle)
        if sync:
            handle.flush()
            os.fsync(handle.fileno())
    beside.replace(file)
    if sync:
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
