"""The whole of converge through Ansible: check, diff, limits, locks, and nodes that do not answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posthouse import lab, roles, run

PIDS = "systemctl show -p Id,MainPID --type=service --state=running '*' | sort"


def playbook(site, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Plain ansible-playbook: nothing is locked into the command line."""
    return subprocess.run(
        [run.BIN / "ansible-playbook", roles.ROOT / "playbooks" / "deploy.yml", *arguments],
        env=run.environment(site),
        cwd=roles.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def override(**variables: object) -> list[str]:
    return ["--extra-vars", json.dumps(variables)]


@pytest.fixture
def put_back(site):
    """Whatever the test changed, the site's own deploy puts right."""
    yield
    done = playbook(site)
    assert done.returncode == 0, done.stdout


def test_nothing_to_change_touches_nothing(site, remote):
    assert playbook(site).returncode == 0
    before = remote(PIDS)
    report = run.playbook(site, "deploy", quiet=True)
    assert report["ok"]
    assert {name: node["changed"] for name, node in report["nodes"].items()} == dict.fromkeys(site.nodes, False)
    assert all(node["restarted"] == [] for node in report["nodes"].values())
    assert remote(PIDS) == before


def test_check_and_diff_are_exact_and_change_nothing(site, remote):
    before = remote("sha256sum /etc/postfix/main.cf; systemctl show -p MainPID postfix")
    arguments = ["--check", "--diff", "--limit", "mail3", *override(mx_queue_lifetime="77h")]
    done = playbook(site, *arguments)
    changed = [line for line in done.stdout.splitlines() if line.startswith(("+", "-"))]
    assert changed[:2] == ["--- before: /etc/postfix/main.cf", "+++ after: /etc/postfix/main.cf"]
    assert [line[0] for line in changed[2:]] == ["-", "+"] and changed[3] == "+maximal_queue_lifetime = 77h"
    assert remote("sha256sum /etc/postfix/main.cf; systemctl show -p MainPID postfix") == before


def test_secrets_are_masked_in_differences(site, remote):
    secret = remote("cat /etc/postfix/lmtp_password").split(":")[-1].strip()
    remote("echo '# tampered' >> /etc/postfix/lmtp_password")
    done = playbook(site, "--diff", "--limit", "mail3", "-vvv")
    assert "(previous secret)" in done.stdout and "(new secret)" in done.stdout
    assert secret not in done.stdout + done.stderr and "tampered" not in done.stdout
    assert remote("tail -c 20 /etc/postfix/lmtp_password").strip().endswith(secret[-10:])


def test_a_change_acts_on_what_depends_on_it_and_no_more(site, remote, put_back):
    before = remote(PIDS)
    report = run.playbook(site, "deploy", "--limit", "mail3", variables={"mx_queue_lifetime": "77h"}, quiet=True)
    assert report["nodes"]["mail3"] == report["nodes"]["mail3"] | {"ok": True, "changed": True, "restarted": []}
    assert remote("postconf -h maximal_queue_lifetime").strip() == "77h"
    assert remote(PIDS) == before  # Postfix was reloaded; its master goes on


def test_a_daemon_that_refuses_its_configuration_keeps_the_old_one(site, remote, put_back):
    before = remote("sha256sum /etc/postfix/main.cf")
    done = playbook(site, "--limit", "mail3", *override(mx_message_size="nonsense"))
    assert done.returncode != 0
    assert "postfix.service: refused by its validator (postfix -c /etc/postfix check)" in done.stdout
    assert "nothing was replaced" in done.stdout
    assert remote("sha256sum /etc/postfix/main.cf") == before


def test_after_a_failure_no_further_node_of_the_class_changes(site, remote, put_back):
    done = playbook(site, "--limit", "mail*", *override(mx_message_size="nonsense"))
    assert done.stdout.count("refused by its validator") == 1
    assert done.stdout.count("left as it is, because") == 2


def test_one_role_by_itself(site, remote, put_back, tmp_path: Path):
    play = tmp_path / "one.yml"
    play.write_text("- hosts: mail3\n  gather_facts: false\n  roles: [mx]\n")
    remote("echo '# by hand' >> /etc/postfix/main.cf; echo '# by hand' >> /etc/hosts")
    command = [run.BIN / "ansible-playbook", play]
    done = subprocess.run(
        command, env=run.environment(site), cwd=roles.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "by hand" not in remote("cat /etc/postfix/main.cf")
    assert "by hand" in remote("cat /etc/hosts"), "another role's file was touched"


def test_a_tier_by_itself(site, remote, put_back):
    remote("echo '# by hand' >> /etc/postfix/main.cf; echo '# by hand' >> /etc/hosts")
    assert run.playbook(site, "deploy", "--limit", "mail3", variables={"deploy_tiers": ["base"]}, quiet=True)["ok"]
    assert "by hand" not in remote("cat /etc/hosts")
    assert "by hand" in remote("cat /etc/postfix/main.cf"), "another tier's file was touched"


def test_two_deploys_at_once_the_second_is_told_who_holds_the_lock(site):
    command = [sys.executable, "-m", "posthouse", "deploy", site.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as first:
        time.sleep(1)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        first.communicate()
    assert first.returncode == 0
    assert second.returncode != 0
    assert f"{site.name}: locked by root (pid {first.pid}, deploy {site.name}" in second.stderr


def test_an_unreachable_node_does_not_hold_up_the_others(site, remote):
    lab.kill(site.name, "mail2")
    try:
        report = run.playbook(site, "deploy", quiet=True)
    finally:
        lab.start(site.name, "mail2")
    assert not report["ok"]
    assert {name for name, node in report["nodes"].items() if not node["ok"]} == {"mail2"}
    assert set(report["nodes"]) == set(site.nodes)
    assert run.playbook(site, "deploy", quiet=True)["ok"], "the node came back whole"
