from pathlib import Path
from typing import Any

import pytest
import yaml

from posthouse import render, roles
from posthouse.render import RenderError

STORES = [{"name": "s01", "number": 1}, {"name": "s02", "number": 2}]


class Role:
    """A role made for a test; `files` are those below its templates/."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "roles" / "mx"
        (self.folder / "templates").mkdir(parents=True)

    def render(self, manifest: str = "{}", variables: dict[str, Any] | None = None, **files: str) -> dict[str, Any]:
        (self.folder / "manifest.yml").write_text(manifest)
        for path, text in files.items():
            target = self.folder / "templates" / path.replace("__", "/").replace("_dot_", ".")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return render.generation({"node_stores": STORES, **(variables or {})}, ["mx"])


@pytest.fixture
def role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Role:
    caches = (roles.manifest, render.sources, render._environment)
    monkeypatch.setattr(roles, "ROOT", tmp_path)
    monkeypatch.setattr(roles, "ROLES", tmp_path / "roles")
    for cached in caches:
        cached.cache_clear()
    yield Role(tmp_path)
    for cached in caches:
        cached.cache_clear()


def test_templates_are_rendered_and_other_files_copied(role: Role) -> None:
    made = role.render(variables={"x": 7}, etc__a_dot_conf_dot_j2="a {{ x }}\n", etc__b_dot_conf="b {{ x }}\n")
    assert {path: file["content"] for path, file in made["files"].items()} == {
        "/etc/a.conf": "a 7\n",
        "/etc/b.conf": "b {{ x }}\n",
    }


def test_blocks_leave_no_lines_behind(role: Role) -> None:
    made = role.render(
        variables={"x": [1, 2]},
        a_dot_j2="{% for i in x %}\n  {% if i %}\n  line {{ i }}\n  {% endif %}\n{% endfor %}\n",
    )
    assert made["files"]["/a"]["content"] == "  line 1\n  line 2\n"


def test_a_template_that_comes_to_nothing_is_no_file(role: Role) -> None:
    made = role.render(variables={"x": False}, a_dot_j2="{% if x %}text{% endif %}\n \n", b_dot_j2="text")
    assert list(made["files"]) == ["/b"]


def test_modes(role: Role) -> None:
    manifest = yaml.safe_dump(
        {"modes": {"/etc/x/*.cf": "0640 root:postfix", "/etc/*": "0600 root:root"}}, sort_keys=False
    )
    made = role.render(manifest, etc__x__a_dot_cf="a", etc__b="b", srv__c="c")
    assert {path: (f["mode"], f["owner"], f["group"]) for path, f in made["files"].items()} == {
        "/etc/x/a.cf": ("0640", "root", "postfix"),
        "/etc/b": ("0600", "root", "root"),
        "/srv/c": ("0644", "root", "root"),
    }


def test_each_makes_an_instance_for_every_item(role: Role) -> None:
    manifest = """
each: {store: node_stores}
directories: {"/srv/{store}": "0750 cyrus:mail"}
modes: {/etc/cyrus/*/users: "0600 root:root"}
services:
  cyrus@{store}:
    owns: ["/etc/cyrus/{store}"]
    check: check {stage} {store}
    on_change: reload
    restart_for: ["/etc/cyrus/{store}/users"]
    ready: exec ready {store}
"""
    made = role.render(manifest, **{"etc__cyrus__{store}__users_dot_j2": "{{ store.number }} of {{ store.name }}\n"})
    assert {path: (file["content"], file["mode"]) for path, file in made["files"].items()} == {
        "/etc/cyrus/s01/users": ("1 of s01\n", "0600"),
        "/etc/cyrus/s02/users": ("2 of s02\n", "0600"),
    }
    assert list(made["directories"]) == ["/srv/s01", "/srv/s02"]
    first, second = made["services"]
    own = [
        "/etc/systemd/system/cyrus@s02.service",
        "/etc/systemd/system/cyrus@s02.service.d",
        "/etc/systemd/system/cyrus@.service",
    ]
    assert first["unit"] == "cyrus@s01.service"
    assert second == {
        "unit": "cyrus@s02.service",
        "tier": "mx",
        "owns": ["/etc/cyrus/s02", *own],
        "check": ["check {stage} s02"],
        "on_change": "reload",
        "restart_for": ["/etc/cyrus/s02/users", *own],
        "ready": ["exec ready s02"],
    }


def test_a_service_of_which_nothing_is_said(role: Role) -> None:
    own = ["/etc/systemd/system/x.service", "/etc/systemd/system/x.service.d"]
    assert role.render("services:\n  x:\n")["services"] == [
        {
            "unit": "x.service",
            "tier": "mx",
            "owns": own,
            "check": [],
            "on_change": "restart",
            "restart_for": own,
            "ready": [],
        }
    ]


def test_masked_units_are_links(role: Role) -> None:
    made = role.render("masked: [x, y.timer]")
    assert made["files"] == {
        "/etc/systemd/system/x.service": {"link": "/dev/null", "tier": "mx"},
        "/etc/systemd/system/y.timer": {"link": "/dev/null", "tier": "mx"},
    }


def test_groups_and_packages(role: Role) -> None:
    made = role.render("packages: [b-1, a-1]\ngroups: {cyrus: [ssl-cert, mail]}")
    assert made["packages"] == ["a-1", "b-1"]
    assert made["groups"] == [
        {"user": "cyrus", "group": "ssl-cert", "tier": "mx"},
        {"user": "cyrus", "group": "mail", "tier": "mx"},
    ]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("one\n{{ y }}\n", "roles/mx/templates/a.j2:2: 'y' is undefined; is the variable declared for this tier?"),
        ("one\ntwo\n{{ x.y.z }}\n", "roles/mx/templates/a.j2:3: 'int object' has no attribute 'y'"),
        ("{% if x %}\nno end\n", "roles/mx/templates/a.j2:2: Unexpected end of template"),
        ("\n{{ x | nosuch }}\n", "roles/mx/templates/a.j2:2: No filter named 'nosuch'"),
        ("\n{{ x + 'a' }}\n", "roles/mx/templates/a.j2:2: unsupported operand type"),
        ("\n{{ x / 0 }}\n", "roles/mx/templates/a.j2:2: division by zero"),
        ("{% include 'mx/none.j2' %}", "roles/mx/templates/a.j2:1: 'mx/none.j2' not found"),
    ],
)
def test_errors_name_the_template_and_the_line(role: Role, template: str, problem: str) -> None:
    with pytest.raises(RenderError) as caught:
        role.render(variables={"x": 7}, a_dot_j2=template)
    assert str(caught.value).startswith(problem)


def test_errors_in_an_included_file_name_that_file(role: Role) -> None:
    (role.folder / "shared.j2").write_text("one\n{{ y }}\n")
    with pytest.raises(RenderError, match=r"^roles/mx/shared.j2:2: 'y' is undefined"):
        role.render(a_dot_j2="{% include 'mx/shared.j2' %}")
