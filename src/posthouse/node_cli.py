"""Verbs about nodes: drain, undrain, upgrade, expand, retire, rebuild. One documented function each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from posthouse import run
from posthouse.model import Site
from posthouse.options import Check, Json, SiteOption
from posthouse.sitefile import load

NodeName = Annotated[str, typer.Argument(metavar="NODE", help="The node.")]

console = Console(soft_wrap=True, highlight=False)


def operate(site: str, as_json: bool, operation: Callable[[Site], dict[str, Any]]) -> None:
    """Does an operation on a site under its lock, and prints what came of it."""
    loaded = load(site)
    with run.exclusive(loaded):
        report = operation(loaded)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    notes = [f"{step['node']}: {step['note']}" for step in report["steps"] if step["note"]]
    done = f"done in {report['seconds']:g} s" if report["steps"] else "nothing was changed"
    console.print(f"{report['operation']}: {done}", *notes, sep="\n  ", markup=False)
    if report.get("next"):
        console.print(*report["next"], sep="\n  ", markup=False)


def drain(
    node: NodeName,
    site: SiteOption = "lab",
    wait: Annotated[int, typer.Option(min=0, help="Seconds in which its sessions may end by themselves.")] = 60,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Take a node out of service: no client, no store, no mail waits on it. It stays so until `undrain`."""
    from posthouse.ops import drain as module

    operate(site, as_json, lambda loaded: module.drain(loaded, node, check, wait))


def undrain(node: NodeName, site: SiteOption = "lab", check: Check = False, as_json: Json = False) -> None:
    """Put a drained node back into service: its pools, and the stores that the site file gives it."""
    from posthouse.ops import drain as module

    operate(site, as_json, lambda loaded: module.undrain(loaded, node, check))


def expand(node: NodeName, site: SiteOption = "lab", check: Check = False, as_json: Json = False) -> None:
    """Put a node more into service, while the others go on. Says what `rebalance` would do then."""
    from posthouse.ops import expand as module

    operate(site, as_json, lambda loaded: module.expand(loaded, node, check))


def upgrade(
    nodes: Annotated[list[str] | None, typer.Argument(metavar="[NODE]...", help="By default all.")] = None,
    site: SiteOption = "lab",
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Do it to a copy of the site in a lab, first.")] = False,
    wait: Annotated[int, typer.Option(min=0, help="Seconds in which a node's sessions may end by themselves.")] = 60,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Install new packages node by node, each drained, restarted and verified. Refuses what was not rehearsed."""
    from posthouse.ops import upgrade as module

    if rehearse and nodes:
        raise typer.BadParameter("a rehearsal is of the whole site; leave the nodes out")
    if rehearse:
        operate(site, as_json, lambda loaded: module.rehearse(loaded, check))
    else:
        operate(site, as_json, lambda loaded: module.upgrade(loaded, nodes or [], check, wait))


def retire(
    node: NodeName,
    site: SiteOption = "lab",
    wait: Annotated[int, typer.Option(min=0, help="Seconds in which its sessions may end by themselves.")] = 60,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Take a node away for good. While stores live on it, says where they could go instead, and changes nothing."""
    from posthouse.ops import retire as module

    operate(site, as_json, lambda loaded: module.retire(loaded, node, check, wait))


def rebuild(
    node: Annotated[str | None, typer.Argument(metavar="[NODE]", help="The node; without it, all of --site.")] = None,
    site: Annotated[str | None, typer.Option("--site", metavar="SITE", help="A folder in inventory/.")] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME|BACKUP", help="Of a whole site: as it was then (UTC), not at the end.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Copy twice, the second time without care.")] = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Make a dead node anew, from image, site file, secrets and peers; without NODE all of a site, from a backup."""
    from posthouse.ops import rebuild as of_node
    from posthouse.ops import rebuild_site

    if node is not None:
        if at:
            raise typer.BadParameter("a node gets its data from its peers, as it is now; leave --at out")
        operate("lab" if site is None else site, as_json, lambda loaded: of_node.rebuild(loaded, node, check, measure))
    elif site is not None:
        operate(site, as_json, lambda loaded: rebuild_site.rebuild(loaded, at, check))
    else:
        raise typer.BadParameter("name the node, or with --site the site of which nothing is left")


def add_to(app: typer.Typer) -> None:
    """Puts these verbs on a command line."""
    for verb in (drain, undrain, upgrade, expand, retire, rebuild):
        app.command()(verb)
