"""The directory: complete, the same on every node, and open to nobody who need not see it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.tier("directory")

LOCAL = "ldapi://%2Frun%2Fslapd%2Fldapi"  # the name by which mail's daemons know it


@pytest.fixture
def ask(host: Any) -> Callable[..., Any]:
    """Runs a search on the node and returns its result: `ask("-b", base, filter, attribute…, user="nobody")`."""

    def search(*arguments: str, user: str = "root", uri: str = "") -> Any:
        words = ["setpriv", f"--reuid={user}", "--clear-groups", "ldapsearch", "-LLL", "-o", "ldif-wrap=no"]
        words += ["-x", "-H", uri] if uri else ["-Q", "-Y", "EXTERNAL"]
        return host.run(shlex.join([*words, *arguments]))

    return search


def csns(answer: Any) -> dict[str, str]:
    """The contextCSN of each provider that an answer holds: {server id: CSN}."""
    values = [line.split()[1] for line in answer.stdout.splitlines() if line.startswith("contextCSN:")]
    return {value.split("#")[2]: value for value in values}


def as_replicator(provider: dict[str, Any]) -> str:
    """The beginning of a command that searches at a provider as replication does.

    The password comes from the node's own slapd.conf: an argument would be for all the world to see.
    """
    password = "sed -n 's/^ *credentials=\"\\(.*\\)\"$/\\1/p' /etc/ldap/slapd.conf | head -1 | tr -d '\\n'"
    search = f"ldapsearch -x -LLL -o ldif-wrap=no -H ldaps://{provider['fqdn']} -y /dev/stdin"
    bind = "-D $(sed -n 's/^ *binddn=\"\\(.*\\)\"$/\\1/p' /etc/ldap/slapd.conf | head -1)"
    return f"{password} | {search} {bind}"


def test_services(host: Any) -> None:
    for unit in ("slapd", "slapd-open"):
        assert host.service(unit).is_running, unit
        assert host.service(unit).is_enabled, unit


def test_runs_as_its_own_user(host: Any) -> None:
    assert {process.user for process in host.process.filter(comm="slapd")} == {"openldap"}


def test_complete(ask: Callable[..., Any]) -> None:
    assert csns(ask("-s", "base", "contextCSN")), "without contextCSN the first copy from a provider has not ended"


def test_this_nodes_daemons_find_it(ask: Callable[..., Any], ctx: dict[str, Any]) -> None:
    found = ask("-s", "base", "-b", f"ou=accounts,{ctx['directory']['suffix']}", "1.1", user="nobody", uri=LOCAL)
    assert found.rc == 0, found.stderr


def test_follows_every_provider(host: Any, ask: Callable[..., Any], ctx: dict[str, Any]) -> None:
    """What another provider wrote is here. That takes milliseconds; half a minute is for one that just came back."""
    for provider in ctx["directory"]["providers"]:
        if provider["name"] == ctx["node"]["name"]:
            continue
        answer = host.run(f"{as_replicator(provider)} -s base contextCSN")
        assert answer.rc == 0, f"{provider['name']}: {answer.stderr}"
        # Of its own changes a provider knows best. One that has not written yet has none.
        own = csns(answer).get(f"{provider['id']:03x}", "")
        deadline = time.monotonic() + 30
        while (here := csns(ask("-s", "base", "contextCSN")).get(f"{provider['id']:03x}", "")) < own:
            assert time.monotonic() < deadline, f"{here or 'nothing'} of {provider['name']}, which is at {own}"
            time.sleep(1)


def test_holds_what_the_first_provider_holds(host: Any, ctx: dict[str, Any]) -> None:
    """Every entry in the same version. Equal contextCSNs do not prove that."""
    source = ctx["directory"]["providers"][0]
    if source["name"] == ctx["node"]["name"]:
        return
    rest = "'(objectClass=*)' entryUUID entryCSN | grep ^entry | sort | sha256sum"
    here = "ldapsearch -Q -Y EXTERNAL -LLL -o ldif-wrap=no"
    for _ in range(5):
        # Accounts may be changing while this looks; that it differs five times is no coincidence.
        if host.check_output(f"{as_replicator(source)} {rest}") == host.check_output(f"{here} {rest}"):
            return
        time.sleep(2)
    pytest.fail(f"differs from {source['name']}; see docs/directory.md, 'A node that differs'")


def test_only_providers_take_writes(host: Any, ctx: dict[str, Any]) -> None:
    # A change of nothing: where writing is allowed at all, it ends as "no such object".
    change = "dn: cn=nobody-has-this-name,{}\nchangetype: delete\n".format(ctx["directory"]["suffix"])
    done = host.run(f"printf {shlex.quote(change)} | ldapmodify -Q -Y EXTERNAL")
    expected = "No such object (32)" if ctx["node"]["provider"] else "Server is unwilling to perform (53)"
    assert expected in done.stderr


def test_strangers_on_the_network_see_nothing(ask: Callable[..., Any], node: SimpleNamespace) -> None:
    found = ask("(objectClass=*)", uri=f"ldaps://{node.fqdn}")
    assert found.rc == 32, found.stderr
    assert not found.stdout


def test_nobody_reads_passwords(ask: Callable[..., Any], ctx: dict[str, Any]) -> None:
    for user in ("nobody", "openldap", "root"):
        found = ask("-z", "50", "(userPassword=*)", "userPassword", user=user, uri=LOCAL)
        assert found.rc in (0, 4), found.stderr
        assert not found.stdout, user


def test_accounts_log_in_at_their_node_only(host: Any, ctx: dict[str, Any]) -> None:
    """Port 636 is no place to guess passwords: slapd itself, asked what its rules allow to whom."""
    target = f"ou=accounts,{ctx['directory']['suffix']}"
    check = f"slapacl -f /etc/ldap/slapd.conf -b {target} -d 0"
    network = "-o peername=IP=192.0.2.1:40000"
    local = "-o peername=PATH=/run/slapd/slapd.sock"
    for peer, allowed in ((network, False), (local, True)):
        answer = host.run(f"{check} {peer} userPassword/auth")
        assert ("ALLOWED" in answer.stdout + answer.stderr) is allowed, answer.stdout + answer.stderr
    assert "DENIED" in (denied := host.run(f"{check} {local} userPassword/read")).stdout + denied.stderr


def test_no_plaintext_port(host: Any) -> None:
    assert host.socket("tcp://0.0.0.0:636").is_listening
    assert not host.socket("tcp://0.0.0.0:389").is_listening
    assert not host.socket("tcp://127.0.0.1:389").is_listening


def test_certificate(host: Any, node: SimpleNamespace) -> None:
    """TLS of today, with the site's own certificate for this node's name, and nothing older."""
    connect = f"openssl s_client -connect {node.address}:636 -CAfile /etc/ssl/posthouse/ca.pem -verify_return_error"
    good = host.run(f"{connect} -verify_hostname {node.fqdn} </dev/null")
    assert good.rc == 0, good.stderr
    assert host.run(f"{connect} -verify_hostname elsewhere.invalid </dev/null").rc != 0
    assert host.run(f"{connect} -tls1_1 -cipher ALL:@SECLEVEL=0 </dev/null").rc != 0


def test_indices(host: Any, ask: Callable[..., Any], ctx: dict[str, Any]) -> None:
    """Each look-up that mail makes is answered from an index: at a million entries the others take seconds."""
    rules = host.file("/etc/ldap/slapd.conf").content_string
    indexed = {name for line in rules.splitlines() if line.startswith("index ") for name in line.split()[1].split(",")}
    assert {"objectClass", "uid", "mail", "mailLocalAddress", "mailHost", "entryCSN", "entryUUID"} <= indexed
    for name in ("uid", "mail", "mailLocalAddress"):
        assert ask(f"({name}=nobody@{ctx['site']['domain']})", "1.1", user="nobody", uri=LOCAL).rc == 0


def test_a_search_for_everything_is_cut_short(ask: Callable[..., Any], ctx: dict[str, Any]) -> None:
    found = ask("(objectClass=posthouseAccount)", "1.1", user="nobody", uri=LOCAL)
    assert found.stdout.count("dn: ") <= 500
    assert found.rc in (0, 4), found.stderr


def test_secrets_are_kept(host: Any) -> None:
    conf = host.file("/etc/ldap/slapd.conf")
    assert (conf.user, conf.group, conf.mode) == ("root", "openldap", 0o640)
    for name in ("/srv/directory/main", "/srv/directory/accesslog"):
        folder = host.file(name)
        assert (folder.user, folder.mode) == ("openldap", 0o700), name


def test_room_is_left(host: Any) -> None:
    """A full /srv stops every write, and replication with it."""
    used = int(host.check_output("df --output=pcent /srv/directory | tail -1").strip().rstrip("%"))
    assert used < 90, f"/srv is {used} % full; make room or grow it"
