"""`posthouse move` and `posthouse rebalance`: functions that cli.py makes verbs of."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from posthouse import run, secrets
from posthouse.ops import rebalance as rebalancing
from posthouse.ops.move import Move, Mover
from posthouse.ops.relocation import PAUSE, Moved
from posthouse.options import Check, Json, SiteOption, finite
from posthouse.remote import Remote
from posthouse.sitefile import load

Parallel = Annotated[int, typer.Option(min=1, max=32, help="Accounts at a time.")]
Rate = Annotated[float | None, typer.Option(min=0.1, callback=finite, help="Accounts begun in a minute, at most.")]
Pause = Annotated[
    float,
    # A replica that is 8 s behind is struck off, and what waits here is not replicated.
    typer.Option(
        min=1,
        max=7,
        callback=finite,
        help="Seconds for which an account's writing may wait; it stays if it takes more.",
    ),
]

console = Console(soft_wrap=True, highlight=False)


def move(
    accounts: Annotated[list[str], typer.Argument(metavar="ACCOUNT...", help="Full addresses.")],
    to: Annotated[str, typer.Option(metavar="STORE", help="Where they move to.")],
    site: SiteOption = "lab",
    parallel: Parallel = 2,
    rate: Rate = None,
    pause: Pause = PAUSE,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Move accounts to another store while mail comes in and people read; run it again if it was interrupted."""
    loaded = load(site)
    run.reach(loaded)
    mover = Mover(loaded, secrets.load(loaded), _progress, pause)
    moves = mover.plan(accounts, to)
    _act(mover, moves, parallel, rate, check, as_json)


def rebalance(
    site: Annotated[str, typer.Argument(metavar="SITE", help="A folder in inventory/.")] = "lab",
    by: Annotated[str, typer.Option(help="What a share counts in: accounts, or bytes.")] = "accounts",
    empty: Annotated[list[str] | None, typer.Option(metavar="STORE", help="To keep nothing (repeatable).")] = None,
    parallel: Parallel = 2,
    rate: Rate = None,
    pause: Pause = PAUSE,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Move as few accounts as it takes to bring every store within a tenth of its share."""
    if by not in ("accounts", "bytes"):
        raise rebalancing.RebalanceError(f"--by: {by!r}; write --by accounts or --by bytes")
    loaded = load(site)
    kept = secrets.load(loaded)
    stores, free = rebalancing.loads(loaded, kept, Remote(loaded), empty or ())
    steps = rebalancing.plan(stores, free, by)  # type: ignore[arg-type]
    mover = Mover(loaded, kept, _progress, pause)
    moves = mover.plan_rest(rebalancing.targets(steps))
    _act(mover, moves, parallel, rate, check, as_json)
    if not moves and not as_json:
        console.print("every store is within a tenth of its share; nothing to do")


def _act(mover: Mover, moves: list[Move], parallel: int, rate: float | None, check: bool, as_json: bool) -> None:
    if check:
        _show_plan(moves, as_json)
        return
    for move in moves:
        print(f"{move.address}: {'; '.join(move.steps) or 'is there already'}", file=sys.stderr, flush=True)
    done = mover.run(moves, parallel, rate)
    there = [move.address for move in moves if not move.steps]
    if as_json:
        print(json.dumps({"moved": [asdict(one) for one in done], "there": there}))
    else:
        for address in there:
            console.print(f"{address}: is there already; nothing to do", markup=False)
        for one in done:
            console.print(_sentence(one), markup=False)
    if any(one.error for one in done):
        raise typer.Exit(1)


def _show_plan(moves: list[Move], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(move) | {"steps": move.steps} for move in moves]))
        return
    for move in moves:
        console.print(f"{move.address}: {'; '.join(move.steps) or 'is there already'}", markup=False)


def _sentence(one: Moved) -> str:
    if one.error:
        return f"{one.address}: FAILED: {one.error}"
    if one.pause is None:
        return f"{one.address}: the former copy is gone"
    late = f"; {one.carried} late messages carried over" if one.carried else ""
    notes = "".join(f"\n  {note}" for note in one.notes)
    return (
        f"{one.address}: {one.source} → {one.target}, {one.messages} messages in {one.seconds:.1f} s, "
        f"writing waited for {one.pause:.1f} s{late}{notes}"
    )


def _progress(address: str, phase: str) -> None:
    print(f"{address}: {phase}", file=sys.stderr, flush=True)
