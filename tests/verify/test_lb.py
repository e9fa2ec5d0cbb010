"""The balancers: the VIP answers, and whoever stands behind it is well."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import pytest
from dialogue import talk

pytestmark = pytest.mark.tier("lb")

Variables = dict[str, Any]

# Pool → the tier whose nodes are in it.
POOLS = {
    "smtp": "mx",
    "submission": "submission",
    "submissions": "submission",
    "imaps": "access",
    "pop3s": "access",
    "sieve": "access",
}


@pytest.mark.parametrize("unit", ["haproxy", "keepalived"])
def test_service_runs_and_comes_back(host: Any, unit: str) -> None:
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled


def test_every_server_is_up_or_drained_on_purpose(host: Any, ctx: Variables) -> None:
    answer = host.check_output("echo show stat | socat - /run/haproxy/admin.sock").removeprefix("# ")
    rows = list(csv.DictReader(answer.splitlines()))
    states = {(r["pxname"], r["svname"]): r["status"] for r in rows if r["svname"] not in ("FRONTEND", "BACKEND")}
    want = {(pool, node["name"]) for pool, tier in POOLS.items() for node in ctx["tier_nodes"][tier]}
    assert set(states) == want
    assert {name: state for name, state in states.items() if not state.startswith(("UP", "DRAIN"))} == {}


def test_who_is_drained_here_knows_it(host: Any, elsewhere: Callable[[str], Any]) -> None:
    """A node that is out of the pools but not marked was forgotten: undrain or drain it."""
    answer = host.check_output("echo show stat | socat - /run/haproxy/admin.sock").removeprefix("# ")
    drained = {row["svname"] for row in csv.DictReader(answer.splitlines()) if row["status"].startswith("DRAIN")}
    assert {name for name in drained if not elsewhere(name).file("/var/lib/posthouse/drained").exists} == set()


def test_only_root_may_drain(host: Any) -> None:
    socket = host.file("/run/haproxy/admin.sock")
    assert (socket.user, socket.mode) == ("root", 0o600)


def test_it_waits_on_the_vip_even_while_another_node_holds_it(host: Any, ctx: Variables) -> None:
    listening = host.check_output("ss -Hltn").split()
    missing = [port for port in (25, 465, 587, 993, 995, 4190) if f"{ctx['vips']['mail']}:{port}" not in listening]
    assert missing == []


@pytest.mark.parametrize(
    ("port", "tls", "greeting", "last"),
    [
        (25, False, "220", "QUIT"),
        (587, False, "220", "QUIT"),
        (465, True, "220", "QUIT"),
        (993, True, "* OK", "a LOGOUT"),
        (995, True, "+OK", "QUIT"),
        (4190, False, '"IMPLEMENTATION"', "LOGOUT"),
    ],
)
def test_vip_answers(host: Any, ctx: Variables, port: int, tls: bool, greeting: str, last: str) -> None:
    answers = talk(host, port, last, address=ctx["vips"]["mail"], tls=tls, proxy=False)
    assert answers[0].startswith(greeting)
