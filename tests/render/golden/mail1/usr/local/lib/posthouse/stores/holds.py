"""Accounts whose mail has to wait, because they are being moved: in etcd, so that they still wait after a failover."""

import asyncio
import json

from stores.node import members, nearest, write
from stores.quorum import NoQuorum, Quorum

SECONDS = 5.0


class Failed(Exception):
    """A change that could not be kept; nothing is held or released."""


class Holds:
    """The accounts held at one store. Without a cluster they are kept in a file beside the mail."""

    def __init__(self, place):
        self.accounts = set()
        self._head = f"{place.store}/hold/"
        self._file = place.data / "config/holds.json"
        names = members()
        self._addresses = nearest(place.node, names) if names else []

    async def load(self):
        """Reads what was held before. Mail waits until that is known."""
        while True:
            try:
                self.accounts = await asyncio.to_thread(self._load)
                return
            except NoQuorum:
                await asyncio.sleep(0.5)

    async def add(self, account):
        """Holds an account from now on. Raises Failed."""
        before = account in self.accounts
        self.accounts.add(account)  # at once: what comes while it is being written down has to wait, too
        try:
            await asyncio.to_thread(self._keep, account, True)
        except (NoQuorum, OSError) as error:
            if not before:
                self.accounts.discard(account)
            raise Failed(f"{account} is not held: {error}") from None

    async def remove(self, account):
        """Releases an account. Raises Failed."""
        try:
            await asyncio.to_thread(self._keep, account, False)
        except (NoQuorum, OSError) as error:
            raise Failed(f"{account} is still held: {error}") from None
        self.accounts.discard(account)

    def _load(self):
        if self._addresses:
            return {key.removeprefix(self._head) for key in Quorum(self._addresses).read(self._head, SECONDS)}
        return set(json.loads(self._file.read_text())) if self._file.exists() else set()

    def _keep(self, account, held):
        if not self._addresses:
            write(self._file, sorted(self.accounts - ({account} if not held else set())), sync=True)
            return
        quorum = Quorum(self._addresses)
        try:
            if held:
                quorum.put(f"{self._head}{account}", True, SECONDS)
            else:
                quorum.delete(f"{self._head}{account}", SECONDS)
        finally:
            quorum.close()
