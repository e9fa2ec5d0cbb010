"""What operations on nodes are made of: a plan of steps, shown before anything is done, then done one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posthouse import PosthouseError

log = logging.getLogger(__name__)

# How things stand after most steps that failed.
GOES_ON = "running the same command again goes on"


class Refused(PosthouseError):
    """An operation that was not begun: what stands against it, and what to do about that."""


class Stopped(PosthouseError):
    """An operation that came to grief: at which step, why, and in what state things are now."""


@dataclass(frozen=True)
class Step:
    """One thing to do. `do` names the action, `what` is what it is done to or with: a store, a node."""

    do: str
    node: str
    say: str
    what: str = ""


# Does a step, and may return a few words about what came of it.
Action = Callable[[Step], str | None]


def shown(steps: Sequence[Step]) -> list[str]:
    """A plan in words, a line for each step."""
    return [f"{step.node}: {step.say}" for step in steps]


def way_on(again: Callable[[], Sequence[Step]]) -> str:
    """What the same command would do now, in words. again: makes its plan anew, from how things are by then."""
    try:
        return (
            GOES_ON
            if again()
            else "there is nothing left for the same command to do; posthouse verify says how the site is"
        )
    except PosthouseError as refusal:
        return f"the same command would be refused: {refusal}"


def perform(
    steps: Sequence[Step], actions: Mapping[str, Action], put_back: Callable[[list[Step]], str] | None = None
) -> list[dict[str, Any]]:
    """Does the steps in order; raises Stopped at the first that fails.

    Returns [{"do", "node", "say", "what", "seconds", "note"}].

    put_back: is given the steps that were begun, the last one first, puts service back as far as it can, and says in
    words how things stand then.
    """
    done: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        started = time.monotonic()
        try:
            note = actions[step.do](step) or ""
        except (PosthouseError, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted"
            after = put_back(list(reversed(steps[:number]))) if put_back else GOES_ON
            raise Stopped(f"{step.node}: could not {step.say}: {reason}\n  now: {after}") from None
        seconds = round(time.monotonic() - started, 1)
        log.info("%s: %s%s (%.1f s)", step.node, step.say, f": {note}" if note else "", seconds)
        done.append(asdict(step) | {"seconds": seconds, "note": note})
    return done


def carry_out(
    operation: str,
    steps: Sequence[Step],
    actions: Mapping[str, Action],
    check: bool,
    put_back: Callable[[list[Step]], str] | None = None,
) -> dict[str, Any]:
    """Shows a plan and, unless it is only to be checked, does it. Raises Stopped.

    Returns {"operation", "plan": [line], "changed": whether there is anything to do, "steps" (see perform), "seconds"}.
    """
    started = time.monotonic()
    plan = shown(steps)
    log.info("%s", "\n".join([f"{operation}:", *(f"  {line}" for line in plan or ["nothing to do"])]))
    done = [] if check else perform(steps, actions, put_back)
    return {
        "operation": operation,
        "plan": plan,
        "changed": bool(steps),
        "steps": done,
        "seconds": round(time.monotonic() - started, 1),
    }
