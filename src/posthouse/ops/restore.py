"""`posthouse restore`: out of a backup back into place, or beside it; and all of a site at once, for `rebuild --site`.

Each verb looks at what is there and adds the rest, so a command that was killed is run again.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from posthouse import run
from posthouse import secrets as all_secrets
from posthouse.accounts import own
from posthouse.directory import Account, AddressTaken, Directory
from posthouse.mailboxes import Mailboxes
from posthouse.model import Site
from posthouse.ops import entries, past
from posthouse.ops.backup import DIRECTORY, QUEUE_SNAPSHOT, QUEUES, Backup, backups, choose, stands
from posthouse.ops.merge import Wanted, account_mail, extent
from posthouse.ops.past import Held
from posthouse.ops.repository import BackupError, Lent, Repository
from posthouse.remote import Remote
from posthouse.secrets import Secrets

Say = Callable[[str], None]
# Queues of which backups came back already, on each node: mail must not be sent twice.
DONE = "/var/lib/posthouse/restored-queues"
RESTORED = "/srv/postfix/restored"


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
    found = choose(site, backups(repository), at)
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
    address = own(site, address)
    if wanted.identifier is not None and not re.fullmatch(r"<?[\x21-\x3b=\x3f-\x7e]+>?", wanted.identifier):
        raise BackupError(
            f"message {wanted.identifier!r}: not a Message-ID, which is ASCII and like <1@example.net>; copy it out "
            "of the message's header; nothing was changed"
        )
    with opened(site, secrets, at) as here:
        account = here.directory.holders([address]).get(address)
        if account is None:
            back = f"posthouse restore account {address} --site {site.name}"
            raise BackupError(f"no account {address}; if it was deleted, bring it back by: {back}")
        if account.address != address:
            raise BackupError(f"{address} is an alias of {account.address}; name that account; nothing was changed")
        return _mail(here, account.store, address, wanted, check)


def account(site: Site, secrets: Secrets, address: str, *, at: str | None = None, check: bool = False) -> Restored:
    """Brings a deleted account back: entry with its password, limit, mail, rights, scripts.

    One that exists keeps its entry, and gets its mail. Aliases that are another account's now are left out.
    """
    address = own(site, address)
    with opened(site, secrets, at) as here:
        existing = here.directory.get(address)
        if existing:
            return _mail(here, existing.store, address, Wanted(), check)
        for backup in here.found:
            entry = entries.of_account(here.repository.dump(backup.parts["directory"], "/directory.ldif"), address)
            if entry:
                break
        else:
            raise BackupError(f"no backup has the account {address}; see: posthouse backup list {site.name}")
        wish, password = entries.read(here.directory, entry)
        if wish.store not in site.stores:
            raise BackupError(f"{address}: its store {wish.store} is no longer in the site; add one of that name")
        taken = here.directory.holders([wish.address, *wish.aliases])
        if wish.address in taken:
            raise BackupError(
                f"{address} is an alias of {taken[address].address} now; take it away there first; nothing was changed"
            )
        held = here.contents.find(backup, address, wish.store)
        if held is None:
            raise BackupError(
                f"{address}: the backup {backup.name} has its entry and no mailbox; look into an older one with --at; "
                "nothing was changed"
            )
        steps = [f"entry with {', '.join(a for a in (wish.address, *wish.aliases) if a not in taken)}"]
        steps += [f"without {alias}: it is {taken[alias].address}'s now" for alias in wish.aliases if alias in taken]
        kept = Account(**{**vars(wish), "aliases": tuple(a for a in wish.aliases if a not in taken)})
        store = site.stores[kept.store]
        mailboxes = Mailboxes(store, secrets)
        node = here.primaries[kept.store]
        with (
            # First, so that nothing is made for what does not come out of the backup.
            past.opened(site, secrets, here.remote, here.lent, node, held, store) as (then, _),
            closing(mailboxes),
        ):
            if check:
                folders, messages = extent(then, store, address)
                return Restored(address, backup.name, [*steps, f"mailbox with {folders} folders"], messages, 0)
            # As when it was made: the entry last, so that mail is accepted only when the mailbox is there.
            mailboxes.make(address)
            mailboxes.set_quota(address, 0)
            done = account_mail(secrets, then, store, address, Wanted(), False)
            if done is None:
                raise BackupError(
                    f"{address}: its mailbox in the backup {backup.name} has no folder that can be read; look into an "
                    "older one with --at"
                )
            mailboxes.set_quota(address, kept.quota)
            threshold = site.accounts.spam_threshold if kept.spam_threshold is None else kept.spam_threshold
            mailboxes.install_script(address, threshold)
        here.directory.add(kept, password)
        came, count, there = done
        return Restored(address, backup.name, steps + came, count, there)


def directory(site: Site, secrets: Secrets, *, at: str | None = None, check: bool = False) -> dict[str, Any]:
    """Takes the accounts' entries back to what they were; accounts made since stay, and each stays on its store.

    Returns {"backup", "made": addresses, "changed": {address: attributes}}.
    """
    repository = Repository(site, secrets)
    repository.require()
    backup = choose(site, backups(repository), at)[0]
    with run.exclusive(site):
        return _directory(site, secrets, repository, Remote(site), backup, check)


def queue(site: Site, secrets: Secrets, node: str, *, at: str | None = None, check: bool = False) -> dict[str, Any]:
    """Puts the messages that waited on a node at a backup into its queues again, once for each backup.

    Returns {"backup", "node", "messages": {tier: count}}.
    """
    repository = Repository(site, secrets)
    repository.require()
    found = [b for b in choose(site, backups(repository), at) if f"queues:{node}" in b.parts]
    if not found or node not in site.nodes:
        raise BackupError(
            f"{node}: no backup has queues of a node of that name; see: posthouse backup list {site.name}"
        )
    with run.exclusive(site), repository.lent(remote := Remote(site)) as lent:
        return _queue(site, lent, remote, found[0], node, node, check)


def everything(
    site: Site, secrets: Secrets, *, source: Site | None = None, at: str | None = None, say: Say = lambda text: None
) -> dict[str, Any]:
    """Fills freshly deployed nodes from a backup, of another site (`source`) if need be: a drill's.

    Returns {"backup", "directory": entries made, "stores": {store: {"given": accounts, "merged": accounts}},
    "queues": {node: messages}, "seconds"}. Raises BackupError, RemoteError, StoreError, DirectoryError.
    """
    started = time.monotonic()
    origin = source or site
    repository = Repository(origin, all_secrets.load(origin))
    repository.require()
    backup = choose(origin, backups(repository), at)[0]
    with run.exclusive(site):
        remote = Remote(site)
        say(f"backup {backup.name}")
        result: dict[str, Any] = {"backup": backup.name, "queues": {}}
        with repository.lent(remote) as lent:
            filling = Filling(site, secrets, repository, remote, lent, backup)
            result["directory"] = filling.directory()
            say(f"directory: {result['directory']} accounts")
            result["stores"] = filling.stores(say)
            # What waited to be sent is not a drill's to send.
            for node in filling.queued if source is None else ():
                result["queues"][node] = filling.queue(node, node)
                say(f"queues of {node}: {sum(result['queues'][node].values())} messages")
    return result | {"seconds": round(time.monotonic() - started, 1)}


class Filling:
    """Freshly deployed nodes, and the backup that they are filled from, a part at a time. Each part may be repeated.

    closed: nobody has been let in yet, so whatever is in the stores came from this very backup.
    """

    def __init__(
        self,
        site: Site,
        secrets: Secrets,
        repository: Repository,
        remote: Remote,
        lent: Lent,
        backup: Backup,
        closed: bool = False,
    ) -> None:
        self._site, self._secrets, self._repository = site, secrets, repository
        self._remote, self._lent, self._backup, self._closed = remote, lent, backup, closed
        self._contents = past.Contents(repository)

    @property
    def queued(self) -> list[str]:
        """The site's nodes whose queues the backup has."""
        return [node for node in self._site.nodes if f"queues:{node}" in self._backup.parts]

    def directory(self) -> int:
        """The accounts' entries; returns how many were made."""
        return len(_directory(self._site, self._secrets, self._repository, self._remote, self._backup, False)["made"])

    def stores(self, say: Say = lambda text: None) -> dict[str, dict[str, int]]:
        """All stores that the backup has, those of different nodes side by side: {store: {"given", "merged"}}."""
        primaries = stands(self._remote, self._site)
        wanted = [name for name in self._site.stores if f"store:{name}" in self._backup.parts]
        for name in wanted:
            self._contents.accounts(self._backup, name)
        # One after the other on a node, so that its disk is not asked for everything at once.
        turns = [[n for n in wanted if primaries[n] == node] for node in sorted({primaries[n] for n in wanted})]

        def in_turn(names: list[str]) -> dict[str, dict[str, int]]:
            found = {}
            for name in names:
                found[name] = done = self._store(primaries[name], name)
                say(f"{name}: {done['given']} mailboxes given to it, {done['merged']} merged with what was there")
            return found

        with ThreadPoolExecutor(max(len(turns), 1)) as pool:
            return {name: done for found in pool.map(in_turn, turns) for name, done in found.items()}

    def queue(self, source: str, node: str) -> dict[str, int]:
        """What waited in a node's queues, into those of the same or another node, once: {tier: messages}."""
        counts: dict[str, int] = _queue(self._site, self._lent, self._remote, self._backup, source, node, False)[
            "messages"
        ]
        return counts

    def _store(self, node: str, name: str) -> dict[str, int]:
        """One store: mailboxes that are not there come whole; what others lack is added to them."""
        store = self._site.stores[name]
        held = self._contents.accounts(self._backup, name)
        mailboxes = Mailboxes(store, self._secrets)
        try:
            there = [] if self._closed else [address for address in held if mailboxes.exists(address)]
        finally:
            mailboxes.close()
        missing = sorted(set(held) - set(there))
        whole = Held(self._backup, name, self._backup.parts[f"store:{name}"], "", ())
        opened = past.opened(self._site, self._secrets, self._remote, self._lent, node, whole, store, whole=True)
        with opened as (then, folder):
            if missing:
                give = f"{past.TOOL} give {name} {folder} {shlex.quote(store.address)}"
                self._remote.run(node, give, "\n".join(missing) + "\n", timeout=24 * 3600)
            for address in there:
                account_mail(self._secrets, then, store, address, Wanted(), False)
        return {"given": len(missing), "merged": len(there)}


def _mail(here: Opened, store: str, address: str, wanted: Wanted, check: bool) -> Restored:
    if store not in here.site.stores:
        raise BackupError(
            f"{address} is on {store}, which is not in the site file; write the store into it again; nothing was "
            "changed"
        )
    target = here.site.stores[store]
    node = here.primaries[store]
    looked = []
    for backup in here.found:
        held = here.contents.find(backup, address, store)
        looked.append(backup.name)
        if held is None:
            continue
        with past.opened(here.site, here.secrets, here.remote, here.lent, node, held, target) as (then, _):
            done = account_mail(here.secrets, then, target, address, wanted, check)
        if done:
            steps, count, there = done
            return Restored(address, backup.name, steps, count, there)
    what = wanted.identifier or wanted.folder or "any mail"
    raise BackupError(
        f"{address}: {what} is in none of the backups that were looked into ({looked[-1]} to {looked[0]}); "
        f"see what there is with: posthouse backup list {here.site.name}"
    )


def _directory(
    site: Site, secrets: Secrets, repository: Repository, remote: Remote, backup: Backup, check: bool
) -> dict[str, Any]:
    want = entries.accounts(repository.dump(backup.parts["directory"], DIRECTORY))
    live = Directory(site, secrets)
    try:
        live.counts(most=1)  # finds out whether a provider can be used at all
        dump = f"slapcat -f /etc/ldap/slapd.conf -b {site.suffix} -o ldif-wrap=no"
        have = entries.accounts(remote.run(live.provider, dump, timeout=3600).encode())
        missing, changed = entries.plan(have, want)
        if not check:
            _carry_out(live, missing, changed)
    finally:
        live.close()
    return {
        "backup": backup.name,
        "made": [address for address, _, _ in missing],
        "changed": {address: sorted(attributes) for address, _, attributes in changed},
    }


def _carry_out(live: Directory, missing: entries.Changes, changed: entries.Changes) -> None:
    """Sets and makes entries. An address may be another account's by now, which has to let go of it first."""
    late = []
    for address, dn, attributes in changed:
        try:
            live.replace(dn, attributes)
        except AddressTaken:
            late.append((address, dn, attributes))
    for act, changes in ((live.replace, late), (live.put, missing)):
        for address, dn, attributes in changes:
            try:
                act(dn, attributes)
            except AddressTaken as error:
                raise BackupError(
                    f"{address}: {error}, one that was made since; take it away there by: posthouse account alias "
                    "HOLDER --remove ADDRESS --site SITE; then run the command again: it does the rest"
                ) from None


def _queue(
    site: Site, lent: Lent, remote: Remote, backup: Backup, source: str, node: str, check: bool
) -> dict[str, Any]:
    """Hands queued messages to the pickup of the same Postfix: it gives each a new name, and recipients that were
    served stay served.

    A message leaves `folder` in the moment in which it is queued; so the folder that a run left which was killed has
    the rest.
    """
    snapshot = backup.parts[f"queues:{source}"]
    folder = f"{RESTORED}/{backup.name}-{source}"
    counts: dict[str, int] = {}
    lent.run(
        node,
        f"test -d {folder} && exit\nrm -rf {folder}.new\ninstall -d -m 0700 {RESTORED}\n"
        f"restic restore --quiet {snapshot}:{QUEUE_SNAPSHOT} --target {folder}.new\n"
        f"{'' if check else f'mv {folder}.new {folder}'}",
    )
    for tier in QUEUES:
        if tier not in site.nodes[node].tiers:
            continue
        mark = f"{backup.name}/{source}/{tier}"
        script = f"""set -eu
cd {folder}/{tier} 2>/dev/null || cd {folder}.new/{tier} 2>/dev/null || {{ echo 0; exit; }}
if grep -qsx {mark} {DONE}; then echo 0; exit; fi
find incoming active deferred hold maildrop -type f | wc -l
test {int(check)} = 1 && exit
find incoming active deferred hold maildrop -type f | while read -r file; do
    chown postfix:postdrop "$file"
    chmod 0700 "$file"
    touch "$file"  # it is as old as its queue takes it for
    mv "$file" "/srv/postfix/{tier}/maildrop/$(basename "$file")"
done
mkdir -p /var/lib/posthouse
echo {mark} >>{DONE}
postqueue -c {"/etc/postfix" if tier == "mx" else f"/etc/postfix-{tier}"} -f
"""
        counts[tier] = int(remote.run(node, "bash -s", script).split()[0])
    done = f"{folder}.new" if check else f"{folder}.new {folder}"
    remote.run(node, f"rm -rf {done}; rmdir --ignore-fail-on-non-empty {RESTORED}")
    return {"backup": backup.name, "node": node, "messages": counts}
