"""Backups off the replicas, and mail that comes back from them: byte for byte, with flags, dates and rights."""

from __future__ import annotations

import imaplib
import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import ARRIVES

from posthouse import run, secrets
from posthouse.ops.backup import stands
from posthouse.ops.imap import Message, Session, literal
from posthouse.ops.repository import NOTES, Repository
from posthouse.probe.clients import Imap, Person, Platform, Sieve, Smtp, eventually, letter
from posthouse.remote import Remote

SENDER = "stranger@example.net"
NOTE = 'Büro "heute" \\'.encode()  # neither ASCII nor easily quoted
SCRIPT = 'require "fileinto";\r\nif header :contains "subject" "parcels" { fileinto "Archive"; }\r\n'
PARCELS = "Päckchen & Co"
DATE = "17-Jul-2020 02:44:25 +0000"


@dataclass
class Owner:
    """Somebody whose mail is backed up: all that a restore must bring back, as it was at the backup."""

    person: Person
    messages: dict[str, list[Message]] = field(default_factory=dict)
    identifiers: list[str] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)  # what the two backups said of themselves
    second: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def own(site: Any) -> Callable[[Person], Session]:
    """Opens a person's mailbox at its store, past the access proxy, with all that Cyrus says of it."""
    known = secrets.load(site)

    def open_session(person: Person) -> Session:
        store = site.stores[person.store]
        tls = Platform(site).tls
        return Session(store.host, store.address, 993, tls, person.address, "proxy", known.passwords["store_proxy"])

    return open_session


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> int:
    """How many messages are backed up; a tenth of them lies in a folder of its own."""
    return 1000 if pytestconfig.getoption("--full") else 200


@pytest.fixture(scope="module")
def owner(site: Any, platform: Platform, posthouse: Any, own: Any, size: int) -> Iterator[Owner]:
    """Makes a mailbox with everything in it, and backs the site up, twice."""
    # Of an earlier lab of this name, which had other secrets: nobody can read it any more.
    place = Path(Repository(site, secrets.load(site)).place)
    for left in (place, place.with_name(f"{place.name}.kept")):
        shutil.rmtree(left, ignore_errors=True)
    (NOTES / site.name).unlink(missing_ok=True)
    store = next(iter(site.stores))
    person = Person(f"keeps.{uuid.uuid4().hex[:6]}@{site.domain}", uuid.uuid4().hex, store)
    command = ("account", "add", person.address, "--store", store, "--quota", "77", "--password-stdin")
    posthouse(*command, "--site", site.name, text=f"{person.password}\n")
    made = Owner(person)
    session = own(person)
    batch = []
    for number in range(size):
        # 8-bit, a line with a lone dot, and no line break at the end: bytes that a careless copy changes.
        message = letter(SENDER, person.address, "\n.\n" + "ä" * (number % 50), Subject=f"Nr. {number}")
        made.identifiers.append(message.id)
        flags = ("\\Seen", "project-x") if number % 2 else ("\\Flagged",)
        notes = (("/comment", "value.priv", NOTE),) if number == 7 else ()
        batch.append((Message(0, "", flags, DATE, len(message.data), notes), message.data.rstrip()))
    session.create('"P&AOQ-ckchen &- Co"')
    session.subscribe('"P&AOQ-ckchen &- Co"')
    inbox = size - size // 10
    for start in range(0, inbox, 100):
        session.add("INBOX", batch[start : min(start + 100, inbox)])
    session.add("P&AOQ-ckchen &- Co", batch[inbox:])
    session.ask("OK", "SETACL", '"P&AOQ-ckchen &- Co"', f'"friend@{site.domain}"', "lrs")
    session.ask("OK", "SETMETADATA", '"P&AOQ-ckchen &- Co"', literal("(/private/comment", NOTE, ")"))
    session.logout()
    sieve = Sieve(platform, person)
    sieve.activate(SCRIPT, "mine")
    sieve.close()
    _share(own, site, store, posthouse, person)
    _until_replicated(site, store)
    would = json.loads(posthouse("backup", site.name, "--check", "--json"))
    assert would["new"]
    assert not place.exists()
    made.first = json.loads(posthouse("backup", site.name, "--json"))
    made.second = json.loads(posthouse("backup", site.name, "--json"))
    made.messages = _state(own, person)
    yield made
    shutil.rmtree(place)
    (NOTES / site.name).unlink()


def _share(own: Any, site: Any, store: str, posthouse: Any, person: Person) -> None:
    """Somebody else's folder that the person sees, but whose rights it may not ask for."""
    other = Person(f"shares.{uuid.uuid4().hex[:6]}@{site.domain}", uuid.uuid4().hex, store)
    command = ("account", "add", other.address, "--store", store, "--password-stdin", "--site", site.name)
    posthouse(*command, text=f"{other.password}\n")
    session = own(other)
    session.create("Plans")
    session.ask("OK", "SETACL", "Plans", f'"{person.address}"', "lrs")
    session.logout()
    session = own(person)
    _, listed = session.list()
    session.logout()
    assert any(b"Other Users/" in line for line in listed)


def _until_replicated(site: Any, store: str) -> None:
    """Waits until nothing is left to be told to the store's replicas."""
    remote = Remote(site)
    primary = stands(remote, site)[store]
    waiting = f"find /srv/store/{store}/config/sync -name 'log*' -size +0"
    eventually(lambda: not remote.run(primary, waiting).strip(), 60, "the replica is up to date")


def _state(own: Any, person: Person) -> dict[str, list[Message]]:
    session = own(person)
    found = {
        name: [_lasting(m) for m in session.details(folder).messages] for name, folder in session.folders().items()
    }
    session.logout()
    return found


def _lasting(message: Message) -> Message:
    """What must come back: all but the UID, which is a new one."""
    return Message(0, message.digest, message.flags, message.date, message.size, message.annotations)


def _same(one: list[Message], other: list[Message]) -> bool:
    return sorted(map(repr, one)) == sorted(map(repr, other))


def _remove(own: Any, person: Person, folder: str, count: int | None = None) -> None:
    session = own(person)
    session.select(f'"{folder}"')
    session.uid("STORE", "1:*" if count is None else f"1:{count}", "+FLAGS.SILENT", "(\\Deleted)")
    session.expunge()
    session.logout()


def test_incremental(owner, size):
    """A second backup adds next to nothing; both say how many accounts and messages they hold"""
    first = {part["name"]: part for part in owner.first["parts"]}
    second = {part["name"]: part for part in owner.second["parts"]}
    mine = f"store:{owner.person.store}"
    assert first[mine]["messages"] >= size
    assert first[mine]["added"] > 100_000
    assert second[mine]["bytes"] >= first[mine]["bytes"] * 0.9
    assert second[mine]["added"] < first[mine]["added"] / 2


def test_off_the_replica(site, owner):
    """Stores are backed up off their replicas, which stand still for a moment only"""
    parts = {part["name"]: part for part in owner.second["parts"]}
    primaries = stands(Remote(site), site)
    for name in site.stores:
        assert parts[f"store:{name}"]["node"] != primaries[name]
        assert parts[f"store:{name}"]["frozen_ms"] < 5000


def test_encrypted(site, owner):
    """Nothing in the repository can be read: no message, address or password"""
    place = Path(Repository(site, secrets.load(site)).place)
    words = [SENDER.encode(), owner.person.address.encode(), owner.identifiers[3].encode(), b"posthouseAccount"]
    data = b"".join(file.read_bytes() for file in place.rglob("*") if file.is_file())
    assert len(data) > 100_000
    assert not [word for word in words if word in data]


def test_message(site, own, posthouse, owner):
    """One message comes back, byte for byte with flags and date, and only once"""
    _remove(own, owner.person, "INBOX", 10)
    command = ("restore", "message", owner.person.address, owner.identifiers[7], "--site", site.name, "--json")
    assert json.loads(posthouse(*command, "--check"))["messages"] == 1
    assert json.loads(posthouse(*command)) | {"messages": 1, "changed": True} == json.loads(posthouse(*command)) | {
        "messages": 1,
        "changed": True,
        "steps": ["INBOX: 1 messages"],
        "there": 0,
    }
    back = _state(own, owner.person)["INBOX"][-1]
    assert back in owner.messages["INBOX"]
    assert back.annotations == (("/comment", "value.priv", NOTE),)


def test_folder(site, own, posthouse, owner, size):
    """A folder comes back with its messages, rights, annotations and subscription, into place and beside it"""
    name = "P&AOQ-ckchen &- Co"
    session = own(owner.person)
    session.delete(f'"{name}"')
    session.unsubscribe(f'"{name}"')
    session.logout()
    restore = ("restore", "folder", owner.person.address, PARCELS, "--site", site.name, "--json")
    assert json.loads(posthouse(*restore))["messages"] == size // 10
    assert json.loads(posthouse(*restore, "--into", "Back"))["messages"] == size // 10
    assert json.loads(posthouse(*restore))["messages"] == 0
    session = own(owner.person)
    folders = session.folders()
    back = session.details(folders[name])
    assert _same([_lasting(m) for m in back.messages], owner.messages[name])
    assert back.subscribed
    assert back.acl[f"friend@{site.domain}"] == "lrs"
    assert back.annotations["/private/comment"] == NOTE
    assert len(list(session.messages("Back"))) == size // 10
    session.delete("Back")
    session.logout()


def test_mailbox(site, own, posthouse, owner, size):
    """A mailbox of 1,000 messages comes back by one command"""
    for name in owner.messages:
        _remove(own, owner.person, name)
    started = time.monotonic()
    # An address is the same in any case.
    result = json.loads(posthouse("restore", "mailbox", owner.person.address.upper(), "--site", site.name, "--json"))
    took = time.monotonic() - started
    assert result["messages"] == size
    state = _state(own, owner.person)
    for name, messages in owner.messages.items():
        assert _same(state[name], messages), name
    print(f"{size} messages came back in {took:.1f} s")
    assert size < 1000 or took < 30, "what is promised for 1,000 messages is measured by the full suite"


def test_account(site, own, platform, friend, posthouse, owner, size):
    """A deleted user comes back: the password, the limit, the mail, the rights and the script work as before"""
    posthouse("account", "delete", owner.person.address, "--site", site.name)
    # Not asked at the access proxies: they remember for a minute whom they refused.
    posthouse("account", "show", owner.person.address, "--site", site.name, status=1)
    restore = ("restore", "account", owner.person.address, "--site", site.name, "--json")
    assert json.loads(posthouse(*restore, "--check"))["messages"] == size
    posthouse("account", "show", owner.person.address, "--site", site.name, status=1)
    result = json.loads(posthouse(*restore))
    assert result["messages"] == size
    shown = json.loads(posthouse("account", "show", owner.person.address, "--site", site.name, "--json"))
    assert (shown["quota"], shown["store"]) == (77, owner.person.store)
    state = _state(own, owner.person)
    for name, messages in owner.messages.items():
        assert _same(state[name], messages), name

    def logged_in() -> bool:
        try:
            Imap(platform, owner.person, platform.outside(61)).logout()
        except imaplib.IMAP4.error:
            return False
        return True

    eventually(logged_in, 60, "the old password opens the mailbox")
    parcel = letter(SENDER, owner.person.address, Subject="parcels for you")
    with Smtp(platform, source=friend) as client:
        eventually(
            lambda: client.transaction(SENDER, owner.person.address, parcel.data).code == 250, 30, "mail is accepted"
        )
    session = own(owner.person)
    eventually(lambda: session.having("Archive", parcel.id), 60, "the script files the parcel")
    session.logout()


def test_unnoticed(site, platform, posthouse, people, friend):
    """While a backup is made, mail is taken and reaches its reader"""
    backup = subprocess.Popen(
        [run.BIN / "posthouse", "backup", site.name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sent = 0
    with Smtp(platform, source=friend) as client, Imap(platform, people.dave) as imap:
        while backup.poll() is None:
            message = letter(SENDER, people.dave.address)
            assert client.transaction(SENDER, people.dave.address, message.data).code == 250
            eventually(lambda m=message: imap.messages(m.id), ARRIVES, "the message, while a backup is made")
            sent += 1
    assert backup.returncode == 0
    assert sent >= 3


@pytest.fixture
def repository(site: Any) -> Iterator[Path]:
    """The repository, put back afterwards as it was."""
    place = Path(Repository(site, secrets.load(site)).place)
    kept = place.with_name(f"{place.name}.kept")
    shutil.copytree(place, kept)
    yield place
    shutil.rmtree(place, ignore_errors=True)
    kept.rename(place)


def _refused(site: Any, *arguments: str) -> str:
    done = subprocess.run(
        [run.BIN / "posthouse", *arguments], capture_output=True, text=True, timeout=120, env=run.environment(site)
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_refusals(site, own, posthouse, owner, repository):
    """A damaged, missing or foreign repository, an unknown account or message, and a second run are refused"""
    before = _state(own, owner.person)
    mailbox = ("restore", "mailbox", owner.person.address, "--site", site.name)
    assert "nobody" in _refused(site, "restore", "mailbox", f"nobody@{site.domain}", "--site", site.name)
    assert "<no@where>" in _refused(site, "restore", "message", owner.person.address, "<no@where>", "--site", site.name)
    part = owner.identifiers[7].strip("<>")[1:]
    for written, reason in {"‹é@x>": "not a Message-ID", "": "not a Message-ID", part: part}.items():
        assert reason in _refused(site, "restore", "message", owner.person.address, written, "--site", site.name)
    assert "not a name that a folder can have" in _refused(site, *mailbox, "--into", "")
    assert "No-Such" in _refused(site, "restore", "folder", owner.person.address, "No-Such", "--site", site.name)
    assert "no backup is that old" in _refused(site, *mailbox, "--at", "2001-01-01")
    assert "neither a backup nor a time" in _refused(site, *mailbox, "--at", "yesterday")
    assert "no complete backup has that name" in _refused(site, *mailbox, "--at", "20310101T000000Z")
    with run.exclusive(site, "drill"):
        assert "locked by" in _refused(site, "drill", site.name)
        assert "locked by" in _refused(site, "backup", "prune", site.name)
    with run.exclusive(site):
        assert "locked by" in _refused(site, "backup", site.name)
        assert "locked by" in _refused(site, "backup", "check", site.name, "--quick")
        assert "locked by" in _refused(site, *mailbox)
    posthouse("backup", "check", site.name)
    # The largest file is gone: what is in it would not be stored again, and removed too late.
    pack = max(repository.glob("data/*/*"), key=lambda file: file.stat().st_size)
    pack.rename(repository / "aside")
    snapshots = sorted(repository.glob("snapshots/*"))
    for command in (("backup",), ("backup", "prune"), ("drill",)):
        assert "damaged: pack" in _refused(site, *command, site.name, "--check")
    assert "damaged: pack" in _refused(site, "backup", site.name)
    assert "damaged: pack" in _refused(site, "backup", "prune", site.name)
    assert "DAMAGED" in _refused(site, "backup", "check", site.name, "--quick")
    assert sorted(repository.glob("snapshots/*")) == snapshots
    (repository / "aside").rename(pack)
    # One bit of it is another.
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    assert "DAMAGED" in _refused(site, "backup", "check", site.name)
    config = (repository / "config").read_bytes()
    (repository / "config").unlink()
    assert "damaged" in _refused(site, *mailbox)
    assert "damaged" in _refused(site, "backup", site.name)
    (repository / "config").write_bytes(config)
    # The keys of another repository.
    shutil.rmtree(repository / "keys")
    other = repository.with_name("other")
    environment = run.environment(site) | {"RESTIC_PASSWORD": "another", "RESTIC_REPOSITORY": str(other)}
    subprocess.run(["restic", "init"], check=True, capture_output=True, env=environment)
    (other / "keys").rename(repository / "keys")
    shutil.rmtree(other)
    for command in (("backup",), ("backup", "check"), ("backup", "prune"), ("drill",)):
        assert "does not open it" in _refused(site, *command, site.name)
    assert "does not open it" in _refused(site, *mailbox)
    shutil.rmtree(repository)
    assert "nothing is here now" in _refused(site, "backup", site.name, "--check")
    assert "nothing is here now" in _refused(site, "backup", site.name)
    for command in (("backup", "check"), ("backup", "prune"), ("drill",)):
        assert "no backup repository there" in _refused(site, *command, site.name)
    assert "no backup repository there" in _refused(site, *mailbox)
    assert not repository.exists()
    assert _state(own, owner.person) == before


def test_directory(site, posthouse, owner):
    """Entries that were changed since go back to what they were, and every account stays on its store"""
    address, other = owner.person.address, f"other.{uuid.uuid4().hex[:6]}@{site.domain}"
    posthouse("account", "alias", address, "--add", other, "--site", site.name)
    assert f"is an alias of {address}" in _refused(site, "restore", "mailbox", other, "--site", site.name)
    posthouse("account", "suspend", address, "--site", site.name)
    at = ("--at", owner.second["backup"], "--json")
    would = json.loads(posthouse("restore", "directory", site.name, "--check", *at))
    assert set(would["changed"][address]) == {"mailLocalAddress", "posthouseStatus"}
    assert json.loads(posthouse("account", "show", address, "--site", site.name, "--json"))["status"] == "suspended"
    posthouse("restore", "directory", site.name, *at)
    shown = json.loads(posthouse("account", "show", address, "--site", site.name, "--json"))
    assert (shown["status"], shown["aliases"], shown["store"]) == ("active", [], owner.person.store)
    assert address not in json.loads(posthouse("restore", "directory", site.name, "--check", *at))["changed"]


def test_queue(site, nodes, posthouse, world):
    """A message that waited in a queue that was lost is queued again, once, and reaches its reader"""
    node, recipient = nodes.of("outbound")[0], f"waiting.{uuid.uuid4().hex[:6]}@example.net"
    nodes.run(node, "systemctl stop postfix-outbound")
    try:
        command = f"sendmail -C /etc/postfix-outbound -f someone@{site.domain} {recipient}"
        nodes.run(node, f"printf 'Subject: waiting\\n\\nstill\\n' | {command}")
        posthouse("backup", site.name)
        nodes.run(node, "rm /srv/postfix/outbound/maildrop/*")
    finally:
        nodes.run(node, "systemctl start postfix-outbound")
    queue = ("restore", "queue", node, "--site", site.name, "--json")
    assert json.loads(posthouse(*queue, "--check"))["messages"]["outbound"] == 1
    assert not world.to(recipient)
    assert json.loads(posthouse(*queue))["messages"]["outbound"] == 1
    eventually(lambda: world.to(recipient), ARRIVES, "the message that waited")
    assert json.loads(posthouse(*queue))["messages"]["outbound"] == 0
