"""Rebalancing, as data: each file below `rebalance/` is a case, and a new case is a new file.

stores: {NAME: {weight, nodes, mailboxes: [MiB, …]}}; weight 0: to be emptied
free: {NODE: MiB}
by: accounts or bytes
expect: {FROM TO: [MiB, …]}, what moves; or `error:`, a part of the message
"""

from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from posthouse.ops.rebalance import Load, RebalanceError, Step, plan, summary

CASES = sorted((Path(__file__).parent / "rebalance").glob("*.yml"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_rebalance(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    stores = {
        name: Load(
            entry.get("weight", 1),
            tuple(entry["nodes"]),
            {f"{name}-{number}": size * 2**20 for number, size in enumerate(entry["mailboxes"])},
        )
        for name, entry in case["stores"].items()
    }
    free = {node: size * 2**20 for node, size in case["free"].items()}
    if "error" in case:
        with pytest.raises(RebalanceError, match=case["error"]):
            plan(stores, free, case.get("by", "accounts"))
        return
    found = defaultdict(list)
    for step in plan(stores, free, case.get("by", "accounts")):
        found[f"{step.source} {step.target}"].append(step.size // 2**20)
    assert {key: sorted(sizes) for key, sizes in found.items()} == case["expect"]


def test_summary() -> None:
    steps = [Step("a", "s01", "s04", 3 << 20), Step("b", "s02", "s04", 0), Step("c", "s01", "s04", 1 << 19)]
    assert summary(steps) == ["s01 → s04: 2 accounts, 3.5 MiB", "s02 → s04: 1 account, 0.0 MiB"]
