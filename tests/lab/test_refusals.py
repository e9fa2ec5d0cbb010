"""What is refused in the dialogue, while the sender waits: nothing of it may ever be delivered."""

from __future__ import annotations

import contextlib
from email.message import EmailMessage
from email.policy import SMTP

import pytest
from conftest import ARRIVES

from posthouse.probe.clients import Imap, Letter, Smtp, eventually, header, letter

SENDER = "stranger@example.net"
# Assembled at run time, so that no scanner minds this file.
EICAR = "".join((r"X5O!P%@AP[4\PZX54(P^)7CC)7}$", "EICAR-STANDARD-", "ANTIVIRUS-TEST-FILE!$H+H*"))
GTUBE = "".join(("XJS*C4JDBQADN1.NSBN3*2IDNEN*", "GTUBE-STANDARD-ANTI-", "UBE-TEST-EMAIL*C.34X"))


@pytest.fixture
def client(platform, friend):
    """A connection from outside to port 25."""
    with Smtp(platform, source=friend) as smtp:
        yield smtp


def test_virus(client, people):
    """A virus in an attachment gets 550 in the dialogue"""
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"], message["Subject"] = SENDER, people.alice.address, "A file"
    message.set_content("See the attachment.\n")
    message.add_attachment(EICAR.encode(), maintype="application", subtype="octet-stream", filename="eicar.com")
    reply = client.transaction(SENDER, people.alice.address, message.as_bytes())
    assert reply.code == 550, reply
    assert "virus" in reply.text


def test_spam(client, people):
    """Spam above the site's limit gets 550 in the dialogue"""
    reply = client.transaction(SENDER, people.alice.address, letter(SENDER, people.alice.address, GTUBE).data)
    assert reply.code == 550, reply
    assert "spam" in reply.text


def test_junk(platform, client, people):
    """Spam between a user's threshold and the site's limit lands in Junk, and in the inbox of a more patient user"""
    plain = letter(SENDER, people.alice.address)
    # Old habits of spammers that SpamAssassin's own rules know without asking anybody.
    body = (
        "<html><body><font size=7 color=#ff0000>Dear Friend, you have been selected! Buy cheap Viagra online: "
        '<a href="http://198.51.100.7:8080/%77%69%6e">CLAIM YOUR PRIZE NOW</a>.</font></body></html>'
    )
    head = (
        f"Message-ID: {plain.id}\r\nFrom: {SENDER}\r\nTo: undisclosed-recipients:;\r\nSubject: YOU HAVE WON A PRIZE\r\n"
        "Content-Type: text/html\r\nX-Priority: 1\r\n"
    )
    message = Letter(plain.id, f"{head}\r\n{body}\r\n".encode())
    reply = client.transaction(SENDER, [people.alice.address, people.patient.address], message.data)
    assert reply.code == 250, reply
    with Imap(platform, people.alice) as imap:
        junk = eventually(lambda: imap.messages(plain.id, "Junk"), ARRIVES, "the message in Junk")
        assert imap.messages(plain.id) == []
    score = float(header(junk[0], "X-Spam-Score")[0])
    assert platform.site.accounts.spam_threshold <= score < people.patience, score
    with Imap(platform, people.patient) as imap:
        eventually(lambda: imap.messages(plain.id), ARRIVES, "the message in the patient user's inbox")


def test_false_score(platform, client, people):
    """A sender's own X-Spam-Score is not believed"""
    message = letter(SENDER, people.alice.address, X_Spam_Score="99.0", X_Spam_Level="*" * 50)
    assert client.transaction(SENDER, people.alice.address, message.data).code == 250
    with Imap(platform, people.alice) as imap:
        got = eventually(lambda: imap.messages(message.id), ARRIVES, "the message in the inbox")[0]
    assert [float(score) < 5 for score in header(got, "X-Spam-Score")] == [True]


def test_unknown(client, people, site):
    """An unknown user gets 550"""
    reply = client.transaction(SENDER, f"nobody-here@{site.domain}", b"")
    assert reply.code == 550, reply


def test_listed(platform, people):
    """A client on a blocklist gets 550"""
    source = str(platform.site.lab.listed[0])
    with Smtp(platform, source=source) as smtp:
        reply = smtp.transaction(SENDER, people.alice.address, letter(SENDER, people.alice.address).data)
    assert reply.code == 550, reply
    assert source in reply.text


def test_pregreet(platform, people):
    """A client that does not wait for the banner is refused"""
    # An address that never behaves, so that no node ever remembers it as one that does.
    connection = platform.dial(25, platform.outside(66))
    commands = ("EHLO bot.example.net", f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{people.alice.address}>", "QUIT", "")
    connection.sendall("\r\n".join(commands).encode())
    answers = []
    with contextlib.suppress(ConnectionResetError), connection, connection.makefile("rb") as lines:
        answers = [line.decode() for line in lines]
    assert not [line for line in answers if line.startswith("250 2.1.5")], answers
    assert not answers or [line for line in answers if line.startswith("5")], answers


def test_relay(platform, friend, people, site):
    """Nobody outside can send to the outside through the platform, by whatever spelling"""
    recipients = [
        "friend@example.org",
        f"friend%example.org@{site.domain}",
        f"@{site.domain}:friend@example.org",
        f'"friend@example.org"@{site.domain}',
        f"example.org!friend@{site.domain}",
        f"friend@example.org@{site.domain}",
        "friend@[198.51.100.25]",
    ]
    for sender in (SENDER, people.alice.address):
        for recipient in recipients:
            # One connection each: who errs often in one is made to wait.
            with Smtp(platform, source=friend) as client:
                client.ehlo()
                client.docmd(f"MAIL FROM:<{sender}>")
                code, text = client.docmd(f"RCPT TO:<{recipient}>")
            assert 500 <= code < 600, (sender, recipient, code, text)


def test_smuggling(platform, friend, people):
    """A second message cannot be smuggled in behind a false end of the first"""
    hidden = f"MAIL FROM:<ceo@example.org>\r\nRCPT TO:<{people.carol.address}>\r\nDATA\r\n".encode()
    for end in (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n"):
        outer, inner = letter(SENDER, people.carol.address), letter("ceo@example.org", people.carol.address)
        client = Smtp(platform, source=friend)
        client.ehlo()
        client.mail(SENDER)
        client.rcpt(people.carol.address)
        client.docmd("DATA")
        client.send(outer.data.removesuffix(b"\r\n") + end + hidden + inner.data + b".\r\nQUIT\r\n")
        replies = [line.decode().strip() for line in client.file]
        client.close()
        # One answer to one message, one to QUIT. Whoever refuses the trick may also just hang up.
        assert [reply[:3] for reply in replies] in (["250", "221"], ["521"], ["550", "221"]), (end, replies)
        with Imap(platform, people.carol) as imap:
            if replies[0].startswith("250"):
                eventually(lambda i=imap, o=outer: i.messages(o.id), ARRIVES, "the outer message")
            # Looked for by its header, so the text inside the outer message does not count.
            assert imap.messages(inner.id) == []
