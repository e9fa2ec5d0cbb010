"""`posthouse provision …`: the command line of provisioning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from posthouse.model import Site
from posthouse.options import Json, SiteName
from posthouse.sitefile import load, refuse_foreign_macs

app = typer.Typer(help="Install bare machines from the network.", no_args_is_help=True)

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _load(name: str) -> Site:
    """A site of which no machine is also one of another site."""
    site = load(name)
    refuse_foreign_macs(site)
    return site


@app.command()
def serve(site: SiteName = "lab") -> None:
    """Serve what the site's machines boot from, until it is stopped: DHCP, TFTP, boot files, images."""
    from posthouse import lab, provision
    from posthouse.lab import requirements

    loaded = _load(site)
    requirements.ensure(requirements.PACKAGES | requirements.PROVISION)
    made = provision.prepare(loaded)
    if loaded.lab:
        lab.enter(site)
    provision.serve(loaded, made)


@app.command()
def status(site: SiteName = "lab", as_json: Json = False) -> None:
    """Show how far each machine is, why it was refused, and how long each phase took."""
    from posthouse import provision

    rows = provision.status(_load(site))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    made = Table("node", "mac", "phase", "since", "phases so far (s)", title=f"machines of {site}", box=None)
    for row in rows:
        took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["seconds"].items())
        since = "" if row["since"] is None else f"{row['since']:.0f} s"
        made.add_row(row["node"] or "", row["mac"], f"{row['phase']}{', armed' if row['armed'] else ''}", since, took)
    console.print(made)
    for row in rows:
        if row["reason"]:
            console.print(f"\n{row['node'] or row['mac']}: {row['reason']}", markup=False)


@app.command()
def reinstall(
    node: Annotated[str, typer.Argument(help="The node.")],
    site: Annotated[str, typer.Option(help="A folder in inventory/.")] = "lab",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say what would change; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Let a machine be installed again at its next boot: everything on its disk will be gone."""
    from posthouse import provision

    loaded = _load(site)
    disks = provision.target(loaded, node)
    sentence = f"{node}: at its next boot everything will be gone from {disks}"
    if not check and not yes and not typer.confirm(f"{sentence}. Go on?", err=True):
        raise typer.Exit(1)
    if not check:
        provision.arm(loaded, node)
    if as_json:
        print(json.dumps({"node": node, "disks": disks, "armed": not check}))
    else:
        console.print(f"{sentence}{' (only a check: nothing changed)' if check else ''}", markup=False)


@app.command()
def render(
    site: SiteName = "lab",
    out: Annotated[Path, typer.Option(help="An empty or new folder.")] = Path("boot"),
) -> None:
    """Write every boot file that `serve` gives to machines into a folder, for reading, and for CI to validate."""
    from posthouse.provision import write_files

    console.print(f"wrote {write_files(_load(site), out)} files below {out}")
