"""Mailboxes and Sieve scripts of a store, from the controller: IMAP as its administrator and on behalf of accounts."""

from __future__ import annotations

import base64
import imaplib
import re
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jinja2

from posthouse import PosthouseError, roles
from posthouse.model import Store
from posthouse.secrets import Secrets

TIMEOUT = 30  # s; a store that takes longer for one command is as good as down
SCRIPT = "posthouse"
SCRIPTS = "#sieve"  # the folder in which Cyrus has an account's scripts

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(roles.ROOT / "templates"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


class StoreError(PosthouseError):
    """A store cannot be reached, or refuses; the message says where, what, and what to do."""


class Aside(NamedTuple):
    """A folder that was removed: its name before, and when, in seconds since 1970."""

    name: str
    at: int


class Mailboxes:
    """One store. Connections are made when needed and kept; `close` ends them.

    They go to the store's service address and expect a certificate for its name, so no DNS is needed.
    """

    def __init__(self, store: Store, secrets: Secrets) -> None:
        self.store = store
        self._passwords = secrets.passwords
        self._tls = ssl.create_default_context(cadata=secrets.ca_cert)
        self._admin_connection: imaplib.IMAP4 | None = None
        self._sieve_connection: ManageSieve | None = None

    def close(self) -> None:
        """Ends all connections."""
        if self._admin_connection is not None:
            _quietly(self._admin_connection.logout)
        if self._sieve_connection is not None:
            _quietly(self._sieve_connection.close)
        self._admin_connection = self._sieve_connection = None

    def make(self, address: str) -> None:
        """Makes an account's mailbox and its standard folders, unless they are there. Raises StoreError."""
        # Cyrus does it at the first login.
        with self.acting_for(address) as connection:
            _expect(connection.status("INBOX", "(MESSAGES)"))

    @contextmanager
    def acting_for(self, address: str) -> Iterator[imaplib.IMAP4]:
        """An IMAP session as an account has it, without its password. Raises StoreError, also for what fails within."""
        # `proxy` may log in for anyone, also for those not yet in the directory.
        # A session is one account's for good: Cyrus takes UNAUTHENTICATE from its admins alone.
        try:
            connection = _Imap(self.store, self._tls)
            try:
                token = f"{address}\0proxy\0{self._passwords['store_proxy']}".encode()
                connection.authenticate("PLAIN", lambda _: token)
                yield connection
            finally:
                _quietly(connection.logout)
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._error("IMAP", error) from None

    def usage(self, address: str) -> tuple[int, int]:
        """(MiB used, MiB allowed or 0 for no limit) of the account's mailbox. Raises StoreError."""
        try:
            answer = _expect(self._admin().getquota(_root(address)))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None
        match = re.search(rb"STORAGE (\d+) (\d+)", b" ".join(part for part in answer if part))
        return (int(match[1]) // 1024, int(match[2]) // 1024) if match else (0, 0)

    def set_quota(self, address: str, mib: int) -> None:
        """Limits the account's mailbox to `mib` MiB; 0 is without limit. Raises StoreError."""
        limit = f"(STORAGE {mib * 1024})" if mib else "()"
        try:
            _expect(self._admin().setquota(_root(address), limit))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None

    def exists(self, address: str) -> bool:
        """Whether the account has a mailbox here. Raises StoreError."""
        try:
            answer = _expect(self._admin().list('""', _root(address)))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None
        return any(answer)

    def addresses(self) -> set[str]:
        """Whose mailboxes are here. Raises StoreError."""
        try:
            answer = _expect(self._admin().list('""', "user/%"))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None
        return {name.removeprefix("user/") for name in folder_names(answer)}

    def delete(self, address: str) -> None:
        """Removes the account's mailbox with all its folders. Cyrus keeps it aside for a while. Raises StoreError."""
        try:
            # Cyrus lets its admins grant rights on any mailbox, but not use those that they were not granted.
            _expect(self._admin().setacl(_root(address), "admin", "x"))
            _expect(self._admin().delete(_root(address)))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None

    def scripts(self, address: str) -> dict[str, tuple[str, bool]]:
        """The account's Sieve scripts: {name: (text, whether it is the active one)}. Raises StoreError."""
        try:
            sieve = ManageSieve(self.store, self._tls)
            sieve.login(address, "proxy", self._passwords["store_proxy"])
            names, active = sieve.scripts()
            found = {name: (sieve.get(name), name == active) for name in names}
            sieve.close()
        except (SieveError, OSError) as error:
            raise self._error("ManageSieve", error) from None
        return found

    def aside(self, address: str) -> dict[str, Aside]:
        """What `delete` has put aside of the account, by the folders' names there. Raises StoreError."""
        local, _, domain = address.partition("@")
        # DELETED/user/alice/Folder/6B0C1D2E@lab.test: the last part is when, in hexadecimal seconds.
        pattern = re.compile(rf"DELETED/user/{re.escape(local)}/(?:(.*)/)?([0-9A-F]{{8}})@{re.escape(domain)}")
        try:
            answer = _expect(self._admin().list('""', f'"DELETED/user/{local}/*@{domain}"'))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None
        matches = [match for name in folder_names(answer) if (match := pattern.fullmatch(name))]
        return {match[0]: Aside(match[1] or "INBOX", int(match[2], 16)) for match in matches}

    def open_aside(self, found: dict[str, Aside]) -> dict[str, str]:
        """Lets the administrator read what was put aside. Returns {a folder's name there: its name before}.

        Scripts are removed for good: should the account come back to this store, Cyrus would take the mailbox with its
        scripts out of there, and not install them. Raises StoreError.
        """
        try:
            for name, one in found.items():
                _expect(self._admin().setacl(quoted(name), "admin", "lrx"))
                if one.name == SCRIPTS:
                    _expect(self._admin().delete(quoted(name)))
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None
        return {name: one.name for name, one in found.items() if one.name != SCRIPTS}

    @contextmanager
    def administration(self) -> Iterator[imaplib.IMAP4]:
        """The administrator's IMAP session. Raises StoreError."""
        try:
            yield self._admin()
        except (imaplib.IMAP4.error, OSError) as error:
            raise self._admin_error(error) from None

    def install_script(self, address: str, threshold: int) -> None:
        """Puts the default Sieve script in place, active unless the user has one of their own. Raises StoreError."""
        text = _templates.get_template("sieve/default.sieve.j2").render(threshold=threshold)
        try:
            if self._sieve_connection is None:
                self._sieve_connection = ManageSieve(self.store, self._tls)
            sieve = self._sieve_connection
            sieve.login(address, "proxy", self._passwords["store_proxy"])
            sieve.put(SCRIPT, text)
            if sieve.active() is None:
                sieve.activate(SCRIPT)
            sieve.logout()
        except (SieveError, OSError) as error:
            self._sieve_connection = None
            raise self._error("ManageSieve", error) from None

    def _admin(self) -> imaplib.IMAP4:
        if self._admin_connection is None:
            connection = _Imap(self.store, self._tls)
            connection.authenticate("PLAIN", lambda _: f"\0admin\0{self._passwords['store_admin']}".encode())
            self._admin_connection = connection
        return self._admin_connection

    def _admin_error(self, error: Exception) -> StoreError:
        self._admin_connection = None
        return self._error("IMAP", error)

    def _error(self, protocol: str, error: Exception) -> StoreError:
        reason = str(error) or type(error).__name__
        return StoreError(
            f"{self.store.name} ({protocol} at {self.store.address}): {reason}; "
            "posthouse stores says who serves it; when the store is up, run the command again"
        )


class _Imap(imaplib.IMAP4_SSL):
    """IMAPS to an address, with the certificate checked against the store's name."""

    def __init__(self, store: Store, tls: ssl.SSLContext) -> None:
        self._address = store.address
        super().__init__(store.host, ssl_context=tls, timeout=TIMEOUT)

    def _create_socket(self, timeout: float | None) -> Any:
        return _secured(_dial(self._address, self.port, timeout), self.ssl_context, self.host)


class SieveError(Exception):
    """What a ManageSieve server refused, in its words."""


class ManageSieve:
    """The part of RFC 5804 that is needed here, with STARTTLS; one connection serves one account after the other.

    It goes to the store's service address unless another one is given.
    """

    def __init__(self, store: Store, tls: ssl.SSLContext, address: str | None = None, port: int = 4190) -> None:
        self._socket = _dial(address or store.address, port, TIMEOUT)
        self._file: Any = self._socket.makefile("rb")
        self._answer()
        self._command("STARTTLS")
        self._socket = _secured(self._socket, tls, store.host)
        self._file = self._socket.makefile("rb")
        self._answer()

    def login(self, account: str, user: str, password: str) -> None:
        """Logs in as `user`, to act for `account`."""
        token = base64.b64encode(f"{account}\0{user}\0{password}".encode()).decode()
        self._command(f'AUTHENTICATE "PLAIN" "{token}"')

    def logout(self) -> None:
        """Ends the login and keeps the connection."""
        self._command("UNAUTHENTICATE")

    def put(self, name: str, text: str) -> None:
        """Stores a script; the server checks it."""
        data = "\r\n".join(text.replace("\r\n", "\n").split("\n"))
        self._command(f'PUTSCRIPT "{name}" {{{len(data.encode())}+}}\r\n{data}')

    def active(self) -> str | None:
        """The name of the active script."""
        return self.scripts()[1]

    def scripts(self) -> tuple[list[str], str | None]:
        """The names of all scripts, and which one is active."""
        found = [re.fullmatch(r'"(.*)"( ACTIVE)?', line, re.IGNORECASE) for line in self._command("LISTSCRIPTS")]
        names = [match for match in found if match]
        return [match[1] for match in names], next((match[1] for match in names if match[2]), None)

    def get(self, name: str) -> str:
        """A script's text."""
        self._socket.sendall(f'GETSCRIPT "{name}"\r\n'.encode())
        line: bytes = self._file.readline()
        literal = re.fullmatch(rb"\{(\d+)\+?\}\r\n", line)
        if not literal:
            raise SieveError(line.decode("utf-8", "replace").strip() or "the connection was closed")
        data: bytes = self._file.read(int(literal[1]))
        self._file.readline()
        self._answer()
        return data.decode()

    def activate(self, name: str) -> None:
        """Makes a script the one that delivery runs."""
        self._command(f'SETACTIVE "{name}"')

    def close(self) -> None:
        """Ends the connection."""
        self._command("LOGOUT")
        self._socket.close()

    def _command(self, text: str) -> list[str]:
        self._socket.sendall(text.encode() + b"\r\n")
        return self._answer()

    def _answer(self) -> list[str]:
        """The lines before the server's OK. Raises SieveError for NO, BYE and the end of the connection."""
        lines: list[str] = []
        while True:
            line = self._line()
            if line.upper().startswith("OK"):
                return lines
            if line.upper().startswith(("NO", "BYE")):
                raise SieveError(line)
            lines.append(line)

    def _line(self) -> str:
        line: bytes = self._file.readline()
        if not line.endswith(b"\n"):
            raise SieveError("the connection was closed")
        literal = re.search(rb"\{(\d+)\+?\}\r\n$", line)
        if literal:
            line = line[: literal.start()] + self._file.read(int(literal[1])) + b" " + self._file.readline()
        return line.decode("utf-8", "replace").strip()


def _dial(address: str, port: int, timeout: float | None) -> socket.socket:
    connection = socket.create_connection((address, port), timeout)
    # Both clients write a command in pieces; each second piece would wait 40 ms for the other side's delayed ACK.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _secured(connection: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    secured = tls.wrap_socket(connection, server_hostname=host)
    # The server's greeting waits for our ACK of its session tickets; give it at once.
    secured.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return secured


def quoted(name: str) -> str:
    """A folder's name as IMAP takes it in a command."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def folder_names(lines: Iterable[object]) -> list[str]:
    """The names, as IMAP encodes them, in the answer to LIST; those of folders that hold no messages are left out."""
    names = []
    for line in lines:
        head, name = line if isinstance(line, tuple) else (line, None)  # a tuple: the name came as a literal
        match = re.match(rb'\((.*?)\) (?:"(?:[^"\\]|\\.)*"|NIL) (.*)', head) if isinstance(head, bytes) else None
        if match and not re.search(rb"\\(Noselect|NonExistent)", match[1], re.IGNORECASE):
            quoted = match[2][1:-1] if match[2].startswith(b'"') else match[2]
            names.append((name if name is not None else re.sub(rb"\\(.)", rb"\1", quoted)).decode())
    return names


def _root(address: str) -> str:
    """An account's mailbox as the administrator names it. Addresses of accounts hold nothing that IMAP must escape."""
    return f'"user/{address}"'


def _expect(answer: tuple[str, list[Any]]) -> list[Any]:
    status, data = answer
    if status != "OK":
        text = b" ".join(part for part in data if isinstance(part, bytes))
        raise imaplib.IMAP4.error(text.decode("utf-8", "replace"))
    return data


def _quietly(end: Any) -> None:
    """A goodbye that cannot be said any more is no loss."""
    try:
        end()
    except (OSError, imaplib.IMAP4.error, SieveError):
        return
