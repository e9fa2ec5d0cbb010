"""No loss, proved: what was acknowledged with 250 is found exactly once afterwards, unchanged, wherever it is.

ledger = Ledger(Path("run.ledger"))                 # without a file it is kept in memory
with Stream(platform, ledger, people, source):      # notes each 250 before it sends the next message
    …
report = check(ledger, site)                        # or check(Path("run.ledger"), site)
assert report.ok, report.complaints()
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from posthouse import PosthouseError, secrets
from posthouse.model import Site
from posthouse.probe import search
from posthouse.probe.clients import Letter, Person, Platform, Smtp, World, closed_quietly, fingerprint, letter
from posthouse.probe.kinds import Clients
from posthouse.probe.search import Copy
from posthouse.remote import Remote

SENDER = "stream@example.net"
LATE = 60.0  # s


class LedgerError(PosthouseError):
    """The ledger's file cannot be used; the message says where, what, and what to do."""


class Entry(NamedTuple):
    """What was acknowledged: the message's fingerprint, and when, in Unix seconds."""

    sha256: str
    at: float


class Ledger:
    """What the platform has taken responsibility for: {(Message-ID, recipient): Entry}.

    With a file, every entry is on disk when `note` returns. A file that is there already is read, and added to.
    Raises LedgerError.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.acknowledged: dict[tuple[str, str], Entry] = {}
        self.bounces: list[Copy] = []
        self._lock = threading.Lock()
        self._file: int | None = None
        if path is None:
            return
        try:
            if path.exists():
                os.truncate(path, self._read(path))
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}; name a file that you may write") from None

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """A ledger that was written before. Raises LedgerError."""
        found = cls()
        try:
            found._read(path)
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}; `posthouse probe --record FILE` makes one") from None
        return found

    def note(self, message: Letter, recipient: str) -> None:
        """The message was acknowledged for this recipient. Call it before anything else is sent."""
        entry = Entry(fingerprint(message.data), time.time())
        self._write({"id": message.id, "to": recipient, "sha256": entry.sha256, "at": round(entry.at, 3)})
        self.acknowledged[message.id, recipient] = entry

    def note_bounces(self, data: bytes) -> None:
        """A message that reached its sender, in case it says that something could not be delivered."""
        for copy in search.bounces(data, "sent to its sender"):
            self._write({"bounced": copy.id, "to": copy.recipient})
            self.bounces.append(copy)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            if self._file is not None:
                os.write(self._file, json.dumps(line).encode() + b"\n")
                os.fsync(self._file)

    def _read(self, path: Path) -> int:
        """Takes in a file; returns how many of its bytes are whole lines."""
        data = path.read_bytes()
        # What follows the last newline is torn: whoever wrote it died before it went on.
        whole, newline, torn = data.rpartition(b"\n")
        if torn and not newline and not torn.startswith(b'{"'):
            raise LedgerError(f"{path}: is not a ledger; give the file that a probe wrote, or a new one")
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                if "bounced" in line:
                    self.bounces.append(Copy(line["bounced"], line["to"], None, "a bounce", "bounce"))
                else:
                    self.acknowledged[line["id"], line["to"]] = Entry(line["sha256"], float(line["at"]))
            except (ValueError, KeyError, TypeError):
                reason = "not a line of a ledger; give the file that a probe wrote"
                raise LedgerError(f"{path}:{number}: {reason}") from None
        return len(whole + newline)


class Finding(NamedTuple):
    """Something that is wrong with a message."""

    id: str
    recipient: str
    what: str

    def __str__(self) -> str:
        return f"{self.id} to {self.recipient}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What became of everything that was acknowledged. `found` counts messages by where they are."""

    acknowledged: int
    found: dict[str, int]
    lost: list[Finding]
    duplicated: list[Finding]
    damaged: list[Finding]
    late: list[Finding]
    unsearched: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Everything is there, once, as it was sent. Being late is no fault in this; not to have looked is."""
        return not (self.lost or self.duplicated or self.damaged or self.unsearched)

    def complaints(self) -> list[str]:
        """One line for everything that is not as it should be."""
        faults = [*self.lost, *self.duplicated, *self.damaged]
        return [*(str(finding) for finding in faults), *(f"not searched: {place}" for place in self.unsearched)]


def compare(
    acknowledged: dict[tuple[str, str], Entry],
    found: Iterable[Copy],
    unsearched: Sequence[str] = (),
    late: float = LATE,
    now: float | None = None,
) -> Report:
    """The report on what was acknowledged, given all copies that were found. `late`: from 250 to mailbox, in s."""
    copies: dict[tuple[str, str], list[Copy]] = defaultdict(list)
    for copy in found:
        same = copies[copy.id, copy.recipient]
        # One failure may be reported more than once; that makes it no second message.
        if copy.kind != "bounce" or all(other.kind != "bounce" for other in same):
            same.append(copy)
    now = time.time() if now is None else now
    counts: Counter[str] = Counter()
    lost, duplicated, damaged, lately = [], [], [], []
    for key, sent in acknowledged.items():
        here = copies[key]
        counts.update({copy.kind for copy in here})
        if not here:
            lost.append(Finding(*key, "lost"))
        if len(here) > 1:
            duplicated.append(Finding(*key, f"found {len(here)} times: {', '.join(copy.place for copy in here)}"))
        for copy in here:
            if copy.digest not in (None, sent.sha256):
                damaged.append(Finding(*key, f"changed, in {copy.place}"))
            arrived = now if copy.kind == "queue" else copy.at
            if arrived is not None and arrived - sent.at > late:
                lately.append(Finding(*key, f"{arrived - sent.at:.0f} s until {copy.place}"))
    return Report(len(acknowledged), dict(counts), lost, duplicated, damaged, lately, list(unsearched))


def check(
    record: Path | Ledger,
    site: Site,
    late: float = LATE,
    bounces: Iterable[bytes] = (),
    run: search.Run | None = None,
) -> Report:
    """Looks for everything that was acknowledged: in mailboxes, queues, held mail and bounces.

    bounces: messages that came to the senders, beside those that the ledger has noted. run: how to reach the nodes, by
    default over ssh. Messages may be on their way meanwhile. Raises LedgerError, DirectoryError.
    """
    started = time.monotonic()
    ledger = record if isinstance(record, Ledger) else Ledger.read(record)
    wanted = search.Wanted(ledger.acknowledged)
    unsearched: list[str] = []
    reach = run or Remote(site).run
    # First where messages leave, then where they arrive; what is in both may just have passed from one to the other.
    queued = list(search.queues(site, reach, wanted, unsearched))
    copies = list(search.mailboxes(site, secrets.load(site), wanted, unsearched))
    arrived = {(copy.id, copy.recipient) for copy in copies}
    passed = [copy for copy in queued if copy.kind != "bounce" and (copy.id, copy.recipient) in arrived]
    there = search.still_queued(reach, passed, unsearched)
    copies += [copy for copy in queued if copy not in passed or copy.place in there]
    copies += ledger.bounces
    copies += [copy for data in bounces for copy in search.bounces(data, "sent to its sender")]
    report = compare(ledger.acknowledged, copies, unsearched, late)
    return Report(**{**report.__dict__, "seconds": round(time.monotonic() - started, 1)})


def assert_all_there(
    ledger: Ledger, platform: Platform, nodes: Any, people: list[Person], world: World, power_cut: bool = False
) -> None:
    """Everything acknowledged is there, once, when nothing for these people waits in queues any more.

    A store may have a message whose sender was told to try again (it was not on the replica in time); duplicate
    suppression makes one of it, once it has been tried again.

    power_cut: a delivery that was under way then, and whose sender heard no answer, may be there twice. No protocol of
    mail can tell whether the answer or the message was lost; duplicate suppression is a store's own, and can lose its
    last note in the same cut.
    """
    nodes.flush(*(person.address for person in people))
    report = check(ledger, platform.site, bounces=[arrival.data for arrival in world.arrivals], run=nodes.run)
    if power_cut:
        print(f"{len(report.duplicated)} of {report.acknowledged} came twice")
        report = replace(report, duplicated=[])
    assert report.ok, "\n".join(report.complaints())


class Stream(Clients):
    """Senders of the outside world, each sending message after message. What was answered with 250 is in the ledger."""

    def __init__(
        self,
        platform: Platform,
        ledger: Ledger,
        people: Sequence[Person],
        source: str | Sequence[str] | None = None,
        senders: int = 3,  # 0: as many as the rate needs
        rate: float = 6,
        count: int | None = None,
    ) -> None:
        super().__init__(people, rate, count, senders)
        self.platform, self.ledger = platform, ledger
        # None: this machine's own address.
        given = [source] if isinstance(source, str) else source
        self.sources: Sequence[str | None] = given or [None]

    def attempt(self, person: Person, number: int) -> None:
        message = letter(SENDER, person.address, f"Number {number}.")
        client = Smtp(self.platform, source=self.sources[number % len(self.sources)])
        self.hand_over(client, SENDER, person.address, message)

    def hand_over(self, client: Smtp, sender: str, recipient: str, message: Letter) -> None:
        """Sends one message, notes its 250, and takes leave; any other answer is an error."""
        try:
            reply = client.transaction(sender, recipient, message.data)
            if reply.code != 250:
                raise ConnectionError(f"{reply.code} {reply.text}")
            self.ledger.note(message, recipient)
            closed_quietly(client)
        finally:
            client.close()


class Submissions(Stream):
    """People who write to each other, logged in, by port 465. What was answered with 250 is in the ledger, too."""

    def attempt(self, person: Person, number: int) -> None:
        recipient = self.people[(number + 1) % len(self.people)].address
        message = letter(person.address, recipient, f"Number {number}.")
        client = Smtp(self.platform, 465, self.sources[number % len(self.sources)], person)
        self.hand_over(client, person.address, recipient, message)
