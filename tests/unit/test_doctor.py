import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from posthouse import doctor
from posthouse.lab import layout, requirements

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces and mounts; run as root")


def check(name: str) -> doctor.Check:
    return next(found for found in doctor.checks() if found["check"] == name)


def test_every_problem_has_a_fix_and_nothing_else_has() -> None:
    for found in doctor.checks():
        assert set(found) == {"check", "ok", "found", "fix"}
        assert found["found"]
        assert bool(found["fix"]) == (not found["ok"]), found


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(requirements.PACKAGES, "no-such-package", "/usr/bin/no-such-program")
    assert check("packages") == {
        "check": "packages",
        "ok": False,
        "found": "lacks no-such-package",
        "fix": "run: posthouse doctor --fix",
    }


def test_too_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_GIB", 10**9)
    monkeypatch.setattr(doctor, "MEMORY_GIB", 10**9)
    failed = [str(found["check"]) for found in doctor.checks() if not found["ok"]]
    assert "memory" in failed
    assert sum(name.startswith("disk of ") for name in failed) == 2


def test_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=(3, 10)))
    assert not check("python")["ok"]


def test_clock_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert not check("clock")["ok"]


def test_folders_left_by_a_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "STATE", tmp_path)
    monkeypatch.setattr(layout, "NETNS", tmp_path / "none")
    assert check("labs")["found"] == "none"
    (tmp_path / "old" / "nodes" / "mail1").mkdir(parents=True)
    (tmp_path / "old" / "nodes" / "mail1" / "node.json").write_text("{}")
    assert check("labs")["found"] == "old (0 of 1 nodes run)"


@needs_root
def test_what_the_kernel_can_do_is_tried_and_leaves_nothing() -> None:
    assert [doctor._refusal(script) for script in (doctor.NETWORK, doctor.OVERLAY, doctor.LOOP)] == ["", "", ""]
    assert "doctor-" not in Path("/proc/mounts").read_text()
    assert not list(layout.STATE.parent.glob("doctor-*"))
    assert not [file for file in Path("/sys/block").glob("loop*/loop/backing_file") if "doctor-" in file.read_text()]
    assert not Path("/sys/class/net/node").exists()


@needs_root
def test_what_the_kernel_refuses_is_told_in_its_words() -> None:
    assert "special device" in doctor._refusal('mount -t ext4 "$1/none" "$1"')
    assert doctor._refusal("exit 3") == "exit status 3"
