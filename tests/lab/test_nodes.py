"""Nodes go out of service and come back, and mail flows meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Nodes
from test_changes import main_pids
from test_failover import paused, settled

from posthouse import inventory, lab, run
from posthouse.ops import failover, service, state
from posthouse.probe.clients import Imap, Person, Platform, Smtp, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there
from posthouse.remote import Remote

SENDER = "stranger@example.net"


class Sessions:
    """People with a mailbox open all the time, and others who log in again and again."""

    def __init__(self, platform: Platform, people: list[Person]) -> None:
        self.platform, self.people = platform, people
        self.reconnects = dict.fromkeys((person.address for person in people), 0)
        self.logins = 0
        self.failures: list[str] = []
        self._stop_now = threading.Event()
        self._threads = [threading.Thread(target=self._stay, args=[person], daemon=True) for person in people]
        self._threads.append(threading.Thread(target=self._log_in, daemon=True))

    def _stay(self, person: Person) -> None:
        client = Imap(self.platform, person)
        while not self._stop_now.wait(0.5):
            try:
                client.noop()
            except (OSError, client.abort):
                self.reconnects[person.address] += 1
                client = self._opened(person)
        with contextlib.suppress(OSError, client.error):
            client.logout()

    def _opened(self, person: Person) -> Imap:
        try:
            return Imap(self.platform, person)
        except Exception as error:
            self.failures.append(f"{person.address} could not log in again: {type(error).__name__}: {error}")
            raise

    def _log_in(self) -> None:
        for number in itertools.count():
            if self._stop_now.wait(0.3):
                return
            with contextlib.suppress(Exception):
                client = self._opened(self.people[number % len(self.people)])
                self.logins += 1
                client.logout()

    def __enter__(self) -> Sessions:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a mailbox has not answered for 90 s"


def nobody_notices(
    act: Callable[[], object],
    platform: Platform,
    nodes: Nodes,
    friend: str,
    people: Any,
    world: Any,
    reconnects: int = 1,
) -> None:
    """While something is done, no delivery and no login fails, nothing is lost, no session breaks more than once.

    reconnects: how often one may break, where what it is connected to moves more than once.
    """
    everybody = [people.alice, people.bob, people.carol]
    ledger = Ledger()
    with Stream(platform, ledger, everybody, friend) as stream, Sessions(platform, everybody) as sessions:
        eventually(lambda: stream.taken > 3 and sessions.logins > 1, 60, "mail and logins")
        act()
        before = stream.taken, sessions.logins
        eventually(lambda: stream.taken > before[0] + 3 and sessions.logins > before[1] + 1, 60, "mail and logins")
    assert stream.failures == []
    assert sessions.failures == []
    print(
        f"{stream.taken} messages and {sessions.logins} logins, none failed; {stream.longest_silence():.1f} s the "
        f"longest time without a message; open mailboxes connected anew: {sorted(sessions.reconnects.values())}"
    )
    assert max(sessions.reconnects.values()) <= reconnects, sessions.reconnects
    assert_all_there(ledger, platform, nodes, everybody, world)


@pytest.fixture
def drained(posthouse: Callable[..., str], site: Any) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Drains nodes, and puts them back into service afterwards."""
    names: list[str] = []

    def drain(node: str) -> dict[str, Any]:
        names.append(node)
        return dict(json.loads(posthouse("drain", node, "--site", site.name, "--wait", "3", "--json")))

    yield drain
    for name in names:
        posthouse("undrain", name, "--site", site.name)


def test_drain_store(platform, nodes, friend, people, world, site, drained):
    """A node that serves a store is drained: no delivery and no login fails, no session breaks more than once"""
    node = site.stores[people.alice.store].primary
    nobody_notices(lambda: drained(node), platform, nodes, friend, people, world)
    assert nodes.run(node, "cat /var/lib/posthouse/drained")
    for conf in nodes.queues:
        assert nodes.run(node, f"postqueue -c {conf} -j") == ""


@pytest.mark.full
def test_drain_waits(platform, nodes, people, site, drained):
    """A drain waits, before it changes anything, for a replica that lacks something for a moment"""
    store = people.alice.store
    settled(site)
    node = nodes.primary(store)
    lock = inventory.RUNTIME / site.name / "lock"
    # Whatever fails, replication goes on before the drain is waited for.
    with ThreadPoolExecutor(1) as pool, paused(nodes, node, f"'cyrus-sync-{store}@*'"):
        with Imap(platform, people.alice) as imap:
            imap.append("Drafts", "", "", letter(people.alice.address, people.bob.address).data)
        eventually(lambda: not failover.states(site)[store].in_sync, 60, "a replica that is not in sync")
        command = [run.BIN / "posthouse", "drain", node, "--site", site.name, "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert f"{store}: no replica has all of it now" in done.stderr
        draining = pool.submit(drained, node)
        eventually(lambda: f", drain {node} --site {site.name} --wait" in lock.read_text(), 60, "a drain at work")
        time.sleep(4)
        assert not draining.done()
        have = state.read(site, Remote(site))
        assert service.in_service(have, node)
        assert have.primaries[store] == node
    assert draining.result()["changed"]
    assert nodes.primary(store) != node


def test_drain_balancer(platform, nodes, friend, people, world, site, drained):
    """The balancer with the VIP is drained: no delivery and no login fails, no session breaks more than once"""
    vip = str(site.vips["mail"])

    def holders() -> list[str]:
        return [node for node, text in nodes.each("lb", "ip -4 -o address").items() if f" {vip}/" in text]

    (holder,) = holders()
    nobody_notices(lambda: drained(holder), platform, nodes, friend, people, world)
    assert holder not in holders()
    # It does not take the address again, also when everything on it is started anew.
    nodes.run(holder, "systemctl restart keepalived")
    time.sleep(4)  # three times as long as a balancer waits before it takes an address that nobody has
    assert holder not in holders()


def test_queue_moves(platform, nodes, friend, people, world, drained):
    """What cannot be delivered when a node is drained goes on from another node's queue, once"""
    node = nodes.of("mx")[-1]
    ledger = Ledger()
    # From this node alone no store can be reached.
    wall = (
        "table inet wall { chain output { type filter hook output priority 0; tcp dport 24 reject with tcp reset; }; }"
    )
    nodes.run(node, f"nft '{wall}'")
    try:
        for number in range(3 * len(nodes.of("mx"))):
            message = letter(SENDER, people.bob.address, f"Number {number}.")
            with Smtp(platform, source=friend) as client:
                assert client.transaction(SENDER, people.bob.address, message.data).code == 250
            ledger.note(message, people.bob.address)
        eventually(lambda: all_deferred(nodes, node), 60, "what came to the node, deferred")
        drained(node)
        assert waiting(nodes, node) == []
    finally:
        nodes.run(node, "nft delete table inet wall")
    assert_all_there(ledger, platform, nodes, [people.bob], world)


def all_deferred(nodes: Nodes, node: str) -> bool:
    """Whether mail waits on a node, and all of it was tried."""
    found = waiting(nodes, node)
    return bool(found) and all(json.loads(line)["queue_name"] == "deferred" for line in found)


def waiting(nodes: Nodes, node: str) -> list[str]:
    """What waits in the queue for mail that came in, a line of JSON for each message."""
    return nodes.run(node, "postqueue -c /etc/postfix -j").splitlines()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["drain", "mial1"], "mial1: no such node"),
        (["undrain", "nobody"], "nobody: no such node"),
        (["expand", "mail77"], "mail77: no such node"),
        (["rebuild", "mial1"], "mial1: no such node"),
        (["rebuild", "mail1"], "mail1: is alive, and a rebuild wipes its disk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(site, nodes, command, complaint):
    """What cannot be meant or done is refused before anything is changed"""
    before = main_pids(nodes)
    done = subprocess.run(
        [run.BIN / "posthouse", *command, "--site", site.name], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "nothing was changed" in done.stderr
    assert main_pids(nodes) == before


def test_one_at_a_time(site, posthouse):
    """A second operation on a site is told who is at work, and changes nothing"""
    with run.exclusive(site):
        done = subprocess.run(
            [run.BIN / "posthouse", "drain", "mail1", "--site", site.name], capture_output=True, text=True, timeout=120
        )
    assert done.returncode != 0
    assert f"{site.name}: locked by" in done.stderr


@pytest.mark.full
def test_rolling_restart(platform, nodes, friend, people, world, site, posthouse):
    """Every node is drained, restarted and put back in turn: no delivery and no login fails"""
    for node in site.nodes:

        def drain_and_restart(node: str = node) -> None:
            posthouse("drain", node, "--site", site.name, "--wait", "3")
            nodes.run(node, "systemctl --no-block poweroff")
            eventually(lambda: stopped(site.name, node), 90, f"{node} down")
            lab.start(site.name, node)
            eventually(lambda: nodes.serving(node), 120, f"{node} to do all that it should")

        print(f"{node}, out of service and restarted:")
        nobody_notices(drain_and_restart, platform, nodes, friend, people, world)
        print(f"{node}, back in service:")
        back = ["undrain", node, "--site", site.name]
        nobody_notices(lambda back=back: posthouse(*back), platform, nodes, friend, people, world)


def stopped(name: str, node: str) -> bool:
    """Whether a node of a lab does not run."""
    return any(entry["name"] == node and entry["state"] == "stopped" for entry in lab.status(name))
