import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from posthouse import roles, run, secrets
from posthouse.model import Site
from posthouse.secrets import Secrets, SecretsError
from posthouse.sitefile import parse


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the site in an inventory of its own."""
    monkeypatch.setattr(secrets, "INVENTORY", tmp_path)
    monkeypatch.delenv("ANSIBLE_VAULT_PASSWORD_FILE", raising=False)
    (tmp_path / "lab").mkdir()
    return tmp_path / "lab"


@pytest.fixture
def made(folder: Path, site: Site) -> Secrets:
    """The site's secrets, just made."""
    return secrets.ensure(site)


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(folder: Path, call: Callable[[], object]) -> str:
    """What a call complains of; it must leave everything as it was."""
    before = state(folder)
    with pytest.raises(SecretsError) as caught:
        call()
    assert state(folder) == before, "something was changed"
    return str(caught.value)


def test_made_once_and_then_kept(folder: Path, site: Site, made: Secrets) -> None:
    before = state(folder)
    assert secrets.ensure(site).data == made.data == secrets.load(site).data
    assert state(folder) == before


def test_files_are_the_owners_alone_and_show_nothing(folder: Path, made: Secrets) -> None:
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "secrets.yml": 0o600,
        ".vault-password": 0o600,
    }
    text = (folder / "secrets.yml").read_text()
    assert text.startswith("$ANSIBLE_VAULT;1.1;AES256\n")
    assert "PRIVATE KEY" not in text


def test_all_that_roles_ask_for_is_there(site: Site, made: Secrets) -> None:
    asked = {name for tier in roles.TIERS for name in roles.manifest(tier).get("secrets", [])}
    asked.add("backup_repository")  # the controller's own
    assert set(made.passwords) == asked
    assert len(set(made.passwords.values())) == len(asked)
    assert set(made.ssh["host_keys"]) == set(site.nodes)
    assert [key["domain"] for key in made.dkim] == ["lab.test"]
    assert made.dkim[0]["record"].startswith("v=DKIM1; k=rsa; p=MIIB")


def test_a_node_gets_what_its_tiers_declare_and_nothing_more(site: Site, made: Secrets) -> None:
    lb1, mail1 = (made.for_node(site.nodes[name]) for name in ("lb1", "mail1"))
    assert "store_admin" in mail1["secrets"]
    assert "store_admin" not in lb1["secrets"]
    assert lb1["dkim"] == []
    assert lb1["tls"]["key"] != mail1["tls"]["key"]


def test_certificates(site: Site, made: Secrets) -> None:
    authority = x509.load_pem_x509_certificate(made.ca_cert.encode())
    tls = made.for_node(site.nodes["mail2"])["tls"]
    certificate = x509.load_pem_x509_certificate(tls["cert"].encode())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [
        "mail2.lab.test",
        "s01.lab.test",
        "s02.lab.test",
        "mail.lab.test",
    ]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.77.0.22"]
    assert load_pem_private_key(tls["key"].encode(), None).public_key() == certificate.public_key()


def test_only_certificates_that_no_longer_fit_are_made_anew(sound: str, site: Site, made: Secrets) -> None:
    moved = parse(sound.replace("10.77.0.21}", "10.77.0.31}").replace("s03: {primary: mail3", "s04: {primary: mail3"))
    renewed = secrets.ensure(moved)
    changed = {name for name, entry in renewed.data["nodes"].items() if entry != made.data["nodes"][name]}
    assert changed == {"mail1", "mail2", "mail3"}, "their addresses changed"
    store_only = parse(sound.replace("10.77.0.21}", "10.77.0.31}"))
    again = secrets.ensure(store_only)
    changed = {name for name, entry in again.data["nodes"].items() if entry != renewed.data["nodes"][name]}
    assert changed == {"mail1", "mail3"}, "they carry the store that changed"
    assert again.ca_cert == made.ca_cert
    assert again.ssh == made.ssh


def test_certificates_are_made_anew_before_they_expire(
    site: Site, made: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "RENEW_BEFORE", timedelta(days=site.tls.certificate_days + 1))
    renewed = secrets.ensure(site)
    assert all(renewed.data["nodes"][name] != made.data["nodes"][name] for name in site.nodes)


def test_a_node_that_came_later_is_named(sound: str, made: Secrets) -> None:
    larger = parse(sound.replace("mail[1:3]", "mail[1:4]"))
    with pytest.raises(SecretsError, match=r"mail4: the site's secrets lack a certificate; posthouse deploy SITE adds"):
        secrets.load(larger).for_node(larger.nodes["mail4"])
    secrets.ensure(larger).for_node(larger.nodes["mail4"])


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.5, 0.9, 0.9999])
def test_truncated_file(folder: Path, site: Site, made: Secrets, share: float) -> None:
    text = (folder / "secrets.yml").read_bytes()
    (folder / "secrets.yml").write_bytes(text[: int(len(text) * share)])
    for call in (secrets.load, secrets.ensure):
        assert "cut short or changed" in refusal(folder, lambda call=call: call(site))


def test_changed_byte(folder: Path, site: Site, made: Secrets) -> None:
    text = bytearray((folder / "secrets.yml").read_bytes())
    text[len(text) // 2] ^= 1
    (folder / "secrets.yml").write_bytes(text)
    assert "cut short or changed" in refusal(folder, lambda: secrets.ensure(site))


def test_wrong_password_is_not_shown(folder: Path, site: Site, made: Secrets) -> None:
    (folder / ".vault-password").write_text("another-one\n")
    message = refusal(folder, lambda: secrets.ensure(site))
    assert "the password is another one" in message
    assert "another-one" not in message


def test_missing_password_file(folder: Path, site: Site, made: Secrets) -> None:
    (folder / ".vault-password").unlink()
    message = refusal(folder, lambda: secrets.ensure(site))
    assert ".vault-password: not there; put it back from a backup" in message


def test_empty_password_file(folder: Path, site: Site, made: Secrets) -> None:
    (folder / ".vault-password").write_text("\n")
    assert "is empty" in refusal(folder, lambda: secrets.load(site))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_password_file_that_others_may_read(folder: Path, site: Site, made: Secrets, mode: int) -> None:
    (folder / ".vault-password").chmod(mode)
    message = refusal(folder, lambda: secrets.load(site))
    assert f"others may read it; run: chmod 600 {folder}/.vault-password" in message


def test_password_file_elsewhere(
    folder: Path, site: Site, made: Secrets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = (folder / ".vault-password").rename(tmp_path / "password")
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", str(elsewhere))
    assert secrets.load(site).data == made.data
    elsewhere.chmod(0o700)
    assert "is a program" in refusal(folder, lambda: secrets.load(site))
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", str(tmp_path / "none"))
    assert f"{tmp_path}/none: not there" in refusal(folder, lambda: secrets.load(site))


def test_named_password_file_that_is_not_there_is_not_made(
    folder: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", str(tmp_path / "none"))
    assert "none: not there" in refusal(folder, lambda: secrets.ensure(site))


def test_no_secrets_yet(folder: Path, site: Site) -> None:
    assert "secrets.yml: not there" in refusal(folder, lambda: secrets.load(site))


def test_folder_instead_of_a_file(folder: Path, site: Site) -> None:
    (folder / "secrets.yml").mkdir()
    with pytest.raises(SecretsError, match=r"secrets.yml: Is a directory"):
        secrets.ensure(site)


@pytest.mark.parametrize("content", ["- a\n- b\n", "passwords: {}\n", ""])
def test_file_that_holds_something_else(folder: Path, site: Site, made: Secrets, content: str) -> None:
    text = secrets._vault(folder / ".vault-password").encrypt(content)
    (folder / "secrets.yml").write_bytes(text)
    assert "does not hold passwords, ca" in refusal(folder, lambda: secrets.load(site))


def test_a_full_disk_changes_nothing(folder: Path, sound: str, made: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device", "secrets.yml.new")

    monkeypatch.setattr(os, "fsync", full)
    before = (folder / "secrets.yml").read_bytes()
    with pytest.raises(SecretsError, match="No space left on device; the secrets stay as they were"):
        secrets.ensure(parse(sound.replace("mail[1:3]", "mail[1:4]")))
    assert (folder / "secrets.yml").read_bytes() == before


def test_placeholders_are_of_the_same_kind_and_nobodys(folder: Path, site: Site, made: Secrets) -> None:
    fake = secrets.placeholders(site)
    assert fake.passwords["store_admin"] == "placeholder-store_admin"
    assert fake.ca_cert != made.ca_cert
    for node in site.nodes.values():
        x509.load_pem_x509_certificate(fake.for_node(node)["tls"]["cert"].encode())
    assert set(state(folder)) == {"secrets.yml", ".vault-password"}


def test_only_a_new_site_is_given_new_ones(folder: Path, site: Site) -> None:
    for call in (lambda: secrets.ensure(site, new=False), lambda: run.reach(site)):
        assert "secrets.yml: not there; if the site had secrets, put the file back" in refusal(folder, call)


def test_what_is_missing_is_added_for_all_that_reach_nodes(folder: Path, site: Site, made: Secrets) -> None:
    path, password_file = secrets.files(site)
    older = {**made.data, "passwords": {k: v for k, v in made.passwords.items() if k != "backup_repository"}}
    secrets._save(path, password_file, older)
    with pytest.raises(SecretsError, match="lack the password backup_repository; posthouse deploy SITE adds"):
        secrets.load(site).password("backup_repository")
    assert secrets.ensure(site, new=False).password("backup_repository")
