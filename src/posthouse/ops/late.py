"""Mail that came to a copy of a mailbox which is not the account's any more: it is the account's all the same."""

from __future__ import annotations

import email
import email.policy
import imaplib
from datetime import datetime
from typing import NamedTuple

from posthouse.mailboxes import Aside, Mailboxes, StoreError, quoted
from posthouse.ops import mailbox_state


class Late(NamedTuple):
    """A whole message. `id` is its Message-ID."""

    id: str
    date: str
    flags: tuple[str, ...]
    text: bytes


def carry(address: str, source: Mailboxes, target: Mailboxes) -> int:
    """All messages of the account's mailbox on `source` that `target` has not. Returns how many. Raises StoreError."""
    with source.acting_for(address) as here:
        return _carry(address, here, {name: name for name in mailbox_state.folders(here)}, target, since=0)


def carry_aside(address: str, source: Mailboxes, found: dict[str, Aside], target: Mailboxes, since: int = 0) -> int:
    """As `carry`, of what `source` has put aside: messages that came since then (seconds since 1970)."""
    folders = source.open_aside(found)
    with source.administration() as admin:
        return _carry(address, admin, folders, target, since)


def _carry(address: str, here: imaplib.IMAP4, folders: dict[str, str], target: Mailboxes, since: int) -> int:
    """Into the same folders on `target`. folders: {name in the session `here`: the account's own name for it}."""
    late = {own: _arrived(here, name, since) for name, own in folders.items()}
    count = 0
    if any(late.values()):
        with target.acting_for(address) as there:
            for own, messages in late.items():
                count += _append(there, own, messages, since)
    return count


def _append(there: imaplib.IMAP4, name: str, late: dict[str, Late], since: int) -> int:
    folder = quoted(name)
    there.create(folder)
    known = set(_arrived(there, name, since))
    missing = [
        message for guid, message in late.items() if guid not in known and not (message.id and _has(there, message.id))
    ]
    for message in missing:
        status, answer = there.append(folder, " ".join(message.flags), f'"{message.date}"', message.text)
        if status != "OK":
            raise StoreError(f"a message that came late for {name} is refused: {answer!r}; run the command again")
    return len(missing)


def _arrived(connection: imaplib.IMAP4, name: str, since: int) -> dict[str, Late]:
    """What came to a folder since then, by GUID. Selects the folder."""
    # Not by SEARCH: in a folder that was put aside Cyrus answers it with nothing, whatever is there.
    known = mailbox_state.messages(connection) if mailbox_state.select(connection, name) else {}
    found = {}
    for uid, message in known.items():
        if datetime.strptime(message.date, "%d-%b-%Y %H:%M:%S %z").timestamp() >= since:
            data = connection.uid("FETCH", str(uid), "(BODY.PEEK[])")[1]
            text = next(part[1] for part in data if isinstance(part, tuple))
            id = email.message_from_bytes(text, policy=email.policy.default).get("Message-ID", "")
            found[message.guid] = Late(str(id).strip(), message.date, message.flags, text)
    return found


def _has(connection: imaplib.IMAP4, id: str) -> bool:
    """Whether the selected folder has a message with this Message-ID."""
    status, data = connection.uid("SEARCH", "HEADER", "Message-ID", quoted(id))
    if status != "OK":
        raise imaplib.IMAP4.error(f"SEARCH: {data!r}")
    return bool(data[0])
