"""Mail of the past into a live mailbox: what is there already is left as it is.

have + want → steps is `plan`; the steps add and never overwrite or remove, so a command that was killed is run again.
"""

from __future__ import annotations

import base64
import imaplib
import ssl
from collections import Counter
from dataclasses import dataclass, field

from posthouse.mailboxes import ManageSieve, SieveError
from posthouse.model import Store
from posthouse.ops import past
from posthouse.ops.imap import Folder, Message, Session, literal, quoted
from posthouse.ops.repository import BackupError
from posthouse.secrets import Secrets


@dataclass(frozen=True)
class Wanted:
    """What to bring back of an account's mail: all, one folder (by its name as people read it), or of that one message.

    identifier: a Message-ID, or a UID in `folder`. into: a folder beside everything, made if need be.
    """

    folder: str | None = None
    identifier: str | None = None
    into: str | None = None


@dataclass
class Step:
    """One change of a live mailbox: `folder` gets what it lacks, and messages from the folder `source` of the past."""

    folder: str
    source: str
    create: str | None = None  # the special use to make it with, perhaps empty; None if it is there
    subscribe: bool = False
    acl: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, bytes] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.create is None and not (self.subscribe or self.acl or self.annotations or self.messages)

    def __str__(self) -> str:
        words = ["make it"] if self.create is not None else []
        words += [f"{len(self.messages)} messages"] if self.messages else []
        words += [f"rights of {', '.join(sorted(self.acl))}"] if self.acl else []
        words += [f"{len(self.annotations)} annotations"] if self.annotations else []
        words += ["subscribe"] if self.subscribe else []
        return f"{self.folder}: {', '.join(words)}"


def plan(have: dict[str, Folder], want: dict[str, Folder], into: str | None = None) -> list[Step]:
    """The steps that bring back what a mailbox lacks of what it once held, by folders' names.

    A message is there already if its folder has it, or another one that did not have it then: it was moved. What was
    moved to the trash is not there. Beside (`into`), only what the new folder has counts.
    """
    moved: Counter[str] = Counter()
    if into is None:
        for name, folder in have.items():
            if folder.use != "\\trash":
                then = want[name].messages if name in want else []
                moved += Counter(m.digest for m in folder.messages) - Counter(m.digest for m in then)
    steps = []
    for source, folder in want.items():
        target = source if into is None else into if source == "INBOX" or len(want) == 1 else f"{into}/{source}"
        now = have.get(target)
        here = Counter(message.digest for message in now.messages) if now else Counter()
        step = Step(target, source)
        if now is None:
            step.create = folder.use if into is None else ""
            step.subscribe = folder.subscribed or into is not None
        for message in folder.messages:
            if here[message.digest] > 0:
                here[message.digest] -= 1
            elif moved[message.digest] > 0:
                moved[message.digest] -= 1
            else:
                step.messages.append(message)
        if into is None:
            step.subscribe = folder.subscribed and not (now and now.subscribed)
            step.acl = {who: rights for who, rights in folder.acl.items() if not now or who not in now.acl}
            step.annotations = {
                key: value for key, value in folder.annotations.items() if not now or key not in now.annotations
            }
        if not step.empty:
            steps.append(step)
    return steps


def account_mail(
    secrets: Secrets, then: past.Past, target: Store, address: str, wanted: Wanted, check: bool
) -> tuple[list[str], int, int] | None:
    """From a store of the past into a live one: (what was done, messages that came, messages that were there).

    None if the past does not have what is wanted. Raises BackupError.
    """
    tls = ssl.create_default_context(cadata=secrets.ca_cert)
    try:
        session = then.mailbox(address)
        want = _wanted(session, wanted)
        if want is None:
            session.logout()
            return None
        password = secrets.passwords["store_proxy"]
        live = Session(target.host, target.address, 993, tls, address, "proxy", password)
        have = {name: live.details(folder) for name, folder in live.folders().items()}
        steps = plan(have, want, None if wanted.into is None else wire(wanted.into))
        scripts = _scripts(secrets, then, address, target, check) if wanted == Wanted() else []
        if not check:
            for step in steps:
                _act(step, session, live)
        live.logout()
        session.logout()
    except (imaplib.IMAP4.error, SieveError, OSError) as error:
        raise BackupError(
            f"{address} on {target.name}: {error}; nothing was overwritten: mend that, and run the command again"
        ) from None
    count = sum(len(step.messages) for step in steps)
    there = sum(len(folder.messages) for folder in want.values()) - count
    return [*map(str, steps), *scripts], count, there


def extent(then: past.Past, target: Store, address: str) -> tuple[int, int]:
    """(folders, messages) of a mailbox of the past. Raises BackupError."""
    try:
        session = then.mailbox(address)
        folders = session.folders()
        messages = sum(1 for name in folders for _ in session.messages(name))
        session.logout()
    except (imaplib.IMAP4.error, OSError) as error:
        raise BackupError(
            f"{address} on {target.name}, as it was: {error}; nothing was changed: run the command again, "
            "or look into an older backup with --at"
        ) from None
    return len(folders), messages


def _wanted(session: Session, wanted: Wanted) -> dict[str, Folder] | None:
    """The part of a mailbox that is wanted; None if it does not have it."""
    folders = session.folders()
    if wanted.folder is not None:
        name = wire(wanted.folder)
        folders = {name: folders[name]} if name in folders else {}
    if wanted.identifier is None:
        return {name: session.details(folder) for name, folder in folders.items()} or None
    for name, folder in folders.items():
        uids = [int(wanted.identifier)] if wanted.identifier.isdigit() else session.having(name, wanted.identifier)
        if not uids:
            continue
        folder.messages = [message for message in session.messages(name) if message.uid in uids]
        if folder.messages:
            return {name: folder}
    return None


def _act(step: Step, then: Session, live: Session) -> None:
    name = quoted(step.folder)
    if step.create is not None:
        try:
            live.ask("OK", "CREATE", name, *([f"(USE ({step.create}))"] if step.create else []))
        except imaplib.IMAP4.error:
            # Another folder may have that use by now.
            live.ask("OK", "CREATE", name)
    for batch in then.bodies(step.source, step.messages):
        live.add(step.folder, batch)
    for who, rights in step.acl.items():
        live.ask("OK", "SETACL", name, f'"{who}"', rights)
    for key, value in step.annotations.items():
        live.ask("OK", "SETMETADATA", name, literal(f"({key}", value, ")"))
    if step.subscribe:
        live.ask("OK", "SUBSCRIBE", name)


def _scripts(secrets: Secrets, then: past.Past, address: str, target: Store, check: bool) -> list[str]:
    """Puts back the Sieve scripts that are missing, and makes the one active that was, if none is."""
    old, active = then.scripts(address)
    sieve = ManageSieve(target, ssl.create_default_context(cadata=secrets.ca_cert))
    sieve.login(address, "proxy", secrets.passwords["store_proxy"])
    names, now = sieve.scripts()
    missing = [name for name in old if name not in names]
    steps = [f"script {name}" for name in missing]
    if active and not now:
        steps.append(f"script {active} active")
    if not check:
        for name in missing:
            sieve.put(name, old[name])
        if active and not now:
            sieve.activate(active)
    sieve.close()
    return steps


def wire(name: str) -> str:
    """A folder's name as IMAP carries it: modified UTF-7 (RFC 3501, 5.1.3)."""
    if name.upper() == "INBOX":
        return "INBOX"
    if not name or any(letter < " " or "\ud800" <= letter <= "\udfff" for letter in name) or '"' in name:
        raise BackupError(f"folder {name!r}: not a name that a folder can have; write it like Archive/2025")
    made, rest = [], ""
    for letter in [*name, ""]:
        if letter and not " " <= letter <= "~":
            rest += letter
            continue
        if rest:
            made.append("&" + _base64(rest) + "-")
            rest = ""
        made.append("&-" if letter == "&" else letter)
    return "".join(made)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-16-be")).decode().rstrip("=").replace("/", ",")
