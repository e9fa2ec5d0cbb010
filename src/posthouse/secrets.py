"""A site's secrets: passwords, the site's own CA, certificates, SSH and DKIM keys.

They live in `inventory/SITE/secrets.yml`, an ansible-vault file; its password is in `.vault-password` beside it, or
where ANSIBLE_VAULT_PASSWORD_FILE points. Nothing is ever made twice: `ensure` adds what the site needs and the file
lacks, and renews certificates that no longer fit.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets as random
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from posthouse import roles
from posthouse.model import Node, Site
from posthouse.sitefile import INVENTORY

RENEW_BEFORE = timedelta(days=30)
DKIM_SELECTOR = "ph1"

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


class SecretsError(Exception):
    """The secrets file cannot be read; the message says what to do."""


class Secrets:
    """The opened secrets of a site. `data` is what the vault holds."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @property
    def passwords(self) -> dict[str, str]:
        """Passwords between services, by the name in a manifest's `secrets`."""
        return dict(self.data["passwords"])

    @property
    def ca_cert(self) -> str:
        """The site's CA certificate, PEM."""
        return str(self.data["ca"]["cert"])

    @property
    def ssh(self) -> dict[str, Any]:
        """{"private", "public", "host_keys": {node: {"private", "public"}}}, all in OpenSSH's formats."""
        return dict(self.data["ssh"])

    @cached_property
    def dkim(self) -> list[dict[str, str]]:
        """Signing keys: [{"domain", "selector", "key" (PEM), "record" (the DNS TXT value)}]."""
        return [
            {"domain": domain, "selector": entry["selector"], "key": entry["key"], "record": _dkim_record(entry["key"])}
            for domain, entry in self.data["dkim"].items()
        ]

    def for_node(self, node: Node) -> dict[str, Any]:
        """The template variables `secrets`, `tls` and `dkim` of a node: what its tiers declare and nothing more."""
        names = {name for tier in node.tiers for name in roles.manifest(tier).get("secrets", [])}
        certificate = self.data["nodes"][node.name]
        return {
            "secrets": {name: self.data["passwords"][name] for name in sorted(names)},
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
        vault = _vault(password_file)
    except OSError as error:
        raise SecretsError(
            f"{error.filename}: {error.strerror}; make the secrets with: posthouse init {site.name}, "
            "or put the file back from a backup"
        ) from None
    try:
        data = yaml.safe_load(vault.decrypt(text))
        assert set(data) == {"passwords", "ca", "nodes", "ssh", "dkim"}
    except (AnsibleError, yaml.YAMLError, AssertionError, TypeError, ValueError):
        raise SecretsError(
            f"{path}: cannot be decrypted with the password in {password_file}: the file is cut short or "
            "changed, or the password is another one; put both back from a backup"
        ) from None
    return Secrets(data)


def ensure(site: Site) -> Secrets:
    """Opens the secrets of a site and adds what is missing or due, for instance for a new node. Raises SecretsError."""
    path, password_file = files(site)
    if path.exists():
        data = load(site).data
    else:
        data = {"passwords": {}, "ca": {}, "nodes": {}, "ssh": {}, "dkim": {}}
    before = yaml.safe_dump(data)
    _complete(site, data)
    if yaml.safe_dump(data) != before:
        if not password_file.exists():
            _write(password_file, random.token_urlsafe(32) + "\n")
        _write(path, _vault(password_file).encrypt(yaml.safe_dump(data)).decode())
    return Secrets(data)


def _vault(password_file: Path) -> VaultLib:
    return VaultLib([("default", VaultSecret(password_file.read_bytes().strip()))])


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
    if not data["ca"]:
        data["ca"] = _authority(site)
    for node in site.nodes.values():
        names = certificate_names(site, node)
        if not _fits(data["nodes"].get(node.name), names):
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


def _fits(have: dict[str, str] | None, names: list[str]) -> bool:
    if not have:
        return False
    certificate = x509.load_pem_x509_certificate(have["cert"].encode())
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    due = certificate.not_valid_after_utc - RENEW_BEFORE
    return extension.get_values_for_type(x509.DNSName) == names and datetime.now(UTC) < due


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
    authority = x509.load_pem_x509_certificate(ca["cert"].encode())
    ca_key = serialization.load_pem_private_key(ca["key"].encode(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    identifiers = [*map(x509.DNSName, names), x509.IPAddress(ipaddress.ip_address(node.address))]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(node.fqdn, key.public_key(), site.tls.certificate_days)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName(identifiers), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return {"key": _pem(key), "cert": certificate.public_bytes(serialization.Encoding.PEM).decode()}


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
