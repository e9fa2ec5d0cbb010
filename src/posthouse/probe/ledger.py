"""No loss, proved: what was acknowledged with 250 is found exactly once afterwards, unchanged, wherever it is."""

from __future__ import annotations

import email
import itertools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from posthouse.probe.clients import Imap, Person, Platform, Smtp, World, closed_quietly, digest, header, letter


class Copy(NamedTuple):
    """A message found somewhere. `digest` is None where only its header is left, as in a bounce."""

    id: str
    recipient: str
    digest: str | None
    place: str


class Ledger:
    """What the platform has taken responsibility for: {(Message-ID, recipient): SHA-256 of the body}."""

    def __init__(self) -> None:
        self.acknowledged: dict[tuple[str, str], str] = {}

    def complaints(self, found: Iterable[Copy]) -> list[str]:
        """One line for everything that is lost, there twice, or not what was sent. Empty if all is well."""
        copies: dict[tuple[str, str], list[Copy]] = defaultdict(list)
        for copy in found:
            copies[copy.id, copy.recipient].append(copy)
        lines = []
        for key, sent in self.acknowledged.items():
            places = [copy.place for copy in copies[key]]
            name = f"{key[0]} to {key[1]}"
            if not places:
                lines.append(f"{name}: lost")
            elif len(places) > 1:
                lines.append(f"{name}: found {len(places)} times: {', '.join(places)}")
            elif copies[key][0].digest not in (None, sent):
                lines.append(f"{name}: changed, in {places[0]}")
        return lines


class Stream:
    """Senders of the outside world, each sending one message after the other until stopped.

    What was answered with 250 is in the ledger; every other outcome is in `failures`. Several at a time, so that one
    that waits for a dead node does not stand for all.
    """

    def __init__(self, platform: Platform, ledger: Ledger, people: list[Person], source: str, senders: int = 3) -> None:
        self.platform, self.ledger, self.people, self.source = platform, ledger, people, source
        self.failures: list[str] = []
        self._taken: list[float] = []
        self._numbers = itertools.count(1)
        self._stop_now = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(senders)]

    @property
    def taken(self) -> int:
        """How many messages have been acknowledged."""
        return len(self._taken)

    def longest_silence(self) -> float:
        """The longest time in which no message was acknowledged, in seconds."""
        return max((after - before for before, after in pairwise(sorted(self._taken))), default=float("inf"))

    def _run(self) -> None:
        # Not as fast as it can: the machine has other things to do, and each message is looked for afterwards.
        while not self._stop_now.wait(0.3):
            number = next(self._numbers)
            person = self.people[number % len(self.people)]
            message = letter("stream@example.net", person.address, f"Number {number}.")
            try:
                client = Smtp(self.platform, source=self.source)
                reply = client.transaction("stream@example.net", person.address, message.data)
                closed_quietly(client)
            except Exception as error:  # whatever it is, it was not a 250
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            if reply.code == 250:
                self.ledger.acknowledged[message.id, person.address] = digest(message.data)
                self._taken.append(time.monotonic())
            else:
                self.failures.append(f"{reply.code} {reply.text}")

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a message has been in hand for 90 s"


def search(platform: Platform, nodes: Any, people: list[Person], world: World) -> list[Copy]:
    """Every copy there is for these people: in all their folders, in all queues, and in bounces that left."""
    return [*_mailboxes(platform, people), *_queues(nodes, {person.address for person in people}), *_bounces(world)]


def assert_all_there(ledger: Ledger, platform: Platform, nodes: Any, people: list[Person], world: World) -> None:
    """Everything acknowledged is there, once. Looks again, for a message may just be passing from queue to mailbox."""
    for _ in range(3):
        nodes.flush()
        complaints = ledger.complaints(search(platform, nodes, people, world))
        if not complaints:
            return
    raise AssertionError("\n".join(complaints))


def _mailboxes(platform: Platform, people: list[Person]) -> Iterable[Copy]:
    for person in people:
        with Imap(platform, person) as imap:
            for folder in imap.folders():
                for data in imap.messages(folder=folder):
                    yield Copy(
                        header(data, "Message-ID")[0], person.address, digest(data), f"{person.address}/{folder}"
                    )


def _queues(nodes: Any, addresses: set[str]) -> Iterable[Copy]:
    for node in nodes.of("mx"):
        for place in nodes.queues:
            for line in nodes.run(node, f"postqueue -c {place} -j").splitlines():
                entry = json.loads(line)
                wanted = addresses & {to["address"] for to in entry["recipients"]}
                # It may have been delivered a moment ago.
                text = nodes.run(node, f"postcat -c {place} -qhb {entry['queue_id']} || true") if wanted else ""
                data = text.replace("\n", "\r\n").encode()
                for name, address in itertools.product(header(data, "Message-ID"), wanted):
                    yield Copy(name, address, digest(data), f"{node}:{place}/{entry['queue_id']}")


def _bounces(world: World) -> Iterable[Copy]:
    for arrival in world.arrivals:
        report = email.message_from_bytes(arrival.data)
        if arrival.sender or report.get_content_type() != "multipart/report":
            continue
        parts = list(report.walk())
        original = next((part for part in parts if part.get("Message-ID") and part is not report), None)
        for part in parts:
            recipient = part.get("Final-Recipient")
            if recipient and original:
                yield Copy(str(original["Message-ID"]), recipient.partition(";")[2].strip(), None, "a bounce")
