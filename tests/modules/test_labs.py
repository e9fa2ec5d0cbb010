"""The lab itself: two at once, one that was killed while it came up, and nothing left behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posthouse import lab, roles

NAME = "tmp-second"
POSTHOUSE = [sys.executable, "-m", "posthouse"]


def leftovers() -> dict[str, str]:
    """What is there of the second lab: namespaces, mounts, loop devices, processes, folders."""
    found = {
        "namespaces": subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout,
        "mounts": Path("/proc/self/mounts").read_text(),
        "loop devices": subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True).stdout,
        "processes": subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout,
        "folders": "\n".join(map(str, [*Path("/var/lib/posthouse/lab").iterdir(), *Path("/run/posthouse").iterdir()])),
    }
    mine = {kind: [line for line in text.splitlines() if NAME in line] for kind, text in found.items()}
    return {kind: "\n".join(lines) for kind, lines in mine.items() if lines}


@pytest.fixture
def second(site):
    folder = roles.ROOT / "inventory" / NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    original = (roles.ROOT / "inventory" / site.name / "site.yml").read_text()
    (folder / "site.yml").write_text(original.replace(f"name: {site.name}", f"name: {NAME}", 1))
    yield NAME
    subprocess.run([*POSTHOUSE, "lab", "down", NAME], check=True)
    shutil.rmtree(folder)


def first_lab_runs(site) -> bool:
    done = subprocess.run([*lab.command(site.name, "mail3"), "hostname"], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "mail3"


def test_two_labs_with_the_same_addresses_run_at_the_same_time(site, second):
    subprocess.run([*POSTHOUSE, "lab", "up", second], check=True, capture_output=True)
    status = subprocess.run([*POSTHOUSE, "lab", "status", second], check=True, capture_output=True, text=True).stdout
    assert status.count("running") == 5
    assert first_lab_runs(site)
    subprocess.run([*POSTHOUSE, "lab", "down", second], check=True)
    assert leftovers() == {}
    assert first_lab_runs(site)


@pytest.mark.parametrize("moment", [1.5, 2.5, 4])
def test_killed_while_it_comes_up_it_recovers_and_goes_without_a_trace(second, moment):
    with subprocess.Popen([*POSTHOUSE, "lab", "up", second], stderr=subprocess.DEVNULL) as up:
        time.sleep(moment)
        up.send_signal(signal.SIGKILL)
    subprocess.run([*POSTHOUSE, "lab", "up", second], check=True, capture_output=True)
    status = subprocess.run([*POSTHOUSE, "lab", "status", second], check=True, capture_output=True, text=True).stdout
    assert status.count("running") == 5
    with subprocess.Popen([*POSTHOUSE, "lab", "up", second], stderr=subprocess.DEVNULL) as up:
        up.send_signal(signal.SIGKILL)
    subprocess.run([*POSTHOUSE, "lab", "down", second], check=True)
    assert leftovers() == {}
