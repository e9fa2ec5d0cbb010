"""Processes of a lab: started to outlive the command that starts them, held in cgroups, and killed by cgroup."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from posthouse.lab.layout import LabError, cgroup_mounts


def spawn(
    cgroup: Path, command: Sequence[str], log: Path, env: dict[str, str] | None = None, fds: Sequence[int] = ()
) -> None:
    """Starts a process in a cgroup of its own and returns at once; its output goes to `log`.

    It has a session of its own, init as its parent and none of the caller's files but `fds`, so nothing that happens to
    the caller reaches it. When this returns, it is in the cgroup: there is no moment at which it could be missed.
    """
    cgroup.mkdir(parents=True, exist_ok=True)
    join = 'echo $$ >"$0/cgroup.procs" && exec setsid --fork "$@"'
    with log.open("ab") as out:
        done = subprocess.run(
            ["sh", "-c", join, str(cgroup), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **(env or {})},
            pass_fds=fds,
            start_new_session=True,
            cwd="/",
            check=False,
        )
    if done.returncode:
        raise LabError(f"{command[0]} could not be started: see {log}")


def running(cgroup: Path) -> bool:
    """Whether any process lives in the group or below it."""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:
        return False


def pids(cgroup: Path) -> Iterator[int]:
    """Every process in the group and below it."""
    for file in cgroup.glob("**/cgroup.procs"):
        try:
            yield from (int(pid) for pid in file.read_text().split())
        except OSError:
            continue  # the group ended while it was read


def leader(cgroup: Path) -> int | None:
    """PID 1 of the container in the group, as the machine numbers it; None while there is none."""
    for pid in pids(cgroup):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
        if len(numbers) > 1 and numbers[-1] == "1":
            return pid
    return None


def end(cgroup: Path) -> None:
    """Kills everything in the group at once, so that nothing can fork its way out, and removes the group."""
    if cgroup.exists():
        (cgroup / "cgroup.kill").write_text("1")
        until(lambda: not running(cgroup), 20, f"{cgroup}: processes do not end after SIGKILL; see cgroup.procs there")
    v2, *v1 = cgroup_mounts()
    # nspawn makes groups of the same name in v1's hierarchy of systemd, where there is one.
    for top in (cgroup, *(mount / cgroup.relative_to(v2) for mount in v1)):
        for group in sorted((path.parent for path in top.glob("**/cgroup.procs")), reverse=True):
            group.rmdir()


def end_by_namespace(found: Sequence[int]) -> None:
    """Kills processes that came into a namespace from outside, such as ssh; the caller and its parents are spared."""
    line = {os.getpid()}
    pid = os.getpid()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        line.add(pid)
    for other in set(found) - line:
        try:
            os.kill(other, signal.SIGKILL)
        except ProcessLookupError:
            continue


def until(condition: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Waits for a condition. Raises LabError with the complaint when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(complaint)
        time.sleep(0.02)
