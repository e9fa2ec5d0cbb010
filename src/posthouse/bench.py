"""Converge beside what operators use today, doing the same work: stock Ansible, Ansible with Mitogen, and pyinfra.

The equivalents are generated from the roles' own manifests and templates, for the nodes of one site. Before anything
is timed, each of them builds all files in an empty folder on the nodes, and these must equal the live ones to the
byte, mode and owner; and its timed runs must find nothing to change.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from posthouse import PosthouseError, render, roles, run, secrets
from posthouse.model import Site

Variables = dict[str, Any]
PROOF = "/run/posthouse-bench"
JINJA = {"trim_blocks": True, "lstrip_blocks": True}


class Unequal(PosthouseError):
    """An equivalent does not do the same work, so its time says nothing."""


def converge(site: Site, runs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Times all engines with nothing to change, interleaved. `say` hears how far it is: stock Ansible takes minutes.

    Returns {"ratios": {engine: times slower than posthouse}, "seconds": {engine: median}, "runs": {engine: [s, …]},
    "nodes": n, "files": n, "services": n}. Raises Unequal.
    """
    config = run.reach(site)
    opened = secrets.load(site)
    generations = {}
    with tempfile.TemporaryDirectory(prefix="posthouse-bench-") as folder:
        work = Path(folder)
        for node in site.nodes.values():
            variables = render.shared_variables(site) | render.node_variables(site, node) | opened.for_node(node)
            generations[node.name] = render.generation(variables, list(node.tiers))
            _leave_out_excused(generations[node.name], node.name, config)
            _private(work / f"{node.name}.json", json.dumps(variables))
        for tier in roles.TIERS:
            # Templates include each other by their role, and each engine looks for them where it is started.
            (work / tier).symlink_to(roles.ROLES / tier)
        _private(work / "stock.yml", yaml.safe_dump(stock(site, generations, work), sort_keys=False, width=1000))
        _private(work / "deploy.py", PYINFRA_DEPLOY)
        _private(work / "hosts.py", _pyinfra_hosts(site, generations, work, config))
        engines = Engines(site, work)
        for engine in ("mitogen", "pyinfra"):  # stock runs Mitogen's very playbook
            for name in site.nodes:  # an earlier proof may have been interrupted
                subprocess.run(["ssh", "-F", config, name, f"rm -rf {PROOF}"], check=True)
            engines.run(engine, prefix=PROOF)
            _prove(site, generations, engine, config)
            say(f"{engine}: makes the same files")
        times: dict[str, list[float]] = {name: [] for name in ("posthouse", "stock", "mitogen", "pyinfra")}
        for number in range(1, runs + 1):
            for engine, seconds in times.items():
                started = time.monotonic()
                changed = engines.run(engine)
                seconds.append(round(time.monotonic() - started, 2))
                if changed:
                    raise Unequal(f"{engine}: found something to change ({changed}); deploy first, then measure")
                say(f"run {number} of {runs}: {engine} {seconds[-1]} s")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "ratios": {name: round(medians[name] / medians["posthouse"], 1) for name in times if name != "posthouse"},
        "seconds": medians,
        "runs": times,
        "nodes": len(generations),
        "files": sum(len(generation["files"]) for generation in generations.values()),
        "services": sum(len(generation["services"]) for generation in generations.values()),
    }


def _leave_out_excused(generation: Variables, node: str, config: Path) -> None:
    """Drops services that systemd's conditions exclude on the node: the others would try to start them every time."""
    units = [service["unit"] for service in generation["services"]]
    command = ["ssh", "-F", config, node, "systemctl show -p ActiveState --value", *units]
    states = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    running = {unit for unit, state in zip(units, states, strict=True) if state == "active"}
    generation["services"] = [service for service in generation["services"] if service["unit"] in running]


def _private(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


class Engines:
    """Starts each engine on the whole site; `run` returns what it changed, in its own words ("" for nothing)."""

    def __init__(self, site: Site, work: Path) -> None:
        self.site, self.work = site, work

    def run(self, engine: str, prefix: str = "") -> str:
        """Runs an engine; with `prefix`, only its files and directories, into that folder. Raises Unequal."""
        playbook = {"stock": self.work / "stock.yml", "mitogen": self.work / "stock.yml"}
        environment = run.environment(self.site)
        command: list[str | Path]
        if engine == "pyinfra":
            command = [
                run.BIN / "pyinfra",
                "-y",
                "--fail-percent",
                "0",
                self.work / "hosts.py",
                self.work / "deploy.py",
                "--data",
                f"prefix={prefix}",
            ]
        else:
            path = playbook.get(engine, roles.ROOT / "playbooks" / "deploy.yml")
            command = [run.BIN / "ansible-playbook", path]
            if engine != "posthouse":
                # The stock output names each task, and so what was changed.
                environment |= {"ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default"}
                command += ["--extra-vars", json.dumps({"prefix": prefix})] + (["--tags", "files"] if prefix else [])
            if engine == "mitogen":
                import ansible_mitogen  # where Mitogen keeps its strategies differs between its versions

                strategies = Path(ansible_mitogen.__file__).parent / "plugins" / "strategy"
                environment |= {"ANSIBLE_STRATEGY_PLUGINS": str(strategies), "ANSIBLE_STRATEGY": "mitogen_linear"}
        done = subprocess.run(
            command,
            env=environment,
            cwd=self.work if engine == "pyinfra" else roles.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason, _, _ = (done.stdout + done.stderr).partition("--> Results")  # pyinfra's, a table of everything
            raise Unequal(f"{engine}: failed:\n{reason[-3000:]}")
        if engine == "pyinfra":
            # The last summary of an operation that did something says Success, else No changes.
            return "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "] Success" in line)
        if engine == "posthouse":
            return "".join(line for line in done.stdout.splitlines() if " changed " in line)
        return "; ".join(_changes(done.stdout))


def _changes(output: str) -> Iterator[str]:
    """What Ansible's own output says was changed: "mail1: the task's name"."""
    task = ""
    for line in output.splitlines():
        if heading := re.match(r"TASK \[(.*)\]", line):
            task = heading[1]
        elif host := re.match(r"changed: \[([^]]+)\]", line):
            yield f"{host[1]}: {task}"


def stock(site: Site, generations: dict[str, Any], work: Path) -> list[Variables]:
    """The site as a stock playbook: one template, file, apt or systemd_service task for each item of the manifests."""
    plays = []
    for tier in roles.TIERS:
        nodes = [node.name for node in site.groups[tier]]
        tasks = list(_stock_tasks(tier, {name: generations[name] for name in nodes}))
        plays.append(
            {
                "name": f"Tier {tier}",
                "hosts": nodes,
                "gather_facts": False,
                "vars_files": [f"{work}/{{{{ inventory_hostname }}}}.json"],
                "tasks": tasks,
            }
        )
    return plays


def _stock_tasks(tier: str, generations: dict[str, Any]) -> Any:
    manifest = roles.manifest(tier)
    each = manifest.get("each", {})

    def items_of(generation: Variables, kind: str) -> list[str]:
        return [service["unit"] for service in generation["services"]] if kind == "units" else list(generation[kind])

    def here(kind: str, path: str) -> list[str]:
        """On which nodes the item exists; with {each} names it does where its items do."""
        pattern = re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)))
        return [
            name
            for name, found in generations.items()
            if any(pattern.fullmatch(item) for item in items_of(found, kind))
        ]

    def task(name: str, module: str, arguments: Variables, kind: str = "", path: str = "") -> Variables:
        made: Variables = {"name": name, f"ansible.builtin.{module}": arguments}
        for word, items in each.items():
            if f"{{{word}}}" in path:
                made = json.loads(json.dumps(made).replace(f"{{{word}}}", f"{{{{ {word}.name }}}}"))
                made |= {"loop": f"{{{{ {items} }}}}", "loop_control": {"loop_var": word}}
        if kind and len(here(kind, path)) < len(generations):
            made["when"] = f"inventory_hostname in {here(kind, path)}"
        if kind in ("files", "directories"):
            made["tags"] = ["files"]
        return made

    if manifest.get("packages"):
        yield task("Install packages", "apt", {"name": manifest["packages"], "install_recommends": False})
    for user, groups in manifest.get("groups", {}).items():
        yield task(f"Groups of {user}", "user", {"name": user, "groups": groups, "append": True})
    for path, text in manifest.get("directories", {}).items():
        arguments: Variables = {"path": f"{{{{ prefix }}}}{path}", "state": "directory"} | render.access(text)
        yield task(f"Directory {path}", "file", arguments, "directories", path)
    for path, source in render.sources(tier).items():
        if not here("files", path):
            continue
        access = render.access(render.mode(manifest, path))
        # In the folder of the proof the tree has to be made first; on the live tree it is there.
        yield task(
            f"Folder of {path}",
            "file",
            {"path": f"{{{{ prefix }}}}{Path(path).parent}", "state": "directory"},
            "files",
            path,
        ) | {"tags": ["files", "never"]}
        module, extra = ("template", JINJA) if source.suffix == ".j2" else ("copy", {})
        arguments = {"dest": f"{{{{ prefix }}}}{path}", **access, **extra}
        made = task(f"File {path}", module, arguments, "files", path)
        made[f"ansible.builtin.{module}"]["src"] = str(source)
        yield made
    for unit in manifest.get("masked", []):
        yield task(f"Mask {unit}", "systemd_service", {"name": unit, "masked": True})
    for unit in manifest.get("services", {}):
        if here("units", render.unit_name(unit)):
            yield task(
                f"Service {unit}",
                "systemd_service",
                {"name": unit, "enabled": True, "state": "started"},
                "units",
                render.unit_name(unit),
            )


def _pyinfra_hosts(site: Site, generations: dict[str, Any], work: Path, config: Path) -> str:
    """pyinfra's inventory: for each node what to do, item by item, and the variables of the templates."""
    hosts = []
    for node in site.nodes.values():
        variables = json.loads((work / f"{node.name}.json").read_text())
        items: dict[str, list[Any]] = {
            "packages": [],
            "groups": [],
            "directories": [],
            "files": [],
            "masked": [],
            "units": [],
        }
        for tier in node.tiers:
            manifest = roles.manifest(tier)
            each = manifest.get("each", {})
            items["packages"].append(manifest.get("packages", []))
            items["groups"] += [[user, groups] for user, groups in manifest.get("groups", {}).items()]
            items["masked"] += [render.unit_name(unit) for unit in manifest.get("masked", [])]
            for path, text in manifest.get("directories", {}).items():
                for name, _ in render.instances(path, each, variables):
                    items["directories"].append({"path": name} | _pyinfra_access(text))
            for path, source in render.sources(tier).items():
                for name, extra in render.instances(path, each, variables):
                    if name in generations[node.name]["files"]:
                        access = _pyinfra_access(render.mode(manifest, path))
                        items["files"].append({"src": str(source), "dest": name, "extra": extra} | access)
        items["units"] = [service["unit"] for service in generations[node.name]["services"]]
        data = {
            "ssh_hostname": node.address,
            "ssh_user": "root",
            "ssh_key": str(config.parent / "id"),
            "ssh_known_hosts_file": str(config.parent / "known_hosts"),
            "items": items,
            "variables": variables,
        }
        hosts.append((node.name, data))
    return f"import json\n\nnodes = [tuple(host) for host in json.loads({json.dumps(hosts)!r})]\n"


def _pyinfra_access(text: str) -> dict[str, str]:
    access = render.access(text)
    return {"mode": access["mode"], "user": access["owner"], "group": access["group"]}


PYINFRA_DEPLOY = """
from pathlib import Path

from jinja2 import FunctionLoader
from pyinfra import host
from pyinfra.operations import apt, files, server, systemd

items, variables, prefix = host.data.items, host.data.variables, host.data.prefix
# What a template includes ends without a newline, as in Ansible.
includes = FunctionLoader(lambda name: Path(name).read_text().removesuffix("\\n"))
jinja = {"trim_blocks": True, "lstrip_blocks": True, "loader": includes}
if not prefix:
    for packages in host.loop(items["packages"]):
        apt.packages(packages=packages, no_recommends=True)
    for user, groups in host.loop(items["groups"]):
        server.user(user=user, groups=groups, append=True, ensure_home=False)
for item in host.loop(items["directories"]):
    files.directory(path=prefix + item["path"], mode=item["mode"], user=item["user"], group=item["group"])
if prefix:
    made = {item["path"] for item in items["directories"]}
    for folder in host.loop(sorted({str(Path(item["dest"]).parent) for item in items["files"]} - made)):
        files.directory(path=prefix + folder)
for item in host.loop(items["files"]):
    access = {"mode": item["mode"], "user": item["user"], "group": item["group"]}
    if item["src"].endswith(".j2"):
        arguments = access | variables | item["extra"]
        files.template(src=item["src"], dest=prefix + item["dest"], jinja_env_kwargs=dict(jinja), **arguments)
    else:
        files.put(src=item["src"], dest=prefix + item["dest"], **access)
if not prefix:
    for unit in host.loop(items["masked"]):
        files.link(path=f"/etc/systemd/system/{unit}", target="/dev/null")
    for unit in host.loop(items["units"]):
        systemd.service(service=unit, running=True, enabled=True)
"""


def _prove(site: Site, generations: dict[str, Any], engine: str, config: Path) -> None:
    """Compares what an engine built in the folder of the proof with the live files, on the nodes, and removes it."""
    for node in site.nodes:
        paths = [path for path, want in generations[node]["files"].items() if "link" not in want]
        script = (
            f"cd {PROOF} && for path in $(cat); do "
            'stat -c "%a %U %G" .$path; stat -c "%a %U %G" $path; sha256sum < .$path; sha256sum < $path; done; rm -r '
            + PROOF
        )
        done = subprocess.run(
            ["ssh", "-F", config, node, script], input="\n".join(paths), capture_output=True, text=True, check=False
        )
        lines = done.stdout.splitlines()
        if done.returncode or len(lines) != 4 * len(paths):
            raise Unequal(f"{engine}: {node}: {done.stderr.strip() or 'files are missing'}")
        for path, (access, live_access, content, live) in zip(paths, zip(*[iter(lines)] * 4, strict=True), strict=True):
            if (access, content) != (live_access, live):
                raise Unequal(
                    f"{engine}: {node}: {path} differs from the live one ({access} {content} / {live_access} {live})"
                )
