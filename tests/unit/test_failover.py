"""What `failover` and `failback` would do, and what they refuse."""

import contextlib
from typing import cast

import pytest

from posthouse.model import Site
from posthouse.ops import failover, rebuild
from posthouse.ops.failover import FailoverError, State, Step, plan
from posthouse.ops.state import State as NodesState
from posthouse.ops.steps import Refused
from posthouse.remote import Remote, RemoteError
from posthouse.sitefile import parse

WELL = {
    "s01": State("mail1", in_sync=("mail2",)),
    "s02": State("mail2", in_sync=("mail3",)),
    "s03": State("mail3", in_sync=("mail1",)),
}


def test_the_replica_in_sync_takes_over(site: Site) -> None:
    assert plan(site, WELL, "s01") == Step("s01", "mail1", "mail2")
    assert plan(site, WELL, "s01", "mail2") == Step("s01", "mail1", "mail2")


def test_who_serves_already_need_not_take_over(site: Site) -> None:
    assert plan(site, WELL, "s01", "mail1") is None


def test_a_silent_primary_without_a_replica_in_sync_needs_force(site: Site) -> None:
    have = WELL | {"s01": State("mail1", alive=False)}
    with pytest.raises(FailoverError, match=r"mail1 is silent and mail2 is not in sync.*--force"):
        plan(site, have, "s01", "mail2")
    assert plan(site, have, "s01", "mail2", force=True) == Step("s01", "mail1", "mail2", force=True)
    with pytest.raises(FailoverError, match="--force needs --to"):
        plan(site, have, "s01", force=True)


@pytest.mark.parametrize(
    ("store", "to", "have", "reason"),
    [
        ("s1", None, WELL, "no store 's1'; did you mean 's01'"),
        ("s01", "mail3", WELL, "s01: mail3 has no copy of it; its nodes are mail1, mail2"),
        ("s01", None, {}, "nobody has served it yet"),
        ("s01", None, {"s01": State("mail1")}, "s01: no replica is in sync; wait"),
        (
            "s01",
            "mail2",
            {"s01": State("mail1", lag={"mail2": 9.0})},
            r"s01: mail2 is not in sync \(9 s behind\); wait",
        ),
    ],
)
def test_what_must_not_be_done_is_refused(
    site: Site, store: str, to: str | None, have: dict[str, State], reason: str
) -> None:
    # What is alive is not overruled by force either.
    for force in (False, True):
        with pytest.raises(FailoverError, match=reason):
            plan(site, have, store, to, force)


def test_the_last_copy_stays_where_it_is(sound: str) -> None:
    site = parse(sound.replace("s01: {primary: mail1, replicas: [mail2]}", "s01: {primary: mail1}"))
    with pytest.raises(FailoverError, match="mail1 has the only copy"):
        plan(site, WELL, "s01")


def test_without_a_cluster_nothing_fails_over(sound: str) -> None:
    site = parse(sound.replace("cluster: {members: [mail1, mail2, mail3]}", ""))
    with pytest.raises(FailoverError, match="no `cluster`"):
        plan(site, {}, "s01")


class Marked:
    """Stands for nodes of which some are drained."""

    def __init__(self, *drained: str) -> None:
        self.drained = drained

    def run(self, node: str, command: str, **_: object) -> str:
        if node not in self.drained:
            raise RemoteError(node, 1, "")
        return ""


def test_a_drained_node_gets_nothing_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    have = WELL | {"s01": State("mail2", in_sync=("mail1",)), "s02": State("mail3", in_sync=("mail2",))}
    moved: list[Step] = []
    monkeypatch.setattr(failover, "states", lambda *_, **__: have)
    monkeypatch.setattr(failover, "_act", lambda site, remote, step: moved.append(step))
    with pytest.raises(FailoverError, match="s01: mail1 is drained, and gets it back by: posthouse undrain mail1"):
        failover.failback(site, ["s01"], remote=cast(Remote, Marked("mail1")))
    assert moved == []
    failover.failback(site, ["s02", "s01"], remote=cast(Remote, Marked("mail1")))
    assert [step.store for step in moved] == ["s02"]
    failover.failback(site, ["s02", "s01"], remote=cast(Remote, Marked("lb1")))
    assert [step.store for step in moved] == ["s02", "s02", "s01"]


@pytest.mark.parametrize(
    ("record", "answers", "refused"),
    [
        (State("mail1", in_sync=("mail2",)), {"mail2", "mail3"}, False),
        (State("mail1", in_sync=("mail2",)), {"mail3"}, True),
        # mail2 has come back without what mail1 acknowledged meanwhile.
        (State("mail1", in_sync=()), {"mail2", "mail3"}, True),
        (State("mail2", in_sync=()), {"mail2", "mail3"}, False),
    ],
)
def test_a_disk_that_may_have_mail_alone_is_not_wiped(
    site: Site, record: State, answers: set[str], refused: bool
) -> None:
    have = NodesState(answers=frozenset(answers))
    with (
        pytest.raises(Refused, match=r"s01: mail1 served it last.*failover s01 --to NODE --force")
        if refused
        else (contextlib.nullcontext())
    ):
        rebuild.need_complete(site, have, "mail1", WELL | {"s01": record})
