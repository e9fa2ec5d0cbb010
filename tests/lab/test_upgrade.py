"""New packages, node by node, while mail flows: real ones, for the nodes are given older ones first."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Nodes, as_operator
from test_changes import main_pids
from test_nodes import nobody_notices

from posthouse import lab, sitefile
from posthouse.ops import upgrade

# Of the first of these that the mirror also has in an older version, the nodes get that one.
CANDIDATES = (
    "openssl openssl-provider-legacy libssl3t64",
    "libnghttp2-14",
    "libxml2",
    "libzstd1",
    "libkrb5-3 libgssapi-krb5-2 libk5crypto3 libkrb5support0",
)
OLDER = """
set -eu
apt-get -qq update
for name in {names}; do
    old=$(apt-cache madison $name | awk -F'|' '{{ gsub(/ /, "", $2); print $2 }}' | sort -u |
        while read -r version; do dpkg --compare-versions $version lt {than} && echo $version || true; done | tail -1)
    [ -n "$old" ] && echo $name=$old
done
"""


def installed(nodes: Nodes, node: str, package: str) -> str:
    """The version of a package on a node."""
    return nodes.run(node, f"dpkg-query -W -f '${{Version}}' {package}").strip()


def made_older(nodes: Nodes, names: list[str]) -> str:
    """Gives nodes an older version of something; returns its package's name. Skips where the mirror has none."""
    for candidate in CANDIDATES:
        packages = candidate.split()
        than = f"$(dpkg-query -W -f '${{Version}}' {packages[0]})"
        with contextlib.suppress(AssertionError):
            found = nodes.run(names[0], OLDER.format(names=candidate, than=than)).split()
            break
    else:
        pytest.skip("the mirror has no older version of any of these packages, so nothing can be upgraded")
    quiet = "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d"
    install = f"apt-get -qq update && apt-get -qq -y --allow-downgrades install {' '.join(found)} >/dev/null"
    for node in names:
        nodes.run(node, f"{quiet} && {install}; status=$?; rm /usr/sbin/policy-rc.d; exit $status")
    return packages[0]


def attempt(site: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `posthouse upgrade …`, whatever comes of it."""
    return as_operator("upgrade", "--site", site.name, "--wait", "3", *arguments, timeout=3600)


def upgraded(site: Any, *arguments: str) -> dict[str, Any]:
    """Runs `posthouse upgrade …`, which has to succeed; returns its report."""
    done = attempt(site, "--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def unrehearsed(site: Any, nodes: Nodes) -> Iterator[None]:
    """No rehearsal is noted, and every node has the newest packages, before and afterwards."""
    newest = "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y dist-upgrade >/dev/null"
    note = upgrade.record(site)
    note.unlink(missing_ok=True)
    # The mirror may have got some since the image was built.
    nodes.each("base", newest)
    yield
    note.unlink(missing_ok=True)
    nodes.each("base", newest)


def since(nodes: Nodes) -> dict[str, str]:
    """When each node was started."""
    return nodes.each("base", "cut -d' ' -f22 /proc/1/stat")


@pytest.mark.full
def test_upgrade(platform, nodes, friend, people, world, site, unrehearsed):
    """A node is upgraded under mail, once that was rehearsed: no delivery and no login fails, the others go on"""
    node = site.stores[people.bob.store].primary
    package = made_older(nodes, [node])
    old = installed(nodes, node, package)
    before, pids = since(nodes), main_pids(nodes)
    done = attempt(site)
    assert done.returncode != 0
    assert f"{site.name}: was never rehearsed; run: posthouse upgrade --rehearse --site {site.name}" in done.stderr
    assert (since(nodes), main_pids(nodes)) == (before, pids)
    # As a rehearsal would have noted it: everything as it is on a node that has the newest.
    other = next(name for name in nodes.of("store") if name != node)
    versions = nodes.run(other, "dpkg-query -W -f '${Package} ${Version}\\n'")
    noted = {"when": "just now", "versions": dict(line.split() for line in versions.splitlines())}
    upgrade.record(site).write_text(json.dumps(noted | {"digest": "of another site"}))
    assert "are not what was rehearsed on just now" in attempt(site).stderr
    upgrade.record(site).write_text(json.dumps(noted | {"digest": upgrade.digest(site)}))
    reports = []
    # A session on its store breaks when that goes to a replica, and when it comes back.
    nobody_notices(lambda: reports.append(upgraded(site)), platform, nodes, friend, people, world, reconnects=2)
    assert installed(nodes, node, package) == installed(nodes, other, package) != old
    assert {name for name, when in since(nodes).items() if when != before[name]} == {node}
    print(f"upgrade: {reports[0]['seconds']} s; {[(step['do'], step['seconds']) for step in reports[0]['steps']]}")
    assert upgraded(site)["changed"] is False


@pytest.mark.full
def test_rehearse(platform, nodes, friend, people, world, site, unrehearsed):
    """A copy of the site is upgraded node by node and used; after that the site itself is, and nobody notices"""
    olds = ["lb1", "mail2"]
    package = made_older(nodes, olds)
    old = installed(nodes, "mail2", package)
    before, pids = since(nodes), main_pids(nodes)
    assert upgraded(site, "--rehearse", "--check")["steps"] == []
    report = upgraded(site, "--rehearse")
    print(f"rehearsal: {[(step['do'], step['seconds']) for step in report['steps']]}")
    assert (since(nodes), main_pids(nodes)) == (before, pids)
    copy = report["steps"][0]["node"]
    assert lab.status(copy) == []
    assert not (sitefile.INVENTORY / copy).exists()
    noted = json.loads(upgrade.record(site).read_text())
    assert noted["versions"][package] == installed(nodes, "mail1", package) != old
    reports = []
    # A session breaks when the VIP goes, when its store goes, and when that comes back.
    nobody_notices(lambda: reports.append(upgraded(site)), platform, nodes, friend, people, world, reconnects=3)
    print(f"upgrade: {reports[0]['seconds']} s; {[(s['node'], s['do'], s['seconds']) for s in reports[0]['steps']]}")
    assert {name for name, when in since(nodes).items() if when != before[name]} == set(olds)
    assert {installed(nodes, name, package) for name in olds} == {noted["versions"][package]}


@pytest.mark.full
def test_first_red(platform, nodes, site, unrehearsed):
    """The first node that is not well after its upgrade stays out, and the next is not touched; mended, it goes on"""
    package = made_older(nodes, ["mail2", "mail3"])
    old = installed(nodes, "mail3", package)
    versions = nodes.run("mail1", "dpkg-query -W -f '${Package} ${Version}\\n'")
    noted = {"when": "now", "versions": dict(line.split() for line in versions.splitlines())}
    upgrade.record(site).write_text(json.dumps(noted | {"digest": upgrade.digest(site)}))
    unit = "[Service]\\nType=oneshot\\nExecStart=/bin/false\\n[Install]\\nWantedBy=multi-user.target\\n"
    # It fails at the next start.
    nodes.run("mail2", f"printf '{unit}' >/etc/systemd/system/red.service && systemctl -q enable red")
    try:
        before = since(nodes)
        started = time.monotonic()
        done = attempt(site)
        print(f"stopped after {time.monotonic() - started:.0f} s")
        assert done.returncode != 0
        assert "mail2: could not verify all of its tiers" in done.stderr
        assert "no unit has failed" in done.stderr
        assert "mail2 stays out of service" in done.stderr
        assert nodes.run("mail2", "cat /var/lib/posthouse/drained")
        assert installed(nodes, "mail3", package) == old
        assert {name for name, when in since(nodes).items() if when != before[name]} == {"mail2"}
    finally:
        nodes.run("mail2", "systemctl -q disable red; rm /etc/systemd/system/red.service; systemctl reset-failed red")
    report = upgraded(site)
    assert list(dict.fromkeys(step["node"] for step in report["steps"])) == ["mail2", "mail3"]
    assert installed(nodes, "mail3", package) == installed(nodes, "mail1", package) != old
    assert not nodes.run("mail2", "ls /var/lib/posthouse | grep drained || true")
