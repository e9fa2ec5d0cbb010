"""How a site's nodes are doing now, as far as operations on them need to know. Read-only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from posthouse.model import Site
from posthouse.ops.steps import Refused
from posthouse.remote import Remote, RemoteError
from posthouse.strict import did_you_mean

# A node that is drained has this file; it holds JSON: since when, and by whom.
MARK = "/var/lib/posthouse/drained"
# A node of a site that is being filled from a backup has this file; it holds the backup's name. For as long as it is
# there, slapd-open lets none of the node's daemons at the directory, so that nobody is told "no such address".
FILLING = "/var/lib/posthouse/filling"

_QUESTIONS = f"""
test -e {MARK} && echo drained yes
grep -qs '"for": "upgrade"' {MARK} && echo upgrading yes
test -e /var/lib/posthouse/generation.json && echo deployed yes
test -e {FILLING} && echo filling $(cat {FILLING})
for file in /etc/cyrus/*/store.json; do test -e "$file" && echo "carries $file"; done
ip -4 -o address | sed -n 's/.* inet \\([0-9.]*\\).*/address \\1/p'
df -m --output=avail /srv | sed -n '2s/^ */free /p'
test -S /run/slapd/ldapi && echo directory yes
test -S /run/haproxy/admin.sock && echo 'show servers state' | socat -t 5 - /run/haproxy/admin.sock |
    awk '/^[0-9]+ / {{print "server", $2, $4, $6, $7}}'
for file in /srv/store/*/config/sync/*/log*; do
    test -s "$file" && test -n "$(find "$file" -mmin +1)" && echo "late $file"
done
true
"""


@dataclass(frozen=True)
class State:
    """What is so now."""

    answers: frozenset[str] = frozenset()  # nodes that can be reached
    deployed: frozenset[str] = frozenset()  # nodes that were converged at least once
    drained: frozenset[str] = frozenset()
    upgrading: frozenset[str] = frozenset()  # those of them that an upgrade has drained, and has not put back
    primaries: dict[str, str] = field(default_factory=dict)  # store → the node that has its address
    carries: frozenset[tuple[str, str]] = frozenset()  # (store, node): the node was converged to have a copy of it
    late: frozenset[tuple[str, str]] = frozenset()  # (store, node): a replica that lacks something for a minute
    vip: str = ""  # the node that has the VIP
    # balancer → pool → server → "up", "down" or "drained"
    pools: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)  # node → MiB free on its /srv
    filling: dict[str, str] = field(default_factory=dict)  # node → the backup that its site is being filled from

    def behind(self, store: str) -> Callable[[str], bool]:
        """Says of a node whether its copy of a store lacks something: a key to sort by, the best copies first."""
        return lambda node: (store, node) in self.late

    def others_serving(self, node: str) -> dict[str, bool]:
        """Of each pool that the node is in: whether anybody else serves there, as some balancer sees it."""
        found: dict[str, bool] = {}
        for pools in self.pools.values():
            for pool, servers in pools.items():
                if node in servers:
                    others = any(state == "up" for name, state in servers.items() if name != node)
                    found[pool] = found.get(pool, False) or others
        return found


def known(site: Site, *nodes: str) -> None:
    """Refuses names that are no nodes of the site."""
    for name in nodes:
        if name not in site.nodes:
            raise Refused(f"{name}: no such node in {site.name}; {did_you_mean(name, site.nodes)}; nothing was changed")


def read(site: Site, remote: Remote) -> State:
    """Asks all nodes, side by side. One that does not answer is left out of `answers`."""

    def ask(name: str) -> str | None:
        try:
            return remote.run(name, _QUESTIONS, timeout=30)
        except RemoteError as error:
            if error.status == 255:
                return None
            raise

    with ThreadPoolExecutor(min(len(site.nodes), 32)) as pool:
        return parse(site, dict(zip(site.nodes, pool.map(ask, site.nodes), strict=True)))


def parse(site: Site, answers: dict[str, str | None]) -> State:
    """The state that the nodes' answers tell of; None stands for a node that did not answer."""
    stores = {store.address: store.name for store in site.stores.values()}
    vip = str(site.vips["mail"])
    flags: dict[str, set[str]] = {"drained": set(), "upgrading": set(), "deployed": set()}
    primaries, holder, carries, late, free, filling = {}, "", set(), set(), {}, {}
    pools: dict[str, dict[str, dict[str, str]]] = {}
    for node, text in answers.items():
        for word, *rest in (line.split() for line in (text or "").splitlines() if line.strip()):
            if word in flags:
                flags[word].add(node)
            elif word == "address" and rest[0] in stores:
                primaries[stores[rest[0]]] = node
            elif word == "address" and rest[0] == vip:
                holder = node
            elif word == "free":
                free[node] = int(rest[0])
            elif word == "filling":
                filling[node] = " ".join(rest)
            elif word == "server":
                pool, server, operational, administrative = rest
                how = "drained" if int(administrative) else "up" if operational == "2" else "down"
                pools.setdefault(node, {}).setdefault(pool, {})[server] = how
            elif word == "carries":
                carries.add((rest[0].split("/")[3], node))
            elif word == "late":
                _, _, _, store, _, _, peer, *_ = rest[0].split("/")
                late.add((store, peer, node))
    return State(
        answers=frozenset(node for node, text in answers.items() if text is not None),
        deployed=frozenset(flags["deployed"]),
        drained=frozenset(flags["drained"]),
        upgrading=frozenset(flags["upgrading"]),
        primaries=primaries,
        carries=frozenset(carries),
        # What a former primary has noted, nobody will ever tell: who serves now is another.
        late=frozenset((store, peer) for store, peer, node in late if primaries.get(store, node) == node),
        vip=holder,
        pools=pools,
        free=free,
        filling=filling,
    )


def need_answers(site: Site, state: State, nodes: Iterable[str]) -> None:
    """Refuses if one of the nodes does not answer."""
    for name in nodes:
        if name not in state.answers:
            raise Refused(
                f"{name}: does not answer; bring it back, or have it made anew with: posthouse rebuild {name} --site "
                f"{site.name}; nothing was changed"
            )


def mark(remote: Remote, node: str, data: dict[str, Any]) -> None:
    """Notes on a node that it is drained, so that a reboot does not forget it."""
    command = f"mkdir -p $(dirname {MARK}) && cat >{MARK}.new && sync {MARK}.new && mv {MARK}.new {MARK}"
    remote.run(node, command, text=json.dumps(data) + "\n")


def unmark(remote: Remote, node: str) -> None:
    """Forgets that a node was drained."""
    remote.run(node, f"rm -f {MARK}")
