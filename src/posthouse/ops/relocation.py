"""One account to another store: what is done on the stores, in the directory, and at the access tier. See move.py."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from posthouse import PosthouseError
from posthouse.directory import Directory, DirectoryError
from posthouse.mailboxes import Aside, Mailboxes
from posthouse.model import Site
from posthouse.ops import failover, late, mailbox_state
from posthouse.ops.freeze import Freeze, FreezeError
from posthouse.ops.mailbox_state import MailboxState
from posthouse.remote import Remote, RemoteError
from posthouse.secrets import Secrets

# s for which writing may wait until it is certain that nothing is lacking on the target.
PAUSE = 5.0
# A pass that takes less is short enough for the last one to be made while writers wait. Seconds.
SHORT = 1.0
PASSES = 5
# s for a provider to answer: less than a freeze lasts after its `commit`.
ANSWER = 8
# The exit status of timeout(1) when it killed a command.
TIMED_OUT = 137
# Postfix's queue manager may use an answer of the directory for 30 s.
STRAGGLERS = 35.0
CYR_EXPIRE = "runuser -u cyrus -- /usr/lib/cyrus/bin/cyr_expire"
TRIES = 3
# s for a store's replicas to get all that came: at first a whole mailbox, then the rest of it while writers wait.
REPLICATED = 600.0
REPLICATED_SOON = 2.0
# How often it is asked meanwhile whether they live.
ASK = 20.0
# s for which a node of the access tier that does not answer is left alone.
FORGOTTEN = 60.0


class MoveError(PosthouseError):
    """A move that is refused or cannot go on; the message says where, why, and what to do."""


@dataclass
class Moved:
    """What was done. `switched`: whether the account is the target's now; `pause`: seconds for which writing waited;
    `carried`: messages that came to the source late.
    """

    address: str
    source: str
    target: str
    switched: bool = False
    passes: int = 0
    messages: int = 0
    pause: float | None = None
    seconds: float = 0.0
    carried: int = 0
    error: str | None = None
    notes: list[str] = field(default_factory=list)


Progress = Callable[[str, str], None]


class Relocation:
    """An account on its way, with connections of its own; use it as a context manager, in one thread.

    silent: {node of the access tier that did not answer: since when (monotonic)}; kept up to date.
    pause: for how many seconds writing may wait, each time, until it is certain that nothing is lacking on the target.
    """

    def __init__(
        self,
        site: Site,
        secrets: Secrets,
        remote: Remote,
        progress: Progress,
        silent: dict[str, float],
        pause: float = PAUSE,
    ) -> None:
        self._site, self._secrets, self._remote = site, secrets, remote
        self._say, self._silent, self._pause = progress, silent, pause
        self._stores: dict[str, Mailboxes] = {}
        self._dead: set[str] = set()
        # Longer than the access tier remembers which store is an account's.
        self._remembered = _seconds(site.settings("access")["access_cache_time"]) + 10

    def __enter__(self) -> Relocation:
        self.directory = Directory(self._site, self._secrets, patience=ANSWER)
        self._states = failover.states(self._site, self._remote)
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.close()
        for mailboxes in self._stores.values():
            mailboxes.close()

    def mailboxes(self, name: str) -> Mailboxes:
        """A store, by a connection that is kept."""
        if name not in self._stores:
            self._stores[name] = self._fresh(name)
        return self._stores[name]

    def _fresh(self, name: str) -> Mailboxes:
        return Mailboxes(self._site.stores[name], self._secrets)

    def move(self, moved: Moved) -> float:
        """The whole move but for the source's copy. Returns when that may go. Raises MoveError and others."""
        address, source, target = moved.address, moved.source, moved.target
        self._say(address, "copying")
        self._clear(address, source, target)
        self._start_link(source, target)
        while moved.passes < PASSES:
            started = time.monotonic()
            self._copy(address, source, target)
            moved.passes += 1
            if time.monotonic() - started < SHORT:
                break
        for _ in range(TRIES):
            self._replicate(target)
            found = self._switch(moved)
            if not found:
                self._say(address, "switched")
                moved.carried = self._retire(address, source, target)
                self._say(address, "waiting for stragglers")
                # A proxy that could not be told forgets by itself.
                return time.monotonic() + (self._remembered if moved.notes else STRAGGLERS)
            self._copy(address, source, target)
        shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
        raise MoveError(
            f"{address}: stays on {source}; the copy on {target} is not ready: {shown}; run the command again"
        )

    def _switch(self, moved: Moved) -> list[str]:
        """Freezes the source, and makes the target the account's if it is the same. Returns what it lacks."""
        address, source, target = moved.address, moved.source, moved.target
        here, there = self._read(address, source, target)
        # A provider that has died meanwhile is found out now, and not while writers wait.
        self._check_on(address, source)
        self._say(address, "freezing")
        with Freeze(self._remote, self._primary(source), source, address, self._pause) as frozen:
            started, most = time.monotonic(), self._pause
            try:
                self._say(address, "last pass")
                try:
                    self._copy(address, source, target, "move-frozen", self._pause)
                except RemoteError as error:
                    if error.status != TIMED_OUT or time.monotonic() - started < self._pause:
                        raise
                    return [f"the last pass takes more than {self._pause:g} s; --pause allows more"]
                self._say(address, "comparing")
                want, have = self._read(address, source, target, (here, there))
                # From the next step on nobody but the target's nodes has what counts.
                found = mailbox_state.differences(want, have) or self._not_replicated(target, REPLICATED_SOON)
                if found:
                    return found
                try:
                    frozen.commit(self._remembered)
                except FreezeError as error:
                    return [str(error)]
                most = math.inf
                self._say(address, "switching")
                moved.notes += self._make_theirs(address, source, target, frozen.since)
                moved.switched = True
                moved.messages = want.size
                frozen.end()
            finally:
                # However long it took to find out: before the commit, a freeze that is too long ends by itself.
                moved.pause = round(max(moved.pause or 0.0, min(time.monotonic() - started, most)), 3)
            frozen.release()
        return []

    def _read(
        self, address: str, source: str, target: str, before: tuple[MailboxState, MailboxState] | None = None
    ) -> tuple[MailboxState, MailboxState]:
        """The mailbox on both sides; the source is frozen if there is a `before`, which saves most of the work."""
        known, copied = before or (None, None)
        with ThreadPoolExecutor(2) as both:
            here = both.submit(mailbox_state.read, self._fresh(source), address, known, frozen=bool(before))
            there = both.submit(mailbox_state.read, self._fresh(target), address, copied)
            return here.result(), there.result()

    def _make_theirs(self, address: str, source: str, target: str, since: int) -> list[str]:
        """The move itself: another store in the directory. Returns whom it could not be told, as notes."""
        lost: PosthouseError | None = None
        try:
            self.directory.move(address, source, target, since)
        except DirectoryError as error:
            lost = error
        notes = [] if lost else self._send_sessions_on(address, target)
        if not lost and len(notes) < len(self._site.groups["access"]):
            return notes
        # The answer may be lost though it was done; and what nobody but one provider knows may die with it.
        account = self.directory.get(address)
        if account and account.store == target:
            notes = self._send_sessions_on(address, target)
            if len(notes) < len(self._site.groups["access"]):
                return notes
            lost = MoveError(
                f"{address}: no node of the access tier hears of its move: {notes[0]}; it stays on {source}: run the "
                "command again when one of them answers"
            )
        # Not if somebody else has moved it meanwhile.
        if account and account.store in (source, target):
            # Should a provider come back with the change, this one is newer.
            self.directory.stay(address, source)
        raise lost or MoveError(f"{address}: the directory has lost the move; run the command again")

    def _check_on(self, address: str, store: str) -> None:
        account = self.directory.get(address)
        if account is None or account.store != store:
            where = f"is on {account.store}" if account else "is no account"
            raise MoveError(
                f"{address} {where} now, and not on {store}; its mailboxes are left as they are; if it is still to "
                "move, run the command again"
            )

    def _clear(self, address: str, source: str, target: str) -> None:
        """What is on the target already is a copy that a killed move left, or it is not the account's mailbox."""
        self._check_on(address, source)
        self.check_there(address, source, target)
        if not self._is_copy(address, target, source):
            self._take_strays(address, target, source)
        former = self.mailboxes(target).aside(address)
        # Not only a folder that was deleted, of which a copy brings what is aside along.
        if any(one.name == "INBOX" for one in former.values()):
            self.mailboxes(target).open_aside(former)
            # A replica that forgets what it is being told of has Cyrus bring messages twice.
            self._replicate(target)
            self._forget_on_replicas(address, target)

    def check_there(self, address: str, store: str, other: str) -> None:
        """Refuses if the mailbox is on another store than the directory says: a login there would make a new one."""
        if not self.mailboxes(store).exists(address) and self.mailboxes(other).exists(address):
            raise MoveError(
                f"{address}: the directory has it on {store}, and its only mailbox is on {other}; send it a message or "
                f"log in, which makes one on {store}, and run the command again: it makes one of both"
            )

    def _forget_on_replicas(self, address: str, store: str) -> None:
        """Replicas keep the scripts of an account that left, of which the primary has kept all but these.

        If the account comes back to the store, Cyrus 3.10 crashes on a replica that is told of a folder with the
        identity of one that it keeps aside, again and again. So they forget what they have kept of this account.
        """
        places = self._site.stores[store]
        command = f"{CYR_EXPIRE} -C /etc/cyrus/{store}/imapd.conf -a -c -x -D 0 -u {shlex.quote(address)}"
        for node in (places.primary, *places.replicas):
            if node != self._primary(store):
                try:
                    self._remote.run(node, command, timeout=600)
                except RemoteError as error:
                    raise MoveError(
                        f"{address} was on {store} before, and {node} has to forget what it keeps of that: {error}; "
                        "run the command again when it answers"
                    ) from None

    def _is_copy(self, address: str, store: str, other: str) -> bool:
        """Whether the account's mailbox on a store, if there is one, is the same as on another one."""
        one, two = self.mailboxes(store), self.mailboxes(other)
        return not one.exists(address) or mailbox_state.identity(one, address) == mailbox_state.identity(two, address)

    def _take_strays(self, address: str, store: str, theirs: str) -> int:
        """Mail that came to a store which the account had left made a new mailbox there: all of it is the account's."""
        mailboxes, target = self.mailboxes(store), self.mailboxes(theirs)
        count = late.carry(address, mailboxes, target)
        self._replicate(theirs)
        # And what came after this look.
        return count + late.carry_aside(address, mailboxes, self._remove(address, store), target)

    def _primary(self, store: str) -> str:
        """The node that serves a store, as it was when this began."""
        return self._states[store].primary if store in self._states else self._site.stores[store].primary

    def _replicate(self, store: str) -> None:
        """Waits until the replicas that could have taken over when this began could do so with all that came since.

        One that has died meanwhile is not waited for: the store goes on without it, too.
        """
        deadline = time.monotonic() + REPLICATED
        while late := self._not_replicated(store, ASK):
            if time.monotonic() > deadline:
                raise MoveError(f"{late[0]}; run the command again when they have it")
            now = failover.primaries(self._site, self._remote)[store]
            if now != self._primary(store):
                raise MoveError(f"{store} is served by {now} now; run the command again")
            for node in self._in_sync(store):
                try:
                    self._remote.run(node, "true", timeout=ASK)
                except RemoteError:
                    self._dead.add(node)

    def _not_replicated(self, store: str, seconds: float) -> list[str]:
        """Why these replicas could not take over with all that there is now; nothing if they could."""
        if not (replicas := self._in_sync(store)):
            return []
        command = shlex.join([failover.KEEPER, "replicated", store, f"{seconds:g}", *replicas])
        try:
            self._remote.run(self._primary(store), command, timeout=seconds + 10)
        except RemoteError as error:
            if error.status == 255:
                raise
            return [str(error)]
        return []

    def _in_sync(self, store: str) -> list[str]:
        found = self._states[store].in_sync if store in self._states else ()
        return [node for node in found if node not in self._dead]

    def _start_link(self, source: str, target: str) -> None:
        """The way for copies: stunnel on the source's primary; see cyrus-move-STORE.service."""
        number, port = self._site.stores[source].number, self._site.stores[target].replication_port
        near = f"127.1.{number // 256}.{number % 256}"
        command = (
            f"systemctl start cyrus-move-{source} && for _ in $(seq 50); do "
            f"timeout 5 bash -c 'exec 3<>/dev/tcp/{near}/{port}' 2>/dev/null && exit; sleep 0.1; done; "
            f"echo 'cyrus-move-{source} does not listen; see: journalctl -u cyrus-move-{source}' >&2; exit 1"
        )
        self._remote.run(self._primary(source), command)

    def _copy(self, address: str, source: str, target: str, conf: str = "move", seconds: float = 3600) -> None:
        """One pass of Cyrus's replication for the account. It does not outlive its time, or the next would meet it."""
        client = f"runuser -u cyrus -- timeout -s KILL {seconds:g} /usr/lib/cyrus/bin/sync_client"
        command = f"{client} -C /etc/cyrus/{source}/primary/{conf}.conf -n {target} -o -u {shlex.quote(address)}"
        self._remote.run(self._primary(source), command, timeout=seconds + 10)

    def _send_sessions_on(self, address: str, target: str) -> list[str]:
        """Makes the access tier forget which store was the account's. Returns what could not be told, as notes."""
        who, host = shlex.quote(address), self._site.stores[target].host
        ask = (
            f"ldapsearch -Q -LLL -Y EXTERNAL -H ldapi://%2Frun%2Fslapd%2Fldapi -b ou=accounts,{self._site.suffix} "
            f"{shlex.quote(f'(&(uid={address})(mailHost={host}))')} 1.1 | grep -q ^dn:"
        )
        command = (
            f"for _ in $(seq 50); do if {ask}; then exec doveadm auth cache flush {who}; fi; sleep 0.1; done; "
            f"echo 'its copy of the directory does not know of the move after 5 s' >&2; exit 1"
        )
        notes = []

        def tell(node: str) -> None:
            try:
                # Writers wait for this: a node that has not answered is not asked again at once.
                if time.monotonic() - self._silent.get(node, -FORGOTTEN) < FORGOTTEN:
                    raise RemoteError(node, 255, "does not answer")
                self._silent.pop(node, None)
                self._remote.run(node, command, timeout=8)
            except RemoteError as error:
                if error.status == 255:
                    self._silent.setdefault(node, time.monotonic())
                notes.append(f"{error}; logins there are right in {self._remembered:.0f} s")

        with ThreadPoolExecutor() as pool:
            list(pool.map(tell, [node.name for node in self._site.groups["access"]]))
        return notes

    def _retire(self, address: str, source: str, target: str) -> int:
        """Removes the copy that is no longer the account's mailbox: its store keeps it aside for some days.

        Returns how many messages had come to it after it was compared; they are on the target then.
        """
        self._check_on(address, target)
        left = self.directory.moved(address)
        if left is None:
            raise MoveError(
                f"{address}: the directory knows of no former copy; its mailbox on {source} is left alone; what to do "
                f"with it says: posthouse drift {self._site.name}"
            )
        self.check_there(address, target, source)
        mailboxes = self.mailboxes(source)
        if mailboxes.exists(address):
            if not self._is_copy(address, source, target):
                return 0
            removed = self._remove(address, source)
        else:
            # Whoever removed it may have died before what follows.
            found = mailboxes.aside(address)
            first = max([left[1], *(one.at for one in found.values())]) - 60
            removed = {name: one for name, one in found.items() if one.at >= first}
        return late.carry_aside(address, mailboxes, removed, self.mailboxes(target), left[1])

    def _remove(self, address: str, store: str) -> dict[str, Aside]:
        """Removes the account's mailbox from a store. Returns what the store has put aside with that."""
        before = self.mailboxes(store).aside(address)
        self.mailboxes(store).delete(address)
        return {name: one for name, one in self.mailboxes(store).aside(address).items() if name not in before}

    def let_go(self, address: str, source: str, target: str) -> int:
        """The end of a move, when nothing comes to the source any more. Returns how many messages came late."""
        self._check_on(address, target)
        mailboxes, count = self.mailboxes(source), 0
        if mailboxes.exists(address):
            # A replica that became the primary may not have heard of the removal.
            count = self._retire(address, source, target)
        if mailboxes.exists(address):
            count += self._take_strays(address, source, target)
        self._replicate(target)
        self.directory.settled(address)
        return count

    def finish(self, address: str, source: str, target: str, since: int) -> None:
        """What a move that was killed has left to do."""
        if source == target:
            # Nothing that a move leaves: what goes for a former copy is the mailbox itself.
            self.directory.settled(address)
            return
        self._say(address, "letting go")
        notes = self._send_sessions_on(address, target)
        told = time.time()
        self._end_sessions(address, source)
        self._retire(address, source, target)
        due = max(since + STRAGGLERS, told + self._remembered if notes else 0.0)
        time.sleep(max(0.0, due - time.time()))
        self.let_go(address, source, target)

    def _end_sessions(self, address: str, source: str) -> None:
        try:
            with Freeze(self._remote, self._primary(source), source, address, PAUSE) as frozen:
                frozen.end()
                frozen.release()
        except FreezeError as error:
            # Nobody has used it since the store was started.
            if "no mailbox is in use" not in str(error):
                raise


def _seconds(text: str) -> float:
    """A time in Dovecot's notation, "1 min"."""
    match = re.fullmatch(r"(\d+)\s*(\w*)", text)
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    if not match:
        raise MoveError(f"access.cache_time: {text!r} is not a time; write it like 1 min")
    return float(match[1]) * units.get(match[2][:1] or "s", 1)
