"""What a controller must have installed to build images and run labs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from posthouse.lab.layout import LabError

# Debian package: a file of it that posthouse uses.
PACKAGES = {
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "e2fsprogs": "/usr/sbin/mkfs.ext4",
    "iproute2": "/usr/sbin/ip",
    "knot": "/usr/sbin/knotd",
    "knot-dnsutils": "/usr/bin/kdig",
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "mount": "/usr/bin/mount",
    "nftables": "/usr/sbin/nft",
    "openssh-client": "/usr/bin/ssh",
    "rclone": "/usr/bin/rclone",
    "restic": "/usr/bin/restic",
    "systemd-container": "/usr/bin/systemd-nspawn",
    "util-linux": "/usr/bin/unshare",
}

# What installs machines from here, and what the lab's own machines are.
PROVISION = {
    "dnsmasq-base": "/usr/sbin/dnsmasq",
    "ipxe": "/usr/lib/ipxe/snponly.efi",
    "zstd": "/usr/bin/zstd",
}
MACHINES = PROVISION | {
    "ipxe-qemu": "/usr/lib/ipxe/qemu/pxe-virtio.rom",
    "ovmf": "/usr/share/OVMF/OVMF_CODE_4M.fd",
    "qemu-system-x86": "/usr/bin/qemu-system-x86_64",
}


def missing(packages: dict[str, str] = PACKAGES) -> list[str]:
    """Packages that have to be installed, sorted. Looks at files, so it takes no time where all is there."""
    return sorted(package for package, file in packages.items() if not Path(file).exists())


def ensure(packages: dict[str, str] = PACKAGES) -> list[str]:
    """Installs what is missing and returns its names. Raises LabError.

    No daemon runs afterwards that did not run before.
    """
    names = missing(packages)
    if not names:
        return []
    if os.geteuid():
        raise LabError(f"this machine lacks {', '.join(names)}; run: apt-get install {' '.join(names)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    commands = [["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "--no-install-recommends", *names]]
    if "knot" in names:
        # Debian starts a daemon when it is installed. The lab runs its own knotd; the machine's port 53 is not ours.
        commands += [["invoke-rc.d", "knot", "stop"], ["update-rc.d", "knot", "disable"]]
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}; mend it, then run this again")
    return names
