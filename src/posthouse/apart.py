"""Work in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def apart(work: Callable[[], bool]) -> bool:
    """Does some work in a child process, and says whether it returned true; what it raised goes to standard error.

    For what cannot be taken back, such as entering a lab's network.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 1
        except Exception as error:
            print(f"posthouse: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
