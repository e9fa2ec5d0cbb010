"""A store whose node fails is served by another, and nothing that was acknowledged is lost."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ARRIVES, settled

from posthouse import lab, run, secrets
from posthouse.ops import failover
from posthouse.ops.backup import backups
from posthouse.ops.repository import NOTES, Repository
from posthouse.probe.clients import Imap, Person, Platform, Smtp, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there

SENDER = "stranger@example.net"
BACK = 10.0  # s, within which a store's users are served again


def until_served(platform: Platform, person: Person, since: float) -> float:
    """Seconds from `since` until a person could log in through the VIP and open the inbox; tries twice a second."""
    served = threading.Event()
    taken: list[float] = []

    def attempt() -> None:
        with contextlib.suppress(Exception), Imap(platform, person) as imap:
            if imap.select("INBOX")[0] == "OK":
                taken.append(time.monotonic() - since)
                served.set()

    for _ in range(120):
        threading.Thread(target=attempt, daemon=True).start()
        if served.wait(0.5):
            return min(taken)
    raise AssertionError(f"{person.address} was not served within a minute")


def of_store(people: Any, store: str) -> Person:
    return next(person for person in (people.alice, people.bob, people.carol) if person.store == store)


@contextlib.contextmanager
def paused(nodes: Any, node: str, unit: str) -> Iterator[None]:
    """A unit's processes stand still meanwhile, if the node lives."""
    nodes.run(node, f"systemctl kill --signal=STOP {unit}")
    try:
        yield
    finally:
        with contextlib.suppress(AssertionError):
            nodes.run(node, f"systemctl kill --signal=CONT {unit}")


def test_planned(platform, nodes, friend, people, world, site, posthouse, home):
    """A store moves to its replica and back under mail: no sender fails, nothing comes twice, deploy changes nothing"""
    store = people.alice.store
    old, new = home[store].primary, home[store].in_sync[0]
    everybody = [people.alice, people.bob]
    ledger = Ledger()
    with Stream(platform, ledger, everybody, friend) as stream:
        eventually(lambda: stream.taken > 10, 60, "a stream of mail")
        before = nodes.primary(store)
        assert "would do" in posthouse("failover", store, "--site", site.name, "--check")
        assert nodes.primary(store) == before
        done = json.loads(posthouse("failover", store, "--to", new, "--site", site.name, "--json"))
        assert done["steps"] == [{"store": store, "source": old, "target": new, "force": False}]
        with Imap(platform, people.alice) as imap:
            imap.select("INBOX")
        assert nodes.primary(store) == new
        assert "no change" in posthouse("failover", store, "--to", new, "--site", site.name)
        settled(site)
        changed = json.loads(posthouse("deploy", site.name, "--json"))["nodes"]
        assert not [name for name, node in changed.items() if node["changed"] or not node["ok"]]
        posthouse("failback", store, "--site", site.name)
        assert nodes.primary(store) == old
        last = stream.taken
        eventually(lambda: stream.taken > last + 10, 60, "a stream of mail")
    assert stream.failures == []
    assert_all_there(ledger, platform, nodes, everybody, world)


def power_cut(platform, nodes, people, site, home, store: str, lag: float) -> tuple[float, float]:
    """Cuts the power of a store's primary, with its replication standing still for the last `lag` seconds.

    Returns the seconds until the store's users were served again, and how long others' log-in took meanwhile.
    """
    victim = home[store].primary
    other = next(name for name, state in home.items() if state.primary != victim and victim not in state.in_sync)
    unit = f"'cyrus-sync-{store}@*'"
    if lag:
        nodes.run(victim, f"systemctl kill --signal=STOP {unit}")
        time.sleep(lag)
    session = idling(platform, of_store(people, store))
    started = time.monotonic()
    lab.kill(site.name, victim)
    try:
        unaffected = until_served(platform, of_store(people, other), time.monotonic())
        back = until_served(platform, of_store(people, store), started)
        assert nodes.primary(store) != victim
        assert ended(session), "whoever had waited for mail waits for ever"
    finally:
        lab.start(site.name, victim)
    eventually(lambda: nodes.serving(victim), 120, f"{victim} serving again")
    return back, unaffected


def idling(platform: Platform, person: Person) -> Imap:
    """A mail program that waits to be told of mail."""
    session = Imap(platform, person)
    session.select("INBOX")
    session.send(b"i IDLE\r\n")
    assert session.readline().startswith(b"+")
    return session


def ended(session: Imap) -> bool:
    """Whether a session is told, before it loses patience, that it is over."""
    session.sock.settimeout(20)
    try:
        while session.readline():
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def rounds(platform, nodes, friend, people, world, site, posthouse, count: int) -> None:
    everybody = [people.alice, people.bob, people.carol]
    ledger, times, others = Ledger(), [], []
    with Stream(platform, ledger, everybody, friend, senders=6) as stream:
        for number in range(count):
            before = stream.taken
            eventually(lambda b=before: stream.taken > b + 10, 60, "mail flowing")
            home = settled(site)
            store = sorted(home)[number % len(home)]
            time.sleep(random.uniform(0, 1.5))
            # Every second time the replica is behind: what it does not have was not acknowledged to Postfix.
            lag = random.uniform(0.5, 3) if number % 2 else 0
            back, unaffected = power_cut(platform, nodes, people, site, home, store, lag)
            times.append(back)
            others.append(unaffected)
    settled(site)
    nodes.flush(*[person.address for person in everybody], seconds=300)
    print(f"served again after {', '.join(f'{t:.1f}' for t in times)} s; others after {max(others):.1f} s at most")
    assert_all_there(ledger, platform, nodes, everybody, world, power_cut=True)
    assert max(times) <= BACK
    assert max(others) <= BACK / 2


def test_power_cuts(platform, nodes, friend, people, world, site, posthouse):
    """Nodes lose power under mail, also while replication lags: others serve their stores within 10 s, lost 0"""
    rounds(platform, nodes, friend, people, world, site, posthouse, 2)


@pytest.mark.full
def test_twenty_power_cuts(platform, nodes, friend, people, world, site, posthouse):
    """Twenty power cuts at random moments: users are served again within 10 s each time, lost 0"""
    rounds(platform, nodes, friend, people, world, site, posthouse, 20)


def saved(site: Any, backup: str, folder: Any) -> set[str]:
    """The Message-IDs of all that a backup holds, in stores and queues."""
    repository = Repository(site, secrets.load(site))
    (found,) = [one for one in backups(repository) if one.name == backup]
    for part, snapshot in found.parts.items():
        if part.startswith(("store:", "queues:")):
            repository.restic("restore", "--quiet", snapshot, "--target", str(folder / part))
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return {name.decode() for file in files for name in re.findall(rb"(?i)message-id: *(<[^>]+>)", file.read_bytes())}


@pytest.mark.full
@pytest.mark.parametrize("moment", ["queues:", "store:"])
def test_backup_meanwhile(platform, nodes, friend, people, world, site, home, tmp_path, moment):
    """A node dies while a backup is made ({moment}): the backup is finished, and has all that came before it began"""
    place = Path(Repository(site, secrets.load(site)).place)
    shutil.rmtree(place, ignore_errors=True)
    (NOTES / site.name).unlink(missing_ok=True)
    everybody = [people.alice, people.bob, people.carol]
    victim = home[people.alice.store].primary
    ledger = Ledger()
    command = [run.BIN / "posthouse", "backup", site.name, "--json"]
    with Stream(platform, ledger, everybody, friend) as stream:
        eventually(lambda: stream.taken > 10, 60, "a stream of mail")
        before = {identifier for identifier, _ in ledger.acknowledged}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        # The first of such a part that is done.
        for line in process.stderr:
            lines.append(line)
            if line.startswith(moment) and "bytes" in line:
                break
        lab.kill(site.name, victim)
        try:
            lines += process.stderr.readlines()
            result = process.stdout.read()
            assert process.wait() == 0, "".join(lines)
        finally:
            lab.start(site.name, victim)
    made = json.loads(result)
    print("".join(lines), f"{made['seconds']} s")
    left_out = {part["name"] for part in made["left_out"]}
    assert {part["name"] for part in made["parts"]} >= {f"store:{name}" for name in site.stores} | {"directory", "site"}
    assert left_out <= {f"queues:{victim}"}
    if not left_out:
        assert before <= saved(site, made["backup"], tmp_path)
    eventually(lambda: nodes.serving(victim), 120, f"{victim} serving again")
    settled(site)
    nodes.flush(*(person.address for person in everybody), seconds=120)
    assert_all_there(ledger, platform, nodes, everybody, world, power_cut=True)
    shutil.rmtree(place)
    (NOTES / site.name).unlink()


def test_not_acknowledged(platform, nodes, friend, people, site, home):
    """Mail that only the primary has stays in the queue; the replica is struck off before any of it is let go"""
    store = people.bob.store
    primary = home[store].primary
    message = letter(SENDER, people.bob.address)
    with paused(nodes, primary, f"'cyrus-sync-{store}@*'"):
        with Smtp(platform, source=friend) as client:
            assert client.transaction(SENDER, people.bob.address, message.data).code == 250
        with Imap(platform, people.bob) as imap:
            eventually(lambda: imap.messages(message.id), ARRIVES, "the message in the mailbox")
        # Postfix still has it, for as long as the replica counts as one that could take over.
        while people.bob.address in "".join(nodes.each("mx", "postqueue -j").values()):
            time.sleep(0.2)
        assert failover.states(site)[store].in_sync == ()
    settled(site)


def test_cut_off(platform, nodes, people, site, home, promised):
    """A primary that is cut off stops serving by itself before another starts: never two of them"""
    store = site.stores[people.carol.store]
    old, new = home[store.name].primary, home[store.name].in_sync[0]

    def holds(node: str) -> bool:
        return f" {store.address}/" in nodes.run(node, "ip -4 -o address show")

    cut = "table inet cut { chain %s { type filter hook %s priority -300; policy drop; %s lo accept; }; }"
    rules = "; ".join(cut % (hook, hook, interface) for hook, interface in (("input", "iif"), ("output", "oif")))
    assert holds(old)
    started = time.monotonic()
    nodes.run(old, f"nft '{rules}'")
    try:
        # In this order: what the old one has let go before the second look was gone when the new one was asked.
        while not holds(new):
            assert time.monotonic() - started < 60, f"{new} did not take over"
        assert not holds(old)
        promised("served again", until_served(platform, people.carol, started), BACK)
        role = nodes.run(old, f"readlink /etc/cyrus/{store.name}/now")
        assert role.strip() == "replica"
    finally:
        nodes.run(old, "nft delete table inet cut")


def test_keeper_hangs(platform, nodes, people, site, home, promised):
    """A keeper that hangs takes its store with it, and the store is served again"""
    store = people.alice.store
    primary = home[store].primary
    unit = f"store-keeper@{store}"
    before = nodes.run(primary, f"systemctl show -P MainPID cyrus@{store}")
    started = time.monotonic()
    nodes.run(primary, f"systemctl kill --signal=STOP {unit}")
    eventually(lambda: nodes.run(primary, f"systemctl show -P MainPID cyrus@{store}") != before, 60, "an end of it")
    promised("served again", until_served(platform, people.alice, started), BACK)
    assert len([node for node in nodes.of("store") if _holds(nodes, site.stores[store], node)]) == 1


def _holds(nodes: Any, store: Any, node: str) -> bool:
    return f" {store.address}/" in nodes.run(node, "ip -4 -o address show")


def test_refused(platform, nodes, people, site, posthouse, home):
    """What must not be done is refused, with the reason, and nothing changes"""
    store = people.alice.store
    stranger = next(node for node in nodes.of("store") if node not in (home[store].primary, *home[store].in_sync))
    command = ["failover", "--site", site.name]
    posthouse(*command, "s77", status=1)
    posthouse(*command, store, "--to", stranger, status=1)
    posthouse("failback", "--site", site.name, status=1)
    with run.exclusive(site):
        posthouse(*command, store, status=1)
    with paused(nodes, home[store].primary, f"'cyrus-sync-{store}@*'"):
        with Imap(platform, people.alice) as imap:
            imap.append("Drafts", "", "", letter(people.alice.address, people.bob.address).data)
        eventually(lambda: not failover.states(site)[store].in_sync, 60, "a replica that is not in sync")
        posthouse(*command, store, status=1)
    assert failover.primaries(site) == {name: state.primary for name, state in home.items()}
