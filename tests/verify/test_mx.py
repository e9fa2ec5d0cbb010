"""Incoming mail: the dialogue at port 25, the answers of the maps, the way to the stores, the queue."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.tier("mx")

# A dialogue that ends before DATA, so nothing is sent. The PROXY header names this node.
DIALOGUE = """
import json, smtplib, socket, ssl, sys
class Client(smtplib.SMTP):
    def _get_socket(self, host, port, timeout):
        connection = socket.create_connection((host, port), timeout)
        connection.sendall(b"PROXY TCP4 127.0.0.1 127.0.0.1 40000 25\\r\\n")
        return connection
client = Client("127.0.0.1", 25, local_hostname="verify.invalid", timeout=60)
client.ehlo()
features = sorted(client.esmtp_features)
banner_name, own, foreign, unknown = sys.argv[1], "nobody-has-this-address@" + sys.argv[2], "someone@example.org", {}
client._host = banner_name
client.starttls(context=ssl.create_default_context(cafile="/etc/ssl/posthouse/ca.pem"))
client.ehlo()
client.mail("verify@example.org")
answers = {"tls": client.sock.version(), "features": features, "unknown": client.rcpt(own)[0],
    "foreign": client.rcpt(foreign)[0], "routed": client.rcpt("someone%example.org@" + sys.argv[2])[0],
    "vrfy": client.docmd("VRFY root")[0]}
client.rset()
client.quit()
print(json.dumps(answers))
"""


@pytest.fixture
def dialogue(host: Any, ctx: dict[str, Any]) -> dict[str, Any]:
    name = ctx["vip_hosts"].get("mail", ctx["node"]["fqdn"])
    return json.loads(host.check_output("python3 -c %s %s %s", DIALOGUE, name, ctx["site"]["domain"]))


def effective(host: Any, *names: str) -> dict[str, str]:
    """What Postfix really uses, defaults and expansions included."""
    lines = host.check_output("postconf -x " + " ".join(names)).splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}


def test_service(host: Any) -> None:
    service = host.service("postfix")
    assert service.is_running
    assert service.is_enabled


def test_unknown_recipients_are_refused_for_good(dialogue: dict[str, Any]) -> None:
    assert dialogue["unknown"] == 550


def test_no_open_relay(dialogue: dict[str, Any]) -> None:
    assert dialogue["foreign"] == 554
    assert dialogue["routed"] == 554


def test_tls_and_extensions(dialogue: dict[str, Any]) -> None:
    assert dialogue["tls"] in ("TLSv1.2", "TLSv1.3")
    assert {"starttls", "size", "8bitmime", "dsn"} <= set(dialogue["features"])
    # Stores cannot take SMTPUTF8; ETRN and VRFY only tell strangers something.
    assert not {"smtputf8", "etrn", "vrfy"} & set(dialogue["features"])
    assert dialogue["vrfy"] == 502


def test_reinjection_listens_to_this_node_only(host: Any) -> None:
    assert host.socket("tcp://127.0.0.1:10025").is_listening
    assert not host.socket("tcp://0.0.0.0:10025").is_listening


def test_nothing_missing_is_taken_for_an_answer(host: Any) -> None:
    values = effective(
        host, "milter_default_action", "smtpd_milters", "mynetworks", "smtpd_relay_restrictions",
        "smtpd_forbid_bare_newline", "smtpd_forbid_bare_newline_exclusions", "postscreen_upstream_proxy_protocol",
        "unknown_virtual_mailbox_reject_code", "lmtp_tls_security_level", "relayhost",
    )  # fmt: skip
    assert values == {
        "milter_default_action": "tempfail",
        "smtpd_milters": "inet:127.0.0.1:7357, inet:127.0.0.1:7358",
        "mynetworks": "",
        "smtpd_relay_restrictions": "reject_unauth_destination",
        "smtpd_forbid_bare_newline": "normalize",
        "smtpd_forbid_bare_newline_exclusions": "",
        "postscreen_upstream_proxy_protocol": "haproxy",
        "unknown_virtual_mailbox_reject_code": "550",
        "lmtp_tls_security_level": "secure",
        "relayhost": "[127.0.0.1]:10026",
    }


@pytest.mark.parametrize("name", ["account", "forward", "forward_only", "store"])
def test_the_directory_answers(host: Any, ctx: dict[str, Any], name: str) -> None:
    """Status 1 without a word is "there is none"; a directory that cannot be asked says so."""
    address = f"nobody-has-this-address@{ctx['site']['domain']}"
    answer = host.run("postmap -q %s ldap:/etc/postfix/ldap/%s.cf", address, name)
    assert (answer.rc, answer.stdout, answer.stderr) == (1, "", "")


def test_postmaster_has_an_address_in_every_domain(host: Any, ctx: dict[str, Any]) -> None:
    for domain in ctx["site"]["domains"]:
        if (address := f"postmaster@{domain}") != ctx["site"]["postmaster"]:
            answer = host.check_output("postmap -q %s texthash:/etc/postfix/postmaster", address)
            assert answer == ctx["site"]["postmaster"]


def test_block_lists_answer(host: Any, ctx: dict[str, Any]) -> None:
    """Every list names 127.0.0.2, for just this purpose, and never 127.0.0.1 (RFC 5782)."""
    for entry in ctx["mx_dnsbl"]:
        zone = entry.split("=")[0].split("*")[0]
        assert host.run("getent ahostsv4 %s", f"2.0.0.127.{zone}").rc == 0, f"{zone} does not answer"
        assert host.run("getent ahostsv4 %s", f"1.0.0.127.{zone}").rc != 0, f"{zone} lists everybody"


def test_stores_take_mail_over_verified_tls(host: Any, ctx: dict[str, Any]) -> None:
    for store in ctx["stores"]:
        result = host.run(
            "posttls-finger -S -c -T 60 -l secure -F /etc/ssl/posthouse/ca.pem -o dnssec_probe= "
            "-o smtp_host_lookup=native -o smtp_dns_support_level=disabled %s", f"[{store['host']}]:24"
        )  # fmt: skip
        assert "Verified TLS connection established" in result.stdout + result.stderr, result.stdout + result.stderr


def test_secrets_are_not_world_readable(host: Any) -> None:
    password = host.file("/etc/postfix/lmtp_password")
    assert (password.user, password.group, password.mode) == ("root", "postfix", 0o640)


def test_queue_is_kept(host: Any) -> None:
    """It lies where it survives a new image, and belongs to the running Postfix."""
    assert effective(host, "queue_directory")["queue_directory"] == "/srv/postfix/mx"
    assert host.check_output("findmnt --noheadings --output TARGET --target /srv/postfix/mx") != "/"
    assert host.file("/srv/postfix/mx/active").user == "postfix"


def test_processes_have_no_more_rights_than_they_need(host: Any, node: SimpleNamespace) -> None:
    pid = host.check_output("systemctl show --property MainPID --value postfix")
    for _ in range(10):
        owners = host.check_output("ps --no-headers -o user= --ppid %s", pid).split()
        assert owners, f"{node.name}: the master has no children"
        if set(owners) == {"postfix"}:
            break
        time.sleep(1)  # one that was just started is root's until it has given that up
    assert set(owners) == {"postfix"}
    limits = host.check_output("systemctl show --property ProtectSystem --property NoNewPrivileges postfix").split()
    assert sorted(limits) == ["NoNewPrivileges=yes", "ProtectSystem=strict"]
