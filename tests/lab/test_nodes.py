"""Nodes go out of service, come back, are added and are made anew, and mail flows meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from conftest import Nodes
from test_changes import main_pids

from posthouse import lab, run, sitefile
from posthouse.lab import network
from posthouse.lab.layout import Layout
from posthouse.probe.clients import Imap, Person, Platform, Smtp, digest, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there

SENDER = "stranger@example.net"
# A lab of its own, for what changes the site file. Its folder is one that git ignores.
OWN = "tmp-nodes"
SERVING_SECONDS = 60


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
    act: Callable[[], object], platform: Platform, nodes: Nodes, friend: str, people: Any, world: Any
) -> None:
    """While something is done, no delivery and no login fails, no session breaks more than once, nothing is lost."""
    everybody = [people.alice, people.bob, people.carol]
    ledger = Ledger()
    with Stream(platform, ledger, everybody, friend) as stream, Sessions(platform, everybody) as sessions:
        eventually(lambda: stream.taken > 3 and sessions.logins > 1, 60, "mail and logins")
        act()
        before = stream.taken, sessions.logins
        eventually(lambda: stream.taken > before[0] + 3 and sessions.logins > before[1] + 1, 60, "mail and logins")
    assert stream.failures == []
    assert sessions.failures == []
    assert max(sessions.reconnects.values()) <= 1, sessions.reconnects
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


def test_queue_moves(platform, nodes, friend, people, world, site, posthouse, drained):
    """What cannot be delivered when a node is drained goes on from another node's queue, once"""
    store = site.stores[people.bob.store]
    node = next(name for name in nodes.of("mx") if name != store.primary)
    ledger = Ledger()
    nodes.run(store.primary, f"systemctl stop cyrus@{store.name}")
    try:
        for number in range(3 * len(nodes.of("mx"))):
            message = letter(SENDER, people.bob.address, f"Number {number}.")
            with Smtp(platform, source=friend) as client:
                assert client.transaction(SENDER, people.bob.address, message.data).code == 250
            ledger.note(message, people.bob.address)
        eventually(
            lambda: all(json.loads(line)["queue_name"] == "deferred" for line in waiting(nodes, node)), 60, "wait"
        )
        before = len(waiting(nodes, node))
        assert before
        drained(node)
        assert waiting(nodes, node) == []
    finally:
        nodes.run(store.primary, f"systemctl start cyrus@{store.name}")
    assert_all_there(ledger, platform, nodes, [people.bob], world)


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

        def restart(node: str = node) -> None:
            posthouse("drain", node, "--site", site.name, "--wait", "3")
            nodes.run(node, "systemctl --no-block poweroff")
            states = {entry["name"]: entry for entry in lab.status(site.name)}
            eventually(lambda: stopped(site.name, node), 90, f"{node} down, was {states[node]['state']}")
            lab.start(site.name, node)
            posthouse("undrain", node, "--site", site.name)

        nobody_notices(restart, platform, nodes, friend, people, world)


def stopped(name: str, node: str) -> bool:
    """Whether a node of a lab does not run."""
    return any(entry["name"] == node and entry["state"] == "stopped" for entry in lab.status(name))


class Own:
    """A small lab beside the one that all tests share, with a site file that tests may change."""

    def __init__(self, site: Any) -> None:
        self.folder = sitefile.INVENTORY / OWN
        self.data = yaml.safe_load((sitefile.INVENTORY / site.name / "site.yml").read_text())
        self.data["name"] = OWN
        nodes = self.data["nodes"]
        del nodes["lb[1:2]"]
        nodes["lb1"] = {"class": "lb", "address": str(site.nodes["lb1"].address)}

    def write(self) -> None:
        """Writes the site file as `data` is now."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "site.yml").write_text(yaml.safe_dump(self.data))

    @property
    def site(self) -> Any:
        """The site as it is now."""
        return sitefile.load(OWN)

    @property
    def nodes(self) -> Nodes:
        """Its nodes."""
        return Nodes(self.site)

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """What is connected in here is connected in this lab."""
        return network.inside(Layout(OWN).namespace)

    def posthouse(self, *arguments: str, text: str | None = None) -> str:
        """Runs `posthouse …` as an operator does, in the machine's own network; returns what it prints."""
        done = self.attempt(*arguments, text=text)
        assert done.returncode == 0, f"posthouse {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs `posthouse …`, whatever comes of it."""
        # This process is in the other lab's network, from which no package can be fetched.
        command = ["nsenter", "--net=/proc/1/ns/net", str(run.BIN / "posthouse"), *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=1800)

    def down(self) -> None:
        """Nothing is left of it."""
        lab.down(OWN)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def own(site: Any) -> Iterator[Own]:
    """The small lab, deployed, with one account on each of its stores."""
    made = Own(site)
    made.down()
    try:
        made.write()
        made.posthouse("lab", "up", OWN)
        made.posthouse("deploy", OWN)
        yield made
    finally:
        made.down()


def limit(seconds: float) -> float:
    """An acceptance limit for a quiet machine, stretched by what else this one has to do."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_expand(own):
    """A node more serves within a minute, and nothing is restarted on the others"""
    own.data["nodes"]["mail4"] = {"class": "mail"}
    own.write()
    before = main_pids(Nodes(sitefile.parse(yaml.safe_dump(own.data | {"nodes": _without(own.data, "mail4")}))))
    allowed = limit(SERVING_SECONDS)
    report = json.loads(own.posthouse("expand", "mail4", "--site", OWN, "--json"))
    after = main_pids(own.nodes)
    changed = {
        node: [unit for unit, pid in units.items() if after[node].get(unit) != pid] for node, units in before.items()
    }
    assert changed == {node: [] for node in before}
    note = next(step["note"] for step in report["steps"] if step["do"] == "serve")
    print(f"expand: {note}; allowed here {allowed:.0f} s")
    assert float(note.split()[1]) <= allowed
    with own.inside():
        platform = Platform(own.site)
        names = set()

        def everybody_greets() -> bool:
            with Smtp(platform, source=platform.outside(30)) as client:
                names.add(client.ehlo()[1].decode().split()[0].partition(".")[0])
            return "mail4" in names

        eventually(everybody_greets, 60, "a greeting from the new node")
    assert json.loads(own.posthouse("expand", "mail4", "--site", OWN, "--json"))["changed"] is False


def _without(data: dict[str, Any], node: str) -> dict[str, Any]:
    return {key: value for key, value in data["nodes"].items() if key != node}


def test_rebuild(own):
    """A node whose disk is gone comes back with all of its mail, takes mail, and is replicated again"""
    site, nodes = own.site, own.nodes
    store = site.stores["s02"]
    person = Person(f"user.{uuid.uuid4().hex[:4]}@{site.domain}", uuid.uuid4().hex, store.name)
    own.posthouse(
        "account",
        "add",
        person.address,
        "--store",
        store.name,
        "--site",
        OWN,
        "--password-stdin",
        text=f"{person.password}\n",
    )
    letters = [letter(SENDER, person.address, f"Number {n}.\n" + ("x" * 70 + "\n") * 400) for n in range(150)]
    with own.inside(), Imap(Platform(site), person) as imap:
        for message in letters:
            imap.append("Archive", "", "", message.data)
        eventually(lambda: replicated(nodes, store, letters[-1].id), 60, "replication")
    lab.kill(OWN, store.primary)
    allowed = limit(SERVING_SECONDS)
    report = json.loads(own.posthouse("rebuild", store.primary, "--site", OWN, "--measure", "--json"))
    note = next(step["note"] for step in report["steps"] if step["do"] == "serve")
    print(f"rebuild: {note}; allowed here {allowed:.0f} s and the time to copy; {report['copies']}")
    assert float(note.split()[1]) <= allowed + sum(copy["seconds"] for copy in report["copies"].values())
    new = letter(SENDER, person.address)
    with own.inside():
        platform = Platform(own.site)
        with Smtp(platform, source=platform.outside(31)) as client:
            assert client.transaction(SENDER, person.address, new.data).code == 250
        with Imap(platform, person) as imap:
            found = imap.messages(folder="Archive")
            assert sorted(map(digest, found)) == sorted(digest(message.data) for message in letters)
            eventually(lambda: imap.messages(new.id), 60, "new mail in the mailbox")
    eventually(lambda: replicated(nodes, store, new.id), 60, "the new message on the rebuilt node and on its peer")


def test_retire(own):
    """A node without stores goes for good: no balancer knows it any more, and the others restart nothing"""
    site = own.site
    assert "mail4" in site.nodes, "test_expand has put it there"
    own.posthouse("retire", "mail4", "--site", OWN, "--wait", "3")
    assert "mail4" not in {node["name"] for node in lab.status(OWN)}
    del own.data["nodes"]["mail4"]
    own.write()
    before = main_pids(own.nodes)
    own.posthouse("deploy", OWN)
    assert main_pids(own.nodes) == before
    assert "mail4" not in own.nodes.run("lb1", "echo 'show servers state' | socat - /run/haproxy/admin.sock")
    done = own.attempt("retire", "mail1", "--site", OWN)
    assert done.returncode != 0
    assert "directory.providers: mail1 is one of them" in done.stderr


@pytest.mark.full
def test_upgrade(own):
    """An upgrade that was not rehearsed is refused; rehearsed on a copy, it is done node by node"""
    versions = own.nodes.run("mail1", "apt-get -qq update; apt-cache madison openssl").splitlines()
    newest, *older = dict.fromkeys(line.split("|")[1].strip() for line in versions)
    assert older, "the mirror has no older openssl to begin with"
    own.nodes.run(
        "mail1", f"DEBIAN_FRONTEND=noninteractive apt-get -qq -y --allow-downgrades install openssl={older[0]}"
    )
    refused = own.attempt("upgrade", "--site", OWN)
    assert refused.returncode != 0
    assert "was never rehearsed" in refused.stderr
    own.posthouse("upgrade", "--rehearse", "--site", OWN)
    report = json.loads(own.posthouse("upgrade", "--site", OWN, "--wait", "3", "--json"))
    assert {step["node"] for step in report["steps"]} == {"mail1"}
    assert own.nodes.run("mail1", "dpkg-query -W -f '${Version}' openssl") == newest
    assert json.loads(own.posthouse("upgrade", "--site", OWN, "--json"))["changed"] is False


def replicated(nodes: Nodes, store: Any, message_id: str) -> bool:
    """Whether every copy of a store has a message."""
    look = f"grep -rlF '{message_id}' /srv/store/{store.name}/spool || true"
    return all(nodes.run(node, look).strip() for node in (store.primary, *store.replicas))
