"""The end-to-end suite: mail through a running, deployed lab. `posthouse demo` and `posthouse test lab` both run it.

    pytest tests/lab --site lab [--lines]

The first line of each test's docstring is the sentence that `--lines` prints about it. Users and the outside world are
shared by all tests; what a test breaks it puts back, and those that break the most come last.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from clients import Platform, Smtp, World, closed_quietly

from posthouse import lab, run, sitefile

# Harmless first, disruptive last.
ORDER = ["test_delivery", "test_refusals", "test_mailbox", "test_submission", "test_changes", "test_outages"]
QUEUES = ("/etc/postfix", "/etc/postfix-submission", "/etc/postfix-outbound")
SITE = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--site", default="lab", help="a folder in inventory/; its lab must be up and deployed")
    parser.addoption("--full", action="store_true", help="keep mail flowing for longer while things break")
    parser.addoption("--lines", action="store_true", help="print one sentence per check, and nothing else")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[SITE] = sitefile.load(config.getoption("--site"))
    # Before any thread is started: threads and child processes inherit the lab's network.
    run.reach(config.stash[SITE])
    if config.getoption("--lines"):
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Lines())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem))


class Lines:
    """Prints one readable line per check, and the reason of those that fail."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function) -> Any:
        report = yield
        report.sentence = (item.function.__doc__ or item.name).strip().splitlines()[0].rstrip(".")
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome == "failed":
            print(f"{'ok' if report.passed else report.outcome.upper():<8}{report.duration:5.1f} s  {report.sentence}", flush=True)
        if report.failed:
            print(f"{'':<16}{str(report.longrepr).strip().splitlines()[-1]}", flush=True)
            print(report.longreprtext, file=sys.stderr, flush=True)


class Nodes:
    """Commands on the nodes, past the network that tests may have broken."""

    def __init__(self, site: Any) -> None:
        self.site = site

    def of(self, tier: str) -> list[str]:
        """Names of a tier's nodes."""
        return [node.name for node in self.site.groups[tier]]

    def run(self, node: str, command: str) -> str:
        """What a shell command on a node prints. Fails with what it complained of."""
        done = subprocess.run(
            [*lab.command(self.site.name, node), "sh", "-c", command], capture_output=True, text=True, errors="replace", timeout=120
        )
        assert done.returncode == 0, f"{node}: {command}: {done.stderr or done.stdout}"
        return done.stdout

    def each(self, tier: str, command: str) -> dict[str, str]:
        """The same command on all nodes of a tier, side by side: {node: what it prints}."""
        names = self.of(tier)
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(lambda name: self.run(name, command), names), strict=True))


    def waiting_for(self, address: str) -> list[str]:
        """Why mail for an address waits in a queue: one reason for each message that was tried."""
        lines = "".join(self.each("mx", "postqueue -j").values()).splitlines()
        recipients = [recipient for line in lines for recipient in json.loads(line)["recipients"]]
        return [to["delay_reason"] for to in recipients if to["address"] == address and "delay_reason" in to]

    def flush(self) -> None:
        """Tries all waiting mail now: by itself it waits for a minute or more."""
        for place in QUEUES:
            self.each("mx", f"postqueue -c {place} -f")


@pytest.fixture(scope="session")
def site(pytestconfig: pytest.Config) -> Any:
    """The site model."""
    return pytestconfig.stash[SITE]


@pytest.fixture(scope="session")
def platform(site: Any) -> Platform:
    """The site by its public name."""
    return Platform(site)


@pytest.fixture(scope="session")
def nodes(site: Any) -> Nodes:
    """The nodes, for looking behind the public name."""
    return Nodes(site)


@pytest.fixture(scope="session")
def world(platform: Platform) -> Iterator[World]:
    """The outside world's mail server."""
    server = World(platform.lookup(f"mx.{WORLD}"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def friend(platform: Platform, nodes: Nodes) -> str:
    """The outside address of a mail server that every node knows already, so that none makes it wait for the banner."""
    address = platform.outside(20)

    def meet(_: int) -> None:
        client = Smtp(platform, source=address)
        client.noop()
        closed_quietly(client)

    # Connections at the same time are spread over all nodes.
    count = 2 * len(nodes.of("mx"))
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(meet, range(count)))
    return address


@pytest.fixture(scope="session")
def full(platform: Platform, friend: str, people: Any) -> Person:
    """Somebody whose mailbox is all but full."""
    filler = letter("stranger@example.net", people.tiny.address, "\n".join(["x" * 70] * 11_000))
    with Smtp(platform, source=friend) as client:
        assert client.transaction("stranger@example.net", people.tiny.address, filler.data).code == 250
    with Imap(platform, people.tiny) as imap:
        eventually(lambda: imap.messages(filler.id), 20, "the message that fills the mailbox")
    return people.tiny
