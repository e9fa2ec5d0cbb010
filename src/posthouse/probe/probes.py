"""A platform under watch: senders, sessions and submissions from the outside, at steady rates, while something goes on.

with Probe(site, people, Rates(smtp=10, imap=2, sessions=6), Ledger(Path("run.ledger"))) as probe:
    …                                                       # a drain, a failover, an upgrade
probe.statistics()["sessions"].reconnects
"""

from __future__ import annotations

import csv
import math
import secrets as random
import smtplib
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from posthouse import PosthouseError, secrets
from posthouse.accounts import Accounts
from posthouse.model import Site
from posthouse.probe.clients import Person, Platform, introduce
from posthouse.probe.kinds import Clients, Logins, Sessions, Statistics
from posthouse.probe.ledger import Ledger, Stream, Submissions

ONE_STRANGER = 4  # messages a second; the mx tier lets one client open 5 connections a second to a node


PATIENCE = 20  # s; a person who waits longer for an answer has given up


class ProbeError(PosthouseError):
    """A probe cannot be made as asked for; the message says what, why, and what to do."""


@dataclass(frozen=True)
class Rates:
    """How many a second of each kind; `sessions`: how many IMAP sessions stay open, with a command a second each."""

    smtp: float = 0
    submission: float = 0
    imap: float = 0
    pop: float = 0
    sieve: float = 0
    sessions: int = 0

    def check(self) -> None:
        """Raises ProbeError if this comes to nothing."""
        if not any(asdict(self).values()):
            raise ProbeError("there is nothing to do; give at least one rate, for instance --smtp 5")


class Probe:
    """Clients of several kinds at once. For a lab site, be in the lab's network before (`run.reach`).

    people: who gets and reads the mail, in turn. count: the most attempts of each kind. patience: seconds without an
    answer after which an attempt has failed. Raises ProbeError.
    """

    def __init__(
        self,
        site: Site,
        people: Sequence[Person],
        rates: Rates,
        ledger: Ledger | None = None,
        count: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        rates.check()
        if not people:
            raise ProbeError("there is nobody to send to; name at least one account")
        self.platform = Platform(site, patience)
        self.ledger = Ledger() if ledger is None else ledger
        self.sources = _strangers(self.platform, math.ceil(rates.smtp / ONE_STRANGER))
        self.kinds: dict[str, Clients] = {}
        senders = {"smtp": (Stream, self.sources), "submission": (Submissions, None)}
        for name, (kind, sources) in senders.items():
            if rate := getattr(rates, name):
                self.kinds[name] = kind(self.platform, self.ledger, people, sources, 0, rate, count)
        for name in ("imap", "pop", "sieve"):
            if rate := getattr(rates, name):
                self.kinds[name] = Logins(name, self.platform, people, rate, count)
        if rates.sessions:
            self.kinds["sessions"] = Sessions(self.platform, people, rates.sessions)

    def statistics(self, store: str | None = None) -> dict[str, Statistics]:
        """What became of each kind so far, for all people or for those of one store."""
        return {name: kind.statistics(store) for name, kind in self.kinds.items()}

    @property
    def running(self) -> bool:
        """Whether more will be done: without a count, always."""
        return any(kind.running for kind in self.kinds.values())

    def __enter__(self) -> Self:
        for source in self.sources:
            with suppress(OSError, smtplib.SMTPException):  # who cannot be met now is met later
                introduce(self.platform, source)
        for kind in self.kinds.values():
            kind.start()
        return self

    def __exit__(self, *_: object) -> None:
        for kind in self.kinds.values():
            kind.end()
        for kind in self.kinds.values():
            kind.stop()


def _strangers(platform: Platform, count: int) -> list[str]:
    """Addresses of so many mail servers of the outside world; none where this machine has only its own."""
    if not platform.site.lab:
        return []
    size = platform.site.lab.outside.size
    return [platform.outside(size // 2 + number) for number in range(min(count, size // 2 - 2))]


def made_people(site: Site, each: int = 1) -> list[Person]:
    """Accounts for probing, `each` on every store, with new passwords: probe-s01-1@… They are there for good.

    Raises AccountError, DirectoryError, StoreError.
    """
    found = []
    with Accounts(site, secrets.load(site)) as accounts:
        for number in range(1, each + 1):
            for store in site.stores:
                address, password = f"probe-{store}-{number}@{site.domain}", random.token_urlsafe(12)
                account = accounts.directory.get(address)
                if account:
                    accounts.passwd(address, password)
                else:
                    accounts.add(address, name="Probe", password=password, store=store)
                found.append(Person(address, password, account.store if account else store))
    return found


def read_people(site: Site, path: Path) -> list[Person]:
    """Accounts from a CSV file with the columns address and password. Raises ProbeError, DirectoryError."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not CSV in UTF-8"
        raise ProbeError(f"{path}: {reason}; name a CSV file with the columns address,password") from None
    with closing(Accounts(site, secrets.load(site))) as accounts:
        return [_person(accounts, f"{path}:{number}", row) for number, row in enumerate(rows, 2)]


def _person(accounts: Accounts, where: str, row: dict[str, str]) -> Person:
    address, password = row.get("address"), row.get("password")
    if not address or not password:
        raise ProbeError(f"{where}: no address or no password; each line needs both, under address,password")
    account = accounts.directory.get(address)
    if not account:
        raise ProbeError(f"{where}: no account {address}; see: posthouse account list --site {accounts.site.name}")
    return Person(address, password, account.store)
