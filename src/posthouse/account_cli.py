"""`posthouse account …`: one documented function per verb, over `accounts.Accounts`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from posthouse import run, secrets
from posthouse.account_import import Imported, import_file
from posthouse.accounts import Accounts, Outcome
from posthouse.options import Check, Json, SiteOption
from posthouse.sitefile import load

app = typer.Typer(help="Manage accounts: directory entry, mailbox and default Sieve script.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(help="The account: its full address.")]
Stdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input, one line.")]
Several = Annotated[list[str] | None, typer.Option(metavar="ADDRESS", help="Repeatable.")]

console = Console(soft_wrap=True, highlight=False)


@contextmanager
def opened(site: str) -> Iterator[Accounts]:
    """The accounts of a site, reached from its controller's network."""
    loaded = load(site)
    run.reach(loaded)
    with Accounts(loaded, secrets.load(loaded)) as accounts:
        yield accounts


def say(outcome: Outcome, as_json: bool, check: bool) -> None:
    """Prints what was, or with --check would be, done. A generated password is shown this once."""
    if as_json:
        print(json.dumps(asdict(outcome) | {"changed": outcome.changed}))
        return
    done = "; ".join(outcome.steps) or "no change"
    console.print(f"{outcome.address}: {'would do: ' if check and outcome.changed else ''}{done}", markup=False)
    if outcome.password:
        console.print(f"password: {outcome.password}", markup=False)


def _password(from_stdin: bool) -> str | None:
    return sys.stdin.readline().rstrip("\n") if from_stdin else None


@app.command()
def add(
    address: Address,
    site: SiteOption = "lab",
    name: Annotated[str | None, typer.Option(help="The person's name.")] = None,
    quota: Annotated[int | None, typer.Option(help="MiB; 0 is without limit.")] = None,
    store: Annotated[
        str | None, typer.Option(help="By default the one with the fewest accounts for its weight.")
    ] = None,
    alias: Several = None,
    forward: Several = None,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="Keep no copy of what is forwarded.")] = False,
    spam_threshold: Annotated[int | None, typer.Option(help="Points from which mail is filed into Junk.")] = None,
    password_stdin: Stdin = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Make an account. Without --password-stdin a password is generated and shown once."""
    with opened(site) as accounts:
        outcome = accounts.add(
            address,
            name=name,
            password=_password(password_stdin),
            quota=quota,
            store=store,
            aliases=alias or (),
            forward=forward or (),
            forward_only=forward_only,
            spam_threshold=spam_threshold,
            check=check,
        )
    say(outcome, as_json, check)


@app.command()
def show(address: Address, site: SiteOption = "lab", as_json: Json = False) -> None:
    """Show an account, and how much mail it holds."""
    with opened(site) as accounts:
        data = accounts.show(address)
    if as_json:
        print(json.dumps(data))
        return
    for key, value in data.items():
        shown = ", ".join(value) if isinstance(value, tuple | list) else value
        console.print(f"{key:<15} {shown if shown not in (None, '') else '-'}", markup=False)


@app.command("list")
def list_accounts(
    site: SiteOption = "lab",
    match: Annotated[str | None, typer.Option(help="A part of the address or the name.")] = None,
    store: Annotated[str | None, typer.Option(help="Only those on this store.")] = None,
    status: Annotated[str | None, typer.Option(help="Only those that are active, or suspended.")] = None,
    as_json: Json = False,
) -> None:
    """List accounts."""
    with opened(site) as accounts:
        found = accounts.find(match, store, status)
        if as_json:
            print(json.dumps([asdict(account) for account in found]))
            return
        table = Table("address", "name", "store", "quota", "status", box=None, header_style="bold", pad_edge=False)
        for account in found:
            table.add_row(account.address, account.name, account.store, str(account.quota or "-"), account.status)
    console.print(table)


@app.command()
def passwd(
    address: Address,
    site: SiteOption = "lab",
    password_stdin: Stdin = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Set a password. Without --password-stdin one is generated and shown once."""
    with opened(site) as accounts:
        outcome = accounts.passwd(address, _password(password_stdin), check)
    say(outcome, as_json, check)


@app.command()
def alias(
    address: Address,
    site: SiteOption = "lab",
    add: Several = None,
    remove: Several = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Give an account more addresses (--add), or take some away (--remove)."""
    with opened(site) as accounts:
        outcome = accounts.alias(address, add or (), remove or (), check)
    say(outcome, as_json, check)


@app.command()
def forward(
    address: Address,
    site: SiteOption = "lab",
    to: Several = None,
    only: Annotated[bool, typer.Option("--only", help="Keep no copy.")] = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Send copies of all mail elsewhere (--to, repeatable); without --to, no more."""
    with opened(site) as accounts:
        outcome = accounts.forward(address, to or (), only, check)
    say(outcome, as_json, check)


@app.command()
def quota(
    address: Address,
    mib: Annotated[int, typer.Argument(metavar="MIB", help="0 is without limit.")],
    site: SiteOption = "lab",
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Limit an account's mailbox."""
    with opened(site) as accounts:
        outcome = accounts.quota(address, mib, check)
    say(outcome, as_json, check)


@app.command()
def spam(
    address: Address,
    points: Annotated[int | None, typer.Argument(help="Without it, the site's default.")] = None,
    site: SiteOption = "lab",
    check: Check = False,
    as_json: Json = False,
) -> None:
    """File mail from this many points on into Junk."""
    with opened(site) as accounts:
        outcome = accounts.spam(address, points, check)
    say(outcome, as_json, check)


@app.command()
def suspend(address: Address, site: SiteOption = "lab", check: Check = False, as_json: Json = False) -> None:
    """Refuse an account's logins; its mail is still delivered."""
    with opened(site) as accounts:
        outcome = accounts.suspend(address, check)
    say(outcome, as_json, check)


@app.command()
def resume(address: Address, site: SiteOption = "lab", check: Check = False, as_json: Json = False) -> None:
    """Take a suspension back."""
    with opened(site) as accounts:
        outcome = accounts.resume(address, check)
    say(outcome, as_json, check)


@app.command()
def delete(address: Address, site: SiteOption = "lab", check: Check = False, as_json: Json = False) -> None:
    """Remove an account; its store keeps the mailbox aside for some days."""
    with opened(site) as accounts:
        outcome = accounts.delete(address, check)
    say(outcome, as_json, check)


@app.command("import")
def import_accounts(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="CSV; see docs/accounts.md.")
    ],
    site: SiteOption = "lab",
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Make an account of each line of a CSV file; run it again to go on where it stopped."""
    with opened(site) as accounts, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"importing {file.name}", total=1.0)

        def progress(state: Imported, fraction: float) -> None:
            bar.update(task, completed=fraction, description=f"{state.added} added, {len(state.bad)} bad")

        state = import_file(accounts, file, check=check, progress=progress)
    if as_json:
        print(json.dumps(asdict(state)))
    else:
        for number, reason in state.bad:
            console.print(f"{file}:{number}: {reason}", markup=False)
        would = "would add " if check else ""
        console.print(
            f"{would}{state.added} added, {state.unchanged} unchanged, {len(state.bad)} bad ({state.per_second:.0f}/s)"
        )
        if state.stopped:
            console.print(f"stopped: {state.stopped}; run it again to go on", markup=False)
    if state.bad or state.stopped:
        raise typer.Exit(1)
