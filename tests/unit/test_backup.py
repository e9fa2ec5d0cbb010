"""What backups are kept and chosen, what a restore does to a mailbox, and what a drill's report says."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posthouse import inventory, run
from posthouse.directory import Account, AddressTaken
from posthouse.model import Keep, Site
from posthouse.ops import drill, entries, past, repository, restore
from posthouse.ops.backup import Backup, Part, Standing, choose, examine, kept, prune
from posthouse.ops.backup import backup as make_backup
from posthouse.ops.backup import plan as backup_plan
from posthouse.ops.imap import Folder, Message, Session, batches, literal, numbers, pairs, parsed
from posthouse.ops.merge import Wanted, plan, wire
from posthouse.ops.repository import BackupError, Repository, Shut
from posthouse.secrets import Secrets
from posthouse.sitefile import parse


def made(*names: str, complete: bool = True) -> list[Backup]:
    return [Backup(name, {"manifest": "x"} if complete else {"directory": "x"}) for name in names]


DAYS = [f"202611{day:02d}T020000Z" for day in range(1, 27)]


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(daily=3, weekly=0, monthly=0), ["20261124T020000Z", "20261125T020000Z", "20261126T020000Z"]),
        # Weeks end on Sundays: the 22nd and the 15th; the week that runs has its newest.
        (Keep(daily=1, weekly=3, monthly=0), ["20261115T020000Z", "20261122T020000Z", "20261126T020000Z"]),
        (Keep(daily=1, weekly=0, monthly=5), ["20261126T020000Z"]),
    ],
)
def test_what_is_kept(keep: Keep, stay: list[str]) -> None:
    assert sorted(kept(made(*DAYS), keep)) == stay


def test_the_last_of_a_day_is_kept_and_what_never_ended_is_not() -> None:
    found = made("20261125T020000Z", "20261126T020000Z", "20261126T140000Z")
    broken = made("20261126T030000Z", complete=False)
    keep = Keep(daily=7, weekly=0, monthly=0)
    assert kept(sorted(found + broken, key=lambda b: b.name), keep) == {"20261125T020000Z", "20261126T140000Z"}


def test_one_that_is_in_the_making_is_kept() -> None:
    found = [*made("20261125T020000Z"), *made("20261126T020000Z", complete=False)]
    assert kept(found, Keep(daily=1, weekly=0, monthly=0)) == {"20261125T020000Z", "20261126T020000Z"}


@pytest.mark.parametrize(
    ("at", "first"),
    [
        (None, "20261126T020000Z"),
        ("20261103T020000Z", "20261103T020000Z"),
        ("2026-11-10", "20261110T020000Z"),
        ("2026-11-10T01:00", "20261109T020000Z"),
        ("2026-11-10T02:00:00Z", "20261110T020000Z"),
        ("2026-11-10T03:30+02:00", "20261109T020000Z"),
        ("2026-11-10T00:30-02:00", "20261110T020000Z"),
    ],
)
def test_which_backup_is_looked_into_first(site: Site, at: str | None, first: str) -> None:
    assert choose(site, made(*DAYS), at)[0].name == first


@pytest.mark.parametrize(
    ("at", "complaint"),
    [
        ("2026-10-01", "the oldest is 20261101T020000Z"),
        ("last week", "neither a backup nor a time"),
        ("9999-12-31", "neither a backup nor a time"),
        # Not the one of the day before.
        ("20261110T020001Z", "no complete backup has that name"),
        ("20261110T02000Z", "no complete backup has that name"),
        ("20261110", "no complete backup has that name"),
    ],
)
def test_times_of_no_backup(site: Site, at: str, complaint: str) -> None:
    with pytest.raises(BackupError, match=complaint):
        choose(site, made(*DAYS), at)


def test_a_backup_that_never_ended_is_none(site: Site) -> None:
    with pytest.raises(BackupError, match="no complete backup yet"):
        choose(site, made("20261126T020000Z", complete=False), None)


def test_one_that_never_ended_is_not_replaced_by_an_older_one(site: Site) -> None:
    found = [*made("20261125T020000Z"), *made("20261126T020000Z", complete=False)]
    with pytest.raises(BackupError, match="no complete backup has that name"):
        choose(site, found, "20261126T020000Z")


def parts(site: Site, **told: object) -> dict[str, Part]:
    """The plan of a backup, by parts' names, if all is well but what is told."""
    have = {"up": frozenset(site.nodes), "primaries": {name: store.primary for name, store in site.stores.items()}}
    return {part.name: part for part in backup_plan(site, Standing(**have | told))}  # type: ignore[arg-type]


def test_stores_come_off_replicas_that_have_everything(site: Site) -> None:
    store = site.stores["s01"]
    (replica,) = store.replicas
    assert parts(site)["store:s01"] == Part("store:s01", replica)
    for told in ({"behind": frozenset({("s01", replica)})}, {"up": frozenset(site.nodes) - {replica}}):
        part = parts(site, **told)["store:s01"]
        assert part.node == store.primary
        assert "off its primary" in part.note
    # After a failover it is the other way round.
    assert parts(site, primaries=dict.fromkeys(site.stores, replica))["store:s01"].node == store.primary


def test_queues_of_a_dead_node_are_left_out_and_named(site: Site) -> None:
    found = parts(site, up=frozenset(site.nodes) - {"mail2"})
    assert {name for name, part in found.items() if part.left_out} == {"queues:mail2"}
    assert "does not answer" in found["queues:mail2"].note


def test_no_backup_without_the_directory(site: Site) -> None:
    with pytest.raises(BackupError, match="no provider of the directory can be reached"):
        parts(site, up=frozenset(site.nodes) - set(site.directory.providers))


def message(digest: str, uid: int = 1) -> Message:
    return Message(uid, digest, ("\\Seen",), "17-Jul-2020 02:44:25 +0000", 10)


def folder(name: str, *digests: str, use: str = "", **more: object) -> Folder:
    return Folder(name, use, messages=[message(d, n) for n, d in enumerate(digests, 1)], **more)  # type: ignore[arg-type]


def came(have: list[Folder], want: list[Folder], into: str | None = None) -> dict[str, list[str]]:
    steps = plan({f.name: f for f in have}, {f.name: f for f in want}, into)
    return {step.folder: [m.digest for m in step.messages] for step in steps}


@pytest.mark.parametrize(
    ("have", "want", "into", "expected"),
    [
        ([folder("INBOX", "a", "b")], [folder("INBOX", "a", "b")], None, {}),
        ([folder("INBOX", "b")], [folder("INBOX", "a", "b")], None, {"INBOX": ["a"]}),
        # Twice in the past is twice now.
        ([folder("INBOX", "a")], [folder("INBOX", "a", "a")], None, {"INBOX": ["a"]}),
        # Moved since: not there a second time.
        ([folder("INBOX"), folder("Work", "a")], [folder("INBOX", "a"), folder("Work")], None, {}),
        ([folder("INBOX"), folder("Work", "a")], [folder("INBOX", "a")], None, {}),
        # A copy that was there then is not the one that is missing.
        ([folder("INBOX"), folder("Work", "a")], [folder("INBOX", "a"), folder("Work", "a")], None, {"INBOX": ["a"]}),
        # Who deletes by moving to the trash wants it back.
        ([folder("INBOX"), folder("Trash", "a", use="\\trash")], [folder("INBOX", "a")], None, {"INBOX": ["a"]}),
        ([folder("INBOX", "a")], [folder("INBOX", "a")], "Back", {"Back": ["a"]}),
        ([folder("INBOX", "a"), folder("Back", "a")], [folder("INBOX", "a")], "Back", {}),
        ([folder("INBOX")], [folder("INBOX", "a"), folder("W", "b")], "Back", {"Back": ["a"], "Back/W": ["b"]}),
        ([folder("INBOX")], [folder("INBOX"), folder("Empty")], None, {"Empty": []}),
    ],
)
def test_what_comes_back(
    have: list[Folder], want: list[Folder], into: str | None, expected: dict[str, list[str]]
) -> None:
    assert came(have, want, into) == expected


def test_rights_and_annotations_are_added_and_never_overwritten() -> None:
    past = folder("W", acl={"me": "lr", "you": "lrs"}, annotations={"/private/comment": b"a"}, subscribed=True)
    now = folder("W", acl={"me": "lrswi"}, annotations={"/private/comment": b"b"})
    (step,) = plan({"W": now}, {"W": past})
    assert (step.acl, step.annotations, step.subscribe, step.create) == ({"you": "lrs"}, {}, True, None)
    (step,) = plan({}, {"W": past})
    assert (step.acl, step.annotations, step.create) == (past.acl, past.annotations, "")


def test_responses_are_parsed_with_literals_and_quotes() -> None:
    data = [(b'1 (UID 7 FLAGS (\\Seen) X "a \\"b\\"" BODY[] {5}', b"(\r\n)x"), b" SIZE 5)"]
    number, values = parsed(data)
    assert number == b"1"
    wanted = {"UID": b"7", "FLAGS": [b"\\Seen"], "X": b'a "b"', "BODY[]": b"(\r\n)x", "SIZE": b"5"}
    assert pairs(values) == wanted


class Recorded(Session):
    """A session that answers a command with what a test says, and keeps what it was asked."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def _enter(self, folder: str, readonly: bool = True) -> None:
        pass

    def ask(self, name: str, command: str, *arguments: str | bytes) -> list[Any]:
        self.asked.append((command, *arguments))
        return self.answers[name]


def test_a_message_id_is_that_of_one_message_and_not_part_of_anothers() -> None:
    said = []
    for uid, identifier in enumerate(('"<11@example.net>"', '"<1@example.net>"', "NIL", '"\\t<1@example.net> (a)"')):
        sender = '((NIL NIL "a" "b"))'
        envelope = f'(NIL "1" {sender} {sender} {sender} {sender} NIL NIL NIL {identifier})'
        said.append(f"{uid} (UID {uid} ENVELOPE {envelope})".replace("\\t", "\t").encode())
    for written in ("<1@example.net>", "1@example.net"):
        session = Recorded(SEARCH=[b"0", b"1", b"2", b"3"], FETCH=parsed(said))
        assert session.having("INBOX", written) == [1, 3]
        assert session.asked[0][-1] == '"1@example.net"'
        assert session.asked[1][2] == b"0,1,2,3"


@pytest.mark.parametrize("value", ["Büro".encode(), b'say "hi" \\', b"\xff\x00"])
def test_annotations_hold_any_bytes(value: bytes) -> None:
    assert literal("(/private/comment", value, ")") == b"(/private/comment {%d+}\r\n" % len(value) + value + b")"
    session: Any = Recorded(OK=[], FETCH=[])
    noted = Message(1, "", (), "", 1, (("/comment", "value.priv", value),))
    session._annotate("INBOX", [(noted, b"")], b"[APPENDUID 1 4] OK")
    assert session.asked[-1][-1].endswith(value + b"))")


def test_batches_and_uids() -> None:
    large = [Message(n, "", (), "", 5 * 2**20) for n in range(3)]
    assert [len(batch) for batch in batches(large)] == [1, 1, 1]
    assert [len(batch) for batch in batches([message("a")] * 250)] == [100, 100, 50]
    assert numbers("3:5,9") == [3, 4, 5, 9]


@pytest.mark.parametrize(
    ("name", "expected"), [("inbox", "INBOX"), ("Päckchen & Co", "P&AOQ-ckchen &- Co"), ("日本語/a", "&ZeVnLIqe-/a")]
)
def test_folder_names_on_the_wire(name: str, expected: str) -> None:
    assert wire(name) == expected


LDIF = b"""dn: dc=lab,dc=test
objectClass: dcObject
contextCSN: 1

dn: uid=a@lab.test,ou=accounts,dc=lab,dc=test
objectClass: posthouseAccount
uid: a@lab.test
cn:: w6Q=
userPassword:: e1h9eQ==
mailHost: s01.lab.test
entryUUID: 7

dn: uid=b@lab.test,ou=accounts,dc=lab,dc=test
objectClass: posthouseAccount
uid: b@lab.test
cn: b
"""


def test_entries_of_a_backup() -> None:
    found = entries.accounts(LDIF)
    assert set(found) == {"a@lab.test", "b@lab.test"}
    dn, entry = found["a@lab.test"]
    assert dn == "uid=a@lab.test,ou=accounts,dc=lab,dc=test"
    assert (entry["cn"], entry["userPassword"]) == (["ä".encode()], [b"{X}y"])
    assert "entryUUID" not in entry
    assert entries.of_account(LDIF, "b@lab.test") == found["b@lab.test"][1]
    assert entries.of_account(LDIF, "c@lab.test") is None


def test_an_entry_is_found_by_a_name_that_slapd_escapes() -> None:
    ldif = LDIF.replace(b"uid=b@lab.test,", b"uid=b\\3Dc@lab.test,")
    assert entries.of_account(ldif, "b=c@lab.test") == entries.of_account(LDIF, "b@lab.test")


def test_entries_come_back_and_stay_where_their_mail_is() -> None:
    want = entries.accounts(LDIF)
    have = {"a@lab.test": ("dn", want["a@lab.test"][1] | {"cn": [b"new"], "mailHost": [b"s02.lab.test"], "sn": [b"x"]})}
    # A move that has something left to do goes by what is there, and not by what was when the backup was made.
    have["a@lab.test"][1]["posthouseMovedFrom"] = [b"s01 1"]
    missing, changed = entries.plan(have, want)
    assert [address for address, _, _ in missing] == ["b@lab.test"]
    assert [attributes for _, _, attributes in changed] == [{"cn": ["ä".encode()], "sn": []}]
    assert entries.plan(want, want) == ([], [])


def test_a_drill_counts_message_by_message() -> None:
    live = {"s01": {"a": {"INBOX": {"x": 2, "new": 1}}}}
    restored = {"s01": {"a": {"INBOX": {"x": 1, "gone": 1}}}, "s02": {"b": {"INBOX": {"y": 1}}}}
    assert drill.compare(live, restored) == {"restored": 3, "equal": 1, "newer": 2, "gone": 2}


NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("time", "damaged", "finding"),
    [
        ("2026-11-25T12:00:00Z", 0, ""),
        ("2026-10-01T12:00:00Z", 0, "56 days old"),
        ("2026-11-25T12:00:00Z", 2, "came back damaged"),
    ],
)
def test_old_and_failed_drills_are_findings(
    site: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch, time: str, damaged: int, finding: str
) -> None:
    monkeypatch.setattr(drill, "REPORTS", tmp_path)
    assert "no drill yet" in drill.status(site)["finding"]  # type: ignore[arg-type]
    began = datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    data = {"live": {}, "restored": {"mail": {}, "damaged": damaged}}
    drill.write(site, drill.report("b", began, began, {"deploy": 2.0, "restore": 1.5}, "", data))  # type: ignore[arg-type]
    state = drill.status(site, NOW)  # type: ignore[arg-type]
    assert (state["ok"], finding in state["finding"]) == (not finding, True)
    assert state["last"]["rto_seconds"] == 3.5


def test_what_others_share_is_not_the_accounts_own() -> None:
    names = ["INBOX", "Work", "Other Users/bob@lab.test/Plans", "Shared Folders/News"]
    session = Session.__new__(Session)
    listed = [item for name in names for item in ([b"\\HasNoChildren"], b"/", name.encode())]
    session.ask = lambda *_: listed  # type: ignore[method-assign]
    assert list(session.folders()) == ["INBOX", "Work"]


def test_what_a_restore_needs_fits_on_the_node() -> None:
    told = '{"message_type":"summary","total_files":100,"total_bytes":1000000}'
    past._need_room("mail1", f"{told}\n  2000000 10000000\n")
    # The same room on a larger disk, of which more has to stay free.
    with pytest.raises(BackupError, match="mail1: no room"):
        past._need_room("mail1", f"{told}\n  2000000 20000000\n")


class Entries:
    """A directory in which an address is one entry's only."""

    def __init__(self, **held: list[bytes]) -> None:
        self.held = held

    def replace(self, dn: str, attributes: entries.Entry) -> None:
        others = {value for name, values in self.held.items() if name != dn for value in values}
        if others & set(attributes["mailLocalAddress"]):
            raise AddressTaken("taken")
        self.held[dn] = attributes["mailLocalAddress"]

    put = replace


def change(dn: str, *addresses: bytes) -> tuple[str, str, entries.Entry]:
    return dn, dn, {"mailLocalAddress": list(addresses)}


def test_entries_let_go_of_an_address_before_another_gets_it() -> None:
    live: Any = Entries(a=[b"a"], b=[b"b", b"sales", b"gone"])
    restore._carry_out(live, [change("gone", b"gone")], [change("a", b"a", b"sales"), change("b", b"b")])
    assert live.held == {"a": [b"a", b"sales"], "b": [b"b"], "gone": [b"gone"]}
    with pytest.raises(BackupError, match=r"c: taken.*account alias HOLDER --remove"):
        restore._carry_out(live, [change("c", b"sales")], [])


def test_accounts_are_found_in_any_case_and_on_a_store_of_the_site(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account("alice@lab.test", "Alice", "s99.lab.test", 0)
    by_address = {account.address: account}
    directory = SimpleNamespace(get=by_address.get, holders=lambda _: by_address)
    here = SimpleNamespace(site=site, directory=directory)
    monkeypatch.setattr(restore, "opened", lambda *_: contextlib.nullcontext(here))
    known: Any = None
    for verb in (
        lambda: restore.mail(site, known, "Alice@LAB.test", Wanted()),
        lambda: restore.account(site, known, "ALICE@lab.test"),
    ):
        with pytest.raises(BackupError, match=r"alice@lab.test is on s99.lab.test, which is not in the site file"):
            verb()


@pytest.mark.parametrize("identifier", ["‹é@x>", "<a\r\nb@x>", "<a@x>\n", "", "<>", "<a@x> <b@x>"])
def test_what_is_no_message_id_is_refused(site: Site, identifier: str) -> None:
    known: Any = None
    with pytest.raises(BackupError, match="not a Message-ID"):
        restore.mail(site, known, "alice@lab.test", Wanted(identifier=identifier))


def test_a_folder_has_a_name_that_can_be_written() -> None:
    with pytest.raises(BackupError, match="not a name that a folder can have"):
        wire("\udce9")


# --- with restic ------------------------------------------------------------------------------------------------------

needs_restic = pytest.mark.skipif(
    not all(map(shutil.which, repository.PROGRAMS)), reason="the controller's programs are not installed"
)
KNOWN = Secrets({"passwords": {"backup_repository": "right"}})


@pytest.fixture
def stored(sound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Repository]]:
    """A site with one backup, of which only the manifest is there."""
    monkeypatch.setattr(repository, "NOTES", tmp_path / "notes")
    monkeypatch.setattr(inventory, "RUNTIME", tmp_path / "run")
    monkeypatch.setattr(drill, "REPORTS", tmp_path / "drills")
    site = parse(f"{sound}\nbackup: {{repository: {tmp_path / 'repository'}}}\n")
    kept = Repository(site, KNOWN)
    kept.begin()
    kept.note()
    tags = ["--tag", "run=20261126T020000Z", "--tag", "part=manifest"]
    # So much that no other pack is larger, whatever restic makes of it.
    text = "".join(map(str, range(10_000)))
    kept.restic("backup", "--host", site.name, *tags, "--stdin", "--stdin-filename", "/manifest.json", text=text)
    yield site, kept


def lose_a_pack(kept: Repository) -> None:
    max(Path(kept.place).glob("data/*/*"), key=lambda file: file.stat().st_size).unlink()


@pytest.mark.parametrize(
    ("place", "why"),
    [("/etc/hostname", "/etc/hostname is no folder"), ("/etc/hostname/below", "/etc/hostname is no folder")],
)
def test_a_repository_needs_a_folder(sound: str, place: str, why: str) -> None:
    kept = Repository(parse(f"{sound}\nbackup: {{repository: {place}}}\n"), KNOWN)
    with pytest.raises(BackupError, match=f"{place}: no folder can be made there: {why}.*nothing was changed"):
        kept.may_begin()


def test_a_repository_whose_folder_cannot_be_made_is_refused(sound: str) -> None:
    kept = Repository(parse(f"{sound}\nbackup: {{repository: /proc/repository}}\n"), KNOWN)
    with pytest.raises(BackupError, match="no folder can be made there: /proc/repository: No such file"):
        kept.begin()


@needs_restic
def test_a_lock_is_no_damage(stored: tuple[Site, Repository]) -> None:
    site, kept = stored
    environment = {"PATH": "/usr/bin:/bin", "RESTIC_REPOSITORY": kept.place, "RESTIC_PASSWORD": "right"}
    command = ["restic", "--no-cache", "backup", "--stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as other:
        while not list(Path(kept.place).glob("locks/*")):
            time.sleep(0.02)
        assert examine(site, KNOWN, quick=True) == {
            "ok": True,
            "damage": [],
            "backups": ["20261126T020000Z"],
            "incomplete": [],
        }
        with pytest.raises(Shut, match=r"already locked.*wait for whoever that is"):
            kept.restic("check")
        other.kill()
    # What was killed has left its lock; removing backups is not held up by it.
    assert list(Path(kept.place).glob("locks/*"))
    assert prune(site, KNOWN) == {"kept": ["20261126T020000Z"], "removed": []}


@needs_restic
def test_another_password_is_no_damage(stored: tuple[Site, Repository]) -> None:
    site, _ = stored
    wrong = Secrets({"passwords": {"backup_repository": "wrong"}})
    for verb in (examine, make_backup, prune):
        with pytest.raises(Shut, match="does not open it"):
            verb(site, wrong)


@needs_restic
def test_a_damaged_repository_is_refused(stored: tuple[Site, Repository]) -> None:
    site, kept = stored
    lose_a_pack(kept)
    assert "does not exist" in examine(site, KNOWN, quick=True)["damage"][0]
    for verb in (make_backup, prune):
        with pytest.raises(BackupError, match=r"damaged: pack .* does not exist; put it back from a copy"):
            verb(site, KNOWN)


@needs_restic
def test_a_drill_of_a_damaged_repository_has_failed(
    stored: tuple[Site, Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, kept = stored
    lose_a_pack(kept)
    monkeypatch.setattr("posthouse.secrets.load", lambda _: KNOWN)
    with pytest.raises(BackupError, match="damaged"):
        drill.drill(site, check=True, say=print)
    assert not drill.REPORTS.exists()
    assert "the repository is damaged" in drill.drill(site, say=print)["failed"]
    assert "the last drill failed" in drill.status(site)["finding"]


@needs_restic
def test_a_repository_that_is_gone_is_not_begun_anew(stored: tuple[Site, Repository]) -> None:
    site, kept = stored
    shutil.rmtree(kept.place)
    with pytest.raises(BackupError, match="backups were here, and nothing is here now"):
        make_backup(site, KNOWN)
    for verb in (examine, prune):
        with pytest.raises(BackupError, match="no backup repository there"):
            verb(site, KNOWN)
    assert not Path(kept.place).exists()
    (repository.NOTES / site.name).unlink()
    kept.may_begin()


@needs_restic
def test_a_second_drill_leaves_the_first_alone(
    stored: tuple[Site, Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = stored
    monkeypatch.setattr("posthouse.secrets.load", lambda _: KNOWN)
    monkeypatch.setattr("posthouse.lab.down", lambda _: pytest.fail("the first one's lab was taken down"))
    work = drill.REPORTS / site.name / ".work"
    work.mkdir(parents=True)
    with run.exclusive(site, "drill"):
        with pytest.raises(run.Busy, match="locked by"):
            drill.drill(site, say=print)
        with pytest.raises(run.Busy, match="locked by"):
            prune(site, KNOWN)
    assert work.exists()
