"""What machines are given when they boot: iPXE scripts, and the answers for the distributions' own installers.

Rendered from templates/boot. A script is made for one boot, and a one-time token is on its kernel's command line.
Answers have none, so anybody may fetch them: they hold the site's public key and nothing that is secret.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any

import jinja2

from posthouse import roles
from posthouse.model import Node, Site
from posthouse.secrets import Secrets

TOKEN = "ONE-TIME-TOKEN"  # where a script is rendered for reading
FIRMWARES = ("pcbios", "efi")  # iPXE's own names, in its ${platform}
# What the boot loader needs: 1 MiB for its code, or a file system for the firmware; and kernels where it can read them.
EFI_MIB, BOOT_MIB = 512, 1024
# How distributions' installers are asked to do it, for reading; a site names a mirror of its own.
INSTALLERS: dict[str, dict[str, Any]] = {
    "debian13": {"method": "preseed", "source": "http://mirror.example.org/debian", "release": None},
    **{
        f"el{release}": {
            "method": "kickstart",
            "source": f"http://mirror.example.org/{release}/BaseOS/x86_64/os",
            "release": release,
        }
        for release in (9, 10)
    },
}


def plain(site: Site) -> str:
    """Where boot files are: what is public, or is checked by its digest."""
    return f"http://{site.network.controller}:{site.provision.http_port}"


def trusted(site: Site) -> str:
    """Where machines report."""
    return f"https://{site.network.controller}:{site.provision.https_port}"


def first_script(site: Site) -> str:
    """The iPXE script that every machine gets first: it asks for the machine's own."""
    return render("first.ipxe.j2", server=plain(site))


def menu_script(site: Site, mac: str, whose: str = "") -> str:
    """The iPXE script of a machine that is no node of the site: a menu, of which nothing does harm.

    whose: the node of another site that it is.
    """
    return render("menu.ipxe.j2", site=site.name, mac=mac, whose=whose)


def local_script(site: Site, node: Node) -> str:
    """The iPXE script of a machine that is installed: it starts from its disk."""
    image = site.classes[node.klass].install.method == "image"
    return render("local.ipxe.j2", node=node, image=image, server=plain(site))


def boot_script(site: Site, node: Node, opened: Secrets, token: str) -> str:
    """The iPXE script that installs a machine, or runs it without a disk, as its class says."""
    method = site.classes[node.klass].install.method
    template = method if method in ("preseed", "kickstart") else "image"
    return render(f"{template}.ipxe.j2", words=_words(site, node, opened, token), **_variables(site, node))


def answers(site: Site, node: Node, opened: Secrets) -> dict[str, str]:
    """The answers for the installer of a node, by file name; none where its class needs no installer."""
    method = site.classes[node.klass].install.method
    variables = _variables(site, node) | {"authorized": opened.ssh["public"].strip()}
    suffix, template = {"preseed": ("preseed", "debian.preseed.j2"), "kickstart": ("ks", "rhel.ks.j2")}.get(
        method, ("", "")
    )
    if not template:
        return {}
    made = {
        f"{node.name}-{firmware}.{suffix}": render(template, **variables, **_storage(site, node, firmware))
        for firmware in FIRMWARES
    }
    return made | ({f"{node.name}.sh": render("debian.sh.j2", **variables)} if method == "preseed" else {})


def files(site: Site, opened: Secrets) -> dict[str, str]:
    """Every boot file of a site by name, with a placeholder for the one-time tokens."""
    made = {"boot.ipxe": first_script(site), "menu.ipxe": menu_script(site, "02:00:00:00:00:00")}
    for node in site.nodes.values():
        if node.mac:
            made[f"{node.name}-install.ipxe"] = boot_script(site, node, opened, TOKEN)
            made[f"{node.name}-local.ipxe"] = local_script(site, node)
            made |= answers(site, node, opened)
    return made


def by_installers(site: Site, opened: Secrets) -> dict[str, str]:
    """The answers with which every installer would install each class of machines, whatever the class's own method is.

    They are those of the class's first machine, as `CLASS.SYSTEM-FIRMWARE.ks`; a node's name has no dot.
    """
    made = {}
    for klass, node in {node.klass: node for node in reversed(site.nodes.values()) if node.mac}.items():
        for system, how in INSTALLERS.items():
            for name, text in answers(_installed_by(site, klass, how), node, opened).items():
                made[f"{klass}.{system}{name.removeprefix(node.name)}"] = text
    return made


def _installed_by(site: Site, klass: str, how: dict[str, Any]) -> Site:
    """The site with a class that is installed in another way, with its disks as they are."""
    entry = site.classes[klass]
    install = entry.install.model_copy(update=how)
    return site.model_copy(update={"classes": site.classes | {klass: entry.model_copy(update={"install": install})}})


def render(template: str, **variables: Any) -> str:
    """A template of templates/boot."""
    return _environment().get_template(template).render(variables)


def _words(site: Site, node: Node, opened: Secrets, token: str) -> str:
    """What a machine knows from its kernel's command line: who it is, and whom it may believe."""
    network = site.network
    words = {
        "node": node.name,
        "mac": node.mac,
        "address": f"{node.address}/{network.cidr.prefixlen}",
        "gateway": network.gateway or network.controller,
        "plain": plain(site),
        "server": trusted(site),
        "ca": hashlib.sha256(opened.ca_cert.encode()).hexdigest(),
        "token": token,
    }
    return " ".join(f"posthouse.{name}={value}" for name, value in words.items())


def _variables(site: Site, node: Node) -> dict[str, Any]:
    network, install = site.network, site.classes[node.klass].install
    scheme, _, rest = (install.source or "").partition("://")
    host, _, folder = rest.partition("/")
    return {
        "node": node,
        "bootif": f"01-{(node.mac or '').replace(':', '-')}",
        "domain": site.domain,
        "netmask": str(network.cidr.netmask),
        "gateway": str(network.gateway or network.controller),
        "resolvers": [str(address) for address in network.resolvers],
        "interface": network.interface,
        "server": plain(site),
        "install": install,
        "mirror": {"scheme": scheme, "host": host, "folder": f"/{folder}"},
        "proxy": f"http://{network.controller}:3142" if site.lab else "",
    }


def _storage(site: Site, node: Node, firmware: str) -> dict[str, Any]:
    """How the disks are divided: {"partitions", "volumes": [{"name", "at", "mib", "mb", "grow"}], "disks": numbers}.

    Debian's installer counts in MB, the other in MiB. `at` is a mount point, or what stands in its place; volumes are
    in the last partition, where the class wants LVM.
    """
    install = site.classes[node.klass].install
    efi = _area("efi", "/boot/efi", EFI_MIB)
    bios = _area("bios", "biosboot", 1)
    boot = _area("boot", "/boot", BOOT_MIB)
    root = _area("root", "/", round(install.root_gib * 1024))
    srv = _area("srv", "/srv", 1024, grow=True)
    # A little more than its volumes' least, for LVM's own use.
    pool = _area("pool", "lvm", root["mib"] + 1088, grow=True)
    first = [efi if firmware == "efi" else bios, boot]
    return {
        "firmware": firmware,
        "partitions": [*first, pool] if install.lvm else [*first, root, srv],
        "volumes": [root, srv] if install.lvm else [],
        "disks": [1, 2] if install.mirror else [1],
    }


def _area(name: str, at: str, mib: int, grow: bool = False) -> dict[str, Any]:
    return {"name": name, "at": at, "mib": mib, "mb": math.ceil(mib * 2**20 / 1e6), "grow": grow}


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(roles.ROOT / "templates" / "boot"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
