"""Accounts to another store, while mail comes in and people read.

    mover = Mover(site, secrets)
    mover.run(mover.plan(["alice@lab.test"], "s02"))

Cyrus's own replication carries the mailbox, so UIDs, flags, rights, scripts and all else arrive as they were. It runs
while the account is in use, until little is left; then the mailbox is frozen (reading goes on, writing waits), the last
of it is carried over, both sides are compared, and the directory names the other store. That one change of one entry is
the move: before it the source is the account's mailbox, after it the target. What was being written to the source was
never acknowledged, and its sessions are ended once, to come back at the target. The source's copy is removed then.

Nothing of this is remembered anywhere but in the stores and the directory, so a move that was killed is run again. The
freeze ends with who asked for it: see roles/store/…/store-freeze.
"""

from __future__ import annotations

import contextlib
import fcntl
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from posthouse import inventory
from posthouse.accounts import existing
from posthouse.directory import Directory
from posthouse.model import Site
from posthouse.ops import mailbox_state
from posthouse.ops.relocation import PAUSE, Moved, MoveError, Progress, Relocation
from posthouse.remote import Remote, RemoteError
from posthouse.secrets import Secrets

# What a copy may fill of the space that is free on a node.
FILL = 0.9


@dataclass(frozen=True)
class Move:
    """What is to be done for an account. `left`: a store with a former copy, and since when, if a move was killed.

    source == target: nothing but letting go of that copy, if there is one.
    """

    address: str
    source: str
    target: str
    messages: int = 0
    size: int = 0
    left: tuple[str, int] | None = None

    @property
    def steps(self) -> list[str]:
        """The plan, in words."""
        steps = [f"let go of the copy that is left on {self.left[0]}"] if self.left else []
        if self.source != self.target:
            steps.append(f"{self.source} → {self.target}: {self.messages} messages, {self.size / 2**20:.1f} MiB")
        return steps


def lacking_room(moves: Iterable[Move], nodes: dict[str, list[str]], free: dict[str, int]) -> list[str]:
    """Nodes that cannot take what would come to them: sentences.

    nodes: {store: its primary and replicas}; free: {node: bytes}, without those that do not answer: they get what is
    theirs when they are back.
    """
    coming: dict[str, int] = defaultdict(int)
    for move in moves:
        if move.source != move.target:
            for node in nodes[move.target]:
                coming[node] += move.size
    return [
        f"{node} has {free[node] / 2**20:.0f} MiB free, and {size / 2**20:.0f} MiB would come"
        for node, size in coming.items()
        if node in free and size > free[node] * FILL
    ]


class Mover:
    """Moves accounts of a site. Make it before any thread is started."""

    def __init__(
        self, site: Site, secrets: Secrets, progress: Progress = lambda address, phase: None, pause: float = PAUSE
    ) -> None:
        self.site = site
        self._secrets = secrets
        self._remote = Remote(site)
        self._say, self._pause = progress, pause
        self._silent: dict[str, float] = {}

    def _relocation(self) -> Relocation:
        return Relocation(self.site, self._secrets, self._remote, self._say, self._silent, self._pause)

    # Planning

    def plan(self, addresses: Iterable[str], target: str) -> list[Move]:
        """What has to be done for each account. Raises AccountError, DirectoryError, MoveError, StoreError."""
        if target not in self.site.stores:
            raise MoveError(f"no store {target!r} in this site; the stores are {', '.join(self.site.stores)}")
        with self._relocation() as on:
            named = [existing(self.site, on.directory, address).address for address in addresses]
            return self._plan_all(on, dict.fromkeys(named, target))

    def plan_rest(self, targets: dict[str, str]) -> list[Move]:
        """The same with a store for each account, and to finish the moves that were killed, whatever they were."""
        # It looks at all accounts, and may take its time.
        with contextlib.closing(Directory(self.site, self._secrets)) as directory:
            unsettled = directory.unsettled()
        with self._relocation() as on:
            return self._plan_all(on, unsettled | targets)

    def _plan_all(self, on: Relocation, targets: dict[str, str]) -> list[Move]:
        moves = [self._plan(on, address, target) for address, target in targets.items()]
        for name in {store for move in moves if move.steps for store in (move.source, move.target)}:
            on.mailboxes(name).exists("nobody")  # or StoreError: it is down
        self._check_room(moves)
        return moves

    def _plan(self, on: Relocation, address: str, target: str) -> Move:
        account = on.directory.get(address)
        if account is None:
            raise MoveError(f"no account {address}; see: posthouse account list --site {self.site.name}")
        if account.store not in self.site.stores:
            raise MoveError(
                f"{address} is on {account.store}, which is not in the site file; write the store into it again"
            )
        left = on.directory.moved(address)
        if account.store == target:
            return Move(address, target, target, left=left)
        on.check_there(address, account.store, target)
        messages, size = mailbox_state.extent(on.mailboxes(account.store), address)
        return Move(address, account.store, target, messages, size, left)

    def _check_room(self, moves: list[Move]) -> None:
        stores = {move.target for move in moves if move.source != move.target}
        nodes = {name: [self.site.stores[name].primary, *self.site.stores[name].replicas] for name in stores}
        free: dict[str, int] = {}
        for node in {node for names in nodes.values() for node in names}:
            with contextlib.suppress(RemoteError):
                free[node] = int(self._remote.run(node, "df --output=avail -B1 /srv | tail -1"))
        lacking = lacking_room(moves, nodes, free)
        if lacking:
            raise MoveError(f"no room: {'; '.join(lacking)}; make room there, or move fewer accounts")

    # Acting

    def run(self, moves: list[Move], parallel: int = 2, rate: float | None = None) -> list[Moved]:
        """Does what was planned, several accounts at a time, starting at most `rate` in a minute.

        An account that fails is still where it was, or a rerun finishes it; the others go on. Raises nothing.
        """
        pace = _Pace(rate)
        # A file is open for each account.
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        with (
            contextlib.ExitStack() as held,
            ThreadPoolExecutor(parallel) as movers,
            ThreadPoolExecutor(parallel) as last,
        ):
            todo = [move for move in moves if move.steps]
            for move in todo:
                held.enter_context(self._alone(move.address))
            running = [movers.submit(self._guarded, move, pace) for move in todo]
            ending = []
            try:
                for future in as_completed(running):
                    moved, due = future.result()
                    ending.append(last.submit(self._ended, moved, due))
            except KeyboardInterrupt:
                # Accounts that are on their way arrive, no other is begun; a rerun lets go of former copies.
                movers.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in ending]

    def _guarded(self, move: Move, pace: _Pace) -> tuple[Moved, float | None]:
        """Moves one account. Returns what was done and when the source's copy may go (monotonic), if there is one."""
        moved = Moved(move.address, move.source, move.target, messages=move.messages)
        started = time.monotonic()
        try:
            if move.source != move.target:
                pace.wait()
            with self._relocation() as on:
                if move.left:
                    on.finish(move.address, move.left[0], move.source, move.left[1])
                if move.source == move.target:
                    self._say(move.address, "done")
                    return moved, None
                due = on.move(moved)
        except Exception as error:  # whatever it is, the others go on
            return self._failed(moved, error), None
        finally:
            moved.seconds = round(time.monotonic() - started, 2)
        return moved, due

    def _ended(self, moved: Moved, due: float | None) -> Moved:
        if due is None or moved.error:
            return moved
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            with self._relocation() as on:
                moved.carried += on.let_go(moved.address, moved.source, moved.target)
            self._say(moved.address, "done")
        except Exception as error:  # whatever it is, the others go on
            self._failed(moved, error)
        return moved

    def _failed(self, moved: Moved, error: Exception) -> Moved:
        moved.error = str(error)
        if moved.switched:
            moved.error = (
                f"it is on {moved.target}, but its former copy on {moved.source} is left until the same command is "
                f"run again: {error}"
            )
        self._say(moved.address, "failed")
        return moved

    @contextlib.contextmanager
    def _alone(self, address: str) -> Iterator[None]:
        """Holds an account against a second mover on this controller; another controller's loses at the directory."""
        folder = inventory.RUNTIME / self.site.name / "moves"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / address).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MoveError(f"{address}: a move is already running for it; wait for that to end") from None
            yield


class _Pace:
    """Lets one start after the other, at most `rate` in a minute."""

    def __init__(self, rate: float | None) -> None:
        self._gap = 60 / rate if rate else 0.0
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Waits for one's turn."""
        with self._lock:
            mine = max(self._next, time.monotonic())
            self._next = mine + self._gap
        time.sleep(max(0.0, mine - time.monotonic()))
