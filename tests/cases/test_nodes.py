"""Plans of operations on nodes: what is so, what is asked, and the steps or the refusal that follow. Cases are data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from posthouse import sitefile
from posthouse.model import Site
from posthouse.ops import drain, expand, rebuild, rebuild_site, retire, state, upgrade
from posthouse.ops.steps import Refused, shown

FOLDER = Path(__file__).parent / "nodes"
PLANS = {
    "drain": lambda site, have, case: drain.plan(site, have, case["node"]),
    "undrain": lambda site, have, case: drain.plan_undrain(site, have, case["node"]),
    "expand": lambda site, have, case: expand.plan(site, have, case["node"], case.get("phase", "waiting")),
    "retire": lambda site, have, case: retire.plan(
        site, have, case["node"], case.get("lacking"), case.get("cluster", site.cluster.members)
    ),
    "upgrade": lambda site, have, case: upgrade.plan(
        site, have, case["nodes"], case["updates"], "now", case.get("rehearsed")
    ),
    "rebuild": lambda site, have, case: rebuild.plan(
        site, have, case["node"], case.get("sizes", {}), case.get("waiting", 0)
    ),
    "rebuild_site": lambda site, have, case: rebuild_site.plan(site, have, "20261126T020000Z", case["parts"]),
}
POOLS = {"smtp": "mx", "submission": "submission", "imaps": "access"}


def cases() -> list[Any]:
    """Every case of every file: (operation, case)."""
    files = sorted(FOLDER.glob("*.yml"))
    found = [(file.stem, name, case) for file in files for name, case in yaml.safe_load(file.read_text()).items()]
    return [pytest.param(operation, case, id=f"{operation}: {name}") for operation, name, case in found]


def changed_site(changes: dict[str, Any]) -> Site:
    """The default site with some of it changed; a section that is null is left out."""
    data = yaml.safe_load((sitefile.INVENTORY / "lab" / "site.yml").read_text())
    for section, value in changes.items():
        if value is None:
            del data[section]
        else:
            data[section] |= value
    return sitefile.parse(yaml.safe_dump(data))


def all_well_but(site: Site, told: dict[str, Any]) -> state.State:
    """A state in which everything serves, except for what is told."""
    down = {*told.get("down", ()), *(set(site.nodes) - set(told.get("answers", site.nodes)))}
    drained = told.get("drained", [])

    def how(name: str) -> str:
        return "drained" if name in drained else "down" if name in down else "up"

    pools = {pool: {node.name: how(node.name) for node in site.groups[tier]} for pool, tier in POOLS.items()}
    answers = told.get("answers", list(site.nodes))
    known = {
        "answers": answers,
        "deployed": told.get("deployed", answers),
        "drained": drained,
        "upgrading": told.get("upgrading", []),
        "carries": told.get("carries", [(s.name, n) for s in site.stores.values() for n in (s.primary, *s.replicas)]),
        "late": told.get("late", []),
        "filling": told.get("filling", {}),
        "primaries": {name: store.primary for name, store in site.stores.items()} | told.get("primaries", {}),
        "vip": told.get("vip", "lb1"),
        "pools": {node.name: pools for node in site.groups["lb"] if node.name in answers},
    }
    sets = {key: frozenset(known[key]) for key in ("answers", "deployed", "drained", "upgrading")}
    pairs = {key: frozenset(map(tuple, known[key])) for key in ("carries", "late")}
    return state.State(**{**known, **sets, **pairs})


@pytest.mark.parametrize(("operation", "case"), cases())
def test_plan(operation: str, case: dict[str, Any]) -> None:
    site = changed_site(case.get("site", {}))
    have = all_well_but(site, case.get("have", {}))
    if "refused" in case:
        with pytest.raises(Refused) as caught:
            PLANS[operation](site, have, case)
        assert str(caught.value).startswith(case["refused"])
        assert str(caught.value).endswith("nothing was changed")
        return
    steps = PLANS[operation](site, have, case)
    if "nodes_in_order" in case:
        assert list(dict.fromkeys(step.node for step in steps)) == case["nodes_in_order"]
    else:
        assert shown(steps) == case["steps"]
