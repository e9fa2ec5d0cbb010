"""Where people hand in mail: nothing without TLS, nothing without a login, and those who check are there."""

from __future__ import annotations

from typing import Any

import pytest
from dialogue import talk

pytestmark = pytest.mark.tier("submission")

Variables = dict[str, Any]


@pytest.mark.parametrize("unit", ["postfix-submission", "submission-login", "postfwd"])
def test_service_runs_and_comes_back(host: Any, unit: str) -> None:
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled


def test_587_wants_tls_first(host: Any) -> None:
    _, features, refused, _ = talk(host, 587, "EHLO verify.invalid", "MAIL FROM:<verify@example.org>", "QUIT")
    assert "STARTTLS" in features
    assert "AUTH" not in features
    assert refused.startswith("530")


def test_587_offers_logins_after_tls(host: Any) -> None:
    _, _, _, features, _ = talk(host, 587, "EHLO verify.invalid", "STARTTLS", "EHLO verify.invalid", "QUIT")
    assert "AUTH PLAIN LOGIN" in features


def test_465_relays_nothing_without_a_login(host: Any) -> None:
    lines = ["EHLO verify.invalid", "MAIL FROM:<verify@example.org>", "RCPT TO:<verify@example.com>", "QUIT"]
    _, features, _, refused, _ = talk(host, 465, *lines, tls=True)
    assert "AUTH PLAIN LOGIN" in features
    assert refused.startswith("5")


def test_it_can_ask_whose_address_it_is(host: Any, ctx: Variables) -> None:
    """postmap says nothing about an address that nobody has, and complains if it could not ask."""
    address = f"nobody-has-this-address@{ctx['site']['domain']}"
    asked = host.run(f"postmap -q {address} ldap:/etc/postfix-submission/ldap/owner.cf")
    assert (asked.stdout, asked.stderr) == ("", "")


def test_it_can_ask_for_passwords(host: Any, ctx: Variables) -> None:
    """67 is "no such user". If the directory cannot be asked it is 75."""
    conf = "/etc/submission-login/dovecot.conf"
    host.run_expect([67], f"doveadm -c {conf} auth lookup nobody-has-this-login@{ctx['site']['domain']}")


def test_rates_are_counted(host: Any, ctx: Variables) -> None:
    assert (
        f"sasl_username/{ctx['submission_messages_per_hour']}/3600/450 "
        in host.file("/etc/postfwd/rules.cf").content_string
    )
    question = r"exec 3<>/dev/tcp/127.0.0.1/10040; printf 'request=smtpd_access_policy\nprotocol_state=DATA\n\n' >&3"
    asked = f'timeout 60 bash -c "{question}; head -n 1 <&3"'
    assert host.check_output(asked).strip() == "action=DUNNO"


def test_mail_passes_the_scanner_or_waits(host: Any) -> None:
    settings = host.check_output("postconf -c /etc/postfix-submission -h smtpd_milters milter_default_action").split(
        "\n"
    )
    assert settings == ["inet:127.0.0.1:7357, inet:127.0.0.1:7358", "tempfail"]
