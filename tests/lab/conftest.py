"""The end-to-end suite: mail through a running, deployed lab. `posthouse demo` and `posthouse test lab` both run it.

    pytest tests/lab --site lab [--lines]

The first line of each test's docstring is the sentence that `--lines` prints about it. Users and the outside world are
shared by all tests; what a test breaks it puts back, and those that break the most come last.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import pytest

from posthouse import lab, run, sitefile
from posthouse.ops import failover
from posthouse.probe.clients import WORLD, Imap, Person, Platform, Smtp, World, eventually, introduce, letter

# Harmless first, disruptive last.
ARRIVES = 150  # s; Postfix tries what it had to put off again after a minute or two
ORDER = [
    "test_delivery",
    "test_refusals",
    "test_mailbox",
    "test_submission",
    "test_drift",
    "test_probe",
    "test_backup",
    "test_changes",
    "test_move",
    "test_outages",
    "test_nodes",
    "test_upgrade",
    "test_growth",
    "test_failover",
    "test_rebuild",
]
SITE = pytest.StashKey[Any]()
# The machine's own network, before this process enters the lab's.
MACHINE = os.open("/proc/self/ns/net", os.O_RDONLY)


def pytest_addoption(parser: pytest.Parser) -> None:
    site = os.environ.get("POSTHOUSE_SITE", "lab")
    parser.addoption("--site", default=site, help="a folder in inventory/; its lab must be up and deployed")
    parser.addoption("--full", action="store_true", help="run the long soak, too")
    parser.addoption("--lines", action="store_true", help="print one sentence per check, and nothing else")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes minutes, and runs only with --full")
    config.stash[SITE] = sitefile.load(config.getoption("--site"))
    # Before any thread is started: threads and child processes inherit the lab's network.
    run.reach(config.stash[SITE])
    if config.getoption("--lines"):
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Lines())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: ORDER.index(item.path.stem))


def as_operator(*arguments: str, text: str | None = None, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    """Runs `posthouse …` from the machine's own network, as a shell would; whatever comes of it."""
    command = ["nsenter", f"--net=/proc/self/fd/{MACHINE}", run.BIN / "posthouse", *arguments]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=timeout, pass_fds=[MACHINE], check=False
    )


class Lines:
    """Prints one readable line per check, and the reason of those that fail."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function) -> Any:
        report = yield
        sentence = (item.function.__doc__ or item.name).splitlines()[0]
        report.sentence = sentence.format(**item.callspec.params) if hasattr(item, "callspec") else sentence
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome == "failed":
            word = "ok" if report.passed else report.outcome.upper()
            print(f"{word:<8}{report.duration:6.1f} s  {report.sentence}", flush=True)
        if report.failed:
            print(f"{'':<16}{str(report.longrepr).strip().splitlines()[-1]}", flush=True)
            print(report.longreprtext, file=sys.stderr, flush=True)


class Nodes:
    """Commands on the nodes, past the network that tests may have broken."""

    queues = ("/etc/postfix", "/etc/postfix-submission", "/etc/postfix-outbound")

    def __init__(self, site: Any) -> None:
        self.site = site

    def of(self, tier: str) -> list[str]:
        """Names of a tier's nodes."""
        return [node.name for node in self.site.groups[tier]]

    def run(self, node: str, command: str) -> str:
        """What a shell command on a node prints. Fails with what it complained of."""
        inside = [*lab.command(self.site.name, node), "sh", "-c", command]
        done = subprocess.run(inside, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, f"{node}: {command}: {done.stderr or done.stdout}"
        return done.stdout

    def each(self, tier: str, command: str) -> dict[str, str]:
        """The same command on all nodes of a tier, side by side: {node: what it prints}."""
        names = self.of(tier)
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(lambda name: self.run(name, command), names), strict=True))

    def serving(self, node: str) -> bool:
        """Whether all that a node should do is up."""
        return self.run(node, "systemctl is-system-running || true").strip() == "running"

    def primary(self, store: str) -> str:
        """The node that serves a store now."""
        return failover.primaries(self.site)[store]

    def waiting_for(self, address: str) -> list[str]:
        """Why mail for an address waits in a queue: one reason for each message."""
        commands = "; ".join(f"postqueue -c {place} -j" for place in self.queues)
        lines = "".join(self.each("mx", commands).values()).splitlines()
        recipients = [recipient for line in lines for recipient in json.loads(line)["recipients"]]
        return [to.get("delay_reason", "not tried yet") for to in recipients if to["address"] == address]

    def flush(self, *addresses: str, seconds: float = 60) -> None:
        """Tries all waiting mail now, where by itself it waits for a minute or more, until none is left for these."""
        deadline = time.monotonic() + seconds
        while True:
            for place in self.queues:
                self.each("mx", f"postqueue -c {place} -f")
            reasons = [reason for address in addresses for reason in self.waiting_for(address)]
            if not reasons:
                return
            assert time.monotonic() < deadline, f"still queued after {seconds:g} s: {reasons}"
            time.sleep(1)


@pytest.fixture
def promised(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """Says how many seconds something took; with --full, on a quiet machine, that must be what is promised."""

    def judge(what: str, seconds: float, limit: float) -> None:
        print(f"{what} after {seconds:.1f} s")
        assert seconds <= limit or not request.config.getoption("--full"), f"{what} after {seconds:.1f} s"

    return judge


def settled(site: Any) -> dict[str, failover.State]:
    """Waits until every store is served, and has a replica that could take over."""

    def sound() -> dict[str, failover.State] | None:
        with contextlib.suppress(failover.FailoverError):
            states = failover.states(site, watch=True)
            if all(state.alive and state.in_sync for state in states.values()):
                return states
        return None

    # Longer than Cyrus waits for a peer that went away in the middle of a comparison.
    found = eventually(sound, 240, "a primary and a replica in sync for every store")
    assert found
    return found


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
    with World(platform.lookup(f"mx.{WORLD}")) as server:
        yield server


@pytest.fixture(scope="session")
def friend(platform: Platform) -> str:
    """The outside address of a mail server that every node knows already, so that none makes it wait for the banner."""
    address = platform.outside(20)
    introduce(platform, address)
    return address


@pytest.fixture(scope="session")
def posthouse(site: Any) -> Callable[..., str]:
    """Runs `posthouse …` as an operator does, for this site; returns what it prints."""

    def call(*arguments: str, text: str | None = None, status: int = 0) -> str:
        command = [run.BIN / "posthouse", *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"posthouse {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    return call


@dataclass
class People:
    """Whose mail the tests send and read. alice, bob and carol are each on a store of their own."""

    alice: Person
    bob: Person
    carol: Person
    dave: Person  # nobody else writes to dave: his mailbox can be counted
    keeper: Person  # forwards to bob, and keeps a copy
    mover: Person  # forwards to bob, and keeps none
    traveller: Person  # forwards to `elsewhere`, outside
    patient: Person  # has spam filed from `patience` points on, not from the site's few
    tiny: Person  # has 1 MiB
    sleeper: Person  # is suspended
    vera: Person  # goes on vacation
    sender: Person  # sends too much
    alias: str  # of alice
    elsewhere: str
    patience: int


@pytest.fixture(scope="session")
def people(site: Any, posthouse: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> People:
    """Makes the accounts, by `posthouse account`. They are new ones in each run, so a lab can be tested again."""
    tag = uuid.uuid4().hex[:4]
    stores = itertools.cycle(site.stores)
    persons = {
        name: Person(f"{name}.{tag}@{site.domain}", uuid.uuid4().hex, next(stores))
        for name in (field.name for field in fields(People) if field.type == "Person")
    }
    found = People(alias=f"alias.{tag}@{site.domain}", elsewhere=f"elsewhere.{tag}@{WORLD}", patience=12, **persons)
    lines = [f"{person.address},{person.password},{person.store}" for person in persons.values()]
    file = tmp_path_factory.mktemp("accounts") / "people.csv"
    # One line is bad: it is named by its number, and all others go in.
    file.write_text("\n".join(["address,password,store", f"nobody.{tag}@example.org,{tag},s01", *lines]) + "\n")
    printed = posthouse("account", "import", str(file), "--site", site.name, status=1)
    assert f"{file}:2:" in printed
    assert f"{len(persons)} added, 0 unchanged, 1 bad" in printed
    commands = [
        ("alias", found.alice.address, "--add", found.alias),
        ("forward", found.keeper.address, "--to", found.bob.address),
        ("forward", found.mover.address, "--to", found.bob.address, "--only"),
        ("forward", found.traveller.address, "--to", found.elsewhere),
        ("spam", found.patient.address, str(found.patience)),
        ("quota", found.tiny.address, "1"),
        ("suspend", found.sleeper.address),
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: posthouse("account", *command, "--site", site.name), commands))
    return found


@pytest.fixture(scope="session")
def full(platform: Platform, friend: str, people: Any) -> Person:
    """Somebody whose mailbox is all but full."""
    filler = letter("stranger@example.net", people.tiny.address, "\n".join(["x" * 70] * 11_000))
    with Smtp(platform, source=friend) as client:
        assert client.transaction("stranger@example.net", people.tiny.address, filler.data).code == 250
    with Imap(platform, people.tiny) as imap:
        eventually(lambda: imap.messages(filler.id), ARRIVES, "the message that fills the mailbox")
    return people.tiny


@pytest.fixture
def home(site: Any, posthouse: Callable[..., str]) -> Iterator[dict[str, failover.State]]:
    """Every store is where site.yml has it, before and afterwards."""
    settled(site)
    posthouse("failback", "--all", "--site", site.name)
    yield settled(site)
    settled(site)
    posthouse("failback", "--all", "--site", site.name)
