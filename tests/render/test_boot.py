"""Boot files: word for word in golden/boot, and accepted by the tools that the installers read them with."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_golden import compare

from posthouse.machines import Install
from posthouse.model import Site
from posthouse.provision import bootfiles
from posthouse.sitefile import load, parse

SOUND = (Path(__file__).parents[1] / "cases" / "sound.yml").read_text()
SOURCES = {
    "preseed": "http://mirror.lab.test/debian",
    "kickstart": "https://mirror.lab.test/el/BaseOS/x86_64/os",
}
DISKS = {
    "plain": {},
    "mirror": {"mirror": True},
    "lvm": {"lvm": True},
    "mirror-lvm": {"mirror": True, "lvm": True},
}


def installed_by(site: Site, method: str, release: int | None = None, **more: bool) -> Site:
    """The site with all of its classes installed in this way."""
    install = Install.model_validate({"method": method, "source": SOURCES[method], "release": release, **more})
    classes = {name: entry.model_copy(update={"install": install}) for name, entry in site.classes.items()}
    return site.model_copy(update={"classes": classes})


@pytest.fixture(scope="module")
def small() -> Site:
    return parse(SOUND.replace("lb[1:2]: {class: lb}", 'lb1: {class: lb, mac: "52:54:00:ab:00:01"}'))


def server(site: Site) -> bootfiles.Server:
    return bootfiles.server(site, "c0ffee" * 10 + "c0de", "ssh-ed25519 AAAAPUBLICKEY posthouse")


def variants(site: Site, node: str) -> Iterator[tuple[str, str]]:
    """The answers for every installer, firmware and arrangement of disks: (name, text)."""
    methods: list[tuple[str, str, int | None]] = [
        ("debian13", "preseed", None),
        ("el9", "kickstart", 9),
        ("el10", "kickstart", 10),
    ]
    for (system, method, release), (disks, more) in itertools.product(methods, DISKS.items()):
        changed = installed_by(site, method, release, **more)
        for name, text in bootfiles.answers(changed, changed.nodes[node], server(site)).items():
            yield f"{system}-{disks}-{name.removeprefix(node + '-')}", text


def test_golden(small: Site, pytestconfig: pytest.Config) -> None:
    """Where a variant says no more than another, it is left out: EL 9 is EL 10 by another address."""
    files = {
        name: text
        for name, text in variants(small, "lb1")
        if not name.startswith("el9") and (not name.endswith(".sh") or "mirror-lvm" in name)
    }
    for method, release in (("preseed", None), ("kickstart", 10)):
        site = installed_by(small, method, release)
        node = site.nodes["lb1"]
        files[f"{method}.ipxe"] = bootfiles.install_script(site, node, server(site), bootfiles.TOKEN)
    compare("boot", files, pytestconfig.getoption("--update-golden"))


def with_disks(kickstart: str) -> str:
    """A kickstart as the installer reads it, with what its own %pre writes for the disks sda and sdb."""
    disks = re.search(r"<<'DISKS'\n(.*?)^DISKS$", kickstart, re.MULTILINE | re.DOTALL)
    assert disks
    return kickstart.replace("%include /tmp/posthouse-disks.ks", disks[1].replace("@1@", "sda").replace("@2@", "sdb"))


def refused(tmp_path: Path, release: str, kickstart: str) -> str:
    """What the installer's parser says against a kickstart, or nothing."""
    file = tmp_path / "machine.ks"
    file.write_text(with_disks(kickstart))
    ksvalidator = Path(sys.executable).with_name("ksvalidator")
    command = [ksvalidator, "--followincludes", "--version", release, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("Checking")]
    # Two disks that both start the machine need two of them; the installer takes it, its parser wonders.
    said = [line for line in said if "mountpoint biosboot has already been defined" not in line]
    return "\n".join(said) or (f"exit status {done.returncode}" if done.returncode else "")


def unread(tmp_path: Path, preseed: str) -> str:
    """What debconf says against answers, or nothing."""
    file = tmp_path / "machine.preseed"
    file.write_text(preseed)
    command = ["debconf-set-selections", "--checkonly", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("klass", ["lb", "mail"])
def test_answers_for_every_class_of_million_are_valid(tmp_path: Path, klass: str) -> None:
    site = load("million")
    assert {node.klass for node in site.nodes.values()} == {"lb", "mail"}
    node = site.groups[klass][0].name
    checked = 0
    for name, text in variants(site, node):
        checked += 1
        if name.endswith(".preseed"):
            assert unread(tmp_path, text) == "", name
        elif name.endswith(".ks"):
            assert refused(tmp_path, "RHEL9" if name.startswith("el9") else "RHEL10", text) == "", name
        else:
            assert subprocess.run(["sh", "-n"], input=text, text=True, check=False).returncode == 0
    assert checked == 4 * (3 + 2 + 2)


def test_the_validators_refuse_what_is_wrong(tmp_path: Path, small: Site) -> None:
    answers = dict(variants(small, "lb1"))
    kickstart, preseed = answers["el10-mirror-lvm-efi.ks"], answers["debian13-plain-efi.preseed"]
    assert "RAID7" in refused(tmp_path, "RHEL10", kickstart.replace("RAID1", "RAID7"))
    assert "--look" in refused(tmp_path, "RHEL10", kickstart.replace("rootpw --lock", "rootpw --look"))
    assert "authconfig" in refused(tmp_path, "RHEL10", kickstart.replace("firstboot", "authconfig"))
    assert unread(tmp_path, preseed.replace("partman/confirm boolean", "partman/confirm boole an"))


def test_nothing_that_anybody_may_fetch_has_a_token(small: Site) -> None:
    for name, text in variants(small, "lb1"):
        assert bootfiles.TOKEN not in text, name
