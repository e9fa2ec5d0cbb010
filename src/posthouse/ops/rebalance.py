"""Which accounts have to move so that every store has its share, and as little as possible moves.

A store's share follows from its `weight` in site.yml. It counts in accounts or in bytes; within a tenth of it is near
enough, so a site that is balanced stays as it is. The accounts that move are those with the least mail that do it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from posthouse import PosthouseError
from posthouse.directory import Account, Directory
from posthouse.mailboxes import Mailboxes
from posthouse.model import Site
from posthouse.ops import mailbox_state
from posthouse.ops.failover import primaries
from posthouse.ops.move import FILL
from posthouse.remote import Remote
from posthouse.secrets import Secrets

NEAR = 0.1
By = Literal["accounts", "bytes"]


class RebalanceError(PosthouseError):
    """It cannot be done; the message says why, and what to do."""


@dataclass
class Load:
    """One store: its weight (0: to be emptied), the nodes that keep its mail, and {account: bytes}."""

    weight: float
    nodes: tuple[str, ...]
    mailboxes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One account to another store; `size` in bytes."""

    address: str
    source: str
    target: str
    size: int


def plan(stores: dict[str, Load], free: dict[str, int], by: By = "accounts") -> list[Step]:
    """The moves, in a good order. Raises RebalanceError if there is no room for them.

    free: {node: bytes}. What leaves a node is not counted as room there: it is removed only later.
    """
    return _Plan(stores, free, by).steps


class _Plan:
    def __init__(self, stores: dict[str, Load], free: dict[str, int], by: By) -> None:
        self.steps: list[Step] = []
        self._by = by
        self._room = {node: size * FILL for node, size in free.items()}
        self._stores = stores
        # Least mail first; of accounts that came here none goes on.
        self._left = {n: sorted(load.mailboxes.items(), key=lambda m: (m[1], m[0])) for n, load in stores.items()}
        self._have = {n: float(sum(map(self._amount, load.mailboxes.values()))) for n, load in stores.items()}
        weights = sum(load.weight for load in stores.values())
        if not weights:
            raise RebalanceError("no store is left to move accounts to; name fewer stores to be emptied")
        total = sum(self._have.values())
        self._share = {name: total * load.weight / weights for name, load in stores.items()}
        # Accounts are whole: a share of 2.5 is as near as 2 or 3.
        step = 1 if by == "accounts" else 0
        self._most = {n: max(s * (1 + NEAR), math.ceil(s) * step) for n, s in self._share.items()}
        self._least = {
            n: min(s * (1 - NEAR), math.floor(s)) if step else s * (1 - NEAR) for n, s in self._share.items()
        }
        while source := self._fullest(lambda name: self._have[name] > self._most[name] + 1e-9):
            self._one(source)
        while target := self._emptiest(lambda name: self._have[name] < self._least[name] - 1e-9):
            source = self._fullest(lambda name: self._have[name] > self._share[name])
            if source is None:
                return
            self._one(source, target)

    def _amount(self, size: int) -> int:
        return size if self._by == "bytes" else 1

    def _filled(self, name: str) -> float:
        return self._have[name] / self._share[name] if self._share[name] else math.inf

    def _fullest(self, wanted: Callable[[str], bool]) -> str | None:
        names = [name for name in self._stores if wanted(name) and self._left[name]]
        return max(names, key=lambda name: (self._filled(name), self._have[name]), default=None)

    def _emptiest(self, wanted: Callable[[str], bool]) -> str | None:
        names = [name for name in self._stores if self._share[name] and wanted(name)]
        return min(names, key=self._filled, default=None)

    def _one(self, source: str, target: str | None = None) -> None:
        """Moves one account, or finds that it had better stay."""
        address, size = self._chosen(source)
        self._left[source].remove((address, size))
        names = [target] if target else [name for name in self._stores if self._share[name] and name != source]
        fitting = [name for name in names if self._helps(source, name, self._amount(size))]
        if not fitting:
            return
        roomy = [n for n in fitting if all(self._room[node] >= size for node in self._stores[n].nodes)]
        if not roomy:
            raise RebalanceError(
                f"no room for {address} ({size / 2**20:.0f} MiB) on {', '.join(sorted(fitting))}; "
                "add a node, or take weight from stores whose nodes are full"
            )
        name = min(roomy, key=self._filled)
        for node in self._stores[name].nodes:
            self._room[node] -= size
        self._have[source] -= self._amount(size)
        self._have[name] += self._amount(size)
        self.steps.append(Step(address, source, name, size))

    def _helps(self, source: str, target: str, amount: int) -> bool:
        """Whether the target has a place for one more; or else is still no fuller than the source was."""
        after = self._have[target] + amount
        return after <= self._most[target] or after / self._share[target] < self._filled(source)

    def _chosen(self, source: str) -> tuple[str, int]:
        """The account that fits best: by accounts the smallest, by bytes the largest that is not too large."""
        if self._by == "accounts":
            return self._left[source][0]
        need = self._have[source] - self._share[source]
        fitting = [one for one in self._left[source] if 0 < one[1] <= need]
        return fitting[-1] if fitting else self._left[source][0]


def targets(steps: Iterable[Step]) -> dict[str, str]:
    """What a mover needs: {account: store}."""
    return {step.address: step.target for step in steps}


def summary(steps: Iterable[Step]) -> list[str]:
    """The moves in words: a line for each pair of stores."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for step in steps:
        pairs.setdefault((step.source, step.target), []).append(step.size)
    return [
        f"{source} → {target}: {len(sizes)} account{'s' * (len(sizes) > 1)}, {sum(sizes) / 2**20:.1f} MiB"
        for (source, target), sizes in sorted(pairs.items())
    ]


def loads(
    site: Site, secrets: Secrets, remote: Remote, empty: Iterable[str] = ()
) -> tuple[dict[str, Load], dict[str, int]]:
    """The stores as they are now, and the bytes free on each of their nodes.

    empty: stores that are to keep nothing. Raises RebalanceError, DirectoryError, RemoteError, StoreError.
    """
    unknown = [name for name in empty if name not in site.stores]
    if unknown:
        raise RebalanceError(f"no store {unknown[0]!r} in this site; the stores are {', '.join(site.stores)}")
    found = {
        name: Load(0 if name in empty else store.weight, (store.primary, *store.replicas))
        for name, store in site.stores.items()
    }
    serving = primaries(site, remote)
    sizes = {name: _sizes(remote, serving[name], name) for name in site.stores}
    directory = Directory(site, secrets)
    try:
        for account in directory.accounts():
            if account.store in found:
                size = sizes[account.store].get(account.address)
                found[account.store].mailboxes[account.address] = (
                    _size(site, secrets, account) if size is None else size
                )
    finally:
        directory.close()
    nodes = {node for load in found.values() for node in load.nodes}
    free = remote.each(nodes, "df --output=avail -B1 /srv | tail -1")
    return found, {node: int(text) for node, text in free.items()}


def _sizes(remote: Remote, node: str, store: str) -> dict[str, int]:
    """{account: bytes} of those whose mailbox has a limit."""
    text = remote.run(node, f"runuser -u cyrus -- /usr/lib/cyrus/bin/quota -C /etc/cyrus/{store}/imapd.conf")
    return {
        match[2]: int(match[1]) * 1024 for match in re.finditer(r"(\d+)\s+STORAGE\s+user/(\S+)$", text, re.MULTILINE)
    }


def _size(site: Site, secrets: Secrets, account: Account) -> int:
    """Bytes of a mailbox without a limit: Cyrus keeps no count of it."""
    return mailbox_state.extent(Mailboxes(site.stores[account.store], secrets), account.address)[1]
