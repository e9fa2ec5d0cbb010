"""What people send."""

from __future__ import annotations

import smtplib

import dkim
import pytest
from conftest import ARRIVES

from posthouse.probe.clients import Imap, Smtp, digest, eventually, header, letter

WRONG = "not-the-password"


@pytest.fixture
def home(platform):
    """An address where people sit."""
    return platform.outside(50)


def signed_by(platform, data: bytes, domain: str) -> bool:
    """Whether a message bears a DKIM signature of a domain that is valid by the key in the site's DNS."""
    assert any(f"d={domain};" in value for value in header(data, "DKIM-Signature")), header(data, "DKIM-Signature")
    return dkim.verify(data, dnsfunc=lambda name, timeout=5: platform.lookup(name.decode(), "TXT").encode())


@pytest.mark.parametrize("port", [465, 587])
def test_inside(platform, home, people, port):
    """Submission on {port} delivers inside, signed with DKIM"""
    message = letter(people.alice.address, people.bob.address)
    with Smtp(platform, port, home, people.alice) as client:
        assert client.transaction(people.alice.address, people.bob.address, message.data).code == 250
    with Imap(platform, people.bob) as imap:
        got = eventually(lambda: imap.messages(message.id), ARRIVES, "the submitted message")
    assert len(got) == 1
    assert signed_by(platform, got[0], platform.site.domain)
    assert digest(got[0]) == digest(message.data)


@pytest.mark.parametrize("port", [465, 587])
def test_outside(platform, home, people, world, port):
    """Submission on {port} delivers outside, signed with DKIM"""
    recipient = f"friend-{port}@example.net"
    message = letter(people.bob.address, recipient)
    with Smtp(platform, port, home, people.bob) as client:
        assert client.transaction(people.bob.address, recipient, message.data).code == 250
    arrival = eventually(lambda: world.to(recipient), ARRIVES, "the submitted message outside")[0]
    assert header(arrival.data, "Message-ID") == [message.id]
    assert digest(arrival.data) == digest(message.data)
    assert signed_by(platform, arrival.data, platform.site.domain)
    assert arrival.client in [node.address for node in platform.site.groups["outbound"]]


def test_alias_as_sender(platform, home, people):
    """An account may send under its alias"""
    message = letter(people.alias, people.bob.address)
    with Smtp(platform, 465, home, people.alice) as client:
        assert client.transaction(people.alias, people.bob.address, message.data).code == 250


def test_no_password(platform, home, people):
    """Submission refuses who does not log in"""
    with Smtp(platform, 587, home) as client:
        message = letter(people.alice.address, people.bob.address)
        reply = client.transaction(people.alice.address, people.bob.address, message.data)
    assert reply.code in (530, 553, 554), reply


def test_wrong_password(platform, people):
    """Submission refuses a wrong password, and offers no log-in without TLS"""
    with pytest.raises(smtplib.SMTPAuthenticationError):
        Smtp(platform, 465, platform.outside(51), people.alice._replace(password=WRONG))
    bare = smtplib.SMTP(str(platform.site.vips["mail"]), 587, timeout=30)
    bare.ehlo()
    assert not bare.has_extn("auth")
    bare.quit()


def test_foreign_sender(platform, home, people):
    """Submission refuses an envelope sender that is not the account's own"""
    for sender in (people.bob.address, "ceo@example.org"):
        with Smtp(platform, 465, home, people.alice) as client:
            message = letter(people.alice.address, people.carol.address)
            reply = client.transaction(sender, people.carol.address, message.data)
        assert reply.code == 553, (sender, reply)


def test_foreign_from(platform, home, people):
    """Submission refuses a From: that is not the account's own"""
    for author in (people.bob.address, "ceo@example.org", f"{people.alice.address}, {people.bob.address}"):
        with Smtp(platform, 587, home, people.alice) as client:
            message = letter(author, people.carol.address)
            reply = client.transaction(people.alice.address, people.carol.address, message.data)
        assert reply.code == 550, (author, reply)


def test_virus_out(platform, home, people):
    """Submission scans what leaves"""
    eicar = "".join((r"X5O!P%@AP[4\PZX54(P^)7CC)7}$", "EICAR-STANDARD-", "ANTIVIRUS-TEST-FILE!$H+H*"))
    with Smtp(platform, 465, home, people.alice) as client:
        message = letter(people.alice.address, "friend@example.net", eicar)
        reply = client.transaction(people.alice.address, "friend@example.net", message.data)
    assert reply.code == 550, reply
