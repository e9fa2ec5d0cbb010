"""A site's secrets: passwords, the site's own CA, certificates, SSH and DKIM keys.

They live in `inventory/SITE/secrets.yml`, an ansible-vault file; its password is in `.vault-password` beside it, or
where ANSIBLE_VAULT_PASSWORD_FILE points. Nothing is ever made twice: `ensure` adds what the site needs and the file
lacks, and renews certificates that no longer fit.
"""

from __future__ import annotations

import base64
import copy
import fcntl
import ipaddress
import os
import secrets as random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from posthouse import PosthouseError, roles
from posthouse.model import Node, Site
from posthouse.sitefile import INVENTORY

RENEW_BEFORE = timedelta(days=30)
DKIM_SELECTOR = "ph1"
EMPTY: dict[str, Any] = {"passwords": {}, "ca": {}, "nodes": {}, "ssh": {}, "dkim": {}}

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


class SecretsError(PosthouseError):
    """The secrets file cannot be read; the message says what to do."""


class Secrets:
    """The opened secrets of a site. `data` is what the vault holds."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @property
    def passwords(self) -> dict[str, str]:
        """Passwords between services, by the name in a manifest's `secrets`."""
        return dict(self.data["passwords"])

    def password(self, name: str) -> str:
        """One of them. Raises SecretsError if the secrets were made before anything asked for it."""
        if name not in self.data["passwords"]:
            raise SecretsError(
                f"the site's secrets lack the password {name}; posthouse deploy SITE adds what is missing"
            )
        return str(self.data["passwords"][name])

    @property
    def ca_cert(self) -> str:
        """The site's CA certificate, PEM."""
        return str(self.data["ca"]["cert"])

    @property
    def ssh(self) -> dict[str, Any]:
        """{"private", "public", "host_keys": {node: {"private", "public"}}}, all in OpenSSH's formats.

        The private key of a machine that was installed by `provision` is on that machine only.
        """
        return dict(self.data["ssh"])

    @cached_property
    def dkim(self) -> list[dict[str, str]]:
        """Signing keys: [{"name" (the domain), "domain", "selector", "key" (PEM), "record" (the DNS TXT value)}]."""
        return [
            {
                "name": domain,
                "domain": domain,
                "selector": entry["selector"],
                "key": entry["key"],
                "record": _dkim_record(entry["key"]),
            }
            for domain, entry in self.data["dkim"].items()
        ]

    def for_address(self, address: str) -> tuple[str, str]:
        """A certificate of the site's CA for an address, and its key, both PEM: for a server that runs for a while."""
        key, certificate = _signed(self.data["ca"], address, [x509.IPAddress(ipaddress.ip_address(address))], 825)
        return certificate, key

    def for_node(self, node: Node) -> dict[str, Any]:
        """The template variables `secrets`, `tls` and `dkim` of a node: what its tiers declare and nothing more.

        Raises SecretsError if they were made before the site had this node, or its tiers this need.
        """
        names = sorted({name for tier in node.tiers for name in roles.manifest(tier).get("secrets", [])})
        certificate = self.data["nodes"].get(node.name)
        lacking = [name for name in names if name not in self.data["passwords"]]
        if lacking or not certificate:
            what = f"the password {lacking[0]}" if lacking else "a certificate"
            raise SecretsError(
                f"{node.name}: the site's secrets lack {what}; posthouse deploy SITE adds what is missing"
            )
        return {
            "secrets": {name: self.data["passwords"][name] for name in names},
            "tls": {"ca": self.ca_cert, "cert": certificate["cert"], "key": certificate["key"]},
            "dkim": self.dkim if "outbound" in node.tiers else [],
        }


def files(site: Site) -> tuple[Path, Path]:
    """Where a site's secrets and their password are: (secrets.yml, password file)."""
    folder = INVENTORY / site.name
    return folder / "secrets.yml", Path(os.environ.get("ANSIBLE_VAULT_PASSWORD_FILE", folder / ".vault-password"))


def load(site: Site) -> Secrets:
    """Opens the secrets of a site. Raises SecretsError, without a word of what is inside."""
    path, password_file = files(site)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise SecretsError(
            f"{path}: not there; if the site had secrets, put the file back from a backup, else make them with: "
            f"posthouse deploy {site.name}"
        ) from None
    except OSError as error:
        raise SecretsError(f"{path}: {error.strerror}; make it a file that you may read") from None
    vault = _vault(password_file)
    try:
        data = yaml.load(vault.decrypt(text), Loader=yaml.CSafeLoader)
    except (AnsibleError, yaml.YAMLError, ValueError):
        raise SecretsError(
            f"{path}: cannot be decrypted with the password in {password_file}: the file is cut short or changed, or "
            "the password is another one; put both back from a backup"
        ) from None
    if not isinstance(data, dict) or set(data) != set(EMPTY):
        raise SecretsError(f"{path}: does not hold {', '.join(EMPTY)}; put it back from a backup")
    return Secrets(data)


def ensure(site: Site, new: bool = True) -> Secrets:
    """Opens the secrets of a site and adds what is missing or due, for instance for a new node. Raises SecretsError.

    new: the site may be one that never had any. Else a file that is gone is an error: new ones open nothing of the old.
    """
    path, password_file = files(site)
    try:
        with _locked(path.parent):
            data = copy.deepcopy(EMPTY) if new and not path.exists() else load(site).data
            before = copy.deepcopy(data)
            _complete(site, data)
            if data != before:
                if not password_file.exists() and "ANSIBLE_VAULT_PASSWORD_FILE" not in os.environ:
                    _write(password_file, random.token_urlsafe(32) + "\n")
                _save(path, password_file, data)
    except OSError as error:
        raise SecretsError(f"{error.filename}: {error.strerror}; the secrets stay as they were") from None
    return Secrets(data)


def note_host_key(site: Site, node: Node, public: str) -> None:
    """Keeps the host key that a machine made for itself and reported; from now on ssh to it accepts this one only.

    Raises SecretsError if it is none.
    """
    words = public.split()
    try:
        serialization.load_ssh_public_key(" ".join(words[:2]).encode())
    except (ValueError, UnsupportedAlgorithm):
        raise SecretsError(f"{node.name}: what it reported is no host key; install it anew") from None
    _change_host_key(site, node, {"public": f"{words[0]} {words[1]} {node.fqdn}"})


def forget_host_key(site: Site, node: Node) -> None:
    """Forgets the host key of a machine that is to be made anew; a container of that name is given a pair of keys."""
    _change_host_key(site, node, _ssh_key(node.fqdn))


def _change_host_key(site: Site, node: Node, entry: dict[str, str]) -> None:
    ensure(site)
    path, password_file = files(site)
    with _locked(path.parent):
        data = load(site).data
        if data["ssh"]["host_keys"].get(node.name) != entry:
            data["ssh"]["host_keys"][node.name] = entry
            _save(path, password_file, data)


def _save(path: Path, password_file: Path, data: dict[str, Any]) -> None:
    _write(path, _vault(password_file).encrypt(yaml.dump(data, Dumper=yaml.CSafeDumper)).decode())


def placeholders(site: Site) -> Secrets:
    """Secrets of the same kind that belong to nobody, for files that others may read. Every call makes new keys."""
    names = {name for tier in roles.TIERS for name in roles.manifest(tier).get("secrets", [])}
    data = copy.deepcopy(EMPTY) | {"passwords": {name: f"placeholder-{name}" for name in sorted(names)}}
    _complete(site, data)
    return Secrets(data)


def _vault(password_file: Path) -> VaultLib:
    """What encrypts and decrypts with the password in a file. Raises SecretsError if that is no safe place for one."""
    try:
        mode = password_file.stat().st_mode
        password = password_file.read_bytes().strip()
    except FileNotFoundError:
        raise SecretsError(
            f"{password_file}: not there; put it back from a backup, or name the file that holds the password in "
            "ANSIBLE_VAULT_PASSWORD_FILE"
        ) from None
    except OSError as error:
        raise SecretsError(f"{password_file}: {error.strerror}; make it a file that you may read") from None
    if mode & 0o077:
        raise SecretsError(f"{password_file}: others may read it; run: chmod 600 {password_file}")
    if mode & 0o100:
        raise SecretsError(f"{password_file}: is a program; write the password itself into a file, and name that")
    if not password:
        raise SecretsError(f"{password_file}: is empty; put it back from a backup")
    return VaultLib([("default", VaultSecret(password))])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two commands at once must not each make keys of their own."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    """Replaces a file whole, readable by its owner alone."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _complete(site: Site, data: dict[str, Any]) -> None:
    for tier in roles.TIERS:
        for name in roles.manifest(tier).get("secrets", []):
            data["passwords"].setdefault(name, random.token_urlsafe(24))
    # No node's business: it is lent to them for as long as a backup takes.
    data["passwords"].setdefault("backup_repository", random.token_urlsafe(24))
    if not data["ca"]:
        data["ca"] = _authority(site)
    for node in site.nodes.values():
        names = certificate_names(site, node)
        if not _fits(data["nodes"].get(node.name), node, names):
            data["nodes"][node.name] = _certificate(site, data["ca"], node, names)
    if not data["ssh"]:
        data["ssh"] = {**_ssh_key(f"posthouse@{site.domain}"), "host_keys": {}}
    for node in site.nodes.values():
        data["ssh"]["host_keys"].setdefault(node.name, _ssh_key(node.fqdn))
    for domain in site.domains:
        # 2048 bits: what receivers are sure to verify; a longer record does not fit one DNS string anyway.
        data["dkim"].setdefault(domain, {"selector": DKIM_SELECTOR, "key": _pem(rsa.generate_private_key(65537, 2048))})


def certificate_names(site: Site, node: Node) -> list[str]:
    """What a node's certificate is valid for: itself, its stores, and the names that users connect to."""
    stores = [s.host for s in site.stores.values() if node.name in (s.primary, *s.replicas)]
    public = [f"mail.{domain}" for domain in site.domains] if {"mx", "submission", "access"} & set(node.tiers) else []
    return [node.fqdn, *stores, *public]


def _fits(have: dict[str, str] | None, node: Node, names: list[str]) -> bool:
    if not have:
        return False
    certificate = x509.load_pem_x509_certificate(have["cert"].encode())
    subjects = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    due = certificate.not_valid_after_utc - RENEW_BEFORE
    addresses = [str(address) for address in subjects.get_values_for_type(x509.IPAddress)]
    fits = subjects.get_values_for_type(x509.DNSName) == names and addresses == [node.address]
    return fits and datetime.now(UTC) < due


def _pem(key: PrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _builder(subject: str, public_key: Any, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        # An hour early: a node whose clock is a little behind must not refuse its own certificate.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _authority(site: Site) -> dict[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(f"{site.name} site CA", key.public_key(), 3650)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{site.name} site CA")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return {"key": _pem(key), "cert": certificate.public_bytes(serialization.Encoding.PEM).decode()}


def _certificate(site: Site, ca: dict[str, str], node: Node, names: list[str]) -> dict[str, str]:
    identifiers = [*map(x509.DNSName, names), x509.IPAddress(ipaddress.ip_address(node.address))]
    key, certificate = _signed(ca, node.fqdn, identifiers, site.tls.certificate_days)
    return {"key": key, "cert": certificate}


def _signed(ca: dict[str, str], subject: str, identifiers: list[x509.GeneralName], days: int) -> tuple[str, str]:
    """A new key, and the CA's certificate for it: both PEM."""
    authority = x509.load_pem_x509_certificate(ca["cert"].encode())
    ca_key = serialization.load_pem_private_key(ca["key"].encode(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(subject, key.public_key(), days)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName(identifiers), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _pem(key), certificate.public_bytes(serialization.Encoding.PEM).decode()


def _ssh_key(comment: str) -> dict[str, str]:
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return {"private": private.decode(), "public": f"{public.decode()} {comment}"}


def _dkim_record(pem: str) -> str:
    key = serialization.load_pem_private_key(pem.encode(), None)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"v=DKIM1; k=rsa; p={base64.b64encode(public).decode()}"
