"""Provisioning: bare machines boot from this controller and become nodes of a site.

provision.serve(site)               DHCP, TFTP, HTTP and HTTPS until it is stopped
provision.status(site)              how far each machine is, with timings
provision.arm(site, node)           lets a machine be installed again, over what is on its disks
provision.reach(site, node, …)      first contact: waits until a machine is installed and lets us in
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posthouse import PosthouseError, contact, plan, secrets
from posthouse.machines import SOURCES
from posthouse.model import Node, Site
from posthouse.provision import bootfiles, debian_installer, dhcp, media, neighbours, server
from posthouse.provision.disks import Disk
from posthouse.provision.records import Record, Records
from posthouse.sitefile import foreign_macs

log = logging.getLogger(__name__)


class ProvisionError(PosthouseError):
    """What keeps machines from being provisioned: where, what, and what to do."""


def prepare(site: Site) -> dict[str, media.Media]:
    """Makes what the site's machines are installed from: {class: media}. Classes with an installer have no media.

    Raises ProvisionError, ImageError, MediaError, InstallerError.
    """
    methods = {node.klass: site.classes[node.klass].install.method for node in _machines(site)}
    if "preseed" in methods.values():
        debian_installer.make()
    return {name: media.make(site, name) for name, method in methods.items() if method not in SOURCES}


def serve(site: Site, made: dict[str, media.Media]) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP. To be called in the network of the site's machines.

    Raises ProvisionError, SiteError.
    """
    asyncio.run(_serve(server.Server(site, secrets.ensure(site), made, Records(site), foreign_macs(site))))


async def _serve(serving: server.Server) -> None:
    site = serving.site
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # under nohup
            continue
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        runners = await server.run(serving, str(site.network.controller))
    except OSError as error:
        raise ProvisionError(
            f"{site.network.controller}: {error.strerror}; `serve` runs on the machine that network.controller names, "
            "once, with provision.http_port and https_port free"
        ) from None
    neighbours.listen(str(site.network.controller), serving.by_mac)
    command = dhcp.prepare(site)
    dnsmasq = await asyncio.create_subprocess_exec(*command, preexec_fn=os.setpgrp)
    log.info("%s: serving %d machines at %s", site.name, len(serving.by_mac), site.network.controller)
    ended = asyncio.create_task(dnsmasq.wait())
    await asyncio.wait([ended, asyncio.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
    crashed = ended.done()
    if not crashed:
        dnsmasq.terminate()
        await dnsmasq.wait()
    for runner in runners:
        with contextlib.suppress(OSError):
            await runner.cleanup()
    if crashed:
        raise ProvisionError("dnsmasq ended; what it says stands above: is another DHCP server on this machine?")


def write_files(site: Site, out: Path) -> int:
    """Writes every boot file that `serve` gives to machines into a new or empty folder; returns how many.

    Beside them are the answers for all installers, for each class. Tokens read `bootfiles.TOKEN`, and key and CA are
    made for the occasion. Raises ProvisionError, SiteError.
    """
    plan.check_empty(out)
    _machines(site)
    opened = secrets.placeholders(site)
    files = bootfiles.files(site, opened) | bootfiles.by_installers(site, opened)
    files["dnsmasq.conf"] = dhcp.config(site, Path("/FOLDER"))
    return plan.write_files(out, {name: {"content": text, "mode": "0644"} for name, text in files.items()})


def status(site: Site) -> list[dict[str, Any]]:
    """Every machine: [{"node", "mac", "phase", "since", "reason", "armed", "attempts", "disks", "seconds"}].

    since: seconds that it has been in its phase. seconds: what each earlier phase of the last installation took.
    Machines that booted here and are no nodes come last: their node is None, and their phase `no node`.
    """
    records = Records(site)
    strangers = [_row(_stranger(mac, *found)) | {"node": None} for mac, found in records.strangers().items()]
    return [*map(_row, records.all()), *strangers]


def _stranger(mac: str, when: float, whose: str) -> Record:
    reason = f"it is {whose}, and no machine of this one" if whose else "no node has this MAC address"
    return Record("", mac, "no node", f"{reason}: it got the menu, and nothing was written", [("no node", when)])


def _row(record: Record) -> dict[str, Any]:
    since = time.time() - record.phases[-1][1] if record.phases else None
    return {
        "node": record.node,
        "mac": record.mac,
        "phase": record.phase,
        "since": None if since is None else round(since, 1),
        "reason": record.reason,
        "armed": record.armed,
        "attempts": record.attempts,
        "disks": [f"{disk['name']} {disk['model']} {disk['serial']}".strip() for disk in record.disks],
        "seconds": record.seconds(),
    }


def target(site: Site, node: str) -> str:
    """What `arm` gives up, in words: the disks that the machine was last seen with, or the rule for them.

    Raises ProvisionError.
    """
    _machine(site, node)
    record = Records(site).read(node)
    if record.disks:
        return ", ".join(str(Disk(**disk)) for disk in record.disks)
    rule = site.classes[site.nodes[node].klass].install.disk
    said = {"at least": rule.min_gib, "at most": rule.max_gib, "model": rule.model, "serial": rule.serial}
    words = ", ".join(f"{name} {value}" for name, value in said.items() if value)
    return f"the disk that fits its class's rule ({words or 'large enough for its file systems'})"


def arm(site: Site, node: str) -> None:
    """Lets a machine be installed at its next boot, over what is on the disks of `target`. Raises ProvisionError."""
    _machine(site, node)
    with Records(site).change(node) as record:
        record.armed = True


def reach(site: Site, node: str, seconds: float, on: Callable[[], bool] = lambda: True) -> None:
    """Waits until a machine is installed and lets the site's key in, by the host key that it reported; notes that.

    seconds: for each of the two. on: whether it still runs, where that can be known. Raises ProvisionError with what
    its record says, ContactError.
    """
    records = Records(site)
    deadline = time.monotonic() + seconds
    while not (record := records.read(node)).installed:
        if record.reason or time.monotonic() > deadline or not on():
            raise ProvisionError(f"{node}: {record.reason or f'it went no further than: {record.phase}'}")
        time.sleep(1)
    contact.wait(site.nodes[node], secrets.load(site), seconds)
    with records.change(node) as record:
        record.enter("reached")


def _machines(site: Site) -> list[Node]:
    nodes = [node for node in site.nodes.values() if node.mac]
    if not nodes:
        raise ProvisionError(f"{site.name}: no node has a MAC address; give its machines' in site.yml: nodes.NAME.mac")
    return nodes


def _machine(site: Site, node: str) -> None:
    if node not in site.nodes:
        raise ProvisionError(f"{node}: no such node in {site.name}; its nodes are {', '.join(site.nodes)}")
    if not site.nodes[node].mac:
        raise ProvisionError(f"{node}: has no MAC address in site.yml, so it is not installed from here; give it one")
