"""`posthouse probe` and `posthouse ledger check`: one documented function per verb, over `posthouse.probe`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from posthouse import run
from posthouse.options import Json, SiteName, finite
from posthouse.probe.clients import WORLD, Platform, World
from posthouse.sitefile import load

app = typer.Typer(help="The book of what was acknowledged, kept by `posthouse probe --record`.", no_args_is_help=True)

console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
SHOWN = 20  # findings of a kind; --json has all


def probe(
    site: SiteName = "lab",
    smtp: Annotated[float, typer.Option(min=0, callback=finite, help="Messages a second from the outside.")] = 0,
    submission: Annotated[
        float, typer.Option(min=0, callback=finite, help="Messages a second that people hand in, by port 465.")
    ] = 0,
    imap: Annotated[float, typer.Option(min=0, callback=finite, help="IMAP logins a second.")] = 0,
    pop: Annotated[float, typer.Option(min=0, callback=finite, help="POP3 logins a second.")] = 0,
    sieve: Annotated[float, typer.Option(min=0, callback=finite, help="ManageSieve logins a second.")] = 0,
    sessions: Annotated[int, typer.Option(min=0, max=500, help="IMAP sessions that stay open.")] = 0,
    seconds: Annotated[float, typer.Option(min=1, callback=finite, help="How long.")] = 60,
    count: Annotated[int | None, typer.Option(min=1, help="At most so many of each kind.")] = None,
    patience: Annotated[
        float, typer.Option(min=1, max=60, callback=finite, help="Seconds without an answer that count as a failure.")
    ] = 20,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Note every 250 there, for `ledger check`; added to.")
    ] = None,
    people: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV: address,password. By default accounts probe-STORE-N are made."),
    ] = None,
    each: Annotated[int, typer.Option(min=1, max=100, help="Accounts to make on each store.")] = 1,
    as_json: Json = False,
) -> None:
    """Use a running site as its users and the world do, at steady rates; say what failed, and for how long."""
    from posthouse.probe.ledger import Ledger
    from posthouse.probe.probes import Probe, Rates, made_people, read_people

    loaded = load(site)
    rates = Rates(smtp, submission, imap, pop, sieve, sessions)
    rates.check()
    run.reach(loaded)
    # Accounts of its own get new passwords, which would lock another one out.
    alone = nullcontext() if people else run.exclusive(loaded, "probe")
    with alone, closing(Ledger(record)) as ledger:
        persons = read_people(loaded, people) if people else made_people(loaded, each)
        made = Probe(loaded, persons, rates, ledger, count, patience)
        with _outside(made.platform) as outside, Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("probing", total=seconds)
            # Stopped early it tells what it has seen so far.
            with suppress(KeyboardInterrupt), made:
                started = time.monotonic()
                while (gone := time.monotonic() - started) < seconds and made.running:
                    good = sum(kind.taken for kind in made.kinds.values())
                    bad = sum(len(kind.failures) for kind in made.kinds.values())
                    bar.update(task, completed=gone, description=f"{good} good, {bad} failed")
                    time.sleep(min(1, seconds - gone))
        for arrival in outside.arrivals if outside else []:
            ledger.note_bounces(arrival.data)
    found = made.statistics()
    if as_json:
        print(json.dumps({"acknowledged": len(ledger.acknowledged), **{k: asdict(v) for k, v in found.items()}}))
    else:
        table = Table(
            "kind", "attempts", "failed", "longest silence", "p50", "p99", "reconnects", box=None, pad_edge=False
        )
        for name, one in found.items():
            numbers = (one.attempts, one.failed, one.longest_silence, one.p50, one.p99)
            table.add_row(name, *(str(n) for n in numbers), " ".join(map(str, one.reconnects)))
        console.print(table)
        for name, one in found.items():
            for reason, times in list(one.failures.items())[:SHOWN]:
                console.print(f"{name}: {times} times: {reason}", markup=False)
    if any(one.failed for one in found.values()):
        raise typer.Exit(1)


@contextmanager
def _outside(platform: Platform) -> Iterator[World | None]:
    """In the lab this machine is the outside world as well, to which bounces go; unless somebody is that already."""
    world = World(platform.lookup(f"mx.{WORLD}")) if platform.site.lab else None
    try:
        if world:
            world.start()
    except OSError as error:
        print(f"bounces are not noted: {error.strerror}", file=sys.stderr)
        world = None
    try:
        yield world
    finally:
        if world:
            world.stop()


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `posthouse probe --record` wrote.")],
    site: Annotated[str, typer.Option("--site", metavar="SITE", help="A folder in inventory/.")] = "lab",
    late: Annotated[
        float, typer.Option(min=0, callback=finite, help="Seconds from the 250 to the mailbox; more is late.")
    ] = 60,
    as_json: Json = False,
) -> None:
    """Find every message that was acknowledged: exactly once, as it was sent, in a mailbox, a queue or a bounce."""
    from posthouse.probe import ledger

    report = ledger.check(file, load(site), late)
    if as_json:
        print(json.dumps(asdict(report) | {"ok": report.ok}))
    else:
        places = ", ".join(f"{number} in {_PLACES[kind]}" for kind, number in sorted(report.found.items()))
        console.print(f"{report.acknowledged} messages acknowledged; found {places or 'none'} ({report.seconds} s)")
        for kind in ("lost", "duplicated", "damaged", "late"):
            findings = getattr(report, kind)
            console.print(f"{kind} {len(findings)}")
            for finding in findings[:SHOWN]:
                console.print(f"  {finding}", markup=False)
            if len(findings) > SHOWN:
                console.print(f"  and {len(findings) - SHOWN} more; --json names all")
        for place in report.unsearched:
            console.print(f"not searched: {place}", markup=False)
    if not report.ok:
        raise typer.Exit(1)


_PLACES = {"mailbox": "mailboxes", "queue": "queues", "quarantine": "quarantine", "bounce": "bounces"}
