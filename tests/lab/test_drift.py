"""Drift: what a site is, against what it should be. Each layer has something wrong that nobody else notices."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from posthouse import secrets
from posthouse.mailboxes import Mailboxes
from posthouse.probe.clients import eventually


@pytest.fixture(scope="module", autouse=True)
def preferred(site, posthouse) -> None:
    """Every store is where the site wants it: a node may have been down before this suite."""
    posthouse("failback", "--all", "--site", site.name)


@pytest.fixture
def drift(site, posthouse) -> Callable[..., list[tuple[str, str, str]]]:
    """What `posthouse drift` finds: [(node, layer, thing)], sorted. `within`: seconds for all of the site."""

    def look(status: int = 1, within: float | None = None) -> list[tuple[str, str, str]]:
        for _ in range(5):  # the machine may be busy with what came before
            report = json.loads(posthouse("drift", site.name, "--json", status=status))
            if within is None or report["seconds"] <= within:
                break
        else:
            pytest.fail(f"{report['seconds']} s")
        assert report["nodes"] == len(site.nodes)
        assert all(finding["what"] and finding["fix"] for finding in report["findings"])
        return sorted((finding["node"], finding["layer"], finding["thing"]) for finding in report["findings"])

    return look


@contextlib.contextmanager
def done(nodes: Any, node: str, command: str, undo: str) -> Iterator[None]:
    """Something is different on a node meanwhile."""
    nodes.run(node, command)
    try:
        yield
    finally:
        nodes.run(node, undo)


@contextlib.contextmanager
def stray(site: Any, store: str, address: str) -> Iterator[None]:
    """A mailbox is on a store meanwhile, with which it has nothing to do."""
    with closing(Mailboxes(site.stores[store], secrets.load(site))) as mailboxes:
        mailboxes.make(address)
        try:
            yield
        finally:
            mailboxes.delete(address)


def test_none(drift):
    """A healthy site has no drift"""
    assert drift(status=0) == []


def test_one_in_each_layer(nodes, site, people, drift):
    """A file edited, a kernel setting changed, a mailbox on the wrong store: each is named, in 10 s for all nodes"""
    first, second = nodes.of("mx")[:2]
    wrong = people.bob.store
    edit = "cp -p /etc/postfix/main.cf /root/kept && echo '# by hand' >>/etc/postfix/main.cf"
    setting = "net.ipv4.conf.all.accept_redirects"
    with (
        done(nodes, first, edit, "mv /root/kept /etc/postfix/main.cf"),
        done(nodes, second, f"sysctl -q -w {setting}=1", f"sysctl -q -w {setting}=0"),
        stray(site, wrong, people.alice.address),
    ):
        found = drift(within=10)
    assert found == sorted(
        [
            (first, "files", "/etc/postfix/main.cf"),
            (second, "daemons", f"sysctl {setting}"),
            (site.stores[wrong].primary, "data", f"{people.alice.address} on {wrong}"),
        ]
    )


def test_daemons(nodes, drift):
    """A program replaced on the disk, a file newer than its daemon, a firewall rule too much are each named"""
    node = nodes.of("mx")[-1]
    replace = (
        "program=$(readlink /proc/$(pidof -s slapd)/exe) && cp -p $program $program.new && mv $program.new $program"
    )
    master = "/etc/postfix/master.cf"
    add = "nft add rule inet posthouse input tcp dport 9 accept"
    with (
        done(nodes, node, replace, "systemctl restart slapd"),
        done(nodes, node, f"cp -p {master} /root/kept && touch {master}", f"mv /root/kept {master}"),
        done(nodes, node, add, "systemctl reload nftables"),
    ):
        found = drift()
    assert found == sorted((node, "daemons", thing) for thing in ("slapd.service", "postfix.service", "nftables"))


def test_data(nodes, site, drift):
    """An entry that replication knows nothing of, and a mailbox without an account, are each named"""
    node = next(node.name for node in site.groups["directory"] if not node.provider)
    store = next(iter(site.stores))
    address = f"left.over.{uuid.uuid4().hex[:4]}@{site.domain}"
    change = f"dn: ou=accounts,{site.suffix}\\nchangetype: modify\\nreplace: description\\ndescription: by hand\\n"
    write = f"printf '{change}' | slapmodify -f /etc/ldap/slapd.conf -b '{site.suffix}'"
    forget = "rm -f /srv/directory/main/*.mdb /srv/directory/accesslog/*.mdb"
    with (
        done(nodes, node, _offline(write), _offline(forget)),
        stray(site, store, address),
    ):
        found = drift()
    assert found == sorted(
        [(node, "data", "the directory"), (site.stores[store].primary, "data", f"{address} on {store}")]
    )
    complete = "ldapsearch -Q -Y EXTERNAL -LLL -s base contextCSN | grep -c ^contextCSN || true"
    eventually(lambda: nodes.run(node, complete).strip() not in ("", "0"), 60, f"{node} having copied the directory")


def _offline(command: str) -> str:
    return f"systemctl stop slapd && {command} && systemctl start slapd"
