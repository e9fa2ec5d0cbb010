"""`posthouse drift`: over `posthouse.ops.drift`."""

from __future__ import annotations

import json
import sys

import typer
from rich.console import Console

from posthouse import secrets
from posthouse.options import Json, SiteName
from posthouse.sitefile import load


def drift(site: SiteName = "lab", as_json: Json = False) -> None:
    """Compare a running site with what it should be: files, daemons and data of all nodes, in seconds; read-only."""
    from posthouse.ops import drift as module

    loaded = load(site)
    report = module.drift(loaded, secrets.load(loaded))
    if as_json:
        findings = [finding._asdict() for finding in report.findings]
        print(json.dumps({"nodes": report.nodes, "findings": findings, "seconds": report.seconds}, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
        for finding in report.findings:
            console.print(f"{finding.node}: {finding.layer}: {finding.thing} {finding.what}", markup=False)
            console.print(f"    {finding.fix}", markup=False)
        console.print(f"drift: {len(report.findings)} on {report.nodes} nodes ({report.seconds} s)")
    if report.findings:
        raise typer.Exit(1)
