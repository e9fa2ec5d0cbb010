"""What people do with their mailboxes, through the access proxy."""

from __future__ import annotations

import imaplib
import json
import poplib
import smtplib
import time
import uuid

import pytest
from conftest import ARRIVES

from posthouse.probe.clients import Imap, Person, Pop, Sieve, Smtp, eventually, header, letter

SENDER = "stranger@example.net"
WRONG = "not-the-password"


def test_right_store(platform, nodes, people):
    """IMAP, POP3 and ManageSieve each reach the user's own store"""
    for person in (people.alice, people.bob):
        with Imap(platform, person) as imap:
            imap.create("Ours")
        Pop(platform, person).quit()
        sieve = Sieve(platform, person)
        sieve.activate("keep;", "ours")
        sieve.close()
        local, _, domain = person.address.partition("@")
        for store in platform.site.stores.values():
            path = f"runuser -u cyrus -- /usr/lib/cyrus/bin/mbpath -q -C /etc/cyrus/{store.name}/imapd.conf"
            there = nodes.run(
                nodes.primary(store.name),
                f"{path} 'user/{local}/Ours@{domain}' >/dev/null && echo folder; "
                f"scripts=$({path} -S -u {person.address}) && ls $scripts/ours.* >/dev/null && echo script; true",
            )
            assert there.split() == (["folder", "script"] if store.name == person.store else []), store.name
    with Imap(platform, people.alice) as imap:
        assert {"INBOX", "Drafts", "Sent", "Junk", "Trash"} <= set(imap.folders())


def test_wrong_password(platform, people):
    """A wrong password opens neither IMAP nor POP3 nor ManageSieve"""
    impostor = people.carol._replace(password=WRONG)
    with pytest.raises(imaplib.IMAP4.error):
        Imap(platform, impostor, platform.outside(40))
    with pytest.raises(poplib.error_proto):
        Pop(platform, impostor, platform.outside(41))
    with pytest.raises(ConnectionError, match="NO"):
        Sieve(platform, impostor, platform.outside(42))


def test_damping(platform, people):
    """Guessing gets slower with each try, and only for who guesses"""
    guesser = platform.outside(43)
    times = []
    # Two balanced proxies count by themselves, so it takes a few tries until one of them has seen three.
    for _ in range(5):
        started = time.monotonic()
        with pytest.raises(imaplib.IMAP4.error):
            Imap(platform, people.carol._replace(password=WRONG), guesser)
        times.append(time.monotonic() - started)
    assert times[0] > 1.5
    assert max(times) > times[0] + 1.5, times
    started = time.monotonic()
    Imap(platform, people.carol, platform.outside(44)).logout()
    assert time.monotonic() - started < max(times)


def test_suspended(platform, people):
    """A suspended account can neither log in nor submit"""
    with pytest.raises(imaplib.IMAP4.error):
        Imap(platform, people.sleeper, platform.outside(45))
    with pytest.raises(smtplib.SMTPAuthenticationError):
        Smtp(platform, 587, platform.outside(46), people.sleeper)


def test_account(platform, friend, site, posthouse):
    """An account works from when it is made until it is deleted, with the password that was set last"""
    address, store = f"brief.{uuid.uuid4().hex[:6]}@{site.domain}", next(iter(site.stores))
    secret = ("--password-stdin", "--site", site.name)
    posthouse("account", "add", address, "--store", store, *secret, text="first-password\n")
    Imap(platform, Person(address, "first-password", store)).logout()
    posthouse("account", "passwd", address, *secret, text="second-password\n")
    Imap(platform, Person(address, "second-password", store)).logout()
    assert json.loads(posthouse("account", "show", address, "--site", site.name, "--json"))["store"] == store
    posthouse("account", "delete", address, "--site", site.name)

    def answer() -> int:
        with Smtp(platform, source=friend) as client:
            return client.transaction(SENDER, address, letter(SENDER, address).data).code

    # Each node asks its own replica of the directory.
    eventually(lambda: [answer() for _ in range(4)] == [550] * 4, 60, "550 for an account that was deleted")


def test_vacation(platform, friend, people, world):
    """A vacation script, set by ManageSieve, answers each sender once"""
    sieve = Sieve(platform, people.vera)
    sieve.activate('require "vacation";\nvacation :days 7 :subject "Away" "I am away until Monday.";\n', "away")
    sieve.close()
    first, second = "eager@example.net", "other@example.net"
    for sender in (first, first, second):
        message = letter(sender, people.vera.address)
        with Smtp(platform, source=friend) as client:
            assert client.transaction(sender, people.vera.address, message.data).code == 250
        with Imap(platform, people.vera) as imap:
            eventually(lambda i=message.id: imap.messages(i), ARRIVES, "the message to who is away")
    # The answer to the other sender, whose message came last, shows that all answers are out.
    eventually(lambda: world.to(second), ARRIVES, "the vacation's answer")
    answers = world.to(first)
    assert len(answers) == 1
    assert header(answers[0].data, "Subject") == ["Away"]
    assert people.vera.address in header(answers[0].data, "From")[0]


def test_quota(platform, nodes, friend, people, full):
    """A full mailbox takes no more mail, and does not hold up the others of the same message"""
    straw = letter(SENDER, full.address, "\n".join(["y" * 70] * 6_000))
    with Smtp(platform, source=friend) as client:
        assert client.transaction(SENDER, [full.address, people.bob.address], straw.data).code == 250
    with Imap(platform, people.bob) as imap:
        eventually(lambda: imap.messages(straw.id), ARRIVES, "the same message to another user")
    # Put off, as the site says; its sender hears of it only when it has waited for days.
    eventually(lambda: "quota" in str(nodes.waiting_for(full.address)).lower(), 60, "the message in a queue, put off")
    with Imap(platform, full) as imap:
        assert imap.messages(straw.id) == []
