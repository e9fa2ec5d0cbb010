"""What breaks, and what mail does meanwhile: it waits. It is never lost, bounced or let through unscanned."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
from conftest import ARRIVES

from posthouse import lab
from posthouse.probe.clients import Imap, Smtp, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there

SENDER = "stranger@example.net"


@contextlib.contextmanager
def stopped(nodes, tier: str, *units: str, only: str | None = None) -> Iterator[None]:
    """Services are down meanwhile, on all nodes of a tier or on one."""
    names = " ".join(units)

    def everywhere(command: str) -> None:
        if only:
            nodes.run(only, command)
        else:
            nodes.each(tier, command)

    everywhere(f"systemctl stop {names}")
    try:
        yield
    finally:
        everywhere(f"systemctl start {names}")


def try_to_send(platform, friend, recipient, message):
    """The reply to one attempt to send a message from outside."""
    with Smtp(platform, source=friend) as client:
        return client.transaction(SENDER, recipient, message.data)


def sent_at_last(platform, nodes, friend, person, message) -> None:
    """A sender who was put off tries again, and the message arrives, once."""
    eventually(lambda: try_to_send(platform, friend, person.address, message).code == 250, 60, "250 after the outage")
    nodes.flush(person.address)
    with Imap(platform, person) as imap:
        assert len(eventually(lambda: imap.messages(message.id), ARRIVES, message.id)) == 1


def test_no_directory(platform, nodes, friend, people, site):
    """With every directory stopped known and unknown users get 451, and 250 and 550 again afterwards"""
    known, unknown = people.alice.address, f"nobody-here@{site.domain}"

    def answers() -> list[int]:
        with Smtp(platform, source=friend) as client:
            client.ehlo()
            client.mail(SENDER)
            return [client.rcpt(known)[0], client.rcpt(unknown)[0]]

    assert answers() == [250, 550]
    with stopped(nodes, "directory", "slapd"):
        for _ in nodes.of("mx"):
            assert answers() == [451, 451]
    eventually(lambda: answers() == [250, 550], 60, "250 for the known and 550 for the unknown user")


@pytest.mark.parametrize("unit", ["clamav-daemon", "clamav-milter", "spamd", "mimedefang"])
def test_no_scanner(platform, nodes, friend, people, unit):
    """With {unit} stopped mail gets 4xx, and is delivered only when it can be scanned"""
    message = letter(SENDER, people.carol.address)
    with stopped(nodes, "filter", unit):
        for _ in nodes.of("filter"):
            reply = try_to_send(platform, friend, people.carol.address, message)
            assert 400 <= reply.code < 500, reply
        with Imap(platform, people.carol) as imap:
            assert imap.messages(message.id) == []
    sent_at_last(platform, nodes, friend, people.carol, message)


def test_no_store(platform, nodes, friend, people, world):
    """With a store stopped its mail is taken and waits, others' mail flows, and all is delivered when it is back"""
    store = platform.site.stores[people.alice.store]
    ledger = Ledger()
    with stopped(nodes, "store", f"cyrus@{store.name}", only=nodes.primary(store.name)):
        for person in (people.alice, people.bob):
            for _ in range(3):
                message = letter(SENDER, person.address)
                assert try_to_send(platform, friend, person.address, message).code == 250
                ledger.note(message, person.address)
        with Imap(platform, people.bob) as imap:
            eventually(lambda: imap.messages(message.id), ARRIVES, "mail to the other store")
    nodes.flush(people.alice.address)
    assert_all_there(ledger, platform, nodes, [people.alice, people.bob], world)


def test_drain(platform, nodes, friend, people, site, posthouse):
    """A drained node gets no new connections while mail flows, and gets them again afterwards"""
    name = nodes.of("mx")[1]

    def sessions() -> int:
        """New connections to the node so far, in all pools of both balancers."""
        text = nodes.each("lb", "echo 'show stat' | socat - /run/haproxy/admin.sock")
        rows = [line.split(",") for stat in text.values() for line in stat.splitlines()]
        return sum(int(row[7]) for row in rows if row[1:2] == [name])

    def send() -> None:
        for _ in range(6):
            message = letter(SENDER, people.bob.address)
            assert try_to_send(platform, friend, people.bob.address, message).code == 250

    posthouse("drain", name, "--site", site.name)
    try:
        before = sessions()
        send()
        assert sessions() == before
    finally:
        posthouse("undrain", name, "--site", site.name)
    send()
    assert sessions() > before


def test_provider_lost(platform, nodes, friend, people, world, site, posthouse):
    """A mail node with a directory provider loses power: mail flows, accounts change, nothing is lost"""
    lost, kept = site.directory.providers[:2]
    others = [person for person in (people.bob, people.carol) if nodes.primary(person.store) != lost]
    everybody = [*others, people.alice]
    new = f"new-{people.bob.address}"
    ledger = Ledger()
    with Stream(platform, ledger, everybody, friend) as stream:
        eventually(lambda: stream.taken > 20, 60, "a stream of mail")
        lab.kill(site.name, lost)
        try:
            posthouse("account", "alias", people.bob.address, "--add", new, "--site", site.name)
            message = letter(SENDER, new)
            eventually(lambda: try_to_send(platform, friend, new, message).code == 250, 60, "250 for the new alias")
            with Imap(platform, people.bob) as imap:
                eventually(lambda: imap.messages(message.id), ARRIVES, "mail to an alias that was made meanwhile")
        finally:
            lab.start(site.name, lost)
        eventually(lambda: nodes.serving(lost), 60, f"{lost} serving again")
        last = stream.taken
        eventually(lambda: stream.taken > last + 10, 60, "a stream of mail")
    assert stream.longest_silence() < 10, stream.failures

    def entries(node: str) -> list[str]:
        ask = "ldapsearch -Q -LLL -Y EXTERNAL -H ldapi://%2Frun%2Fslapd%2Fldapi -o ldif-wrap=no"
        return sorted(nodes.run(node, f"{ask} -b '{site.suffix}' '*' entryCSN entryUUID").split("\n\n"))

    eventually(lambda: entries(lost) == entries(kept), 60, "the same entries on both providers")
    assert any(f"mailLocalAddress: {new}" in entry for entry in entries(lost))
    # A node that was just delivering to the lost store waits for its answer for a minute.
    nodes.flush(people.alice.address, seconds=150)
    assert_all_there(ledger, platform, nodes, everybody, world, power_cut=True)


def test_balancer_lost(platform, nodes, friend, people, site, promised):
    """The active balancer loses power: the VIP takes and hands out mail again"""
    vip = str(site.vips["mail"])
    holders = [node for node, text in nodes.each("lb", "ip -4 -o address").items() if f" {vip}/" in text]
    assert len(holders) == 1
    started = time.monotonic()
    lab.kill(site.name, holders[0])
    try:

        def served() -> bool:
            with contextlib.suppress(OSError):
                for port, greeting in ((25, b"220"), (993, b"* OK")):
                    with platform.dial(port, friend, 0.5, tls=port == 993) as connection:
                        if not connection.recv(80).startswith(greeting):
                            return False
                return True
            return False

        eventually(served, 60, "an answer from the VIP")
        promised("the VIP was served again", time.monotonic() - started, 5)
        message = letter(SENDER, people.bob.address)
        assert try_to_send(platform, friend, people.bob.address, message).code == 250
        with Imap(platform, people.bob) as imap:
            eventually(lambda: imap.messages(message.id), ARRIVES, message.id)
    finally:
        lab.start(site.name, holders[0])
    eventually(lambda: nodes.serving(holders[0]), 60, f"{holders[0]} serving again")


@pytest.mark.full
def test_soak(platform, nodes, friend, people, world, site):
    """Each node loses power in turn, three times, while mail flows: nothing that was acknowledged is lost"""
    everybody = [people.alice, people.bob, people.carol]
    ledger = Ledger()
    with Stream(platform, ledger, everybody, friend, senders=6) as stream:
        for _ in range(3):
            for node in site.nodes:
                lab.kill(site.name, node)
                lab.start(site.name, node)
                eventually(lambda n=node: nodes.serving(n), 120, f"{node} serving again")
                before = stream.taken
                eventually(lambda b=before: stream.taken > b + 20, 60, "mail flowing again")
    nodes.flush(*[person.address for person in everybody], seconds=300)
    assert_all_there(ledger, platform, nodes, everybody, world, power_cut=True)
