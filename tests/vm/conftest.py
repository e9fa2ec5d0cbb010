"""The suite of machines: blank disks that become nodes of a running cluster, in a lab of its own.

What happens to the machines takes minutes, so it happens once, in two lanes side by side; each test then looks at a
part of it. `machines.py` is the story, the tests are what it proves.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from machines import MACHINES, NAME, SITE, TIMES, Lanes, log_tail, timed

from posthouse import lab, roles, run, sitefile
from posthouse.lab import requirements
from posthouse.lab.layout import Layout

FOLDER = roles.ROOT / "inventory" / NAME


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run what takes many minutes, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes many minutes, and runs only with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for what, seconds in TIMES:
        terminalreporter.write_line(f"{seconds:7.1f} s  {what}")


@pytest.fixture(scope="session")
def posthouse() -> Callable[..., str]:
    """Runs `posthouse …` as an operator does; returns what it prints. status: what it must end with; None: any."""

    def call(*arguments: str, text: str = "", status: int | None = 0) -> str:
        command = [run.BIN / "posthouse", *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=1800)
        assert status in (None, done.returncode), (
            f"posthouse {' '.join(arguments)}: {done.stdout}{done.stderr}{log_tail(Layout(NAME))}"
        )
        return done.stdout

    return call


@pytest.fixture(scope="session")
def cluster(posthouse: Callable[..., str]) -> Iterator[Callable[[str], None]]:
    """A small deployed cluster of containers, to which machines are added; gives what rewrites its site file."""
    requirements.ensure(requirements.MACHINES)
    lab.down(NAME)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()

    def write(text: str) -> None:
        (FOLDER / "site.yml").write_text(text)

    try:
        write(SITE)
        with timed("cluster of containers: lab up"):
            posthouse("lab", "up", NAME)
        with timed("cluster of containers: deploy"):
            posthouse("deploy", NAME)
        yield write
    finally:
        lab.down(NAME)
        shutil.rmtree(FOLDER)


@pytest.fixture(scope="session")
def lanes(cluster: Callable[[str], None]) -> Iterator[Lanes]:
    """What happens to the machines, on its way from the first test on."""
    cluster(MACHINES)
    lanes = Lanes(sitefile.load(NAME))
    yield lanes
    lanes.stop()
