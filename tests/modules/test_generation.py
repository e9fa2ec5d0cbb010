"""The node's half of converge, on a real node with systemd: old or new generation, whole, whatever happens."""

from __future__ import annotations

import json
import time

import pytest


def versions(remote) -> set[str]:
    """The versions found in the toy role's files; one means: the generation is whole."""
    return set(remote("cat /etc/toy/* | cut -d' ' -f1").split())


def serves(remote) -> str:
    """What the service answers. One that was just put back may not listen yet."""
    return remote("curl -s --retry 10 --retry-connrefused --retry-delay 1 http://127.0.0.1:8099/", check=False).strip()


def test_first_apply_builds_everything_and_the_second_does_nothing(remote, toy):
    first = remote.apply(toy("v1"))
    assert first["plan"]["start"] == ["toy.service"]
    assert serves(remote) == "v1"
    pid = remote("systemctl show -p MainPID toy")
    second = remote.apply(toy("v1"))
    assert not any(second["plan"].values())
    assert remote("systemctl show -p MainPID toy") == pid
    assert remote("systemctl is-enabled toy").strip() == "enabled"


def test_a_changed_mode_or_owner_is_mended(remote, toy):
    remote.apply(toy("v1"))
    remote("chmod 0600 /etc/toy/part001; chown daemon /etc/toy/part002")
    plan = remote.apply(toy("v1"))["plan"]
    assert sorted(plan["write"]) == ["/etc/toy/part001", "/etc/toy/part002"]
    assert remote("stat -c '%a %U' /etc/toy/part001 /etc/toy/part002").split() == ["644", "root"] * 2


def test_what_is_no_longer_described_is_removed(remote, toy):
    remote.apply(toy("v1", files={"/etc/toy/extra": "v1"}))
    assert remote("ls /etc/toy/extra")
    remote.apply(toy("v1"))
    assert remote("ls /etc/toy/extra", check=False) == ""


def test_only_a_reload_where_a_reload_will_do(remote, toy):
    remote.apply(toy("v1"))
    pid = remote("systemctl show -p MainPID toy")
    plan = remote.apply(toy("v2", on_change="reload"))["plan"]
    assert (plan["reload"], plan["restart"]) == (["toy.service"], [])
    assert remote("systemctl show -p MainPID toy") == pid


def test_the_validator_sees_the_future_and_can_refuse_it(remote, toy):
    remote.apply(toy("v1"))
    pid = remote("systemctl show -p MainPID toy")
    refused = remote.apply(toy("bad", files={"/etc/toy/index.html": "bad\n"}))
    assert "toy.service: refused by its validator" in refused["failed"] and "nothing was replaced" in refused["failed"]
    assert versions(remote) == {"v1"}
    assert remote("systemctl show -p MainPID toy") == pid
    assert remote("ls -A /etc/toy | grep posthouse-new; ls /var/lib/posthouse/transaction", check=False) == ""


def test_a_service_that_does_not_come_up_is_rolled_back_whole(remote, toy):
    remote.apply(toy("v1"))
    broken = toy("v2", files={"/etc/systemd/system/toy.service": "[Service]\nExecStart=/bin/false\n"})
    failed = remote.apply(broken)
    assert failed["failed"].startswith("toy.service") and "the previous generation was put back" in failed["failed"]
    assert failed["lines"], "the journal's last lines belong to the message"
    assert versions(remote) == {"v1"}
    assert serves(remote) == "v1"


def test_a_failed_health_check_is_rolled_back_whole(remote, toy):
    remote.apply(toy("v1"))
    remote("sed -i 's/^READY_SECONDS = 60$/READY_SECONDS = 2/' /usr/lib/posthouse/generation.py")
    failed = remote.apply(toy("v2", ready=["tcp 127.0.0.1:8098"]))
    remote("sed -i 's/^READY_SECONDS = 2$/READY_SECONDS = 60/' /usr/lib/posthouse/generation.py")
    assert "health check failed: tcp 127.0.0.1:8098" in failed["failed"]
    assert versions(remote) == {"v1"}
    assert serves(remote) == "v1"


def test_a_dead_service_is_started_though_nothing_changed(remote, toy):
    remote.apply(toy("v1"))
    remote("systemctl kill -s KILL toy; systemctl stop toy")
    assert remote.apply(toy("v1"))["plan"]["start"] == ["toy.service"]
    assert serves(remote) == "v1"


@pytest.mark.parametrize("moment", [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7])
def test_killed_at_any_moment_the_node_is_in_one_generation(remote, toy, moment):
    remote.apply(toy("v1"))
    remote.apply(toy("v2"), wait=False)
    time.sleep(moment)
    remote("systemctl kill --kill-whom=main -s KILL posthouse-converge-test", check=False)
    remote.settle()
    found = versions(remote)
    assert found in ({"v1"}, {"v2"})
    assert remote("ls -A /etc/toy | grep posthouse-new", check=False) == ""
    remote.apply(toy("v2"))
    assert versions(remote) == {"v2"}
    assert serves(remote) == "v2"


def test_killed_after_the_swap_the_previous_generation_is_put_back(remote, toy):
    remote.apply(toy("v1"))
    slow = toy("v2", ready=["exec sleep 5"])
    remote.apply(slow, wait=False)
    for _ in range(100):
        if "v2" in remote("cat /etc/toy/index.html"):
            break
        time.sleep(0.05)
    remote("systemctl kill --kill-whom=main -s KILL posthouse-converge-test")
    remote.settle()
    assert versions(remote) == {"v1"}
    assert serves(remote) == "v1"


def test_a_node_that_lost_power_in_the_swap_recovers_at_boot(remote, toy):
    remote.apply(toy("v1"))
    remote("sed 's/        _act(plan)/        os._exit(9)/' /usr/lib/posthouse/generation.py > /tmp/crash.py")
    remote("cat > /run/posthouse/test.json", json.dumps(toy("v2")))
    remote("python3 /tmp/crash.py apply /run/posthouse/test.json", check=False)
    assert versions(remote) == {"v2"}  # swapped, never committed
    assert "put back" in remote("python3 /usr/lib/posthouse/generation.py recover --boot")
    assert versions(remote) == {"v1"}


def test_a_full_disk_is_noticed_before_anything_is_replaced(remote, toy):
    remote("mkdir -p /etc/toy && mount -t tmpfs -o size=1m toy /etc/toy")
    try:
        remote.apply(toy("v1"))
        big = {f"/etc/toy/big{i}": "v2 " + "x" * 60_000 for i in range(20)}
        failed = remote.apply(toy("v2", files=big))
        assert "No space left on device; nothing was replaced" in failed["failed"]
        assert versions(remote) == {"v1"}
        assert remote("ls -A /etc/toy | grep posthouse-new", check=False) == ""
    finally:
        remote("systemctl stop toy; umount /etc/toy")


def test_two_at_once_the_second_is_told_who_holds_the_lock(remote, toy):
    remote.apply(toy("v1", ready=["exec sleep 3"]), wait=False)
    time.sleep(1)
    remote("cp /run/posthouse/test.json /run/posthouse/second.json")
    remote("python3 /usr/lib/posthouse/generation.py apply /run/posthouse/second.json")
    second = remote("cat /run/posthouse/second.result")
    assert "another converge is under way, held by the tests" in second
    remote.settle()


def test_a_missing_owner_is_refused_with_its_reason(remote, toy):
    remote.apply(toy("v1"))
    desired = toy("v2")
    desired["files"]["/etc/toy/index.html"]["owner"] = "nosuchuser"
    assert "nosuchuser" in remote.apply(desired)["failed"]
    assert versions(remote) == {"v1"}
