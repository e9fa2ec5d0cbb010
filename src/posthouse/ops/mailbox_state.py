"""Everything that an account's mailbox is, as data: for a move's ledger, and for comparing what was restored.

    have, want = read(there, "alice@lab.test"), read(here, "alice@lab.test")
    assert differences(want, have) == []

Read over IMAP and ManageSieve on behalf of the account, so that it is what its owner sees. A message is known by
Cyrus's GUID, the SHA-1 of all its bytes. Annotations of single messages are compared by Cyrus's own checksum of them,
one for each folder: fetching them would cost more than all the rest together.
"""

from __future__ import annotations

import imaplib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from posthouse.mailboxes import Mailboxes, quoted

# What a store says of itself, or of when something happened there, under a mailbox's annotations.
ITS_OWN = {"size", "lastupdate", "partition", "userrawquota", "freespace", "hasalarms", "uniqueid"}
# Of one folder's messages that differ, so many are named.
SHOWN = 5
VENDOR = "/shared/vendor/cmu/cyrus-imapd/"
CHECKSUMS = f"{VENDOR}synccrcs"


class Message(NamedTuple):
    """A message in a folder. `flags` are the system's, the user's own, and \\Seen; sorted, and without \\Recent."""

    guid: str
    size: int
    date: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Folder:
    """A folder. `messages` is {UID: Message}.

    checksums: Cyrus's own of messages with their flags, and of messages' annotations; empty if not known.
    """

    uidvalidity: int
    uidnext: int
    modseq: int
    uniqueid: str
    use: tuple[str, ...]
    acl: dict[str, str]
    annotations: dict[str, str]
    checksums: str
    messages: dict[int, Message] = field(repr=False)


@dataclass(frozen=True)
class MailboxState:
    """A whole mailbox. `folders` by their names as IMAP has them; `quota` is {root: {resource: limit}}."""

    folders: dict[str, Folder]
    subscriptions: frozenset[str]
    quota: dict[str, dict[str, int]]
    scripts: dict[str, tuple[str, bool]]

    @property
    def size(self) -> int:
        """Messages in all folders."""
        return sum(len(folder.messages) for folder in self.folders.values())


# What is known before it is read of a folder that was not there before.
NEW = Folder(0, 0, 0, "", (), {}, {}, "", {})

# --- reading ----------------------------------------------------------------------------------------------------------

_UID = re.compile(rb"\bUID (\d+)")
_GUID = re.compile(rb"DIGEST\.SHA1 ([0-9a-f]+)")
_SIZE = re.compile(rb"RFC822\.SIZE (\d+)")
_DATE = re.compile(rb'INTERNALDATE "([^"]+)"')
_FLAGS = re.compile(rb"FLAGS \(([^)]*)\)")
_TOKEN = re.compile(rb'\s*(?:([()])|"((?:[^"\\]|\\.)*)"|\{(\d+)\}|((?:\[[^\]]*\]|[^\s()"])+))')

for _command in ("GETMETADATA", "NAMESPACE"):
    imaplib.Commands.setdefault(_command, ("AUTH", "SELECTED"))


def read(mailboxes: Mailboxes, address: str, base: MailboxState | None = None, frozen: bool = False) -> MailboxState:
    """An account's mailbox on a store as it is now. Makes one if there is none. Raises StoreError.

    base: what was read there before; messages of folders where nothing has changed since are not read again.
    frozen: the mailbox is, since then. To read annotations and scripts Cyrus takes the lock for writing, so these are
    what `base` says; checksums too, of folders where nothing has changed since.
    """
    with mailboxes.acting_for(address) as connection:
        subscribed = {_text(words[-1]) for words in _ask(connection, "LSUB", '""', '"*"')}
        quota = {
            _text(words[0]): {_text(r): int(limit) for r, _, limit in _triples(words[1])}
            for words in _ask(connection, "GETQUOTAROOT", "INBOX", answer="QUOTA")
        }
        known = base.folders if base else {}
        found = {
            name: _folder(connection, name, use, known.get(name, NEW), frozen) for name, use in _folders(connection)
        }
    scripts = base.scripts if base and frozen else mailboxes.scripts(address)
    return MailboxState(found, frozenset(subscribed), quota, scripts)


def extent(mailboxes: Mailboxes, address: str) -> tuple[int, int]:
    """(messages, bytes) of an account's mailbox. Raises StoreError."""
    with mailboxes.acting_for(address) as connection:
        found = [dict(_pairs(_status(connection, name))) for name in folders(connection)]
    return sum(int(one[b"MESSAGES"]) for one in found), sum(int(one[b"SIZE"]) for one in found)


def identity(mailboxes: Mailboxes, address: str) -> str:
    """What makes an account's inbox the one that it is, wherever it is copied to. Raises StoreError."""
    with mailboxes.acting_for(address) as connection:
        select(connection, "INBOX")
        return str(connection.response("MAILBOXID")[1][0])


def folders(connection: imaplib.IMAP4) -> list[str]:
    """Names of the account's own folders."""
    return [name for name, _ in _folders(connection)]


def _folders(connection: imaplib.IMAP4) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The account's own folders with their special use; not what others share with it."""
    spaces = _ask(connection, "NAMESPACE")[0]
    shared = tuple(_text(space[0]) for group in spaces[1:] if isinstance(group, list) for space in group)
    for words in _ask(connection, "LIST", '""', '"*"', "RETURN", "(SPECIAL-USE)", answer="LIST"):
        flags, _, name = words
        if not _text(name).startswith(shared) and b"\\NonExistent" not in flags and b"\\Noselect" not in flags:
            marks = {b"\\hasnochildren", b"\\haschildren", b"\\noinferiors"}
            yield _text(name), tuple(sorted(_text(flag).lower() for flag in flags if flag.lower() not in marks))


def _folder(connection: imaplib.IMAP4, name: str, use: tuple[str, ...], base: Folder, frozen: bool) -> Folder:
    rights = _ask(connection, "GETACL", quoted(name), answer="ACL")[0][1:]
    count = select(connection, name)
    said = {word: connection.response(word)[1][0] for word in ("UIDVALIDITY", "UIDNEXT", "HIGHESTMODSEQ", "MAILBOXID")}
    # After the folder's own state: should mail come in between, that has changed when it is compared with this.
    known = base.annotations if frozen else _annotations(connection, name)
    folder = Folder(
        uidvalidity=int(said["UIDVALIDITY"]),
        uidnext=int(said["UIDNEXT"]),
        modseq=int(said["HIGHESTMODSEQ"]),
        uniqueid=said["MAILBOXID"].strip(b"()").decode(),
        use=use,
        acl={_text(who): _text(what) for who, what in _pairs(rights)},
        annotations={key: value for key, value in known.items() if key != CHECKSUMS},
        checksums=known.get(CHECKSUMS, ""),
        messages={},
    )
    same = all(getattr(folder, key) == getattr(base, key) for key in ("uidvalidity", "uidnext", "modseq", "uniqueid"))
    if frozen:
        folder = replace(folder, checksums=base.checksums if same else "")
    return replace(folder, messages=base.messages if same else messages(connection) if count else {})


def _annotations(connection: imaplib.IMAP4, name: str) -> dict[str, str]:
    answer = _ask(connection, "GETMETADATA", "(DEPTH infinity)", quoted(name), "(/private /shared)", answer="METADATA")
    known = {_text(key): _text(value) for key, value in _pairs(answer[0][1]) if value != b"NIL"}
    return {key: value for key, value in known.items() if key.removeprefix(VENDOR) not in ITS_OWN}


def _status(connection: imaplib.IMAP4, name: str) -> list[Any]:
    words: list[Any] = _ask(connection, "STATUS", quoted(name), "(MESSAGES SIZE)")[0][1]
    return words


def select(connection: imaplib.IMAP4, name: str) -> int:
    """Opens a folder for reading; returns how many messages it has."""
    status, data = connection.select(quoted(name), readonly=True)
    if status != "OK":
        raise imaplib.IMAP4.error(f"{name}: {data[0]!r}")
    return int(data[0] or b"0")


def messages(connection: imaplib.IMAP4, uids: str = "1:*") -> dict[int, Message]:
    """Messages of the selected folder by UID."""
    status, lines = connection.uid("FETCH", uids, "(FLAGS INTERNALDATE RFC822.SIZE DIGEST.SHA1)")
    if status != "OK":
        raise imaplib.IMAP4.error(f"FETCH: {lines!r}")
    found = {}
    for line in lines:
        if line and (uid := _UID.search(line)):
            guid, size, date, flags = (pattern.search(line) for pattern in (_GUID, _SIZE, _DATE, _FLAGS))
            if guid and size and date and flags:
                kept = sorted({flag.decode() for flag in flags[1].split()} - {"\\Recent"})
                found[int(uid[1])] = Message(guid[1].decode(), int(size[1]), date[1].decode().strip(), tuple(kept))
    return found


def _ask(connection: imaplib.IMAP4, command: str, *arguments: str, answer: str | None = None) -> list[list[Any]]:
    """A command's untagged answers, each as nested lists of bytes."""
    status, data = connection._simple_command(command, *arguments)
    if status != "OK":
        raise imaplib.IMAP4.error(f"{command}: {data[0].decode('utf-8', 'replace')}")
    _, parts = connection._untagged_response(status, data, answer or command)
    return list(_answers([part for part in parts if part]))


def _answers(parts: list[Any]) -> Iterator[list[Any]]:
    """imaplib's pieces of several answers → each answer as nested lists. One that ends in a literal goes on."""
    tokens: list[Any] = []
    stack = [tokens]
    for part in parts:
        head, literal = part if isinstance(part, tuple) else (part, None)
        position = 0
        while (match := _TOKEN.match(head, position)) is not None:
            position = match.end()
            bracket, string, length, atom = match.groups()
            if bracket == b"(":
                stack[-1].append([])
                stack.append(stack[-1][-1])
            elif bracket == b")":
                stack.pop()
            elif length is None:
                stack[-1].append(atom if string is None else re.sub(rb"\\(.)", rb"\1", string))
        if literal is not None:
            stack[-1].append(literal)
        else:
            yield tokens
            tokens = []
            stack = [tokens]


def _pairs(words: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(words[::2], words[1::2], strict=True)


def _triples(words: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    return zip(words[::3], words[1::3], words[2::3], strict=True)


def _text(word: bytes) -> str:
    return word.decode("utf-8", "surrogateescape")


# --- comparing --------------------------------------------------------------------------------------------------------


def differences(want: MailboxState, have: MailboxState) -> list[str]:
    """What is not the same, a sentence each; empty if nothing is."""
    found = [f"folder {name} is missing" for name in want.folders if name not in have.folders]
    found += [f"folder {name} should not be there" for name in have.folders if name not in want.folders]
    for name in want.folders.keys() & have.folders.keys():
        found += [f"folder {name}: {line}" for line in _folder_differences(want.folders[name], have.folders[name])]
    for name in sorted(want.subscriptions ^ have.subscriptions):
        found.append(f"subscription to {name}: {'missing' if name in want.subscriptions else 'should not be there'}")
    found += _dict_differences("quota of", want.quota, have.quota)
    found += _dict_differences(
        "Sieve script",
        {name: f"{len(text)} characters{', active' * active}" for name, (text, active) in want.scripts.items()},
        {name: f"{len(text)} characters{', active' * active}" for name, (text, active) in have.scripts.items()},
    )
    for name in want.scripts.keys() & have.scripts.keys():
        if want.scripts[name][0] != have.scripts[name][0]:
            found.append(f"Sieve script {name}: another text")
    return found


def _folder_differences(want: Folder, have: Folder) -> Iterator[str]:
    for name in (f.name for f in fields(Folder) if f.name not in ("messages", "acl", "annotations")):
        before, after = getattr(want, name), getattr(have, name)
        if before != after and not (name == "checksums" and "" in (before, after)):
            yield f"{name} is {after}, not {before}"
    yield from _dict_differences("rights of", want.acl, have.acl)
    yield from _dict_differences("annotation", want.annotations, have.annotations)
    uids = sorted(want.messages.items() ^ have.messages.items())
    different = sorted({uid for uid, _ in uids})
    for uid in different[:SHOWN]:
        before, after = want.messages.get(uid), have.messages.get(uid)
        if before is None or after is None:
            yield f"UID {uid}: {'missing' if after is None else 'should not be there'}"
        else:
            yield f"UID {uid}: " + ", ".join(
                f"{name} is {now}, not {was}"
                for name, was, now in zip(Message._fields, before, after, strict=True)
                if was != now
            )
    if len(different) > SHOWN:
        yield f"and {len(different) - SHOWN} more messages"


def _dict_differences(what: str, want: dict[str, Any], have: dict[str, Any]) -> list[str]:
    return [
        f"{what} {key}: {have.get(key, 'none')}, not {want.get(key, 'none')}"
        for key in sorted(want.keys() | have.keys())
        if want.get(key) != have.get(key)
    ]
