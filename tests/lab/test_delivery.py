"""Mail from outside to the mailbox: what arrives, where, and as what."""

from __future__ import annotations

import base64
import os
from email.message import EmailMessage
from email.policy import SMTP

import pytest
from conftest import ARRIVES

from posthouse.probe.clients import Imap, Letter, Pop, Smtp, assert_intact, digest, eventually, header, letter

SENDER = "stranger@example.net"


@pytest.fixture
def send(platform, friend):
    """Sends a letter from outside to the public name's port 25, and fails unless it is taken."""

    def deliver(recipients, message: Letter, options=()) -> None:
        with Smtp(platform, source=friend) as client:
            reply = client.transaction(SENDER, recipients, message.data, options)
        assert reply.code == 250, reply

    return deliver


@pytest.fixture
def arrives(platform):
    """Waits until a letter is in a person's folder, once and intact; the inbox is read by POP3 as well. Returns it."""

    def look(person, message: Letter, folder: str = "INBOX") -> bytes:
        with Imap(platform, person) as imap:
            what = f"{message.id} in {folder} of {person.address}"
            found = eventually(lambda: imap.messages(message.id, folder), ARRIVES, what)
        assert len(found) == 1
        assert_intact(message.data, found[0])
        if folder == "INBOX":
            pop = Pop(platform, person)
            assert pop.messages(message.id) == found
            pop.quit()
        return found[0]

    return look


def test_plain(send, arrives, people):
    """A plain message arrives, the same by IMAP and by POP3"""
    message = letter(SENDER, people.alice.address)
    send(people.alice.address, message)
    arrives(people.alice, message)


def test_attachments(send, arrives, people):
    """A multipart message with attachments arrives byte for byte"""
    parts = EmailMessage(policy=SMTP)
    plain = letter(SENDER, people.bob.address)
    parts["From"], parts["To"], parts["Subject"] = SENDER, people.bob.address, "Zwei Anhänge"
    parts["Message-ID"], parts["Date"] = plain.id, "Mon, 01 Jan 2024 00:00:00 +0000"
    parts.set_content("See the attachments.\n")
    parts.add_alternative("<p>See the <b>attachments</b>.</p>", subtype="html")
    parts.add_attachment(os.urandom(200_000), maintype="application", subtype="octet-stream", filename="random.bin")
    parts.add_attachment("größe;länge\n1;2\n", subtype="csv", filename="maße.csv")
    message = Letter(plain.id, parts.as_bytes())
    send(people.bob.address, message)
    arrives(people.bob, message)


def test_eight_bit(send, arrives, people):
    """An 8-bit UTF-8 message arrives byte for byte"""
    message = letter(
        SENDER,
        people.carol.address,
        "Grüße aus Öland – ‘日本語’ – Привет\n\N{GRINNING FACE}",
        MIME_Version="1.0",
        Content_Type="text/plain; charset=utf-8",
        Content_Transfer_Encoding="8bit",
        Subject="=?utf-8?B?" + base64.b64encode("Grüße".encode()).decode() + "?=",
    )
    send(people.carol.address, message, ("BODY=8BITMIME",))
    arrives(people.carol, message)


def test_awkward(send, arrives, people):
    """Dots, long and empty lines, trailing blanks, folded and repeated header fields arrive as they were"""
    plain = letter(SENDER, people.alice.address)
    head = (
        f"X-Repeated: one\r\nx-repeated:two\r\nX-Folded: a\r\n\tb  c\r\n d\r\nMessage-ID: {plain.id}\r\n"
        f"From: {SENDER}\r\nTo: {people.alice.address}\r\nDate: Mon, 01 Jan 2024 00:00:00 +0000\r\nSubject:\r\n"
    )
    body = ".\r\n..\r\n.text\r\n\r\n\r\n" + "x" * 990 + "\r\ntrailing \t \r\nFrom here on\r\n \r\n\r\n"
    message = Letter(plain.id, f"{head}\r\n{body}".encode())
    send(people.alice.address, message)
    arrives(people.alice, message)


def test_alias(send, arrives, people):
    """A message to an alias arrives"""
    message = letter(SENDER, people.alias)
    send(people.alias, message)
    arrives(people.alice, message)


def test_detail_folder(platform, send, arrives, people):
    """A message to user+detail goes into the folder of that name"""
    with Imap(platform, people.alice) as imap:
        imap.create("lists")
    address = people.alice.address.replace("@", "+lists@")
    message = letter(SENDER, address)
    send(address, message)
    arrives(people.alice, message, "lists")


def test_detail_inbox(send, arrives, people):
    """A message to user+detail goes into the inbox where there is no such folder"""
    address = people.alice.address.replace("@", "+nowhere@")
    message = letter(SENDER, address)
    send(address, message)
    arrives(people.alice, message)


def test_forward_keep(send, arrives, people):
    """A message to an account that forwards and keeps a copy arrives at both"""
    message = letter(SENDER, people.keeper.address)
    send(people.keeper.address, message)
    arrives(people.keeper, message)
    arrives(people.bob, message)


def test_forward_only(platform, send, arrives, people):
    """A message to an account that only forwards arrives there and is not kept"""
    message = letter(SENDER, people.mover.address)
    send(people.mover.address, message)
    arrives(people.bob, message)
    with Imap(platform, people.mover) as imap:
        assert imap.messages(message.id) == []


def test_forward_outside(send, people, world):
    """A message to an account that forwards to the outside leaves, unchanged"""
    message = letter(SENDER, people.traveller.address)
    send(people.traveller.address, message)
    arrival = eventually(lambda: world.to(people.elsewhere), ARRIVES, "the forwarded message outside")[0]
    assert header(arrival.data, "Message-ID") == [message.id]
    assert digest(arrival.data) == digest(message.data)


def test_two_stores(platform, nodes, send, arrives, people):
    """One message to users on different stores lies on each one's primary, and soon on the replica"""
    message = letter(SENDER, people.alice.address)
    send([people.alice.address, people.bob.address], message)
    assert people.alice.store != people.bob.store
    for person in (people.alice, people.bob):
        arrives(person, message)
        store = platform.site.stores[person.store]
        for node in (store.primary, *store.replicas):
            find = f"grep -rlF '{message.id}' /srv/store/{store.name}/spool --include='*.' || true"
            eventually(lambda n=node, f=find: nodes.run(n, f), 60, f"{message.id} in {store.name} on {node}")


def test_client_address(platform, nodes, friend, send, arrives, people):
    """Received: names the sender's true address, and the IMAP log the user's"""
    message = letter(SENDER, people.bob.address)
    send(people.bob.address, message)
    top = header(arrives(people.bob, message), "Received")
    assert any(f"[{friend}]" in line for line in top), top
    home = platform.outside(30)
    with Imap(platform, people.bob, source=home) as imap:
        imap.noop()
    logged = f"journalctl -u dovecot --since -2min -o cat | grep -F 'rip={home},' || true"
    eventually(lambda: any(nodes.each("access", logged).values()), 60, f"rip={home} in the journal of an access node")
