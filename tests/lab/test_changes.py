"""What a deploy does to a platform that is in use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from conftest import ARRIVES

from posthouse import render, run, sitefile
from posthouse.probe.clients import Smtp, eventually, letter
from posthouse.probe.ledger import Ledger, Stream, assert_all_there

SENDER = "stranger@example.net"
PIDS = (
    "systemctl list-units --type=service --state=running --plain --no-legend | awk '{print $1}' | "
    "xargs systemctl show --property=Id --property=MainPID | paste -sd ' ' | sed 's/  /\\n/g'"
)


def main_pids(nodes: Any) -> dict[str, dict[str, str]]:
    """{node: {unit: PID of its main process}} of every service that runs."""
    found = {}
    for node, text in nodes.each("base", PIDS).items():
        pairs = [dict(field.split("=", 1) for field in line.split()) for line in text.splitlines()]
        found[node] = {pair["Id"]: pair["MainPID"] for pair in pairs}
    return found


@pytest.fixture(scope="module")
def changed_line(site: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """Deploys the site as it would be with one setting of a tier changed; afterwards as it is."""

    def deploy(tier: str, name: str, value: Any) -> dict[str, Any]:
        data = yaml.safe_load((sitefile.INVENTORY / site.name / "site.yml").read_text())
        data.setdefault(tier, {})[name] = value
        new = render.shared_variables(sitefile.parse(yaml.safe_dump(data)))
        old = render.shared_variables(site)
        variables = {key: new[key] for key in new if new[key] != old[key]}
        with run.exclusive(site):
            return run.playbook(site, "deploy", variables=variables, quiet=True)

    yield deploy
    with run.exclusive(site):
        assert run.playbook(site, "deploy", quiet=True)["ok"]


def test_nothing(nodes, posthouse):
    """A second deploy changes nothing on any node, and no process is restarted"""
    before = main_pids(nodes)
    result = json.loads(posthouse("deploy", nodes.site.name, "--json"))
    outcomes = {name: (node["ok"], node["changed"]) for name, node in result["nodes"].items()}
    assert outcomes == dict.fromkeys(nodes.site.nodes, (True, False))
    assert main_pids(nodes) == before


def test_one_line(nodes, changed_line):
    """A one-line change in site.yml restarts only the service that depends on it, on the nodes concerned"""
    before = main_pids(nodes)
    result = changed_line("submission", "messages_per_hour", 2)
    assert result["ok"], result
    concerned = set(nodes.of("submission"))
    assert {name for name, node in result["nodes"].items() if node["changed"]} == concerned
    after = main_pids(nodes)
    for node in nodes.site.nodes:
        other = {unit for unit, pid in after[node].items() if before[node].get(unit) != pid}
        assert other == ({"postfwd.service"} if node in concerned else set()), node


def test_rate(platform, people, nodes, changed_line):
    """An account that sends more than its rate gets 4xx, and others are not held up"""
    # The limit of two (see test_one_line) holds for each node.
    replies = []
    for _ in range(2 * len(nodes.of("submission")) + 1):
        with Smtp(platform, 465, platform.outside(52), people.sender) as client:
            message = letter(people.sender.address, people.bob.address)
            replies.append(client.transaction(people.sender.address, people.bob.address, message.data))
    assert replies[0].code == 250, replies
    assert 400 <= replies[-1].code < 500, replies
    with Smtp(platform, 465, platform.outside(53), people.carol) as client:
        message = letter(people.carol.address, people.bob.address)
        assert client.transaction(people.carol.address, people.bob.address, message.data).code == 250


def test_quota_refused(platform, friend, full, world, changed_line):
    """Where the site says so, mail to a full mailbox is refused instead of put off, and its sender hears of it"""
    result = changed_line("store", "over_quota", "reject")
    assert result["ok"], result
    sender = "impatient@example.net"
    straw = letter(sender, full.address, "\n".join(["z" * 70] * 6_000))
    with Smtp(platform, source=friend) as client:
        assert client.transaction(sender, full.address, straw.data).code == 250
    bounce = eventually(lambda: world.to(sender), ARRIVES, "the bounce")[0]
    assert straw.id.encode() in bounce.data
    assert b"5.2.2" in bounce.data


def test_rollback(platform, nodes, friend, people, world, site):
    """A change that passes validation but fails its health check is rolled back, and mail flows throughout"""
    before = nodes.each("mx", "cat /etc/postfix/main.cf")
    ledger = Ledger()
    with Stream(platform, ledger, [people.bob, people.carol], friend) as stream, run.exclusive(site):
        # Postfix's own check takes any number; postscreen itself will not start with this one.
        result = run.playbook(site, "deploy", variables={"mx_greet_wait": 0}, quiet=True)
    failed = [node for node in result["nodes"].values() if not node["ok"]]
    assert any("health check failed" in node["error"] for node in failed), result
    assert len(failed) == len(nodes.of("mx"))  # one tried; the others were left as they are
    assert nodes.each("mx", "cat /etc/postfix/main.cf") == before
    assert stream.longest_silence() < 15, stream.failures
    assert_all_there(ledger, platform, nodes, [people.bob, people.carol], world)
    for node in nodes.of("mx"):
        assert nodes.run(node, "systemctl is-active postfix").strip() == "active"
