"""Accounts of a site: made, shown, changed, suspended and removed. (Whole lists of them: `account_import`.)

    with Accounts(site, secrets.load(site)) as accounts:
        accounts.add("alice@lab.test", password="…", quota=2048)

The order of work is the same everywhere. An account's entry makes its addresses valid, so it comes last when an account
is made (mailbox, limit, script, entry) and goes first when one is removed: mail is never accepted for a mailbox that is
not there. The entry is also the proof that all the rest was done; a command that was killed before is simply run again.
"""

from __future__ import annotations

import re
import secrets as random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import argon2

from posthouse import PosthouseError
from posthouse.directory import Account, AddressTaken, Directory
from posthouse.mailboxes import Mailboxes
from posthouse.model import Site, Store
from posthouse.secrets import Secrets

COUNTED = 20_000  # accounts; half a second
LARGEST_QUOTA = 2**30  # MiB; a pebibyte
# What slapd can check; see its own modules and argon2, pw-sha2. {CRYPT} is whatever the nodes' libc knows.
HASHED = re.compile(r"\{(ARGON2|CRYPT|S?MD5|S?SHA|S?SHA(256|384|512))\}[\x21-\x7e]+")
# Also what a mailbox name can hold without being quoted. Not '+': it sets off the folder in name+folder@….
LOCAL = re.compile(r"(?!\.)(?!.*\.\.)(?!.*\.$)[a-z0-9._'=-]{1,64}")
FOREIGN_LOCAL = re.compile(r"(?!\.)(?!.*\.\.)(?!.*\.$)[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}")
DOMAIN = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class AccountError(PosthouseError):
    """Something that was asked for cannot be; the message says what, why, and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What a command did, or with `check` would do. `password` is set if one was generated."""

    address: str
    steps: tuple[str, ...] = ()
    password: str | None = field(default=None, repr=False)

    @property
    def changed(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class Wish:
    """A new account as somebody asked for it, checked and normalised. None is: not said, take the site's default."""

    address: str
    name: str | None = None
    quota: int | None = None
    store: str | None = None
    aliases: tuple[str, ...] | None = None
    forward: tuple[str, ...] | None = None
    forward_only: bool | None = None
    spam_threshold: int | None = None

    def differs(self, have: Account) -> list[str]:
        """What an existing account has that is not as it was asked for, as "quota: 100, not 200"."""
        wanted = {name: value for name, value in asdict(self).items() if value is not None}
        return [f"{n}: {_shown(getattr(have, n))}, not {_shown(v)}" for n, v in wanted.items() if getattr(have, n) != v]


class Placement:
    """Chooses stores for new accounts: the one with the fewest accounts for its weight. Threads may share it."""

    def __init__(self, stores: Iterable[Store], counts: Counter[str]) -> None:
        self._weights = {store.name: store.weight for store in stores}
        self._counts = counts
        self._lock = threading.Lock()

    def choose(self) -> str:
        """The next account's store."""
        with self._lock:
            name = min(self._weights, key=lambda s: ((self._counts[s] + 1) / self._weights[s], s))
            self._counts[name] += 1
            return name


class Accounts:
    """The accounts of a site. Holds connections; use it as a context manager, and in one thread."""

    def __init__(self, site: Site, secrets: Secrets) -> None:
        self.site = site
        self.secrets = secrets
        self.directory = Directory(site, secrets)
        self._mailboxes: dict[str, Mailboxes] = {}
        settings = site.settings("directory")
        self._hasher = argon2.PasswordHasher(
            time_cost=settings["directory_argon2_iterations"],
            memory_cost=settings["directory_argon2_memory"],
            parallelism=1,
        )

    def __enter__(self) -> Accounts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections; what is asked next makes new ones."""
        self.directory.close()
        for mailboxes in self._mailboxes.values():
            mailboxes.close()

    # Looking

    def show(self, address: str) -> dict[str, Any]:
        """An account's entry as a dict, with `used` (MiB of mail) from its store. Raises AccountError, StoreError."""
        account = existing(self.site, self.directory, address)
        return asdict(account) | {"used": self._store(account.store).usage(account.address)[0]}

    def find(self, match: str | None = None, store: str | None = None, status: str | None = None) -> Iterator[Account]:
        """Accounts, all or some: with `match` in an address or name, on a store, with a status."""
        if store:
            self._known_store(store)
        return self.directory.accounts(match, store, status)

    # Changing

    def add(
        self,
        address: str,
        *,
        name: str | None = None,
        password: str | None = None,
        quota: int | None = None,
        store: str | None = None,
        aliases: Iterable[str] = (),
        forward: Iterable[str] = (),
        forward_only: bool = False,
        spam_threshold: int | None = None,
        check: bool = False,
    ) -> Outcome:
        """Makes an account. Without a password one is generated, and is in the outcome.

        If the account exists and is as asked for, nothing happens; its password is left alone and not compared.
        Raises AccountError, AddressTaken, DirectoryError, StoreError.
        """
        wish = self._wish(
            address,
            name=name,
            quota=quota,
            store=store,
            aliases=tuple(aliases) or None,
            forward=tuple(forward) or None,
            forward_only=forward_only or None,
            spam_threshold=spam_threshold,
        )
        if self._is_there(wish):
            return Outcome(wish.address)
        generated = None if password is not None else random.token_urlsafe(12)
        secret = self._checked_password(password if password is not None else generated or "")
        place = wish.store or self._place()
        account = self._account(wish, place)
        addresses = ", ".join((account.address, *account.aliases))
        steps = (f"mailbox on {place}, {_limit(account.quota)}", f"entry with {addresses}")
        if not check:
            self._make(account, "{ARGON2}" + self._hasher.hash(secret))
        return Outcome(account.address, steps, None if check else generated)

    def passwd(self, address: str, password: str | None = None, check: bool = False) -> Outcome:
        """Sets a password; without one, one is generated and is in the outcome. Raises AccountError, DirectoryError."""
        account = existing(self.site, self.directory, address)
        generated = None if password is not None else random.token_urlsafe(12)
        secret = self._checked_password(password if password is not None else generated or "")
        if not check:
            self.directory.set_password(account.address, "{ARGON2}" + self._hasher.hash(secret))
        return Outcome(account.address, ("new password",), None if check else generated)

    def alias(self, address: str, add: Iterable[str] = (), remove: Iterable[str] = (), check: bool = False) -> Outcome:
        """Gives an account more addresses, and takes some away. Raises AccountError, AddressTaken, DirectoryError."""
        account = existing(self.site, self.directory, address)
        new = {own(self.site, alias) for alias in add}
        old = {own(self.site, alias) for alias in remove}
        if account.address in old:
            raise AccountError(f"{account.address} is the account's own address; only its aliases can be taken away")
        if new:
            self._check_free(account.address, new, self.directory.holders(new))
        return self._change(account, replace(account, aliases=tuple(sorted((set(account.aliases) | new) - old))), check)

    def forward(self, address: str, to: Iterable[str] = (), only: bool = False, check: bool = False) -> Outcome:
        """Sends copies of all mail to these addresses; `only`: and keeps none. No addresses: no more forwarding.

        Raises AccountError, DirectoryError.
        """
        account = existing(self.site, self.directory, address)
        targets = self._targets(to, {account.address, *account.aliases})
        if only and not targets:
            raise AccountError("to keep no copy, say where mail goes instead")
        return self._change(account, replace(account, forward=targets, forward_only=only), check)

    def quota(self, address: str, mib: int, check: bool = False) -> Outcome:
        """Limits an account's mailbox, in MiB; 0 is without limit. Raises AccountError, DirectoryError, StoreError."""
        account = existing(self.site, self.directory, address)
        want = replace(account, quota=self._checked_quota(mib))
        mailboxes = self._store(account.store)
        outcome = self._change(account, want, check)
        # Compared by itself: a command that was killed half-way left the store behind the directory.
        if mailboxes.usage(account.address)[1] == want.quota:
            return outcome
        if not check:
            mailboxes.set_quota(account.address, want.quota)
        return replace(outcome, steps=(*outcome.steps, f"{_limit(want.quota)} on {account.store}"))

    def spam(self, address: str, threshold: int | None, check: bool = False) -> Outcome:
        """Files mail from this many points on into Junk; None is the site's default. Raises as `quota` does."""
        account = existing(self.site, self.directory, address)
        want = replace(account, spam_threshold=None if threshold is None else self._checked_threshold(threshold))
        # The script first: if it cannot be put in place, the directory does not say that it was.
        if not check and want != account:
            self._store(account.store).install_script(account.address, self._threshold(want))
        return self._change(account, want, check)

    def suspend(self, address: str, check: bool = False) -> Outcome:
        """Refuses the account's logins, for reading and for sending. Mail for it is still delivered.

        Sessions that are open stay open. Raises AccountError, DirectoryError.
        """
        account = existing(self.site, self.directory, address)
        return self._change(account, replace(account, status="suspended"), check)

    def resume(self, address: str, check: bool = False) -> Outcome:
        """Takes a suspension back. Raises AccountError, DirectoryError."""
        account = existing(self.site, self.directory, address)
        return self._change(account, replace(account, status="active"), check)

    def delete(self, address: str, check: bool = False) -> Outcome:
        """Removes an account and its mailbox, which its store keeps aside for some days.

        Where the entry is gone already, a mailbox that was left behind is looked for on all stores and removed.
        Raises AccountError, DirectoryError, StoreError.
        """
        address = own(self.site, address)
        account = self.directory.get(address)
        steps = ["entry"] if account else []
        if account and not check:
            self.directory.delete(address)
        for name in [account.store] if account else list(self.site.stores):
            mailboxes = self._store(name)
            if mailboxes.exists(address):
                steps.append(f"mailbox on {name}")
                if not check:
                    mailboxes.delete(address)
        if not steps:
            raise AccountError(
                f"no account {address}, nor a mailbox of it on any store; "
                f"see: posthouse account list --site {self.site.name}"
            )
        return Outcome(address, tuple(f"remove the {step}" for step in steps))

    def bring(self, address: str, password: str, placement: Placement, check: bool = False, **given: Any) -> bool:
        """Makes an account as a list of them has it; says whether it was not there yet.

        password: as it is, or its hash as {SCHEME}…; given: what `add` takes besides, None where the list says nothing.
        Raises AccountError, AddressTaken if it cannot be, DirectoryError, StoreError.
        """
        wish = self._wish(address, **given)
        if self._is_there(wish):
            return False
        if not password:
            raise AccountError("password: empty; give one, or its hash as {SCHEME}…")
        if not HASHED.fullmatch(password):
            self._checked_password(password)
        if not check:
            hashed = password if HASHED.fullmatch(password) else "{ARGON2}" + self._hasher.hash(password)
            self._make(self._account(wish, wish.store or placement.choose()), hashed)
        return True

    # Parts of the above

    def _place(self) -> str:
        """A store for one new account."""
        stores = list(self.site.stores.values())
        counts = self.directory.counts(most=COUNTED)
        if counts is None:
            # Counting would take longer than all the rest, and with so many chance keeps the shares.
            chosen = random.SystemRandom().choices(stores, [store.weight for store in stores])
            return chosen[0].name
        return Placement(stores, counts).choose()

    def _make(self, account: Account, password_hash: str) -> None:
        mailboxes = self._store(account.store)
        mailboxes.make(account.address)
        mailboxes.set_quota(account.address, account.quota)
        mailboxes.install_script(account.address, self._threshold(account))
        self.directory.add(account, password_hash)

    def _change(self, have: Account, want: Account, check: bool) -> Outcome:
        self._known_store(have.store)
        if not check:
            self.directory.change(have, want)
        before, after = asdict(have), asdict(want)
        changes = (f"{n}: {_shown(before[n])} → {_shown(after[n])}" for n in after if before[n] != after[n])
        return Outcome(have.address, tuple(changes))

    def _is_there(self, wish: Wish) -> bool:
        """Whether the wish has come true already. Raises AccountError, AddressTaken if it cannot any more."""
        addresses = [wish.address, *(wish.aliases or ())]
        taken = self.directory.holders(addresses)
        account = taken.get(wish.address)
        if account is None or account.address != wish.address:
            self._check_free(wish.address, addresses, taken)
            return False
        if differences := wish.differs(account):
            raise AccountError(
                f"{wish.address} exists, with {'; '.join(differences)}; "
                "what changes an account is listed by: posthouse account --help"
            )
        return True

    def _check_free(self, address: str, wanted: Iterable[str], taken: dict[str, Account]) -> None:
        for alias in wanted:
            if alias in taken and taken[alias].address != address:
                raise AddressTaken(
                    f"{alias} belongs to {taken[alias].address} already; choose another, or take it away there first"
                )

    def _wish(self, address: str, **given: Any) -> Wish:
        address = own(self.site, address)
        aliases = given.pop("aliases")
        forward = given.pop("forward")
        if aliases is not None:
            aliases = tuple(sorted({own(self.site, alias) for alias in aliases} - {address}))
        if forward is not None:
            forward = self._targets(forward, {address, *(aliases or ())})
        if given.get("forward_only") and not forward:
            raise AccountError("to keep no copy, say where mail goes instead")
        if given["name"] is not None:
            given["name"] = _checked_name(given["name"])
        if given["quota"] is not None:
            self._checked_quota(given["quota"])
        if given["spam_threshold"] is not None:
            self._checked_threshold(given["spam_threshold"])
        if given["store"] is not None:
            self._known_store(given["store"])
        return Wish(address, aliases=aliases, forward=forward, **given)

    def _account(self, wish: Wish, store: str) -> Account:
        return Account(
            address=wish.address,
            name=wish.name or wish.address.partition("@")[0],
            store=store,
            quota=self.site.accounts.quota if wish.quota is None else wish.quota,
            aliases=wish.aliases or (),
            forward=wish.forward or (),
            forward_only=bool(wish.forward_only),
            spam_threshold=wish.spam_threshold,
        )

    def _targets(self, addresses: Iterable[str], own: set[str]) -> tuple[str, ...]:
        """Where mail may be forwarded to, normalised. Raises AccountError."""
        targets = set()
        for text in addresses:
            local, domain = _split(text)
            if not FOREIGN_LOCAL.fullmatch(local):
                raise AccountError(
                    f"{text!r} is not an address that mail can be forwarded to; write it like name@example.com"
                )
            # Only who owns a domain knows whether case matters before its @; here it does not.
            target = f"{local.lower() if domain in self.site.domains else local}@{domain}"
            if re.sub(r"\+.*@", "@", target) in own:
                raise AccountError(
                    f"{text!r} is the account's own address; forwarding to it would go round in circles: leave it out"
                )
            targets.add(target)
        return tuple(sorted(targets))

    def _checked_password(self, password: str) -> str:
        least = self.site.accounts.password_length
        if len(password) < least:
            raise AccountError(
                f"password: shorter than {least} characters (accounts.password_length); take a longer one"
            )
        if not password.isprintable():
            raise AccountError("password: has a control character in it; clients cannot send it; take another one")
        return password

    def _checked_quota(self, mib: int) -> int:
        if not 0 <= mib <= LARGEST_QUOTA:
            raise AccountError(f"quota: {mib} is not between 0 (no limit) and {LARGEST_QUOTA} MiB")
        return mib

    def _checked_threshold(self, points: int) -> int:
        if not 1 <= points <= 100:
            raise AccountError(f"spam_threshold: {points} is not between 1 and 100 points")
        return points

    def _threshold(self, account: Account) -> int:
        return self.site.accounts.spam_threshold if account.spam_threshold is None else account.spam_threshold

    def _known_store(self, name: str) -> Store:
        if name not in self.site.stores:
            raise AccountError(f"no store {name!r} in this site; the stores are {', '.join(self.site.stores)}")
        return self.site.stores[name]

    def _store(self, name: str) -> Mailboxes:
        store = self._known_store(name)
        if name not in self._mailboxes:
            self._mailboxes[name] = Mailboxes(store, self.secrets)
        return self._mailboxes[name]


def own(site: Site, text: str) -> str:
    """An address in one of the site's domains, normalised. Raises AccountError."""
    local, domain = _split(text)
    local = local.lower()
    if "+" in local:
        raise AccountError(f"{text!r}: '+' sets off a folder, as in name+folder@…; leave it out with what follows it")
    if not LOCAL.fullmatch(local):
        raise AccountError(f"{text!r}: before the @ may be letters, digits, and . _ - ' = between them, 64 at most")
    if domain not in site.domains:
        raise AccountError(f"{text!r}: {domain} is not a domain of this site ({', '.join(site.domains)})")
    return f"{local}@{domain}"


def existing(site: Site, directory: Directory, text: str) -> Account:
    """The account of an address that somebody wrote. Raises AccountError, also where it is an alias of one."""
    address = own(site, text)
    holder = directory.holders([address]).get(address)
    if holder is None:
        raise AccountError(f"no account {address}; see: posthouse account list --site {site.name}")
    if holder.address != address:
        raise AccountError(f"{address} is an alias of {holder.address}; name that account")
    return holder


def _split(text: str) -> tuple[str, str]:
    """The two parts of an address, the domain in the form that DNS knows, in lower case. Raises AccountError."""
    local, at, domain = text.strip().rpartition("@")
    if not at or not local or not text.isprintable() or re.search(r"\s", text.strip()):
        raise AccountError(f"{text!r} is not an address; write it like name@example.com")
    if domain.startswith("["):
        raise AccountError(f"{text!r}: what follows the @ is an address literal; write a domain there")
    try:
        # IDNA: bücher.example and xn--bcher-kva.example are one domain, and the directory holds the second form.
        domain = domain.encode("idna").decode().lower()
    except UnicodeError:
        domain = ""
    if not DOMAIN.fullmatch(domain):
        raise AccountError(f"{text!r}: what follows the @ is not a domain; write it like name@example.com")
    return local, domain


def _checked_name(name: str) -> str:
    name = " ".join(name.split())
    if not name or not name.isprintable() or len(name) > 200:
        raise AccountError(f"name: {name[:50]!r} is empty, too long or has control characters in it")
    return name


def _limit(mib: int) -> str:
    return f"limited to {mib} MiB" if mib else "without limit"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "default" if value is None else str(value)
