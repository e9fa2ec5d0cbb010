"""`posthouse backup`, `restore` and `drill`: one documented function per verb, over `posthouse.ops`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from posthouse import secrets
from posthouse.ops import backup as backups
from posthouse.ops import drill as drills
from posthouse.ops import restore
from posthouse.ops.merge import Wanted
from posthouse.ops.repository import Repository
from posthouse.options import Check, Json, SiteName, SiteOption
from posthouse.sitefile import load


class Default(TyperGroup):
    """A verb with more words below it, that also works without: what is not one of them belongs to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Called by click."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


restore_app = typer.Typer(help="Bring back what a backup has and the site lacks.", no_args_is_help=True)
app = typer.Typer(cls=Default, help="Back a site up, off its replicas, into its encrypted repository.")

Address = Annotated[str, typer.Argument(help="The account: its full address.")]
At = Annotated[
    str | None,
    typer.Option(
        metavar="TIME|BACKUP",
        help="As it was then, in UTC unless it says +02:00; by default the newest backup that has it.",
    ),
]
Into = Annotated[str | None, typer.Option(metavar="FOLDER", help="Put it beside what is there, into this folder.")]

console = Console(soft_wrap=True, highlight=False)
progress = Console(stderr=True, soft_wrap=True, highlight=False)


def _say(text: str) -> None:
    progress.print(text, markup=False)


def _table(*columns: str, rows: list[list[Any]]) -> Table:
    made = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        made.add_row(*("-" if cell is None else str(cell) for cell in row))
    return made


def _size(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:.1f} MiB"


@app.command("run")
def run_backup(site: SiteName = "lab", check: Check = False, as_json: Json = False) -> None:
    """Make a backup now. This is what `posthouse backup [SITE]` does."""
    loaded = load(site)
    result = backups.backup(loaded, secrets.load(loaded), check=check, say=_say)
    if as_json:
        print(json.dumps(result))
        return
    columns = "node", "bytes", "added", "accounts", "messages", "frozen_ms", "seconds"
    rows = [
        [part["name"], *(_size(part.get(c)) if c in ("bytes", "added") else part.get(c) for c in columns)]
        for part in result["parts"]
    ]
    console.print(_table("part", *columns, rows=rows))
    for part in result["left_out"]:
        console.print(f"{part['name']}: {part['note']}", markup=False)
    done = "would be made" if check else f"made in {result['seconds']} s"
    place = f"{'a new repository, ' if result['new'] else ''}{result['repository']}"
    console.print(f"backup {result['backup']} {done}, in {place}", markup=False)


@app.command("list")
def list_backups(site: SiteName = "lab", as_json: Json = False) -> None:
    """List the backups of a site, oldest first."""
    loaded = load(site)
    repository = Repository(loaded, secrets.load(loaded))
    repository.require()
    found = backups.backups(repository)
    if as_json:
        print(json.dumps([{"backup": b.name, "complete": b.complete, "parts": sorted(b.parts)} for b in found]))
        return
    rows = [[b.name, "complete" if b.complete else "NOT COMPLETE", " ".join(sorted(b.parts))] for b in found]
    console.print(_table("backup", "state", "parts", rows=rows))


@app.command("check")
def check_backups(
    site: SiteName = "lab",
    quick: Annotated[bool, typer.Option("--quick", help="Look only whether all files are there.")] = False,
    as_json: Json = False,
) -> None:
    """Read the repository from end to end, and say what is damaged."""
    loaded = load(site)
    result = backups.examine(loaded, secrets.load(loaded), quick=quick)
    if as_json:
        print(json.dumps(result))
    else:
        for line in result["damage"]:
            console.print(line, markup=False)
        console.print(f"{len(result['backups'])} backups, {'intact' if result['ok'] else 'DAMAGED'}")
    if not result["ok"]:
        raise typer.Exit(1)


@app.command("prune")
def prune_backups(site: SiteName = "lab", check: Check = False, as_json: Json = False) -> None:
    """Remove the backups that backup.keep of the site no longer asks for."""
    loaded = load(site)
    result = backups.prune(loaded, secrets.load(loaded), check=check)
    if as_json:
        print(json.dumps(result))
    else:
        verb = "would remove" if check else "removed"
        console.print(f"{verb} {', '.join(result['removed']) or 'none'}; {len(result['kept'])} stay")


@app.command("key")
def show_key(site: SiteName = "lab") -> None:
    """Print the repository's password, to be kept somewhere else than the site."""
    print(secrets.load(load(site)).password("backup_repository"))


def _restored(result: restore.Restored, as_json: bool, check: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result) | {"changed": result.changed}))
        return
    for step in result.steps:
        console.print(f"{'would do: ' if check else ''}{step}", markup=False)
    verb = "would come back" if check else "came back"
    console.print(
        f"{result.address}: {result.messages} messages {verb} from {result.backup}, {result.there} were there"
    )


@restore_app.command("message")
def restore_message(
    address: Address,
    message: Annotated[str, typer.Argument(help="Its Message-ID, <…>, or with --folder its UID in the backup.")],
    folder: Annotated[str | None, typer.Option(help="Look only in this folder.")] = None,
    site: SiteOption = "lab",
    at: At = None,
    into: Into = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Bring one message back."""
    if message.isdigit() and not folder:
        raise typer.BadParameter("a UID counts in one folder; name it with --folder")
    loaded = load(site)
    wanted = Wanted(folder, message, into)
    _restored(restore.mail(loaded, secrets.load(loaded), address, wanted, at=at, check=check), as_json, check)


@restore_app.command("folder")
def restore_folder(
    address: Address,
    folder: Annotated[str, typer.Argument(help="Its name, like Archive/2025.")],
    site: SiteOption = "lab",
    at: At = None,
    into: Into = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Bring back what a folder lacks."""
    loaded = load(site)
    wanted = Wanted(folder, None, into)
    _restored(restore.mail(loaded, secrets.load(loaded), address, wanted, at=at, check=check), as_json, check)


@restore_app.command("mailbox")
def restore_mailbox(
    address: Address,
    site: SiteOption = "lab",
    at: At = None,
    into: Into = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Bring back what an account's mailbox lacks: folders, messages, rights, annotations, Sieve scripts."""
    loaded = load(site)
    wanted = Wanted(None, None, into)
    _restored(restore.mail(loaded, secrets.load(loaded), address, wanted, at=at, check=check), as_json, check)


@restore_app.command("account")
def restore_account(
    address: Address, site: SiteOption = "lab", at: At = None, check: Check = False, as_json: Json = False
) -> None:
    """Bring a deleted account back: its entry and password, limit, mail, rights and Sieve scripts."""
    loaded = load(site)
    _restored(restore.account(loaded, secrets.load(loaded), address, at=at, check=check), as_json, check)


@restore_app.command("directory")
def restore_directory(site: SiteName = "lab", at: At = None, check: Check = False, as_json: Json = False) -> None:
    """Take all accounts' entries back to what they were; accounts made since stay."""
    loaded = load(site)
    result = restore.directory(loaded, secrets.load(loaded), at=at, check=check)
    if as_json:
        print(json.dumps(result))
        return
    for address in result["made"]:
        console.print(f"{'would make' if check else 'made'} {address}", markup=False)
    for address, attributes in result["changed"].items():
        console.print(f"{'would change' if check else 'changed'} {address}: {', '.join(attributes)}", markup=False)
    console.print(f"{len(result['made'])} entries made, {len(result['changed'])} changed, from {result['backup']}")


@restore_app.command("queue")
def restore_queue(
    node: Annotated[str, typer.Argument(help="The node whose queues they were.")],
    site: SiteOption = "lab",
    at: At = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Queue again what waited on a node at a backup. Only where the node lost it: what was sent since is sent twice."""
    loaded = load(site)
    result = restore.queue(loaded, secrets.load(loaded), node, at=at, check=check)
    if as_json:
        print(json.dumps(result))
        return
    counts = ", ".join(f"{count} of {tier}" for tier, count in result["messages"].items())
    console.print(f"{node}: {counts} messages {'would be ' if check else ''}queued, from {result['backup']}")


def drill(
    site: SiteName = "lab",
    status: Annotated[bool, typer.Option("--status", help="Only say whether the last one is young and good.")] = False,
    at: At = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the drill's lab running.")] = False,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Restore the last backup into an isolated lab, compare it with the live data, and publish RTO and RPO."""
    loaded = load(site)
    if status:
        state = drills.status(loaded)
        if as_json:
            print(json.dumps(state))
        else:
            console.print(state["finding"] or f"good: {state['last']['backup']}, {state['last']['time']}", markup=False)
        if not state["ok"]:
            raise typer.Exit(1)
        return
    result = drills.drill(loaded, at=at, check=check, keep=keep, say=_say)
    if as_json:
        print(json.dumps(result))
    elif not check:
        console.print(
            f"{'passed' if result['ok'] else 'FAILED: ' + result['failed']}: RTO {result['rto_seconds']} s, "
            f"RPO {result['rpo_seconds']} s and {result['newer']} messages; {result['restored']} restored, "
            f"{result['equal']} equal, {result['gone']} no longer live, {result['damaged']} damaged",
            markup=False,
        )
    if not check and not result["ok"]:
        raise typer.Exit(1)
