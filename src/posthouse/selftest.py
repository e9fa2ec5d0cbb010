"""posthouse's own tests: the folders under tests/, each by itself, with a lab for those that need one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from posthouse import demo, lab, run, sitefile
from posthouse.apart import apart
from posthouse.model import Site

# In this order: what is quick and needs nothing first, what disturbs the lab last. True: needs a deployed lab.
# `vm` makes a small lab of its own, once the other is down.
SUITES = {"unit": False, "cases": False, "render": False, "verify": True, "modules": True, "lab": True, "vm": False}
SITE = "lab"
LINES, WIDTH = 4, 300  # of what a failed test says, in the list at the end


def test(wanted: list[str], full: bool) -> int:
    """Runs the named suites, or all; prints what failed and `test: N passed, N failed` last; returns the status."""
    unknown = set(wanted) - set(SUITES)
    if unknown:
        raise SystemExit(f"posthouse: no such suite: {', '.join(sorted(unknown))}; the suites are {', '.join(SUITES)}")
    suites = [suite for suite in SUITES if suite in (wanted or SUITES)]
    passed, failures = 0, []
    needs_lab = [suite for suite in suites if SUITES[suite]]
    apart(lambda: lab.ensure_requirements() is not None)  # tests of what needs no lab use its programs too
    try:
        for suite in suites:
            if needs_lab and suite == needs_lab[0] and not _prepare(sitefile.load(SITE)):
                failures.append(f"no lab to test on: {SITE}")
                break
            if needs_lab and suite == "vm":
                lab.down(SITE)  # its memory and processors are wanted
            cases = _suite(suite, full)
            passed += sum(case["outcome"] == "passed" for case in cases)
            failures += [_failure(case) for case in cases if case["outcome"] == "failed"]
    finally:
        if needs_lab:
            lab.down(SITE)
    # Once more, at the end: of a long log often only that is kept.
    print(*failures, f"test: {passed} passed, {len(failures)} failed", sep="\n", flush=True)
    return 1 if failures or not passed else 0


def _prepare(site: Site) -> bool:
    """A fresh, deployed lab; says how long each phase took."""
    for name, step in {"requirements": demo.prepare, "images and lab up": demo.build, "deploy": demo.deploy}.items():
        with phase(name):
            if not apart(partial(step, site)):
                return False
    return True


def _suite(suite: str, full: bool) -> list[dict[str, Any]]:
    """The suite's cases, as run.pytest() gives them."""
    arguments = [f"tests/{suite}", *(["--full"] if full and suite in ("lab", "vm") else [])]
    if suite == "verify":
        arguments += ["--site", SITE, *run.VERIFY]
    with phase(f"tests/{suite}"):
        status, cases = run.pytest(*arguments, env=os.environ | {"POSTHOUSE_SITE": SITE})
    if status and not any(case["outcome"] == "failed" for case in cases):
        # An import error, a usage error, no test at all.
        cases.append({"name": "pytest", "where": suite, "outcome": "failed", "message": f"ended with status {status}"})
    return cases


def _failure(case: dict[str, Any]) -> str:
    """What failed and with which words, on few lines."""
    said = [line for line in case["message"].splitlines() if line.startswith("E ")] or case["message"].splitlines()
    return "\n".join([f"FAILED {case['where']} {case['name']}", *(f"  {line[:WIDTH]}" for line in said[:LINES])])


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints how long something took."""
    started = time.monotonic()
    yield
    print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)
