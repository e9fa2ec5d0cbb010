"""Whole mailboxes over IMAP, as their owner sees them: folders with rights, messages with flags and dates.

It is what Cyrus says of a message that counts here: DIGEST.SHA1, over all of its bytes, is its identity.
"""

from __future__ import annotations

import imaplib
import re
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

TIMEOUT = 120  # s
BATCH = 100  # messages, and
BATCH_BYTES = 8 * 2**20  # of all of them together, that one command carries
# Below these Cyrus shows what others share with an account.
SHARED = ("Other Users/", "Shared Folders/")
# A copy cannot be given what Cyrus says of a folder itself.
ITS_OWN = ("/vendor/cmu/cyrus-imapd/", "/specialuse")
_TOKEN = re.compile(rb'\s*(?:(\()|(\))|"((?:[^"\\]|\\.)*)"|([^\s()"]+))')

Item = Any  # bytes, or a list of items


@dataclass(frozen=True)
class Message:
    """A message without its bytes. `annotations` is {(entry, attribute): value}, of those that are set."""

    uid: int
    digest: str
    flags: tuple[str, ...]
    date: str
    size: int
    annotations: tuple[tuple[str, str, bytes], ...] = ()


@dataclass
class Folder:
    """A folder by its name on the wire. `use` is its special use, such as \\Sent."""

    name: str
    use: str = ""
    acl: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, bytes] = field(default_factory=dict)
    subscribed: bool = False
    messages: list[Message] = field(default_factory=list)


def parsed(data: Iterable[Any]) -> list[Item]:
    """What imaplib hands out of a response, as nested lists of bytes; literals and quoted strings alike."""
    stack: list[list[Item]] = [[]]
    for part in data:
        if part is None:
            continue
        head, literal = part if isinstance(part, tuple) else (part, None)
        text = re.sub(rb"\{\d+\}$", b"", head) if literal is not None else head
        for opened, closed, quoted, atom in _TOKEN.findall(text):
            if opened:
                stack.append([])
            elif closed:
                done = stack.pop()
                stack[-1].append(done)
            else:
                stack[-1].append(atom or re.sub(rb"\\(.)", rb"\1", quoted))
        if literal is not None:
            stack[-1].append(literal)
    return stack[0]


def pairs(items: list[Item]) -> dict[str, Item]:
    """[b"UID", b"1", …] as {"UID": b"1", …}."""
    return {bytes(items[i]).decode().upper(): items[i + 1] for i in range(0, len(items) - 1, 2)}


def quoted(name: str) -> str:
    """A name as an IMAP string."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def literal(before: str, value: bytes, after: str) -> bytes:
    """An argument that holds a value of any bytes, for `ask`: a literal that waits for no answer (RFC 7888)."""
    return f"{before} {{{len(value)}+}}\r\n".encode() + value + after.encode()


class Session(imaplib.IMAP4_SSL):
    """An account's mailbox, over IMAPS to an address; the certificate must be good for the store's name."""

    def __init__(
        self, host: str, address: str, port: int, tls: ssl.SSLContext, account: str, user: str, password: str
    ) -> None:
        self._address = address
        super().__init__(host, port, ssl_context=tls, timeout=TIMEOUT)
        self.authenticate("PLAIN", lambda _: f"{account}\0{user}\0{password}".encode())

    def _create_socket(self, timeout: float | None) -> socket.socket:
        connection = socket.create_connection((self._address, self.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secured: socket.socket = self.ssl_context.wrap_socket(connection, server_hostname=self.host)
        return secured

    def ask(self, name: str, command: str, *arguments: str | bytes) -> list[Item]:
        """The untagged responses `name` to a command, parsed. Raises imaplib.IMAP4.error if it is refused."""
        for left in (name, "OK", "NO", "BAD"):
            self.untagged_responses.pop(left, None)
        # Not by imaplib's own way, which takes no literal and not every command.
        words = [word if isinstance(word, bytes) else word.encode("ascii") for word in arguments]
        status, data = self._sent(command, b" ".join([command.encode(), *words]))
        if status != "OK":
            asked = " ".join(a if isinstance(a, str) else a.decode(errors="replace") for a in arguments)
            raise self.error(f"{command} {asked}: {data[-1].decode(errors='replace')}")
        _, found = self.response(name)
        return parsed(found or [])

    def folders(self) -> dict[str, Folder]:
        """The account's own folders, without their messages, by name."""
        found: dict[str, Folder] = {}
        listed = self.ask("LIST", "LIST", '""', '"*"', "RETURN", "(SPECIAL-USE SUBSCRIBED)")
        for attributes, _, name in zip(*[iter(listed)] * 3, strict=True):
            words = {word.decode().lower() for word in attributes}
            if "\\noselect" in words or "\\nonexistent" in words or name.decode().startswith(SHARED):
                continue
            use = next((word for word in sorted(words) if word in USES), "")
            found[name.decode()] = Folder(name.decode(), use, subscribed="\\subscribed" in words)
        return found

    def details(self, folder: Folder) -> Folder:
        """Adds rights, annotations and messages to a folder."""
        name = quoted(folder.name)
        acl = self.ask("ACL", "GETACL", name)
        folder.acl = {who.decode(): rights.decode() for who, rights in zip(acl[1::2], acl[2::2], strict=True)}
        entries = self.ask("METADATA", "GETMETADATA", "(DEPTH infinity)", name, "(/private /shared)")
        for key, value in pairs(entries[1] if len(entries) > 1 else []).items():
            if value != b"NIL" and not any(own in key.lower() for own in ITS_OWN):
                folder.annotations[key.lower()] = value
        folder.messages = list(self.messages(folder.name))
        return folder

    def messages(self, folder: str) -> Iterator[Message]:
        """What a folder holds."""
        self._enter(folder)
        items = "(UID FLAGS INTERNALDATE RFC822.SIZE DIGEST.SHA1 ANNOTATION (/* (value.priv value.shared)))"
        found = self.ask("FETCH", "UID", "FETCH", "1:*", items)
        for entry in found[1::2]:
            values = pairs(entry)
            yield Message(
                uid=int(values["UID"]),
                digest=values["DIGEST.SHA1"].decode(),
                flags=tuple(sorted(flag.decode() for flag in values["FLAGS"] if flag.lower() != b"\\recent")),
                date=values["INTERNALDATE"].decode(),
                size=int(values["RFC822.SIZE"]),
                annotations=tuple(_notes(values.get("ANNOTATION", []))),
            )

    def having(self, folder: str, identifier: str) -> list[int]:
        """UIDs of the messages with a Message-ID, with or without its brackets."""
        self._enter(folder)
        bare = identifier.strip("<>").encode()
        # Whatever has it somewhere in its own, such as 11@example.net for 1@example.net.
        uids = self.ask("SEARCH", "UID", "SEARCH", "HEADER", "Message-ID", quoted(bare.decode()))
        if not uids:
            return []
        found = self.ask("FETCH", "UID", "FETCH", b",".join(uids), "(UID ENVELOPE)")
        entries = [pairs(entry) for entry in found[1::2]]
        return [int(entry["UID"]) for entry in entries if bare in _identifiers(entry["ENVELOPE"][9])]

    def bodies(self, folder: str, messages: list[Message]) -> Iterator[list[tuple[Message, bytes]]]:
        """The messages with all of their bytes, in batches that fit into memory."""
        self._enter(folder)
        for batch in batches(messages):
            uids = ",".join(str(message.uid) for message in batch)
            found = self.ask("FETCH", "UID", "FETCH", uids, "(UID BODY.PEEK[])")
            texts = {int(values["UID"]): values["BODY[]"] for values in map(pairs, found[1::2])}
            yield [(message, texts[message.uid]) for message in batch]

    def add(self, folder: str, batch: list[tuple[Message, bytes]]) -> None:
        """Appends messages with flags, dates and annotations, all or none."""
        parts = [f"APPEND {quoted(folder)}".encode()]
        for message, text in batch:
            parts.append(f' ({" ".join(message.flags)}) "{message.date}" {{{len(text)}+}}\r\n'.encode() + text)
        status, data = self._sent("APPEND", b"".join(parts))
        if status != "OK":
            raise self.error(f"{folder}: {data[-1].decode(errors='replace')}")
        if any(message.annotations for message, _ in batch):
            self._annotate(folder, batch, data[-1])

    def _sent(self, command: str, line: bytes) -> tuple[str, list[Any]]:
        tag = self._new_tag()
        self.tagged_commands[tag] = None
        self.send(tag + b" " + line + b"\r\n")
        done: tuple[str, list[Any]] = self._command_complete(command, tag)
        return done

    def _enter(self, folder: str, readonly: bool = True) -> None:
        status, data = self.select(quoted(folder), readonly)
        if status != "OK":
            raise self.error(f"{folder}: {data[-1]!r}")

    def _annotate(self, folder: str, batch: list[tuple[Message, bytes]], answer: bytes) -> None:
        match = re.search(rb"APPENDUID \d+ ([\d:,]+)", answer)
        assert match, answer
        self._enter(folder, readonly=False)
        for uid, (message, _) in zip(numbers(match[1].decode()), batch, strict=True):
            for entry, attribute, value in message.annotations:
                note = literal(f"({entry} ({attribute}", value, "))")
                self.ask("FETCH", "UID", "STORE", str(uid), "ANNOTATION", note)


USES = ("\\archive", "\\drafts", "\\flagged", "\\important", "\\junk", "\\sent", "\\snoozed", "\\trash")


def batches(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages in pieces of BATCH at most, and of BATCH_BYTES unless one alone is larger."""
    batch: list[Message] = []
    size = 0
    for message in messages:
        if batch and (len(batch) == BATCH or size + message.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += message.size
    if batch:
        yield batch


def numbers(text: str) -> list[int]:
    """A set of UIDs, `1:3,7`, as a list."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        found += range(int(first), int(last or first) + 1)
    return found


def _identifiers(value: bytes) -> list[bytes]:
    """Message-IDs in a header's value: what is in brackets, perhaps with a comment beside it, or all of it."""
    return [value.strip().strip(b"<>"), *re.findall(rb"<([^<>]*)>", value)]


def _notes(items: list[Item]) -> Iterator[tuple[str, str, bytes]]:
    for entry, values in zip(items[::2], items[1::2], strict=True):
        name = entry.decode()
        if not any(own in name for own in ITS_OWN):
            for attribute, value in zip(values[::2], values[1::2], strict=True):
                if value != b"NIL":
                    yield name, attribute.decode(), value
