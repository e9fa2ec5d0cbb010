"""What a move of accounts is planned with."""

from posthouse.ops.move import Move, lacking_room

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
