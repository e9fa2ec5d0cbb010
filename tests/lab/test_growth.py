"""A site that changes: it gets a cluster, a node more, a new disk for one, and a node less, and mail flows meanwhile.

In a small lab of its own, beside the one that all tests share, for these change the site file. They build on each
other, in this order.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from conftest import ARRIVES, Nodes, as_operator
from test_changes import main_pids

from posthouse import lab, secrets, sitefile
from posthouse.lab import network
from posthouse.lab.layout import Layout
from posthouse.mailboxes import Mailboxes
from posthouse.ops import rebalance
from posthouse.probe.clients import WORLD, Imap, Person, Platform, Smtp, World, digest, eventually, introduce, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there
from posthouse.remote import Remote

SENDER = "stranger@example.net"
OWN = "tmp-nodes"  # git ignores its folder
SERVING_SECONDS = 60
ACCOUNTS = 40
OUTBOUND = "/etc/postfix-outbound"
HELD = f"""
printf 'Subject: held\\n\\nstill\\n' | sendmail -C {OUTBOUND} -f held@lab.test waiting@example.net
for _ in $(seq 100); do
    postsuper -c {OUTBOUND} -h ALL
    postqueue -c {OUTBOUND} -j | grep -q '"queue_name": "hold"' && exit
    sleep 0.1
done
exit 1
"""


class Own:
    """A small lab, with a site file that tests may change."""

    def __init__(self, site: Any) -> None:
        self.folder = sitefile.INVENTORY / OWN
        self.data = yaml.safe_load((sitefile.INVENTORY / site.name / "site.yml").read_text())
        self.data["name"] = OWN
        nodes = self.data["nodes"]
        del nodes["lb[1:2]"]
        nodes["lb1"] = {"class": "lb", "address": str(site.nodes["lb1"].address)}
        self.cluster = self.data.pop("cluster")
        self.people: list[Person] = []

    def write(self) -> None:
        """Writes the site file as `data` is now."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "site.yml").write_text(yaml.safe_dump(self.data))

    @property
    def site(self) -> Any:
        """The site as it is now."""
        return sitefile.load(OWN)

    @property
    def nodes(self) -> Nodes:
        """Its nodes."""
        return Nodes(self.site)

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """What is connected in here is connected in this lab."""
        return network.inside(Layout(OWN).namespace)

    def posthouse(self, *arguments: str, text: str | None = None) -> str:
        """Runs `posthouse …` as an operator does; returns what it prints."""
        done = as_operator(*arguments, text=text)
        assert done.returncode == 0, f"posthouse {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """Runs `posthouse …`, which has to refuse; returns what it complains of."""
        done = as_operator(*arguments)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def add_people(self) -> None:
        """Makes accounts, as many on each store that there is, with three messages each; does so once."""
        if self.people:
            return
        stores = list(self.site.stores)
        tag = uuid.uuid4().hex[:4]
        self.people = [
            Person(f"user{number}.{tag}@{self.site.domain}", uuid.uuid4().hex, stores[number % len(stores)])
            for number in range(ACCOUNTS)
        ]
        file = self.folder / "people.csv"
        file.write_text("address,password,store\n" + "\n".join(",".join(person) for person in self.people) + "\n")
        self.posthouse("account", "import", str(file), "--site", OWN)
        file.unlink()
        kept = secrets.load(self.site)
        with self.inside():
            for person in self.people:
                with Mailboxes(self.site.stores[person.store], kept).acting_for(person.address) as session:
                    for number in range(3):
                        text = letter(SENDER, person.address, f"Number {number}.").data
                        assert session.append("INBOX", "", "", text)[0] == "OK"

    @contextlib.contextmanager
    def mail(self, people: list[Person], restarts: bool = False) -> Iterator[Stream]:
        """Mail comes in meanwhile; afterwards all of it is there, once.

        restarts: stores are restarted where they are; a delivery that this meets may be there twice, as by a power cut.
        """
        with self.inside():
            platform = Platform(self.site)
            introduce(platform, platform.outside(20))
            ledger = Ledger()
            with World(platform.lookup(f"mx.{WORLD}")) as world:
                with Stream(platform, ledger, people, platform.outside(20), rate=2) as stream:
                    eventually(lambda: stream.taken > 5, 60, "mail")
                    yield stream
                    before = stream.taken
                    eventually(lambda: stream.taken > before + 5, 60, "mail")
                # The site may be another one by now.
                assert_all_there(ledger, Platform(self.site), self.nodes, people, world, power_cut=restarts)

    def counts(self) -> dict[str, int]:
        """How many accounts each store has."""
        with self.inside():
            stores, _ = rebalance.loads(self.site, secrets.load(self.site), Remote(self.site))
        return {name: len(load.mailboxes) for name, load in stores.items()}

    def settled(self) -> dict[str, Any]:
        """Waits until every store is served and all of its replicas have everything; returns what `stores` says."""

        def sound() -> dict[str, Any] | None:
            found: dict[str, Any] = json.loads(self.posthouse("stores", OWN, "--json"))
            stores = self.site.stores
            good = all(
                state["alive"]
                and {state["primary"], *state["in_sync"]} >= {stores[name].primary, *stores[name].replicas}
                for name, state in found.items()
            )
            return found if good and set(found) == set(stores) else None

        found = eventually(sound, 180, "all replicas of all stores in sync")
        assert found
        return found

    def members(self) -> set[str]:
        """Who belongs to the cluster, and is well."""
        asking = self.data["cluster"]["members"][0]
        tls = "--cacert /etc/ssl/posthouse/ca.pem --cert /etc/ssl/posthouse/node.pem --key /etc/ssl/posthouse/node.key"
        ctl = f"etcdctl {tls} --endpoints https://{self.site.nodes[asking].address}:2379"
        text = self.nodes.run(asking, f"{ctl} member list; {ctl} endpoint health --cluster 2>&1 || true")
        names = {line.split(", ")[2]: line.split(", ")[3] for line in text.splitlines() if ", started, " in line}
        healthy = set(re.findall(r"https://([\d.]+):2379 is healthy", text))
        return {name for name, peer in names.items() if peer.split("//")[1].partition(":")[0] in healthy}

    def down(self) -> None:
        """Nothing is left of it."""
        lab.down(OWN)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def own(site: Any, request: pytest.FixtureRequest) -> Iterator[Own]:
    """The small lab, deployed; without a cluster where that is to come by a test."""
    made = Own(site)
    made.down()
    if not any(item.name == "test_cluster_comes" for item in request.session.items):
        made.data["cluster"] = made.cluster
    try:
        made.write()
        made.posthouse("lab", "up", OWN)
        made.posthouse("deploy", OWN)
        yield made
    finally:
        made.down()


@pytest.mark.full
def test_cluster_comes(own):
    """A running site gets a cluster by a deploy: nothing is lost, stores fail over from then on"""
    own.add_people()
    own.data["cluster"] = own.cluster
    own.write()
    with own.mail(own.people[:3]) as stream:
        own.posthouse("deploy", OWN)
        states = own.settled()
    print(
        f"cluster: {stream.longest_silence():.1f} s the longest time without a message; {len(stream.failures)} failed"
    )
    assert {name: state["primary"] for name, state in states.items()} == {
        name: store.primary for name, store in own.site.stores.items()
    }
    assert own.members() == set(own.cluster["members"])
    with own.mail(own.people[:3]):
        own.posthouse("failover", "s01", "--site", OWN)
        own.settled()
        own.posthouse("failback", "s01", "--site", OWN)
    assert json.loads(own.posthouse("deploy", OWN, "--json"))["nodes"]["mail1"]["changed"] is False


def test_expand(own):
    """A node more serves within a minute, and nothing is restarted on the others"""
    own.data["nodes"]["mail4"] = {"class": "mail"}
    before = main_pids(own.nodes)
    own.write()
    assert "mail9: no such node" in own.refused("expand", "mail9", "--site", OWN)
    report = json.loads(own.posthouse("expand", "mail4", "--site", OWN, "--json"))
    after = main_pids(own.nodes)
    changed = {
        node: [unit for unit, pid in units.items() if after[node].get(unit) != pid] for node, units in before.items()
    }
    assert changed == {node: [] for node in before}
    note = next(step["note"] for step in report["steps"] if step["do"] == "serve")
    print(f"expand: {note}; {[(s['do'], s['seconds']) for s in report['steps']]}")
    assert float(note.split()[1]) <= SERVING_SECONDS
    assert report["next"] == ["every store is within a tenth of its share: posthouse rebalance has nothing to do"]
    with own.inside():
        platform = Platform(own.site)
        names = set()

        def everybody_greets() -> bool:
            with Smtp(platform, source=platform.outside(30)) as client:
                names.add(client.ehlo()[1].decode().split()[0].partition(".")[0])
            return "mail4" in names

        eventually(everybody_greets, 60, "a greeting from the new node")


def test_retire_plain(own):
    """A node that nothing leans on leaves for good: no balancer knows it any more, and nothing is restarted"""
    assert "directory.providers: mail1 is one of them" in own.refused("retire", "mail1", "--site", OWN)
    assert "mail9: no such node" in own.refused("retire", "mail9", "--site", OWN)
    # Nobody may deliver it, so a drain leaves it where it is; with the disk it would be gone.
    own.nodes.run("mail4", HELD)
    assert "1 message(s) still wait in its queues" in own.refused("retire", "mail4", "--site", OWN, "--wait", "3")
    own.nodes.run("mail4", f"postsuper -c {OUTBOUND} -d ALL")
    report = json.loads(own.posthouse("retire", "mail4", "--site", OWN, "--wait", "3", "--json"))
    print(f"retire: {[(step['do'], step['seconds']) for step in report['steps']]}")
    assert "mail4" not in {node["name"] for node in lab.status(OWN)}
    del own.data["nodes"]["mail4"]
    own.write()
    before = main_pids(own.nodes)
    own.posthouse("deploy", OWN)
    assert main_pids(own.nodes) == before
    assert "mail4" not in own.nodes.run("lb1", "echo 'show servers state' | socat - /run/haproxy/admin.sock")


@pytest.mark.full
def test_rebalance(own):
    """A node more brings a store, which gets its share: each is within a tenth of its own then, and nothing is lost"""
    own.add_people()
    own.data["nodes"]["mail4"] = {"class": "mail"}
    own.data["stores"]["s04"] = {"primary": "mail4", "replicas": ["mail1"]}
    before = main_pids(own.nodes)
    own.write()
    with own.mail(own.people[:3]) as stream:
        report = json.loads(own.posthouse("expand", "mail4", "--site", OWN, "--json"))
    after = main_pids(own.nodes)
    changed = {n: [unit for unit, pid in units.items() if after[n].get(unit) != pid] for n, units in before.items()}
    # Who gets a copy of the new store gets a certificate with one name more; replication to it is connected anew.
    print(f"expand with a store: restarted {changed}; failed {stream.failures}; {report['next']}")
    assert all(unit.startswith("cyrus-sync-") for node in changed if node != "mail1" for unit in changed[node])
    assert "would move" in report["next"][0]
    before = own.counts()
    assert before["s04"] == 0
    planned = json.loads(own.posthouse("rebalance", OWN, "--check", "--json"))
    assert own.counts() == before
    with own.mail(own.people[:6]):
        done = json.loads(own.posthouse("rebalance", OWN, "--parallel", "4", "--json"))["moved"]
    assert [one["error"] for one in done] == [None] * len(planned)
    counts = own.counts()
    share = ACCOUNTS / len(counts)
    pauses = sorted(one["pause"] for one in done)
    print(f"rebalance: {before} → {counts}; writing waited for {pauses[-1]:.1f} s at most")
    assert sum(counts.values()) == ACCOUNTS
    assert all(abs(count - share) <= share * rebalance.NEAR for count in counts.values()), counts
    with own.inside():
        platform = Platform(own.site)
        for person in own.people:
            with Imap(platform, person) as imap:
                assert len(imap.messages()) >= 3, person.address
    assert "nothing to do" in own.posthouse("rebalance", OWN)
    assert "no store 's77'" in own.refused("rebalance", OWN, "--empty", "s77")
    assert "write --by accounts or --by bytes" in own.refused("rebalance", OWN, "--by", "size")


@pytest.mark.full
def test_rebuild(own):
    """A node whose disk is gone comes back with all of its mail, takes mail, belongs to the cluster, is replicated"""
    own.add_people()
    site, nodes = own.site, own.nodes
    store = site.stores["s02"]
    person = Person(f"large.{uuid.uuid4().hex[:4]}@{site.domain}", uuid.uuid4().hex, store.name)
    arguments = ["--store", store.name, "--site", OWN, "--password-stdin"]
    own.posthouse("account", "add", person.address, *arguments, text=f"{person.password}\n")
    # 90 MiB: by then it is the copying that takes time, and not the connecting.
    letters = [letter(SENDER, person.address, f"Number {n}.\n" + ("x" * 70 + "\n") * 1_000) for n in range(1_300)]
    with own.inside():
        with Imap(Platform(site), person) as imap:
            for message in letters:
                imap.append("Archive", "", "", message.data)
        eventually(lambda: replicated(nodes, store, letters[-1].id), 120, "replication")
        own.settled()
    node = store.primary
    assert f"{node}: is alive, and a rebuild wipes its disk" in own.refused("rebuild", node, "--site", OWN)
    lab.kill(OWN, node)
    with own.mail([one for one in own.people if one.store == "s01"][:2]):
        report = json.loads(own.posthouse("rebuild", node, "--site", OWN, "--measure", "--json"))
    note = next(step["note"] for step in report["steps"] if step["do"] == "serve")
    print(f"rebuild: {note}; {report['copies']}")
    assert float(note.split()[1]) <= SERVING_SECONDS + sum(copy["seconds"] for copy in report["copies"].values())
    assert report["copies"][store.name]["of_raw"] >= 0.5
    own.settled()
    assert own.members() == set(own.data["cluster"]["members"])
    own.posthouse("failback", "--all", "--site", OWN)
    assert own.settled()[store.name]["primary"] == node
    new = letter(SENDER, person.address)
    with own.inside():
        platform = Platform(own.site)
        with Smtp(platform, source=platform.outside(31)) as client:
            assert client.transaction(SENDER, person.address, new.data).code == 250
        with Imap(platform, person) as imap:
            found = imap.messages(folder="Archive")
            assert sorted(map(digest, found)) == sorted(digest(message.data) for message in letters)
            eventually(lambda: imap.messages(new.id), ARRIVES, "new mail in the mailbox")
    eventually(lambda: replicated(nodes, store, new.id), 60, "the new message on the rebuilt node and on its peer")


@pytest.mark.full
def test_retire(own):
    """A node with stores, a member of the cluster, leaves for good: what it says is done, and nothing is lost"""
    leaving, coming = "mail3", "mail4"
    assert coming in own.site.nodes, "test_rebalance has put it there"
    people = [one for one in own.people if one.store in ("s02", "s03")][:4]
    with own.mail(people, restarts=True) as stream:
        # First two others get copies, then it loses its own.
        for copies in (3, 2):
            complaint = own.refused("retire", leaving, "--site", OWN)
            if copies == 2:
                assert "s03: mail3 serves it, and site.yml has it on mail1" in complaint
                own.posthouse("failback", "s03", "--site", OWN)
                complaint = own.refused("retire", leaving, "--site", OWN)
            told = {name: yaml.safe_load(text) for name, text in re.findall(r"^  (s\d+): (\{.*\})$", complaint, re.M)}
            assert {name: 1 + len(entry["replicas"]) for name, entry in told.items()} == {"s02": copies, "s03": copies}
            own.data["stores"] |= told
            own.write()
            own.posthouse("deploy", OWN)
            own.settled()
        assert "cluster.members: mail3 is one of them" in own.refused("retire", leaving, "--site", OWN)
        own.data["cluster"]["members"] = ["mail1", "mail2", coming]
        own.write()
        own.posthouse("retire", leaving, "--site", OWN, "--wait", "3")
        assert leaving not in {node["name"] for node in lab.status(OWN)}
        del own.data["nodes"]["mail[1:3]"]
        own.data["nodes"] |= {"mail[1:2]": {"class": "mail", "address": str(own.site.nodes["mail1"].address)}}
        own.write()
        before = main_pids(own.nodes)
        own.posthouse("deploy", OWN)
        after = main_pids(own.nodes)
    print(f"retire: {stream.longest_silence():.1f} s the longest time without a message, {len(stream.failures)} failed")
    assert after == before
    assert own.members() == {"mail1", "mail2", coming}
    own.settled()
    assert leaving not in own.nodes.run("lb1", "echo 'show servers state' | socat - /run/haproxy/admin.sock")


def replicated(nodes: Nodes, store: Any, message_id: str) -> bool:
    """Whether every copy of a store has a message."""
    look = f"grep -rlF '{message_id}' /srv/store/{store.name}/spool || true"
    return all(nodes.run(node, look).strip() for node in (store.primary, *store.replicas))
