"""`posthouse drill`: the last backup restored into an isolated lab, and compared with the live data.

It measures what a disaster would cost: RTO, the seconds from nothing to restored mail, and RPO, how old the backup was
and what came since. Reports lie in /var/lib/posthouse/drills/SITE; `status` says if the last one is young and good.
"""

from __future__ import annotations

import json
import shutil
import ssl
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha1
from pathlib import Path
from typing import Any

import yaml

from posthouse import lab, run, secrets, sitefile
from posthouse.apart import apart
from posthouse.directory import Directory
from posthouse.lab.layout import STATE
from posthouse.model import Site
from posthouse.ops import backup, restore
from posthouse.ops.imap import Session
from posthouse.ops.past import MIB
from posthouse.ops.rebuild import FILL
from posthouse.ops.repository import BackupError, Repository

REPORTS = Path("/var/lib/posthouse/drills")
OUTSIDE = "198.51.100.0/24"
SRV_MIB = 8192  # a sparse file: what is not filled costs nothing
Say = Callable[[str], None]
# {store: {address: {folder: {GUID: how often}}}}
Mail = dict[str, dict[str, dict[str, dict[str, int]]]]


def small(site: Site, mail: int) -> dict[str, Any]:
    """The site file of the lab that stands in for a site, all of its stores on one node. mail: MiB of it."""
    network = {
        "cidr": str(site.network.cidr),
        "controller": str(site.network.controller),
        "nodes": f"{site.network.nodes}",
        "stores": f"{site.network.stores}",
        "resolvers": [str(site.network.controller)],
    }
    clamav = f"http://{site.network.controller}/clamav/lab.ndb"
    return {
        "name": name(site),
        "domains": list(site.domains),
        "network": network,
        "nodes": {"lb[1:2]": {"class": "lb"}, "mail1": {"class": "mail"}},
        "vips": {key: str(address) for key, address in site.vips.items()},
        "directory": {"providers": ["mail1"]},
        "stores": {key: {"primary": "mail1"} for key in site.stores},
        "filter": {"signature_urls": [clamav]},
        "lab": {"outside": OUTSIDE, "srv_mib": SRV_MIB + 3 * mail},
    }


def name(site: Site) -> str:
    """What the drill's lab is called."""
    return f"drill-{site.name}"[:31].rstrip("-")


def drill(site: Site, *, at: str | None = None, check: bool = False, keep: bool = False, say: Say) -> dict[str, Any]:
    """Restores a backup into a lab, compares, writes the report, and takes the lab down unless `keep`.

    Returns the report; see `report`. Raises BackupError before anything is done if there is no backup, and Busy if
    there is a drill already: both would be in the lab of that name.
    """
    repository = Repository(site, secrets.load(site))
    repository.require()
    with run.exclusive(site, "drill"):
        return _drill(site, repository, at, check, keep, say)


def _drill(site: Site, repository: Repository, at: str | None, check: bool, keep: bool, say: Say) -> dict[str, Any]:
    began = datetime.now(UTC)
    chosen = backup.choose(site, backup.backups(repository), at)[0]
    with run.exclusive(site):  # for as long as it is looked at, no backup is made
        damage = repository.damage()
    if damage and not check:
        # Nothing has to be restored to know how that would end, and `status` is to say so.
        result = report(chosen.name, chosen.time, began, {}, f"the repository is damaged: {damage[0]}", {})
        write(site, result)
        return result
    if damage:
        raise BackupError(f"{repository.place}: damaged: {damage[0]}; put it back from a copy; nothing was changed")
    listed = backup.manifest(repository, chosen)["parts"]
    mail = sum(part["bytes"] for part in listed if part["name"].startswith("store:")) // MIB + 1
    _need_room(site, mail)
    say(f"{chosen.name} into the lab {name(site)}: all stores on one node, compared message by message")
    if check:
        return {"backup": chosen.name, "lab": name(site), "check": True}
    folder = sitefile.INVENTORY / name(site)
    work = REPORTS / site.name / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, mode=0o700)
    seconds: dict[str, float] = {}
    failed = ""
    try:
        lab.down(name(site))
        folder.mkdir(exist_ok=True)
        (folder / "site.yml").write_text(yaml.safe_dump(small(site, mail), sort_keys=False))
        stand_in = sitefile.load(name(site))
        steps: dict[str, Callable[[], bool]] = {
            "machines": partial(_up, stand_in),
            "deploy": partial(_deploy, stand_in),
            "restore": partial(_restore, stand_in, site, chosen.name, work),
            "read what came back": partial(read, stand_in, work / "restored.json", True),
            "read the live data": partial(read, site, work / "live.json", False),
        }
        for step, act in steps.items():
            started = time.monotonic()
            # In processes of their own: each enters one lab's network for good.
            good = apart(act)
            seconds[step] = round(time.monotonic() - started, 1)
            say(f"{step}: {seconds[step]} s")
            if not good:
                failed = f"{step} failed; what went wrong is above"
                break
        data = {} if failed else {key: json.loads((work / f"{key}.json").read_text()) for key in ("live", "restored")}
    finally:
        if not keep:
            lab.down(name(site))
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    result = report(chosen.name, chosen.time, began, seconds, failed, data)
    write(site, result)
    return result


def _need_room(site: Site, mail: int) -> None:
    """Refuses a drill that this machine has no room for. mail: MiB, which lie there twice while they come back."""
    place = next(folder for folder in (STATE, *STATE.parents) if folder.exists())
    free = shutil.disk_usage(place).free // MIB
    if 2 * mail > free * FILL:
        raise BackupError(
            f"{site.name}: no room for a drill: {mail} MiB of mail lie twice on {place} while they come back, which "
            f"has {free} MiB, of which {FILL:.0%} may be used; make room there; nothing was changed"
        )


def report(
    name: str, taken: datetime, began: datetime, seconds: dict[str, float], failed: str, data: dict[str, Any]
) -> dict[str, Any]:
    """What a drill found.

    {"backup", "time", "ok", "failed": why or "", "rto_seconds", "rpo_seconds", "seconds": {step: s}, and of messages:
    "restored", "equal", "newer" (live, and not in the backup), "gone" (in the backup, and no longer live), "damaged"}.
    """
    counts = compare(data["live"], data["restored"]["mail"]) if data else dict.fromkeys(COUNTED, 0)
    damaged = data["restored"]["damaged"] if data else 0
    if data and not counts["equal"] and counts["newer"]:
        failed = "nothing that is live now came back"
    if damaged:
        failed = f"{damaged} messages came back damaged"
    recovery = sum(value for step, value in seconds.items() if step in ("machines", "deploy", "restore"))
    return {
        "backup": name,
        "time": began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ok": not failed,
        "failed": failed,
        "rto_seconds": round(recovery, 1),
        "rpo_seconds": round((began - taken).total_seconds(), 1),
        "seconds": seconds,
        **counts,
        "damaged": damaged,
    }


COUNTED = ("restored", "equal", "newer", "gone")


def compare(live: Mail, restored: Mail) -> dict[str, int]:
    """How many messages, folder by folder, are in both, in the live data alone, and in what was restored alone."""
    counts = dict.fromkeys(COUNTED, 0)
    for store in live.keys() | restored.keys():
        here, there = live.get(store, {}), restored.get(store, {})
        for address in here.keys() | there.keys():
            mine, back = here.get(address, {}), there.get(address, {})
            for folder in mine.keys() | back.keys():
                one, other = Counter(mine.get(folder, {})), Counter(back.get(folder, {}))
                counts["restored"] += other.total()
                counts["equal"] += (one & other).total()
                counts["newer"] += (one - other).total()
                counts["gone"] += (other - one).total()
    return counts


def write(site: Site, result: dict[str, Any]) -> None:
    """Publishes a report as JSON, and as Markdown for people."""
    folder = REPORTS / site.name
    folder.mkdir(parents=True, exist_ok=True)
    stem = result["time"].replace(":", "").replace("-", "")
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
    steps = "".join(f"| {step} | {value} s |\n" for step, value in result["seconds"].items())
    (folder / f"{stem}.md").write_text(
        f"# Restore drill of {site.name}, {result['time']}\n\n"
        f"{'Passed' if result['ok'] else 'FAILED: ' + result['failed']}. Backup {result['backup']}.\n\n"
        f"- Recovery time (RTO): {result['rto_seconds']} s from no machine at all to restored mail\n"
        f"- Recovery point (RPO): the backup was {result['rpo_seconds']} s old; {result['newer']} messages came since\n"
        f"- {result['restored']} messages restored, {result['equal']} of them as in the live data, "
        f"{result['gone']} that are no longer there, {result['damaged']} damaged\n\n"
        f"| step | time |\n|---|---|\n{steps}"
    )


def status(site: Site, now: datetime | None = None) -> dict[str, Any]:
    """Whether restores are known to work: {"ok", "finding": what is wrong or "", "last": the last report or None}."""
    files = sorted((REPORTS / site.name).glob("*.json"))
    if not files:
        return {"ok": False, "finding": f"no drill yet; run: posthouse drill {site.name}", "last": None}
    last = json.loads(files[-1].read_text())
    age = (now or datetime.now(UTC)) - datetime.strptime(last["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    finding = ""
    if not last["ok"]:
        finding = f"the last drill failed ({last['failed']}); mend that, then run: posthouse drill {site.name}"
    elif age > timedelta(days=site.backup.drill_days):
        allowed = site.backup.drill_days
        finding = f"the last drill is {age.days} days old, and {allowed} are allowed; run: posthouse drill {site.name}"
    return {"ok": not finding, "finding": finding, "last": last}


def _up(site: Site) -> bool:
    lab.ensure_requirements()
    lab.up(site, secrets.ensure(site))
    return True


def _deploy(site: Site) -> bool:
    return bool(run.playbook(site, "deploy", quiet=True)["ok"])


def _restore(stand_in: Site, site: Site, at: str, work: Path) -> bool:
    (work / "restore.json").write_text(
        json.dumps(restore.everything(stand_in, secrets.load(stand_in), source=site, at=at))
    )
    return True


def read(site: Site, path: Path, bytes_too: bool) -> bool:
    """Writes what all mailboxes of a site hold; `bytes_too`: and whether each message's bytes are what Cyrus says."""
    run.reach(site)
    known = secrets.load(site)
    tls = ssl.create_default_context(cadata=known.ca_cert)
    directory = Directory(site, known)
    found: Mail = {}
    damaged = 0
    for account in directory.accounts():
        store = site.stores.get(account.store)
        if store is None:
            raise BackupError(
                f"{account.address}: is on {account.store}, which is no store of {site.name}; write that into site.yml "
                "again, deploy, and run the drill again"
            )
        password = known.passwords["store_proxy"]
        session = Session(store.host, store.address, 993, tls, account.address, "proxy", password)
        folders = found.setdefault(store.name, {}).setdefault(account.address, {})
        for folder in session.folders():
            messages = list(session.messages(folder))
            folders[folder] = dict(Counter(message.digest for message in messages))
            if bytes_too:
                for batch in session.bodies(folder, messages):
                    damaged += sum(sha1(text).hexdigest() != message.digest for message, text in batch)
        session.logout()
    directory.close()
    path.write_text(json.dumps({"mail": found, "damaged": damaged} if bytes_too else found))
    return True
