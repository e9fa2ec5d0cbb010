"""The gate before a store: passes on what it is given, and acknowledges only what is on a second node."""

import asyncio
import importlib.machinery
import importlib.util
import smtplib
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posthouse import secrets
from posthouse.model import Site
from posthouse.roles import ROLES

PROGRAMS = ROLES / "store/templates/usr/local/lib/posthouse"
sys.path.insert(0, str(PROGRAMS))
# What is compiled beside the templates would be taken for one.
sys.dont_write_bytecode = True

from stores import lmtp  # noqa: E402
from stores.replication import Lag, Watch  # noqa: E402


def load(name: str) -> Any:
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(PROGRAMS / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


gate_module = load("store-gate")


# --- what Cyrus's replication leaves ---


def test_a_mark_passes_when_all_from_before_it_is_gone(tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "log-run"
    watch = Watch(tmp_path)
    assert watch.mark().passed(), "nothing has happened"
    log.write_text("APPEND a\n")
    mark = watch.mark()
    assert not mark.passed()
    log.rename(run)
    log.write_text("APPEND b\n")
    later = watch.mark()
    assert not mark.passed()
    run.unlink()
    assert mark.passed()
    assert not later.passed(), "what came later is still there"
    log.unlink()
    log.write_text("APPEND c\n")  # it may well get the number of the file that is gone
    assert later.passed()
    assert not watch.mark().passed()


def test_lag_counts_from_the_oldest_change_that_is_not_there_yet(tmp_path: Path) -> None:
    lag = Lag(tmp_path)
    assert lag.seconds() == 0
    (tmp_path / "log").write_text("APPEND a\n")
    lag.seconds()
    time.sleep(0.05)
    assert lag.seconds() >= 0.05
    (tmp_path / "log").unlink()
    assert lag.seconds() == 0


# --- octet by octet ---


class Sink:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        return


@pytest.mark.parametrize(
    "message",
    [
        b".\r\n",
        b"\r\n.\r\n",
        b"Subject: x\r\n\r\n..dot\r\n.\r\n",
        b"bare\nline feeds\n.\n and \r returns\r.\r\n.\r\n",
        b"a\r\n.b\r\n. \r\n.\r\n",
        b"x" * 200_000 + b"\r\n.\r\n",
        b"x" * (lmtp.PIECE - 1) + b"\r\n.\r\n",
        b"x" * (lmtp.PIECE - 3) + b"\r\n.\r\n",
        b"\0\xff" * 70_000 + b"\r\n" * 40_000 + b".\r\n",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("size", [1000, 65_537])
def test_a_message_is_passed_on_as_it_is_and_nothing_behind_it(message: bytes, size: int) -> None:
    async def run() -> tuple[bytes, bytes]:
        reader, sink = asyncio.StreamReader(limit=lmtp.PIECE), Sink()

        async def feed() -> None:
            data = message + b"QUIT\r\n"
            for start in range(0, len(data), size):
                reader.feed_data(data[start : start + size])
                await asyncio.sleep(0)

        feeding = asyncio.create_task(feed())
        await lmtp.pass_message(reader, sink)
        await feeding
        return sink.data, await reader.readline()

    passed, rest = asyncio.run(run())
    assert passed == message
    assert rest == b"QUIT\r\n"


# --- the dialogue ---


class Lmtpd:
    """Stands for Cyrus's lmtpd behind the gate: takes what it is given, and says yes to all but `full`."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 lmtpd\r\n")
        recipients: list[bytes] = []
        while line := await reader.readline():
            if line.upper().startswith(b"RCPT"):
                recipients.append(line)
            if line.startswith(b"DATA"):
                writer.write(b"354 go on\r\n")
                self.messages.append(await reader.readuntil(b"\r\n.\r\n"))
                for recipient in recipients:
                    writer.write(
                        b"452 4.2.2 over quota\r\n" if b"full" in recipient else b"250 2.1.5 SESSIONID=<x> ok\r\n"
                    )
                recipients = []
            else:
                writer.write(b"250-lmtpd\r\n250 SIZE\r\n" if line.upper().startswith(b"LHLO") else b"250 2.1.0 ok\r\n")
        writer.close()


@pytest.fixture
def running(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A gate on a port of its own, in a thread of its own, with one replica that is in sync."""
    tls = secrets.placeholders(site).for_node(site.nodes["mail1"])["tls"]
    for name, text in (("node.pem", tls["cert"]), ("node.key", tls["key"]), ("ca.pem", tls["ca"])):
        (tmp_path / name).write_text(text)
    (tmp_path / "gate_password").write_text("secret\n")
    (tmp_path / "sync").mkdir()
    monkeypatch.setattr(gate_module, "TLS", str(tmp_path))
    monkeypatch.setattr(gate_module, "members", lambda: {"mail1": "10.77.0.21"})
    told = {"role": "primary", "until": gate_module.clock() + 600, "confirm": ["mail2"]}
    place = SimpleNamespace(
        store="s01",
        folder=tmp_path,
        peers=["mail2"],
        lmtpd=tmp_path / "lmtp",
        backlog=lambda peer: tmp_path / "sync",
        heard=lambda: dict(told),
    )
    found = SimpleNamespace(lmtpd=Lmtpd(), told=told, log=tmp_path / "sync/log", tls=tmp_path, control=tmp_path / "c")
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def main() -> None:
        gate = found.gate = gate_module.Gate(place)
        await asyncio.start_unix_server(found.lmtpd.serve, place.lmtpd)
        await asyncio.start_unix_server(lambda r, w: gate_module.control(gate, r, w), found.control)
        server = await asyncio.start_server(lambda r, w: gate_module.serve(gate, r, w), "127.0.0.1", 0)
        found.port = server.sockets[0].getsockname()[1]
        ready.set()

    task = loop.create_task(main())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(10), task
    yield found

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def connected(running: SimpleNamespace) -> smtplib.LMTP:
    context = ssl.create_default_context(cafile=str(running.tls / "ca.pem"))
    context.check_hostname = False
    client = smtplib.LMTP("127.0.0.1", running.port, timeout=10)
    client.starttls(context=context)
    client.ehlo()
    client.login("lmtp", "secret")
    return client


def begin(client: smtplib.LMTP, *recipients: str) -> list[int]:
    client.ehlo()
    client.mail("stranger@example.net")
    return [client.rcpt(recipient)[0] for recipient in recipients]


def send(client: smtplib.LMTP) -> None:
    assert client.docmd("DATA")[0] == 354
    client.send(b"Subject: x\r\n\r\n..Good day.\r\n.\r\n")


def test_mail_is_acknowledged_when_the_replica_has_it(running: SimpleNamespace) -> None:
    client = connected(running)
    running.log.write_text("APPEND user.alice\n")
    assert begin(client, "alice@lab.test", "full@lab.test") == [250, 250]
    send(client)
    deadline = time.monotonic() + 10
    while not running.lmtpd.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.lmtpd.messages == [b"Subject: x\r\n\r\n..Good day.\r\n.\r\n"]
    client.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)
    client.sock.settimeout(10)
    running.log.unlink()
    client.file = None
    assert client.getreply() == (250, b"2.1.5 SESSIONID=<x> ok")
    assert client.getreply() == (452, b"4.2.2 over quota")


def test_a_replica_that_was_struck_off_is_not_waited_for(running: SimpleNamespace) -> None:
    running.log.write_text("APPEND user.alice\n")
    running.told["confirm"] = []
    client = connected(running)
    begin(client, "alice@lab.test")
    send(client)
    assert client.getreply()[0] == 250


def test_a_node_that_the_store_had_before_is_waited_for_until_the_record_is_without_it(
    running: SimpleNamespace,
) -> None:
    running.told["confirm"] = ["mail2", "mail9"]
    client = connected(running)
    begin(client, "alice@lab.test")
    send(client)
    client.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)
    client.sock.settimeout(10)
    running.told["confirm"] = ["mail2"]
    client.file = None
    assert client.getreply()[0] == 250


def test_nothing_is_acknowledged_when_the_time_is_up(running: SimpleNamespace) -> None:
    client = connected(running)
    running.log.write_text("APPEND user.alice\n")
    begin(client, "alice@lab.test")
    send(client)
    running.told["until"] = 0
    assert client.getreply()[0] == 451
    with pytest.raises(smtplib.SMTPConnectError, match="421"):
        smtplib.LMTP("127.0.0.1", running.port, timeout=10)


def test_who_did_not_log_in_is_told_to_come_back(running: SimpleNamespace) -> None:
    client = smtplib.LMTP("127.0.0.1", running.port, timeout=10)
    assert client.ehlo()[0] == 250
    assert b"AUTH" not in client.ehlo()[1]
    assert client.docmd("MAIL FROM:<>")[0] == 430
    context = ssl.create_default_context(cafile=str(running.tls / "ca.pem"))
    context.check_hostname = False
    client.starttls(context=context)
    with pytest.raises(smtplib.SMTPAuthenticationError):
        client.login("lmtp", "wrong")


def test_drain_waits_for_what_is_in_hand_and_ends_with_its_connection(running: SimpleNamespace) -> None:
    client, other = connected(running), connected(running)
    assert begin(client, "alice@lab.test") == [250]

    async def drain() -> None:
        reader, writer = await asyncio.open_unix_connection(running.control)
        writer.write(b"nonsense\nDRAIN\n")
        assert (await reader.readline()).startswith(b"ERR")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readline(), 0.3)
        assert (await asyncio.to_thread(other.mail, "stranger@example.net"))[0] == 451
        await asyncio.to_thread(client.rset)
        assert await asyncio.wait_for(reader.readline(), 10) == b"OK\n"
        writer.close()

    asyncio.run(drain())
    deadline = time.monotonic() + 10
    while other.mail("stranger@example.net")[0] != 250:
        assert time.monotonic() < deadline, "no mail is taken though nobody drains"
