"""The node's half of drift: looks, changes nothing, and prints what it saw as JSON.

It runs on a node with nothing but Python's standard library; `posthouse.ops.drift` sends it there, with the source of
the converge engine's node half as `generation`, by standard input.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import time
import types
from pathlib import Path
from typing import Any

# Mappings of files that are gone on purpose: shared memory has no name to keep.
UNNAMED = ("/memfd:", "/dev/", "/SYSV", "/run/", "/tmp/", "/var/")


def main(given: dict[str, Any]) -> None:
    """Prints {"files", "daemons": [[thing, what is wrong, what mends it or None: a deploy]], "data": {…}}."""
    generation: Any = types.ModuleType("generation")
    exec(compile(given["generation"], "generation.py", "exec"), generation.__dict__)
    desired = given["desired"]
    looks = {
        "plan": lambda: _plan(generation, desired),
        "stale": lambda: _stale(generation, desired),
        "replaced": _replaced,
        "kernel": lambda: [*_sysctl(desired["files"]), *_firewall(desired["files"])],
        "data": lambda: _data(given["look_for"]),
    }
    with concurrent.futures.ThreadPoolExecutor(len(looks)) as pool:
        found = dict(zip(looks, pool.map(lambda look: look(), looks.values()), strict=True))
    files, daemons = found["plan"]
    # What differs will be read when it is as it should be; one finding is enough.
    differing = {thing for thing, _, _ in files}
    stale = [finding for path, finding in found["stale"] if path not in differing]
    kernel = [] if differing & {"/etc/nftables.conf", "/etc/sysctl.d/60-posthouse.conf"} else found["kernel"]
    daemons = [*daemons, *stale, *found["replaced"], *kernel]
    print(json.dumps({"files": files, "daemons": daemons, "data": found["data"]}))


def run(*argv: str, text: str = "") -> str:
    """What a command prints; nothing if it fails, hangs, or is not there."""
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, errors="replace", timeout=20, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return ""
    return done.stdout


def _plan(generation: Any, desired: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What a deploy would change: (in files and packages, in services)."""
    plan = generation.compare(desired)
    files = [[path, _difference(before, desired["files"][path]), None] for path, before in plan["write"].items()]
    files += [[path, "is there, and no part of the site any more", None] for path in plan["remove"]]
    files += [[path, "is missing, or another's, or has another mode", None] for path in plan["directories"]]
    files += [[f"package {name}", "is not installed", None] for name in plan["packages"]]
    files += [[f"user {e['user']}", f"is not in the group {e['group']}", None] for e in plan["groups"]]
    if plan["unfinished"]:
        files.append([str(generation.TRANSACTION), "a deploy was interrupted", None])
    daemons = [[unit, "does not run", None] for unit in plan["start"]]
    daemons += [[unit, "runs, and should not", None] for unit in plan["stop"]]
    daemons += [[unit, "would not start at boot", None] for unit in plan["enable"]]
    daemons += [[unit, f"does not answer: {reason}", None] for unit, reason in plan["unhealthy"].items()]
    return files, daemons


def _difference(before: dict[str, str] | None, want: dict[str, str]) -> str:
    if before is None:
        return "is missing"
    if "link" in want or "link" in before:
        return "is a link, or links elsewhere"
    access = [
        f"{key} {before.get(key)}, not {want[key]}"
        for key in ("mode", "owner", "group")
        if before.get(key) != want[key]
    ]
    content = ["other content"] if before.get("content") != want["content"] else []
    return "has " + ", ".join(content + access)


def _stale(generation: Any, desired: dict[str, Any]) -> list[tuple[str, Any]]:
    """Daemons older than what they were started from: [(file, finding)], one for each daemon."""
    names = [service["unit"] for service in desired["services"]]
    properties = "Id,ActiveState,ExecMainStartTimestampMonotonic,StateChangeTimestampMonotonic,NeedDaemonReload"
    shown = run("systemctl", "show", "-p", properties, *names)
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.split("\n\n") if block]
    boot = time.time() - time.monotonic()
    found: list[tuple[str, Any]] = []
    for service, state in zip(desired["services"], blocks, strict=True):
        unit = service["unit"]
        if state["ActiveState"] != "active":
            continue  # what does not run is found otherwise
        if state["NeedDaemonReload"] == "yes":
            found.append(
                (
                    "",
                    [
                        unit,
                        "its unit file is newer than systemd's idea of it",
                        f"systemctl daemon-reload && systemctl restart {unit}",
                    ],
                )
            )
            continue
        changed = int(state["StateChangeTimestampMonotonic"]) / 1e6 + boot
        # A process takes some files when it starts and never again; the others also when it is told to.
        started = int(state["ExecMainStartTimestampMonotonic"]) / 1e6 + boot
        for path in desired["files"]:
            hard = generation._owned(path, service["restart_for"])
            owned = generation._owned(path, service["owns"])
            if not (hard or owned) or not os.path.lexists(path):
                continue
            since = started if (hard or service["on_change"] == "restart") and started > boot else changed
            # Clocks have been set since; and a file is written before the daemon is told.
            if os.lstat(path).st_mtime > since + 2:
                verb = "restart" if since == started else "reload"
                found.append((path, [unit, f"runs with what {path} was before it changed", f"systemctl {verb} {unit}"]))
                break
    return found


def _replaced() -> list[Any]:
    """Services whose program or libraries are not those on the disk any more."""
    found: dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            unit = re.search(r"/([^/\n]+\.service)", (process / "cgroup").read_text())
            if not unit or unit[1] in found:
                continue
            for line in (process / "maps").read_text().splitlines():
                # address permissions offset device inode path
                fields = line.split(maxsplit=5)
                path = fields[5] if len(fields) == 6 else ""
                if "x" in fields[1] and path.endswith(" (deleted)") and not path.startswith(UNNAMED):
                    found[unit[1]] = path.removesuffix(" (deleted)")
                    break
        except OSError:
            continue  # it ended while it was looked at
    return [
        [unit, f"runs {path} as it was before it was replaced", f"systemctl restart {unit}"]
        for unit, path in sorted(found.items())
    ]


def _sysctl(files: dict[str, Any]) -> list[Any]:
    """Kernel settings that are not what the site's files say."""
    found = []
    for path, want in files.items():
        if not path.startswith("/etc/sysctl.d/"):
            continue
        for name, value in re.findall(r"^\s*([a-z][\w./-]*)\s*=\s*(.*?)\s*$", want["content"], re.MULTILINE):
            try:
                live = " ".join(Path("/proc/sys", name.replace(".", "/")).read_text().split())
            except OSError:
                live = "nothing"
            if live != " ".join(value.split()):
                found.append([f"sysctl {name}", f"is {live}, not {value}", f"sysctl -p {path}"])
    return found


def _firewall(files: dict[str, Any]) -> list[Any]:
    """Whether the kernel's rules are those of the file: compared with what the file makes in a network of its own."""
    if "/etc/nftables.conf" not in files:
        return []
    script = "nft -f - && nft --stateless list table inet posthouse"
    wanted = run("unshare", "--net", "sh", "-c", script, text=files["/etc/nftables.conf"]["content"])
    live = run("nft", "--stateless", "list", "table", "inet", "posthouse")
    if wanted == live:
        return []
    lines = {False: set(live.splitlines()), True: set(wanted.splitlines())}
    more, less = lines[False] - lines[True], lines[True] - lines[False]
    what = "; ".join(
        [*(f"too much: {line.strip()}" for line in sorted(more)), *(f"lacks: {line.strip()}" for line in sorted(less))]
    )
    return [
        [
            "nftables",
            f"the rules in force are not the file's: {what[:300] or 'another order'}",
            "systemctl reload nftables",
        ]
    ]


def _data(look_for: dict[str, Any]) -> dict[str, Any]:
    """What tiers know of their data: {"addresses", "directory", "stores", "held"}."""
    return {
        "addresses": [line.split()[3].split("/")[0] for line in run("ip", "-4", "-o", "address").splitlines()],
        "directory": _directory() if look_for["directory"] else None,
        "stores": {store: _replication(Path(folder)) for store, folder in look_for["stores"].items()},
        "held": [item for place in look_for["queues"] for item in _held(place)],
    }


def _directory() -> dict[str, Any]:
    """How far it has come with each provider's changes, by the provider's number; a digest of all entries' versions."""
    search = ["ldapsearch", "-Q", "-Y", "EXTERNAL", "-LLL", "-o", "ldif-wrap=no"]
    values = re.findall(r"^contextCSN: (\S+)$", run(*search, "-s", "base", "contextCSN"), re.MULTILINE)
    # In a large directory this takes longer than anybody wants to wait: there it is the changes alone.
    entries = run(*search, "-z", "50000", "(objectClass=*)", "entryUUID", "entryCSN")
    lines = sorted(line for line in entries.splitlines() if line.startswith("entry"))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None
    return {"changes": {value.split("#")[2]: value for value in values}, "entries": digest}


def _replication(config: Path) -> dict[str, Any]:
    """{peer: seconds since the oldest change that it lacks} of a store, going by its logs of changes."""
    behind = {}
    for folder in config.glob("sync/*/"):
        names = [str(path) for path in folder.glob("log*")]
        # Birth: a log's last change is young where changes are many.
        births = [int(text) for text in run("stat", "--format=%W", *names).split()] if names else []
        behind[folder.name] = max(0.0, time.time() - min(births)) if births else 0.0
    return behind


def _held(place: str) -> list[str]:
    """Messages that nobody will deliver until they are released."""
    entries = [json.loads(line) for line in run("postqueue", "-c", place, "-j").splitlines()]
    return [f"{place} {entry['queue_id']}" for entry in entries if entry["queue_name"] == "hold"]
