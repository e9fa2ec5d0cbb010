"""`posthouse failover`, `failback` and `stores`: one documented function per verb, over `ops.failover`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from posthouse import run
from posthouse.ops import failover as ops
from posthouse.options import Check, Json, SiteOption
from posthouse.sitefile import load

console = Console(soft_wrap=True, highlight=False)


def add(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(failover)
    app.command()(failback)
    app.command()(stores)


def say(steps: list[ops.Step], as_json: bool, check: bool) -> None:
    """Prints what was, or with --check would be, done."""
    if as_json:
        print(json.dumps({"changed": bool(steps), "steps": [asdict(step) for step in steps]}, indent=2))
        return
    for step in steps:
        console.print(f"{'would do: ' if check else ''}{step.text}", markup=False)
    if not steps:
        console.print("no change")


def failover(
    store: Annotated[str, typer.Argument(help="The store.")],
    site: SiteOption = "lab",
    to: Annotated[
        str | None, typer.Option(metavar="NODE", help="By default the first replica that is in sync.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let NODE serve what it has, though the silent primary may have more.")
    ] = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Let another node serve a store. Nothing is lost: the replica has everything before it is told to serve."""
    loaded = load(site)
    with run.exclusive(loaded):
        step = ops.switch(loaded, store, to, force, check)
    say([step] if step else [], as_json, check)


def failback(
    store: Annotated[list[str] | None, typer.Argument(metavar="[STORE]...", help="The stores.")] = None,
    site: SiteOption = "lab",
    every: Annotated[bool, typer.Option("--all", help="All stores.")] = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Let the nodes that site.yml prefers serve stores again, one store after the other."""
    loaded = load(site)
    if bool(store) == every:
        raise ops.FailoverError("failback: name the stores, or give --all")
    with run.exclusive(loaded):
        steps = ops.failback(loaded, store or loaded.stores, check)
    say(steps, as_json, check)


def stores(
    site: Annotated[str, typer.Argument(metavar="SITE", help="A folder in inventory/.")] = "lab", as_json: Json = False
) -> None:
    """Show who serves each store, whether it is alive, and which replicas could take over."""
    loaded = load(site)
    found = ops.states(loaded, watch=True)
    if as_json:
        print(json.dumps({name: asdict(state) for name, state in found.items()}, indent=2))
        return
    table = Table(title=f"stores of {site}", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("store", "primary", "preferred", "alive", "in sync", "behind", "term"):
        table.add_column(column)
    for name, state in found.items():
        behind = ", ".join(f"{node} {seconds:g} s" for node, seconds in state.lag.items() if seconds)
        preferred = loaded.stores[name].primary
        word = "yes" if state.alive else "NO"
        table.add_row(name, state.primary, preferred, word, " ".join(state.in_sync), behind, str(state.term))
    console.print(table)
