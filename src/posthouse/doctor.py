"""Whether this machine can be a controller, and can run the lab. What it tries out, it tries in namespaces."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from posthouse import image, roles
from posthouse.lab import layout, processes, requirements
from posthouse.lab.layout import LabError

# The images, the cache of packages, and what the nodes of the default lab write: 5 GiB, and as much again to work in.
DISK_GIB = 10
# The default lab at work, measured on the safe side.
MEMORY_GIB = 4

Check = dict[str, str | bool]
"""{"check": what was looked at, "ok": bool, "found": str, "fix": what to do, empty if ok}"""

NETWORK = """
ip link add br0 type bridge
ip link add node type veth peer name eth0
ip link set node master br0
nft 'table inet t { chain c { type filter hook input priority filter; ip saddr { 192.0.2.1, 192.0.2.7 } accept; }; }'
"""
OVERLAY = """
mkdir "$1/lower" "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" "$1/root"
"""
LOOP = """
truncate --size=16M "$1/disk"
mkdir "$1/srv"
mkfs.ext4 -q -F "$1/disk"
mount -o loop "$1/disk" "$1/srv"
"""


def checks(fix: bool = False) -> list[Check]:
    """Everything that was looked at. With `fix`, missing packages are installed first; the rest needs a human."""
    return [*_machine(), _packages(fix), *_space(), *_kernel(), _clock(), _leftovers()]


def _check(name: str, ok: bool, found: str, fix: str) -> Check:
    return {"check": name, "ok": ok, "found": found, "fix": "" if ok else fix}


def _machine() -> Iterator[Check]:
    version = platform.python_version()
    yield _check(
        "python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer; Debian 12 and 13 have it"
    )
    system = platform.freedesktop_os_release()
    known = system.get("ID") == "debian" and system.get("VERSION_ID") in ("12", "13")
    yield _check("system", known, system.get("PRETTY_NAME", "unknown"), "use Debian 12 or 13; nothing else was tried")
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    yield _check("user", user == "root", user, "run posthouse as root: it makes namespaces and mounts")


def _packages(fix: bool) -> Check:
    missing = requirements.missing()
    try:
        if missing and fix:
            requirements.ensure()
    except LabError as error:
        return _check("packages", False, str(error), "mend apt, then run this again")
    missing = requirements.missing()
    found = f"lacks {', '.join(missing)}" if missing else f"all {len(requirements.PACKAGES)} that posthouse uses"
    return _check("packages", not missing, found, "run: posthouse doctor --fix")


def _space() -> Iterator[Check]:
    for place in (layout.STATE, image.IMAGES):
        free = shutil.disk_usage(_existing(place)).free / 2**30
        fix = f"make room for {DISK_GIB} GiB there, or mount a larger disk"
        yield _check(f"disk of {place}", free >= DISK_GIB, f"{free:.0f} GiB free", fix)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) / 2**20
    yield _check(
        "memory", free >= MEMORY_GIB, f"{free:.0f} GiB free", f"free {MEMORY_GIB} GiB; the lab's nodes take that"
    )


def _kernel() -> Iterator[Check]:
    """Tries what the lab does, in namespaces that end with the try."""
    fix = "run posthouse on a kernel that has it and, in a container, with the right to use it"
    for name, script in (
        ("bridge, veth and nftables", NETWORK),
        ("overlay file system", OVERLAY),
        ("loop and ext4", LOOP),
    ):
        refusal = _refusal(script)
        yield _check(name, not refusal, refusal or "works", fix)
    try:
        group = layout.cgroup_mounts()[0] / f"posthouse-doctor-{os.getpid()}"
        group.mkdir()
        group.rmdir()
    except LabError as error:
        yield _check("cgroup v2", False, str(error), fix)
    except OSError as error:
        yield _check("cgroup v2", False, f"{error.filename}: {error.strerror}", fix)
    else:
        yield _check("cgroup v2", True, "works", fix)


def _refusal(script: str) -> str:
    """Runs a script, which is given a folder where the lab's nodes will be, in namespaces of its own; why it failed."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=_existing(layout.STATE.parent)) as folder:
        command = ["unshare", "--net", "--mount", "sh", "-ec", script, "sh", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[0] if done.returncode else ""


def _clock() -> Check:
    """A clock that is behind makes certificates that are not valid yet, and refuses those of others."""
    newest = max(path.stat().st_mtime for path in (roles.ROOT / "src").rglob("*.py"))
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return _check(
        "clock", time.time() >= newest - 60, now, "it is older than posthouse itself: set it, or run an NTP client"
    )


def _leftovers() -> Check:
    """Labs of which something is left that does not run."""
    names = {path.name for path in layout.STATE.glob("*/")}
    names |= {path.name.removeprefix("ph-").partition(".")[0] for path in layout.NETNS.glob("ph-*")}
    dead = []
    for name in sorted(names):
        lab = layout.Layout(name)
        alive = [node for node in lab.nodes if processes.running(lab.node_cgroup(node))]
        if len(alive) < max(1, len(lab.nodes)):
            dead.append(f"{name} ({len(alive)} of {len(lab.nodes)} nodes run)")
    fix = "start them again with `posthouse lab up NAME`, or remove them with `posthouse lab down NAME`"
    return _check("labs", not dead, ", ".join(dead) or f"{len(names)} that run" if names else "none", fix)


def _existing(path: Path) -> Path:
    """The folder itself, or the closest one above it that there is."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
