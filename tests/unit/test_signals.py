"""Who ends a command, or hangs up, means what Ctrl-C means. Real signals, to a real process that runs `cli.main`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from posthouse.ops.steps import GOES_ON

# A verb of two steps, of which the second has no end; `--bare` has no steps, `--back` puts something back.
VERB = """
import time
from posthouse import cli
from posthouse.ops.steps import Step, carry_out

def wait(step=None):
    print("waiting", flush=True)
    time.sleep(600)

def put_back(begun):
    print("put back:", *(step.do for step in begun), flush=True)
    return "all is as it was"

@cli.app.command()
def endless(bare: bool = False, back: bool = False):
    if bare:
        wait()
    steps = [Step("take", "mail1", "take it out"), Step("wait", "mail1", "wait")]
    carry_out("endless", steps, {"take": lambda _: "", "wait": wait}, False, put_back if back else None)

cli.main()
"""
# Whoever runs the tests may ignore some of these, and what it starts would, too.
HEEDED = ["env", "--default-signal=INT,TERM,HUP"]
ALIKE = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the verb under a command such as nohup; returns when it waits."""
    processes = []

    def start(*options: str, under: list[str] = HEEDED) -> subprocess.Popen[str]:
        command = [*under, sys.executable, "-c", VERB, "endless", *options]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@ALIKE
def test_a_signal_puts_service_back_and_says_how_things_stand(start: Start, number: signal.Signals) -> None:
    process = start("--back")
    process.send_signal(number)
    printed, complaint = process.communicate(timeout=120)
    assert printed == "put back: wait take\n"
    assert complaint.endswith("posthouse: mail1: could not wait: interrupted\n  now: all is as it was\n")
    assert process.returncode == 1


@ALIKE
def test_what_has_nothing_to_put_back_says_that_it_goes_on(start: Start, number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    assert process.communicate(timeout=120)[1].endswith(f"could not wait: interrupted\n  now: {GOES_ON}\n")
    assert process.returncode == 1


@ALIKE
def test_what_has_no_steps_says_so_too(start: Start, number: signal.Signals) -> None:
    process = start("--bare")
    process.send_signal(number)
    complaint = process.communicate(timeout=120)[1]
    assert re.fullmatch(rf"posthouse: stopped after \d+ s; {GOES_ON}\n", complaint), complaint
    assert process.returncode == 128 + signal.SIGINT


def test_under_nohup_hanging_up_is_nothing(start: Start) -> None:
    process = start("--back", under=[*HEEDED, "nohup"])
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[0] == "put back: wait take\n"
