"""Every role is of one shape, and what it declares is what it does."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jinja2.meta
import pytest
import yaml

from posthouse import render, roles, secrets
from posthouse.model import Site, settings_model
from posthouse.roles import ROLES, RoleError, read_manifest

TASKS = """\
- name: Converge this role
  converge:
    tiers: ["{{ role_name }}"]
"""
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list}

every_tier = pytest.mark.parametrize("tier", roles.TIERS)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def specs(tier: str) -> dict[str, Any]:
    """The options of a role's argument_specs, with their full names."""
    return load(ROLES / tier / "meta" / "argument_specs.yml")["argument_specs"]["main"].get("options", {})


def templates(tier: str) -> Iterator[Path]:
    return (path for path in (ROLES / tier).rglob("*.j2") if path.is_file())


def test_folders_are_the_tiers() -> None:
    assert sorted(path.name for path in ROLES.iterdir()) == sorted(roles.TIERS)


@every_tier
def test_shape(tier: str) -> None:
    assert (ROLES / tier / "tasks" / "main.yml").read_text() == TASKS
    about = load(ROLES / tier / "meta" / "main.yml")["galaxy_info"]
    assert about["role_name"] == tier
    assert about["platforms"] == [{"name": "Debian", "versions": ["trixie"]}]
    assert (ROLES / tier / "README.md").read_text().startswith(f"# {tier}\n\n")


@every_tier
def test_settings_and_defaults_agree(tier: str) -> None:
    path = ROLES / tier / "defaults" / "main.yml"
    defaults = (load(path) or {}) if path.exists() else {}
    assert defaults == {name: spec["default"] for name, spec in specs(tier).items() if not spec.get("required")}


@every_tier
def test_settings_are_well_described(tier: str) -> None:
    for name, spec in specs(tier).items():
        assert re.fullmatch(rf"{tier}_[a-z][a-z0-9_]*", name)
        assert set(spec) <= {"type", "elements", "choices", "description", "default", "required"}, name
        assert spec["description"].endswith((".", ")")), f"{name}: a description is a sentence"
        if spec.get("required"):
            assert "default" not in spec, f"{name}: what is required has no default"
        else:
            assert type(spec["default"]) is TYPES[spec["type"]], name
    settings_model(tier)


@every_tier
def test_settings_are_used(tier: str) -> None:
    """A setting that nothing reads is a promise that nobody keeps."""
    sources = [*ROLES.rglob("templates/**/*.j2"), *ROLES.glob("*/*.j2"), *(roles.ROOT / "library").rglob("*.py")]
    text = "".join(path.read_text() for path in [*sources, *(roles.ROOT / "src").rglob("*.py")] if path.is_file())
    assert [name for name in specs(tier) if not re.search(rf"\b{name}\b", text)] == []


@every_tier
def test_templates_compile_and_use_known_variables(tier: str, site: Site) -> None:
    known = set(render.shared_variables(site)) | {"node", "node_stores", "firewall", "secrets", "tls", "dkim"}
    known |= set(roles.manifest(tier).get("each", {}))
    environment = render._environment()
    for path in templates(tier):
        name = str(path.relative_to(ROLES))
        tree = environment.parse(path.read_text(), name, str(path))
        environment.compile(tree, name, str(path))
        if "templates" in path.parts:  # others are included by these, and see their variables
            assert jinja2.meta.find_undeclared_variables(tree) - known == set(), name


@every_tier
def test_what_is_not_a_template_looks_like_none(tier: str) -> None:
    for path in (ROLES / tier / "templates").rglob("*"):
        if path.is_file() and path.suffix != ".j2":
            assert not re.search(r"\{\{ \w|\{% \w", path.read_text()), f"{path}: does it lack the suffix .j2?"


@every_tier
def test_secrets_are_declared_and_used(tier: str) -> None:
    declared = set(roles.manifest(tier).get("secrets", []))
    used = {name for path in templates(tier) for name in re.findall(r"\bsecrets\.(\w+)", path.read_text())}
    assert used <= declared
    elsewhere = "".join(path.read_text() for path in (roles.ROOT / "library").rglob("*.py"))
    elsewhere += "".join(path.read_text() for path in (roles.ROOT / "src").rglob("*.py"))
    assert [name for name in declared - used if name not in elsewhere] == []


@every_tier
def test_services_have_a_health_check_or_a_reason(tier: str) -> None:
    """A service without `ready` says in a comment why being active is all that is asked of it."""
    text = (ROLES / tier / "manifest.yml").read_text()
    lines = text.splitlines()
    services = next((value for key, value in yaml.compose(text).value if key.value == "services"), None)
    for key, value in services.value if services else []:
        if "ready" not in (roles.manifest(tier)["services"][key.value] or {}):
            last = value.end_mark.line if value.end_mark.column == 0 else value.end_mark.line + 1
            block = lines[key.start_mark.line - 1 : last]
            assert any("#" in line for line in block), f"{key.value}: no health check and no reason"


@every_tier
def test_modes_are_for_files_that_there_are(tier: str) -> None:
    paths = render.sources(tier)
    modes = roles.manifest(tier).get("modes", {})
    assert [pattern for pattern in modes if not any(fnmatchcase(path, pattern) for path in paths)] == []


@pytest.fixture(scope="module")
def generations(site: Site) -> dict[str, dict[str, Any]]:
    """What every node of the site should be, by its name."""
    opened = secrets.placeholders(site)
    shared = render.shared_variables(site)
    return {
        node.name: render.generation(
            shared | render.node_variables(site, node) | opened.for_node(node), list(node.tiers)
        )
        for node in site.nodes.values()
    }


def belongs(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner.rstrip('/')}/") or fnmatchcase(path, owner)


def test_services_own_files_that_there_are(generations: dict[str, dict[str, Any]]) -> None:
    """A path with a typo in `owns` would let a changed file go unnoticed by its daemon."""
    known = {path for generation in generations.values() for path in generation["files"]}
    for generation in generations.values():
        for service in generation["services"]:
            for owner in {*service["owns"], *service["restart_for"]}:
                implied = owner.startswith("/etc/systemd/system/") and service["unit"].partition("@")[0] in owner
                assert implied or any(belongs(path, owner) for path in known), f"{service['unit']}: {owner}"


def test_no_two_tiers_write_the_same_file_or_claim_the_same_unit(site: Site) -> None:
    for node in site.nodes.values():
        paths = [path for tier in node.tiers for path in render.sources(tier)]
        assert len(paths) == len(set(paths)), node.name
        units = [unit for tier in node.tiers for unit in roles.manifest(tier).get("services", {})]
        assert len(units) == len(set(units)), node.name


def test_files_with_passwords_or_keys_are_not_for_everybody(site: Site, generations: dict[str, dict[str, Any]]) -> None:
    for generation in generations.values():
        for path, file in generation["files"].items():
            content = file.get("content", "")
            if "PRIVATE KEY" in content or "placeholder-" in content:
                assert file["mode"][-1] == "0", f"{path}: {file['mode']}"


# --- manifests that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("packges: [postfix]", "line 1: packges: unknown key 'packges'; did you mean 'packages'?"),
        ("services:\n  postfix: {on_chnage: reload}", "line 2: services.postfix.on_chnage: unknown key"),
        ("services:\n  postfix: {on_change: relaod}", "must be 'restart' or 'reload', not 'relaod'"),
        ("services:\n  x: {restart_for: [/etc/x]}", "line 2: services.x: restart_for says nothing"),
        ("services:\n  x: {ready: smpt 127.0.0.1:25}", "'smpt 127.0.0.1:25' is not a health check"),
        ("services:\n  x: {owns: [etc/x]}", "'etc/x' is not a path"),
        ("ports:\n  - {port: 25, from: [acess]}", "line 2: ports.0.from.0: no source 'acess'; did you mean 'access'?"),
        ("ports:\n  - {port: 25}", "line 2: ports.0.from: is missing"),
        ("ports:\n  - {from: [lb]}", "needs either a port or a protocol"),
        ("ports:\n  - {port: 70000, from: [any]}", "must be 65535 or less, not 70000"),
        ("modes: {/etc/x: 0640}", "must be text; put quotes around it, not 416"),
        ('modes: {/etc/x: "0640 root"}', "'0640 root' is not a mode and owners"),
        ("directories: {'/srv/{stor}': \"0755 root:root\"}\neach: {store: node_stores}", "did you mean 'store'?"),
        ("secrets: [store-proxy]", "'store-proxy' is not the name of a secret"),
        ("packages: [a]\npackages: [b]", "line 2: packages: the key stands twice (first on line 1)"),
        ("packages: [Postfix]", "'Postfix' is not the name of a Debian package"),
        ("- packages", "line 1: the file must be a mapping"),
        ("", "line 1: the file must be a mapping"),
    ],
)
def test_broken_manifest(text: str, problem: str) -> None:
    with pytest.raises(RoleError) as caught:
        read_manifest(text, ROLES / "mx" / "manifest.yml")
    assert "roles/mx/manifest.yml: " in str(caught.value)
    assert problem in str(caught.value)


def test_all_problems_of_a_manifest_at_once() -> None:
    with pytest.raises(RoleError) as caught:
        read_manifest("packges: [a]\nsecret: [b]\n", ROLES / "mx" / "manifest.yml")
    assert len(str(caught.value).splitlines()) == 2
