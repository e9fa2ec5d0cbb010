"""Accounts from a CSV file, an account a line.

with Accounts(site, secrets.load(site)) as accounts:
    state = import_file(accounts, Path("people.csv"))
"""

from __future__ import annotations

import csv
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from posthouse.accounts import AccountError, Accounts, Placement
from posthouse.directory import AddressTaken

COLUMNS = ("address", "name", "password", "quota", "store", "aliases", "forward", "spam_threshold")


@dataclass
class Imported:
    """How far an import has come. `bad` is [(line number, reason)]; `stopped` says why it ended before the file did."""

    added: int = 0
    unchanged: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Accounts added per second."""
        return self.added / self.seconds if self.seconds else 0.0


def import_file(
    accounts: Accounts,
    path: Path,
    *,
    check: bool = False,
    workers: int = 4,
    progress: Callable[[Imported, float], None] = lambda state, fraction: None,
) -> Imported:
    """Makes an account of each line of a CSV file (docs/accounts.md has its columns).

    A bad line is noted with its number and reason, and the others go in. Lines whose account exists as they say are
    left alone, so an import that was interrupted is run again. If a store or the directory fails, the import stops.
    `progress` is called about twice a second with the state and how much of the file has been read (0 to 1).
    Raises AccountError if the file itself cannot be used.
    """
    state = Imported()
    started = time.monotonic()
    with path.open("rb") as file:
        header = _header(path, file.readline())
        size = max(path.stat().st_size, 1)
        placement = Placement(accounts.site.stores.values(), accounts.directory.counts() or Counter())
        with _Workers(accounts, workers) as pool:
            shown = started
            read = file.tell()
            for number, raw in enumerate(file, 2):
                read += len(raw)
                if raw.strip():
                    pool.submit(number, partial(_bring, header, raw, placement, check))
                pool.collect(state)
                if state.stopped:
                    break
                if time.monotonic() - shown > 0.5:
                    shown = time.monotonic()
                    state.seconds = shown - started
                    progress(state, read / size)
            pool.collect(state, all_of_them=True)
    state.bad.sort()
    state.seconds = time.monotonic() - started
    progress(state, 1.0 if not state.stopped else read / size)
    return state


class _Workers:
    """Threads that import lines, each with connections of its own."""

    def __init__(self, accounts: Accounts, count: int) -> None:
        self._own = threading.local()
        self._made: list[Accounts] = []
        self._make: Callable[[], Accounts] = lambda: Accounts(accounts.site, accounts.secrets)
        self._pool = ThreadPoolExecutor(count)
        self._waiting: dict[int, Future[bool]] = {}
        # Enough to keep all busy; not the whole file in memory.
        self._most = count * 4

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for accounts in self._made:
            accounts.close()

    def submit(self, number: int, work: Callable[[Accounts], bool]) -> None:
        """Queues the work of line `number`."""
        self._waiting[number] = self._pool.submit(lambda: work(self._mine()))

    def collect(self, state: Imported, all_of_them: bool = False) -> None:
        """Takes up results into `state`, and waits until there is room for more, or for all of them."""
        while self._waiting:
            number, future = next(iter(self._waiting.items()))
            if not (future.done() or all_of_them or len(self._waiting) >= self._most):
                return
            del self._waiting[number]
            try:
                added = future.result()
            except (AccountError, AddressTaken) as error:
                state.bad.append((number, str(error)))
            except Exception as error:  # a store or the directory: nothing that is wrong with the line
                state.stopped = state.stopped or f"line {number}: {error}"
            else:
                state.added += added
                state.unchanged += not added

    def _mine(self) -> Accounts:
        if not hasattr(self._own, "accounts"):
            self._own.accounts = self._make()
            self._made.append(self._own.accounts)
        mine: Accounts = self._own.accounts
        return mine


def _bring(header: list[str], raw: bytes, placement: Placement, check: bool, accounts: Accounts) -> bool:
    row = _row(header, raw)
    return accounts.bring(
        row.get("address", ""),
        row.get("password", ""),
        placement,
        check,
        name=row.get("name"),
        quota=_number("quota", row.get("quota")),
        store=row.get("store"),
        aliases=_several(row.get("aliases")),
        forward=_several(row.get("forward")),
        spam_threshold=_number("spam_threshold", row.get("spam_threshold")),
    )


def _header(path: Path, line: bytes) -> list[str]:
    """The columns of a file. Raises AccountError."""
    try:
        columns = [column.strip().lower() for column in _fields(line.removeprefix(b"\xef\xbb\xbf"))]
    except AccountError as error:
        raise AccountError(f"{path}: line 1: {error}") from None
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown or "address" not in columns or len(set(columns)) < len(columns):
        what = f"unknown column {unknown[0]!r}" if unknown else "needs a column address, and each column once"
        known = ", ".join(COLUMNS)
        raise AccountError(f"{path}: line 1: {what}; the columns are {known}, with commas between; nothing was changed")
    return columns


def _row(header: list[str], raw: bytes) -> dict[str, str]:
    """A line's fields that are not empty, by column. Raises AccountError."""
    fields = _fields(raw)
    if len(fields) != len(header):
        raise AccountError(
            f"{len(fields)} fields under {len(header)} columns; put double quotes around values with commas"
        )
    # A password's spaces are its own.
    values = {c: v if c == "password" else v.strip() for c, v in zip(header, fields, strict=True)}
    return {column: value for column, value in values.items() if value}


def _fields(raw: bytes) -> list[str]:
    """One line is one record, so a quote that is never closed spoils its own line and no other."""
    try:
        return next(csv.reader([raw.decode().rstrip("\r\n")], strict=True))
    except UnicodeDecodeError as error:
        raise AccountError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except (csv.Error, StopIteration) as error:
        raise AccountError(f"not CSV: {error or 'empty'}") from None


def _number(column: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,12}", text):
        raise AccountError(f"{column}: {text!r} is not a whole number; write digits only")
    return int(text)


def _several(text: str | None) -> tuple[str, ...] | None:
    """Addresses in one field, between spaces or semicolons."""
    return None if text is None else tuple(part for part in re.split(r"[\s;]+", text) if part)
