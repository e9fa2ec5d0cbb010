"""Everything is gone but the site's folder and its backup repository: all nodes made anew, and filled from the backup.

Nobody is let in until all of it is back: as long as a node has the mark `state.FILLING`, its daemons find no directory.
So mail is put off, and nobody hears "no such address" about an account that is about to come back.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from posthouse import image, lab, secrets
from posthouse.model import Site
from posthouse.ops import backup as backups
from posthouse.ops import failover, queues, service, state
from posthouse.ops.backup import Backup
from posthouse.ops.rebuild import FILL, stores_of
from posthouse.ops.repository import Repository
from posthouse.ops.restore import Filling
from posthouse.ops.state import FILLING, State
from posthouse.ops.steps import GOES_ON, Refused, Step, Stopped, carry_out, way_on
from posthouse.remote import Remote

MIB = 2**20
LONGEST = 24 * 3600  # s, for what grows with the site

_ENTRIES = (
    "ldapsearch -Q -Y EXTERNAL -LLL -o ldif-wrap=no '(objectClass=*)' entryUUID entryCSN | grep ^entry | sort | "
    "sha256sum"
)
_OPEN = f"""
rm -f {FILLING}
for _ in $(seq 240); do test -e /run/slapd/ldapi && exit; sleep 0.25; done
echo "slapd-open does not let its daemons at the directory; see: journalctl -u slapd-open" >&2
exit 1
"""


def plan(site: Site, have: State, name: str, parts: dict[str, int]) -> list[Step]:
    """The steps that bring a site back from the backup `name`. parts: bytes of each of its parts. Raises Refused."""
    alive = [node for node in site.nodes if node in have.deployed and node not in have.filling]
    if alive and have.filling:
        # Filled once more it would lose what people have changed since they were let in.
        shut = ", ".join(sorted(have.filling))
        raise Refused(
            f"{alive[0]}: is alive and lets people in, though {shut} does not yet; all of the backup was back by "
            f"then, so remove {FILLING} there, and see: posthouse verify {site.name}; nothing was changed"
        )
    if alive:
        raise Refused(
            f"{alive[0]}: is alive, and a site is rebuilt only from nothing; one node that is gone comes back by: "
            f"posthouse rebuild NODE --site {site.name}, and single accounts by: posthouse restore account ADDRESS "
            f"--site {site.name}; nothing was changed"
        )
    silent = [node for node in site.nodes if node not in have.answers]
    if silent and not site.lab:
        raise Refused(
            f"{silent[0]}: does not answer; have it installed first: posthouse provision reinstall {silent[0]} --site "
            f"{site.name}; nothing was changed"
        )
    held = [part.partition(":")[2] for part in parts if part.startswith("store:")]
    if strange := [store for store in held if store not in site.stores]:
        raise Refused(
            f"{strange[0]}: the backup {name} has a store of that name, and the site has none; add it to site.yml, "
            "and move its accounts away afterwards; nothing was changed"
        )
    for node in site.nodes:
        _need_room(site, node, parts)
    steps = []
    if silent:
        steps.append(Step("machines", site.name, f"start {', '.join(silent)} from the images of their classes"))
    return [
        *steps,
        Step("close", site.name, "let nobody in until the end: mail is put off, and no address is unknown"),
        Step("deploy", site.name, "converge all nodes"),
        Step("directory", site.name, f"bring back the accounts' entries of the backup {name}"),
        Step("stores", site.name, f"bring back the mail of {', '.join(held)}, {_mib(parts, 'store:')} MiB"),
        *(Step("queues", node, f"queue again what waited on {lost}", lost) for lost, node in _heirs(site, parts)),
        Step("open", site.name, "let everybody in"),
        Step("replicas", site.name, "wait until replicas have everything"),
        Step("verify", site.name, "verify all tiers of all nodes"),
    ]


def _mib(parts: dict[str, int], kind: str) -> int:
    return round(sum(size for part, size in parts.items() if part.startswith(kind)) / MIB)


def _need_room(site: Site, node: str, parts: dict[str, int]) -> None:
    """Refuses a node whose disk cannot take its stores, and the files of one of them a second time meanwhile."""
    sizes = {store.name: parts.get(f"store:{store.name}", 0) for store in stores_of(site, node)}
    served = [sizes[store.name] for store in site.stores.values() if store.primary == node]
    needed = (sum(sizes.values()) + max(served, default=0)) / MIB
    room = site.lab.srv_mib if site.lab else site.classes[site.nodes[node].klass].disk_gib * 1024
    if needed > room * FILL:
        raise Refused(
            f"{node}: no room: {', '.join(sizes)} take {needed:.0f} MiB while they come back and /srv has "
            f"{room:.0f} MiB, of which {FILL:.0%} may be used; give it a larger disk; nothing was changed"
        )


def _heirs(site: Site, parts: dict[str, int]) -> list[tuple[str, str]]:
    """(node of the backup, node that gets its queues): itself, or where the site has it no more, one with all tiers."""
    lost = [part.partition(":")[2] for part in parts if part.startswith("queues:")]
    able = [node.name for node in site.nodes.values() if {"mx", "submission", "outbound"} <= set(node.tiers)]
    able += [node.name for node in site.groups["mx"]]
    return [(name, name if name in site.nodes else able[0]) for name in lost]


def rebuild(site: Site, at: str | None = None, check: bool = False) -> dict[str, Any]:
    """Brings a whole site back from a backup. Raises BackupError, Refused, SecretsError, Stopped.

    Until anybody is let in, what was interrupted goes on with the backup that it began with, when it is run again.
    Returns the report of `carry_out`, and "backup", and "gap": {"since": what came after this time is lost, "seconds":
    how much that is}.
    """
    return _Rebuild(site, at).run(check)


class _Rebuild:
    """One run."""

    def __init__(self, site: Site, at: str | None) -> None:
        self.site, self.started = site, time.time()
        self.known = secrets.load(site)  # not `ensure`: new ones would open no repository
        self.repository = Repository(site, self.known)
        self.repository.require()
        # A lab that is down has no network yet to reach its nodes in.
        self.remote: Remote | None = None
        have = State()
        if not site.lab or lab.running(site.name):
            have = self._look()
        at = next(iter(have.filling.values()), at)
        self.backup: Backup = backups.choose(site, backups.backups(self.repository), at)[0]
        self.repository.need_intact()
        listed = backups.manifest(self.repository, self.backup)["parts"]
        self.steps = plan(site, have, self.backup.name, {part["name"]: part["bytes"] for part in listed})
        self._stack = contextlib.ExitStack()
        self._filling: Filling | None = None

    def run(self, check: bool) -> dict[str, Any]:
        """Does it."""
        since = self.backup.time
        actions = {
            "machines": self._machines,
            "close": self._close,
            "deploy": lambda _: service.deploy(self.site, filling=True),
            "directory": lambda _: f"{self.filling.directory()} accounts",
            "stores": self._stores,
            "queues": lambda step: f"{sum(self.filling.queue(step.what, step.node).values())} messages",
            "open": self._open,
            "replicas": self._replicas,
            "verify": lambda _: service.verify(self.site),
        }
        with self._stack:
            report = carry_out(f"rebuild {self.site.name}", self.steps, actions, check, self._put_back)
        gap = {"since": since.strftime("%Y-%m-%dT%H:%M:%SZ"), "seconds": round(self.started - since.timestamp(), 1)}
        return report | {"backup": self.backup.name, "gap": gap}

    def _put_back(self, begun: list[Step]) -> str:
        """Takes nothing back: whatever came out of the backup may stay. Says what is the way on."""
        if begun[0].do == "machines":
            return GOES_ON
        return way_on(lambda: plan(self.site, state.read(self.site, self.reached), self.backup.name, {}))

    @property
    def reached(self) -> Remote:
        """The nodes."""
        if self.remote is None:
            self.remote = Remote(self.site)
        return self.remote

    @property
    def filling(self) -> Filling:
        """The backup, lent to the nodes until the end."""
        if self._filling is None:
            lent = self._stack.enter_context(self.repository.lent(self.reached))
            self._filling = Filling(
                self.site, secrets.load(self.site), self.repository, self.reached, lent, self.backup, closed=True
            )
        return self._filling

    def _look(self) -> State:
        if self.site.lab:
            image.build_all(self.site)  # from here on this process is in the lab's network
        return state.read(self.site, self.reached)

    def _machines(self, _: Step) -> str:
        known = secrets.ensure(self.site)
        there = lab.running(self.site.name)
        done = lab.add(self.site, known, *self.site.nodes) if there else lab.up(self.site, known)
        return ", ".join(f"{node} {how}" for node, how in done.items() if how != "kept")

    def _close(self, _: Step) -> str:
        have = state.read(self.site, self.reached)
        # A node that was only switched off has come back with all that it had.
        plan(self.site, have, self.backup.name, {})
        state.need_answers(self.site, have, self.site.nodes)
        note = f"printf '%s\\n' {self.backup.name} >{FILLING}.new"
        keep = f"mkdir -p $(dirname {FILLING}) && {note} && sync {FILLING}.new && mv {FILLING}.new {FILLING}"
        self.reached.each(self.site.nodes, keep)
        return ""

    def _stores(self, _: Step) -> str:
        done = self.filling.stores()
        return ", ".join(f"{store}: {counts['given']} mailboxes" for store, counts in done.items())

    def _open(self, _: Step) -> str:
        nodes = [node.name for node in self.site.groups["directory"]]
        deadline = time.monotonic() + LONGEST
        while len(set((answers := self.reached.each(nodes, _ENTRIES, timeout=3600)).values())) > 1:
            if time.monotonic() > deadline:
                names = ", ".join(sorted(answers))
                see = f"posthouse drift {self.site.name}"
                raise Stopped(f"the directories of {names} do not become the same; which one differs says: {see}")
            time.sleep(1)
        self.reached.each(self.site.nodes, f"rm -f {FILLING}")
        self.reached.each(nodes, _OPEN)
        for node in self.site.nodes:
            confs = queues.instances(self.site, node).values()
            kick = "; ".join(f"postkick -c {conf} public pickup W; postqueue -c {conf} -f" for conf in confs)
            if kick:
                self.reached.run(node, kick)
        for node in self.site.nodes:
            service.await_service(self.site, self.reached, node)
        return (
            f"serving {time.time() - self.started:.0f} s after the command; what came after "
            f"{self.backup.time:%Y-%m-%d %H:%M:%S} UTC is not there"
        )

    def _replicas(self, _: Step) -> str:
        deadline = time.monotonic() + LONGEST
        while behind := self._behind():
            if time.monotonic() > deadline:
                see = f"posthouse stores {self.site.name}"
                raise Stopped(f"{behind[0]}: its replicas do not have everything; see: {see}")
            time.sleep(1)
        return ""

    def _behind(self) -> list[str]:
        """Stores of which a replica still lacks something."""
        states = failover.states(self.site, self.reached)
        found = []
        for store in self.site.stores.values():
            have = states[store.name]
            unsaid = f"find /srv/store/{store.name}/config/sync -name 'log*' -size +0"
            waits = self.site.cluster is not None and len(have.in_sync) < len(store.replicas)
            if store.replicas and (waits or self.reached.run(have.primary, unsaid).strip()):
                found.append(store.name)
        return found
