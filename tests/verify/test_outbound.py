"""The one way out: for this node alone, and signed."""

from __future__ import annotations

from typing import Any

import pytest
from dialogue import talk
from dns.resolver import Resolver

pytestmark = pytest.mark.tier("outbound")

Variables = dict[str, Any]


@pytest.mark.parametrize("unit", ["postfix-outbound", "opendkim"])
def test_service_runs_and_comes_back(host: Any, unit: str) -> None:
    assert host.service(unit).is_running
    assert host.service(unit).is_enabled


def test_it_answers(host: Any) -> None:
    assert talk(host, 10026, "EHLO localhost", "QUIT", proxy=False)[1].startswith("250")


def test_nobody_else_reaches_it(host: Any) -> None:
    listening = [line.split()[3] for line in host.check_output("ss -Hltn").splitlines()]
    assert [where for where in listening if where.endswith(":10026")] == ["127.0.0.1:10026"]
    assert [where for where in listening if where.endswith(":8891")] == ["127.0.0.1:8891"]


def test_mail_is_signed_or_waits(host: Any) -> None:
    settings = host.check_output("postconf -c /etc/postfix-outbound -h smtpd_milters milter_default_action").split("\n")
    assert settings == ["inet:127.0.0.1:8891", "tempfail"]


def test_keys_are_those_that_dns_publishes(host: Any, ctx: Variables) -> None:
    resolver = Resolver(configure=False)
    resolver.nameservers = ctx["network"]["resolvers"]
    for key in ctx["dkim"]:
        path = f"/etc/opendkim/{key['domain']}.private"
        public = host.check_output(f"openssl pkey -in {path} -pubout -outform DER | base64 --wrap=0")
        (record,) = resolver.resolve(f"{key['selector']}._domainkey.{key['domain']}", "TXT")
        assert b"".join(record.strings).decode().endswith(f"p={public}")


def test_keys_are_not_for_all_eyes(host: Any, ctx: Variables) -> None:
    for key in ctx["dkim"]:
        file = host.file(f"/etc/opendkim/{key['domain']}.private")
        assert (file.user, file.group, file.mode) == ("opendkim", "opendkim", 0o600)
