"""What a store's keeper does next, as data: each file below `keeper/` is a case.

why: …                 what the case is about
view: {KEY: VALUE}     what is different from keeper-view.yml (stores/decide.py has the keys)
expect: ACTION
"""

import sys
from pathlib import Path

import pytest
import yaml

from posthouse.roles import ROLES

sys.path.insert(0, str(ROLES / "store/templates/usr/local/lib/posthouse"))

from stores import decide

HERE = Path(__file__).parent
CASES = sorted((HERE / "keeper").glob("*.yml"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_keeper(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    view = yaml.safe_load((HERE / "keeper-view.yml").read_text()) | case.get("view", {})
    assert decide.decide(view)[0] == case["expect"], case["why"]


def test_a_primary_stops_before_another_may_start() -> None:
    """Both count on their own clock; half a second is left for the address to go."""
    assert decide.HOLD + 0.5 < decide.TTL


STATE = {"primary": "a", "term": 3, "beat": 9, "in_sync": ["b", "c"], "base": {"a": "1", "b": "2", "c": "3"}, "lag": {}}
COPIES = {"a": "1", "b": "2", "c": "3"}


def test_after_a_takeover_nobody_counts_until_compared() -> None:
    assert decide.taken(STATE, "b", COPIES) == {
        "primary": "b",
        "term": 4,
        "beat": 0,
        "in_sync": [],
        "base": {"b": "2"},
        "lag": {},
    }


def test_after_a_planned_change_all_are_in_sync() -> None:
    record = decide.handed_over(STATE, "b", COPIES)
    assert (record["primary"], record["term"]) == ("b", 4)
    assert record["in_sync"] == ["a", "c"]
    assert record["base"] == COPIES
    assert "to" not in record


def test_a_former_replica_is_in_sync_no_more() -> None:
    record = decide.renewed(STATE, {"a": "1", "c": "3"}, [], {}, {"c": 0.2})
    assert (record["in_sync"], record["base"]) == (["c"], {"a": "1", "c": "3"})


def test_a_late_replica_is_struck_off_and_stays_complete_but_for_the_log() -> None:
    record = decide.renewed(STATE, COPIES, [], {}, {"b": decide.LATE, "c": 0.2})
    assert record["in_sync"] == ["c"]
    assert record["base"] == COPIES
    assert record["beat"] == 10


def test_a_replica_with_another_copy_has_to_be_compared_again() -> None:
    record = decide.renewed(STATE, COPIES | {"b": "new"}, ["b"], {}, {})
    assert record["in_sync"] == ["c"]
    assert record["base"] == {"a": "1", "c": "3"}
    record = decide.renewed(record, COPIES | {"b": "new"}, ["b"], {"b": "new"}, {})
    assert record["in_sync"] == ["c", "b"]
    assert record["base"] == {"a": "1", "b": "new", "c": "3"}
