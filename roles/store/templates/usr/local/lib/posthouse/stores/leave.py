"""A planned change of the primary: nobody is served, the replica gets the rest, then it is told to serve."""

import socket
import subprocess
import time

from stores import decide
from stores.replication import Watch

# s; after that the store serves again where it is, and the operator hears why.
PATIENCE = 12


class Leaving:
    """A planned change that is under way. `step` once a round; `over` when the record says how it ended."""

    def __init__(self, place, state, copies):
        self.place, self.copies = place, copies
        self.wish = state["to"]
        self.to = self.wish["node"]
        self.over = False
        self._since = time.monotonic()
        self._reason = _why_not(state, self.to, copies)
        self._gate = None if self._reason else _Gate(place.store)
        self._silent = False
        self._marks = []
        self._quiet = 0

    def step(self, record):
        """The record to be written next: the one given, or the one that ends this."""
        if self._reason is None and time.monotonic() - self._since > PATIENCE:
            self._reason = f"{self.to} did not get everything within {PATIENCE} s"
        if self._reason is None and self.to not in record["in_sync"]:
            self._reason = f"{self.to} is not in sync any more"
        if self._reason is not None:
            return self._stay(record)
        if not self._silent:
            # What is being delivered is finished first: a sender whose answer gets lost would send it again.
            if self._gate.idle():
                drop_address(self.place)
                self._silent = True
            return record
        # Twice, for what the sessions that were cut off were just doing.
        if all(mark.passed() for mark in self._marks):
            self._quiet += 1
            self._marks = [Watch(self.place.backlog(node)).mark() for node in record["in_sync"]]
        if self._quiet < 3:
            return record
        self.over = True
        return decide.handed_over(record, self.to, self.copies)

    def _stay(self, record):
        if self._silent:
            raise_address(self.place)
        if self._gate:
            self._gate.resume()
        self.over = True
        refused = {"id": self.wish["id"], "reason": self._reason}
        return {**{key: value for key, value in record.items() if key != "to"}, "refused": refused}


def _why_not(state, to, copies):
    if to == state["primary"]:
        return f"{to} serves already"
    if to not in state["in_sync"] or copies.get(to) != state["base"].get(to):
        return f"{to} is not in sync"
    return None


class _Gate:
    """The gate's control socket; a gate that is not there has nothing in hand."""

    def __init__(self, store):
        self._path = f"/run/posthouse/gate-{store}.sock"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(self._path)
            self._socket.sendall(b"DRAIN\n")
            self._socket.setblocking(False)
        except OSError:
            self._socket = None

    def idle(self):
        """Whether it has answered that nothing is in its hands."""
        if self._socket is None:
            return True
        try:
            return self._socket.recv(100) != b"ERR\n"
        except BlockingIOError:
            return False

    def resume(self):
        """Lets it take mail again: it does when the connection ends."""
        if self._socket is not None:
            self._socket.close()


def drop_address(place):
    """Nobody reaches the store here any more. That it was gone already is no error."""
    _ip("delete", place)


def raise_address(place):
    """The store is reached here, and neighbours that knew it elsewhere learn so."""
    _ip("replace", place)
    announce = ["/usr/bin/arping", "-q", "-U", "-c", "1", "-w", "1", "-I", place.interface, place.address]
    subprocess.run(announce, check=False, capture_output=True, timeout=5)


def _ip(verb, place):
    command = ["/sbin/ip", "address", verb, f"{place.address}/32", "dev", place.interface]
    subprocess.run(command, check=False, capture_output=True, timeout=5)
