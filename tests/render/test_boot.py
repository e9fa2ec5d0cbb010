"""Boot files: word for word in golden/boot, and accepted by the tools that the installers read them with."""

import itertools
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from pykickstart.errors import KickstartError
from pykickstart.parser import KickstartParser
from pykickstart.version import makeVersion
from test_golden import compare

from posthouse import provision
from posthouse.machines import Install
from posthouse.model import Site
from posthouse.provision import bootfiles, dhcp
from posthouse.secrets import Secrets
from posthouse.sitefile import load, parse

SOUND = (Path(__file__).parents[1] / "cases" / "sound.yml").read_text()
SOURCES = {
    "preseed": "http://mirror.lab.test/debian",
    "kickstart": "http://mirror.lab.test/el/BaseOS/x86_64/os",
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


# What of the secrets is no secret.
OPENED = Secrets({"ca": {"cert": "the site's CA\n"}, "ssh": {"public": "ssh-ed25519 AAAAPUBLICKEY posthouse\n"}})


def variants(site: Site, node: str) -> Iterator[tuple[str, str]]:
    """The answers for every installer, firmware and arrangement of disks: (name, text)."""
    methods: list[tuple[str, str, int | None]] = [
        ("debian13", "preseed", None),
        ("el9", "kickstart", 9),
        ("el10", "kickstart", 10),
    ]
    for (system, method, release), (disks, more) in itertools.product(methods, DISKS.items()):
        changed = installed_by(site, method, release, **more)
        for name, text in bootfiles.answers(changed, changed.nodes[node], OPENED).items():
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
        files[f"{method}.ipxe"] = bootfiles.boot_script(site, node, OPENED, bootfiles.TOKEN)
    files |= bootfiles.files(small, OPENED)
    files["dnsmasq.conf"] = dhcp.config(small, Path("/FOLDER"))
    compare("boot", files, pytestconfig.getoption("--update-golden"))


def with_disks(kickstart: str) -> str:
    """A kickstart as the installer reads it, with what its own %pre writes for the disks sda and sdb."""
    disks = re.search(r"<<'DISKS'\n(.*?)^DISKS$", kickstart, re.MULTILINE | re.DOTALL)
    assert disks
    return kickstart.replace("%include /tmp/posthouse-disks.ks", disks[1].replace("@1@", "sda").replace("@2@", "sdb"))


def refused(release: str, kickstart: str) -> str:
    """What the installer's parser says against a kickstart, its warnings too, or nothing."""
    parser = KickstartParser(makeVersion(release))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parser.readKickstartFromString(with_disks(kickstart))
        except KickstartError as error:
            return str(error)
    # Two disks that both start a BIOS have one each. The installer makes them; its parser wonders.
    twice = "A partition with the mountpoint biosboot has already been defined."
    return "\n".join(str(warning.message) for warning in caught if str(warning.message) != twice)


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
            assert refused("RHEL9" if name.startswith("el9") else "RHEL10", text) == "", name
        else:
            assert subprocess.run(["sh", "-n"], input=text, text=True, check=False).returncode == 0
    assert checked == 4 * (3 + 2 + 2)


def test_the_validators_refuse_what_is_wrong(tmp_path: Path, small: Site) -> None:
    answers = dict(variants(small, "lb1"))
    kickstart, preseed = answers["el10-mirror-lvm-efi.ks"], answers["debian13-plain-efi.preseed"]
    assert "RAID7" in refused("RHEL10", kickstart.replace("RAID1", "RAID7"))
    assert "rootpw" in refused("RHEL10", kickstart.replace("rootpw --lock", "rootpw --look"))
    assert "authconfig" in refused("RHEL10", kickstart.replace("firstboot", "authconfig"))
    assert unread(tmp_path, preseed.replace("partman/confirm boolean", "partman/confirm boole an"))


def test_nothing_that_anybody_may_fetch_has_a_token(small: Site) -> None:
    for name, text in variants(small, "lb1"):
        assert bootfiles.TOKEN not in text, name


def test_every_boot_file_of_a_site_is_written(tmp_path: Path) -> None:
    site = installed_by(load("million"), "preseed")
    count = provision.write_files(site, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == count
    assert {"boot.ipxe", "menu.ipxe", "dnsmasq.conf", "lb1-install.ipxe", "mail001-local.ipxe"} <= names
    # Spares are machines like all others.
    assert {"mail106-efi.preseed", "mail106-pcbios.preseed", "mail106.sh", "mail106-install.ipxe"} <= names
    assert "dhcp-host=02:80:0a:50:01:74,10.80.1.116,mail106" in (tmp_path / "out" / "dnsmasq.conf").read_text()


def test_every_class_of_million_has_answers_for_every_installer_and_they_are_valid(tmp_path: Path) -> None:
    provision.write_files(load("million"), tmp_path / "out")
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written["mail.el9-efi.ks"].startswith("# mail001.")
    for klass in ("lb", "mail"):
        assert f"{klass}.debian13.sh" in written
        for firmware in bootfiles.FIRMWARES:
            assert unread(tmp_path, written[f"{klass}.debian13-{firmware}.preseed"]) == ""
            for release in (9, 10):
                assert refused(f"RHEL{release}", written[f"{klass}.el{release}-{firmware}.ks"]) == ""


def test_a_site_without_machines_has_no_boot_files(tmp_path: Path) -> None:
    with pytest.raises(provision.ProvisionError, match="no node has a MAC address"):
        provision.write_files(parse(SOUND), tmp_path / "out")
    assert not (tmp_path / "out").exists()
