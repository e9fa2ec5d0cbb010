"""The lab: a site's nodes as containers on this machine, in network namespaces of their own; some as QEMU machines.

    lab.ensure_requirements()           installs what the controller lacks
    lab.up(site, secrets)               images built, all nodes running, sshd answering on each
    lab.down(name)                      nothing is left
    lab.status(name)                    [{"name", "address", "state", "pid", "image"}]
    lab.kill(name, node), start(…)      power cut, and power back
    lab.add(site, secrets, node, …)     some nodes more, the others are not touched
    lab.running(name)                   whether its network is there
    lab.wipe(name, node)                a node and its disk are gone
    lab.enter(name)                     this process now sees the lab's network, as the site's controller
    lab.command(name, node)             what to put before a command to run it on a node, without ssh
    lab.refresh(site, secrets)          DNS as the site says now
    lab.hub(site, secrets)              the lab's network without any node
    lab.provide(site)                   the server that machines boot from; lab.power_on(site, node) boots one

Each may be killed at any moment; running it again, or `down`, puts things right.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posthouse import image, provision
from posthouse import secrets as vault
from posthouse.lab import dns, machine, network, processes, updates
from posthouse.lab import node as nodes
from posthouse.lab.layout import RUNTIME, LabError, Layout, run
from posthouse.lab.requirements import ensure as ensure_requirements
from posthouse.model import Site
from posthouse.provision.records import READING, Records
from posthouse.secrets import Secrets
from posthouse.strict import did_you_mean

__all__ = [
    "LabError",
    "add",
    "command",
    "down",
    "ensure_requirements",
    "enter",
    "hub",
    "kill",
    "power_on",
    "provide",
    "refresh",
    "running",
    "shell",
    "start",
    "status",
    "up",
    "wipe",
]

log = logging.getLogger(__name__)

INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
LEAST_MEMORY_GIB = 1.5  # of a machine that carries every mail tier
# Emulated, a machine is installed in a minute or two; ten are for one that shares its processors with much else.
INSTALL_SECONDS = 600
BOOT_SECONDS = 90  # a node boots in two; a machine busy with other things takes its time


def up(site: Site, secrets: Secrets, vms: Collection[str] = (), efi: bool = False) -> dict[str, str]:
    """Makes the lab what the site says: {node: "kept", "started" or "made"}. Raises LabError, ImageError, ContactError.

    Nodes that run stay as they are, those that died are started with what they kept, those that the site does not name
    any more go. Returns when sshd answers on each. The nodes of `vms`, and those that were machines before, are QEMU
    machines: a new one has a blank disk and is installed from the network, by UEFI if `efi`.
    """
    if not site.lab:
        raise LabError(f"{site.name}: not a site of the lab; give it a `lab:` section, as inventory/lab/site.yml has")
    layout = Layout(site.name)
    if network.entered(layout.namespace):
        raise LabError(f"{site.name}: `up` needs the machine's own network; call it before `enter`, or use `start`")
    for name in vms:
        _may_be_machine(layout, site, name)
    images = image.build_all(site)
    # Each node's systemd watches files; the kernel's default, for one user's desktop, is used up by some twenty nodes.
    if int(INOTIFY.read_text()) < 8192:
        INOTIFY.write_text("8192")
    with _locked(layout):
        _hub(layout, site, secrets)
        for gone in set(layout.nodes) - set(site.nodes):
            nodes.stop(layout, gone)
            shutil.rmtree(layout.node_state(gone))
            log.info("%s: removed", gone)
        machines = {name for name in site.nodes if name in vms or machine.load(layout, name)}
        containers = [name for name in site.nodes if name not in machines]
        for name in containers:
            if "private" not in secrets.ssh["host_keys"][name]:  # it was a machine, which kept its key to itself
                vault.forget_host_key(site, site.nodes[name])
                secrets = vault.load(site)
        outcomes = dict(_each(functools.partial(_bring, layout, site, secrets, images), containers))
    if machines:
        provide(site)
        outcomes |= dict(_each(functools.partial(_bring_machine, layout, site, efi), sorted(machines)))
    return outcomes


def _may_be_machine(layout: Layout, site: Site, name: str) -> None:
    """Raises LabError with what keeps a node from being a QEMU machine."""
    if name not in site.nodes:
        raise LabError(f"{name}: no such node in {site.name}; {did_you_mean(name, site.nodes)}")
    if not site.nodes[name].mac:
        raise LabError(f"{name}: a machine needs a MAC address; give it one in site.yml: nodes.{name}.mac")
    if name in layout.nodes and not machine.load(layout, name):
        fix = f"end the lab first, with all that its nodes keep: posthouse lab down {site.name}"
        raise LabError(f"{name}: is a container of this lab, and would lose what it keeps; {fix}")


def hub(site: Site, secrets: Secrets) -> None:
    """The controller's side of a lab, for machines that need no other node. Raises LabError."""
    layout = Layout(site.name)
    with _locked(layout):
        _hub(layout, site, secrets)


def provide(site: Site) -> None:
    """Has `posthouse provision serve` run in the lab for this very site; waits until it answers. Raises LabError."""
    layout = Layout(site.name)
    group = layout.services / "provision"
    file = layout.state / "provision.log"
    served, wanted = layout.state / "provision.site", site.model_dump_json()
    running = processes.running(group)
    changed = running and served.exists() and served.read_text() != wanted
    if changed:
        _await_readers(layout, site)
    if changed or not running:
        processes.end(group)
        served.write_text(wanted)
        processes.spawn(group, [sys.executable, "-m", "posthouse", "provision", "serve", site.name], file)
    port = site.provision.https_port
    complaint = f"{site.name}: provision serve does not answer; {file} says why"
    processes.until(
        lambda: not processes.running(group) or network.answers(layout, str(site.network.controller), port),
        600,
        complaint,
    )
    if not processes.running(group):
        raise LabError(complaint)


def _await_readers(layout: Layout, site: Site) -> None:
    """Waits until no machine that runs is being installed by the server, which is then ended. Raises LabError."""
    records = Records(site)
    complaint = (
        f"{site.name}: its site file was changed while machines are being installed; when posthouse provision status "
        f"{site.name} says that they are, run this again"
    )
    processes.until(
        lambda: not any(record.phase in READING and nodes.healthy(layout, record.node) for record in records.all()),
        INSTALL_SECONDS,
        complaint,
    )


def power_on(site: Site, name: str, hardware: machine.Machine | None = None) -> None:
    """Switches a machine of the lab on, a new one with blank disks if its `hardware` is given. Returns at once."""
    layout = Layout(site.name)
    with _locked(layout):
        if hardware:
            nodes.stop(layout, name)
            machine.make(layout, name, hardware)
            nodes.note(layout, _wired(site, name))
        found = machine.load(layout, name)
        if not found:
            raise LabError(
                f"{name}: no machine of the lab {site.name}; make one with: posthouse lab up {site.name} --vm {name}"
            )
        nodes.stop(layout, name)
        machine.power_on(layout, name, found)


def add(site: Site, secrets: Secrets, *names: str) -> dict[str, str]:
    """Brings nodes up and lets all others be: {node: "kept", "started" or "made"}. Raises LabError.

    The images of their classes must be there before `enter`: see image.build.
    """
    layout = Layout(site.name)
    images = {klass: image.build(site, klass) for klass in {site.nodes[name].klass for name in names}}
    with _locked(layout):
        if not network.exists(layout.namespace):
            raise LabError(f"{site.name}: the lab is down; start it with: posthouse lab up {site.name}")
        dns.start(layout, site, secrets)
        return dict(_each(functools.partial(_bring, layout, site, secrets, images), names))


def running(name: str) -> bool:
    """Whether a lab's network is there, and so `enter` and `add` will do."""
    return network.exists(Layout(name).namespace)


def wipe(name: str, node: str) -> None:
    """Ends a node and removes all that it kept, as if its disk had died and been thrown away."""
    layout = Layout(name)
    with _locked(layout):
        nodes.stop(layout, node)
        if layout.node_state(node).exists():
            shutil.rmtree(layout.node_state(node))


def refresh(site: Site, secrets: Secrets) -> None:
    """Brings the zones of a running lab to what the site says now."""
    layout = Layout(site.name)
    with _locked(layout):
        dns.start(layout, site, secrets)


def down(name: str) -> None:
    """Ends a lab and removes everything of it, found by name: also one that is half there, or whose notes are lost."""
    layout = Layout(name)
    with _locked(layout):
        for node in layout.nodes:
            nodes.drop_writes(layout, node)  # nobody will read it again, so nobody need wait for it
        processes.end(layout.cgroup)
        for namespace in network.of_lab(layout):
            processes.end_by_namespace(network.pids(namespace))
            network.remove(namespace)
        with contextlib.suppress(LabError):
            processes.until(lambda: not nodes.loops(layout.state), 10, "")
        for device in nodes.loops(layout.state):
            run(["losetup", "--detach", device])
        for folder in (layout.state, layout.runtime, layout.resolver):
            if folder.exists():
                shutil.rmtree(folder)


def status(name: str) -> list[dict[str, Any]]:
    """The nodes of a lab: [{"name", "address", "state": running|stopped, "pid": of its systemd, or None, "image"}]."""
    layout = Layout(name)
    return [
        {
            "name": node,
            "address": nodes.load(layout, node).address,
            "state": "running" if nodes.healthy(layout, node) else "stopped",
            "pid": processes.leader(layout.node_cgroup(node)) or next(processes.pids(layout.node_cgroup(node)), None),
            "image": "its disk" if machine.load(layout, node) else (layout.node_state(node) / "image").readlink().name,
        }
        for node in layout.nodes
    ]


def kill(name: str, node: str) -> None:
    """Cuts the power of a node: nothing is shut down, and what /srv had not yet written is lost."""
    layout = Layout(name)
    with _locked(layout):
        nodes.load(layout, node)
        network.unplug(layout, node)
        nodes.drop_writes(layout, node)
        nodes.stop(layout, node)


def start(name: str, node: str) -> None:
    """Boots a node that does not run, with what it kept, and waits for its sshd."""
    layout = Layout(name)
    with _locked(layout):
        loaded = nodes.load(layout, node)
        if nodes.healthy(layout, node):
            return
        found = machine.load(layout, node)
        if found:
            nodes.stop(layout, node)
            machine.power_on(layout, node, found)
        else:
            _boot(layout, loaded)


def shell(name: str, node: str) -> int:
    """A root shell on a node; in a container also where its sshd is dead. Returns the shell's exit status."""
    if machine.load(Layout(name), node):
        enter(name)
        return subprocess.run(["ssh", "-F", RUNTIME / name / "ssh" / "config", node], check=False).returncode
    return subprocess.run([*command(name, node), "bash", "--login"], check=False).returncode


def command(name: str, node: str) -> list[str]:
    """What to put before a command to run it on a node as root, without ssh. Raises LabError if it does not run."""
    layout = Layout(name)
    leader = processes.leader(layout.node_cgroup(nodes.load(layout, node).name))
    if not leader and machine.load(layout, node):
        raise LabError(
            f"{name}: {node} is a machine, which can be reached by ssh alone: posthouse lab shell {node} --site {name}"
        )
    if not leader:
        raise LabError(f"{name}: {node} does not run; start it with: posthouse lab up {name}")
    clean = [
        "env",
        "-i",
        "HOME=/root",
        "LANG=C.UTF-8",
        f"TERM={os.environ.get('TERM', 'dumb')}",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]
    return ["nsenter", f"--target={leader}", "--all", "--wdns=/root", *clean]


def enter(name: str) -> None:
    """Moves this process, and what it starts from now on, into the lab's network, where it is the site's controller.

    Call it before any thread is started. Names are still looked up where the machine does; sockets may bind any
    address of `lab.outside` to speak as a stranger.
    """
    network.enter(Layout(name).namespace)


def _hub(layout: Layout, site: Site, secrets: Secrets) -> None:
    """The controller's side of the lab: its network, name server and updates."""
    assert site.lab
    controller = str(site.network.controller)
    addresses = list(dict.fromkeys([controller, str(site.network.gateway or controller)]))
    if network.make_hub(layout, addresses, site.network.cidr.prefixlen, str(site.lab.outside)):
        processes.end(layout.services)  # those of a hub that is no more
    layout.resolver.mkdir(parents=True, exist_ok=True)
    (layout.resolver / "resolv.conf").write_text(f"nameserver {controller}\nsearch {site.domain}\n")
    dns.start(layout, site, secrets)
    updates.start(layout, controller)


def _bring(layout: Layout, site: Site, secrets: Secrets, images: dict[str, Path], name: str) -> tuple[str, str]:
    """Brings one node up: (its name, what had to be done)."""
    node = _wired(site, name)
    keys = nodes.Keys(authorized=secrets.ssh["public"], **secrets.ssh["host_keys"][name])
    if name not in layout.nodes:
        nodes.stop(layout, name)
        assert site.lab
        resolvers = [str(address) for address in site.network.resolvers]
        nodes.make(layout, node, images[site.nodes[name].klass], keys, resolvers, site.lab.srv_mib)
        outcome = "made"
    else:
        same = nodes.load(layout, name) == node and nodes.has_keys(layout, name, keys)
        if same and nodes.healthy(layout, name) and nodes.wait_for_ssh(layout, node, 10):
            return name, "kept"
        nodes.stop(layout, name)
        nodes.write(layout, node, keys)
        outcome = "started"
    _boot(layout, node)
    log.info("%s: up", name)
    return name, outcome


def _wired(site: Site, name: str) -> nodes.Node:
    return nodes.Node(
        name=name,
        fqdn=site.nodes[name].fqdn,
        address=site.nodes[name].address,
        prefixlen=site.network.cidr.prefixlen,
        gateway=str(site.network.gateway or site.network.controller),
        interface=site.network.interface,
    )


def _bring_machine(layout: Layout, site: Site, efi: bool, name: str) -> tuple[str, str]:
    """Brings one machine up, installed if it is a new one: (its name, what had to be done)."""
    outcome = "kept"
    records = Records(site)
    # One that stands there refused is switched off and on: what it was refused for may be mended by now.
    if not nodes.healthy(layout, name) or records.read(name).reason:
        known = machine.load(layout, name)
        outcome = "started" if known else "made"
        with records.change(name) as record:
            record.reason = ""
            record.installed &= not record.armed  # at this boot it is installed anew, and has another host key then
        power_on(site, name, None if known else hardware(site, name, efi))
    try:
        with network.inside(layout.namespace):
            provision.reach(site, name, INSTALL_SECONDS, lambda: nodes.healthy(layout, name))
    except provision.ProvisionError as error:
        raise LabError(f"{error}\n  its console: {layout.node_state(name) / 'console'}") from None
    log.info("%s: up", name)
    return name, outcome


def hardware(site: Site, name: str, efi: bool = False) -> machine.Machine:
    """A machine that fits a node's class."""
    node = site.nodes[name]
    assert node.mac
    install = site.classes[node.klass].install
    # What runs from memory has its system there, too.
    memory = max(install.memory_gib, LEAST_MEMORY_GIB + (install.method == "diskless"))
    disks = tuple((site.least_disk_gib(node.klass), f"{name}-{number}") for number in range(1 + install.mirror))
    return machine.Machine(node.mac, efi, round(memory * 1024), disks)


def _boot(layout: Layout, node: nodes.Node) -> None:
    nodes.boot(layout, node)
    if not nodes.wait_for_ssh(layout, node, BOOT_SECONDS):
        console = layout.node_state(node.name) / "console"
        last = "\n".join(f"  {line}" for line in console.read_text(errors="replace").splitlines()[-8:])
        runs = processes.running(layout.node_cgroup(node.name))
        state = "its sshd does not answer" if runs else "it ended while it booted"
        raise LabError(f"{node.name}: {state}; {console} ends with:\n{last}")


def _each(function: Callable[[str], tuple[str, str]], names: Iterable[str]) -> list[tuple[str, str]]:
    """Runs a function for all nodes side by side; if some fail, all are finished first, and then said in one error."""
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(function, name) for name in names]
    errors = [str(future.exception()) for future in futures if future.exception()]
    unexpected = [error for future in futures if (error := future.exception()) and not isinstance(error, LabError)]
    if unexpected:
        raise unexpected[0]
    if errors:
        raise LabError("\n".join(errors))
    return [future.result() for future in futures]


@contextlib.contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    """One command at a time works on a lab; another one waits. The lock's file goes with the lab."""
    RUNTIME.mkdir(parents=True, exist_ok=True)
    file = Path(f"{layout.runtime}.lock")
    while True:
        with file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever held it before may have removed it: then this is not the lock that others see.
            if not file.exists() or not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                continue
            try:
                yield
            finally:
                if not layout.state.exists():
                    file.unlink()
            return
