"""Images: one Debian tree per class, made from the packages that the class's manifests name.

A tree is cached under `IMAGES/CLASS-DIGEST`; the digest covers everything that goes in, so an image is never rebuilt
for a change that does not concern it. Nothing in an image belongs to one node: no host keys, no machine-id, no names.
Its daemons are installed and not enabled; a node's converge starts them. The same image with a kernel and a boot
loader in it, `metal`, is what machines are installed from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from posthouse import PosthouseError, roles
from posthouse.model import Site

SUITE = "trixie"
RECIPE = 3  # goes up when what is done to a tree changes
IMAGES = Path("/var/cache/posthouse/images")
DEBS = Path("/var/cache/posthouse/debs")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# What a node needs before its roles come: systemd as PID 1, ssh and Python for Ansible, tools for whoever looks inside.
BASE = (
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "iputils-ping",
    "less",
    "openssh-server",
    "procps",
    "python3",
    "systemd",
    "systemd-sysv",
    "udev",
    "vim-tiny",
)

# What a machine needs on top: a boot loader for either firmware, and what makes and mends its disks.
METAL = (
    "dosfstools",
    "e2fsprogs",
    "fdisk",
    "grub-efi-amd64-bin",
    "grub-pc-bin",
    "grub2-common",
    "initramfs-tools",
    "kmod",
    "lvm2",
    "mdadm",
    "zstd",
)

# Enabled from the first boot; `disable *` keeps everything else down until the node's converge enables it.
PRESET = """\
enable ssh.service
enable getty@.service
disable *
"""

# Manuals and translations are for a workstation; without them the tree is smaller and unpacks faster. Of what comes
# with a package to read, its licence stays.
UNREAD = ("man", "info", "locale", "lintian")
DPKG = "".join(f"path-exclude=/usr/share/{folder}/*\n" for folder in (*UNREAD, "doc")) + (
    "path-include=/usr/share/doc/*/copyright\n"
)


class ImageError(PosthouseError):
    """An image that could not be built: where, what, and what to do."""


@dataclass(frozen=True)
class Mirror:
    """Where packages come from: lines of a sources.list, and apt's options to go with them."""

    sources: tuple[str, ...]
    options: tuple[str, ...]


def packages(site: Site, class_name: str, metal: bool = False) -> list[str]:
    """Every package of an image: the base and what the tiers of the class name, sorted; for metal a kernel and more.

    A site of the lab runs on QEMU, for which Debian's cloud kernel has all drivers; it is a third of the other's size.
    """
    tiers = next((node.tiers for node in site.nodes.values() if node.klass == class_name), ())
    kernel = "linux-image-cloud-amd64" if site.lab else "linux-image-amd64"
    return sorted({*BASE, *roles.packages(tiers), *((*METAL, kernel) if metal else ())})


def path(site: Site, class_name: str, metal: bool = False) -> Path:
    """Where the image of a class is, or will be once it is built."""
    made_from = json.dumps([RECIPE, SUITE, packages(site, class_name, metal), PRESET, DPKG])
    return IMAGES / f"{class_name}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"


def build_all(site: Site) -> dict[str, Path]:
    """Builds the images of all classes that have nodes, side by side: {class: tree}."""
    classes = list(dict.fromkeys(node.klass for node in site.nodes.values()))
    with ThreadPoolExecutor() as pool:
        return dict(zip(classes, pool.map(lambda name: build(site, name), classes), strict=True))


def build(site: Site, class_name: str, metal: bool = False) -> Path:
    """The tree of a class, built if it is not there yet. Raises ImageError.

    Builds of one image wait for each other. A build that dies, or whose caller is killed, leaves only a
    `.partial` tree, which the next one removes.
    """
    tree = path(site, class_name, metal)
    if tree.exists():
        os.utime(tree)  # it is in use: `_prune` lets it be
        return tree
    for folder in (IMAGES, DEBS):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(tree.with_name(tree.name + ".lock")):
        if tree.exists():
            return tree
        partial = tree.with_name(tree.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _bootstrap(partial, packages(site, class_name, metal), tree.with_name(tree.name + ".log"))
        _keep_downloads(partial)
        _strip(partial)
        partial.rename(tree)
    _prune(tree, class_name)
    return tree


def mirror() -> Mirror:
    """The Debian mirror of this machine, for the image's suite. Raises ImageError if apt knows none.

    `-updates` and `-security` are left out where the mirror does not carry them.
    """
    codename = _os_release()["VERSION_CODENAME"]
    # Without --no-release-info apt lists only what it has fetched an index of; a fresh machine has fetched none.
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    ask = ["apt-get", "indextargets", "--no-release-info", "--format", fields, "Identifier: Packages"]
    asked = subprocess.run(ask, capture_output=True, text=True, check=False)
    found = [line.split() for line in asked.stdout.splitlines()]
    by_release = {release: _plain_uri(uri) for uri, release, component in reversed(found) if component == "main"}
    main = next((by_release[name] for name in (codename, SUITE, "stable", "oldstable") if name in by_release), None)
    if not main:
        raise ImageError(
            "apt: its sources name no Debian mirror with the component main; add one to /etc/apt/sources.list.d"
        )
    security = next((uri for release, uri in by_release.items() if release.endswith("-security")), None)
    wanted = [(main, SUITE), (main, f"{SUITE}-updates"), *([(security, f"{SUITE}-security")] if security else [])]
    there = [(uri, suite) for uri, suite in wanted if suite == SUITE or _reachable(uri, suite)]
    sources = [f"deb [signed-by={KEYRING}] {uri} {suite} main" for uri, suite in there]
    dump = subprocess.run(["apt-config", "dump", "--no-empty"], capture_output=True, text=True, check=True).stdout
    # How to reach the mirror, and how old its index may be, are as true for the image as for this machine.
    kept = ("Acquire::Check-Valid-Until ", "Acquire::Check-Date ", "Acquire::http::", "Acquire::https::")
    return Mirror(tuple(sources), tuple(line for line in dump.splitlines() if line.startswith(kept)))


def _bootstrap(tree: Path, names: list[str], log: Path) -> None:
    source = mirror()
    # The build must not outlive its caller, or a second one would find a tree that still changes: `setpriv` kills it
    # with its parent, and the pid namespace takes every maintainer script along.
    bound = [
        "setpriv",
        "--pdeathsig=KILL",
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child=KILL",
    ]
    archives = '"$1/var/cache/apt/archives"'
    command = [
        *bound,
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        "--skip=essential/unlink,cleanup/apt/cache",
        f"--include={','.join(names)}",
        '--aptopt=Acquire::Languages "none"',
        *(f"--aptopt={option.rstrip(';')}" for option in source.options),
        # A build that loses power is thrown away, so it need not wait for the disk.
        "--dpkgopt=force-unsafe-io",
        # Not by --dpkgopt: that would make mmdebstrap filter every archive through a slow program of its own.
        f'--setup-hook=mkdir -p "$1/etc/dpkg/dpkg.cfg.d" && echo \'{DPKG}\' >"$1/etc/dpkg/dpkg.cfg.d/posthouse"',
        # Downloads are kept for the next build: apt checks their digests, and fetches only what is not there.
        f"--setup-hook=mkdir -p {archives} && find {DEBS} -name '*.deb' -exec cp -t {archives} {{}} +",
        SUITE,
        str(tree),
        "-",
    ]
    with log.open("w") as out:
        lines = "".join(f"{line}\n" for line in source.sources)
        done = subprocess.run(command, input=lines, text=True, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        errors = [line for line in log.read_text().splitlines() if line.startswith("E:")][:3]
        reason = "; ".join(errors) or f"exit status {done.returncode}"
        raise ImageError(f"{tree.name.removesuffix('.partial')}: mmdebstrap failed: {reason}\n  the whole log: {log}")


def _keep_downloads(tree: Path) -> None:
    """Moves packages out of the tree for the next build, and forgets those that no build of the last month used."""
    archives = tree / "var/cache/apt/archives"
    for deb in archives.glob("*.deb"):
        kept = DEBS / deb.name
        if not kept.exists() or kept.stat().st_size != deb.stat().st_size:
            shutil.move(deb, kept)
        os.utime(kept)
    for file in [*archives.glob("*.deb"), *(deb for deb in DEBS.iterdir() if _days_old(deb) > 30)]:
        file.unlink(missing_ok=True)  # another class's build may tidy up as well


def _strip(tree: Path) -> None:
    """Takes out of a tree what must differ between nodes, and what would start by itself."""
    (tree / "etc/systemd/system-preset").mkdir(parents=True, exist_ok=True)
    (tree / "etc/systemd/system-preset/00-posthouse.preset").write_text(PRESET)
    inside = ["chroot", str(tree)]
    subprocess.run([*inside, "systemctl", "preset-all"], check=True, capture_output=True)
    # Daemons that still come as init scripts are not covered by presets.
    native = {unit.stem for unit in tree.glob("usr/lib/systemd/system/*.service")}
    for script in sorted(tree.glob("etc/init.d/*")):
        if script.name not in native:
            subprocess.run([*inside, "update-rc.d", script.name, "disable"], check=True, capture_output=True)
    for pattern in (
        "etc/ssh/ssh_host_*",
        "etc/hostname",
        "etc/resolv.conf",
        "etc/ssl/private/ssl-cert-snakeoil.key",
        "var/lib/dbus/machine-id",
        "var/lib/systemd/random-seed",
        "var/log/*.log",
    ):
        for file in tree.glob(pattern):
            file.unlink()
    # dpkg's rule holds for packages that come later; the essential ones are there before it.
    for folder in UNREAD:
        for entry in (tree / "usr/share" / folder).glob("*"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for file in tree.glob("usr/share/doc/**/*"):
        if file.is_file() and file.name != "copyright":
            file.unlink()
    (tree / "etc/machine-id").write_text("")
    (tree / "etc/dpkg/dpkg.cfg.d/99mmdebstrap").unlink()
    # Nothing in it is left to be brought up to date at the first boot: no cache of libraries, no catalogue.
    subprocess.run([*inside, "/usr/lib/systemd/systemd-update-done"], check=True, capture_output=True)
    # How this machine reaches its mirror is not how a node does; what its indices are like stays true.
    options = tree / "etc/apt/apt.conf.d/99mmdebstrap"
    options.write_text("".join(line for line in options.read_text().splitlines(keepends=True) if "::http" not in line))


def _prune(tree: Path, class_name: str) -> None:
    """Removes images of the class that no lab uses and that are older than a day."""
    used = {link.resolve() for link in Path("/var/lib/posthouse/lab").glob("*/nodes/*/image")}
    for old in IMAGES.glob(f"{class_name}-*"):
        if old.is_dir() and old not in {tree, *used} and _days_old(old) > 1:
            shutil.rmtree(old)
            for suffix in (".lock", ".log"):
                old.with_name(old.name + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds a lock file: whoever makes something under its name waits for whoever does so already."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _days_old(file: Path) -> float:
    return (time.time() - file.stat().st_mtime) / 86400


def _os_release() -> dict[str, str]:
    lines = (line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {key: value.strip('"') for key, value in lines}


def _plain_uri(uri: str) -> str:
    """Debian's cloud images name their mirror in a file; a node has no such file."""
    if not uri.startswith("mirror+file:"):
        return uri.rstrip("/")
    lines = Path(uri.removeprefix("mirror+file:")).read_text().splitlines()
    return next(line.split()[0] for line in lines if line.strip() and not line.startswith("#")).rstrip("/")


def _reachable(uri: str, suite: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        fetch = ["/usr/lib/apt/apt-helper", "download-file", f"{uri}/dists/{suite}/InRelease", f"{folder}/InRelease"]
        return subprocess.run(fetch, capture_output=True, check=False).returncode == 0
