"""A store as it was: files out of a backup, under a private Cyrus on the node that serves the store now."""

from __future__ import annotations

import contextlib
import json
import secrets as random
import shlex
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posthouse.mailboxes import ManageSieve
from posthouse.model import Site, Store
from posthouse.ops.backup import Backup
from posthouse.ops.imap import Session
from posthouse.ops.repository import BackupError, Lent, Repository, end
from posthouse.remote import Remote, RemoteError
from posthouse.secrets import Secrets

TOOL = "/usr/local/lib/posthouse/store-past"
# Of a node's /srv, what stays free for the mail that comes meanwhile.
RESERVE = 0.05
ROUNDED = 2048  # bytes; what a file takes beyond what it has, on average: half a block
MIB = 2**20
# Of a store, what belongs to no account alone: small, but for the list of mailboxes.
SHARED = ("/config/*.db", "/config/db", "/config/domain", "/config/quota")


@dataclass(frozen=True)
class Held:
    """Where a backup has an account: in a snapshot of a store, in the folders of these `ids` of Cyrus's."""

    backup: Backup
    store: str
    snapshot: str
    owner: str
    ids: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """What to bring back, below the store's folder."""

        def place(key: str) -> str:
            return f"uuid/{key[0]}/{key[1]}/{key}"

        mine = [f"/config/user/{place(self.owner)}", f"/sieve/{place(self.owner)}"]
        return [*SHARED, *mine, *(f"/spool/{place(key)}" for key in self.ids)]


class Contents:
    """What the stores of backups hold, read when it is asked for."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._read: dict[str, dict[str, Any]] = {}

    def accounts(self, backup: Backup, store: str) -> dict[str, Any]:
        """{address: {"id", "mailboxes": {name: [id, files]}}}; see store-snapshot."""
        snapshot = backup.parts[f"store:{store}"]
        if snapshot not in self._read:
            text = self._repository.dump(snapshot, f"/srv/store/{store}/snapshot/contents.json")
            self._read[snapshot] = json.loads(text)["accounts"]
        return self._read[snapshot]

    def find(self, backup: Backup, address: str, store: str | None) -> Held | None:
        """Where a backup has an account; `store` is looked into first. None if it has it nowhere."""
        names = [part.partition(":")[2] for part in backup.parts if part.startswith("store:")]
        for name in sorted(names, key=lambda name: (name != store, name)):
            if entry := self.accounts(backup, name).get(address):
                ids = tuple(sorted(key for key, _ in entry["mailboxes"].values()))
                return Held(backup, name, backup.parts[f"store:{name}"], entry["id"], ids)
        return None


class Past:
    """A store of the past that runs on a node."""

    def __init__(self, secrets: Secrets, store: Store, imap: int, sieve: int) -> None:
        self.store = store
        self._imap, self._sieve = imap, sieve
        self._password = secrets.passwords["store_proxy"]
        self._tls = ssl.create_default_context(cadata=secrets.ca_cert)

    def mailbox(self, address: str) -> Session:
        """The account's mailbox as it was."""
        return Session(self.store.host, "127.0.0.1", self._imap, self._tls, address, "proxy", self._password)

    def scripts(self, address: str) -> tuple[dict[str, str], str | None]:
        """The account's Sieve scripts by name, and which one was active."""
        sieve = ManageSieve(self.store, self._tls, "127.0.0.1", self._sieve)
        sieve.login(address, "proxy", self._password)
        names, active = sieve.scripts()
        found = {name: sieve.get(name) for name in names}
        sieve.close()
        return found, active


@contextlib.contextmanager
def opened(
    site: Site, secrets: Secrets, remote: Remote, lent: Lent, node: str, held: Held, target: Store, whole: bool = False
) -> Iterator[tuple[Past, str]]:
    """Brings the files of an account (or, `whole`, of its store) to the node of `target`, and runs Cyrus on them.

    Yields the store of the past and the folder it is in. All of it is gone afterwards. Raises BackupError if there is
    no room for it, or if it does not come out of the backup.
    """
    folder = f"/srv/store/{target.name}/past-{random.token_hex(6)}"
    chosen = "" if whole else f"--include-file {folder}.list"
    names = shlex.quote("" if whole else "\n".join(held.files))
    restore = f"restic restore --quiet {held.snapshot}:/srv/store/{held.store}/snapshot --target {folder} {chosen}"
    close = f"{TOOL} close {target.name} {folder}"
    try:
        listed = f"trap 'rm -f {folder}.list' EXIT\nprintf '%s\\n' {names} >{folder}.list"
        room = f"df -B1 --output=avail,size /srv/store/{target.name} | tail -n 1"
        _need_room(node, lent.run(node, f"{listed}\n{restore} --dry-run --json | tail -n 1\n{room}"))
        # Should we die before it ends, nobody else takes away what came until then.
        whole_or_none = f"done=\ntrap 'rm -f {folder}.list; [ \"$done\" ] || rm -rf {folder}' EXIT"
        made = f"install -d -o cyrus -g mail -m 0750 {folder}"
        lent.run(node, f"{listed}\n{whole_or_none}\n{made}\n{restore}\ndone=yes")
    except RemoteError as error:
        if error.status == 255:
            raise
        lines = str(error).splitlines()
        raise BackupError(
            f"{lines[0]}{f' … {lines[-1]}' if lines[1:] else ''}: this does not come out of the backup "
            f"{held.backup.name}, and nothing was brought back; see: posthouse backup check {site.name}, or take an "
            "older one with --at"
        ) from None
    try:
        imap, sieve = map(int, remote.run(node, f"{TOOL} open {target.name} {folder}").split())
    except BaseException:
        remote.run(node, close)
        raise
    ports = _free_ports()
    # Closes the store of the past when its input ends, however we end.
    link = subprocess.Popen(
        [
            *("ssh", "-F", remote.config, "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"),
            *("-L", f"127.0.0.1:{ports[0]}:127.0.0.1:{imap}", "-L", f"127.0.0.1:{ports[1]}:127.0.0.1:{sieve}"),
            *(node, f"echo ready; cat >/dev/null; {close}; echo closed"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert link.stdout is not None
    try:
        if link.stdout.readline() != b"ready\n":
            raise BackupError(f"{node}: the store of the past cannot be reached by ssh; run the command again")
        yield Past(secrets, target, *ports), folder
    finally:
        end(link)


def _need_room(node: str, printed: str) -> None:
    """Refuses what /srv of a node has no room for. printed: what restic would bring back, and what `df` says."""
    told, there = printed.strip().splitlines()
    would = json.loads(told)
    needed = would["total_bytes"] + would["total_files"] * ROUNDED
    free, size = map(int, there.split())
    usable = free - size * RESERVE
    if needed > usable:
        raise BackupError(
            f"{node}: no room: the files of the past take {needed / MIB:.0f} MiB on /srv while they are looked into, "
            f"and {max(usable, 0) / MIB:.0f} MiB may be used, for {RESERVE:.0%} of it stay free for mail; make room "
            "there; nothing was changed"
        )


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
