"""The directory's base entries: the plan from what is there to what is wanted, and what --diff shows of it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from posthouse import roles

OU = {"objectClass": ["organizationalUnit"], "ou": ["accounts"]}
SERVICE = {"objectClass": ["person"], "cn": ["replicator"], "sn": ["replicator"]}
WANT = {"ou=accounts,dc=lab,dc=test": OU, "cn=replicator,dc=lab,dc=test": SERVICE}
PASSWORDS = {"cn=replicator,dc=lab,dc=test": "a secret"}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("entries", roles.ROOT / "library/modules/directory_entries.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_from_nothing_parents_come_first(module: ModuleType) -> None:
    assert module.plan({}, WANT, set(PASSWORDS)) == [
        ("add", "ou=accounts,dc=lab,dc=test", OU),
        ("add", "cn=replicator,dc=lab,dc=test", SERVICE),
        ("password", "cn=replicator,dc=lab,dc=test", None),
    ]


def test_nothing_to_do(module: ModuleType) -> None:
    assert module.plan(WANT, WANT, set()) == []


def test_only_what_differs_is_changed(module: ModuleType) -> None:
    have = WANT | {"ou=accounts,dc=lab,dc=test": OU | {"ou": ["other"]}}
    assert module.plan(have, WANT, set()) == [("modify", "ou=accounts,dc=lab,dc=test", {"ou": ["accounts"]})]


def test_a_password_that_is_refused_is_set(module: ModuleType) -> None:
    assert module.plan(WANT, WANT, set(PASSWORDS)) == [("password", "cn=replicator,dc=lab,dc=test", None)]


def test_diff_shows_no_password(module: ModuleType) -> None:
    before, after = (module.text(WANT, PASSWORDS, refused) for refused in (set(PASSWORDS), set()))
    assert "a secret" not in before + after
    assert "(another)" in before
    assert "(the one in the secrets)" in after
