"""What an image is made from, and where its packages come from; apt itself reads the sources in these tests."""

from pathlib import Path

import pytest
import yaml

from posthouse import image
from posthouse.model import Site
from posthouse.sitefile import parse

CODENAME = image._os_release()["VERSION_CODENAME"]


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt configuration of its own, with a mirror in a folder that carries -updates and no -security."""
    for suite in (image.SUITE, f"{image.SUITE}-updates"):
        (tmp_path / "mirror/dists" / suite).mkdir(parents=True)
        (tmp_path / "mirror/dists" / suite / "InRelease").write_text("signed\n")
    (tmp_path / "sources.list.d").mkdir()
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "{tmp_path}/sources.list.d";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))
    return tmp_path


def expected(apt: Path) -> tuple[str, ...]:
    suites = (image.SUITE, f"{image.SUITE}-updates")
    return tuple(f"deb [signed-by={image.KEYRING}] file:{apt}/mirror {suite} main" for suite in suites)


def test_mirror_from_a_deb822_file_with_a_comment_inside(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(
        f"Types: deb\n# where it comes from\nURIs: file:{apt}/mirror/\n"
        f"Suites: {CODENAME} {CODENAME}-updates\nComponents: main\n\n"
        f"Types: deb\nURIs: file:{apt}/security\nSuites: {CODENAME}-security\nComponents: main\n"
    )
    assert image.mirror().sources == expected(apt)


def test_mirror_from_one_line_sources_beside_somebody_elses(apt: Path) -> None:
    (apt / "sources.list").write_text(
        f"deb file:{apt}/other nodistro main\ndeb [trusted=yes] file:{apt}/mirror {CODENAME} main contrib\n"
    )
    assert image.mirror().sources == expected(apt)


def test_mirror_that_is_named_in_a_file_of_its_own(apt: Path) -> None:
    (apt / "mirror.list").write_text(f"# the nearest\nfile:{apt}/mirror priority:1\n")
    (apt / "sources.list").write_text(f"deb mirror+file:{apt}/mirror.list {CODENAME} main\n")
    assert image.mirror().sources == expected(apt)


def test_mirror_carries_over_how_it_is_reached_and_what_its_index_is_like(apt: Path) -> None:
    (apt / "sources.list").write_text(f"deb file:{apt}/mirror {CODENAME} main\n")
    with (apt / "apt.conf").open("a") as config:
        config.write(
            'Acquire::Check-Valid-Until "false";\nAcquire::http::Proxy "http://127.0.0.1:1";\nAPT::Color "no";\n'
        )
    options = image.mirror().options
    assert 'Acquire::Check-Valid-Until "false";' in options
    assert 'Acquire::http::Proxy "http://127.0.0.1:1";' in options
    assert not [option for option in options if "Color" in option]


def test_apt_without_debian_sources_is_said(apt: Path) -> None:
    (apt / "sources.list").write_text(f"deb file:{apt}/other nodistro main\n")
    with pytest.raises(image.ImageError, match="name no Debian mirror"):
        image.mirror()


def test_image_holds_the_packages_of_its_tiers(site: Site) -> None:
    mail, lb = (set(image.packages(site, name)) for name in ("mail", "lb"))
    assert {"postfix", "cyrus-imapd", "slapd", "openssh-server"} <= mail
    assert {"haproxy", "keepalived", "openssh-server"} <= lb
    assert "haproxy" not in mail and "postfix" not in lb


def test_image_is_another_one_only_if_its_packages_are(site: Site, sound: str) -> None:
    data = yaml.safe_load(sound)
    data["domains"] = ["other.test"]
    assert image.path(parse(yaml.safe_dump(data)), "mail") == image.path(site, "mail")
    assert image.path(site, "mail") != image.path(site, "lb")
