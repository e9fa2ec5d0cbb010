"""Who serves a store now, and how another of its nodes comes to do so.

In a site with `cluster`, the nodes of a store decide that among themselves (docs/failover.md); site.yml only says which
one is preferred. Here they are asked, and told what an operator wants.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from posthouse import PosthouseError
from posthouse.model import Site
from posthouse.ops.state import MARK
from posthouse.remote import Remote, RemoteError
from posthouse.strict import did_you_mean

log = logging.getLogger(__name__)

KEEPER = "/usr/local/lib/posthouse/store-keeper"
# s within which a store must be served where it was moved to.
SERVED = 45


class FailoverError(PosthouseError):
    """A change that is refused, or did not succeed: which store, why, and what to do."""


@dataclass(frozen=True)
class State:
    """One store as its nodes agree on it."""

    primary: str
    term: int = 1  # how often the primary has changed, and one
    in_sync: tuple[str, ...] = ()  # replicas that have every acknowledged message, and may take over
    lag: dict[str, float] = field(default_factory=dict)  # replica: s that it is behind
    alive: bool = True  # whether the primary was heard of just now


@dataclass(frozen=True)
class Step:
    """One change of a primary. force: the target may lack mail."""

    store: str
    source: str
    target: str
    force: bool = False

    @property
    def text(self) -> str:
        """For people."""
        how = "takes over, though it may lack mail, from" if self.force else "takes over from"
        return f"{self.store}: {self.target} {how} {self.source}"


def states(site: Site, remote: Remote | None = None, watch: bool = False) -> dict[str, State]:
    """All stores. With `watch` it takes a second or more to see whether primaries are alive. Raises FailoverError.

    In a site without `cluster`, stores are where site.yml says.
    """
    if site.cluster is None:
        return {store.name: State(store.primary) for store in site.stores.values()}
    found = _ask_any(remote or Remote(site), site.cluster.members, f"{KEEPER} status{' watch' if watch else ''}")
    return {
        name: State(
            primary=record["primary"],
            term=record["term"],
            in_sync=tuple(record["in_sync"]),
            lag=record["lag"],
            alive=record.get("alive", True),
        )
        for name, record in found.items()
        if name in site.stores
    }


def primaries(site: Site, remote: Remote | None = None) -> dict[str, str]:
    """The node that serves each store now; the one that site.yml prefers, where none has served it yet."""
    return {store.name: store.primary for store in site.stores.values()} | {
        name: state.primary for name, state in states(site, remote).items()
    }


def plan(site: Site, have: dict[str, State], store: str, to: str | None = None, force: bool = False) -> Step | None:
    """What makes `to` (by default the first replica in sync) serve a store; None if it does. Raises FailoverError."""
    if store not in site.stores:
        raise FailoverError(f"no store {store!r}; {did_you_mean(store, site.stores)}")
    nodes = [site.stores[store].primary, *site.stores[store].replicas]
    if site.cluster is None:
        raise FailoverError(
            f"{store}: the site has no `cluster`, so nothing decides who serves; add it to site.yml and deploy"
        )
    if store not in have:
        raise FailoverError(f"{store}: nobody has served it yet; deploy {nodes[0]} first")
    state = have[store]
    if to is not None and to not in nodes:
        raise FailoverError(f"{store}: {to} has no copy of it; its nodes are {', '.join(nodes)}")
    if to == state.primary:
        return None
    if len(nodes) == 1:
        raise FailoverError(f"{store}: {nodes[0]} has the only copy; give the store a replica in site.yml, and deploy")
    if to in state.in_sync:
        return Step(store, state.primary, str(to))
    if to is None and state.in_sync:
        return Step(store, state.primary, state.in_sync[0])
    who = f"{to} is not in sync" if to else "no replica is in sync"
    if state.alive:
        behind = f" ({state.lag[to]:g} s behind)" if to in state.lag else ""
        raise FailoverError(f"{store}: {who}{behind}; wait until posthouse stores {site.name} says that it is")
    if not force:
        raise FailoverError(
            f"{store}: {state.primary} is silent and {who}, so mail may be on {state.primary} alone; bring it back, or "
            "let another node serve what it has: --to NODE --force"
        )
    if to is None:
        raise FailoverError(f"{store}: --force needs --to, the node that is to serve what it has")
    return Step(store, state.primary, to, force=True)


def switch(
    site: Site,
    store: str,
    to: str | None = None,
    force: bool = False,
    check: bool = False,
    remote: Remote | None = None,
) -> Step | None:
    """Makes another node serve a store; returns what was, or with `check` would be, done. Raises FailoverError."""
    remote = remote or Remote(site)
    step = plan(site, states(site, remote, watch=True), store, to, force)
    if step and not check:
        _act(site, remote, step)
    return step


def failback(site: Site, stores: Iterable[str], check: bool = False, remote: Remote | None = None) -> list[Step]:
    """Makes the nodes that site.yml prefers serve these stores, one after the other. Raises FailoverError."""
    remote = remote or Remote(site)
    have = states(site, remote, watch=True)
    wanted = [(store, site.stores[store].primary if store in site.stores else None) for store in stores]
    steps = [step for step in (plan(site, have, store, to) for store, to in wanted) if step]
    out = [step for step in steps if _drained(remote, step.target)]
    for step in out:
        back = f"posthouse undrain {step.target} --site {site.name}"
        complaint = f"{step.store}: {step.target} is drained, and gets it back by: {back}"
        if len(out) == len(steps):
            raise FailoverError(f"{complaint}; nothing was changed")
        log.warning("%s", complaint)
        steps.remove(step)
    for step in [] if check else steps:
        _act(site, remote, step)
    return steps


def _drained(remote: Remote, node: str) -> bool:
    try:
        remote.run(node, f"test -e {MARK}", timeout=30)
    except RemoteError:  # also where it does not answer: whoever hands it a store will say so
        return False
    return True


def _act(site: Site, remote: Remote, step: Step) -> None:
    log.info("%s", step.text)
    try:
        if step.force:
            remote.run(step.target, f"{KEEPER} force {step.store}", timeout=60)
        else:
            remote.run(step.target, f"{KEEPER} ask {step.store} {step.target}", timeout=60)
    except RemoteError as error:
        again = f"see: posthouse stores {site.name}, and run the command again when {step.target} is well"
        raise FailoverError(f"{step.store}: stays on {step.source}: {error}; {again}") from None
    try:
        remote.run(step.target, f"{KEEPER} served {step.store}", timeout=SERVED)
    except RemoteError as error:
        complaint = f"{step.store}: {step.target} does not serve it: {error}"
        why = f"on {step.target}, journalctl -u cyrus@{step.store} -u store-keeper@{step.store} says why"
        if step.force:
            raise FailoverError(f"{complaint}; {why}; it serves as soon as that is mended") from None
        try:
            remote.run(step.source, f"{KEEPER} ask {step.store} {step.source}", timeout=60)
        except RemoteError as second:
            see = f"who has it now says: posthouse stores {site.name}"
            raise FailoverError(f"{complaint}; and {step.source} did not get it back: {second}; {why}; {see}") from None
        raise FailoverError(f"{complaint}; {step.source} serves it again; {why}") from None
    # What was put off meanwhile need not wait for its minute.
    for node in site.groups["mx"]:
        with contextlib.suppress(RemoteError):
            remote.run(node.name, "postqueue -f", timeout=15)


def _ask_any(remote: Remote, nodes: list[str], command: str) -> Any:
    """What the first of several nodes to answer says, as JSON. Raises FailoverError."""
    pool = ThreadPoolExecutor(len(nodes))
    try:
        reasons = []
        for done in as_completed(pool.submit(remote.run, node, command, timeout=20) for node in nodes):
            try:
                return json.loads(done.result())
            except RemoteError as error:
                reasons.append(str(error))
        raise FailoverError(
            f"no node of the cluster can say who serves: {'; '.join(reasons)}; bring nodes back, until a majority of "
            f"{', '.join(nodes)} is up"
        )
    finally:
        # One that is down need not be waited for.
        pool.shutdown(wait=False, cancel_futures=True)
