"""posthouse's own tests: the folders under tests/, each by itself, with a lab for those that need one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from posthouse import demo, lab, run, sitefile
from posthouse.apart import apart
from posthouse.model import Site

# In this order: what is quick and needs nothing first, what disturbs the lab last. True: needs a deployed lab.
# `vm` makes a small lab of its own, once the other is down.
SUITES = {"unit": False, "cases": False, "render": False, "verify": True, "modules": True, "lab": True, "vm": False}
SITE = "lab"


def test(wanted: list[str], full: bool) -> int:
    """Runs the named suites, or all; prints `test: N passed, N failed` last. Returns the exit status."""
    unknown = set(wanted) - set(SUITES)
    if unknown:
        raise SystemExit(f"posthouse: no such suite: {', '.join(sorted(unknown))}; the suites are {', '.join(SUITES)}")
    suites = [suite for suite in SUITES if suite in (wanted or SUITES)]
    counts = {"passed": 0, "failed": 0}
    needs_lab = [suite for suite in suites if SUITES[suite]]
    apart(lambda: lab.ensure_requirements() is not None)  # tests of what needs no lab use its programs too
    try:
        for suite in suites:
            if needs_lab and suite == needs_lab[0] and not _prepare(sitefile.load(SITE)):
                counts["failed"] += 1
                break
            if needs_lab and suite == "vm":
                lab.down(SITE)  # its memory and processors are wanted
            _suite(suite, full, counts)
    finally:
        if needs_lab:
            lab.down(SITE)
    print(f"test: {counts['passed']} passed, {counts['failed']} failed", flush=True)
    return 1 if counts["failed"] or not counts["passed"] else 0


def _prepare(site: Site) -> bool:
    """A fresh, deployed lab; says how long each phase took."""
    for name, step in {"requirements": demo.prepare, "images and lab up": demo.build, "deploy": demo.deploy}.items():
        with phase(name):
            if not apart(partial(step, site)):
                return False
    return True


def _suite(suite: str, full: bool, counts: dict[str, int]) -> None:
    arguments = [f"tests/{suite}", *(["--full"] if full and suite in ("lab", "vm") else [])]
    if suite == "verify":
        arguments += ["--site", SITE, *run.VERIFY]
    with phase(f"tests/{suite}"):
        status, cases = run.pytest(*arguments, env=os.environ | {"POSTHOUSE_SITE": SITE})
    for outcome in counts:
        counts[outcome] += sum(case["outcome"] == outcome for case in cases)
    if status and not any(case["outcome"] == "failed" for case in cases):
        counts["failed"] += 1  # pytest itself came to grief: an import error, a usage error, no test at all


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints how long something took."""
    started = time.monotonic()
    yield
    print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)
