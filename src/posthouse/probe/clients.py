"""Mail clients as strangers and users have them, by the real protocols, through the platform's public name.

Everything is looked up in the site's own DNS and every certificate is checked against the site's CA.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import imaplib
import logging
import poplib
import re
import smtplib
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import partial
from typing import NamedTuple, Self, TypeVar

import dns.resolver
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from posthouse import secrets
from posthouse.mailboxes import folder_names, quoted
from posthouse.model import Site

Found = TypeVar("Found")
WORLD = "example.net"  # the lab's strangers; see posthouse.zones
# What delivery and signing may put before a message, and what the filter may add to its header. All else must be as it
# was sent.
TRACE = (b"return-path", b"received", b"x-sieve", b"x-cyrus-session-id", b"dkim-signature")
SCORES = (b"x-spam-score", b"x-spam-level")


class Person(NamedTuple):
    """An account's owner."""

    address: str
    password: str
    store: str


class Letter(NamedTuple):
    """A message as it is sent: its Message-ID and all of its bytes."""

    id: str
    data: bytes


class Reply(NamedTuple):
    """What a server answered."""

    code: int
    text: str


class Platform:
    """The site as its users and the world see it: one name. patience: seconds after which clients give up an answer."""

    def __init__(self, site: Site, patience: float = 60) -> None:
        self.site, self.patience = site, patience
        self.host = f"mail.{site.domain}"
        self.tls = ssl.create_default_context(cadata=secrets.load(site).ca_cert)
        self._resolver = dns.resolver.Resolver(configure=False)
        self._resolver.nameservers = [str(address) for address in site.network.resolvers]

    def outside(self, number: int) -> str:
        """An address of the rest of the world."""
        assert self.site.lab
        return str(self.site.lab.outside[number])

    def lookup(self, name: str, kind: str = "A") -> str:
        """One record from the site's DNS, as text."""
        answer = self._resolver.resolve(name, kind)[0]
        return b"".join(answer.strings).decode() if kind == "TXT" else str(answer).rstrip(".")

    def dial(
        self, port: int, source: str | None = None, timeout: float | None = None, tls: bool = False
    ) -> socket.socket:
        """A connection to the public name, from a stranger's address if `source` is given."""
        address = (self.lookup(self.host), port)
        connection = socket.create_connection(address, timeout or self.patience, (source, 0) if source else None)
        return self.tls.wrap_socket(connection, server_hostname=self.host) if tls else connection


class Smtp(smtplib.SMTP):
    """SMTP on port 25, or submission on 465 (TLS at once) and 587 (STARTTLS, logged in as a person if one is given)."""

    def __init__(
        self, platform: Platform, port: int = 25, source: str | None = None, person: Person | None = None
    ) -> None:
        self._platform, self._source = platform, source
        # Strangers name themselves as DNS does.
        name = f"host-{source.rpartition('.')[2]}.{WORLD}" if source else f"client.{WORLD}"
        super().__init__(platform.host, port, local_hostname=name, timeout=platform.patience)
        if port == 587:
            self.starttls(context=platform.tls)
        if person:
            self.login(person.address, person.password)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self._platform.dial(port, self._source, timeout, tls=port == 465)

    def transaction(
        self, sender: str, recipients: str | Iterable[str], data: bytes, options: tuple[str, ...] = ()
    ) -> Reply:
        """One message. Returns what decided it: the first refusal, else the answer to the message's end."""
        self.ehlo_or_helo_if_needed()
        steps = [partial(self.mail, sender, options)]
        steps += [partial(self.rcpt, to) for to in ([recipients] if isinstance(recipients, str) else recipients)]
        for step in steps:
            code, text = step()
            if code >= 300:
                self.rset()
                return Reply(code, text.decode())
        try:
            code, text = self.data(data)
        except smtplib.SMTPDataError as error:
            answer = error.smtp_error
            return Reply(error.smtp_code, answer if isinstance(answer, str) else answer.decode())
        return Reply(code, text.decode())


class Imap(imaplib.IMAP4_SSL):
    """A person's mail program, logged in."""

    def __init__(self, platform: Platform, person: Person, source: str | None = None) -> None:
        self._platform, self._source = platform, source
        super().__init__(platform.host, timeout=platform.patience)
        self.login(person.address, person.password)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return self._platform.dial(993, self._source, timeout, tls=True)

    def messages(self, message_id: str | None = None, folder: str = "INBOX") -> list[bytes]:
        """All messages of a folder, or those with the Message-ID, as they are; none if there is no such folder."""
        status, _ = self.select(quoted(folder), readonly=True)
        if status != "OK":
            return []
        wanted = ("HEADER", "Message-ID", f'"{message_id}"') if message_id else ("ALL",)
        numbers = self.search(None, *wanted)[1][0].decode().split()
        if not numbers:
            return []
        parts = self.fetch(",".join(numbers), "(BODY.PEEK[])")[1]
        return [part[1] for part in parts if isinstance(part, tuple)]

    def folders(self) -> list[str]:
        """Names of all folders."""
        return folder_names(self.list()[1])


class Pop(poplib.POP3_SSL):
    """A person's mail program, logged in by POP3."""

    def __init__(self, platform: Platform, person: Person, source: str | None = None) -> None:
        self._platform, self._source = platform, source
        super().__init__(platform.host, timeout=platform.patience, context=platform.tls)
        self.user(person.address)
        self.pass_(person.password)

    def _create_socket(self, timeout: float) -> socket.socket:
        return self._platform.dial(995, self._source, timeout, tls=True)

    def messages(self, message_id: str) -> list[bytes]:
        """The messages with the Message-ID, as they are."""
        found = []
        for number in range(1, self.stat()[0] + 1):
            if any(message_id.encode() in line for line in self.top(number, 0)[1]):
                found.append(b"".join(line + b"\r\n" for line in self.retr(number)[1]))
        return found


class Sieve:
    """ManageSieve (RFC 5804), logged in: put a script and make it the active one."""

    def __init__(self, platform: Platform, person: Person, source: str | None = None) -> None:
        self._socket = platform.dial(4190, source)
        self._file = self._socket.makefile("rb")
        self._answer()
        self._command("STARTTLS")
        self._socket = platform.tls.wrap_socket(self._socket, server_hostname=platform.host)
        self._file = self._socket.makefile("rb")
        self._answer()
        token = base64.b64encode(f"\0{person.address}\0{person.password}".encode()).decode()
        self._command(f'AUTHENTICATE "PLAIN" "{token}"')

    def activate(self, script: str, name: str = "test") -> None:
        """Makes a script the one that runs."""
        self._command(f'PUTSCRIPT "{name}" {{{len(script.encode())}+}}\r\n{script}')
        self._command(f'SETACTIVE "{name}"')

    def scripts(self) -> list[str]:
        """The scripts there are, as the server lists them: `"NAME"`, and `"NAME" ACTIVE`."""
        return self._command("LISTSCRIPTS")

    def close(self) -> None:
        """Takes leave."""
        self._command("LOGOUT")
        self._socket.close()

    def _command(self, text: str) -> list[str]:
        self._socket.sendall(f"{text}\r\n".encode())
        return self._answer()

    def _answer(self) -> list[str]:
        lines = []
        while line := self._file.readline():
            lines.append(line.decode().strip())
            if lines[-1].split(" ", 1)[0].upper() in ("OK", "NO", "BYE"):
                break
        if not lines or not lines[-1].upper().startswith("OK"):
            raise ConnectionError(f"ManageSieve: {' / '.join(lines) or 'connection closed'}")
        return lines[:-1]


class Arrival(NamedTuple):
    """A message that reached the outside world."""

    client: str
    sender: str
    recipients: list[str]
    data: bytes


class World(Controller):
    """The mail server of the outside world: takes everything, and remembers it."""

    def __init__(self, address: str) -> None:
        self.arrivals: list[Arrival] = []
        logging.getLogger("mail.log").setLevel(logging.WARNING)  # it tells of every connection otherwise
        super().__init__(self, hostname=address, port=25, server_hostname=f"mx.{WORLD}")

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Called by aiosmtpd for each message."""
        assert isinstance(envelope.content, bytes)
        sender, recipients = envelope.mail_from or "", list(envelope.rcpt_tos)
        client = session.peer[0] if session.peer else ""
        self.arrivals.append(Arrival(client, sender, recipients, envelope.content))
        return "250 taken"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def to(self, recipient: str) -> list[Arrival]:
        """What came for an address so far."""
        return [arrival for arrival in self.arrivals if recipient in arrival.recipients]


def introduce(platform: Platform, address: str) -> None:
    """Has every node meet a mail server of the outside world, so that none makes it wait for the banner afterwards."""

    def meet(_: int) -> None:
        client = Smtp(platform, source=address)
        client.noop()
        closed_quietly(client)

    # Connections at the same time are spread over all nodes.
    count = 2 * len(platform.site.groups["mx"])
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(meet, range(count)))


def letter(sender: str, recipient: str, body: str = "Good day.", **headers: str) -> Letter:
    """A plain message; `headers` are added to its header, or replace what would stand there (Message_ID=…)."""
    identifier = f"<{uuid.uuid4().hex}@{sender.partition('@')[2] or WORLD}>"
    fields = {"From": sender, "To": recipient, "Subject": "A letter", "Date": formatdate(), "Message-ID": identifier}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    text = "\r\n".join(body.splitlines())
    return Letter(fields["Message-ID"], f"{head}\r\n{text}\r\n".encode())


def eventually(look: Callable[[], Found], seconds: float, what: str) -> Found:
    """Looks again and again until there is something, and returns it; fails saying what did not come."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


def digest(data: bytes) -> str:
    """SHA-256 of a message's body, which nothing on the way may change."""
    return hashlib.sha256(data.partition(b"\r\n\r\n")[2]).hexdigest()


def fingerprint(data: bytes) -> str:
    """SHA-256 of a message below its trace headers: of all that its sender wrote, header and body."""
    body = data.partition(b"\r\n\r\n")[2]
    return hashlib.sha256(b"\r\n".join([*_written(data), b"", body])).hexdigest()


def assert_intact(sent: bytes, got: bytes) -> None:
    """The message is as it was sent, byte for byte, but for trace lines before it and the filter's score."""
    assert _written(got) == _written(sent), (_written(got), _written(sent))
    assert got.partition(b"\r\n\r\n")[2] == sent.partition(b"\r\n\r\n")[2]


def _written(data: bytes) -> list[bytes]:
    """The header fields that a message's sender wrote."""
    fields = [field for field in _fields(data.partition(b"\r\n\r\n")[0]) if _name(field) not in SCORES]
    while fields and _name(fields[0]) in TRACE:
        fields.pop(0)
    return fields


def _fields(head: bytes) -> list[bytes]:
    """Header fields, continuation lines included."""
    return re.split(rb"\r\n(?![ \t])", head)


def _name(field: bytes) -> bytes:
    return field.partition(b":")[0].strip().lower()


def header(data: bytes, name: str) -> list[str]:
    """The values of a header field, unfolded, topmost first."""
    fields = _fields(data.partition(b"\r\n\r\n")[0])
    return [
        " ".join(field.partition(b":")[2].decode(errors="replace").split())
        for field in fields
        if _name(field) == name.lower().encode()
    ]


def closed_quietly(client: Smtp | Imap) -> None:
    """Takes leave of a server that may be gone already."""
    with contextlib.suppress(OSError, smtplib.SMTPException, imaplib.IMAP4.error):
        client.quit() if isinstance(client, Smtp) else client.logout()
