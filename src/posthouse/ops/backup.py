"""`posthouse backup`: all that a site keeps, in one encrypted repository; taken off replicas while users go on.

A backup, called by the time it began (`20261126T121500Z`), is several snapshots of restic that carry its name:
queues:NODE, store:NAME, directory, site, and at last `manifest`, without which it is not a backup. The order matters:
what leaves a queue while the backup is made is in its store afterwards, and so in the backup, at worst twice.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from posthouse import run, sitefile
from posthouse.model import Keep, Site, Store
from posthouse.ops import failover, state
from posthouse.ops.repository import BackupError, Lent, Repository, summary
from posthouse.remote import Remote, RemoteError
from posthouse.secrets import Secrets

NAME = "%Y%m%dT%H%M%SZ"
MANIFEST = "/manifest.json"
DIRECTORY = "/directory.ldif"
# Postfix's instances by tier: the unit that runs each. Their queues are in /srv/postfix/TIER.
QUEUES = {"mx": "postfix", "submission": "postfix-submission", "outbound": "postfix-outbound"}
QUEUE_FOLDERS = "maildrop incoming active deferred hold defer bounce trace"
QUEUE_SNAPSHOT = "/srv/postfix/snapshot"
# s; a store that fails over is served again after ten, and a replica that was away for a moment has caught up.
SETTLED = 30
TRIES = 3  # a node may die while it is asked, or become the primary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One piece of a backup: what it is called, the node it is taken from, and a remark for who reads the plan."""

    name: str
    node: str
    note: str = ""
    left_out: bool = False  # the note says why

    def told(self) -> dict[str, str]:
        """For reports."""
        return {"name": self.name, "node": self.node, "note": self.note}

    def __str__(self) -> str:
        return f"{self.name} from {self.node}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Standing:
    """Who can give what: the nodes that answer, who serves each store, and (store, replica) that lack something."""

    up: frozenset[str]
    primaries: dict[str, str]
    behind: frozenset[tuple[str, str]] = frozenset()


@dataclass
class Backup:
    """A backup as it is listed. `parts` are the ids of its snapshots; without a manifest it is not complete."""

    name: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return "manifest" in self.parts

    @property
    def time(self) -> datetime:
        """When it began."""
        return datetime.strptime(self.name, NAME).replace(tzinfo=UTC)


def stands(remote: Remote, site: Site) -> dict[str, str]:
    """Which node serves each store now: the one that holds its address. Raises BackupError if none does."""
    nodes = sorted({name for store in site.stores.values() for name in (store.primary, *store.replicas)})

    def addresses(node: str) -> set[str]:
        try:
            lines = remote.run(node, "ip -4 -oneline address show").splitlines()
        except RemoteError as error:
            if error.status != 255:
                raise
            return set()
        return {line.split()[3].partition("/")[0] for line in lines}

    held: dict[str, str] = {}
    with ThreadPoolExecutor(8) as pool:
        for node, found in zip(nodes, pool.map(addresses, nodes), strict=True):
            held |= {store.name: node for store in site.stores.values() if store.address in found}
    if missing := [name for name in site.stores if name not in held]:
        raise BackupError(f"{missing[0]}: no node serves it; see: posthouse verify {site.name} --tier store")
    return held


def look(remote: Remote, site: Site) -> Standing:
    """How things stand, once nothing is failing over any more; or after half a minute. Raises BackupError."""
    deadline = time.monotonic() + SETTLED
    while True:
        have = state.read(site, remote)
        if have.filling:
            node, name = next(iter(have.filling.items()))
            raise BackupError(
                f"{node}: is being filled from the backup {name}, and what is there now is only a part of it; first "
                f"finish: posthouse rebuild --site {site.name}"
            )
        behind = _behind(remote, site, have)
        unserved = [name for name in site.stores if name not in have.primaries]
        catching_up = [node for _, node in behind if node in have.answers]
        if not unserved and not catching_up:
            break
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    if unserved:
        raise BackupError(f"{unserved[0]}: no node serves it; see: posthouse verify {site.name} --tier store")
    return Standing(have.answers, have.primaries, frozenset(behind))


def _behind(remote: Remote, site: Site, have: state.State) -> set[tuple[str, str]]:
    """(store, node) of the copies that lack something."""
    if site.cluster is None:
        return set(have.late)
    try:
        states = failover.states(site, remote)
    except failover.FailoverError:
        return set()  # then nobody serves a store, either
    return {
        (name, node)
        for name, now in states.items()
        for node in (site.stores[name].primary, *site.stores[name].replicas)
        if node != now.primary and node not in now.in_sync
    }


def plan(site: Site, have: Standing) -> list[Part]:
    """The parts of a backup in the order in which they are taken. Raises BackupError if one cannot be.

    Queues of a node that does not answer are left out: a node may be away for days, and the others' mail is worth
    a backup meanwhile.
    """
    parts = []
    for node in site.nodes.values():
        if set(QUEUES) & set(node.tiers):
            gone = node.name not in have.up
            why = "left out: the node does not answer, and what waits on it is nowhere else" if gone else ""
            parts.append(Part(f"queues:{node.name}", node.name, why, gone))
    for store in site.stores.values():
        parts.append(_store_part(store, have))
    provider = next((name for name in site.directory.providers if name in have.up), None)
    if not provider:
        raise BackupError("no provider of the directory can be reached; bring one back first")
    parts.append(Part("directory", provider))
    parts.append(Part("site", "the controller"))
    return parts


def _store_part(store: Store, have: Standing) -> Part:
    """A store comes off a replica that has everything, if there is one."""
    primary = have.primaries[store.name]
    copies = [name for name in (store.primary, *store.replicas) if name != primary and name in have.up]
    source = next((name for name in copies if (store.name, name) not in have.behind), primary)
    note = ""
    if source == primary:
        why = f", for {copies[0]} does not have everything" if copies else ""
        note = f"off its primary{why}: users wait for the moment it is frozen"
    return Part(f"store:{store.name}", source, note)


def backup(site: Site, secrets: Secrets, *, check: bool = False, say: Say = lambda text: None) -> dict[str, Any]:
    """Makes a backup.

    Returns {"backup": name, "repository", "new": whether that is made with it, "parts": [{"name", "node", "note", and
    once made "bytes", "added", "seconds", counts of a store}], "left_out": [{"name", "node", "note"}], "seconds"}.
    Raises BackupError, RemoteError; what was made until then is no backup.
    """
    started = time.monotonic()
    repository = Repository(site, secrets)
    with run.exclusive(site):
        there = repository.exists()
        if there:
            # What restic believes to be there is not stored again: on a damaged repository that makes no backup.
            repository.need_intact()
        else:
            repository.may_begin()
            say(f"makes a new repository at {repository.place}")
        remote = Remote(site)
        parts = plan(site, look(remote, site))
        name = datetime.now(UTC).strftime(NAME)
        result: dict[str, Any] = {"backup": name, "repository": repository.place, "new": not there, "check": check}
        for part in parts:
            say(str(part))
        if check:
            done = [part.told() for part in parts if not part.left_out]
            return result | {"parts": done, "left_out": [p.told() for p in parts if p.left_out], "seconds": 0.0}
        if not there:
            repository.begin()
        repository.note()
        with repository.lent(remote) as lent:
            taking = _Taking(site, repository, remote, lent, name, say)
            made = taking.all_of([part for part in parts if part.name.startswith("queues:")])
            stores = [part for part in parts if part.name.startswith("store:")]
            # One after the other on a node, so that its disk is not asked for everything at once; nodes side by side.
            turns = [[part for part in stores if part.node == node] for node in sorted({p.node for p in stores})]
            with ThreadPoolExecutor(len(turns)) as pool:
                made += [item for turn in pool.map(taking.all_of, turns) for item in turn]
            made += taking.all_of([part for part in parts if part.name in ("directory", "site")])
        result["left_out"] = [part.told() for part in taking.left_out]
        result |= {"parts": made, "seconds": round(time.monotonic() - started, 1)}
        tags = _tags(name, "manifest")
        repository.restic(
            "backup", "--host", site.name, *tags, "--stdin", "--stdin-filename", MANIFEST, text=json.dumps(result)
        )
    return result


def backups(repository: Repository) -> list[Backup]:
    """All backups of the site, oldest first, also those that were never finished."""
    found: dict[str, Backup] = {}
    for item in repository.snapshots():
        found.setdefault(item["run"], Backup(item["run"])).parts[item["part"]] = item["id"]
    return sorted(found.values(), key=lambda backup: backup.name)


def manifest(repository: Repository, backup: Backup) -> dict[str, Any]:
    """What `backup` returned when it was made."""
    data: dict[str, Any] = json.loads(repository.dump(backup.parts["manifest"], MANIFEST))
    return data


def choose(site: Site, found: list[Backup], at: str | None) -> list[Backup]:
    """The complete backups to look into, newest first: all, the one of a name, or those until a time.

    at: a backup's name, or a time like 2026-11-26 or 2026-11-26T12:15, in UTC if it does not say. Raises BackupError.
    """
    complete = [backup for backup in reversed(found) if backup.complete]
    if not complete:
        raise BackupError(f"{site.name}: there is no complete backup yet; make one with: posthouse backup {site.name}")
    if at is None:
        return complete
    if exact := [backup for backup in complete if backup.name == at]:
        return exact
    if re.match(r"\d{8}", at):
        # Python would take it for a time, and an older backup would be used unseen.
        raise BackupError(f"--at {at}: no complete backup has that name; see: posthouse backup list {site.name}")
    try:
        until = datetime.fromisoformat(at)
        until = until.replace(tzinfo=UTC) if until.tzinfo is None else until.astimezone(UTC)
        if len(at) == len("2026-11-26"):
            until += timedelta(days=1)
    except (ValueError, OverflowError):
        raise BackupError(
            f"--at {at}: neither a backup nor a time; see: posthouse backup list {site.name}, or write 2026-11-26T12:15"
        ) from None
    if earlier := [backup for backup in complete if backup.time <= until]:
        return earlier
    raise BackupError(f"--at {at}: no backup is that old; the oldest is {complete[-1].name}")


def kept(found: list[Backup], keep: Keep) -> set[str]:
    """Names of the backups that stay: the newest of each of the last so many days, weeks and months that have one.

    One that was never finished stays only if nothing newer was: it may be in the making.
    """
    complete = sorted((backup for backup in found if backup.complete), key=lambda backup: backup.name, reverse=True)
    stay = {found[-1].name} if found else set()
    for pattern, count in (("%Y-%m-%d", keep.daily), ("%G-%V", keep.weekly), ("%Y-%m", keep.monthly)):
        newest: dict[str, str] = {}
        for backup in complete:
            newest.setdefault(backup.time.strftime(pattern), backup.name)
        stay |= set(list(newest.values())[:count])
    return stay


def prune(site: Site, secrets: Secrets, *, check: bool = False) -> dict[str, list[str]]:
    """Removes the backups that the site no longer keeps, and what only they held. Returns the {"kept", "removed"}.

    Not while a drill reads them. Raises BackupError, Busy.
    """
    repository = Repository(site, secrets)
    with run.exclusive(site), run.exclusive(site, "drill"):
        repository.require()
        repository.need_intact()  # restic would forget first, and find out afterwards
        found = backups(repository)
        stay = kept(found, site.backup.keep)
        going = [backup for backup in found if backup.name not in stay]
        if going and not check:
            # Nobody else is at it, so these locks are of commands that were killed, perhaps on a node.
            repository.restic("unlock", "--remove-all")
            repository.restic("forget", "--prune", *(key for backup in going for key in backup.parts.values()))
    return {"kept": sorted(stay), "removed": [backup.name for backup in going]}


def examine(site: Site, secrets: Secrets, *, quick: bool = False) -> dict[str, Any]:
    """Reads the repository, and says what is damaged.

    quick: only whether all that should be there is; else every byte. Returns {"ok", "damage": [lines of restic],
    "backups": names, "incomplete": names}. Raises Shut, Busy.
    """
    repository = Repository(site, secrets)
    repository.require()
    with run.exclusive(site):
        damage = repository.damage(quick)
    try:
        found = backups(repository)
    except BackupError as error:
        found, damage = [], [*damage, str(error)]
    return {
        "ok": not damage,
        "damage": damage,
        "backups": [backup.name for backup in found if backup.complete],
        "incomplete": [backup.name for backup in found if not backup.complete],
    }


def _tags(name: str, part: str) -> list[str]:
    return ["--tag", f"run={name}", "--tag", f"part={part}"]


def _taken(site: Site, repository: Repository, lent: Lent, name: str, part: Part, say: Say) -> dict[str, Any]:
    """Makes one part; returns {"bytes": of all of it, "added": to the repository, "seconds", counts of a store}."""
    started = time.monotonic()
    options = shlex.join(["--json", "--host", site.name, *_tags(name, part.name)])
    kind, _, which = part.name.partition(":")
    counts: dict[str, Any] = {}
    if kind == "site":
        folder = str(sitefile.INVENTORY / site.name)
        # The password of the secrets is not kept with them.
        excluded = ["--exclude", ".vault-password"]
        printed = repository.restic("backup", *shlex.split(options), *excluded, folder)
    elif kind == "directory":
        dump = f"slapcat -f /etc/ldap/slapd.conf -b {site.suffix} -o ldif-wrap=no"
        source = f"--stdin-filename {DIRECTORY} --stdin-from-command -- {dump}"
        printed = lent.run(part.node, f"restic backup {options} {source}")
    elif kind == "queues":
        tiers = [tier for tier in QUEUES if tier in site.nodes[part.node].tiers]
        script = "\n".join(_queue_copy(tier) for tier in tiers)
        paths = f"restic backup {options} {QUEUE_SNAPSHOT}\nrm -rf {QUEUE_SNAPSHOT}"
        printed = lent.run(part.node, f"rm -rf {QUEUE_SNAPSHOT}\nmkdir -m 0700 {QUEUE_SNAPSHOT}\n{script}\n{paths}")
    else:
        snapshot = f"/srv/store/{which}/snapshot"
        script = f"/usr/local/lib/posthouse/store-snapshot {which}"
        # A link more to a message changes its ctime; the message itself stays what it was.
        printed = lent.run(part.node, f"{script}\nrestic backup {options} --ignore-ctime {snapshot}")
        counts = json.loads(printed.partition("\n")[0])
    made = summary(part.name, printed)
    seconds = round(time.monotonic() - started, 1)
    say(f"{part.name}: {made['total_bytes_processed']} bytes, {made['data_added']} of them new, {seconds} s")
    return {"bytes": made["total_bytes_processed"], "added": made["data_added"], "seconds": seconds, **counts}


class _Taking:
    """The parts of one backup, taken by and by; threads may share it."""

    def __init__(self, site: Site, repository: Repository, remote: Remote, lent: Lent, name: str, say: Say) -> None:
        self._site, self._repository, self._remote, self._lent = site, repository, remote, lent
        self._name, self._say = name, say
        self.left_out: list[Part] = []

    def all_of(self, parts: list[Part]) -> list[dict[str, Any]]:
        """Some parts, one after the other: what `backup` returns about each."""
        return [done for part in parts if (done := self._one(part))]

    def _one(self, part: Part) -> dict[str, Any] | None:
        """One part; from another node if the first one dies or changes its role while it is asked."""
        for tries in range(TRIES):
            if tries:
                part = next(p for p in plan(self._site, look(self._remote, self._site)) if p.name == part.name)
                self._say(str(part))
            if part.left_out:
                self.left_out.append(part)
                return None
            try:
                return part.told() | _taken(self._site, self._repository, self._lent, self._name, part, self._say)
            except (BackupError, RemoteError) as error:
                if tries == TRIES - 1:
                    raise
                # restic tells of its progress on the way, a line of JSON each time.
                words = [line for line in str(error).splitlines() if '"message_type"' not in line]
                self._say(f"{part.name}: {' / '.join(words) or 'broken off'}; tried again with whoever has it now")
        return None


def _queue_copy(tier: str) -> str:
    """Copies a queue while its Postfix stands still: for no longer than the copy takes, whatever becomes of us."""
    unit, target = f"{QUEUES[tier]}.service", f"{QUEUE_SNAPSHOT}/{tier}"
    return (
        f"(mkdir {target}; cd /srv/postfix/{tier}\n"
        f"if systemctl is-active --quiet {unit}; then trap 'systemctl thaw {unit}' EXIT; systemctl freeze {unit}; fi\n"
        f"timeout 20 cp -a --parents {QUEUE_FOLDERS} {target})"
    )
