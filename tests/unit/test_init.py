import re
from pathlib import Path

import pytest

from posthouse import init, secrets, sitefile
from posthouse.secrets import SecretsError
from posthouse.sitefile import SiteError, load, parse


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An inventory without a site."""
    for module in (sitefile, secrets):
        monkeypatch.setattr(module, "INVENTORY", tmp_path)
    monkeypatch.delenv("ANSIBLE_VAULT_PASSWORD_FILE", raising=False)
    return tmp_path


def refusal(inventory: Path, *arguments: object) -> list[str]:
    """The problems that `write` reports; it must leave no trace."""
    before = sorted(inventory.rglob("*"))
    with pytest.raises(SiteError) as caught:
        init.write(*arguments)  # type: ignore[arg-type]
    assert sorted(inventory.rglob("*")) == before
    return caught.value.problems


@pytest.mark.parametrize("in_lab", [True, False])
@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "172.20.0.0/16", "10.77.0.0/24", "192.0.2.128/26", "198.51.100.0/24"])
def test_new_site_loads_and_has_its_secrets(inventory: Path, cidr: str, in_lab: bool) -> None:
    path = init.write("fresh", "mail.example.org", cidr, in_lab)
    assert path == inventory / "fresh" / "site.yml"
    site = load("fresh")
    assert secrets.load(site).for_node(site.nodes["mail1"])
    assert (bool(site.lab), str(site.network.cidr), site.domain) == (in_lab, cidr, "mail.example.org")
    assert list(site.nodes) == ["lb1", "lb2", "mail1", "mail2", "mail3"]


@pytest.mark.parametrize("cidr", ["10.77.0.0/24", "192.0.2.128/26"])
def test_nodes_that_come_later_move_none(inventory: Path, cidr: str) -> None:
    text = init.write("fresh", "example.org", cidr, False).read_text()
    larger = parse(text.replace("lb[1:2]", "lb[1:4]").replace("mail[1:3]", "mail[1:9]"))
    assert all(larger.nodes[node.name].address == node.address for node in load("fresh").nodes.values())


@pytest.mark.parametrize("in_lab", [True, False])
def test_what_is_commented_out_is_right_too(inventory: Path, in_lab: bool) -> None:
    text = init.write("fresh", "example.org", "10.77.0.0/24", in_lab).read_text()
    examples = re.findall(r"^ *#(?! )", text, re.MULTILINE)
    assert len(examples) > 5
    site = parse(re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE))
    assert site.classes["mail"].disk_gib == 500


def test_every_key_that_is_set_has_a_comment_above_its_section(inventory: Path) -> None:
    lines = init.write("fresh", "example.org", "10.77.0.0/24", True).read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[a-z]", line):
            assert lines[number - 1].startswith("#"), line


def test_existing_site_is_left_alone(inventory: Path) -> None:
    init.write("fresh", "example.org", "10.77.0.0/24", True)
    before = {path: path.read_bytes() for path in inventory.rglob("*") if path.is_file()}
    assert refusal(inventory, "fresh", "other.org", "10.78.0.0/24", True) == [
        "fresh exists already; edit it, or choose another name"
    ]
    assert {path: path.read_bytes() for path in inventory.rglob("*") if path.is_file()} == before


def test_all_bad_arguments_are_told_at_once(inventory: Path) -> None:
    assert refusal(inventory, "My Site", "example", "10.77.0.1/24", False) == [
        "SITE: 'My Site' is not a name for a site; use a to z, 0 to 9 and hyphens, a letter first",
        "--domain: 'example' is not a mail domain; write it in lower case, like example.org (others as xn--…)",
        "--cidr: 10.77.0.1/24 has host bits set; did you mean 10.77.0.0/24?",
    ]


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x", "Fresh", "1st", "-x", "a" * 40, "é"])
def test_bad_name(inventory: Path, name: str) -> None:
    assert "is not a name for a site" in refusal(inventory, name, "example.org", "10.77.0.0/24", False)[0]


@pytest.mark.parametrize(
    "domain", ["", "localhost", "Example.org", "ex ample.org", "-a.org", "a..org", "10.0.0.1", "é.fr"]
)
def test_bad_domain(inventory: Path, domain: str) -> None:
    assert "is not a mail domain" in refusal(inventory, "fresh", domain, "10.77.0.0/24", False)[0]


@pytest.mark.parametrize(
    ("cidr", "reason"),
    [
        ("10.77.0.0", "must be a /8 to a /26"),
        ("10.77.0.0/27", "must be a /8 to a /26"),
        ("0.0.0.0/0", "must be a /8 to a /26"),
        ("127.0.0.0/16", "is not for machines"),
        ("224.0.0.0/16", "is not for machines"),
        ("240.0.0.0/16", "is not for machines"),
        ("fd00::/64", "is not an IPv4 network"),
        ("10.77.0.0/33", "is not an IPv4 network"),
        ("ten", "is not an IPv4 network"),
    ],
)
def test_bad_network(inventory: Path, cidr: str, reason: str) -> None:
    assert reason in refusal(inventory, "fresh", "example.org", cidr, False)[0]


def test_domain_that_leaves_no_room_for_the_nodes_names(inventory: Path) -> None:
    domain = f"{'a' * 40}.{'b' * 20}.org"
    assert "is longer than the 64 characters" in refusal(inventory, "fresh", domain, "10.77.0.0/24", False)[0]


def test_a_site_without_secrets_is_not_left_behind(inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", str(inventory / "none"))
    with pytest.raises(SecretsError):
        init.write("fresh", "example.org", "10.77.0.0/24", True)
    assert list(inventory.iterdir()) == []
