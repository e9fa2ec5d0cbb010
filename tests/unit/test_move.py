"""What a move of accounts is planned with, and what it does when nodes die in the middle of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from posthouse import secrets
from posthouse.directory import DirectoryError
from posthouse.model import Site
from posthouse.ops import relocation
from posthouse.ops.failover import State
from posthouse.ops.move import Move, lacking_room
from posthouse.ops.relocation import MoveError, Relocation
from posthouse.remote import RemoteError

MIB = 2**20


def test_room_is_needed_on_every_node_of_the_target_that_answers() -> None:
    moves = [Move(f"{name}@lab.test", "s01", "s02", 10, 50 * MIB) for name in ("alice", "bob")]
    nodes = {"s02": ["mail2", "mail3"]}
    assert lacking_room(moves, nodes, {"mail2": 200 * MIB, "mail3": 112 * MIB}) == []
    assert lacking_room(moves, nodes, {"mail2": 200 * MIB, "mail3": 110 * MIB}) == [
        "mail3 has 110 MiB free, and 100 MiB would come"
    ]
    assert lacking_room(moves, nodes, {"mail2": 200 * MIB}) == [], "mail3 does not answer"


def test_what_is_there_already_needs_none() -> None:
    there = Move("alice@lab.test", "s02", "s02", 10, 50 * MIB, left=("s01", 1_700_000_000))
    assert lacking_room([there], {"s02": ["mail2"]}, {"mail2": 0}) == []
    assert there.steps == ["let go of the copy that is left on s01"]


class Entry:
    """An account's entry in the directory. fails: how `move` fails, after it was done or not."""

    def __init__(self, fails: str = "", done: bool = True) -> None:
        self.store, self.fails, self.done, self.stayed = "s01", fails, done, False

    def move(self, address: str, source: str, target: str, since: int) -> None:
        self.store = target if self.done else source
        if self.fails:
            raise DirectoryError(self.fails)

    def get(self, address: str) -> Any:
        return SimpleNamespace(address=address, store=self.store)

    def stay(self, address: str, store: str) -> None:
        self.store, self.stayed = store, True


class Nodes:
    """Stands for nodes over ssh. answers: {a part of a command: {node: what it complains of, or None}}."""

    def __init__(self, **answers: dict[str, str | None]) -> None:
        self.answers, self.asked = answers, []

    def run(self, node: str, command: str, timeout: float = 0) -> str:
        self.asked.append((node, command))
        for part, complaints in self.answers.items():
            if part in command and (complaint := complaints.get(node)):
                raise RemoteError(node, 255 if complaint == "gone" else 1, complaint)
        return ""


def relocation_of(site: Site, entry: Entry, nodes: Nodes) -> Relocation:
    made = Relocation(site, secrets.placeholders(site), nodes, lambda address, phase: None, {})
    made.directory = entry
    made._states = {"s02": State("mail2", in_sync=("mail3",))}
    return made


def test_a_move_that_its_provider_took_with_it_is_taken_back_by_a_newer_change(site: Site) -> None:
    entry = Entry("mail1 was lost in the middle", done=False)
    with pytest.raises(DirectoryError, match="lost in the middle"):
        relocation_of(site, entry, Nodes())._make_theirs("alice@lab.test", "s01", "s02", 0)
    assert entry.stayed


def test_a_move_of_which_only_the_answer_was_lost_counts(site: Site) -> None:
    entry = Entry("mail1 was lost in the middle")
    assert relocation_of(site, entry, Nodes())._make_theirs("alice@lab.test", "s01", "s02", 0) == []
    assert (entry.store, entry.stayed) == ("s02", False)


def test_a_move_that_no_other_node_has_heard_of_is_taken_back(site: Site) -> None:
    entry = Entry()
    unheard = Nodes(doveadm={"lb1": "does not know of the move", "lb2": "does not know of the move"})
    with pytest.raises(MoveError, match="no node of the access tier hears of its move: lb"):
        relocation_of(site, entry, unheard)._make_theirs("alice@lab.test", "s01", "s02", 0)
    assert (entry.store, entry.stayed) == ("s01", True)


def test_a_move_that_another_one_overtook_leaves_that_as_it_is(site: Site) -> None:
    entry = Entry("mail1 refused", done=False)
    entry.get = lambda address: SimpleNamespace(address=address, store="s03")
    with pytest.raises(DirectoryError, match="refused"):
        relocation_of(site, entry, Nodes())._make_theirs("alice@lab.test", "s01", "s02", 0)
    assert not entry.stayed


def test_an_access_node_that_is_gone_is_waited_for_once(site: Site) -> None:
    nodes = Nodes(doveadm={"lb2": "gone"})
    one = relocation_of(site, Entry(), nodes)
    assert [note.partition(":")[0] for _ in range(2) for note in one._send_sessions_on("a@lab.test", "s02")] == [
        "lb2"
    ] * 2
    assert [node for node, _ in nodes.asked].count("lb2") == 1


def test_a_replica_that_has_died_is_not_waited_for_and_one_that_is_late_is(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relocation, "ASK", 0.0)
    monkeypatch.setattr(relocation, "REPLICATED", 0.05)
    monkeypatch.setattr(relocation.failover, "primaries", lambda *_: {"s02": "mail2"})
    late = {"mail2": "s02: mail3 did not get everything within 0 s"}
    with pytest.raises(MoveError, match="mail3 did not get everything"):
        relocation_of(site, Entry(), Nodes(replicated=late))._replicate("s02")
    relocation_of(site, Entry(), Nodes(replicated=late, true={"mail3": "gone"}))._replicate("s02")


def test_a_store_that_another_node_serves_by_now_ends_the_wait(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relocation.failover, "primaries", lambda *_: {"s02": "mail3"})
    served = {"mail2": "s02: mail3 serves it now"}
    with pytest.raises(MoveError, match="s02 is served by mail3 now; run the command again"):
        relocation_of(site, Entry(), Nodes(replicated=served))._replicate("s02")


def test_a_mailbox_on_another_store_alone_is_not_moved_before_the_account_has_one(site: Site) -> None:
    one = relocation_of(site, Entry(), Nodes())
    one._stores = {name: SimpleNamespace(exists=lambda address, name=name: name == "s03") for name in ("s01", "s03")}
    with pytest.raises(MoveError, match=r"only mailbox is on s03; .* makes one on s01, and run the command again"):
        one.check_there("alice@lab.test", "s01", "s03")


def test_a_mailbox_is_never_taken_for_its_own_former_copy(site: Site) -> None:
    entry, settled = Entry(), []
    entry.settled = settled.append  # type: ignore[attr-defined]
    relocation_of(site, entry, Nodes()).finish("alice@lab.test", "s01", "s01", 1)
    assert settled == ["alice@lab.test"]
