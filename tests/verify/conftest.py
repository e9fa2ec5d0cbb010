"""The verify suite: read-only checks of every tier on the nodes that carry it, on the lab and in production alike.

`pytest tests/verify --site lab --tier mx`. A module says which tier it checks with
`pytestmark = pytest.mark.tier("mx")`; each of its tests runs once for each node of that tier.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import testinfra

from posthouse import render, roles, run, secrets, sitefile
from posthouse.ops import failover


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--site", default="lab", help="a folder in inventory/")
    parser.addoption(
        "--tier", action="append", default=[], choices=roles.TIERS, help="check only this tier (repeatable)"
    )
    parser.addoption("--node", help="check only this node")


def pytest_configure(config: pytest.Config) -> None:
    site = sitefile.load(config.getoption("--site"))
    config.stash[SITE] = site
    config.stash[SSH] = run.reach(site)


SITE = pytest.StashKey[Any]()
STORES = pytest.StashKey[Any]()
SSH = pytest.StashKey[Any]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("tier")
    if marker and "node_name" in metafunc.fixturenames:
        only = metafunc.config.getoption("--node")
        nodes = [n for n in metafunc.config.stash[SITE].groups[marker.args[0]] if only in (None, n.name)]
        # One worker per node: its tests share one ssh connection.
        metafunc.parametrize("node_name", [pytest.param(n.name, marks=pytest.mark.xdist_group(n.name)) for n in nodes])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--tier")
    if wanted:
        items[:] = [item for item in items if (marker := item.get_closest_marker("tier")) and marker.args[0] in wanted]


@pytest.fixture
def stores(request: pytest.FixtureRequest) -> dict[str, failover.State]:
    """Who serves each store now, and which replicas are in sync; asked once."""
    stash = request.config.stash
    if STORES not in stash:
        stash[STORES] = failover.states(stash[SITE], watch=True)
    return stash[STORES]


@pytest.fixture
def ctx(node_name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """All template variables of the node, its secrets included."""
    site = request.config.stash[SITE]
    node = site.nodes[node_name]
    return render.shared_variables(site) | render.node_variables(site, node) | secrets.load(site).for_node(node)


@pytest.fixture
def node_stores(ctx: dict[str, Any], stores: dict[str, failover.State]) -> list[dict[str, Any]]:
    """The stores on the node, each with the role that it has there now."""
    return [
        store
        | {"role": "primary" if (now := stores[store["name"]].primary) == ctx["node"]["name"] else "replica"}
        | {"primary": now}
        for store in ctx["node_stores"]
    ]


@pytest.fixture
def node(ctx: dict[str, Any]) -> SimpleNamespace:
    """The node: name, fqdn, address, tiers, provider."""
    return SimpleNamespace(**{k: v for k, v in ctx["node"].items() if k != "class"})


@pytest.fixture
def host(node_name: str, request: pytest.FixtureRequest) -> Any:
    """The testinfra host of the node."""
    return testinfra.get_host(f"ssh://{node_name}", ssh_config=str(request.config.stash[SSH]))


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """The testinfra host of another node, by its name."""
    return lambda name: testinfra.get_host(f"ssh://{name}", ssh_config=str(request.config.stash[SSH]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Shows the journal of the tier's services beside a failure."""
    report = yield
    marker = item.get_closest_marker("tier")
    if report.failed and report.when == "call" and marker and "host" in getattr(item, "funcargs", {}):
        services = roles.manifest(marker.args[0]).get("services", {})
        units = " ".join(f"-u '{unit.split('{')[0]}*'" for unit in services)
        journal = item.funcargs["host"].run(f"journalctl {units} -n 25 --no-pager")
        report.sections.append((f"journal of {marker.args[0]} on {item.funcargs['node_name']}", journal.stdout))
    return report
