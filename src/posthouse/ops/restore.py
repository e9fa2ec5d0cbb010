"""`posthouse restore`: mail out of a backup, back into place or beside it; what is there already is left as it is.

have + want → steps is `plan`; the steps add and never overwrite or remove, so a command that was killed is run again.
"""

from __future__ import annotations

import base64
import imaplib
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from posthouse import run
from posthouse.directory import Account, Directory
from posthouse.mailboxes import Mailboxes, ManageSieve, SieveError
from posthouse.model import Site
from posthouse.ops import entries, past
from posthouse.ops.backup import Backup, backups, choose, stands
from posthouse.ops.imap import Folder, Message, Session
from posthouse.ops.repository import BackupError, Lent, Repository
from posthouse.remote import Remote
from posthouse.secrets import Secrets

Say = Callable[[str], None]


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
    """One change of a live mailbox: `folder` gets what it lacks, and `messages` from the folder `source` of the past."""

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


@dataclass
class Restored:
    """What a restore did, or with --check would do."""

    address: str
    backup: str
    steps: list[str]
    messages: int
    there: int

    @property
    def changed(self) -> bool:
        """Whether anything had to be done."""
        return bool(self.steps)


def plan(have: dict[str, Folder], want: dict[str, Folder], into: str | None = None) -> list[Step]:
    """The steps that bring back what a mailbox lacks of what it once held, by folders' names.

    A message is there already if its folder has it, or another one that did not have it then: it was moved. What was
    moved to the trash is not there. Beside (`into`), only what the new folder has counts.
    """
    moved: Counter[str] = Counter()
    if into is None:
        for name, folder in have.items():
            if folder.use != "\\trash":
                moved.update(message.digest for message in folder.messages)
                moved.subtract(message.digest for message in (want[name].messages if name in want else ()))
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


@dataclass
class Opened:
    """All that a restore works with."""

    site: Site
    secrets: Secrets
    repository: Repository
    remote: Remote
    directory: Directory
    primaries: dict[str, str]
    found: list[Backup]
    contents: past.Contents
    lent: Lent


@contextmanager
def opened(site: Site, secrets: Secrets, at: str | None) -> Iterator[Opened]:
    """The site, held against others, and its backups to look into, newest first. Raises BackupError, Busy."""
    repository = Repository(site, secrets)
    repository.require()
    found = choose(backups(repository), at)
    with run.exclusive(site):
        remote = Remote(site)
        primaries = stands(remote, site)
        directory = Directory(site, secrets)
        try:
            with repository.lent(remote) as lent:
                contents = past.Contents(repository)
                yield Opened(site, secrets, repository, remote, directory, primaries, found, contents, lent)
        finally:
            directory.close()


def mail(
    site: Site, secrets: Secrets, address: str, wanted: Wanted, *, at: str | None = None, check: bool = False
) -> Restored:
    """Brings an account's mail back from the newest backup that has what is wanted. Raises BackupError, StoreError."""
    with opened(site, secrets, at) as here:
        account = here.directory.get(address)
        if account is None:
            raise BackupError(f"no account {address}; if it was deleted, bring it back by: posthouse restore account")
        return _mail(here, account.store, address, wanted, check)


def account(site: Site, secrets: Secrets, address: str, *, at: str | None = None, check: bool = False) -> Restored:
    """Brings a deleted account back: entry with its password, limit, mail, rights, scripts.

    One that exists keeps its entry, and gets its mail. Aliases that are another account's now are left out.
    """
    with opened(site, secrets, at) as here:
        existing = here.directory.get(address)
        if existing:
            return _mail(here, existing.store, address, Wanted(), check)
        for backup in here.found:
            entry = entries.of_account(here.repository.dump(backup.parts["directory"], "/directory.ldif"), address)
            if entry:
                break
        else:
            raise BackupError(f"no backup has the account {address}; see: posthouse backup list")
        here.found = [one for one in here.found if one.name == backup.name]
        wish, password = entries.read(here.directory, entry)
        if wish.store not in site.stores:
            raise BackupError(
                f"{address}: its store {wish.store} is no longer in the site; add it, or another of that name"
            )
        taken = here.directory.holders([wish.address, *wish.aliases])
        steps = [f"entry with {', '.join(a for a in (wish.address, *wish.aliases) if a not in taken)}"]
        steps += [f"without {alias}: it is {taken[alias].address}'s now" for alias in wish.aliases if alias in taken]
        if check:
            held = here.contents.find(backup, address, wish.store)
            return Restored(address, backup.name, [*steps, "mailbox" if held else "an empty mailbox"], 0, 0)
        if wish.address in taken:
            raise BackupError(f"{address} is an alias of {taken[address].address} now; take it away there first")
        kept = Account(**{**vars(wish), "aliases": tuple(a for a in wish.aliases if a not in taken)})
        # As when it was made: the entry last, so that mail is accepted only when the mailbox is there.
        mailboxes = Mailboxes(site.stores[kept.store], secrets)
        try:
            mailboxes.make(address)
            mailboxes.set_quota(address, 0)
            done = _mail(here, kept.store, address, Wanted(), False)
            mailboxes.set_quota(address, kept.quota)
            threshold = site.accounts.spam_threshold if kept.spam_threshold is None else kept.spam_threshold
            mailboxes.install_script(address, threshold)
        finally:
            mailboxes.close()
        here.directory.add(kept, password)
        done.steps = steps + done.steps
        return done


def _mail(here: Opened, store: str, address: str, wanted: Wanted, check: bool) -> Restored:
    target = here.site.stores[store]
    node = here.primaries[store]
    tls = ssl.create_default_context(cadata=here.secrets.ca_cert)
    password = here.secrets.passwords["store_proxy"]
    looked = []
    for backup in here.found:
        held = here.contents.find(backup, address, store)
        looked.append(backup.name)
        if held is None:
            continue
        with past.opened(here.site, here.secrets, here.remote, here.lent, node, held, target) as (then, _):
            try:
                session = then.mailbox(address)
                want = _wanted(session, wanted)
                if want is None:
                    session.logout()
                    continue
                live = Session(target.host, target.address, 993, tls, address, "proxy", password)
                have = {name: live.details(folder) for name, folder in live.folders().items()}
                into = _wire(wanted.into) if wanted.into else None
                steps = plan(have, want, into)
                scripts = _scripts(here, then, address, store, check) if wanted == Wanted() else []
                if not check:
                    for step in steps:
                        _act(step, session, live)
                live.logout()
                session.logout()
            except (imaplib.IMAP4.error, SieveError, OSError) as error:
                raise BackupError(
                    f"{address} on {store}: {error}; nothing was overwritten, so run the command again when that is mended"
                ) from None
        count = sum(len(step.messages) for step in steps)
        there = sum(len(folder.messages) for folder in want.values()) - count
        return Restored(address, backup.name, [*map(str, steps), *scripts], count, there)
    what = wanted.identifier or wanted.folder or "any mail"
    raise BackupError(
        f"{address}: {what} is in none of the backups that were looked into ({looked[-1]} to {looked[0]}); "
        "see what there is with: posthouse backup list"
    )


def _wanted(session: Session, wanted: Wanted) -> dict[str, Folder] | None:
    """The part of a mailbox that is wanted; None if it does not have it."""
    folders = session.folders()
    if wanted.folder is not None:
        name = _wire(wanted.folder)
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
    name = f'"{step.folder}"'
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
        live.ask("OK", "SETMETADATA", name, f'({key} "{value.decode()}")')
    if step.subscribe:
        live.ask("OK", "SUBSCRIBE", name)


def _scripts(here: Opened, then: past.Past, address: str, store: str, check: bool) -> list[str]:
    """Puts back the Sieve scripts that are missing, and makes the one active that was, if none is."""
    old, active = then.scripts(address)
    sieve = ManageSieve(here.site.stores[store], ssl.create_default_context(cadata=here.secrets.ca_cert))
    sieve.login(address, "proxy", here.secrets.passwords["store_proxy"])
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


def _wire(name: str) -> str:
    """A folder's name as IMAP carries it: modified UTF-7 (RFC 3501, 5.1.3)."""
    if name.upper() == "INBOX":
        return "INBOX"
    if not name or any(ord(letter) < 32 for letter in name) or '"' in name:
        raise BackupError(f"folder {name!r}: not a name that a folder can have")
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
