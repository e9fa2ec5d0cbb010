"""The instrument itself: probes see what users see, and the ledger notices when mail is lost, doubled or changed."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ARRIVES, settled

from posthouse import lab, run
from posthouse.probe.clients import Imap, Sieve, Smtp, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, check
from posthouse.probe.probes import Probe, Rates

SENDER = "stranger@example.net"


def test_clean(platform, people, world, site, tmp_path, posthouse):
    """A probe of all kinds finds a healthy platform without fault, and every message it sent"""
    file = tmp_path / "clean.ledger"
    ledger = Ledger(file)
    everybody = [people.alice, people.bob, people.carol]
    # How fast the machine is, is not what this is about.
    rates = Rates(smtp=4, submission=1, imap=1, pop=1, sieve=1, sessions=3)
    with Probe(site, everybody, rates, ledger, patience=60) as probe:
        eventually(lambda: len(ledger.acknowledged) >= 30, 90, "30 messages acknowledged")
        eventually(lambda: all(kind.taken >= 3 for kind in probe.kinds.values()), 90, "some of each kind")
    for name, found in probe.statistics().items():
        assert found.failed == 0, (name, found)
        assert found.p50 is not None
        assert found.longest_silence > 0
    assert probe.statistics()["sessions"].reconnects == [0, 0, 0]
    assert probe.statistics(people.bob.store)["sessions"].reconnects == [0]
    # What is on disk is what was acknowledged, and the command finds the same as the library does.
    assert Ledger.read(file).acknowledged.keys() == ledger.acknowledged.keys()
    report = check(ledger, site)
    assert report.ok, report.complaints()
    printed = json.loads(posthouse("ledger", "check", str(file), "--site", site.name, "--json"))
    assert printed["ok"]
    assert (printed["acknowledged"], printed["lost"]) == (len(ledger.acknowledged), [])


def test_command(site, posthouse, tmp_path):
    """`posthouse probe` ends after its count, with every message in its record; without a rate it does nothing"""
    file = tmp_path / "probe.ledger"
    options = ("--smtp", "4", "--count", "6", "--seconds", "120", "--patience", "60", "--record", str(file), "--json")
    found = json.loads(posthouse("probe", site.name, *options))
    assert (found["smtp"]["attempts"], found["smtp"]["failed"], found["acknowledged"]) == (6, 0, 6)
    assert len(Ledger.read(file).acknowledged) == 6
    posthouse("ledger", "check", str(file), "--site", site.name)
    posthouse("probe", site.name, status=1)


def test_one_at_a_time(site, tmp_path):
    """A second probe with accounts of its own is told who is at work, and the first one's people are not locked out"""
    file = tmp_path / "first.ledger"
    command = [run.BIN / "posthouse", "probe", site.name]
    rates = ["--smtp", "2", "--imap", "1", "--sessions", "1", "--seconds", "300", "--patience", "60"]
    with subprocess.Popen(
        [*command, *rates, "--record", file, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        try:
            eventually(lambda: noted(file), 60, "the first probe's mail")
            second = subprocess.run([*command, "--imap", "1"], capture_output=True, text=True, timeout=120)
            before = noted(file)
            eventually(lambda: noted(file) > before + 5, 60, "more of it")
            # Stopped early, it tells what it has seen so far.
            first.terminate()
            printed, complaint = first.communicate(timeout=120)
        finally:
            first.kill()
    assert second.returncode == 1
    assert f"{site.name}: locked by" in second.stderr
    assert f"(pid {first.pid}, probe {site.name} " in second.stderr
    assert first.returncode == 0, printed + complaint
    found = json.loads(printed)
    assert [found[kind]["failed"] for kind in ("smtp", "imap", "sessions")] == [0, 0, 0]
    assert found["sessions"]["reconnects"] == [0]


def noted(file: Path) -> int:
    """How many messages a probe that goes on has in its record."""
    return len(Ledger.read(file).acknowledged) if file.exists() else 0


def test_session_lost(platform, nodes, people, site):
    """A session that the platform ends is counted as one reconnect, and goes on"""
    store = site.stores[people.carol.store]
    with Probe(site, [people.carol], Rates(sessions=1)) as probe:
        sessions = probe.kinds["sessions"]
        eventually(lambda: sessions.taken >= 2, 60, "a session")
        # Cyrus names its processes' users in its own table.
        ask = f"runuser -u cyrus -- /usr/lib/cyrus/bin/cyr_info -C /etc/cyrus/{store.name}/imapd.conf proc"
        lines = eventually(
            lambda: _of(nodes.run(nodes.primary(store.name), ask), people.carol.address), 10, "its process"
        )
        nodes.run(nodes.primary(store.name), f"kill {' '.join(line.split()[0] for line in lines)}")
        eventually(lambda: sessions.reconnects() == [1], 60, "a reconnect")
        before = sessions.taken
        eventually(lambda: sessions.taken >= before + 3, 60, "the session going on")
    assert sessions.statistics().failed >= 1


def _of(table: str, address: str) -> list[str]:
    return [line for line in table.splitlines() if address in line]


def test_tampered(platform, friend, people, site):
    """The ledger notices when a message is lost, doubled or changed, and names it"""
    ledger = Ledger()
    messages = [letter(SENDER, people.dave.address, f"Number {number}") for number in range(4)]
    for message in messages:
        with Smtp(platform, source=friend) as client:
            assert client.transaction(SENDER, people.dave.address, message.data).code == 250
        ledger.note(message, people.dave.address)
    with Imap(platform, people.dave) as imap:
        for message in messages:
            eventually(lambda m=message: imap.messages(m.id), ARRIVES, message.id)
        assert check(ledger, site).complaints() == []
        lost, doubled, altered, _ = messages
        imap.select("INBOX")
        for message in (lost, altered):
            number = imap.search(None, "HEADER", "Message-ID", f'"{message.id}"')[1][0].decode()
            imap.store(number, "+FLAGS", r"\Deleted")
        imap.expunge()
        imap.append("Archive", "", "", doubled.data)
        imap.append("INBOX", "", "", altered.data.replace(b"A letter", b"A better"))
    report = check(ledger, site)
    assert [finding.id for finding in report.lost] == [lost.id]
    assert [finding.id for finding in report.duplicated] == [doubled.id]
    assert [finding.id for finding in report.damaged] == [altered.id]
    assert not report.ok


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_dropping_store(platform, friend, people, site, count):
    """A store that drops one message in {count} without a word is caught, and the message named"""
    ledger = Ledger()
    dropped = count // 2
    sieve = Sieve(platform, people.dave)
    sieve.activate(f'require "body";\nif body :contains "Number {dropped}." {{ discard; }}\n', "dropping")
    sieve.close()
    try:
        with Stream(platform, ledger, [people.dave], friend, rate=8, senders=8, count=count) as stream:
            eventually(lambda: not stream.running, 30 + count, f"{count} messages")
        assert len(ledger.acknowledged) == count, stream.failures
        # What is on its way is in a queue, and not lost.
        report = eventually(lambda: _settled(ledger, site), 60, "every message delivered")
    finally:
        sieve = Sieve(platform, people.dave)
        sieve.activate("keep;", "dropping")
        sieve.close()
    assert len(report.lost) == 1, report.complaints()
    assert not (report.duplicated or report.damaged)
    assert report.found == {"mailbox": count - 1}


def _settled(ledger: Ledger, site):
    report = check(ledger, site)
    return report if not report.found.get("queue") else None


@contextlib.contextmanager
def without_fsync(nodes, node: str) -> Iterator[None]:
    """Postfix on a node keeps what it takes, and takes fsync for a word: what it acknowledges is only in memory."""
    nodes.run(
        node, "apt-get install -y -q libeatmydata1 || { apt-get update -q && apt-get install -y -q libeatmydata1; }"
    )
    library = nodes.run(node, "dpkg -L libeatmydata1 | grep '[.]so$'").split()[0]
    mutant = f"defer_transports = lmtp\nimport_environment = MAIL_CONFIG LANG=C LD_PRELOAD={library}\n"
    nodes.run(node, f"cp -p /etc/postfix/main.cf /root/main.cf.kept; printf '{mutant}' >>/etc/postfix/main.cf")
    nodes.run(node, "systemctl restart postfix")
    try:
        yield
    finally:
        nodes.run(node, "mv /root/main.cf.kept /etc/postfix/main.cf && systemctl restart postfix")
        nodes.run(node, "apt-get purge -y -q libeatmydata1")


def test_without_fsync(platform, nodes, friend, people, site, posthouse):
    """A node that acknowledges mail before it is on disk loses some in a power cut: that is caught"""
    node = next(name for name in nodes.of("mx") if name not in site.directory.providers)
    ledger = Ledger()
    with without_fsync(nodes, node):
        with Stream(platform, ledger, [people.dave], friend, rate=8, senders=8) as stream:
            # The other nodes deliver theirs.
            eventually(lambda: len(nodes.run(node, "postqueue -j").splitlines()) > 5, 60, f"mail kept on {node}")
        before = check(ledger, site)
        lab.kill(site.name, node)
        lab.start(site.name, node)
        eventually(lambda: nodes.serving(node), 90, f"{node} serving again")
        report = check(ledger, site)
    # Others took over its stores meanwhile; they go back when it has all of their mail.
    settled(site)
    posthouse("failback", "--all", "--site", site.name)
    assert before.ok, before.complaints()
    assert before.found.get("queue"), stream.failures
    assert 0 < len(report.lost) <= before.found["queue"], report
