"""Where the mail is: Cyrus instances that say only what they should to whom they should, and replicas that keep up."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from dialogue import talk

pytestmark = pytest.mark.tier("store")

Variables = dict[str, Any]

TOOLS = "/usr/lib/cyrus/bin"

# Asks an instance as its administrator. The password is read on the node, and leaves it in no command line.
ADMINISTRATOR = r"""
import imaplib, ssl, sys
store, host, command = sys.argv[1:]
password = dict(line.split() for line in open(f"/etc/cyrus/{store}/now/users"))["admin"]
client = imaplib.IMAP4_SSL(host, 993, ssl_context=ssl.create_default_context(cafile="/etc/ssl/posthouse/ca.pem"))
client.authenticate("PLAIN", lambda _: f"\0admin\0{password}".encode())
print(client.xatom(command)[0])
client.logout()
"""


@pytest.fixture
def primaries(node_stores: list[Variables]) -> list[Variables]:
    return [store for store in node_stores if store["role"] == "primary"]


@pytest.fixture
def replicas(node_stores: list[Variables]) -> list[Variables]:
    return [store for store in node_stores if store["role"] == "replica"]


def listeners(ctx: Variables, node_stores: list[Variables]) -> set[str]:
    """What the node's instances listen on, and nothing else."""
    expected = set()
    for store in node_stores:
        if store["role"] == "primary":
            # The last one is for accounts that move here.
            ports = (143, 993, 995, 4190, store["replication_port"])
            expected |= {f"{store['address']}:{port}" for port in ports}
        else:
            expected.add(f"{ctx['node']['address']}:{store['replication_port']}")
    return expected


def effective(host: Any, store: Variables) -> dict[str, str]:
    """What an instance really uses, defaults included."""
    output = host.check_output(f"{TOOLS}/cyr_info -C /etc/cyrus/{store['name']}/imapd.conf conf-all")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in output.splitlines())}


def test_instances_run_and_come_back(host: Any, node_stores: list[Variables]) -> None:
    for store in node_stores:
        service = host.service(f"cyrus@{store['name']}")
        assert service.is_running, store["name"]
        assert service.is_enabled, store["name"]
    assert host.file("/etc/systemd/system/cyrus-imapd.service").linked_to == "/dev/null"


def test_every_listener_greets_as_its_protocol_wants(host: Any, node_stores: list[Variables]) -> None:
    """Cyrus gives up on a listener whose processes failed five times, and goes on without it."""
    for store in node_stores:
        host.run_expect([0], f"/usr/local/lib/posthouse/store-ready {store['name']} 60")


def test_instances_listen_on_their_own_addresses_alone(host: Any, ctx: Variables, node_stores: list[Variables]) -> None:
    lines = host.check_output("ss -Hltnp").splitlines()
    assert {line.split()[3] for line in lines if '"cyrmaster"' in line} == listeners(ctx, node_stores)


def test_the_primary_and_nobody_else_holds_the_address(host: Any, ctx: Variables, primaries: list[Variables]) -> None:
    held = set(re.findall(r"inet ([\d.]+)/", host.check_output("ip -4 address show")))
    assert held & {store["address"] for store in ctx["stores"]} == {store["address"] for store in primaries}


def test_mail_comes_in_by_the_gate_alone(host: Any, node_stores: list[Variables]) -> None:
    for store in node_stores:
        gate = host.service(f"store-gate@{store['name']}")
        assert gate.is_running == (store["role"] == "primary"), store["name"]
    lines = host.check_output("ss -Hltnp 'sport = :24'").splitlines()
    served = {f"{store['address']}:24" for store in node_stores if store["role"] == "primary"}
    assert {line.split()[3] for line in lines} == served
    assert all('"store-gate"' in line or '"python3"' in line for line in lines)


def test_nodes_agree_on_who_serves(
    host: Any, ctx: Variables, stores: dict[str, Any], node_stores: list[Variables]
) -> None:
    """Every store has one primary, which is alive, and a replica that could take over at once."""
    if ctx["cluster"] is None:
        return
    for store in node_stores:
        assert host.service(f"store-keeper@{store['name']}").is_running
        state = stores[store["name"]]
        assert state.alive, f"{store['name']}: no sign of life from {state.primary}"
        assert state.in_sync or not store["peers"], f"{store['name']}: no replica is in sync"
        assert host.file(f"/etc/cyrus/{store['name']}/now").linked_to.endswith(f"/{store['role']}")


def test_a_keeper_that_hangs_takes_its_store_with_it(host: Any, ctx: Variables, node_stores: list[Variables]) -> None:
    if ctx["cluster"] is None:
        return
    for store in node_stores:
        keeper, instance = f"store-keeper@{store['name']}.service", f"cyrus@{store['name']}"
        assert host.check_output(f"systemctl show -P WatchdogUSec {keeper}") == "3s"
        assert keeper in host.check_output(f"systemctl show -P BindsTo {instance}").split()


def test_etcd_is_sound_and_for_store_nodes_alone(host: Any, ctx: Variables) -> None:
    members = {member["name"]: member["address"] for member in (ctx["cluster"] or {"members": []})["members"]}
    if ctx["node"]["name"] not in members:
        assert not host.service("etcd").is_running
        return
    where = f"https://{members[ctx['node']['name']]}:2379"
    certificate = "--cert /etc/ssl/posthouse/node.pem --key /etc/ssl/posthouse/node.key"
    certificate += " --dial-timeout 30s --command-timeout 30s"
    ask = f"ETCDCTL_API=3 etcdctl --endpoints {where} --cacert /etc/ssl/posthouse/ca.pem"
    listed = host.check_output(f"{ask} {certificate} member list")
    assert {line.split(", ")[2] for line in listed.splitlines()} == set(members)
    assert (
        "is healthy"
        in host.run(f"{ask} {certificate} endpoint health").stderr
        + host.run(f"{ask} {certificate} endpoint health").stdout
    )
    assert host.run(f"{ask} --command-timeout 3s endpoint health").rc != 0, "it lets in whoever has no certificate"


def test_processes_belong_to_cyrus(host: Any, node_stores: list[Variables]) -> None:
    for store in node_stores:
        group = host.check_output(f"systemctl show --property ControlGroup --value cyrus@{store['name']}")
        pids = host.check_output(f"cat /sys/fs/cgroup{group}/cgroup.procs").split()
        assert pids
        assert set(host.check_output(f"ps --no-headers -o user= -p {','.join(pids)}").split()) == {"cyrus"}


def test_processes_have_no_more_rights_than_they_need(host: Any, node_stores: list[Variables]) -> None:
    limits = "ProtectSystem=strict", "PrivateDevices=yes", "CapabilityBoundingSet=cap_net_bind_service"
    for store in node_stores:
        unit = f"cyrus@{store['name']}"
        for limit in limits:
            assert host.check_output(f"systemctl show --property {limit.partition('=')[0]} {unit}") == limit
        if store["role"] == "primary" and store["peers"]:
            for helper in (f"cyrus-link-{store['name']}", f"cyrus-sync-{store['name']}@{store['peers'][0]['name']}"):
                assert host.check_output(f"systemctl show --property NoNewPrivileges --value {helper}") == "yes"


@pytest.mark.parametrize(("port", "starttls"), [(993, ""), (995, ""), (143, "imap"), (4190, "sieve"), (24, "lmtp")])
def test_tls_with_a_certificate_for_the_stores_name(
    host: Any, ctx: Variables, primaries: list[Variables], port: int, starttls: str
) -> None:
    for store in primaries:
        options = f"-connect {store['address']}:{port} -CAfile /etc/ssl/posthouse/ca.pem -verify_return_error -brief"
        options += f" -verify_hostname {store['host']}" + (f" -starttls {starttls}" if starttls else "")
        result = host.run(f"openssl s_client {options} </dev/null")
        assert result.rc == 0, result.stderr
        version = re.search(r"Protocol version: (\S+)", result.stdout + result.stderr)
        assert version is not None
        assert version[1] >= ctx["tls_minimum"]
        old = "-tls1_2" if ctx["tls_minimum"] == "TLSv1.3" else "-tls1_1"
        assert host.run(f"openssl s_client {options} {old} -cipher ALL:@SECLEVEL=0 </dev/null").rc != 0


def test_nobody_is_asked_for_a_password_before_tls(host: Any, primaries: list[Variables]) -> None:
    for store in primaries:
        where = {"address": store["address"], "proxy": False}
        _, answer, *_ = talk(host, 143, "a CAPABILITY", "a LOGOUT", **where)
        capabilities = set(answer.split())
        assert {"STARTTLS", "LOGINDISABLED"} <= capabilities
        assert not [name for name in capabilities if name.startswith("AUTH=")]
        before, _, after, *_ = talk(host, 4190, "STARTTLS", "LOGOUT", **where)
        assert '"SASL"' not in before
        assert '"SASL" "PLAIN"' in after
        _, before, _, after, *_ = talk(host, 24, "LHLO verify", "STARTTLS", "LHLO verify", "QUIT", **where)
        assert "AUTH PLAIN" not in before
        assert "AUTH PLAIN" in after


def test_mail_is_taken_from_those_who_log_in(host: Any, primaries: list[Variables]) -> None:
    for store in primaries:
        *_, answer, _ = talk(host, 24, "LHLO verify", "MAIL FROM:<>", "QUIT", address=store["address"], proxy=False)
        assert answer.startswith("4"), "who cannot log in is told to come back, not to give up"


def test_administrator_can_log_in(host: Any, primaries: list[Variables]) -> None:
    for store in primaries:
        answer = host.check_output("python3 -c %s %s %s NOOP", ADMINISTRATOR, store["name"], store["host"])
        assert answer == "OK"


def test_replica_talks_to_nodes_of_this_site_alone(host: Any, ctx: Variables, replicas: list[Variables]) -> None:
    for store in replicas:
        where = f"-connect {ctx['node']['address']}:{store['replication_port']} -quiet"
        with_certificate = "-cert /etc/ssl/posthouse/node.pem -key /etc/ssl/posthouse/node.key"
        command = f"printf 'a LOGOUT\\r\\n' | timeout 30 openssl s_client {where}"
        assert "* OK" in host.run(f"{command} {with_certificate}").stdout
        assert "* OK" not in host.run(command).stdout


def test_replication_runs_and_keeps_up(host: Any, stores: dict[str, Any], primaries: list[Variables]) -> None:
    for store in primaries:
        for peer in store["peers"]:
            assert host.service(f"cyrus-sync-{store['name']}@{peer['name']}").is_running
            replica = f"dst {peer['address']} dport = :{store['replication_port']}"
            # After a replica's restart there is no connection until there is something to tell it.
            connected = host.check_output(f"ss -Htn state established {replica}")
            assert connected or peer["name"] in stores[store["name"]].in_sync, f"no connection to {peer['name']}"
            # What is being written to right now is not late; what was left for a minute is.
            late = f"find /srv/store/{store['name']}/config/sync -path '*/{peer['name']}/log*' -mmin +1"
            deadline = time.monotonic() + 30
            while (behind := host.check_output(late)) and time.monotonic() < deadline:
                time.sleep(1)
            assert not behind, f"not on {peer['name']} yet: {behind}"


def test_replica_is_being_written_to_by_its_primary(
    host: Any, ctx: Variables, stores: dict[str, Any], replicas: list[Variables]
) -> None:
    addresses = {node["name"]: node["address"] for node in ctx["nodes"]}
    for store in replicas:
        primary = f"src {ctx['node']['address']} sport = :{store['replication_port']} dst {addresses[store['primary']]}"
        connected = host.check_output(f"ss -Htn state established {primary}")
        in_sync = ctx["node"]["name"] in stores[store["name"]].in_sync
        assert connected or in_sync, f"{store['primary']} is not connected"


def test_cyrus_knows_every_setting(host: Any, node_stores: list[Variables]) -> None:
    for store in node_stores:
        files = f"-C /etc/cyrus/{store['name']}/imapd.conf -M /etc/cyrus/{store['name']}/now/cyrus.conf"
        assert host.check_output(f"{TOOLS}/cyr_info {files} conf-lint") == ""


def test_settings_are_in_force(host: Any, ctx: Variables, node_stores: list[Variables]) -> None:
    expected = {
        "virtdomains": "userid",
        "unixhierarchysep": "yes",
        "altnamespace": "yes",
        "hashimapspool": "yes",
        "fulldirhash": "yes",
        "singleinstancestore": "yes",
        "reverseacls": "yes",
        "delete_mode": "delayed",
        "expunge_mode": "delayed",
        "allowplaintext": "no",
        "tls_required": "yes",
        "admins": "admin",
        "proxyservers": "proxy",
        "lmtp_strict_quota": "yes",
        "lmtp_over_quota_perm_failure": "yes" if ctx["store_over_quota"] == "reject" else "no",
        "autocreate_post": "yes",
        "autocreate_quota": "0",
    }
    for store in node_stores:
        wanted = expected | {
            "servername": store["host"],
            "configdirectory": f"/srv/store/{store['name']}/config",
            "partition-default": f"/srv/store/{store['name']}/spool",
            "proc_path": f"/run/cyrus/{store['name']}/proc",
        }
        if store["role"] == "replica":
            wanted["admins"] = "admin replicator"
        values = effective(host, store)
        assert {name: values.get(name) for name in wanted} == wanted


def test_sieve_offers_what_users_scripts_need(host: Any, primaries: list[Variables]) -> None:
    wanted = "vacation fileinto envelope subaddress relational comparator-i;ascii-numeric include imap4flags mailbox"
    for store in primaries:
        greeting, _ = talk(host, 4190, "LOGOUT", address=store["address"], proxy=False)
        offered = re.search(r'"SIEVE" "([^"]*)"', greeting)
        assert offered is not None
        assert {*wanted.split(), "variables", "editheader", "special-use"} <= set(offered[1].split())


def test_what_sieve_sends_can_be_queued(host: Any, primaries: list[Variables]) -> None:
    """A file system that is read-only to lmtpd holds up whole accounts: sendmail tries again for ever."""
    for store in primaries:
        pid = host.check_output(f"systemctl show --property MainPID --value cyrus@{store['name']}")
        mount = host.check_output(f"grep ' /srv/postfix/mx ' /proc/{pid}/mountinfo")
        assert "rw" in mount.split()[5].split(",")


def test_deleted_mail_is_kept_for_as_long_as_the_site_says(
    host: Any, ctx: Variables, node_stores: list[Variables]
) -> None:
    for store in node_stores:
        events = host.file(f"/etc/cyrus/{store['name']}/now/cyrus.conf").content_string
        assert re.search(rf'cyr_expire .*-X {ctx["store_undelete_days"]}"', events)


def test_secrets_are_for_who_needs_them(host: Any, node_stores: list[Variables]) -> None:
    for store in node_stores:
        access = {f"/etc/cyrus/{store['name']}/now/users": ("root", "root", 0o600)}
        access[f"/run/cyrus/{store['name']}/sasldb2"] = ("cyrus", "mail", 0o600)
        access[f"/srv/store/{store['name']}"] = ("cyrus", "mail", 0o750)
        if store["role"] == "primary" and store["peers"]:
            access[f"/etc/cyrus/{store['name']}/now/sync.conf"] = ("root", "mail", 0o640)
            access[f"/etc/cyrus/{store['name']}/gate_password"] = ("root", "mail", 0o640)
        for name, wanted in access.items():
            file = host.file(name)
            assert (file.user, file.group, file.mode) == wanted, name


def test_mail_is_on_a_disk_of_its_own_with_room(host: Any, node_stores: list[Variables]) -> None:
    for store in node_stores:
        where = f"/srv/store/{store['name']}"
        assert host.check_output(f"findmnt --noheadings --output TARGET --target {where}") != "/"
        for what in "pcent", "ipcent":
            used = host.check_output(f"df --output={what} {where}").splitlines()[-1].strip(" %-") or "0"
            assert int(used) < 90, f"{where}: {used} % of its {'space' if what == 'pcent' else 'inodes'} is used"
