"""The ledger's comparison and its file, and what it takes for one message."""

from __future__ import annotations

import json
import threading

import pytest

from posthouse.mailboxes import folder_names, quoted
from posthouse.probe.clients import Person, eventually, fingerprint, letter
from posthouse.probe.kinds import Clients
from posthouse.probe.ledger import Entry, Ledger, LedgerError, compare
from posthouse.probe.search import Copy, bounces

KEY = ("<1@example.net>", "a@lab.test")
SENT = {KEY: Entry("good", 1000.0)}


def copy(kind: str = "mailbox", digest: str | None = "good", at: float | None = 1001.0, place: str = "here") -> Copy:
    return Copy(*KEY, digest, place, kind, at)


# What is found → what the report says of the one message: (kinds, lost, duplicated, damaged, late).
CASES = {
    "delivered": ([copy()], ({"mailbox": 1}, 0, 0, 0, 0)),
    "nowhere": ([], ({}, 1, 0, 0, 0)),
    "another's": ([Copy("<1@example.net>", "b@lab.test", "good", "there")], ({}, 1, 0, 0, 0)),
    "waiting": ([copy("queue", at=1000.0)], ({"queue": 1}, 0, 0, 0, 0)),
    "waiting for long": ([copy("queue", at=900.0)], ({"queue": 1}, 0, 0, 0, 1), 1100.0),
    "held": ([copy("quarantine")], ({"quarantine": 1}, 0, 0, 0, 0)),
    "bounced": ([copy("bounce", None, None)], ({"bounce": 1}, 0, 0, 0, 0)),
    "bounce seen twice": ([copy("bounce", None, None), copy("bounce", None, None)], ({"bounce": 1}, 0, 0, 0, 0)),
    "delivered and bounced": ([copy(), copy("bounce", None, None)], ({"mailbox": 1, "bounce": 1}, 0, 1, 0, 0)),
    "twice": ([copy(), copy(place="there")], ({"mailbox": 1}, 0, 1, 0, 0)),
    "changed": ([copy(digest="bad")], ({"mailbox": 1}, 0, 0, 1, 0)),
    "twice, one changed": ([copy(), copy(digest="bad")], ({"mailbox": 1}, 0, 1, 1, 0)),
    "late": ([copy(at=1061.0)], ({"mailbox": 1}, 0, 0, 0, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compare(case):
    found, wanted, *now = case
    report = compare(SENT, found, late=60, now=now[0] if now else 1002.0)
    counts = (report.found, *(len(part) for part in (report.lost, report.duplicated, report.damaged, report.late)))
    assert counts == wanted
    assert report.ok == (not any(wanted[1:4]))


def test_not_searched():
    """A place that could not be looked at is no proof of anything."""
    report = compare(SENT, [copy()], ["mail1: no answer"], now=1002.0)
    assert not report.ok
    assert report.complaints() == ["not searched: mail1: no answer"]


def test_file(tmp_path):
    """What is noted is read back, also after the last line was torn; the torn line goes when the file is added to."""
    path = tmp_path / "ledger"
    first, second = letter("x@example.net", "a@lab.test"), letter("x@example.net", "b@lab.test")
    ledger = Ledger(path)
    ledger.note(first, "a@lab.test")
    ledger.close()
    with path.open("a") as file:
        file.write('{"id": "<torn')
    assert Ledger.read(path).acknowledged.keys() == {(first.id, "a@lab.test")}
    assert path.read_text().endswith("<torn")
    again = Ledger(path)
    again.note(second, "b@lab.test")
    again.close()
    found = Ledger.read(path).acknowledged
    assert found.keys() == {(first.id, "a@lab.test"), (second.id, "b@lab.test")}
    assert found[first.id, "a@lab.test"].sha256 == fingerprint(first.data)


@pytest.mark.parametrize(
    "text", ["nonsense\n", '{"id": "<1@x>"}\n', '["a"]\n', '{"id": "a", "to": "b", "sha256": "c", "at": "d"}\n']
)
def test_bad_file(tmp_path, text):
    path = tmp_path / "ledger"
    path.write_text(json.dumps({"id": "<1@x>", "to": "a@b", "sha256": "00", "at": 1.0}) + "\n" + text)
    for use in (Ledger.read, Ledger):
        with pytest.raises(LedgerError, match=r"ledger:2: not a line of a ledger"):
            use(path)


def test_no_file(tmp_path):
    with pytest.raises(LedgerError, match="No such file"):
        Ledger.read(tmp_path / "none")
    with pytest.raises(LedgerError, match="name a file that you may write"):
        Ledger(tmp_path / "no folder" / "ledger")


WRITTEN = b"From: a\r\nX-Own: 1\r\n\t2\r\n\r\nbody\r\n"


@pytest.mark.parametrize(
    ("got", "same"),
    [
        (WRITTEN, True),
        (b"Return-Path: <a>\r\nReceived: from x\r\n\tby y\r\nDKIM-Signature: v=1\r\nReceived: z\r\n" + WRITTEN, True),
        (WRITTEN.replace(b"From: a", b"From: a\r\nX-Spam-Score: 1.0"), True),
        (WRITTEN.replace(b"body", b"bodY"), False),
        (WRITTEN.replace(b"\t2", b" 2"), False),
        (WRITTEN.replace(b"From: a\r\n", b""), False),
        (WRITTEN + b"\r\n", False),
        (b"X-Other: 1\r\n" + WRITTEN, False),
    ],
)
def test_fingerprint(got, same):
    assert (fingerprint(got) == fingerprint(WRITTEN)) == same


def test_folder_names():
    """Names as IMAP writes them: bare, quoted, escaped, as a literal; and those that hold nothing are left out."""
    lines = [
        b'(\\HasNoChildren) "/" INBOX',
        b'(\\HasNoChildren) "/" "Two words"',
        b'(\\HasNoChildren) "/" "a \\"quoted\\" \\\\ one"',
        (b'(\\HasNoChildren) "/" {9}', b"literal/x"),
        b"",
        b'(\\Noselect \\HasChildren) "/" "Shared Folders"',
        b'(\\NonExistent) "/" gone',
        b"(\\HasNoChildren) NIL flat",
    ]
    assert folder_names(lines) == ["INBOX", "Two words", 'a "quoted" \\ one', "literal/x", "flat"]
    assert quoted('a "b" \\') == '"a \\"b\\" \\\\"'


REPORT = (
    b'Content-Type: multipart/report; report-type=delivery-status; boundary="b"\r\nMessage-ID: <bounce@x>\r\n\r\n'
    b"--b\r\nContent-Type: text/plain\r\n\r\nSorry.\r\n"
    b"--b\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; x\r\n\r\n"
    b"Original-Recipient: rfc822; alias@lab.test\r\nFinal-Recipient: rfc822; a@lab.test\r\nAction: ACTION\r\n\r\n"
    b"--b\r\nContent-Type: text/rfc822-headers\r\n\r\nMessage-ID: <1@example.net>\r\n\r\n--b--\r\n"
)


def test_bounces():
    """A failure is told of under both names of its recipient; a delay is none, nor is any other mail."""
    failed = REPORT.replace(b"ACTION", b"failed")
    for report in (failed, failed.replace(b"text/rfc822-headers", b"message/rfc822")):
        found = [(one.id, one.recipient, one.kind) for one in bounces(report, "x")]
        assert found == [(KEY[0], address, "bounce") for address in ("alias@lab.test", "a@lab.test")]
    assert not list(bounces(REPORT.replace(b"ACTION", b"delayed"), "x"))
    assert not list(bounces(WRITTEN, "x"))


class Tries(Clients):
    """Every third attempt fails."""

    def attempt(self, person: Person, number: int) -> None:
        if number % 3 == 0:
            raise ConnectionError("no answer")


def test_statistics():
    """As many attempts as asked for, spread over people in turn; failures counted by reason, silences by store."""
    people = [Person("a@lab.test", "", "s01"), Person("b@lab.test", "", "s02")]
    with Tries(people, rate=1000, count=12) as tries:
        eventually(lambda: not tries.running, 10, "all attempts")
    found = tries.statistics()
    assert (found.attempts, found.failed, tries.taken) == (12, 4, 8)
    assert found.failures == {"ConnectionError: no answer": 4}
    assert tries.statistics("s01").attempts == tries.statistics("s02").attempts == 6
    assert found.p50 is not None
    assert found.longest_silence > 0


class Stuck(Clients):
    """The first attempt is under way until it is let go; the others succeed at once."""

    def __init__(self, people: list[Person]) -> None:
        super().__init__(people, rate=1000, count=2, threads=2)
        self.let_go = threading.Event()

    def attempt(self, person: Person, number: int) -> None:
        if number == 1:
            self.let_go.wait()


def test_what_is_still_under_way_at_the_end_is_no_silence():
    """How long the last attempt takes after the end says nothing of the time before."""
    clients = Stuck([Person("a@lab.test", "", "s01")])
    clients.start()
    eventually(lambda: clients.taken == 1, 10, "the second attempt")
    clients.end()
    before = clients.longest_silence()
    clients.let_go.set()
    clients.stop()
    assert clients.taken == 2
    assert clients.longest_silence() == before
