"""Clients that come again and again at a steady rate, and what became of them: failures, silences, latencies."""

from __future__ import annotations

import imaplib
import itertools
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Self

from posthouse.probe.clients import Imap, Person, Platform, Pop, Sieve, closed_quietly

LONGEST = 90  # s; an attempt ends before: each client gives up when no answer comes for a time


class Outcome(NamedTuple):
    """One attempt: when it ended (on the monotonic clock), how long it took, for whom, and why it failed, if it did."""

    at: float
    seconds: float
    person: Person
    failure: str | None


@dataclass(frozen=True)
class Statistics:
    """What became of the attempts of one kind; times in seconds, None where there was no success to measure."""

    attempts: int
    failed: int
    failures: dict[str, int]
    longest_silence: float
    p50: float | None
    p99: float | None
    reconnects: list[int] = field(default_factory=list)


class Clients(ABC):
    """Attempts of one kind, `rate` a second, spread over people in turn, until stopped or `count` were made.

    Several threads, so that one that waits for a dead node does not stand for all. When all wait, the rate falls:
    what was missed is not made up for afterwards.
    """

    def __init__(self, people: Sequence[Person], rate: float, count: int | None = None, threads: int = 0) -> None:
        self.people = people
        self._every = 1 / rate
        self._count = count if count is not None else math.inf
        self._numbers = itertools.count(1)
        self._outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._next = self._started = self._stopped = 0.0
        # As many as keep up the rate while each attempt takes ten seconds.
        count_of_threads = threads or min(100, max(2, math.ceil(10 * rate)))
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count_of_threads)]

    @abstractmethod
    def attempt(self, person: Person, number: int) -> None:
        """Does once what this kind of client does. Whatever it raises is a failure."""

    def _run(self) -> None:
        while (number := self._wait_for_turn()) is not None:
            person = self.people[number % len(self.people)]
            self.record(person, lambda p=person, n=number: self.attempt(p, n))  # type: ignore[misc]

    def _wait_for_turn(self) -> int | None:
        with self._lock:
            number = next(self._numbers)
            if number > self._count:
                return None
            turn = self._next = max(self._next + self._every, time.monotonic())
        return None if self._ended.wait(turn - time.monotonic()) else number

    def record(self, person: Person, attempt: Callable[[], object]) -> bool:
        """Makes an attempt and notes its outcome; says whether it succeeded."""
        started, failure = time.monotonic(), None
        try:
            attempt()
        except Exception as error:  # whatever it is, it is a person's failure to use the platform
            failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        now = time.monotonic()
        self._outcomes.append(Outcome(now, now - started, person, failure))
        return failure is None

    @property
    def taken(self) -> int:
        """How many attempts succeeded so far."""
        return sum(outcome.failure is None for outcome in self._outcomes)

    @property
    def failures(self) -> list[str]:
        """Why attempts failed, one line for each."""
        return [outcome.failure for outcome in self._outcomes if outcome.failure is not None]

    def longest_silence(self, store: str | None = None) -> float:
        """The longest time in which no attempt succeeded (for people of that store), its ends included; seconds."""
        end = self._stopped or time.monotonic()
        good = [o.at for o in self._outcomes if o.failure is None and store in (None, o.person.store) and o.at < end]
        marks = sorted([self._started, *good, end])
        return max(after - before for before, after in pairwise(marks))

    def statistics(self, store: str | None = None) -> Statistics:
        """All that is known so far, of all people or of those of one store."""
        made = [outcome for outcome in self._outcomes if store in (None, outcome.person.store)]
        failures = Counter(outcome.failure for outcome in made if outcome.failure is not None)
        took = sorted(outcome.seconds for outcome in made if outcome.failure is None)
        return Statistics(
            attempts=len(made),
            failed=failures.total(),
            failures=dict(failures.most_common()),
            longest_silence=round(self.longest_silence(store), 3),
            p50=_percentile(took, 0.5),
            p99=_percentile(took, 0.99),
            reconnects=self.reconnects(store),
        )

    def reconnects(self, store: str | None = None) -> list[int]:
        """For clients that stay connected: how often each had to connect anew."""
        return []

    def start(self) -> None:
        """Starts; returns at once."""
        self._next = self._started = time.monotonic()
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether more attempts will be made."""
        return any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """Begins nothing more; returns at once. What is under way may last: that is nobody's silence."""
        self._ended.set()
        self._stopped = self._stopped or time.monotonic()

    def stop(self) -> None:
        """Lets what is under way finish, and ends. Raises TimeoutError if it does not."""
        self.end()
        for thread in self._threads:
            thread.join(LONGEST)
            if thread.is_alive():
                raise TimeoutError(f"{type(self).__name__}: an attempt has been under way for {LONGEST} s")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _percentile(values: Sequence[float], part: float) -> float | None:
    """The value below or at which this part of the sorted values lies, to the millisecond."""
    return round(values[max(0, math.ceil(part * len(values)) - 1)], 3) if values else None


class Logins(Clients):
    """People who log in, look and leave: by IMAP, POP3 or ManageSieve."""

    def __init__(
        self, protocol: str, platform: Platform, people: Sequence[Person], rate: float, count: int | None = None
    ) -> None:
        super().__init__(people, rate, count)
        self._visit = {"imap": self._imap, "pop": self._pop, "sieve": self._sieve}[protocol]
        self.platform = platform

    def attempt(self, person: Person, number: int) -> None:
        self._visit(person)

    def _imap(self, person: Person) -> None:
        with Imap(self.platform, person) as imap:
            expect_ok(imap.select("INBOX", readonly=True))

    def _pop(self, person: Person) -> None:
        pop = Pop(self.platform, person)
        try:
            pop.stat()
        finally:
            pop.quit()

    def _sieve(self, person: Person) -> None:
        sieve = Sieve(self.platform, person)
        try:
            sieve.scripts()
        finally:
            sieve.close()


class Sessions(Clients):
    """Mail programs that stay connected, `rate` of one session's commands a second, and connect anew when they must."""

    def __init__(self, platform: Platform, people: Sequence[Person], sessions: int, rate: float = 1) -> None:
        super().__init__(people, rate, threads=sessions)
        self.platform = platform
        self._reconnects = [0] * sessions
        self._places = itertools.count()

    def attempt(self, person: Person, number: int) -> None:
        raise NotImplementedError("a session is more than one attempt")

    def reconnects(self, store: str | None = None) -> list[int]:
        return [n for i, n in enumerate(self._reconnects) if store in (None, self._person(i).store)]

    def _person(self, place: int) -> Person:
        return self.people[place % len(self.people)]

    def _run(self) -> None:
        place = next(self._places)
        person = self._person(place)
        imap: Imap | None = None
        opened = False
        while not self._ended.is_set():
            if imap is None:
                # A session that could not be opened is not one that was lost.
                self._reconnects[place] += opened
                imap = self._open(person)
                opened = opened or imap is not None
            elif not self.record(person, lambda i=imap: expect_ok(i.noop())):  # type: ignore[misc]
                imap = None
                continue  # at once, as mail programs do
            self._ended.wait(self._every)
        if imap is not None:
            closed_quietly(imap)

    def _open(self, person: Person) -> Imap | None:
        found: list[Imap] = []

        def connect() -> None:
            found.append(Imap(self.platform, person))
            expect_ok(found[0].select("INBOX", readonly=True))

        return found[0] if self.record(person, connect) else None


def expect_ok(answer: tuple[str, object]) -> None:
    """Raises what imaplib leaves to its caller: a NO."""
    if answer[0] != "OK":
        raise imaplib.IMAP4.error(str(answer[1]))
