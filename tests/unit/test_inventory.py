import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posthouse import inventory, render, roles, secrets
from posthouse.model import Site
from posthouse.secrets import Secrets
from posthouse.sitefile import load


@pytest.fixture(scope="module")
def opened(site: Site) -> Secrets:
    return secrets.placeholders(site)


@pytest.fixture
def ssh(site: Site, opened: Secrets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the site's ssh configuration."""
    monkeypatch.setattr(inventory, "RUNTIME", tmp_path / "run")
    return inventory.write_ssh(site, opened).parent


def test_groups_and_hosts(site: Site) -> None:
    made = inventory.inventory(site)
    assert made["mail"]["hosts"] == ["mail1", "mail2", "mail3"]
    assert made["access"]["hosts"] == ["lb1", "lb2"]
    assert set(made["all"]["children"]) == set(made) - {"_meta", "all"}
    assert made["_meta"]["hostvars"]["mail2"]["ansible_host"] == "10.77.0.22"


def test_classes_without_nodes_are_no_groups(site: Site) -> None:
    assert "spare" not in inventory.inventory(
        site.model_copy(update={"classes": site.classes | {"spare": site.classes["lb"]}})
    )


def test_variables_are_what_the_templates_see(site: Site) -> None:
    made = inventory.inventory(site)
    shared, own = made["all"]["vars"], made["_meta"]["hostvars"]["mail1"]
    assert render.shared_variables(site).items() <= shared.items()
    assert render.node_variables(site, site.nodes["mail1"]).items() <= own.items()
    assert shared["mx_message_size"] == 50


def test_every_value_is_concrete() -> None:
    """Values that were templates themselves would be evaluated by Ansible, wherever they came from."""
    for name in ("lab", "million"):
        text = json.dumps(inventory.inventory(load(name)))
        assert "{{" not in text
        assert "{%" not in text


def test_no_secret_is_in_the_inventory(site: Site, opened: Secrets) -> None:
    text = json.dumps(inventory.inventory(site))
    assert [name for name, password in opened.passwords.items() if password in text] == []
    assert "PRIVATE" not in text


def script(*arguments: str, site: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POSTHOUSE_SITE": site}
    command = [sys.executable, roles.ROOT / "inventory" / "hosts.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_script_prints_the_inventory_of_the_named_site() -> None:
    done = script("--list", site="million")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["mail"]["hosts"]) == 106


def test_script_refuses_in_one_sentence() -> None:
    done = script("--list", site="nosuch")
    assert done.returncode != 0
    assert "no such site" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_ssh_configuration_is_for_root_alone(ssh: Path) -> None:
    assert ssh.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in ssh.iterdir()} == {
        "config": 0o600,
        "id": 0o600,
        "known_hosts": 0o600,
    }


def test_ssh_knows_every_node_and_accepts_no_other_key(site: Site, opened: Secrets, ssh: Path) -> None:
    known = (ssh / "known_hosts").read_text().splitlines()
    assert len(known) == len(site.nodes)
    assert any(line.startswith("10.77.0.21,mail1 ssh-ed25519 ") for line in known)
    done = subprocess.run(["ssh", "-G", "-F", ssh / "config", "mail1"], capture_output=True, text=True, check=True)
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert settings["hostname"] == "10.77.0.21"
    assert settings["stricthostkeychecking"] in ("true", "yes")
    assert settings["userknownhostsfile"] == str(ssh / "known_hosts")


def test_ssh_files_are_replaced_only_when_they_change(site: Site, opened: Secrets, ssh: Path) -> None:
    before = {path.name: path.stat().st_ino for path in ssh.iterdir()}
    inventory.write_ssh(site, opened)
    assert {path.name: path.stat().st_ino for path in ssh.iterdir()} == before
    (ssh / "known_hosts").write_text("somebody else\n")
    inventory.write_ssh(site, opened)
    assert "somebody else" not in (ssh / "known_hosts").read_text()
