"""Processes, namespaces and servers of a lab, each by itself and for real: needs root, touches nothing but its own."""

import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from posthouse.lab import network, processes, server
from posthouse.lab.layout import LabError, Layout

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes cgroups and network namespaces")


@pytest.fixture
def layout() -> Iterator[Layout]:
    """A lab's names that nobody else uses; its groups and namespaces are removed."""
    layout = Layout(f"t{uuid.uuid4().hex[:6]}")
    yield layout
    processes.end(layout.cgroup)
    for namespace in network.of_lab(layout):
        network.remove(namespace)


def test_names_of_a_lab_are_nobody_elses() -> None:
    assert Layout("a").node_namespace("b") != Layout("a-b").namespace
    assert Layout("a").node_cgroup("services") != Layout("a").services


def test_bridge_ports_fit_the_kernel_and_differ() -> None:
    names = ["mail1", "a-node-with-a-long-name-1", "a-node-with-a-long-name-2"]
    ports = [network._port(name) for name in names]
    assert ports[0] == "mail1"
    assert len(set(ports)) == 3 and all(len(port) <= 15 for port in ports)


@needs_root
def test_everything_in_a_group_ends_however_it_forked(layout: Layout, tmp_path: Path) -> None:
    group = layout.node_cgroup("n")
    processes.spawn(group, ["sh", "-c", "setsid sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000'"], tmp_path / "log")
    processes.until(lambda: len(list(processes.pids(group))) == 5, 10, "five processes")
    processes.end(layout.cgroup)
    assert not layout.cgroup.exists()


@needs_root
def test_spawned_process_outlives_who_started_it(layout: Layout, tmp_path: Path) -> None:
    group = layout.node_cgroup("n")
    code = (
        "from pathlib import Path; from posthouse.lab import processes; import os, signal\n"
        f"processes.spawn(Path({str(group)!r}), ['sleep', '1000'], Path({str(tmp_path / 'log')!r}))\n"
        "os.killpg(0, signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=False)
    assert processes.running(group)


@needs_root
def test_hub_is_made_once_and_again_when_it_is_not_whole(layout: Layout) -> None:
    def make() -> bool:
        return network.make_hub(layout, ["10.99.0.1"], 24, "198.51.100.0/24")

    assert make()
    assert not make()
    subprocess.run(["ip", "-n", layout.namespace, "route", "flush", "table", "local"], check=True)
    assert make()


@needs_root
def test_nodes_and_strangers_reach_each_other_and_nothing_else(layout: Layout) -> None:
    network.make_hub(layout, ["10.99.0.1"], 24, "198.51.100.0/24")
    network.plug(layout, "n", "eth0", "10.99.0.11", 24, "10.99.0.1")
    assert network.plugged(layout, "n")
    with network.inside(layout.node_namespace("n")):
        listener = socket.create_server(("10.99.0.11", 25))
        loose = socket.socket()
    with network.inside(layout.namespace):
        stranger = socket.create_connection(("10.99.0.11", 25), timeout=5, source_address=("198.51.100.7", 0))
    accepted, (peer, _) = listener.accept()
    assert peer == "198.51.100.7"
    with pytest.raises(OSError):
        loose.connect(("192.0.2.1", 80))
    network.unplug(layout, "n")
    assert not network.plugged(layout, "n")
    for each in (listener, stranger, accepted, loose):
        each.close()


@needs_root
def test_thread_comes_back_from_a_namespace(layout: Layout) -> None:
    network.make_hub(layout, ["10.99.0.1"], 24, "198.51.100.0/24")
    with network.inside(layout.namespace):
        assert network.entered(layout.namespace)
    assert not network.entered(layout.namespace)


def test_entering_a_lab_that_is_not_up_is_said() -> None:
    with pytest.raises(LabError, match="no such network namespace; start the lab"):
        network.enter("ph-nosuchlab")


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """The lab's proxy, by its URI, before a mirror in a folder that nodes know as http://mirror.test/debian."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/a.deb").write_bytes(b"package")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

    mirror = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=mirror.serve_forever, daemon=True).start()
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    mirrors = f'{{"http://mirror.test/debian": "http://127.0.0.1:{mirror.server_port}"}}'
    descriptors = [listener.fileno() for listener in listeners]
    command = [sys.executable, "-I", str(server.__file__), str(tmp_path), mirrors, "{}", *map(str, descriptors)]
    process = subprocess.Popen(command, pass_fds=descriptors, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{listeners[1].getsockname()[1]}"
    process.kill()
    process.wait()
    mirror.shutdown()
    mirror.server_close()
    for listener in listeners:
        listener.close()


def fetch(proxy: str, uri: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(uri, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy})).open(
            request, timeout=10
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


def test_proxy_fetches_from_the_mirror_and_from_nothing_else(proxy: str) -> None:
    assert fetch(proxy, "http://mirror.test/debian/pool/a.deb") == (200, b"package")
    assert fetch(proxy, "http://mirror.test/debian/pool/b.deb") == (404, b"")
    assert fetch(proxy, "http://mirror.test/other") == (403, b"")
    assert fetch(proxy, "http://mirror.test/debian/%2e%2e/%2e%2e/etc/passwd") == (403, b"")
    assert fetch(proxy, "http://127.0.0.1/") == (403, b"")


def test_proxy_passes_on_that_nothing_is_new(proxy: str) -> None:
    since = {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    assert fetch(proxy, "http://mirror.test/debian/pool/a.deb", **since) == (304, b"")
