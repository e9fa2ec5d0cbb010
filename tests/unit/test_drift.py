"""What is drift and what is not, from what was seen."""

from __future__ import annotations

import pytest

from posthouse.directory import Account
from posthouse.ops import drift_node
from posthouse.ops.drift import Finding, _layers, _mended, _stores, lagging, misplaced
from posthouse.ops.failover import State

ONE, TWO = "20261126120000.000001Z#000000#001#000000", "20261126120005.000001Z#000000#001#000000"


def directory(*changes: str, entries: str | None = "same") -> dict:
    return {"changes": {change.split("#")[2]: change for change in changes}, "entries": entries}


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ({"mail1": directory(TWO), "mail2": directory(TWO)}, {}),
        ({"mail1": directory(TWO), "mail2": directory(ONE)}, {"mail2": "provider 1 since 20261126120000"}),
        ({"mail1": directory(ONE), "mail2": directory(TWO)}, {"mail1": "provider 1 since 20261126120000"}),
        ({"mail1": directory(TWO), "mail2": directory()}, {"mail2": "not complete"}),
        ({"mail1": directory(TWO), "mail2": directory(TWO, entries="other")}, {"mail2": "other entries than mail1"}),
        ({"mail1": directory(TWO, entries=None), "mail2": directory(TWO, entries=None)}, {}),
    ],
)
def test_lagging(states, found):
    seen = lagging(states)
    assert seen.keys() == found.keys()
    assert all(found[node] in seen[node] for node in found)


A, B, C = (Account(f"{name}@lab.test", name, store, 0) for name, store in (("a", "s01"), ("b", "s02"), ("c", "s09")))


@pytest.mark.parametrize(
    ("here", "found"),
    [
        ({"s01": {A.address}, "s02": {B.address}}, []),
        ({"s01": set(), "s02": {B.address}}, [("s01", A.address, "has no mailbox where its entry says")]),
        (
            {"s01": {A.address, B.address}, "s02": {B.address}},
            [("s01", B.address, "has a mailbox here, and its entry says s02")],
        ),
        (
            {"s01": {A.address, "x@lab.test"}, "s02": {B.address}},
            [("s01", "x@lab.test", "has a mailbox and no account")],
        ),
        # A store that could not be asked says nothing about its mailboxes.
        ({"s01": {A.address}}, []),
    ],
)
def test_misplaced(here, found):
    assert list(misplaced([A, B], here, ["s01", "s02"])) == found


def test_unknown_store():
    assert list(misplaced([C], {"s01": set()}, ["s01"])) == [
        ("s09", C.address, "its entry names s09, which is no store of the site")
    ]


@pytest.mark.parametrize(
    ("here", "fixes"),
    [
        ({"s01": {A.address, B.address}, "s02": {B.address}}, ["posthouse move b@lab.test --to s01 --site lab makes"]),
        ({"s01": set(), "s02": {B.address}}, ["the next message or login makes an empty one; "]),
        ({"s01": {"x@lab.test"}, "s02": {B.address}}, ["the next message", "posthouse account delete x@lab.test"]),
    ],
)
def test_what_mends_mailboxes_names_store_and_site(site, here, fixes):
    found = [_mended(site, *finding) for finding in misplaced([A, B], here, ["s01", "s02"])]
    assert len(found) == len(fixes)
    assert all(one.startswith(fix) for one, fix in zip(found, fixes, strict=True))
    assert all(f"--site {site.name}" in one for one in found)


def test_a_store_that_is_no_more_has_to_come_back(site):
    (finding,) = misplaced([C], {"s01": set()}, ["s01"])
    assert _mended(site, *finding) == f"write s09 into site.yml again, then: posthouse deploy {site.name}"


def seen(site, *holders: str, behind: float = 0.0) -> dict:
    """What the nodes of a healthy site say, but that these hold s01's address, and its replica is behind."""
    found = {}
    for node in site.nodes.values():
        addresses = [s.address for s in site.stores.values() if s.primary == node.name and s.name != "s01"]
        addresses += [site.stores["s01"].address] if node.name in holders else []
        stores = {s.name: dict.fromkeys(s.replicas, behind if s.name == "s01" else 0.0) for s in site.stores.values()}
        data = {"addresses": addresses, "directory": None, "stores": stores, "held": []}
        found[node.name] = {"files": [], "daemons": [], "data": data}
    return found


def test_stores(site):
    store = site.stores["s01"]
    first, second = store.primary, store.replicas[0]

    states = {name: State(one.primary, in_sync=one.replicas) for name, one in site.stores.items()}

    def what(*holders: str, behind: float = 0.0) -> list[tuple[str, str, str]]:
        return [(f.node, f.thing, f.what) for f in _stores(site, seen(site, *holders, behind=behind), states)]

    assert what(first) == []
    assert what(first, behind=9) == []
    assert what() == [(first, "s01", "nobody serves it: no node has its address")]
    assert what(second) == [(second, "s01", f"is served here; the site prefers {first}")]
    assert (second, "s01", f"{first} and {second} both serve it") in what(first, second)
    assert what(first, behind=11) == [(first, f"s01 on {second}", "is 11 s behind")]


def test_layers(site):
    """Each finding has its node, its layer and what mends it; a node that does not answer is one, too."""
    found = seen(site, "mail1")
    found["mail1"]["files"] = [["/etc/hosts", "is missing", None]]
    found["mail1"]["daemons"] = [["x.service", "is old", "systemctl restart x.service"]]
    found["mail1"]["data"] |= {"held": ["/etc/postfix 4ABC"]}
    found["mail2"] = "mail2: no route"
    assert list(_layers(site, found)) == [
        Finding("mail1", "files", "/etc/hosts", "is missing", f"posthouse deploy {site.name} --limit mail1"),
        Finding("mail1", "daemons", "x.service", "is old", "on mail1: systemctl restart x.service"),
        Finding(
            "mail1",
            "data",
            "message 4ABC",
            "is held in the queue of /etc/postfix",
            "on mail1: postsuper -c /etc/postfix -H 4ABC",
        ),
        Finding(
            "mail2",
            "daemons",
            "the node",
            "cannot be asked: mail2: no route",
            "posthouse lab up lab" if site.lab else "see to the machine, or: posthouse rebuild mail2 --site lab",
        ),
    ]


FILE = {"content": "a\n", "mode": "0644", "owner": "root", "group": "root"}


@pytest.mark.parametrize(
    ("before", "want", "words"),
    [
        (None, FILE, "is missing"),
        (FILE | {"content": "b\n"}, FILE, "has other content"),
        (FILE | {"mode": "0600"}, FILE, "has mode 0600, not 0644"),
        (FILE | {"content": "", "owner": "x"}, FILE, "has other content, owner x, not root"),
        ({"link": "/x"}, FILE, "is a link, or links elsewhere"),
        (FILE, {"link": "/dev/null"}, "is a link, or links elsewhere"),
        ({"mode": "0755", "owner": "root", "group": "root"}, FILE, "has other content, mode 0755, not 0644"),
    ],
)
def test_difference(before, want, words):
    assert drift_node._difference(before, want) == words
