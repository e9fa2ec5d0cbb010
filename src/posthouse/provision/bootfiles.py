"""What machines are given when they boot: iPXE scripts, and the answers for the distributions' own installers.

Rendered from templates/boot. A script is made for one boot and has a one-time token on its kernel's command line; answers
have none, so they may be fetched by anyone: they hold the site's public key and nothing that is secret.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2

from posthouse import roles
from posthouse.model import Node, Site

TOKEN = "ONE-TIME-TOKEN"  # where a file is rendered for reading
FIRMWARES = ("pcbios", "efi")  # iPXE's own names, in its ${platform}
# What stands in the way of the boot loader: 1 MiB of code for BIOS, or the firmware's own file system; and kernels, where
# every boot loader can read them.
EFI_MIB, BOOT_MIB = 512, 1024


@dataclass(frozen=True)
class Server:
    """Where machines find the server, and how they know that it is the right one."""

    plain: str  # http://10.77.0.1:8480, for what is public or has a digest
    tls: str  # https://10.77.0.1:8481, for what a machine reports
    ca_sha256: str  # of the PEM at PLAIN/ca.pem
    authorized: str  # the public key that may log in as root


def server(site: Site, ca_sha256: str, authorized: str) -> Server:
    """The site's server, on its controller."""
    controller, ports = site.network.controller, site.provision
    return Server(
        f"http://{controller}:{ports.http_port}",
        f"https://{controller}:{ports.https_port}",
        ca_sha256,
        authorized.strip(),
    )


def script_name(mac: str) -> str:
    """What iPXE asks for, by its ${net0/mac:hexhyp}: 52-54-00-ab-cd-ef.ipxe."""
    return f"{mac.replace(':', '-')}.ipxe"


def install_script(site: Site, node: Node, here: Server, token: str) -> str:
    """The iPXE script that installs a machine, or boots it without a disk, as its class says."""
    install = site.classes[node.klass].install
    template = {"preseed": "preseed", "kickstart": "kickstart"}.get(install.method, "image")
    return _render(f"{template}.ipxe.j2", _variables(site, node, here) | {"words": _words(site, node, here, token)})


def disk_script(node: Node) -> str:
    """The iPXE script of a machine that is installed: it starts from its disk."""
    return _render("ipxe/disk.ipxe.j2", {"node": node.name})


def menu_script(site: Site, mac: str = "") -> str:
    """The iPXE script of a machine that is no node of the site: a menu, of which nothing does harm."""
    return _render("ipxe/menu.ipxe.j2", {"site": site.name, "mac": mac})


def first_script(here: Server) -> str:
    """The script that every machine gets first, and that asks for the machine's own."""
    return _render("ipxe/first.ipxe.j2", {"server": here})


def answers(site: Site, node: Node, here: Server) -> dict[str, str]:
    """The answers for the installer of a node, by file name; none where its class needs no installer."""
    method = site.classes[node.klass].install.method
    variables = _variables(site, node, here)
    if method == "preseed":
        made = {
            f"{node.name}-{firmware}.preseed": _render("debian.preseed.j2", variables | _storage(site, node, firmware))
            for firmware in FIRMWARES
        }
        return made | {f"{node.name}.sh": _render("debian.sh.j2", variables)}
    if method == "kickstart":
        return {
            f"{node.name}-{firmware}.ks": _render("rhel.ks.j2", variables | _storage(site, node, firmware))
            for firmware in FIRMWARES
        }
    return {}


def files(site: Site, here: Server) -> dict[str, str]:
    """Every boot file of a site by name, with a placeholder for the one-time tokens."""
    made = {"boot.ipxe": first_script(here), "menu.ipxe": menu_script(site)}
    for node in site.nodes.values():
        if node.mac:
            made[script_name(node.mac)] = install_script(site, node, here, TOKEN)
            made[f"{node.name}-disk.ipxe"] = disk_script(node)
            made |= answers(site, node, here)
    return made


def _words(site: Site, node: Node, here: Server, token: str) -> str:
    """What a machine knows from its kernel's command line: who it is, and whom it may believe."""
    network = site.network
    words = {
        "node": node.name,
        "mac": node.mac,
        "address": f"{node.address}/{network.cidr.prefixlen}",
        "gateway": network.gateway or network.controller,
        "plain": here.plain,
        "server": here.tls,
        "ca": here.ca_sha256,
        "token": token,
    }
    return " ".join(f"posthouse.{name}={value}" for name, value in words.items())


def _variables(site: Site, node: Node, here: Server) -> dict[str, Any]:
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
        "server": here,
        "install": install,
        "mirror": {"scheme": scheme, "host": host, "folder": f"/{folder}"},
    }


def _storage(site: Site, node: Node, firmware: str) -> dict[str, Any]:
    """How the disks are divided: {"partitions", "volumes": [{"name", "at", "mib", "mb", "grow"}], "disks": their numbers}.

    Debian's installer counts in MB, the other in MiB. `at` is a mount point, or what stands in its place; volumes are in the last partition, where the class wants LVM.
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


def _render(template: str, variables: dict[str, Any]) -> str:
    return _environment().get_template(template).render(variables)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(roles.ROOT / "templates" / "boot"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
