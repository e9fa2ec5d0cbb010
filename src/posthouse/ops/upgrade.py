"""New packages on every node, one node at a time, each out of service meanwhile; and the rehearsal that comes first."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from posthouse import lab, render, run, secrets, sitefile
from posthouse.apart import apart
from posthouse.model import Site
from posthouse.ops import service, state
from posthouse.ops.drain import Drains
from posthouse.ops.drain import plan as drain_plan
from posthouse.ops.state import State
from posthouse.ops.steps import GOES_ON, Refused, Step, Stopped, carry_out
from posthouse.remote import Remote, RemoteError

log = logging.getLogger(__name__)

# Package → version: what a node would get, or has.
Updates = dict[str, str]

# A list that cannot be fetched is an error: what an old one says is no reason to think that there is nothing to do.
_LIST = """
set -eu
apt-get -qq -o APT::Update::Error-Mode=any update
found=$(apt-get -s -q dist-upgrade)
printf '%s\\n' "$found" | sed -n 's/^Inst \\([^ ]*\\) .*(\\([^ ]*\\) .*/\\1 \\2/p'
"""
# The same for packages that are not there: what would come with each name that it reads.
_OTHERS = """
set -eu
names=
while read -r name; do
    if apt-cache show "$name" >/dev/null 2>&1; then names="$names $name"; fi
done
[ -n "$names" ] || exit 0
found=$(apt-get -s -q --no-install-recommends install $names)
printf '%s\\n' "$found" | sed -n 's/^Inst \\([^ ]*\\) .*(\\([^ ]*\\) .*/\\1 \\2/p'
"""
# No service starts or restarts by itself: the node is restarted as a whole when its files are right.
_QUIETLY = """
set -eu
trap 'rm -f /usr/sbin/policy-rc.d' EXIT
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -qq -y -o Dpkg::Options::=--force-confold -o Dpkg::Options::=--force-confdef "$@" >/dev/null; }
"""
_INSTALL = f"""{_QUIETLY}
dpkg --configure -a --force-confold >/dev/null    # of an upgrade that was interrupted
apt dist-upgrade
apt-get -qq clean
"""
# Takes packages to the versions that it reads; says which of them the mirror does not have any more.
_SET = f"""{_QUIETLY}
apt-get -qq -o APT::Update::Error-Mode=any update
wanted=
while read -r name version; do
    if apt-cache show "$name=$version" >/dev/null 2>&1; then
        wanted="$wanted $name=$version"
    else
        echo "$name $version"
    fi
done
[ -z "$wanted" ] || apt --allow-downgrades install $wanted
"""
_VERSIONS = "dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\\n' | sed -n 's/^ii *//p'"
# Since when the machine runs; of a container, its first process.
_SINCE = "cat /proc/sys/kernel/random/boot_id; cut -d' ' -f22 /proc/1/stat"
RESTART_SECONDS = 300
PROBE_SECONDS = 20


def record(site: Site) -> Path:
    """Where the last green rehearsal of a site is noted."""
    return sitefile.INVENTORY / site.name / "rehearsal.json"


def digest(site: Site) -> str:
    """Changes with whatever a rehearsal is about: what the site says, and the roles that make nodes of it."""
    said = site.model_dump(mode="json", exclude={"name", "lab"})
    return hashlib.sha256(json.dumps([said, render.release()], sort_keys=True, default=str).encode()).hexdigest()


def differs(updates: dict[str, Updates], now: str, rehearsed: dict[str, Any] | None) -> str | None:
    """Why an upgrade may not be begun on the strength of a rehearsal; None if it may."""
    if not rehearsed:
        return "was never rehearsed"
    if rehearsed["digest"] != now:
        return f"the site or its roles are not what was rehearsed on {rehearsed['when']}"
    wanted = {(name, version) for packages in updates.values() for name, version in packages.items()}
    fresh = sorted(pair for pair in wanted if rehearsed["versions"].get(pair[0]) != pair[1])
    if fresh:
        name, version = fresh[0]
        return f"{len(fresh)} package(s) would get a version that was not rehearsed, the first is {name} {version}"
    return None


def order(have: State, nodes: Iterable[str]) -> list[str]:
    """The balancer with the VIP comes last, so that the VIP moves once and not twice."""
    return sorted(nodes, key=lambda name: name == have.vip)


def plan(
    site: Site, have: State, nodes: list[str], updates: dict[str, Updates], now: str, rehearsed: dict[str, Any] | None
) -> list[Step]:
    """The steps of a rolling upgrade; none if no package is to be had. now: the site's digest. Raises Refused."""
    state.known(site, *nodes)
    nodes = list(dict.fromkeys(nodes))
    state.need_answers(site, have, site.nodes)
    outside = sorted(have.drained - have.upgrading)
    if outside:
        raise Refused(
            f"{outside[0]}: is drained already, and one node at a time is out of service; put it back first: "
            f"posthouse undrain {outside[0]} --site {site.name}; nothing was changed"
        )
    # One that an upgrade was at when it ended is finished first, also if it has got its packages by now.
    wanted = [name for name in order(have, nodes or site.nodes) if updates.get(name) and name not in have.upgrading]
    wanted = [*sorted(have.upgrading), *wanted]
    if any(updates.values()) and (reason := differs(updates, now, rehearsed)):
        raise Refused(
            f"{site.name}: {reason}; run: posthouse upgrade --rehearse --site {site.name}; nothing was changed"
        )
    # By the time that the next is drained, what is out now is back.
    then = replace(have, drained=have.drained - have.upgrading)
    for name in wanted:
        if name not in have.upgrading:
            drain_plan(site, then, name)
    return [step for name in wanted for step in _of_node(name, updates.get(name, {}))]


def _of_node(node: str, updates: Updates) -> list[Step]:
    some = ", ".join(list(updates)[:3]) + (", …" if len(updates) > 3 else "")
    packages = f"install {len(updates)} package(s): {some}" if updates else "finish what is half installed"
    return [
        Step("drain", node, "take it out of service"),
        Step("install", node, packages),
        Step("deploy", node, "converge it"),
        Step("restart", node, "restart it"),
        Step("verify", node, "verify all of its tiers"),
        Step("undrain", node, "put it back into service"),
    ]


def installed(remote: Remote, nodes: Iterable[str]) -> dict[str, Updates]:
    """What each node has. Raises RemoteError."""
    answers = remote.each(nodes, _VERSIONS)
    return {node: dict(line.split() for line in text.splitlines()) for node, text in answers.items()}


def available(remote: Remote, nodes: Iterable[str]) -> dict[str, Updates]:
    """What each node would get. Fetches the lists of packages, which is all that it changes."""
    answers = remote.each(nodes, _LIST, timeout=300)
    return {node: dict(line.split() for line in text.splitlines()) for node, text in answers.items()}


def restart(site: Site, remote: Remote, node: str) -> None:
    """Restarts a machine and waits until it is up. Raises Stopped."""
    before = remote.run(node, _SINCE)
    deadline = time.monotonic() + RESTART_SECONDS
    if site.lab:
        remote.run(node, "systemctl --no-block poweroff")
        while any(entry["name"] == node and entry["state"] == "running" for entry in lab.status(site.name)):
            if time.monotonic() > deadline:
                raise Stopped(f"does not shut down within {RESTART_SECONDS} s; its console says why")
            time.sleep(0.5)
        lab.start(site.name, node)
    else:
        remote.run(node, "systemctl --no-block reboot")
    while True:
        try:
            after = remote.run(node, _SINCE, timeout=15)
            if after != before and remote.run(node, "systemctl is-system-running --wait || true", timeout=120):
                return
        except RemoteError:
            pass
        if time.monotonic() > deadline:
            raise Stopped(f"does not come up within {RESTART_SECONDS} s; its console says why")
        time.sleep(1)


def upgrade(
    site: Site, nodes: list[str], check: bool = False, wait: int = 60, rehearsed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Upgrades nodes, or all, one at a time; stops at the first that is not well afterwards. Raises Refused, Stopped.

    rehearsed: what a rehearsal found; by default the last green one of this site.
    Returns the report of `carry_out`.
    """
    state.known(site, *nodes)
    remote = Remote(site)
    drains = Drains(site, remote, wait, "upgrade")
    have = state.read(site, remote)
    state.need_answers(site, have, site.nodes)
    updates = available(remote, {*(nodes or site.nodes), *have.upgrading})
    steps = plan(site, have, nodes, updates, digest(site), rehearsed or _rehearsal(site))

    def put_back(begun: list[Step]) -> str:
        """A node that is not well stays out; one to which nothing was done yet goes back."""
        last = begun[0]
        if last.do == "drain":
            return f"{last.node} was put back, nothing was installed on it"
        if last.do in ("install", "deploy", "restart", "verify"):
            return (
                f"{last.node} stays out of service, the others serve and are untouched or upgraded; mend it, and run "
                "this again: it goes on with this node"
            )
        return GOES_ON

    return carry_out(
        f"upgrade {' '.join(nodes) or site.name}",
        steps,
        {
            "drain": lambda step: str(drains.drain(step.node)["seconds"]) + " s",
            "install": lambda step: remote.run(step.node, _INSTALL, timeout=3600) and "",
            "deploy": lambda step: service.deploy(site, step.node),
            "restart": lambda step: restart(site, remote, step.node),
            "verify": lambda step: service.verify(site, step.node),
            "undrain": lambda step: str(drains.undrain(step.node)["seconds"]) + " s",
        },
        check,
        put_back,
    )


def _rehearsal(site: Site) -> dict[str, Any] | None:
    """What the last green rehearsal noted; None if there is none. Raises Refused."""
    path = record(site)
    try:
        noted = json.loads(path.read_text())
        return {"digest": noted["digest"], "when": noted["when"], "versions": dict(noted["versions"])}
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        raise Refused(
            f"{path}: is damaged; rehearse again: posthouse upgrade --rehearse --site {site.name}; nothing was changed"
        ) from None


def clone(site: Site) -> str:
    """Writes the site file of a copy that runs in a lab on this machine, with secrets of its own; returns its name."""
    name = f"tmp-{site.name[:26]}"
    folder = sitefile.INVENTORY / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = yaml.safe_load((sitefile.INVENTORY / site.name / "site.yml").read_text())
    data["name"] = name
    if not site.lab:
        data["lab"] = {"outside": "198.51.100.0/24"}
        data["network"] |= {"interface": "eth0", "resolvers": [str(site.network.controller)]}
    (folder / "site.yml").write_text(yaml.safe_dump(data))
    return name


def rehearse(site: Site, check: bool = False) -> dict[str, Any]:
    """Upgrades a copy of the site in a lab, node by node, and notes what was green. Raises Stopped.

    The copy has the packages that the site's nodes have, as far as the mirror still has them; mail and logins after the
    upgrade; secrets of its own, no mail of the site. It is removed again.
    """
    name = f"tmp-{site.name[:26]}" if check else clone(site)
    steps = [
        Step("lab", name, "run a copy of the site in a lab on this machine"),
        Step("upgrade", name, "give it the site's packages, upgrade it node by node, use it, and note the versions"),
        Step("down", name, "remove it"),
    ]
    note = record(site)

    # Each in a process of its own, for it enters a lab's network: the site's, if that is a lab, or the copy's.
    def start(_: Step) -> None:
        if not apart(lambda: _noted(site, name)):
            raise Stopped("the site's nodes cannot say which packages they have; see above")
        note.unlink(missing_ok=True)  # only the last one counts
        copy = sitefile.load(name)
        lab.ensure_requirements()
        lab.down(name)
        lab.up(copy, secrets.ensure(copy))

    def rolled(_: Step) -> str:
        if not apart(lambda: _rehearsed(name, site)):
            raise Stopped("the rehearsal is red; see above")
        return f"green, noted in {note.relative_to(sitefile.INVENTORY.parent)}"

    def down(_: Step) -> None:
        lab.down(name)
        shutil.rmtree(sitefile.INVENTORY / name, ignore_errors=True)

    try:
        return carry_out(
            f"rehearse the upgrade of {site.name}", steps, {"lab": start, "upgrade": rolled, "down": down}, check
        )
    finally:
        if not check:
            down(steps[-1])


def _noted(site: Site, name: str) -> bool:
    """Notes beside the copy's site file which packages the site's nodes have."""
    found = installed(Remote(site), site.nodes)
    (sitefile.INVENTORY / name / "packages.json").write_text(json.dumps(found))
    return True


def _alike(copy: Site, remote: Remote) -> None:
    """Gives the copy's nodes the packages that the site's have; says which the mirror does not have any more."""
    wanted = json.loads((sitefile.INVENTORY / copy.name / "packages.json").read_text())
    lacking: Updates = {}
    for node, have in installed(remote, copy.nodes).items():
        other = {name: version for name, version in wanted[node].items() if have.get(name, version) != version}
        if other:
            text = "".join(f"{name} {version}\n" for name, version in other.items())
            lacking |= dict(line.split() for line in remote.run(node, _SET, text, timeout=1800).splitlines())
            log.info("%s: %s package(s) as on the site's", node, len(other))
    if lacking:
        names = ", ".join(" ".join(pair) for pair in sorted(lacking.items())[:3])
        log.warning("the mirror does not have these any more, the rehearsal begins with others: %s", names)


def _only_machines(copy: Site, remote: Remote) -> Updates:
    """What machines would get, and containers never have: kernels, boot loaders. Nobody can rehearse those here."""
    wanted = json.loads((sitefile.INVENTORY / copy.name / "packages.json").read_text())
    found: Updates = {}
    for node, have in installed(remote, copy.nodes).items():
        if other := sorted(set(wanted[node]) - set(have)):
            answer = remote.run(node, _OTHERS, "".join(f"{name}\n" for name in other), timeout=300)
            found |= dict(line.split() for line in answer.splitlines())
    if found:
        names = ", ".join(sorted(found)[:3])
        log.warning(
            "not rehearsed, for only the site's own nodes have them (the first to be upgraded tries): %s", names
        )
    return found


def _rehearsed(name: str, site: Site) -> bool:
    """The rehearsal itself, in the copy. Notes it if it is green."""
    copy = sitefile.load(name)
    remote = Remote(copy)
    _alike(copy, remote)
    service.deploy(copy)
    updates = available(remote, copy.nodes)
    wanted = {package: version for packages in updates.values() for package, version in packages.items()}
    upgrade(copy, [], wait=5, rehearsed={"digest": digest(copy), "when": "now", "versions": wanted})
    result = run.verify(copy, quiet=True)
    failed = [check for check in result["checks"] if check["outcome"] == "failed"]
    if failed or not result["passed"]:
        names = "; ".join(f"{check['node']}: {check['check']}" for check in failed[:5]) or "no check ran"
        raise Stopped(f"{names}; mend that in the site, and run: posthouse upgrade --rehearse --site {site.name}")
    _used(copy)
    versions = _only_machines(copy, remote)
    for packages in installed(remote, copy.nodes).values():
        versions |= packages
    when = time.strftime("%FT%T%z")
    beside = record(site).with_suffix(".new")
    beside.write_text(json.dumps({"digest": digest(site), "when": when, "versions": versions}, indent=1))
    beside.replace(record(site))
    return True


def _used(copy: Site) -> None:
    """Mail and logins through the copy's public name. Raises Stopped if any of it fails."""
    from posthouse.probe.ledger import Ledger
    from posthouse.probe.probes import Probe, Rates, made_people

    probe = Probe(copy, made_people(copy), Rates(2, 1, 2, 0, 0, 0), Ledger())
    with probe:
        time.sleep(PROBE_SECONDS)
    failed = {kind: one.failures for kind, one in probe.statistics().items() if one.failed}
    if failed:
        raise Stopped(f"probes failed: {failed}; mend what they name in the site, and rehearse again")
