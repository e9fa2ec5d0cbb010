"""What a running site is, against what it should be, in three layers; read-only, and all nodes at once.

files: what a deploy would change. daemons: what runs with something else than what is on the disk, or does not run.
data: what tiers keep, compared with each other: directories, replicas, mailboxes, held mail.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from posthouse import render, roles
from posthouse.directory import Account, Directory, DirectoryError
from posthouse.mailboxes import Mailboxes, StoreError
from posthouse.model import Node, Site
from posthouse.ops import drift_node, failover
from posthouse.probe.search import QUEUES
from posthouse.remote import Remote, RemoteError
from posthouse.secrets import Secrets

GENERATION = roles.ROOT / "library" / "module_utils" / "generation.py"
# All comes by standard input: what is on a command line can be read by anybody, and is limited.
START = "import json, sys; given = json.load(sys.stdin); half = {}; exec(given['program'], half); half['main'](given)"
BEHIND = 10.0  # s; a replica that follows is a tenth of a second behind
AGAIN = 1.0  # s until what may have been a change under way is looked at a second time


class Finding(NamedTuple):
    """Something that is not as it should be: where, in which layer, what, in which way, and what mends it."""

    node: str
    layer: str
    thing: str
    what: str
    fix: str


@dataclass(frozen=True)
class Report:
    """All findings, in the order of nodes and layers."""

    nodes: int
    findings: list[Finding]
    seconds: float


def drift(site: Site, secrets: Secrets) -> Report:
    """Looks at all nodes, the directory and the stores.

    Raises RenderError and SecretsError where the site itself is at fault.
    """
    started = time.monotonic()
    reached = Remote(site)
    with ThreadPoolExecutor(len(site.nodes) + 2) as pool:
        mailboxes = pool.submit(_mailboxes, site, secrets)
        states = pool.submit(failover.states, site, reached)
        looks = pool.map(lambda node: _look(site, secrets, reached, node), site.nodes.values())
        seen = dict(zip(site.nodes, looks, strict=True))
        findings = [*_layers(site, seen), *_directories(site, reached, seen), *mailboxes.result()]
        try:
            findings += _stores(site, seen, states.result())
        except failover.FailoverError as error:
            fix = f"posthouse verify {site.name} --tier store"
            findings.append(Finding(next(iter(site.nodes)), "data", "the cluster", f"cannot be asked: {error}", fix))
    order = [*site.nodes, *site.stores]
    findings.sort(key=lambda finding: order.index(finding.node) if finding.node in order else len(order))
    return Report(len(site.nodes), findings, round(time.monotonic() - started, 1))


def _look(site: Site, secrets: Secrets, reached: Remote, node: Node) -> dict[str, Any] | str:
    """What a node says about itself (see drift_node), or why it does not."""
    variables = render.shared_variables(site) | render.node_variables(site, node) | secrets.for_node(node)
    given = {
        "program": inspect.getsource(drift_node),
        "generation": GENERATION.read_text(),
        "desired": render.generation(variables, list(node.tiers)) | {"whole": True},
        "look_for": {
            "directory": "directory" in node.tiers,
            "stores": {
                store.name: f"/srv/store/{store.name}/config"
                for store in site.stores.values()
                if node.name in (store.primary, *store.replicas)
            },
            "queues": [place for tier, place in QUEUES.items() if tier in node.tiers],
        },
    }
    try:
        seen: dict[str, Any] = json.loads(reached.run(node.name, f'python3 -c "{START}"', json.dumps(given), 60))
    except RemoteError as error:
        return str(error)
    return seen


def _layers(site: Site, seen: Mapping[str, dict[str, Any] | str]) -> Iterator[Finding]:
    """What nodes found on themselves, and nodes that do not answer."""
    for node, found in seen.items():
        if isinstance(found, str):
            anew = f"see to the machine, or: posthouse rebuild {node} --site {site.name}"
            start = f"posthouse lab up {site.name}" if site.lab else anew
            yield Finding(node, "daemons", "the node", f"cannot be asked: {found}", start)
            continue
        deploy = f"posthouse deploy {site.name} --limit {node}"
        for layer in ("files", "daemons"):
            for thing, what, fix in found[layer]:
                yield Finding(node, layer, thing, what, f"on {node}: {fix}" if fix else deploy)
        for held in found["data"]["held"]:
            place, _, identifier = held.partition(" ")
            fix = f"on {node}: postsuper -c {place} -H {identifier}"
            yield Finding(node, "data", f"message {identifier}", f"is held in the queue of {place}", fix)


def lagging(directories: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{node: in which way it differs} of directories that have not all that others have.

    directories: {node: {"changes": {provider's number: CSN}, "entries": digest or None}}, the first being a provider.
    """
    newest: dict[str, str] = {}
    for state in directories.values():
        for number, csn in state["changes"].items():
            newest[number] = max(csn, newest.get(number, ""))
    found = {}
    digests = [state["entries"] for state in directories.values()]
    for node, state in directories.items():
        lacks = [number for number, csn in newest.items() if state["changes"].get(number, "") < csn]
        if not state["changes"]:
            found[node] = "is not complete: the first copy from a provider has not ended, or slapd does not run"
        elif lacks:
            since = state["changes"].get(lacks[0], "the beginning").partition(".")[0]
            found[node] = f"lacks changes of the provider {int(lacks[0], 16)} since {since}"
        elif state["entries"] != digests[0]:
            found[node] = f"holds other entries than {next(iter(directories))}, and believes that it has every change"
    return found


def _directories(site: Site, reached: Remote, seen: Mapping[str, dict[str, Any] | str]) -> Iterator[Finding]:
    """Directories that differ, and still do a moment later."""
    names = sorted(
        (node.name for node in site.groups["directory"]), key=lambda name: name not in site.directory.providers
    )
    states = {name: found["data"]["directory"] for name in names if not isinstance(found := seen[name], str)}
    if lagging(states):
        # Changes may be under way. What a node has by then must be at least what another had before.
        time.sleep(AGAIN)
        again = {"program": inspect.getsource(drift_node)}
        command = START.replace("half['main'](given)", "print(json.dumps(half['_directory']()))")
        with ThreadPoolExecutor(len(states)) as pool:
            texts = pool.map(lambda name: reached.run(name, f'python3 -c "{command}"', json.dumps(again)), states)
            states = dict(zip(states, (json.loads(text) for text in texts), strict=True))
    for node, what in lagging(states).items():
        yield Finding(node, "data", "the directory", what, "copy it anew: docs/directory.md, 'A node that differs'")


def _stores(
    site: Site, seen: Mapping[str, dict[str, Any] | str], states: Mapping[str, failover.State]
) -> Iterator[Finding]:
    """Stores that nobody serves, or two do, or not the preferred node; replicas that could not take over."""
    for store in site.stores.values():
        members = {name: data for name in (store.primary, *store.replicas) if (data := _data_of(seen[name]))}
        holders = [name for name, data in members.items() if store.address in data["addresses"]]
        if not holders and store.primary in members:
            fix = f"posthouse stores {site.name} says who should; then: posthouse deploy {site.name}"
            yield Finding(store.primary, "data", store.name, "nobody serves it: no node has its address", fix)
        if len(holders) > 1:
            fix = f"stop it where it is wrong, at once: systemctl stop cyrus@{store.name}"
            yield Finding(holders[1], "data", store.name, f"{' and '.join(holders)} both serve it", fix)
        for holder in holders:
            if holder != store.primary:
                fix = f"posthouse failback {store.name} --site {site.name}"
                yield Finding(holder, "data", store.name, f"is served here; the site prefers {store.primary}", fix)
            for peer, seconds in members[holder]["stores"][store.name].items():
                again = f"on {holder}: systemctl restart cyrus-sync-{store.name}@{peer}"
                if seconds > BEHIND:
                    yield Finding(holder, "data", f"{store.name} on {peer}", f"is {seconds:.0f} s behind", again)
                elif site.cluster and store.name in states and peer not in states[store.name].in_sync:
                    yield Finding(
                        holder, "data", f"{store.name} on {peer}", "is not in sync, so could not serve", again
                    )


def _data_of(found: dict[str, Any] | str) -> dict[str, Any] | None:
    return None if isinstance(found, str) else found["data"]


def misplaced(
    accounts: Iterable[Account], mailboxes: Mapping[str, set[str]], stores: Iterable[str]
) -> Iterator[tuple[str, str, str]]:
    """(store, address, what is wrong) of mailboxes that are not where the directory says, or that it does not know.

    mailboxes: {store: addresses}, of those stores that could be asked; stores: all that the site has.
    """
    known = set(stores)
    rest = {store: set(addresses) for store, addresses in mailboxes.items()}
    for account in accounts:
        address = account.address
        if account.store not in known:
            yield account.store, address, f"its entry names {account.store}, which is no store of the site"
        elif account.store in rest and address not in mailboxes[account.store]:
            yield account.store, address, "has no mailbox where its entry says"
        for store, addresses in rest.items():
            if address in addresses:
                addresses.remove(address)
                if store != account.store:
                    yield store, address, f"has a mailbox here, and its entry says {account.store}"
    for store, addresses in rest.items():
        for address in sorted(addresses):
            yield store, address, "has a mailbox and no account"


def _mailboxes(site: Site, secrets: Secrets) -> list[Finding]:
    """Mailboxes that are not where the directory says."""
    with closing(Directory(site, secrets)) as directory:
        try:
            return list(_compared(site, secrets, directory))
        except DirectoryError as error:
            provider = site.directory.providers[0]
            fix = f"posthouse deploy {site.name} --limit {provider}"
            return [Finding(provider, "data", "the directory", f"cannot be asked: {error}", fix)]


def _compared(site: Site, secrets: Secrets, directory: Directory) -> Iterator[Finding]:
    here = {}
    for store in site.stores.values():
        with closing(Mailboxes(store, secrets)) as mailboxes:
            try:
                here[store.name] = mailboxes.addresses()
            except StoreError as error:
                fix = f"posthouse deploy {site.name} --limit {store.primary}"
                yield Finding(store.primary, "data", store.name, f"cannot be asked: {error}", fix)
    for name, address, what in misplaced(directory.accounts(), here, site.stores):
        if _still(site, secrets, directory, name, address, what):
            node = site.stores[name].primary if name in site.stores else name
            yield Finding(node, "data", f"{address} on {name}", what, _mended(site, name, address, what))


def _still(site: Site, secrets: Secrets, directory: Directory, store: str, address: str, what: str) -> bool:
    """Whether it is so a second time: accounts may be made and removed while this looks."""
    account = directory.get(address)
    accounts = [account] if account else []
    here = {}
    for name in {store, *(one.store for one in accounts)} & site.stores.keys():
        with closing(Mailboxes(site.stores[name], secrets)) as mailboxes:
            here[name] = {address} if mailboxes.exists(address) else set()
    return (store, address, what) in misplaced(accounts, here, site.stores)


def _mended(site: Site, store: str, address: str, what: str) -> str:
    if "no account" in what:
        return f"posthouse account delete {address} --site {site.name}"
    if "no mailbox" in what:
        back = f"posthouse restore mailbox {address} --site {site.name}"
        return f"the next message or login makes an empty one; to have back what a backup has of it: {back}"
    if "no store of the site" in what:
        return f"write {store} into site.yml again, then: posthouse deploy {site.name}"
    return f"posthouse move {address} --to {store} --site {site.name} makes one of both; a second move brings it back"
