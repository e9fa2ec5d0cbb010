"""Where messages are: in the mailboxes of accounts, in the queues of nodes, in bounces."""

from __future__ import annotations

import base64
import email
import imaplib
import json
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from functools import partial
from typing import NamedTuple

from posthouse.directory import Account, Directory
from posthouse.mailboxes import Mailboxes, StoreError, folder_names, quoted
from posthouse.model import Site
from posthouse.ops.queues import INSTANCES
from posthouse.probe.clients import fingerprint, header
from posthouse.remote import RemoteError
from posthouse.secrets import Secrets

# In the order in which a message passes through them. Looked at in this order, and before the mailboxes, a message on
# its way is seen at least once.
QUEUES = {tier: INSTANCES[tier] for tier in ("submission", "outbound", "mx")}
AT_ONCE = 200  # messages read whole by one command

Run = Callable[[str, str], str]  # (node, shell command) -> what it prints; RemoteError if it fails


class Copy(NamedTuple):
    """A message found somewhere.

    `digest` is None where only a part of it is left, as in a bounce. `kind`: mailbox, queue, quarantine (held mail) or
    bounce. `at`: when it came there, in Unix seconds, if that is known.
    """

    id: str
    recipient: str
    digest: str | None
    place: str
    kind: str = "mailbox"
    at: float | None = None


class Wanted:
    """What is looked for: {Message-ID: recipients}."""

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        self.recipients: dict[str, list[str]] = defaultdict(list)
        for identifier, recipient in keys:
            self.recipients[identifier].append(recipient)

    @property
    def addresses(self) -> set[str]:
        """Everybody to whom something was sent."""
        return {recipient for recipients in self.recipients.values() for recipient in recipients}


def queues(site: Site, run: Run, wanted: Wanted, unsearched: list[str]) -> Iterator[Copy]:
    """What waits in the queues, bounces included. Nodes that cannot be asked go into `unsearched`, with the reason."""
    for tier, place in QUEUES.items():
        names = [node.name for node in site.groups[tier]]
        with ThreadPoolExecutor(max(len(names), 1)) as pool:
            for name, found in zip(names, pool.map(partial(_queue, run, place, wanted), names), strict=True):
                if isinstance(found, str):
                    unsearched.append(f"{name}: the queue of {place}: {found}")
                else:
                    yield from found


def _queue(run: Run, place: str, wanted: Wanted, node: str) -> list[Copy] | str:
    """One instance's queue; or why it could not be looked at."""
    try:
        listed = [json.loads(line) for line in run(node, f"postqueue -c {place} -j").splitlines()]
        addresses = wanted.addresses
        entries = {
            entry["queue_id"]: entry
            for entry in listed
            if entry["sender"] in ("", "MAILER-DAEMON") or addresses & {to["address"] for to in entry["recipients"]}
        }
        # A message may be delivered meanwhile: then there is nothing of it to read here, and it is found further on.
        read = (
            f'for id in $(cat); do printf "%s " $id; postcat -c {place} -qhb $id 2>/dev/null | base64 -w0; echo; done'
        )
        text = run(node, f"printf %s {shlex.quote(' '.join(entries))} | {{ {read}; }}") if entries else ""
    except RemoteError as error:
        return str(error)
    found: list[Copy] = []
    for line in text.splitlines():
        identifier, _, encoded = line.partition(" ")
        data = base64.b64decode(encoded).replace(b"\n", b"\r\n")
        entry = entries[identifier]
        found += bounces(data, f"{node}:{place}/{identifier}")
        kind = "quarantine" if entry["queue_name"] == "hold" else "queue"
        waiting = {to["address"] for to in entry["recipients"]}
        for name in header(data, "Message-ID"):
            for recipient in waiting.intersection(wanted.recipients.get(name, ())):
                where = f"{node}:{place}/{identifier}"
                found.append(Copy(name, recipient, fingerprint(data), where, kind, entry["arrival_time"]))
    return found


def still_queued(run: Run, copies: Iterable[Copy], unsearched: list[str]) -> set[str]:
    """Those places of copies in queues where there still is something."""
    ids: dict[tuple[str, str], list[str]] = defaultdict(list)
    for copy in copies:
        instance, _, identifier = copy.place.rpartition("/")
        node, _, place = instance.partition(":")
        ids[node, place].append(identifier)
    there = set()
    for (node, place), asked in ids.items():
        try:
            listed = run(node, f"postqueue -c {place} -j")
        except RemoteError as error:
            unsearched.append(f"{node}: the queue of {place}: {error}")
            continue
        left = {json.loads(line)["queue_id"] for line in listed.splitlines()}
        there |= {f"{node}:{place}/{identifier}" for identifier in asked if identifier in left}
    return there


def mailboxes(site: Site, secrets: Secrets, wanted: Wanted, unsearched: list[str]) -> Iterator[Copy]:
    """What lies in mailboxes, in any folder: each account's is read once, on its own store, without its password.

    Accounts whose store cannot be asked are added to `unsearched`, with the reason. Raises DirectoryError.
    """
    owners = _owners(site, secrets, wanted.addresses)
    recipients: dict[Account, dict[str, list[str]]] = defaultdict(dict)
    for identifier, addresses in wanted.recipients.items():
        for address in addresses:
            if account := owners.get(address):
                recipients[account].setdefault(identifier, []).append(address)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda item: _mailbox(site, secrets, *item), recipients.items()):
            if isinstance(found, str):
                unsearched.append(found)
            else:
                yield from found


def _owners(site: Site, secrets: Secrets, addresses: Iterable[str]) -> Mapping[str, Account]:
    """The account behind each address, aliases and details (name+detail@…) included."""
    plain = {address: _without_detail(address) for address in addresses}
    directory = Directory(site, secrets)
    try:
        found: dict[str, Account] = {}
        for some in _some(sorted(set(plain.values())), 100):
            found |= directory.holders(some)
    finally:
        directory.close()
    return {address: found[own] for address, own in plain.items() if own in found}


def _without_detail(address: str) -> str:
    local, _, domain = address.rpartition("@")
    return f"{local.partition('+')[0]}@{domain}".lower()


def _mailbox(site: Site, secrets: Secrets, account: Account, wanted: Mapping[str, Sequence[str]]) -> list[Copy] | str:
    """What one account has of what is wanted; or why that could not be looked at."""
    if account.store not in site.stores:
        return f"{account.address}: on {account.store}, which the site does not have; see: posthouse drift {site.name}"
    found = []
    try:
        with Mailboxes(site.stores[account.store], secrets).acting_for(account.address) as imap:
            for folder in folder_names(imap.list()[1]):
                # What others let this account see is found in their own mailboxes.
                if not folder.startswith(("Other Users/", "Shared Folders/")):
                    found += _folder(imap, account, folder, wanted)
    except (StoreError, imaplib.IMAP4.error) as error:
        return f"{account.address}: {error}"
    return found


def _folder(imap: imaplib.IMAP4, account: Account, folder: str, wanted: Mapping[str, Sequence[str]]) -> list[Copy]:
    """One folder: all its headers in one go, from the store's cache; then, whole, those that are wanted."""
    place = f"{account.address}/{folder}"
    status, answer = imap.select(quoted(folder), readonly=True)
    if status != "OK":
        raise imaplib.IMAP4.error(f"{folder}: {answer[0]!r}")
    if answer == [b"0"]:
        return []
    uids = []
    for _, uid, head in _fetched(imap, "1:*", "BODY.PEEK[HEADER.FIELDS (MESSAGE-ID CONTENT-TYPE)]"):
        report = "multipart/report" in "".join(header(head, "Content-Type")).lower()
        if report or any(name in wanted for name in header(head, "Message-ID")):
            uids.append(uid)
    found: list[Copy] = []
    for some in _some(uids, AT_ONCE):
        for at, _, data in _fetched(imap, ",".join(some), "BODY.PEEK[]"):
            found += bounces(data, place)
            for name in header(data, "Message-ID"):
                digest = fingerprint(data)
                found += [Copy(name, recipient, digest, place, "mailbox", at) for recipient in wanted.get(name, ())]
    return found


def _fetched(imap: imaplib.IMAP4, uids: str, what: str) -> Iterator[tuple[float, str, bytes]]:
    """(when it came, UID, what was asked for) of messages of the selected folder."""
    status, parts = imap.uid("FETCH", uids, f"(UID INTERNALDATE {what})")
    if status != "OK":
        raise imaplib.IMAP4.error(str(parts))
    for part in parts:
        if isinstance(part, tuple):
            uid, date = re.search(rb"\bUID (\d+)", part[0]), imaplib.Internaldate2tuple(part[0])
            if not uid or not date:
                raise imaplib.IMAP4.error(f"neither UID nor date in the answer: {part[0]!r}")
            yield time.mktime(date), uid[1].decode(), part[1]


def bounces(data: bytes, place: str) -> Iterator[Copy]:
    """What a message says, if it is a report of failed delivery, about the messages that it is about."""
    if b"report" not in data:
        return
    report = email.message_from_bytes(data)
    if report.get_content_type() != "multipart/report":
        return
    parts = list(report.walk())
    original = next((name for part in parts if part is not report and (name := _message_id(part))), None)
    if original is None:
        return
    for part in parts:
        recipient = part.get("Final-Recipient")
        # A delay is announced by a report as well: the message is still on its way then.
        if recipient and str(part.get("Action", "failed")).strip().lower() == "failed":
            asked = str(part.get("Original-Recipient", recipient)).partition(";")[2].strip()
            for address in dict.fromkeys([asked, recipient.partition(";")[2].strip()]):
                yield Copy(original, address, None, f"a bounce ({place})", "bounce")


def _message_id(part: Message) -> str | None:
    """The Message-ID of a message within a report: the whole of it, or only its header."""
    if part.get_content_type() == "text/rfc822-headers":
        part = email.message_from_string(str(part.get_payload()))
    return part["Message-ID"]


def _some(items: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """The items, so many at a time."""
    return (items[start : start + count] for start in range(0, len(items), count))
