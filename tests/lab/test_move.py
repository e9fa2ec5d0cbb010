"""Accounts move between stores while mail comes in and people read; a mover that dies half-way is run again."""

from __future__ import annotations

import contextlib
import imaplib
import itertools
import json
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import settled
from test_failover import paused

from posthouse import lab, run, secrets
from posthouse.directory import Directory
from posthouse.mailboxes import Mailboxes, ManageSieve, quoted
from posthouse.ops import failover, mailbox_state, rebalance
from posthouse.ops.mailbox_state import MailboxState, differences
from posthouse.ops.steps import GOES_ON
from posthouse.probe.clients import Imap, Person, Platform, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there
from posthouse.remote import Remote

# What a mover says on its way, in this order.
PHASES = ["copying", "freezing", "last pass", "comparing", "switching", "switched", "waiting for stragglers"]
# Modified UTF-7, separators of other systems, what a shell or a path would stumble over, and the longest there is.
NAMES = [
    "B&APw-cher",
    "&ZeVnLIqe-/&U,BTFw-",
    "with spaces/and 'quotes'",
    "dots.in.a.name",
    "deleted soon",
    "-dash $HOME #1",
    "L" * 250,
    "/".join(["deep"] * 20),
]


@dataclass
class Stores:
    """Two stores, from inside: whatever is on them can be read and put there without the access tier."""

    site: object
    source: Mailboxes
    target: Mailboxes

    def state(self, mailboxes: Mailboxes, person: Person) -> MailboxState:
        """A mailbox as it is on a store."""
        return mailbox_state.read(mailboxes, person.address)


@pytest.fixture(scope="module")
def stores(site) -> Iterator[Stores]:
    first, second = list(site.stores.values())[:2]
    kept = secrets.load(site)
    found = Stores(site, Mailboxes(first, kept), Mailboxes(second, kept))
    yield found
    found.source.close()
    found.target.close()


@pytest.fixture(scope="module")
def make(site, posthouse, stores, tmp_path_factory) -> Callable[..., list[Person]]:
    """Makes accounts on the first store, with a few messages each."""

    def make(count: int) -> list[Person]:
        tag = uuid.uuid4().hex[:6]
        persons = [
            Person(f"moving{number}.{tag}@{site.domain}", uuid.uuid4().hex, stores.source.store.name)
            for number in range(count)
        ]
        file = tmp_path_factory.mktemp("accounts") / "moving.csv"
        file.write_text("address,password,store\n" + "\n".join(",".join(person) for person in persons) + "\n")
        posthouse("account", "import", str(file), "--site", site.name)
        for person in persons:
            fill(stores.source, person, 3)
        return persons

    return make


def fill(mailboxes: Mailboxes, person: Person, count: int) -> None:
    """Puts messages into an inbox: a few by hand, and the others as copies of those."""
    with mailboxes.acting_for(person.address) as session:
        first = min(count, 125)
        for number in range(first):
            flags = [r"\Seen", r"\Flagged blue", "", r"\Answered \Draft"][number % 4]
            text = letter("before@example.net", person.address, f"Number {number}").data
            assert session.append("INBOX", flags, f'"{number % 28 + 1:02d}-Feb-2020 10:00:00 +0100"', text)[0] == "OK"
        session.select("INBOX")
        while first < count:
            more = min(first, count - first)
            assert session.copy(f"1:{more}", "INBOX")[0] == "OK"
            first += more


def make_odd(mailboxes: Mailboxes, person: Person, friend: Person) -> None:
    """A mailbox with all that a mailbox can have."""
    with mailboxes.acting_for(person.address) as session:
        for number, name in enumerate(NAMES):
            assert session.create(quoted(name))[0] == "OK", name
            assert (
                session.append(quoted(name), f"$Label{number}", "", letter("a@example.net", "b", name).data)[0] == "OK"
            )
        session.subscribe(quoted(NAMES[0]))
        session.unsubscribe("Archive")
        assert session.setacl(quoted(NAMES[1]), friend.address, "lrs")[0] == "OK"
        session.delete(quoted(NAMES[4]))
        for command in (
            ("SETMETADATA", '"Sent"', '(/private/comment "mine" /shared/comment "ours")'),
            ("CREATE", '"Robots"', r"(USE (\Archive))"),
        ):
            session._simple_command(*command)
        session.select(quoted(NAMES[2]))
        session._simple_command("UID", "STORE", "1", "ANNOTATION", '(/comment (value.priv "mine" value.shared "ours"))')
        session.select("INBOX")
        session.store("1", "+FLAGS", r"\Deleted")
        session.expunge()
    mailboxes.set_quota(person.address, 321)
    sieve = ManageSieve(mailboxes.store, mailboxes._tls)
    sieve.login(person.address, "proxy", mailboxes._passwords["store_proxy"])
    sieve.put("mine", 'require "fileinto";\nif header :is "X-Nothing" "1" { fileinto "Junk"; }\n')
    sieve.activate("mine")
    sieve.close()


imaplib.Commands.setdefault("SETMETADATA", ("AUTH", "SELECTED"))


class Reader:
    """Somebody at a mail program that is never closed: looks, and files drafts, until stopped."""

    def __init__(self, platform: Platform, person: Person) -> None:
        self.platform, self.person = platform, person
        self.sessions = 0
        self.refused: list[str] = []
        self.filed: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with Imap(self.platform, self.person) as imap:
                    self.sessions += 1
                    while not self._stop.wait(0.4):
                        draft = letter(self.person.address, "friend@example.net")
                        if imap.append("Drafts", r"\Draft", "", draft.data)[0] == "OK":
                            self.filed[draft.id] = time.monotonic()
                        imap.select("INBOX", readonly=True)
            except (imaplib.IMAP4.error, OSError) as error:
                if "AUTHENTICATIONFAILED" in str(error):
                    self.refused.append(str(error))
                self._stop.wait(0.2)

    @property
    def longest(self) -> float:
        """The longest time between two drafts, in seconds: 0.4 if nothing is in the way."""
        times = list(self.filed.values())
        return max(after - before for before, after in itertools.pairwise(times))

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90)


MOVERS: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def end_movers() -> Iterator[None]:
    """A test that fails leaves no mover to the next."""
    yield
    for process in MOVERS:
        process.kill()
        process.communicate()
    MOVERS.clear()


def mover(site, *arguments: str) -> subprocess.Popen[str]:
    """`posthouse move …` as an operator starts it, in the background."""
    # Whoever runs the tests in the background may ignore Ctrl-C, and what it starts would, too.
    command = ["env", "--default-signal=INT", run.BIN / "posthouse", "move", *arguments, "--site", site.name]
    MOVERS.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return MOVERS[-1]


def killed(site, person: Person, to: Mailboxes, phase: str, and_then: Callable[[], None] = lambda: None) -> None:
    """A mover that says that it is in a phase, and dies when `and_then` is over."""
    process = mover(site, person.address, "--to", to.store.name)
    for line in process.stderr:
        if line.strip() == f"{person.address}: {phase}":
            break
    and_then()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"{phase} never came"


def moved(site, persons: list[Person], to: Mailboxes) -> list[dict]:
    """What `posthouse move` did."""
    process = mover(site, *(person.address for person in persons), "--to", to.store.name, "--json", "--parallel", "4")
    printed, complaint = process.communicate(timeout=3600)
    assert printed, complaint
    done = json.loads(printed)["moved"]
    assert [one["error"] for one in done] == [None] * len(done)
    return done


def under_way(site, platform, nodes, friend, world, make, stores, count: int, size: int) -> float:
    """Moves accounts in use, and looks whether all is well. Returns the p99 of how long writing waited, in seconds."""
    people = make(count)
    odd, large, *others = people
    make_odd(stores.source, odd, others[0])
    fill(stores.source, large, size)
    # Nobody writes to these two: they must come out exactly as they went in.
    before = {person: stores.state(stores.source, person) for person in (odd, large)}
    ledger = Ledger()
    readers = [Reader(platform, person) for person in others[:4]]
    with contextlib.ExitStack() as going:
        stream = going.enter_context(Stream(platform, ledger, others, friend))
        for reader in readers:
            going.enter_context(reader)
        eventually(lambda: stream.taken > 10 and all(reader.filed for reader in readers), 120, "mail, and readers")
        done = moved(site, people, stores.target)
        last = stream.taken
        eventually(lambda: stream.taken > last + 10, 120, "mail after the move")
    pauses = sorted(one["pause"] for one in done)
    p99 = pauses[min(len(pauses) - 1, int(len(pauses) * 0.99))]
    messages = sum(one["messages"] for one in done)
    print(
        f"\n{len(done)} mailboxes, {messages} messages; writing waited for {pauses[len(pauses) // 2]:.1f} s (median), "
        f"{p99:.1f} s (p99), {pauses[-1]:.1f} s (most); {stream.taken} messages came meanwhile; "
        f"{sum(one['carried'] for one in done)} carried over late"
    )
    assert len(done) == count
    for person, state in before.items():
        assert differences(state, stores.state(stores.target, person)) == []
    for person in people:
        assert not stores.source.exists(person.address), f"{person.address} is left on the source"
    assert_all_there(ledger, platform, nodes, people, world)
    for reader in readers:
        assert not reader.refused
        assert reader.sessions <= 2, f"{reader.sessions - 1} reconnects"
        with Imap(platform, reader.person) as imap:
            drafts = [imap.messages(id, "Drafts") for id in reader.filed]
        assert [len(found) for found in drafts] == [1] * len(drafts)
    return p99


# Before those that move many: while no store has far more accounts than others, few more make them even.
@pytest.mark.full
def test_killed_and_rebalanced(site, posthouse, make, stores, tmp_path):
    """`rebalance` finishes what a mover left that was killed: nothing of the account is on its former store"""
    (person,) = make(1)
    before = stores.state(stores.source, person)
    killed(site, person, stores.target, "switched")
    even_out(site, posthouse, tmp_path / "more.csv")
    planned = json.loads(posthouse("rebalance", site.name, "--check", "--json"))
    assert [one["address"] for one in planned if one["source"] != one["target"]] == []
    (mine,) = [one for one in planned if one["address"] == person.address]
    assert mine["steps"] == [f"let go of the copy that is left on {stores.source.store.name}"]
    done = json.loads(posthouse("rebalance", site.name, "--json"))["moved"]
    assert [one["error"] for one in done] == [None] * len(planned)
    assert not stores.source.exists(person.address)
    assert differences(before, stores.state(stores.target, person)) == []
    assert "nothing to do" in posthouse("rebalance", site.name)


def even_out(site, posthouse, file: Path) -> None:
    """Adds accounts where a store has too few, so that `rebalance` moves none: other tests know where theirs are."""
    loads, free = rebalance.loads(site, secrets.load(site), Remote(site))
    tag = uuid.uuid4().hex[:6]
    lines = []
    while steps := rebalance.plan(loads, free):
        store, address = steps[0].target, f"even{len(lines)}.{tag}@{site.domain}"
        loads[store].mailboxes[address] = 0
        lines.append(f"{address},{uuid.uuid4().hex},{store}")
    file.write_text("\n".join(["address,password,store", *lines]) + "\n")
    posthouse("account", "import", str(file), "--site", site.name)


def test_under_way(site, platform, nodes, friend, world, make, stores):
    """A dozen mailboxes move under delivery and open sessions: the same afterwards, nothing lost, one reconnect"""
    under_way(site, platform, nodes, friend, world, make, stores, count=12, size=2_000)


@pytest.mark.full
def test_many_under_way(site, platform, nodes, friend, world, make, stores):
    """200 mailboxes, one of 20,000 messages, move under delivery and open sessions: the same, and nothing lost"""
    assert under_way(site, platform, nodes, friend, world, make, stores, count=200, size=20_000) <= 5


def test_killed(site, platform, make, stores):
    """A mover killed in any phase leaves one mailbox that counts, in use at once, and a rerun finishes the move"""
    people = make(len(PHASES))
    before = {person: stores.state(stores.source, person) for person in people}
    for person, phase in zip(people, PHASES, strict=True):
        killed(site, person, stores.target, phase)
    # What Postfix still sends to the former copy is the account's as well.
    switched = people[PHASES.index("switched")]
    straggler = letter("late@example.net", switched.address)
    with stores.source.acting_for(switched.address) as session:
        assert session.append("INBOX", "", "", straggler.data)[0] == "OK"
    for person in people:
        # Only where the access tier still remembers the former store does it take until it has forgotten.
        eventually(lambda p=person: can_write(platform, p), 90, f"{person.address} to be of use")
    done = moved(site, people, stores.target)
    assert len(done) == len(people)
    for person in people:
        after = stores.state(stores.target, person)
        written = after.folders["Drafts"].messages
        assert len(written) == 1
        touched = ("folder Drafts", "folder INBOX") if person == switched else "folder Drafts"
        assert [line for line in differences(before[person], after) if not line.startswith(touched)] == []
        assert not stores.source.exists(person.address)
    with Imap(platform, switched) as imap:
        assert len(imap.messages(straggler.id)) == 1
        assert imap.select("INBOX")[1] == [b"4"]


def test_killed_untold(site, nodes, make, stores, home):
    """A mover dies when only the directory knows of the move: the guard that it left does not stop the rerun"""
    (person,) = make(1)
    before = stores.state(stores.source, person)

    directory = Directory(site, secrets.load(site))

    def listed() -> bool:
        account = directory.get(person.address)
        return account is not None and account.store == stores.target.store.name

    # The mover waits for this node's copy of the directory to hear of it, for some seconds.
    with paused(nodes, nodes.of("access")[0], "slapd"):
        killed(site, person, stores.target, "switching", lambda: eventually(listed, 60, "the directory's change"))
    directory.close()
    assert nodes.run(home[stores.source.store.name].primary, "ps -C freeze-guard -o args=").count(person.address) == 1
    assert [one["address"] for one in moved(site, [person], stores.target)] == [person.address]
    assert differences(before, stores.state(stores.target, person)) == []
    assert not stores.source.exists(person.address)


def can_write(platform: Platform, person: Person) -> bool:
    """Whether somebody can log in and file a draft."""
    with contextlib.suppress(imaplib.IMAP4.error, OSError), Imap(platform, person) as imap:
        imap.sock.settimeout(5)
        return imap.append("Drafts", "", "", letter("me@example.net", person.address).data)[0] == "OK"
    return False


@pytest.mark.full
def test_interrupted(site, posthouse, make, stores):
    """Ctrl-C lets the account that is on its way arrive, and begins no other; the same command moves the rest"""
    people = make(3)
    first, *others = people
    before = {person: stores.state(stores.source, person) for person in people}
    addresses = [person.address for person in people]
    process = mover(site, *addresses, "--to", stores.target.store.name, "--parallel", "1")
    next(line for line in process.stderr if line.strip() == f"{first.address}: copying")
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode != 0
    assert complaint.endswith(f"; {GOES_ON}\n"), complaint
    assert not [line for line in complaint.splitlines() if line.startswith(tuple(addresses[1:]))]
    where = json.loads(posthouse("account", "show", first.address, "--site", site.name, "--json"))["store"]
    assert where == stores.target.store.name, complaint
    assert differences(before[first], stores.state(stores.target, first)) == []
    for person in others:
        assert stores.state(stores.source, person) == before[person]
    assert len(moved(site, people, stores.target)) == len(people)
    for person in people:
        assert differences(before[person], stores.state(stores.target, person)) == []
        assert not stores.source.exists(person.address)


def test_last_pass_hangs(site, platform, nodes, make, stores, home):
    """Writing waits for `--pause` and no longer; an account whose last pass takes more stays, and moves at the next"""
    (person,) = make(1)
    source, unit = home[stores.source.store.name].primary, f"cyrus-move-{stores.source.store.name}"
    # Its way to the target stands still from the moment at which it is frozen.
    stop = "until ps -C store-freeze; do sleep 0.01; done; kill -STOP $pid"
    nodes.run(source, f"systemctl start {unit}")
    try:
        with ThreadPoolExecutor() as pool:
            main = f"pid=$(systemctl show --value -p MainPID {unit})"
            stopped = pool.submit(nodes.run, source, f"{main} timeout 60 sh -c '{stop}'")
            process = mover(site, person.address, "--to", stores.target.store.name, "--pause", "2")
            stopped.result()
        eventually(lambda: can_write(platform, person), 60, f"{person.address} to be of use")
        assert process.poll() is None
    finally:
        nodes.run(source, f"systemctl kill --signal=CONT {unit}")
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, printed + said
    assert said.splitlines().count(f"{person.address}: freezing") > 1, said
    assert len(stores.state(stores.target, person).folders["Drafts"].messages) == 1


def test_replica_behind(site, platform, nodes, make, stores, home):
    """An account is the target store's only when a second node has it: the move waits for the target's replica"""
    (person,) = make(1)
    target = stores.target.store
    said: list[str] = []
    with paused(nodes, home[target.name].primary, f"'cyrus-sync-{target.name}@*'"):
        process = mover(site, person.address, "--to", target.name)
        reading = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reading.start()
        # Until the store goes on without its replica, and longer.
        eventually(lambda: not failover.states(site)[target.name].in_sync, 60, "a replica that is struck off")
        time.sleep(2)
        assert said[-1].strip() == f"{person.address}: copying"
        assert can_write(platform, person)
    assert process.wait(timeout=120) == 0, said
    reading.join()


@pytest.mark.full
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("side", ["source", "target"])
def test_node_lost(site, platform, nodes, friend, world, posthouse, make, stores, home, side, phase):
    """The {side}'s node loses power ({phase}): others serve, a rerun finishes without it, it brings nothing back"""
    # Connections that a lost node had do not outlive it.
    stores.source.close()
    stores.target.close()
    people = make(14)
    odd, *quiet = people[:10]
    busy = people[10:]
    make_odd(stores.source, odd, quiet[0])
    before = {person: stores.state(stores.source, person) for person in (odd, *quiet)}
    node = home[getattr(stores, side).store.name].primary
    ledger = Ledger()
    # The one of whom the phase is waited for goes first, with mail and a session.
    order = [busy[0], odd, *busy[1:], *quiet]
    with Stream(platform, ledger, busy, friend) as stream, Reader(platform, busy[0]) as reader:
        eventually(lambda: stream.taken > 10 and reader.filed, 120, "mail, and a reader")
        process = mover(site, *(p.address for p in order), "--to", stores.target.store.name, "--parallel", "4")
        assert any(line.strip() == f"{busy[0].address}: {phase}" for line in process.stderr)
        cut = time.monotonic()
        lab.kill(site.name, node)
        dead = time.monotonic()
        try:
            printed, complaint = process.communicate(timeout=600)
            ended = time.monotonic() - cut
            for person in busy:
                eventually(lambda p=person: can_write(platform, p), 90, f"{person.address} to be of use")
            again = moved(site, people, stores.target)
            # It is back only when all is over.
            over = time.monotonic() - cut
        finally:
            lab.start(site.name, node)
        eventually(lambda: nodes.serving(node), 120, f"{node} serving again")
        settled(site)
        posthouse("failback", "--all", "--site", site.name)
        last = stream.taken
        eventually(lambda: stream.taken > last + 10, 120, "mail afterwards")
    nodes.flush(*(person.address for person in busy), seconds=300)
    failed = printed.count("FAILED")
    print(
        f"\n{side}'s node lost while {phase}: {len(people) - failed} of {len(people)} moved nevertheless, ended after "
        f"{ended:.0f} s, the rest by a rerun of {len(again)} ({over:.0f} s); {reader.sessions - 1} reconnects, "
        f"the longest time without a draft {reader.longest:.1f} s"
    )
    # A connection from before is none any more.
    stores.source.close()
    stores.target.close()
    for person, state in before.items():
        assert differences(state, stores.state(stores.target, person)) == [], printed + complaint
    for person in people:
        assert not stores.source.exists(person.address), f"{person.address} is left on the source"
    assert_all_there(ledger, platform, nodes, busy, world, power_cut=True)
    assert not reader.refused
    with Imap(platform, reader.person) as imap:
        counts = {id: len(imap.messages(id, "Drafts")) for id in reader.filed}
    assert max(counts.values()) == 1
    # What clients store is on the replica a moment later; docs/failover.md says so.
    assert [id for id, count in counts.items() if not count and not cut - 2 < reader.filed[id] < dead] == []


def test_there_and_back(site, nodes, make, stores):
    """An account moves to another store and back, with scripts and all: the same as before, on replicas, too"""
    person, friend = make(2)
    make_odd(stores.source, person, friend)
    before = stores.state(stores.source, person)
    moved(site, [person], stores.target)
    assert differences(before, stores.state(stores.target, person)) == []
    moved(site, [person], stores.source)
    # The store had kept a former copy aside and takes it up again; that counts as changes.
    found = differences(before, stores.state(stores.source, person))
    assert [line for line in found if "modseq" not in line] == []
    assert not stores.target.exists(person.address)
    for store in (stores.source.store, stores.target.store):
        eventually(lambda s=store: len(set(_listed(nodes, s, person).values())) == 1, 60, "the same on all copies")
    assert _listed(nodes, stores.source.store, person)[stores.source.store.primary]


LISTED = r"""
cd /srv/store/{store}/spool/uuid
runuser -u cyrus -- /usr/lib/cyrus/bin/ctl_mboxlist -C /etc/cyrus/{store}/imapd.conf -d | grep -F '!user.{name}' |
    grep -v '"mbtype": "[a-z]*d"' | sed -n 's/.*"uniqueid": "\([^"]*\)".*/\1/p' | sort |
    while read -r id; do echo "$id" $(find . -path "*/$id/*" -name '[0-9]*.' | sort); done
"""


def _listed(nodes, store, person: Person) -> dict[str, str]:
    """What each copy of a store has of an account: its folders, and which messages are in each."""
    name = person.address.partition("@")[0].replace(".", "^")
    command = LISTED.format(store=store.name, name=name)
    return {node: nodes.run(node, command) for node in (store.primary, *store.replicas)}


@pytest.mark.full
def test_refused(site, nodes, posthouse, make, stores):
    """What cannot be moved is refused with the reason, and nothing changes"""
    (person,) = make(1)
    source, target = stores.source.store, stores.target.store

    def refused(*arguments: str) -> str:
        command = [run.BIN / "posthouse", "move", *arguments, "--site", site.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    assert "no account nobody@" in refused(f"nobody@{site.domain}", "--to", target.name)
    assert "no store 's99'" in refused(person.address, "--to", "s99")
    fill(stores.source, person, 2_000)
    try:
        # It may have a replica of the source, which is still getting these messages.
        eventually(lambda: failover.states(site)[source.name].lag == {source.replicas[0]: 0.0}, 60, "replicas")
        free = int(nodes.run(target.primary, "df --output=avail -B1 /srv | tail -1"))
        nodes.run(target.primary, f"head -c {free - 500_000} /dev/zero >/srv/full || true")
        assert f"no room: {target.primary} has 0 MiB free" in refused(person.address, "--to", target.name)
    finally:
        nodes.run(target.primary, "rm -f /srv/full")
    first = mover(site, person.address, "--to", target.name)
    next(line for line in first.stderr if line.strip().endswith(": copying"))
    assert "already running" in refused(person.address, "--to", target.name)
    assert first.communicate(timeout=120) and first.returncode == 0
    printed = posthouse("move", person.address, "--to", target.name, "--site", site.name)
    assert "is there already" in printed
    moved(site, [person], stores.source)
    assert source.name in posthouse("account", "show", person.address, "--site", site.name)
