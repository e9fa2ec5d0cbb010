"""What makes a freshly installed system this node and no other, as a tar stream. Nothing in it is secret."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path

from posthouse.model import Node, Site
from posthouse.provision.disks import Layout

_GRUB = """\
set timeout=1
{search}
menuentry Debian {{
    linux /vmlinuz root={root} ro quiet systemd.crash_action=reboot panic=10 console=tty0 console=ttyS0,115200
    initrd /initrd.img
}}
"""


def files(site: Site, node: Node, layout: Layout | None, authorized: str, sources: str) -> dict[str, tuple[str, int]]:
    """The files below the node's root: {path: (content, mode)}.

    layout: none where a distribution's installer divides the disks, and knows how they are mounted and started.
    authorized: the public key that may log in as root. sources: the sources.list.
    """
    network = site.network
    made = {
        "etc/hostname": f"{node.name}\n",
        "etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{node.address} {node.fqdn} {node.name}\n",
        "etc/resolv.conf": "".join(f"nameserver {address}\n" for address in network.resolvers),
        "etc/apt/sources.list": sources.replace("https://", "http://") if site.lab else sources,
        # The name is the site's, whatever slot the card is in.
        "etc/systemd/network/10-posthouse.link": (
            f"[Match]\nMACAddress={node.mac}\n\n[Link]\nName={network.interface}\n"
        ),
        "etc/systemd/network/10-posthouse.network": (
            f"[Match]\nMACAddress={node.mac}\n\n[Network]\nAddress={node.address}/{network.cidr.prefixlen}\n"
            f"Gateway={network.gateway or network.controller}\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n"
        ),
    }
    if site.lab:
        proxy = f'Acquire::http::Proxy "http://{network.gateway or network.controller}:3142";\n'
        made["etc/apt/apt.conf.d/90posthouse-lab"] = proxy
        # Emulated, on processors that others use too, daemons need more than systemd's 90 seconds to start.
        patience = "[Manager]\nDefaultTimeoutStartSec=15min\nDefaultDeviceTimeoutSec=15min\n"
        made["etc/systemd/system.conf.d/posthouse-lab.conf"] = patience
    made |= _disk_files(layout) if layout else {}
    return {
        **{path: (text, 0o644) for path, text in made.items()},
        "root/.ssh/authorized_keys": (authorized.strip() + "\n", 0o600),
    }


def _disk_files(layout: Layout) -> dict[str, str]:
    fstab = [f"{layout.root_source} / ext4 defaults,errors=remount-ro 0 1"] if layout.root else []
    # Without its spool a node must not come up: it would write mail to the wrong disk. A large array takes its time.
    fstab.append(f"{layout.srv_source} /srv ext4 defaults,x-systemd.device-timeout=15min 0 2")
    made = {"etc/fstab": "".join(f"{line}\n" for line in fstab)}
    if layout.root:
        found = layout.root_source.removeprefix("UUID=")
        search = f"search --no-floppy --fs-uuid --set=root {found}" if found != layout.root_source else ""
        made["boot/grub/grub.cfg"] = _GRUB.format(search=search, root=layout.root_source)
    return made


# Units that a machine needs from its first boot on and a container does not.
UNITS = ("systemd-networkd.service",)


def stream(contents: dict[str, tuple[str, int]]) -> bytes:
    """Files as a tar archive, owned by root; folders on the way are made where they are not there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("root/.ssh")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(folder)
        for path, (text, mode) in contents.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.mtime = len(text.encode()), mode, int(time.time())
            archive.addfile(entry, io.BytesIO(text.encode()))
        for unit in UNITS:
            link = tarfile.TarInfo(f"etc/systemd/system/multi-user.target.wants/{unit}")
            link.type, link.linkname = tarfile.SYMTYPE, str(Path("/usr/lib/systemd/system") / unit)
            archive.addfile(link)
    return buffer.getvalue()
