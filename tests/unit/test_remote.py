"""What is said when a command on a node fails without a word."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from posthouse.model import Site
from posthouse.remote import Remote, RemoteError, run

SCRIPT = "\nset -eu\nsystemctl stop etcd\n"


@pytest.fixture
def remote(site: Site, monkeypatch: pytest.MonkeyPatch) -> Remote:
    monkeypatch.setattr(run, "reach", lambda _: "/dev/null")
    return Remote(site)


def test_a_command_that_hangs_is_named_by_its_first_line(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("ssh", 3)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(RemoteError) as caught:
        remote.run("mail1", SCRIPT, timeout=3)
    assert str(caught.value) == (
        "mail1: no answer within 3 s to `set -eu …`; its journal (journalctl -e) may say why; then run the command "
        "again"
    )
    assert caught.value.status == 255


@pytest.mark.parametrize(
    ("command", "shown"),
    [("true", "`true`;"), (SCRIPT, "`set -eu …`;"), ("x" * 70, f"`{'x' * 60} …`;")],
)
def test_one_that_says_nothing_is_cut(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess("ssh", 3, "", ""))
    with pytest.raises(RemoteError, match="exit status 3, and no word") as caught:
        remote.run("mail1", command)
    assert shown in str(caught.value)


def test_one_that_complains_is_quoted(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess("ssh", 1, "", "no space\n"))
    with pytest.raises(RemoteError) as caught:
        remote.run("mail1", "true")
    assert str(caught.value) == "mail1: no space"
