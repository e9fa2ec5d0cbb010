"""Where everything of a lab is. Every name derives from the lab's, so `down` finds it also when all notes are lost.

cgroup      posthouse-LAB/{services/…,nodes/NODE}: every process of the lab; a group is killed whole, whoever forked
namespaces  ph-LAB (the controller's: bridge, DNS, updates, the outside world), ph-LAB.NODE
state       /var/lib/posthouse/lab/LAB/{zones,updates,nodes/NODE/{node.json,image,upper,work,srv.img,console}}
runtime     /run/posthouse/LAB/{nodes/NODE,knot.sock}: mount points and control sockets
mounts      only in a mount namespace of each node's own: they end with the node, however it ends
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posthouse import PosthouseError

STATE = Path("/var/lib/posthouse/lab")
RUNTIME = Path("/run/posthouse")
NETNS = Path("/run/netns")


class LabError(PosthouseError):
    """What went wrong in a lab: where, what, and what to do."""


@dataclass(frozen=True)
class Layout:
    """The names and places of one lab."""

    lab: str

    @property
    def state(self) -> Path:
        """What lives until `down`."""
        return STATE / self.lab

    @property
    def runtime(self) -> Path:
        """Mount points and sockets."""
        return RUNTIME / self.lab

    @property
    def namespace(self) -> str:
        """The network namespace with the controller's address in it."""
        return f"ph-{self.lab}"

    @property
    def resolver(self) -> Path:
        """The folder from which `ip netns exec` takes the namespace's resolv.conf."""
        return Path("/etc/netns") / self.namespace

    @property
    def cgroup(self) -> Path:
        """The group that holds every process of the lab."""
        return cgroup_mounts()[0] / f"posthouse-{self.lab}"

    @property
    def services(self) -> Path:
        """The group of the controller's side: a group below it for each server."""
        return self.cgroup / "services"

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that exist, running or not."""
        return sorted(folder.parent.name for folder in self.state.glob("nodes/*/node.json"))

    def node_namespace(self, node: str) -> str:
        """A node's network namespace and container. The dot keeps lab `a-b` apart from node `b` of lab `a`."""
        return f"ph-{self.lab}.{node}"

    def node_state(self, node: str) -> Path:
        """What a node keeps."""
        return self.state / "nodes" / node

    def node_cgroup(self, node: str) -> Path:
        """The group of a node's processes."""
        return self.cgroup / "nodes" / node


@cache
def cgroup_mounts() -> list[Path]:
    """Where cgroup hierarchies are mounted: v2 first, then v1's where a machine still has them. Raises LabError."""
    found: dict[str, list[Path]] = {"cgroup2": [], "cgroup": []}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind in found:
            found[kind].append(Path(fields[4]))
    if not found["cgroup2"]:
        raise LabError(
            "this machine: no cgroup v2 is mounted; mount it: mkdir -p /sys/fs/cgroup/unified && "
            "mount -t cgroup2 none /sys/fs/cgroup/unified"
        )
    return found["cgroup2"] + found["cgroup"]


def run(command: Sequence[str], text: str | None = None) -> str:
    """Runs a command to its end, with `text` as its input, and returns its output. Raises LabError."""
    done = subprocess.run(command, input=text or "", capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(
            f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip() or f'exit status {done.returncode}'}"
        )
    return done.stdout
