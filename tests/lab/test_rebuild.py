"""The worst day: a backup is drilled first, then nothing is left of the site but its folder and that backup."""

from __future__ import annotations

import contextlib
import json
import shutil
import smtplib
import subprocess
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ARRIVES

from posthouse import lab, run, secrets
from posthouse.mailboxes import Mailboxes
from posthouse.ops import drill, mailbox_state
from posthouse.ops.backup import stands
from posthouse.ops.repository import NOTES, Repository
from posthouse.probe.clients import Person, Platform, Smtp, closed_quietly, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, check
from posthouse.remote import Remote

pytestmark = pytest.mark.full
SENDER = "stranger@example.net"
BEFORE, AFTER = 60, 20  # messages before the backup, and after it
LONGEST = 1200  # s; ten times what it takes on a quiet machine


@dataclass
class Saved:
    """What a backup has, and what came after it."""

    file: Path  # of a ledger of both
    backup: str
    before: set[tuple[str, str]]
    after: set[tuple[str, str]]
    contents: Path  # of all mailboxes at the backup, as a drill reads them
    state: mailbox_state.MailboxState  # of one of them, with all that Cyrus says about it
    waiting: str  # to whom a message waited in a queue

    def held(self) -> dict[str, Any]:
        return dict(json.loads(self.contents.read_text()))


def posthouse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [run.BIN / "posthouse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)


@pytest.fixture(scope="module")
def saved(
    site: Any, platform: Platform, people: Any, nodes: Any, friend: str, tmp_path_factory: Any
) -> Iterator[Saved]:
    """Mail comes in, the site is backed up, and more mail comes in."""
    place = Path(Repository(site, secrets.load(site)).place)
    shutil.rmtree(place, ignore_errors=True)
    (NOTES / site.name).unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("rebuild")
    everybody = [people.alice, people.bob, people.carol]
    ledger = Ledger(folder / "mail.ledger")

    def receive(count: int) -> set[tuple[str, str]]:
        known = set(ledger.acknowledged)
        with Stream(platform, ledger, everybody, friend, rate=12, senders=6, count=count) as stream:
            eventually(lambda: not stream.running, 120, f"{count} messages")
        nodes.flush(*(person.address for person in everybody))
        eventually(lambda: not _unsaid(site, nodes), 60, "replicas that have everything")
        return set(ledger.acknowledged) - known

    before = receive(BEFORE)
    outbound, waiting = nodes.of("outbound")[0], f"waiting.{uuid.uuid4().hex[:6]}@example.net"
    nodes.run(outbound, "systemctl stop postfix-outbound")
    sendmail = f"sendmail -C /etc/postfix-outbound -f {people.alice.address} {waiting}"
    nodes.run(outbound, f"printf 'Subject: waiting\\n\\nstill\\n' | {sendmail}")
    drill.read(site, folder / "contents.json", bytes_too=True)
    state = mailbox_state.read(_store(site, people.carol), people.carol.address)
    done = posthouse("backup", site.name, "--json")
    # It does not leave before all is gone.
    nodes.run(outbound, "rm /srv/postfix/outbound/maildrop/* && systemctl start postfix-outbound")
    assert done.returncode == 0, done.stderr
    yield Saved(
        folder / "mail.ledger",
        json.loads(done.stdout)["backup"],
        before,
        receive(AFTER),
        folder / "contents.json",
        state,
        waiting,
    )
    shutil.rmtree(place)
    (NOTES / site.name).unlink()
    shutil.rmtree(drill.REPORTS / site.name, ignore_errors=True)


def _store(site: Any, person: Person) -> Mailboxes:
    return Mailboxes(site.stores[person.store], secrets.load(site))


def _unsaid(site: Any, nodes: Any) -> str:
    """Files in which primaries note what replicas have to be told; those of former primaries nobody reads any more."""
    serving = stands(Remote(site), site)
    look = "find /srv/store/{}/config/sync -name 'log*' -size +0"
    return "".join(nodes.run(node, look.format(store)) for store, node in serving.items())


def test_drill(site, saved):
    """A drill restores the last backup in a lab of its own, finds each message as it is, and publishes RTO and RPO"""
    done = posthouse("drill", site.name, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    held = _count(saved.held()["mail"])
    assert report["backup"] == saved.backup
    assert (report["restored"], report["equal"]) == (held, held)
    assert (report["gone"], report["damaged"], report["newer"]) == (0, 0, len(saved.after))
    assert report["rto_seconds"] > 0
    assert report["rpo_seconds"] > 0
    print(f"RTO {report['rto_seconds']} s, RPO {report['rpo_seconds']} s; {held} messages, all equal")
    published = sorted((drill.REPORTS / site.name).glob("*.md"))[-1].read_text()
    assert f"{report['rto_seconds']} s from no machine at all" in published
    assert not [node for node in lab.status(drill.name(site)) if node["state"] == "running"]


def _count(mail: drill.Mail) -> int:
    return sum(
        count
        for accounts in mail.values()
        for folders in accounts.values()
        for folder in folders.values()
        for count in folder.values()
    )


def test_old_drill(site, saved):
    """Who asks is told of a drill that is too old"""
    assert posthouse("drill", site.name, "--status").returncode == 0
    path = sorted((drill.REPORTS / site.name).glob("*.json"))[-1]
    text = path.read_text()
    report = json.loads(text)
    path.write_text(json.dumps(report | {"time": report["time"].replace("20", "19", 1)}))
    try:
        done = posthouse("drill", site.name, "--status")
    finally:
        path.write_text(text)
    assert done.returncode == 1
    assert "days old" in done.stdout


class Knocks:
    """A stranger who tries to hand over a message, again and again: what each time was answered, 0 for nothing."""

    def __init__(self, platform: Platform, person: Person, source: str, ledger: Ledger) -> None:
        self.platform, self.person, self.source, self.ledger = platform, person, source, ledger
        self.answers: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self.answers.append(self._knock())

    def _knock(self) -> int:
        message = letter(SENDER, self.person.address)
        with contextlib.suppress(OSError, smtplib.SMTPException):
            client = Smtp(self.platform, source=self.source)
            code = client.transaction(SENDER, self.person.address, message.data).code
            if code == 250:
                self.ledger.note(message, self.person.address)
            closed_quietly(client)
            return code
        return 0

    def __enter__(self) -> Knocks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90)


def killed(site: Any, step: str) -> None:
    """`posthouse rebuild --site` until it says of a step that it is done."""
    command = [run.BIN / "posthouse", "rebuild", "--site", site.name]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(f"{site.name}: {step}"):
            break
    else:
        raise AssertionError("".join(lines))
    process.kill()
    process.communicate()


def test_site(site, platform, nodes, people, world, saved):
    """Nothing is left but the site's folder and its backup: all of its mail is back, nobody was told 550 meanwhile"""
    done = posthouse("rebuild", "--site", site.name)
    assert done.returncode == 1
    assert "is alive" in done.stderr
    for node in site.nodes:
        lab.kill(site.name, node)
        lab.wipe(site.name, node)
    new = Ledger()
    with Knocks(platform, people.alice, platform.outside(41), new) as knocks:
        killed(site, "converge all nodes")
        done = posthouse("backup", site.name)
        assert done.returncode == 1
        assert "is being filled from the backup" in done.stderr
        killed(site, "bring back the mail")
        done = posthouse("rebuild", "--site", site.name, "--json")
        assert done.returncode == 0, done.stderr
        eventually(lambda: 250 in knocks.answers, 60, "mail is taken")
    report = json.loads(done.stdout)
    print(*(f"{step['seconds']:6.1f} s  {step['say']}: {step['note']}" for step in report["steps"]), sep="\n")
    assert report["backup"] == saved.backup
    # Before the first 250 nobody may be told that an address does not exist.
    assert {code // 100 for code in knocks.answers} <= {0, 2, 4}, knocks.answers
    _as_it_was(site, nodes, people, world, saved)
    nodes.flush(people.alice.address)
    assert check(new, site, run=nodes.run).ok


def _as_it_was(site: Any, nodes: Any, people: Any, world: Any, saved: Saved) -> None:
    # Each message that the ledger misses came after the backup, and none of those is there.
    printed = posthouse("ledger", "check", str(saved.file), "--site", site.name, "--json")
    assert printed.returncode == 1, printed.stderr
    report = json.loads(printed.stdout)
    lost = {(identifier, recipient) for identifier, recipient, _ in report["lost"]}
    assert lost == saved.after
    assert (report["duplicated"], report["damaged"], report["unsearched"]) == ([], [], [])
    assert report["acknowledged"] == len(saved.before) + len(saved.after)
    # Every message of every account, in its folder, its bytes read.
    now = saved.contents.with_name("now.json")
    drill.read(site, now, bytes_too=True)
    back = json.loads(now.read_text())
    counts = drill.compare(saved.held()["mail"], back["mail"])
    assert (counts["newer"], back["damaged"]) == (0, 0), "in the backup, and not there"
    assert counts["equal"] == _count(saved.held()["mail"])
    # With UIDs, flags, rights and scripts.
    now_state = mailbox_state.read(_store(site, people.carol), people.carol.address)
    assert mailbox_state.differences(saved.state, now_state) == []
    # The replicas as well.
    eventually(lambda: not _unsaid(site, nodes), 60, "replicas that have everything")
    for store in site.stores.values():
        copies = {
            node: nodes.run(node, f"cd /srv/store/{store.name}/spool && find uuid -name '[0-9]*.' | sort | sha256sum")
            for node in (store.primary, *store.replicas)
        }
        assert len(set(copies.values())) == 1, copies
    eventually(lambda: world.to(saved.waiting), ARRIVES, "the message that waited in a queue")
