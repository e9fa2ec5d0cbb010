"""The engine on a real node: the lab is up and deployed, and a role of the tests' own is applied to mail3."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posthouse import roles, run, sitefile

ENGINE = roles.ROOT / "library" / "module_utils" / "generation.py"
Desired = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Labs are made from the machine's own network, and `remote` enters the first lab's for good.
    items.sort(key=lambda item: item.path.stem != "test_labs")


class Remote:
    """One node, by ssh."""

    def __init__(self, config: Path, name: str) -> None:
        self.config, self.name = config, name

    def __call__(self, command: str, text: str = "", check: bool = True) -> str:
        """Runs a shell command on the node with `text` as its input; returns what it printed."""
        done = subprocess.run(
            ["ssh", "-F", self.config, self.name, command],
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def apply(self, desired: Desired, wait: bool = True) -> dict[str, Any]:
        """Applies a generation as the converge module does: as a transient unit that is put right if it is killed."""
        self.settle()
        self(
            "mkdir -p /run/posthouse; cat > /run/posthouse/test.json; rm -f /run/posthouse/test.result",
            json.dumps(desired),
        )
        waiting = "--wait" if wait else "--no-block"
        self(
            f"systemd-run --quiet {waiting} --collect --unit=posthouse-converge-test "
            "--property=ExecStopPost='/usr/bin/python3 /usr/lib/posthouse/generation.py recover' "
            "/usr/bin/python3 /usr/lib/posthouse/generation.py apply /run/posthouse/test.json",
            check=False,
        )
        return json.loads(self("cat /run/posthouse/test.result", check=False) or "null") if wait else {}

    def settle(self) -> None:
        """Waits until the transient unit is gone, together with what puts things right after it."""
        for _ in range(200):
            if "not-found" in self("systemctl show -p LoadState posthouse-converge-test.service"):
                return
            time.sleep(0.05)
        raise AssertionError("the converge did not end")


@pytest.fixture(scope="session")
def site() -> Any:
    return sitefile.load(os.environ.get("POSTHOUSE_SITE", "lab"))


@pytest.fixture(scope="session")
def remote(site: Any) -> Remote:
    """The node on which the tests' own role is applied."""
    node = Remote(run.reach(site), "mail3")
    node("mkdir -p /usr/lib/posthouse; cat > /usr/lib/posthouse/generation.py", ENGINE.read_text())
    return node


UNIT = """
[Service]
ExecStart=/usr/bin/python3 -m http.server --bind 127.0.0.1 --directory /etc/toy 8099
ExecReload=/bin/true
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture
def toy(remote: Remote) -> Iterator[Callable[..., Desired]]:
    """Makes the desired generation of a small role: a web server, its page, a secret and a hundred other files."""

    def make(version: str, **change: Any) -> Desired:
        files = {f"/etc/toy/part{i:03d}": f"{version} {i}\n" for i in range(100)}
        files |= {"/etc/toy/index.html": f"{version}\n", "/etc/systemd/system/toy.service": UNIT} | change.pop(
            "files", {}
        )
        service = {
            "unit": "toy.service",
            "tier": "toy",
            "owns": ["/etc/toy", "/etc/systemd/system/toy.service"],
            "check": ["grep -q v /etc/toy/index.html"],
            "on_change": "restart",
            "restart_for": ["/etc/systemd/system/toy.service"],
            "ready": ["tcp 127.0.0.1:8099"],
        }
        return {
            "tiers": ["toy"],
            "whole": False,
            "who": "the tests",
            "packages": [],
            "groups": [],
            "directories": {"/etc/toy": {"mode": "0755", "owner": "root", "group": "root"}},
            "files": {
                path: {"content": text, "mode": "0644", "owner": "root", "group": "root", "tier": "toy"}
                for path, text in files.items()
                if text is not None
            },
            "services": [service | change],
        }

    yield make
    empty = make("v0") | {"files": {}, "services": [], "directories": {}}
    remote.settle()
    cleared = remote.apply(empty)
    assert "plan" in cleared, cleared
    remote("rm -rf /etc/toy")
