"""What the roles declare about themselves: their manifest, their settings and their templates."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from posthouse import PosthouseError
from posthouse.strict import Document, NotYaml, Strict, did_you_mean, problems

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"

# In the order in which a node's tiers are converged: each leans on those before it.
TIERS = ("base", "directory", "store", "filter", "mx", "submission", "outbound", "lb", "access")

# A tier that cannot work unless others run on the same node, and why.
NEEDS = {
    "store": {"directory": "quotas and logins are looked up in the directory's local replica"},
    "filter": {"directory": "a sender's addresses are looked up in the directory's local replica"},
    "mx": {
        "directory": "recipients are looked up in the directory's local replica",
        "filter": "it scans mail while the sender waits",
        "outbound": "what is forwarded leaves through it",
    },
    "submission": {
        "directory": "senders are looked up in the directory's local replica",
        "filter": "it scans mail while the sender waits",
        "outbound": "everything that leaves goes through one choke point",
    },
    "outbound": {"mx": "mail to the site's own accounts goes back in there"},
    "access": {"directory": "it finds an account's store in the directory's local replica"},
}

# Tiers that cannot be on the same node, and why.
CONFLICTS = {
    "access": {"store": "Debian's packages of Dovecot and Cyrus exclude each other"},
    "lb": {"mx": "both listen on port 25", "submission": "both listen on ports 465 and 587"},
}


class RoleError(PosthouseError):
    """A role's manifest that cannot be used: the file, and one line for each problem."""


def _matching(pattern: str, what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


def _source(value: str) -> str:
    words = (*TIERS, "any", "controller", "nodes")
    if value not in words:
        raise ValueError(f"no source {value!r}; {did_you_mean(value, words)}")
    return value


_READY = r"(smtps?|lmtp|imaps?|pop3s?|sieve|tcp)(\+proxy)? (127\.0\.0\.1|localhost|\{\w+\}):\d+|unix /\S+|exec .+"
Package = Annotated[str, _matching(r"[a-z0-9][a-z0-9.+-]+", "the name of a Debian package")]
SecretName = Annotated[str, _matching(r"[a-z]\w*", "the name of a secret; write it like store_proxy")]
Path_ = Annotated[str, _matching(r"/[^\s/]\S*", "a path; it begins with / and has no spaces")]
Access = Annotated[str, _matching(r"0[0-7]{3} [a-z_][\w-]*:[a-z_][\w-]*", 'a mode and owners; write "0640 root:mail"')]
Unit = Annotated[str, _matching(r"[\w@.{}:-]+", "the name of a systemd unit")]
Ready = Annotated[str, _matching(_READY, "a health check; write it like `smtp 127.0.0.1:25` or `exec COMMAND`")]
PortRange = Annotated[str, _matching(r"\d+-\d+", "a range of ports; write it like 2101-2199")]


class Port(Strict):
    """What nftables lets in."""

    port: Annotated[int, Field(ge=1, le=65535)] | PortRange | None = Field(
        None, description="TCP port, or `FIRST-LAST`"
    )
    protocol: Literal["vrrp"] | None = Field(None, description="an IP protocol, instead of a port")
    sources: list[Annotated[str, AfterValidator(_source)]] = Field(
        alias="from", min_length=1, description="from where: tiers, `nodes` (all of them), `controller` or `any`"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Port:
        if (self.port is None) == (self.protocol is None):
            raise ValueError("needs either a port or a protocol")
        return self


class Service(Strict):
    """A systemd service of the role: enabled, running, and acted on when files that it owns change."""

    owns: list[Path_] = Field([], description="files, folders or patterns; a change in them acts on the service")
    check: str | list[str] = Field(
        [], description="validators, run on the node; they see the new files in place, and nobody else does yet"
    )
    on_change: Literal["restart", "reload"] = Field("restart", description="what a change in an owned file does")
    restart_for: list[Path_] = Field([], description="with `on_change: reload`, files that need a restart nevertheless")
    ready: Ready | list[Ready] = Field([], description="health checks: `KIND HOST:PORT`, `unix PATH` or `exec COMMAND`")

    @model_validator(mode="after")
    def _restarts(self) -> Service:
        if self.restart_for and self.on_change == "restart":
            raise ValueError(
                "restart_for says nothing where every change restarts; add `on_change: reload`, or drop it"
            )
        return self


class Manifest(Strict):
    """A role as data."""

    packages: list[Package] = Field(
        [], description="Debian packages; in the image, and installed where they are missing"
    )
    secrets: list[SecretName] = Field(
        [], description="passwords that the templates use as `secrets.NAME`; made by `init`"
    )
    ports: list[Port] = Field([], description="what may be reached from where; everything else is closed")
    groups: dict[str, list[str]] = Field({}, description="supplementary groups of system users")
    each: dict[str, Literal["node_stores", "dkim"]] = Field(
        {},
        description="`{NAME}` in a path, unit or command stands for each item of that variable, as `NAME` in templates",
    )
    directories: dict[Path_, Access] = Field({}, description="directories to make, with mode and owners")
    modes: dict[Path_, Access] = Field({}, description='patterns of files that are not "0644 root:root"')
    services: dict[Unit, Service | None] = Field(
        {}, description="systemd services, in the order in which they are checked"
    )
    masked: list[Unit] = Field([], description="units that must not run: Debian's own, where ours replace them")

    @model_validator(mode="after")
    def _placeholders(self) -> Manifest:
        for text in (*self.directories, *self.services):
            for name in re.findall(r"\{(\w+)\}", text):
                if name not in self.each:
                    raise ValueError(f"{text}: {{{name}}} is not in `each`; {did_you_mean(name, self.each)}")
        return self


@cache
def manifest(tier: str) -> dict[str, Any]:
    """The manifest of a tier's role as it is written (docs/engine.md has its keys). Raises RoleError."""
    path = ROLES / tier / "manifest.yml"
    return read_manifest(path.read_text(), path) if path.exists() else {}


def read_manifest(text: str, path: Path) -> dict[str, Any]:
    """The manifest that `text`, the content of `path`, describes. Raises RoleError with all that is wrong."""
    try:
        document = Document(text)
    except NotYaml as error:
        raise RoleError(f"{path.relative_to(ROOT)}: {error}") from None
    found = list(document.problems)
    try:
        Manifest.model_validate(document.data)
    except ValidationError as error:
        found += problems(Manifest, error)
    if found:
        raise RoleError("\n".join(f"{path.relative_to(ROOT)}: {line}" for line in document.text(found)))
    return document.data


@cache
def _interface(tier: str) -> dict[str, Any]:
    path = ROLES / tier / "meta" / "argument_specs.yml"
    return dict(yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["argument_specs"]["main"]) if path.exists() else {}


def settings(tier: str) -> dict[str, dict[str, Any]]:
    """The role's settings as its argument_specs declares them: {setting without the tier's prefix: spec}."""
    return {name.removeprefix(f"{tier}_"): spec for name, spec in _interface(tier).get("options", {}).items()}


def description(tier: str) -> str:
    """What the role is, in half a sentence."""
    return str(_interface(tier).get("short_description", tier))


def packages(tiers: list[str] | tuple[str, ...]) -> list[str]:
    """The Debian packages of these tiers, sorted, each once."""
    return sorted({package for tier in tiers for package in manifest(tier).get("packages", [])})
