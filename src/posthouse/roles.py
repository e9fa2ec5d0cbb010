"""What the roles declare about themselves: their manifest, their settings and their templates."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"

# In the order in which a node's tiers are converged: each leans on those before it.
TIERS = ("base", "directory", "store", "filter", "mx", "submission", "outbound", "lb", "access")

# A tier that cannot work unless another one runs on the same node, and why.
NEEDS = {
    "store": ("directory", "quotas and logins are looked up in the directory's local replica"),
    "filter": ("directory", "a sender's addresses are looked up in the directory's local replica"),
    "mx": ("filter", "it scans mail while the sender waits"),
    "submission": ("outbound", "everything that leaves goes through one choke point"),
    "access": ("directory", "it finds an account's store in the directory's local replica"),
}


def _yaml(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader) or {} if path.exists() else {}


@cache
def manifest(tier: str) -> dict[str, Any]:
    """The manifest of a tier's role (see docs/engine.md for its keys)."""
    return _yaml(ROLES / tier / "manifest.yml")


@cache
def settings(tier: str) -> dict[str, dict[str, Any]]:
    """The role's settings as its argument_specs declares them: {setting without the tier's prefix: spec}."""
    options = (
        _yaml(ROLES / tier / "meta" / "argument_specs.yml").get("argument_specs", {}).get("main", {}).get("options")
    )
    return {name.removeprefix(f"{tier}_"): spec for name, spec in (options or {}).items()}


def packages(tiers: list[str] | tuple[str, ...]) -> list[str]:
    """The Debian packages of these tiers, sorted, each once."""
    return sorted({package for tier in tiers for package in manifest(tier).get("packages", [])})
