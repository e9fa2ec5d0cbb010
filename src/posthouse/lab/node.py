"""One node of a lab: a systemd-nspawn container over its class's image, with /srv on a loop-mounted ext4 of its own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from posthouse.lab import network, processes
from posthouse.lab.layout import NETNS, LabError, Layout, run

# Mounts are made in a mount namespace of the supervisor's own: when the node ends, by whatever means, they are gone.
# Mount events of the machine still come in, so that nothing unmounted outside is held here. nspawn's notes about the
# container go the same way.
_BOOT = """
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$3"
mkdir -p "$3/srv"
mount -o loop "$2/srv.img" "$3/srv"
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
shift 3
exec systemd-nspawn "$@"
"""
_EXT4_SHUTDOWN = 0x8004587D
_WITHOUT_LOG = 2


@dataclass(frozen=True)
class Node:
    """How a node is wired; kept beside its state, so that it can be started without the site file."""

    name: str
    fqdn: str
    address: str
    prefixlen: int
    gateway: str
    interface: str


@dataclass(frozen=True)
class Keys:
    """Who may log in, and the ed25519 host key by which the node is known, all in OpenSSH's formats."""

    authorized: str
    private: str
    public: str

    def files(self) -> dict[str, str]:
        """The files that hold them, below the node's root."""
        return {
            "etc/ssh/ssh_host_ed25519_key": self.private.strip() + "\n",
            "etc/ssh/ssh_host_ed25519_key.pub": self.public.strip() + "\n",
            "root/.ssh/authorized_keys": self.authorized.strip() + "\n",
        }


def make(layout: Layout, node: Node, image: Path, keys: Keys, resolvers: list[str], srv_mib: int) -> None:
    """Makes what a node keeps: its identity over the image, and an empty /srv. Raises LabError."""
    state = layout.node_state(node.name)
    if state.exists():
        shutil.rmtree(state)
    for folder in ("upper/etc/ssh", "upper/etc/apt/apt.conf.d", "upper/root/.ssh", "work"):
        (state / folder).mkdir(parents=True)
    for folder in ("root", "root/.ssh"):
        (state / "upper" / folder).chmod(0o700)
    (state / "image").symlink_to(image)
    identity = {
        "etc/hostname": f"{node.name}\n",
        "etc/machine-id": f"{uuid.uuid4().hex}\n",
        "etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{node.address} {node.fqdn} {node.name}\n",
        "etc/resolv.conf": "".join(f"nameserver {address}\n" for address in resolvers),
        # The lab's controller fetches for the nodes, which have no way out, in the way that this machine does.
        "etc/apt/apt.conf.d/90posthouse-lab": f'Acquire::http::Proxy "http://{node.gateway}:3142";\n',
        "etc/apt/sources.list": (image / "etc/apt/sources.list").read_text().replace("https://", "http://"),
    }
    for name, content in identity.items():
        (state / "upper" / name).write_text(content)
    disk = state / "srv.img"
    disk.touch()
    os.truncate(disk, srv_mib * 2**20)
    run(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard", str(disk)])
    write(layout, node, keys)


def write(layout: Layout, node: Node, keys: Keys) -> None:
    """Notes a node's wiring and keys, while it does not run. The wiring comes last: a node that has it is whole."""
    state = layout.node_state(node.name)
    for name, content in keys.files().items():
        file = state / "upper" / name
        file.unlink(missing_ok=True)
        file.touch(mode=0o644 if name.endswith(".pub") else 0o600)
        file.write_text(content)
    note(layout, node)


def note(layout: Layout, node: Node) -> None:
    """Notes a node's wiring."""
    state = layout.node_state(node.name)
    beside = state / "node.json.new"
    beside.write_text(json.dumps(asdict(node), indent=1))
    beside.replace(state / "node.json")


def has_keys(layout: Layout, name: str, keys: Keys) -> bool:
    """Whether these are the keys that a node has."""
    upper = layout.node_state(name) / "upper"
    return all(
        (upper / file).exists() and content in (upper / file).read_text() for file, content in keys.files().items()
    )


def load(layout: Layout, name: str) -> Node:
    """A node as it was made. Raises LabError if there is none of that name."""
    try:
        return Node(**json.loads((layout.node_state(name) / "node.json").read_text()))
    except FileNotFoundError:
        known = ", ".join(layout.nodes) or f"none; start the lab with: posthouse lab up {layout.lab}"
        raise LabError(f"{layout.lab}: no node {name!r}; its nodes are {known}") from None


def boot(layout: Layout, node: Node) -> None:
    """Boots a node that does not run; returns before it has come up. Clears away first what a dead one left."""
    stop(layout, node.name)
    network.plug(layout, node.name, node.interface, node.address, node.prefixlen, node.gateway)
    state, namespace = layout.node_state(node.name), layout.node_namespace(node.name)
    root = layout.runtime / "nodes" / node.name
    root.mkdir(parents=True, exist_ok=True)
    command = [
        "--quiet",
        "--register=no",
        "--keep-unit",
        "--settings=no",
        "--link-journal=no",
        "--timezone=off",
        "--resolv-conf=off",
        f"--machine={namespace}",
        f"--hostname={node.name}",
        f"--directory={root}",
        f"--network-namespace-path={NETNS / namespace}",
        "--capability=CAP_NET_ADMIN,CAP_IPC_LOCK",
        "--boot",
    ]
    processes.spawn(
        layout.node_cgroup(node.name),
        [
            "unshare",
            "--mount",
            "--propagation",
            "slave",
            "sh",
            "-c",
            _BOOT,
            "boot",
            str((state / "image").resolve()),
            str(state),
            str(root),
            *command,
        ],
        state / "console",
        # Where the machine itself still runs cgroup v1, the node gets v2 all the same.
        # /proc/sys/net belongs to the node's own namespace; nspawn cannot know that and would make it read-only.
        env={"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"},
    )


def healthy(layout: Layout, name: str) -> bool:
    """Whether the node runs, and its cable is in. It may still be booting."""
    return processes.running(layout.node_cgroup(name)) and network.plugged(layout, name)


def stop(layout: Layout, name: str) -> None:
    """Ends a node at once, and with it its mounts and its network, wherever it was in its life."""
    network.unplug(layout, name)
    processes.end(layout.node_cgroup(name))
    namespace = layout.node_namespace(name)
    if network.exists(namespace):
        processes.end_by_namespace(network.pids(namespace))
        network.remove(namespace)
    disk = layout.node_state(name) / "srv.img"
    processes.until(lambda: not loops(disk), 20, f"{name}: {disk} is still in use; see: losetup --associated {disk}")


def drop_writes(layout: Layout, name: str) -> None:
    """Makes a running node's /srv lose what it has not yet written to its disk, as a power cut does."""
    leader = processes.leader(layout.node_cgroup(name))
    if not leader:
        return
    srv = os.open(f"/proc/{leader}/root/srv", os.O_RDONLY)
    try:
        # While a container is being set up, its root is still the machine's: that /srv is not ours to stop.
        if os.fstat(srv).st_dev in [
            Path(device).stat().st_rdev for device in loops(layout.node_state(name) / "srv.img")
        ]:
            fcntl.ioctl(srv, _EXT4_SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
    finally:
        os.close(srv)


def wait_for_ssh(layout: Layout, node: Node, seconds: float) -> bool:
    """Waits until the node's sshd answers; False if it did not in time, or the node ended before."""
    deadline = time.monotonic() + seconds
    with network.inside(layout.namespace):
        while time.monotonic() < deadline and processes.running(layout.node_cgroup(node.name)):
            try:
                with socket.create_connection((node.address, 22), timeout=1) as connection:
                    if connection.recv(4) == b"SSH-":
                        return True
            except OSError:
                pass
            time.sleep(0.03)
    return False


def loops(backing: Path) -> list[str]:
    """Loop devices whose backing file is `backing`, or lies under it: ["/dev/loop3", …]."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            path = Path(file.read_text().strip().removesuffix(" (deleted)"))
        except OSError:
            continue  # detached while it was read
        if path.is_relative_to(backing):
            found.append(f"/dev/{file.parts[3]}")
    return found
