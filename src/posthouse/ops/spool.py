"""A store's data from one node to another, past the daemons: by tar over ssh, as fast as the disks and the wire.

    sizes(remote, node, [store])             MiB of each store's data on a node
    copy(remote, store, source, target)      everything that the source's instance has; the target's must not run

Cyrus's own replication copies message by message. Here the messages go first, while the source works on: their files
never change. Then the source stands still for a moment, in which go indexes, databases, Sieve and what came meanwhile.
What changes after that is replication's affair: a primary keeps its log of changes until the replica is back.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from posthouse.remote import Remote

# The longest that a source stands still. Then it goes on and the copy fails, rather than its users wait.
STILL_SECONDS = 60

_BULK = r"""
set -eu
cd /srv/store/{store}
mkdir -p /run/posthouse
touch /run/posthouse/copy-{store}
find spool \( -type d -o -type f -name '[0-9]*.' \) -print0 |
    tar --create --null --no-recursion --ignore-failed-read --warning=no-file-removed --files-from=-
"""

# Frozen, not stopped: its sessions notice a pause and no more. What is on disk then is what a crash would leave, and
# every start of an instance puts that right (ctl_cyrusdb -r). The timer lets it go on also if this shell is killed.
_REST = r"""
set -eu
cd /srv/store/{store}
unit=cyrus@{store}.service
if systemctl --quiet is-active $unit; then
    systemd-run --quiet --collect --on-active={seconds} --unit=posthouse-thaw-{store} systemctl thaw $unit
    trap "systemctl thaw $unit; systemctl stop posthouse-thaw-{store}.timer" EXIT
    systemctl freeze $unit
fi
find config sieve spool \( -type d -o -type f \) \
    \( -type d -o ! -path 'spool/*' -o ! -name '[0-9]*.' -o -cnewer /run/posthouse/copy-{store} \) \
    ! -path 'config/socket/*' ! -path 'config/sync/*' ! -path 'config/proc/*' ! -path 'config/lock/*' \
    ! -path 'config/db.backup*' ! -path config/deliver.db ! -name '*.NEW' -print0 |
    tar --create --null --no-recursion --ignore-failed-read --files-from=-
"""

_INTO = "mkdir -p {place} && cd {place} && tar --extract --preserve-permissions"


class Copied(NamedTuple):
    """What a copy took."""

    mib: float
    seconds: float
    still: float  # seconds that the source stood still, or less

    @property
    def rate(self) -> float:
        """MiB/s."""
        return self.mib / self.seconds


def sizes(remote: Remote, node: str, stores: list[str]) -> dict[str, int]:
    """MiB of each store's data on a node."""
    names = " ".join(f"/srv/store/{store}" for store in stores)
    lines = remote.run(node, f"du -sm {names}", timeout=3600).splitlines() if stores else []
    return {path.rpartition("/")[2]: int(mib) for mib, path in (line.split() for line in lines)}


def copy(remote: Remote, store: str, source: str, target: str) -> Copied:
    """Copies a store to a node on which it does not run; what is there of it before is removed. Raises RemoteError."""
    place = f"/srv/store/{store}"
    clean = f"rm -rf {place} && mkdir -p /srv/store && install -d -o cyrus -g mail -m 0750 {place}"
    remote.run(target, clean, timeout=3600)
    into = _INTO.format(place=place)
    started = time.monotonic()
    remote.pipe(source, _BULK.format(store=store), target, into)
    middle = time.monotonic()
    remote.pipe(source, _REST.format(store=store, seconds=STILL_SECONDS), target, into)
    still = time.monotonic() - middle
    remote.run(target, f"sync -f {place}", timeout=3600)
    remote.run(source, f"rm -f /run/posthouse/copy-{store}")
    seconds = time.monotonic() - started
    return Copied(sizes(remote, target, [store])[store], seconds, still)


def raw(remote: Remote, store: str, source: str, target: str) -> Copied:
    """The same files copied without any care, into a folder that is removed again: what the machines can do at best."""
    place = f"/srv/store/{store}.raw"
    started = time.monotonic()
    remote.pipe(
        source,
        f"tar --create --ignore-failed-read --exclude=config -C /srv/store/{store} .",
        target,
        _INTO.format(place=place),
    )
    remote.run(target, f"sync -f {place}", timeout=3600)
    seconds = time.monotonic() - started
    mib = sizes(remote, target, [f"{store}.raw"])[f"{store}.raw"]
    remote.run(target, f"rm -rf {place}", timeout=3600)
    return Copied(mib, seconds, 0)


def report(copied: Copied, beside: Copied | None) -> dict[str, Any]:
    """A copy in numbers, and the raw one beside it if that was measured."""
    found: dict[str, Any] = {"mib": copied.mib, "seconds": round(copied.seconds, 1), "mib_per_s": round(copied.rate, 1)}
    found["still_seconds"] = round(copied.still, 1)
    if beside:
        found |= {"raw_mib_per_s": round(beside.rate, 1), "of_raw": round(copied.rate / beside.rate, 2)}
    return found
