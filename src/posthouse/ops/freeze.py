"""A mailbox that stays as it is for a moment: `store-freeze` on a store's primary, seen from here."""

from __future__ import annotations

import shlex
import subprocess
from types import TracebackType

from posthouse import PosthouseError
from posthouse.remote import Remote


class FreezeError(PosthouseError):
    """A mailbox could not be frozen, or is not any more."""


class Freeze:
    """Reading goes on and writing waits, until `release` or the end of the `with`. Raises FreezeError.

    It ends by itself if it hears nothing for so many seconds, or for 20 s after `commit`.
    """

    def __init__(self, remote: Remote, node: str, store: str, address: str, seconds: float) -> None:
        self._where = f"{address} on {store} ({node})"
        command = ["/usr/local/lib/posthouse/store-freeze", store, address, f"{seconds:g}"]
        self._process = remote.open(node, shlex.join(command))
        words = self._answer().split()
        if words[:1] != ["frozen"]:
            raise self._error()
        # When it was, by the clock of the node: seconds since 1970.
        self.since = int(words[1])

    def __enter__(self) -> Freeze:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its standard input ends; what it does about that depends on whether there was a `commit`.
        self._process.kill()
        self._process.communicate()

    def commit(self, seconds: float) -> None:
        """From now on the account may be another store's. If it is and we vanish, nobody writes here for so long."""
        self._command(f"commit {seconds}")

    def end(self) -> None:
        """Ends the account's sessions, and the writers that wait."""
        self._command("end")

    def release(self) -> None:
        """Ends the freeze."""
        self._command("release")

    def _command(self, line: str) -> None:
        try:
            assert self._process.stdin
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._error() from None
        if self._answer() != "ok":
            raise self._error()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def _error(self) -> FreezeError:
        self._process.kill()
        try:
            _, complaint = self._process.communicate(timeout=5)
        except (subprocess.TimeoutExpired, ValueError):
            complaint = ""
        reason = complaint.strip().rpartition("\n")[2] or "the node does not answer"
        return FreezeError(f"{self._where} is not frozen: {reason}; run the command again")
