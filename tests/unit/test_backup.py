"""What backups are kept and chosen, what a restore does to a mailbox, and what a drill's report says."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from posthouse.model import Keep, Site
from posthouse.ops import drill, entries
from posthouse.ops.backup import Backup, Part, Standing, choose, kept
from posthouse.ops.backup import plan as backup_plan
from posthouse.ops.imap import Folder, Message, batches, numbers, pairs, parsed
from posthouse.ops.merge import plan, wire
from posthouse.ops.repository import BackupError


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
    ],
)
def test_which_backup_is_looked_into_first(at: str | None, first: str) -> None:
    assert choose(made(*DAYS), at)[0].name == first


@pytest.mark.parametrize(
    ("at", "complaint"),
    [("2026-10-01", "the oldest is 20261101T020000Z"), ("last week", "neither a backup nor a time")],
)
def test_times_of_no_backup(at: str, complaint: str) -> None:
    with pytest.raises(BackupError, match=complaint):
        choose(made(*DAYS), at)


def test_a_backup_that_never_ended_is_none() -> None:
    with pytest.raises(BackupError, match="no complete backup yet"):
        choose(made("20261126T020000Z", complete=False), None)


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


def test_entries_come_back_and_stay_where_their_mail_is() -> None:
    want = entries.accounts(LDIF)
    have = {"a@lab.test": ("dn", want["a@lab.test"][1] | {"cn": [b"new"], "mailHost": [b"s02.lab.test"], "sn": [b"x"]})}
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
