"""The site's directory as the controller sees it: accounts, read and written at a provider over LDAPS."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ldap3
from ldap3.core import exceptions as ldap_errors
from ldap3.utils.conv import escape_filter_chars
from ldap3.utils.dn import escape_rdn

from posthouse import PosthouseError
from posthouse.model import Site
from posthouse.secrets import Secrets

OBJECT_CLASSES = ["inetOrgPerson", "inetLocalMailRecipient", "posthouseAccount"]
PAGE = 1000
GONE = 4000  # ms without a confirmation of what was sent

Result = TypeVar("Result")


class DirectoryError(PosthouseError):
    """The directory cannot be asked, or refuses; the message says where, what, and what to do."""


class AddressTaken(DirectoryError):
    """An address is another account's already, or the account exists."""


@dataclass(frozen=True)
class Account:
    """A person's entry. Addresses are normalised; `quota` is in MiB, 0 is without limit."""

    address: str
    name: str
    store: str
    quota: int
    aliases: tuple[str, ...] = ()
    forward: tuple[str, ...] = ()
    forward_only: bool = False
    status: str = "active"
    spam_threshold: int | None = None

    def attributes(self, store_host: str) -> dict[str, list[str]]:
        """The entry's attributes by name, all as text. Those that an account does not have are empty lists."""
        return {
            "cn": [self.name],
            "sn": [self.name.split()[-1]],
            "mail": [self.address],
            "mailLocalAddress": [self.address, *self.aliases],
            "mailHost": [store_host],
            "posthouseQuota": [str(self.quota)],
            "posthouseStatus": [self.status],
            "posthouseForward": list(self.forward),
            "posthouseForwardOnly": ["TRUE"] if self.forward_only else [],
            "posthouseSpamThreshold": [] if self.spam_threshold is None else [str(self.spam_threshold)],
        }


READ = list(Account("", "-", "", 0).attributes(""))


class Directory:
    """A connection to the first provider that answers; it moves on to another one when that fails.

    patience: seconds for an answer.
    """

    def __init__(self, site: Site, secrets: Secrets, patience: int = 60) -> None:
        self._site = site
        self._password = secrets.passwords["directory_accounts"]
        self._ca = secrets.ca_cert
        self._base = f"ou=accounts,{site.suffix}"
        self._hosts = {store.host: store.name for store in site.stores.values()}
        self._patience = patience
        self._connection: Any = None
        self.provider = site.directory.providers[0]  # the one that was asked last

    def close(self) -> None:
        """Ends the connection; the next question makes a new one."""
        if self._connection is not None:
            self._connection.unbind()
            self._connection = None

    def get(self, address: str) -> Account | None:
        """The account of this address (not of an alias), or None."""
        found = self._search(self._dn(address), "(objectClass=posthouseAccount)", ldap3.BASE, READ)
        return self.account(found[0]) if found else None

    def holders(self, addresses: Iterable[str]) -> dict[str, Account]:
        """Which of these addresses, own or alias, some account has: {address: that account}."""
        terms = "".join(f"(mailLocalAddress={escape_filter_chars(address)})" for address in set(addresses))
        found = [self.account(entry) for entry in self._search(self._base, f"(|{terms})", ldap3.SUBTREE, READ)]
        return {address: account for account in found for address in (account.address, *account.aliases)}

    def accounts(
        self, match: str | None = None, store: str | None = None, status: str | None = None
    ) -> Iterator[Account]:
        """All accounts, or those on a store, with a status, or with `match` somewhere in an address or name."""
        terms = "(objectClass=posthouseAccount)"
        if store:
            terms += f"(mailHost={escape_filter_chars(self._site.stores[store].host)})"
        if status:
            terms += f"(posthouseStatus={escape_filter_chars(status)})"
        if match:
            part = escape_filter_chars(match)
            terms += f"(|(uid=*{part}*)(cn=*{part}*)(mailLocalAddress=*{part}*))"
        for entry in self._pages(f"(&{terms})", READ):
            yield self.account(entry)

    def counts(self, most: int | None = None) -> Counter[str] | None:
        """How many accounts each of the site's stores has; None if there are more than `most`.

        Reads one attribute of every entry: about 30 µs each.
        """
        counts = Counter(dict.fromkeys(self._hosts.values(), 0))
        for number, entry in enumerate(self._pages("(objectClass=posthouseAccount)", ["mailHost"]), 1):
            if most is not None and number > most:
                return None
            if (host := entry["mailHost"][0]) in self._hosts:
                counts[self._hosts[host]] += 1
        return counts

    def add(self, account: Account, password_hash: str) -> None:
        """Makes the entry, whole. Raises AddressTaken, DirectoryError.

        If the provider is lost before it answers, it may have made the entry or not. Making another one elsewhere would
        leave two of one name for the providers to fight over, so that is an error.
        """
        attributes = account.attributes(self._site.stores[account.store].host)
        attributes |= {"uid": [account.address], "userPassword": [password_hash]}
        filled = {name: values for name, values in attributes.items() if values}
        self._ask(lambda c: c.add(self._dn(account.address), OBJECT_CLASSES, filled), again=False)

    def change(self, have: Account, want: Account) -> None:
        """Changes what differs between two states of one account. Raises AddressTaken, DirectoryError."""
        host = self._site.stores[want.store].host
        before, after = have.attributes(host), want.attributes(host)
        changes = {name: [(ldap3.MODIFY_REPLACE, after[name])] for name in after if before[name] != after[name]}
        if changes:
            self._ask(lambda c: c.modify(self._dn(want.address), changes))

    def put(self, dn: str, attributes: dict[str, list[bytes]]) -> None:
        """Makes an entry of a backup, as it was. Raises AddressTaken, DirectoryError."""
        classes = [name.decode() for name in attributes["objectClass"]]
        rest = {name: values for name, values in attributes.items() if name != "objectClass"}
        self._ask(lambda c: c.add(dn, classes, rest), again=False)

    def replace(self, dn: str, attributes: dict[str, list[bytes]]) -> None:
        """Sets attributes of an entry; those without values go. Raises AddressTaken, DirectoryError."""
        changes = {name: [(ldap3.MODIFY_REPLACE, values)] for name, values in attributes.items()}
        self._ask(lambda c: c.modify(dn, changes))

    def move(self, address: str, source: str, target: str, since: int) -> None:
        """Makes another store the account's, and notes the copy that is left on `source`; both or neither.

        since: when the two copies were the same, in seconds since 1970. Raises DirectoryError, also if the account
        is not on `source` any more.
        """
        old, new = self._site.stores[source].host, self._site.stores[target].host
        changes = {
            "mailHost": [(ldap3.MODIFY_DELETE, [old]), (ldap3.MODIFY_ADD, [new])],
            "posthouseMovedFrom": [(ldap3.MODIFY_ADD, [f"{source} {since}"])],
        }
        self._ask(lambda c: c.modify(self._dn(address), changes), again=False)

    def stay(self, address: str, store: str) -> None:
        """Makes a store the account's whatever was asked before, with no copy elsewhere. Raises DirectoryError."""
        self.replace(
            self._dn(address),
            {"mailHost": [self._site.stores[store].host.encode()], "posthouseMovedFrom": []},
        )

    def moved(self, address: str) -> tuple[str, int] | None:
        """The store that has a former copy of the account's mailbox, and since when. Raises DirectoryError."""
        found = self._search(self._dn(address), "(posthouseMovedFrom=*)", ldap3.BASE, ["posthouseMovedFrom"])
        if not found:
            return None
        store, since = found[0]["posthouseMovedFrom"][0].split()
        return store, int(since)

    def unsettled(self) -> dict[str, str]:
        """Accounts of whose mailbox a former copy is left, each with the store that it is on. Raises DirectoryError."""
        return {found.address: found.store for found in map(self.account, self._pages("(posthouseMovedFrom=*)", READ))}

    def settled(self, address: str) -> None:
        """Notes that no former copy is left. Raises DirectoryError."""
        self._ask(lambda c: c.modify(self._dn(address), {"posthouseMovedFrom": [(ldap3.MODIFY_REPLACE, [])]}))

    def set_password(self, address: str, password_hash: str) -> None:
        """Replaces the password. Raises DirectoryError."""
        change = {"userPassword": [(ldap3.MODIFY_REPLACE, [password_hash])]}
        self._ask(lambda c: c.modify(self._dn(address), change))

    def delete(self, address: str) -> None:
        """Removes the entry, if it is there. Raises DirectoryError."""

        def delete(connection: Any) -> None:
            with contextlib.suppress(ldap_errors.LDAPNoSuchObjectResult):
                connection.delete(self._dn(address))

        self._ask(delete)

    def _dn(self, address: str) -> str:
        return f"uid={escape_rdn(address)},{self._base}"

    def account(self, entry: dict[str, list[str]]) -> Account:
        """What an entry's attributes, those in READ, say."""

        def one(name: str, default: str = "") -> str:
            return entry[name][0] if entry[name] else default

        address, host = one("mail"), one("mailHost")
        threshold = one("posthouseSpamThreshold")
        return Account(
            address=address,
            name=one("cn"),
            # A store that the site file does not name any more is shown by its host.
            store=self._hosts.get(host, host),
            quota=int(one("posthouseQuota", "0")),
            aliases=tuple(sorted(a for a in entry["mailLocalAddress"] if a != address)),
            forward=tuple(sorted(entry["posthouseForward"])),
            forward_only=one("posthouseForwardOnly") == "TRUE",
            status=one("posthouseStatus"),
            spam_threshold=int(threshold) if threshold else None,
        )

    def _search(self, base: str, terms: str, scope: str, attributes: list[str]) -> list[dict[str, list[str]]]:
        def search(connection: Any) -> list[dict[str, list[str]]]:
            try:
                connection.search(base, terms, search_scope=scope, attributes=attributes)
            except ldap_errors.LDAPNoSuchObjectResult:
                return []
            return [_decoded(item, attributes) for item in connection.response if item["type"] == "searchResEntry"]

        return self._ask(search)

    def _pages(self, terms: str, attributes: list[str]) -> Iterator[dict[str, list[str]]]:
        """Entries below ou=accounts, a page at a time: a million of them do not fit into memory at once."""
        cookie: bytes | None = None

        def page(connection: Any) -> tuple[list[dict[str, list[str]]], bytes | None]:
            connection.search(self._base, terms, attributes=attributes, paged_size=PAGE, paged_cookie=cookie)
            entries = [_decoded(item, attributes) for item in connection.response if item["type"] == "searchResEntry"]
            control = connection.result["controls"]["1.2.840.113556.1.4.319"]
            return entries, control["value"]["cookie"]

        while True:
            # A page's cookie is worth nothing at another provider, so a loss in the middle is an error.
            entries, cookie = self._ask(page, again=not cookie)
            yield from entries
            if not cookie:
                return

    def _ask(self, question: Callable[[Any], Result], again: bool = True) -> Result:
        """Puts a question to the provider; if the connection is lost, once more to the first one that answers then.

        `again` says that repeating it is harmless.
        """
        fresh = self._connection is None
        if self._connection is None:
            self._connection = self._connect()
        try:
            return question(self._connection)
        except (ldap_errors.LDAPEntryAlreadyExistsResult, ldap_errors.LDAPConstraintViolationResult) as error:
            reason = error.message or error.description
            raise AddressTaken(f"an account has one of these addresses already ({reason})") from None
        except ldap_errors.LDAPOperationResult as error:
            reason = f"{error.description} {error.message}".strip()
            raise DirectoryError(
                f"the directory ({self._connection.server.host}) refused: {reason}; its log may say why"
            ) from None
        except (ldap_errors.LDAPExceptionError, OSError) as error:
            host = self._connection.server.host
            self._connection = None
            if fresh or not again:
                raise DirectoryError(
                    f"the directory ({host}) was lost in the middle ({error}); run the command again"
                ) from None
            return self._ask(question)

    def _connect(self) -> Any:
        """Binds at the first provider that answers and has all of its data. Raises DirectoryError."""
        reasons = []
        for name in self._site.directory.providers:
            node = self._site.nodes[name]
            tls = ldap3.Tls(validate=ssl.CERT_REQUIRED, ca_certs_data=self._ca, valid_names=[node.fqdn], sni=node.fqdn)
            server = ldap3.Server(node.address, port=636, use_ssl=True, tls=tls, get_info=ldap3.NONE, connect_timeout=3)
            connection = ldap3.Connection(
                server,
                f"cn=accounts,ou=services,{self._site.suffix}",
                self._password,
                raise_exceptions=True,
                receive_timeout=self._patience,
                check_names=False,
            )
            try:
                connection.bind()
                # One that is slow may take its time; one that is gone does not even confirm what it is sent.
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE)
                # Without it the provider is still being filled: it would take accounts for new that are not.
                connection.search(self._site.suffix, "(contextCSN=*)", search_scope=ldap3.BASE, attributes=["1.1"])
                if connection.response:
                    self.provider = name
                    return connection
                reasons.append(f"{name}: still being filled from another provider; run the command again later")
            except ldap_errors.LDAPInvalidCredentialsResult:
                reasons.append(
                    f"{name}: empty, or with another password for cn=accounts; run: posthouse deploy {self._site.name}"
                )
            except (ldap_errors.LDAPExceptionError, OSError) as error:
                foreign = "CERTIFICATE_VERIFY_FAILED" in str(error)
                what = (
                    "its certificate is not of this site's CA; put back the secrets that it was deployed with"
                    if foreign
                    else error
                )
                reasons.append(f"{name} ({node.address}:636): {what}")
        raise DirectoryError("no provider of the directory can be used: " + "; ".join(reasons))


def _decoded(item: dict[str, Any], attributes: list[str]) -> dict[str, list[str]]:
    raw = item["raw_attributes"]
    return {name: [value.decode("utf-8", "replace") for value in raw.get(name, ())] for name in attributes}
