"""What a site becomes: as tables that say whether its nodes can bear its load, and as every file of every node."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from posthouse import render, roles, secrets, zones
from posthouse.model import Node, Site
from posthouse.sitefile import SiteError

DAY = 86400
Costs = dict[str, dict[str, float]]
"""{tier: {what it spends its time on: core-seconds for one message, or one login}}"""


@cache
def calibration() -> dict[str, Any]:
    """The measured figures, with what was measured: {"source", "rates", "limits"}."""
    text = Path(__file__).with_name("calibration.yml").read_text()
    return dict(yaml.load(text, Loader=yaml.CSafeLoader))


def plan(site: Site) -> dict[str, Any]:
    """What the site becomes: {"nodes", "stores", "ports", "load": lists of rows as dicts, "notes": sentences}."""
    return {
        "nodes": [
            {"class" if k == "klass" else k: v for k, v in node.model_dump().items()} for node in site.nodes.values()
        ],
        "stores": [store.model_dump() for store in site.stores.values()],
        "ports": _ports(site),
        "load": load(site),
        "notes": [*_notes(site), f"Load: {calibration()['source']}"],
    }


def _ports(site: Site) -> list[dict[str, str]]:
    """What can be reached, on the nodes of each class: [{"class", "port", "from"}]."""
    rows = []
    tiers = {node.klass: node.tiers for node in site.nodes.values()}
    for klass, carried in tiers.items():
        for tier in carried:
            for port in roles.manifest(tier).get("ports", []):
                who = "anyone" if "any" in port["from"] else ", ".join(port["from"])
                rows.append({"class": klass, "port": str(port.get("port", port.get("protocol"))), "from": who})
    return rows


def _notes(site: Site) -> list[str]:
    """What the operator should know before building this."""
    found = []
    bare = [store.name for store in site.stores.values() if not store.replicas]
    if bare:
        found.append(f"Without a replica: {', '.join(bare)}. A node that dies takes their mail with it.")
    if len(site.directory.providers) < 2:
        found.append("Only one directory provider: while it is down, no account can be changed.")
    alone = [tier for tier in roles.TIERS[1:] if len(site.groups[tier]) == 1]
    if alone:
        found.append(f"On one node only: {', '.join(alone)}. While it is down, nobody does their work.")
    spares = [node.name for node in site.nodes.values() if node.spare]
    if spares:
        found.append(f"Hot spares: {', '.join(spares)}. They share the work, hold no store, and no figure counts them.")
    if site.lab:
        found.append("In the lab all nodes share this machine: together they can do what it can.")
    return found


# --- load -------------------------------------------------------------------------------------------------------------


def load(site: Site) -> list[dict[str, Any]]:
    """The site's load beside what its nodes can do, by the figures of the calibration.

    Rows: {"what", "needed" at peak, "capacity" of all nodes but spares, "degraded": the same with one node down,
    "headroom": degraded / needed, "bound": what it is bound by}.
    """
    limits = {name: limit["value"] for name, limit in calibration()["limits"].items()}
    messages = site.load.accounts * site.load.messages_per_account / DAY * site.load.peak
    logins = site.load.accounts * site.load.logins_per_account / DAY * site.load.peak
    costs = message_costs()
    spared = {
        tier: {part: cost for part, cost in parts.items() if part != "SpamAssassin"} for tier, parts in costs.items()
    }
    weights = {store.name: store.weight for store in site.stores.values()}
    largest = max(weights, key=weights.__getitem__)
    copies = sum(weights[s.name] * (1 + len(s.replicas)) for s in site.stores.values()) / sum(weights.values())
    disks = {
        node.name: _disk_gib(site, node) * limits["disk_share"] for node in _counted(site) if "store" in node.tiers
    }
    stored = limits["accounts_per_store"]
    return [
        _cpu_row(site, "mail, all scanned (1/s)", messages, costs),
        _cpu_row(site, "mail, SpamAssassin spared (1/s)", messages, spared),
        _cpu_row(site, "logins (1/s)", logins, login_costs()),
        _row(
            "mailboxes and replicas (GiB)",
            site.load.accounts * site.load.mailbox_mib * copies / 1024,
            sum(disks.values()),
            sum(disks.values()) - max(disks.values()),
            f"disks filled to {limits['disk_share']:.0%}",
        ),
        _row(
            f"accounts on {largest}, the fullest",
            site.load.accounts * weights[largest] / sum(weights.values()),
            stored,
            stored,
            "experience",
        ),
        _row(
            "accounts in all",
            site.load.accounts,
            limits["entries"],
            limits["entries"],
            "nothing larger was tried",
        ),
    ]


def _counted(site: Site) -> list[Node]:
    """All nodes but the spares: what the site can do must not depend on them, for they are there to be used up."""
    return [node for node in site.nodes.values() if not node.spare]


def _disk_gib(site: Site, node: Node) -> float:
    """The size of a node's /srv. In the lab it is a file."""
    return site.lab.srv_mib / 1024 if site.lab else site.classes[node.klass].disk_gib


def message_costs() -> Costs:
    """What a message that comes in costs each tier."""
    rates = _core_seconds()
    return {
        "mx": {"Postfix": rates["receiving"]},
        "filter": {"ClamAV": rates["viruses"], "SpamAssassin": rates["spam"]},
        "store": {"Cyrus": rates["delivery"] - rates["receiving"]},
    }


def login_costs() -> Costs:
    """What a login costs each tier. The password is checked by the access node's own replica of the directory."""
    rates = _core_seconds()
    return {"access": {"proxy": rates["proxying"], "passwords": rates["passwords"]}}


def _core_seconds() -> dict[str, float]:
    return {name: rate["cores"] / rate["rate"] for name, rate in calibration()["rates"].items()}


def _cpu_row(site: Site, what: str, needed: float, costs: Costs) -> dict[str, Any]:
    nodes = _counted(site)
    capacity, bound = _bound(site, nodes, costs)
    # Whichever node is missed most: one of each class is tried.
    samples = {node.klass: node for node in nodes}.values()
    degraded = min(_bound(site, [node for node in nodes if node is not gone], costs)[0] for gone in samples)
    return _row(what, needed, capacity, degraded, bound)


def _bound(site: Site, nodes: list[Node], costs: Costs) -> tuple[float, str]:
    """How many a second these nodes can do, and what keeps them from doing more.

    A tier's work is spread over its nodes by their cores, and a node that does the work of several tiers has to share.
    """
    cores = {node.name: site.classes[node.klass].cores for node in nodes}
    work: dict[str, dict[str, float]] = defaultdict(dict)
    for tier, parts in costs.items():
        members = [node for node in nodes if tier in node.tiers]
        total = sum(cores[node.name] for node in members)
        if not total:
            return 0, f"no node is left that carries {tier}"
        for node in members:
            for part, cost in parts.items():
                work[node.name][part] = cost * cores[node.name] / total
    rates = {name: cores[name] / sum(parts.values()) for name, parts in work.items()}
    slowest = min(rates, key=rates.__getitem__)
    part = max(work[slowest], key=work[slowest].__getitem__)
    share = work[slowest][part] / sum(work[slowest].values())
    klass = site.nodes[slowest].klass
    return rates[slowest], f"{part}: {share:.0%} of {klass} CPU"


def _row(what: str, needed: float, capacity: float, degraded: float, bound: str) -> dict[str, Any]:
    return {
        "what": what,
        "needed": _rounded(needed),
        "capacity": _rounded(capacity),
        "degraded": _rounded(degraded),
        "headroom": _rounded(degraded / needed) if needed else None,
        "bound": bound,
    }


def _rounded(value: float) -> float:
    """Three digits: the measurements carry no more than that."""
    short = float(f"{value:.3g}")
    return int(short) if short >= 100 else short


# --- files ------------------------------------------------------------------------------------------------------------


def write_tree(site: Site, out: Path, with_secrets: bool) -> int:
    """Writes every file of every node to `out`/NODE/… and the DNS zones to `out`/zones/…; returns how many.

    `out` must be new or empty. Without `with_secrets`, passwords read `placeholder-NAME`, and the keys and certificates
    are made for the occasion. Modes are as on the nodes, owners are not. Raises SiteError, RenderError, SecretsError.
    """
    check_empty(out)
    opened = secrets.ensure(site) if with_secrets else secrets.placeholders(site)
    shared = render.shared_variables(site)
    files: dict[str, dict[str, str]] = {}
    for node in site.nodes.values():
        variables = shared | render.node_variables(site, node) | opened.for_node(node)
        generation = render.generation(variables, list(node.tiers))
        files |= {f"{node.name}{path}": file for path, file in generation["files"].items()}
    for name, text in zones.zones(site, opened.dkim).items():
        files[f"zones/{'root' if name == '.' else name}.zone"] = {"content": text, "mode": "0644"}
    return write_files(out, files)


def check_empty(out: Path) -> None:
    """Raises SiteError unless `out` is a new or empty folder."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise SiteError(out, ["is not an empty folder; name one that is empty, or that does not exist"])


def write_files(out: Path, files: dict[str, dict[str, str]]) -> int:
    """Writes {path: {"content", "mode"} or {"link"}} below an empty folder, all or nothing; returns how many."""
    try:
        for path, file in files.items():
            _write(out / path, file)
    except OSError as error:
        for begun in out.iterdir() if out.is_dir() else ():
            if begun.is_dir():
                shutil.rmtree(begun)
            else:
                begun.unlink()
        raise SiteError(out, [f"{error.filename}: {error.strerror}; name a folder where there is room"]) from None
    return len(files)


def _write(path: Path, file: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if "link" in file:
        path.symlink_to(file["link"])
        return
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
        handle.write(file["content"])
    path.chmod(int(file["mode"], 8))
