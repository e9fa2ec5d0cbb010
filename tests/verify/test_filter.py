"""The scanner: both milters speak their protocol, viruses and spam are known, nothing hears them but this node."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.tier("filter")

UNITS = ["clamav-daemon", "clamav-freshclam", "clamav-milter", "spamd", "mimedefang-multiplexor", "mimedefang"]

# In two halves each, or every scanner that meets this file would report it.
EICAR = r"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-STANDARD" + "-ANTIVIRUS-TEST-FILE!$H+H*"
GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD" + "-ANTI-UBE-TEST-EMAIL*C.34X"

# The first packet of the milter protocol: version 6, every action, every step. The answer is of the same kind.
NEGOTIATE = """
import json, socket, struct, sys
answers = {}
for port in sys.argv[1:]:
    with socket.create_connection(("127.0.0.1", int(port)), 60) as connection:
        packet = b"O" + struct.pack(">III", 6, 0x1FF, 0x1FFFFF)
        connection.sendall(struct.pack(">I", len(packet)) + packet)
        answers[port] = connection.makefile("rb").read(5)[4:].decode()
print(json.dumps(answers))
"""


@pytest.mark.parametrize("unit", UNITS)
def test_service(host: Any, unit: str) -> None:
    service = host.service(unit)
    assert service.is_running
    assert service.is_enabled


def test_milters_speak(host: Any) -> None:
    assert json.loads(host.check_output("python3 -c %s 7357 7358", NEGOTIATE)) == {"7357": "O", "7358": "O"}


@pytest.mark.parametrize("port", [783, 7357, 7358])
def test_listens_on_loopback_only(host: Any, port: int) -> None:
    assert host.socket(f"tcp://127.0.0.1:{port}").is_listening
    assert not host.socket(f"tcp://0.0.0.0:{port}").is_listening


def test_virus_is_known(host: Any) -> None:
    found = host.run("printf %%s %s | clamdscan --no-summary -", EICAR)
    assert found.rc == 1, found.stdout + found.stderr
    assert "FOUND" in found.stdout


def test_every_signature_source_was_fetched(host: Any, ctx: dict[str, Any]) -> None:
    for url in ctx["filter_signature_urls"]:
        assert host.file(f"/var/lib/clamav/{url.split('/')[-1]}").size > 0
    if ctx["filter_database_mirror"]:
        assert host.run("ls /var/lib/clamav/main.c[lv]d /var/lib/clamav/daily.c[lv]d").rc == 0


def test_clamd_out_of_reach_puts_mail_off(host: Any) -> None:
    assert host.file("/etc/clamav/clamav-milter.conf").contains("^OnFail Defer$")


def spam_score(host: Any, body: str) -> float:
    message = f"From: verify@example.org\nTo: verify@example.org\nSubject: a note\n\n{body}\n"
    return float(host.run("printf %%s %s | spamc -c", message).stdout.split("/")[0])


def test_spam_is_known(host: Any, ctx: dict[str, Any]) -> None:
    assert spam_score(host, GTUBE) >= ctx["filter_reject_score"]


def test_a_plain_note_is_no_spam(host: Any, ctx: dict[str, Any]) -> None:
    assert spam_score(host, "Lunch is at noon.") < ctx["filter_reject_score"]


def test_workers_are_there(host: Any) -> None:
    answer = host.check_output("md-mx-ctrl -s /run/mimedefang/multiplexor.sock status")
    assert "idle" in answer or "busy" in answer, answer


def test_the_directory_answers(host: Any, ctx: dict[str, Any]) -> None:
    """As the filter's user: addresses can be looked up, passwords cannot."""
    search = (
        "use Net::LDAP; my $l = Net::LDAP->new('ldapi://%2Frun%2Fslapd%2Fldapi', timeout => 60) or die $@; "
        "my $r = $l->search(base => $ARGV[0], filter => '(userPassword=*)', sizelimit => 1, "
        "attrs => ['userPassword']); "
        "die $r->error if $r->code; print $r->count"
    )
    base = f"ou=accounts,{ctx['directory']['suffix']}"
    assert host.check_output("runuser -u defang -- perl -e %s %s", search, base) == "0"


@pytest.mark.parametrize(
    "unit", ["clamav-daemon.socket", "clamav-freshclam-once.timer", "spamassassin-maintenance.timer"]
)
def test_nothing_is_fetched_behind_our_back(host: Any, unit: str) -> None:
    assert host.check_output("systemctl show --property LoadState --value %s", unit) == "masked"


@pytest.mark.parametrize(("unit", "user"), [("clamav-daemon", "clamav"), ("clamav-milter", "clamav"),
                                            ("spamd", "debian-spamd"), ("mimedefang", "defang")])  # fmt: skip
def test_owner(host: Any, unit: str, user: str) -> None:
    pid = host.check_output("systemctl show --property MainPID --value %s", unit)
    assert host.check_output("ps --no-headers -o user:32= -p %s", pid).strip() == user
