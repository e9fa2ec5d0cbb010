"""The way to the mailboxes: it speaks each protocol over TLS alone, and reaches the directory and the stores."""

from __future__ import annotations

from typing import Any

import pytest
from dialogue import talk

pytestmark = pytest.mark.tier("access")

Variables = dict[str, Any]


def test_service_runs_and_comes_back(host: Any) -> None:
    assert host.service("dovecot").is_running
    assert host.service("dovecot").is_enabled


@pytest.mark.parametrize(
    ("port", "greeting", "last"), [(10993, "* OK", "a LOGOUT"), (10995, "+OK", "QUIT")], ids=["imaps", "pop3s"]
)
def test_it_greets_who_comes_through_a_balancer(host: Any, port: int, greeting: str, last: str) -> None:
    assert talk(host, port, last, tls=True)[0].startswith(greeting)


def test_sieve_takes_no_password_before_tls(host: Any) -> None:
    before, _, after, _ = talk(host, 14190, "STARTTLS", "CAPABILITY", "LOGOUT")
    assert '"STARTTLS"' in before
    assert '"SASL" ""' in before
    assert '"SASL" "PLAIN LOGIN"' in after


def test_nothing_listens_without_tls(host: Any) -> None:
    ports = {line.split()[3].rpartition(":")[2] for line in host.check_output("ss -Hltn").splitlines()}
    assert ports & {"110", "143"} == set()


def test_tls_is_as_new_as_the_site_wants(host: Any, ctx: Variables) -> None:
    assert host.check_output("doveconf -h ssl_min_protocol") == ctx["tls_minimum"]


def test_it_can_ask_the_directory(host: Any, ctx: Variables) -> None:
    """67 is "no such user". If the directory cannot be asked it is 75."""
    host.run_expect([67], f"doveadm auth lookup nobody-has-this-login@{ctx['site']['domain']}")


def test_it_reaches_every_store_and_knows_it_by_its_certificate(host: Any, ctx: Variables) -> None:
    options = "-CAfile /etc/ssl/posthouse/ca.pem -verify_return_error -brief"
    for store in ctx["stores"]:
        name = store["host"]
        host.run_expect([0], f"echo | openssl s_client -connect {name}:993 -verify_hostname {name} {options}")


def test_stores_password_is_for_root_alone(host: Any) -> None:
    file = host.file("/etc/dovecot/dovecot.conf")
    assert (file.user, file.mode) == ("root", 0o600)
