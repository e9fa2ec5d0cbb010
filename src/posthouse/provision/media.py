"""What a machine is installed from: its class's image as a stream, and a kernel with the initramfs that unpacks it.

All of it is made once, from the image's tree for metal, and lies beside it:

BOOT/TREE.tar.zst, TREE.json        the stream, and its manifest: {"sha256", "bytes", "unpacked"}
BOOT/TREE-DIGEST.{kernel,initrd,efi}    the environment; DIGEST covers the scripts in it

The environment is Debian's own initramfs-tools with a `mountroot` of ours: kernel, drivers, udev and LVM's and mdadm's
parts come from the class's own tree, so there is no second distribution to keep up to date.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthouse import PosthouseError, image, roles
from posthouse.model import Site

BOOT = Path("/var/cache/posthouse/boot")
SCRIPTS = roles.ROOT / "templates" / "boot" / "installer"

# An overlay keeps the cached tree as it is; mounts end with the process's own namespace.
_INITRAMFS = """
set -e
mount -t tmpfs tmpfs "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
cp -r "$2/root/etc/initramfs-tools" "$2/root/tmp/conf"
install -m 0755 "$3/hook" "$2/root/tmp/conf/hooks/posthouse"
install -m 0644 "$3/posthouse" "$2/root/tmp/conf/scripts/posthouse"
mount -t proc proc "$2/root/proc"
mount --bind /dev "$2/root/dev"
version=$(ls "$2/root/lib/modules")
chroot "$2/root" mkinitramfs -d /tmp/conf -o /tmp/initrd "$version"
cp "$2/root/tmp/initrd" "$4"
cp "$3/start.cfg" "$2/root/tmp/start.cfg"
chroot "$2/root" grub-mkimage -O x86_64-efi -c /tmp/start.cfg -p /none -o /tmp/start.efi \
    part_gpt fat search search_label chain normal boot
cp "$2/root/tmp/start.efi" "$5"
cp "$2/root/boot/vmlinuz-$version" "$6"
"""


class MediaError(PosthouseError):
    """What a class is installed from could not be made."""


@dataclass(frozen=True)
class Media:
    """What the machines of one class are installed from."""

    tree: Path
    stream: Path
    kernel: Path
    initrd: Path
    manifest: dict[str, Any]

    @property
    def start(self) -> Path:
        """What iPXE starts a UEFI machine's own disk by."""
        return self.kernel.with_suffix(".efi")

    @property
    def sha256(self) -> str:
        """The digest of the stream, by which a machine knows that it has the right one."""
        return str(self.manifest["sha256"])


def make(site: Site, class_name: str) -> Media:
    """The media of a class, made if they are not there yet. Raises ImageError, MediaError."""
    tree = image.build(site, class_name, metal=True)
    BOOT.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(
        b"".join((SCRIPTS / name).read_bytes() for name in ("hook", "posthouse", "start.cfg"))
    ).hexdigest()[:8]
    stream, manifest = BOOT / f"{tree.name}.tar.zst", BOOT / f"{tree.name}.json"
    kernel, initrd = (BOOT / f"{tree.name}-{digest}.{kind}" for kind in ("kernel", "initrd"))
    with image.locked(BOOT / f"{tree.name}.lock"):
        if not manifest.exists():
            manifest.write_text(json.dumps(_pack(tree, stream)))
        if not kernel.exists():
            _initramfs(tree, initrd, kernel.with_suffix(".efi"), kernel)
    _prune()
    return Media(tree, stream, kernel, initrd, json.loads(manifest.read_text()))


def _pack(tree: Path, stream: Path) -> dict[str, Any]:
    """Packs a tree; returns its manifest."""
    partial = stream.with_name(stream.name + ".partial")
    pack = ["tar", "--create", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sort=name", "-C", str(tree), "."]
    with partial.open("wb") as out, subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
        squeezed = subprocess.run(["zstd", "-q", "-T0", "-6"], stdin=packing.stdout, stdout=out, check=False)
    if packing.returncode or squeezed.returncode:
        raise MediaError(f"{tree}: cannot be packed into {partial}; is there room?")
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    counted = subprocess.run(["du", "--summarize", "--block-size=1", tree], capture_output=True, text=True, check=True)
    partial.rename(stream)
    return {"sha256": digest, "bytes": stream.stat().st_size, "unpacked": int(counted.stdout.split()[0])}


def _initramfs(tree: Path, *files: Path) -> None:
    """Makes initrd, start and kernel, in this order: where the kernel is, all are."""
    with tempfile.TemporaryDirectory(prefix="posthouse-initramfs-") as work:
        partial = [file.with_name(file.name + ".partial") for file in files]
        command = ["unshare", "--mount", "sh", "-c", _INITRAMFS, "make", *map(str, (tree, work, SCRIPTS, *partial))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MediaError(f"{tree.name}: its initramfs cannot be made: {done.stderr.strip()[-400:]}")
    for file, made in zip(files, partial, strict=True):
        made.rename(file)


def _prune() -> None:
    """Removes what was made from trees that are no more."""
    trees = tuple(tree.name for tree in image.IMAGES.iterdir() if tree.is_dir())
    for file in BOOT.iterdir():
        if not file.name.startswith(trees):
            file.unlink()
