"""Network namespaces of a lab: a bridge with the controller's address, and one namespace per node plugged into it.

Nothing here has a route or a link to the machine's own network, so not a packet can leave, whatever the nodes do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

from posthouse.lab.layout import NETNS, LabError, Layout, run

BRIDGE = "br0"
_CLONE_NEWNET = 0x40000000
_OURS = Path("/proc/thread-self/ns/net")
_libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: str) -> None:
    """Moves the calling thread, and all threads and processes that it starts from now on, into a namespace."""
    try:
        _setns(NETNS / namespace)
    except FileNotFoundError:
        raise LabError(f"{namespace}: no such network namespace; start the lab with: posthouse lab up") from None


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread works in a namespace for a while. Sockets made there stay there."""
    with _returning():
        enter(namespace)
        yield


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    with _OURS.open() as home:
        try:
            yield
        finally:
            _setns(Path(f"/proc/self/fd/{home.fileno()}"))


def _setns(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(file))
    finally:
        os.close(descriptor)


def entered(namespace: str) -> bool:
    """Whether the calling thread is in a namespace."""
    return exists(namespace) and _OURS.samefile(NETNS / namespace)


def exists(namespace: str) -> bool:
    """Whether there is a namespace of that name."""
    return (NETNS / namespace).exists()


def of_lab(layout: Layout) -> list[str]:
    """All namespaces of a lab, the nodes' first."""
    return [
        *sorted(path.name for path in NETNS.glob(f"{layout.namespace}.*")),
        *([layout.namespace] * exists(layout.namespace)),
    ]


def pids(namespace: str) -> list[int]:
    """Processes that live in a namespace, wherever they came from."""
    return [int(pid) for pid in run(["ip", "netns", "pids", namespace]).split()]


def make_hub(layout: Layout, addresses: list[str], prefixlen: int, outside: str) -> bool:
    """Makes the lab's own namespace, unless it is whole already; returns whether it was made anew.

    addresses: the controller's, and the nodes' default gateway if that is another one.
    """
    # The route comes last, so where it is, all the rest is.
    whole = exists(layout.namespace) and outside in run(
        ["ip", "-n", layout.namespace, "route", "show", "table", "local"]
    )
    if whole:
        return False
    remove(layout.namespace)
    run(["ip", "netns", "add", layout.namespace])
    with inside(layout.namespace):
        settings = Path("/proc/sys/net/ipv4")
        (settings / "ip_forward").write_text("1")
        for scope in ("all", "default"):
            (settings / "conf" / scope / "rp_filter").write_text("0")
    commands = [
        "link set dev lo up",
        # An address of its own: a bridge otherwise takes the lowest of its ports', which changes as nodes come and go.
        f"link add name {BRIDGE} address {mac(addresses[0])} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        *(f"addr add {address}/{prefixlen} dev {BRIDGE}" for address in addresses),
        f"link set dev {BRIDGE} addrgenmode none up",
        # The whole network is local: clients in here may call from any of its addresses, and servers listen on them.
        f"route add local {outside} dev lo",
    ]
    _batch(layout.namespace, commands)
    return True


def plug(layout: Layout, node: str, interface: str, address: str, prefixlen: int, gateway: str) -> None:
    """Makes a node's namespace, with a cable into the bridge and its address on it."""
    namespace = layout.node_namespace(node)
    run(["ip", "netns", "add", namespace])
    port = _port(node)
    _batch(
        layout.namespace,
        [
            f"link add name {port} type veth peer name {interface} address {mac(address)} netns {namespace}",
            f"link set dev {port} master {BRIDGE} addrgenmode none up",
        ],
    )
    _batch(
        namespace,
        [
            "link set dev lo up",
            f"link set dev {interface} addrgenmode none up",
            f"addr add {address}/{prefixlen} dev {interface}",
            f"route add default via {gateway}",
        ],
    )


def plug_machine(layout: Layout, node: str) -> str:
    """Makes a card's end of a cable into the bridge, for a machine that is no container; returns its name."""
    port = _port(node)
    _batch(
        layout.namespace,
        [
            f"tuntap add dev {port} mode tap",
            f"link set dev {port} master {BRIDGE} addrgenmode none up",
        ],
    )
    return port


def plugged(layout: Layout, node: str) -> bool:
    """Whether a node's cable is in."""
    if not exists(layout.namespace):
        return False
    with inside(layout.namespace):
        return Path(f"/proc/sys/net/ipv4/conf/{_port(node)}").exists()


def unplug(layout: Layout, node: str) -> None:
    """Pulls a node's cable: from now on nobody hears it, and no address of its answers."""
    if plugged(layout, node):
        run(["ip", "-n", layout.namespace, "link", "del", "dev", _port(node)])


def answers(layout: Layout, address: str, port: int) -> bool:
    """Whether somebody in the lab takes connections at an address."""
    with inside(layout.namespace):
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            return False
    return True


def remove(namespace: str) -> None:
    """Removes a namespace's name; the namespace itself ends with its last process."""
    if exists(namespace):
        run(["ip", "netns", "del", namespace])


def _batch(namespace: str, commands: list[str]) -> None:
    run(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands) + "\n")


def mac(address: str) -> str:
    """A locally administered address, the same one whenever the node is made anew: neighbours' caches stay right."""
    return "02:77:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def _port(node: str) -> str:
    """The bridge's end of a node's cable. The kernel takes 15 letters."""
    return node if len(node) <= 15 else f"{node[:6]}-{zlib.crc32(node.encode()):08x}"
