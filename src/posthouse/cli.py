"""The command line: one documented function per verb, over the functions that do the work."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from posthouse import (
    PosthouseError,
    __version__,
    account_cli,
    backup_cli,
    drift_cli,
    failover_cli,
    move_cli,
    node_cli,
    probe_cli,
    provision_cli,
)
from posthouse.ops.steps import GOES_ON
from posthouse.options import Check, Json, SiteName
from posthouse.sitefile import load, refuse_foreign_macs

app = typer.Typer(
    help="Stands up, verifies, expands, operates and rebuilds a mail platform from one site file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
lab_app = typer.Typer(help="Run a site on this machine, in network namespaces of its own.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure, as ratios in one run.", no_args_is_help=True)
app.add_typer(account_cli.app, name="account")
failover_cli.add(app)
app.add_typer(backup_cli.app, name="backup")
app.add_typer(backup_cli.restore_app, name="restore")
app.command()(backup_cli.drill)
app.add_typer(provision_cli.app, name="provision")
app.command()(move_cli.move)
app.command()(move_cli.rebalance)
app.add_typer(lab_app, name="lab")
app.add_typer(bench_app, name="bench")
app.add_typer(probe_cli.app, name="ledger")
app.command()(probe_cli.probe)
app.command()(drift_cli.drift)
node_cli.add_to(app)

Tier = Annotated[list[str] | None, typer.Option("--tier", help="Only this tier (repeatable).")]
Limit = Annotated[str | None, typer.Option("--limit", metavar="NODES", help="Only these nodes: mail1,mail2 or mail*.")]

# Typer makes this exit status of Ctrl-C, and says nothing.
INTERRUPTED = 130

# People read what a verb did on standard error's terminal too, so that --json leaves standard output to the machine.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
progress = Console(stderr=True, soft_wrap=True)


def show(data: Any, as_json: bool, human: Any) -> None:
    """Prints `data` as JSON, or what `human` makes of it."""
    if as_json:
        print(json.dumps(data, indent=2, default=str))
    else:
        console.print(human)


def table(title: str, *columns: str, rows: list[list[Any]]) -> Table:
    """A plain table."""
    made = Table(*columns, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Common to all verbs."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if version:
        print(f"posthouse {__version__}")


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Install what is missing.")] = False, as_json: Json = False
) -> None:
    """Check that this machine can be a controller, and can run the lab."""
    from posthouse import doctor as module

    checks = module.checks(fix)
    show(
        checks,
        as_json,
        table("controller", "check", "found", "to do", rows=[[c["check"], c["found"], c["fix"]] for c in checks]),
    )
    if any(not check["ok"] for check in checks):
        raise typer.Exit(1)


@app.command()
def init(
    site: SiteName,
    domain: Annotated[str, typer.Option(help="The first mail domain.")],
    cidr: Annotated[str, typer.Option(help="The network of the nodes.")] = "10.77.0.0/24",
    in_lab: Annotated[bool, typer.Option("--lab", help="A site that runs in the lab on this machine.")] = False,
) -> None:
    """Write a new, commented site with fresh secrets."""
    from posthouse import init as module

    path = module.write(site, domain, cidr, in_lab)
    console.print(f"wrote {path} and its secrets; read it, then: posthouse plan {site}")


@app.command()
def plan(site: SiteName = "lab", as_json: Json = False) -> None:
    """Show what a site becomes: nodes, addresses, stores, open ports, and its load beside what it can do."""
    from posthouse import plan as module

    data = module.plan(load(site))
    if as_json:
        show(data, True, None)
        return
    console.print(
        table(
            "nodes",
            "node",
            "class",
            "address",
            "tiers",
            rows=[
                [n["name"], f"{n['class']}, spare" if n["spare"] else n["class"], n["address"], " ".join(n["tiers"])]
                for n in data["nodes"]
            ],
        )
    )
    console.print(
        table(
            "\nstores",
            "store",
            "address",
            "primary",
            "replicas",
            "weight",
            rows=[
                [s["name"], s["address"], s["primary"], " ".join(s["replicas"]), s["weight"]] for s in data["stores"]
            ],
        )
    )
    console.print(
        table("\nopen ports", "class", "port", "to", rows=[[p["class"], p["port"], p["from"]] for p in data["ports"]])
    )
    columns = {
        "what": "what",
        "needed at peak": "needed",
        "all nodes": "capacity",
        "one node down": "degraded",
        "headroom": "headroom",
        "bound by": "bound",
    }
    rows = [[row[key] for key in columns.values()] for row in data["load"]]
    console.print(table("\nload", *columns, rows=rows))
    for note in data["notes"]:
        console.print(f"\n{note}")


@app.command()
def render(
    site: SiteName = "lab",
    out: Annotated[Path, typer.Option(help="An empty or new folder.")] = Path("rendered"),
    with_secrets: Annotated[bool, typer.Option("--with-secrets", help="Put secrets in, not placeholders.")] = False,
) -> None:
    """Write every file of every node, and the DNS zones, into a folder: for reading, and for CI to validate."""
    from posthouse import plan as module

    count = module.write_tree(load(site), out, with_secrets)
    console.print(f"wrote {count} files below {out}")


@app.command()
def deploy(
    site: SiteName = "lab",
    check: Check = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show the differences; secrets are masked.")] = False,
    limit: Limit = None,
    tier: Tier = None,
    as_json: Json = False,
) -> None:
    """Bring every node to what the site says. Changes nothing on a node that is already there."""
    from posthouse import run, secrets

    arguments = [*(["--check"] if check else []), *(["--diff"] if diff else []), *(["--limit", limit] if limit else [])]
    loaded = load(site)
    with run.exclusive(loaded):
        secrets.ensure(loaded)  # a new site has none yet
        result = run.playbook(
            loaded, "deploy", *arguments, variables={"deploy_tiers": tier} if tier else None, quiet=as_json
        )
    if as_json:
        print(json.dumps({"nodes": result["nodes"]}, indent=2))
    else:
        nodes = result["nodes"].values()
        progress.print(
            f"{len(nodes)} nodes: changed={sum(n['changed'] for n in nodes)}, failed={sum(not n['ok'] for n in nodes)}"
        )
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def verify(site: SiteName = "lab", tier: Tier = None, as_json: Json = False) -> None:
    """Prove every tier of a running site, read-only."""
    from posthouse import run

    result = run.verify(load(site), tier, quiet=True)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for item in result["checks"]:
        rows.setdefault((item["tier"], item["check"]), {})[item["node"]] = {"passed": "ok", "failed": "FAILED"}.get(
            item["outcome"], item["outcome"]
        )
    nodes = sorted({node for row in rows.values() for node in row})
    show(
        result,
        as_json,
        table(
            "verify",
            "tier",
            "check",
            *nodes,
            rows=[[*key, *(row.get(n, "") for n in nodes)] for key, row in rows.items()],
        ),
    )
    for item in result["checks"]:
        if item["outcome"] == "failed" and not as_json:
            console.print(f"\n{item['tier']}: {item['check']} on {item['node']}\n{item['message']}", markup=False)
    if not as_json:
        console.print(f"verify: {result['passed']} passed, {result['failed']} failed")
    if result["failed"] or not result["passed"]:
        raise typer.Exit(1)


@lab_app.command("up")
def lab_up(
    site: SiteName = "lab",
    vm: Annotated[
        list[str] | None, typer.Option("--vm", metavar="NODE", help="Run this node as a QEMU machine (repeatable).")
    ] = None,
    uefi: Annotated[bool, typer.Option("--uefi", help="New machines have UEFI firmware, not BIOS.")] = False,
) -> None:
    """Build the images if needed and start all nodes of a site; what runs already stays.

    A QEMU machine has a blank disk at first and is installed from the network, as a real one is.
    """
    from posthouse import lab, secrets
    from posthouse.lab import requirements

    loaded = load(site)
    if vm:
        refuse_foreign_macs(loaded)
    lab.ensure_requirements()
    if vm:
        requirements.ensure(requirements.MACHINES)
    lab.up(loaded, secrets.ensure(loaded), vm or (), uefi)
    progress.print(f"{site} is up; next: posthouse deploy {site}")


@lab_app.command("down")
def lab_down(site: SiteName = "lab") -> None:
    """Stop and remove everything of a lab, also of one that died half-way."""
    from posthouse import lab

    lab.down(site)


@lab_app.command("status")
def lab_status(site: SiteName = "lab", as_json: Json = False) -> None:
    """Show the nodes of a lab."""
    from posthouse import lab

    nodes = lab.status(load(site).name)
    show(
        nodes,
        as_json,
        table(f"lab {site}", "node", "address", "state", rows=[[n["name"], n["address"], n["state"]] for n in nodes]),
    )


@lab_app.command("shell")
def lab_shell(
    node: Annotated[str, typer.Argument(help="The node.")], site: Annotated[str, typer.Option()] = "lab"
) -> None:
    """Open a root shell on a node."""
    from posthouse import lab

    lab.shell(site, node)


@lab_app.command("kill")
def lab_kill(
    node: Annotated[str, typer.Argument(help="The node.")], site: Annotated[str, typer.Option()] = "lab"
) -> None:
    """Cut the power of a node; `lab up` starts it again."""
    from posthouse import lab

    lab.kill(site, node)


@app.command()
def demo(
    site: SiteName = "lab", keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster running.")] = False
) -> None:
    """Build a whole cluster on this machine and send mail through it; prints one line per check."""
    from posthouse import demo as module

    raise typer.Exit(module.demo(load(site), keep))


@app.command()
def test(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]...", help="Folders under tests/; all by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Run long soaks in full.")] = False,
) -> None:
    """Run posthouse's own tests; does all its own set-up. The last line is the summary."""
    from posthouse import selftest

    raise typer.Exit(selftest.test(suites or [], full))


@app.command()
def docs() -> None:
    """Write docs/reference anew, from the site model, the roles and this command line."""
    from posthouse import reference

    for path in reference.write():
        console.print(f"wrote {path}")


@bench_app.command("converge")
def bench_converge(
    site: SiteName = "lab", runs: Annotated[int, typer.Option(min=1)] = 3, as_json: Json = False
) -> None:
    """Converge with nothing to change, beside stock Ansible, Mitogen and pyinfra doing the same work."""
    from posthouse import bench

    result = bench.converge(load(site), runs, lambda text: progress.print(text, markup=False))
    show(
        result,
        as_json,
        table(
            "converge, nothing to change",
            "engine",
            "seconds",
            "times slower",
            rows=[[name, result["seconds"][name], result["ratios"].get(name, 1)] for name in result["seconds"]],
        ),
    )


@bench_app.command("provision")
def bench_provision(site: SiteName = "lab", as_json: Json = False) -> None:
    """Sizes, phases of the machines that were installed, and serving 1, 10 and 50 simulated machines at once."""
    from posthouse.lab import requirements
    from posthouse.provision import bench

    loaded = load(site)
    requirements.ensure(requirements.PACKAGES | requirements.PROVISION)
    result = bench.bench(loaded)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console.print(f"image of {result['image'].pop('class')}: {result['image']} MiB".replace("'", ""), markup=False)
    columns = ("clients", "seconds", "mib_s", "memory_mib")
    rows = [[row[column] for column in columns] for row in result["serving"]]
    console.print(table("\nserving simulated machines at once", *columns, rows=rows))
    for name, phases in result["machines"].items():
        console.print(f"{name}: " + ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in phases.items()))
    if result["containers"]:
        console.print("{nodes} nodes as containers: {seconds} s".format(**result["containers"]))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors are one sentence that names the place, the reason and the fix."""
    started = time.monotonic()
    # Who ends a command, or hangs up, means what Ctrl-C means: service is put back, and labs are cleared away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup
            signal.signal(number, _interrupt)
    try:
        app()
    except PosthouseError as error:
        sys.exit(f"posthouse: {error}")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(f"posthouse: stopped after {time.monotonic() - started:.0f} s; {GOES_ON}", file=sys.stderr)
        raise
