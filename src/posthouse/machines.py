"""What a site says about the machines below its nodes: their MAC addresses, their disks, and how they are installed."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from netaddr import EUI, AddrFormatError, mac_unix_expanded
from pydantic import AfterValidator, BeforeValidator, Field

from posthouse.strict import Problem, Strict

# What the boot partitions (BIOS, EFI, /boot), their alignment and a second GPT take of a disk, at most.
BOOT_GIB = 2
# Installers that fetch their packages themselves, and from where.
SOURCES = {
    "preseed": "a mirror of Debian, like http://mirror.example.org/debian",
    "kickstart": "the BaseOS tree of the release, like http://mirror.example.org/9/BaseOS/x86_64/os",
}


def _mac(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f'YAML reads this one as a number; put quotes around it: "{_unread(value)}"')
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} is not a MAC address; write it like 52:54:00:ab:cd:ef")
    try:
        mac = EUI(value, version=48, dialect=mac_unix_expanded)
    except (AddrFormatError, ValueError):
        raise ValueError(f"{reprlib.repr(value)} is not a MAC address; write it like 52:54:00:ab:cd:ef") from None
    if mac.words[0] & 1 or not int(mac):
        raise ValueError(f"{mac} is not the address of one interface; look at the machine's label, or at `ip link`")
    return str(mac)


def _unread(number: int) -> str:
    """52:54:00:12:34:56 is a number of base 60 to YAML 1.1; this is the text again."""
    groups = []
    for _ in range(5):
        number, group = divmod(number, 60)
        groups.append(f"{group:02d}")
    return ":".join([f"{number:02d}", *reversed(groups)])


def _macs(value: Any) -> tuple[str, ...]:
    """One, or a list for the nodes of a range."""
    return tuple(_mac(item) for item in (value if isinstance(value, list) else [value]))


def _glob(value: str) -> str:
    # It ends up in shell patterns, on the machine that is installed.
    if not re.fullmatch(r"[A-Za-z0-9 ._+*?()/-]{1,64}", value):
        raise ValueError(
            f"{reprlib.repr(value)} is not a pattern for disks; use letters, digits, blanks, ._+-()/, and the wildcards"
            " * and ?"
        )
    return value


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[a-z0-9.-]+(:\d{1,5})?(/[A-Za-z0-9._~%+/-]*)?", value):
        raise ValueError(f"{reprlib.repr(value)} is not the address of a server; write it like http://host/path")
    return value.rstrip("/")


Macs = Annotated[tuple[str, ...], BeforeValidator(_macs)]
Glob = Annotated[str, AfterValidator(_glob)]
Url = Annotated[str, AfterValidator(_url)]


class Disk(Strict):
    """Which disk is written. Exactly one has to fit (two for a mirror); where more or fewer do, nothing is touched."""

    min_gib: float | None = Field(None, gt=0, description="at least this large; by default what the file systems need")
    max_gib: float | None = Field(None, gt=0, description="at most this large")
    model: Glob | None = Field(None, description="the model, with wildcards: `PERC H7*`")
    serial: Glob | None = Field(None, description="the serial number, with wildcards")


class Install(Strict):
    """How the machines of a class are installed."""

    method: Literal["image", "preseed", "kickstart", "diskless"] = Field(
        "image",
        description="`image` writes the class's image to disk, `preseed` and `kickstart` have the distribution's "
        "installer do it, `diskless` runs the image from memory and keeps /srv on disk",
    )
    disk: Disk = Disk()
    mirror: bool = Field(False, description="RAID 1 over two disks")
    lvm: bool = Field(False, description="root and /srv as logical volumes")
    root_gib: float = Field(20, ge=2, description="GiB of the root file system; /srv has the rest")
    memory_gib: float = Field(0, ge=0, description="memory that a machine must have; 0 asks for none")
    source: Url | None = Field(None, description="where an installer's packages are; `preseed` and `kickstart` need it")
    release: Literal[9, 10] | None = Field(None, description="of the RHEL family; `kickstart` needs it")

    def problems(self, place: tuple[str, ...], needed_gib: float) -> Iterator[Problem]:
        """What does not go together. needed_gib: what root, boot partitions and the least /srv take."""
        disk = self.disk
        if disk.min_gib and disk.max_gib and disk.max_gib < disk.min_gib:
            reason = f"{disk.max_gib:g} is less than min_gib ({disk.min_gib:g}), so no disk fits; raise it"
            yield (*place, "disk", "max_gib"), reason
        elif disk.max_gib and not disk.min_gib and disk.max_gib < needed_gib:
            reason = f"no disk of {disk.max_gib:g} GiB holds what has to be on it ({needed_gib:g} GiB); raise it"
            yield (*place, "disk", "max_gib"), reason
        if self.method != "diskless" and disk.min_gib and disk.min_gib <= self.root_gib + BOOT_GIB:
            least = self.root_gib + BOOT_GIB
            reason = (
                f"root_gib ({self.root_gib:g}) and the boot partitions leave nothing of {disk.min_gib:g} GiB for /srv"
            )
            yield (*place, "disk", "min_gib"), f"{reason}; make it more than {least:g}, or root_gib smaller"
        for name, wanted in {"mirror": self.mirror, "lvm": self.lvm}.items():
            if wanted and self.method == "diskless":
                yield (*place, name), "diskless has nothing but /srv on disk, and that on one by itself; leave it out"
        if self.method in SOURCES and not self.source:
            yield (*place, "source"), f"is missing, and {self.method} needs it: {SOURCES[self.method]}"
        if self.method == "kickstart" and (self.source or "").startswith("https:"):
            reason = "iPXE fetches the installer's kernel there, and Debian's speaks no HTTPS"
            yield (*place, "source"), f"{reason}; write it with http://"
        if self.method not in SOURCES and self.source:
            yield (*place, "source"), f"{self.method} takes nothing from there; leave it out"
        if self.method == "kickstart" and not self.release:
            yield (*place, "release"), "is missing, and kickstart needs it: 9 or 10"
        if self.method != "kickstart" and self.release:
            yield (*place, "release"), f"{self.method} installs no release of the RHEL family; leave it out"
