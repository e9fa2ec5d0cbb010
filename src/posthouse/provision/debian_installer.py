"""Debian's own installer, as machines boot it: kernel and initrd, out of a package that apt has verified."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from posthouse import PosthouseError, image

FOLDER = Path("/var/cache/posthouse/debian-installer")
FILES = ("linux", "initrd.gz")
PACKAGE = "debian-installer-13-netboot-amd64"
_INSIDE = "./usr/lib/debian-installer/images/13/amd64/text/debian-installer/amd64"
# The mirror carries drivers for the newest kernel only, so an old initrd finds none.
_FRESH = 86400


class InstallerError(PosthouseError):
    """Debian's installer could not be fetched."""


def make() -> Path:
    """The folder that holds FILES, fetched from this machine's mirror if missing or old. Raises InstallerError."""
    newest = FOLDER / FILES[-1]
    if newest.exists() and time.time() - newest.stat().st_mtime < _FRESH:
        return FOLDER
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=FOLDER) as name:
        work = Path(name)
        _download(work)
        package = next(work.glob(f"{PACKAGE}_*.deb"))
        unpack = f'dpkg-deb --fsys-tarfile "$1" | tar -x --strip-components=10 -C "$2" {" ".join(_paths())}'
        _run(["sh", "-ec", unpack, "unpack", str(package), name], work)
        for file in FILES:
            os.utime(work / file)
            shutil.move(work / file, FOLDER / file)
    return FOLDER


def _download(work: Path) -> None:
    """The package into a folder, by an apt that has this machine's mirror and keys, and nothing else of it."""
    mirror = image.mirror()
    (work / "sources.list").write_text("".join(f"{line}\n" for line in mirror.sources))
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "Dir::Cache::pkgcache": "",
        "APT::Sandbox::User": "root",
    }
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    options = [f"-o{key}={value}" for key, value in settings.items()]
    options += [f"-o{option.replace(' ', '=', 1).rstrip(';')}" for option in mirror.options]
    _run(["apt-get", *options, "-qq", "update"], work)
    _run(["apt-get", *options, "-qq", "download", PACKAGE], work)


def _paths() -> list[str]:
    return [f"{_INSIDE}/{file}" for file in FILES]


def _run(command: list[str], work: Path) -> None:
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallerError(
            f"{PACKAGE}: {done.stderr.strip()[-400:] or f'exit status {done.returncode}'}; does the mirror carry it?"
        )
