#!/usr/bin/python
# GNU General Public License v3.0+ (https://www.gnu.org/licenses/gpl-3.0.txt)
"""Puts the directory's base entries in place: read, plan, apply, with one comparison."""

from __future__ import annotations

import time
import traceback
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    import ldap

    LDAP_ERROR = None
except ImportError:
    LDAP_ERROR = traceback.format_exc()

DOCUMENTATION = r"""
module: directory_entries
short_description: Base entries of the directory and the passwords of its services
description:
  - Runs on one provider, as root, over slapd's own socket; replication carries the entries to every other node.
  - Listed attributes get exactly the listed values. Other attributes and other entries are left alone.
  - A password that the entry accepts is left alone; any other is set, hashed by slapd.
  - A provider without data waits for its peers' data and never starts a directory of its own beside theirs.
  - Its action plugin fills in all options from the site.
options:
  suffix:
    description: The directory's suffix.
    type: str
    required: true
  entries:
    description: The entries, parents first.
    type: list
    elements: dict
    required: true
    suboptions:
      dn: {description: Its name., type: str, required: true}
      attributes: {description: "Values by attribute: {ou: [accounts]}.", type: dict, required: true}
      password: {description: The password that it is to accept., type: str}
  peers:
    description: Full names of the other providers.
    type: list
    elements: str
    default: []
  replicator:
    description: How providers bind at each other.
    type: dict
    required: true
    suboptions:
      dn: {description: Name of the entry., type: str, required: true}
      password: {description: Its password., type: str, required: true}
  timeout:
    description: Seconds to wait for the data of a peer.
    type: int
    default: 900
author: posthouse
"""

EXAMPLES = r"""
- name: Put the directory's base entries in place
  directory_entries:
"""

RETURN = r"""
steps:
  description: "What was, or in check mode would be, done: add, modify or password, and the entry's name."
  returned: always
  type: list
  elements: str
"""

SOCKET = "ldapi://%2Frun%2Fslapd%2Fslapd.sock"
CA = "/etc/ssl/posthouse/ca.pem"

Entries = dict[str, dict[str, list[str]]]


class Problem(Exception):
    """What is wrong and what to do about it."""


def connect(uri: str) -> Any:
    connection = ldap.initialize(uri)
    connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 5)
    connection.set_option(ldap.OPT_TIMEOUT, 30)
    if uri.startswith("ldaps:"):
        connection.set_option(ldap.OPT_X_TLS_CACERTFILE, CA)
        connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
        connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
    return connection


def complete(connection: Any, suffix: str) -> bool:
    """Whether a directory has data, and all of it.

    slapd gives the suffix its contextCSN with the first write, or at the end of the first copy from a provider.
    """
    try:
        found = connection.search_s(suffix, ldap.SCOPE_BASE, attrlist=["contextCSN"])
    except ldap.NO_SUCH_OBJECT:
        return False
    return "contextCSN" in found[0][1]


def peer_state(name: str, replicator: dict[str, str]) -> str:
    """A peer is "filled", "empty" or "unreachable"."""
    peer = connect(f"ldaps://{name}")
    try:
        peer.simple_bind_s(replicator["dn"], replicator["password"])
        # Where the replicator is known there is data, even if it is not complete yet.
        return "filled"
    except ldap.INVALID_CREDENTIALS:
        return "empty"
    except ldap.LDAPError:
        return "unreachable"
    finally:
        peer.unbind_s()


def filled_peers(options: dict[str, Any]) -> list[str]:
    """The peers that have data. Raises Problem if none has any as far as can be told, but not all could be asked."""
    states = {name: peer_state(name, options["replicator"]) for name in options["peers"]}
    filled = [name for name, state in states.items() if state == "filled"]
    lost = [name for name, state in states.items() if state == "unreachable"]
    if lost and not filled:
        raise Problem(
            f"this provider has no data and {', '.join(lost)} cannot be asked for theirs; bring them up and repeat, "
            "or take providers that are gone for good out of directory.providers in site.yml"
        )
    return filled


def await_data(local: Any, suffix: str, peers: list[str], timeout: int) -> None:
    """Returns when replication has brought everything that the peers have. Raises Problem."""
    deadline = time.monotonic() + timeout
    while not complete(local, suffix):
        if time.monotonic() > deadline:
            raise Problem(f"the data of {', '.join(peers)} did not arrive in {timeout} s; look at: journalctl -u slapd")
        time.sleep(1)


def read(local: Any, want: Entries) -> Entries:
    """The wanted entries that exist, with the wanted attributes alone."""
    have: Entries = {}
    for dn, attributes in want.items():
        try:
            found = local.search_s(dn, ldap.SCOPE_BASE, attrlist=list(attributes))
        except ldap.NO_SUCH_OBJECT:
            continue
        have[dn] = {name: sorted(v.decode() for v in values) for name, values in found[0][1].items()}
    return have


def accepts(dn: str, password: str) -> bool:
    """Whether the directory takes this password for this entry."""
    connection = connect(SOCKET)
    try:
        connection.simple_bind_s(dn, password)
        return True
    except ldap.INVALID_CREDENTIALS:
        return False
    finally:
        connection.unbind_s()


def plan(have: Entries, want: Entries, refused: set[str]) -> list[tuple[str, str, Any]]:
    """The steps from what is there to what is wanted: ("add" | "modify" | "password", dn, what)."""
    steps: list[tuple[str, str, Any]] = []
    for dn, attributes in want.items():
        if dn not in have:
            steps.append(("add", dn, attributes))
        else:
            differing = {name: values for name, values in attributes.items() if have[dn].get(name) != values}
            if differing:
                steps.append(("modify", dn, differing))
        if dn in refused:
            steps.append(("password", dn, None))
    return steps


def apply(local: Any, step: tuple[str, str, Any], passwords: dict[str, str]) -> None:
    verb, dn, what = step
    if verb == "password":
        local.passwd_s(dn, None, passwords[dn])
        return
    values = {name: [value.encode() for value in listed] for name, listed in what.items()}
    if verb == "add":
        local.add_s(dn, list(values.items()))
    else:
        local.modify_s(dn, [(ldap.MOD_REPLACE, name, listed) for name, listed in values.items()])


def text(entries: Entries, passwords: dict[str, str], refused: set[str]) -> str:
    """Entries as `--diff` shows them. Of a password it shows whether it is the wanted one."""
    blocks = []
    for dn, attributes in entries.items():
        lines = [f"dn: {dn}", *(f"{name}: {value}" for name, values in sorted(attributes.items()) for value in values)]
        if dn in passwords:
            lines.append(f"userPassword: ({'another' if dn in refused else 'the one in the secrets'})")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def run(options: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Returns the module's result. Raises Problem, ldap.LDAPError."""
    want: Entries = {
        entry["dn"]: {name: sorted(map(str, values)) for name, values in entry["attributes"].items()}
        for entry in options["entries"]
    }
    passwords = {entry["dn"]: entry["password"] for entry in options["entries"] if entry["password"]}
    local = connect(SOCKET)
    try:
        local.sasl_external_bind_s()
    except ldap.SERVER_DOWN:
        raise Problem("slapd does not answer on its socket; look at: systemctl status slapd") from None
    if not complete(local, options["suffix"]) and (peers := filled_peers(options)):
        if check_mode:
            return {
                "changed": False,
                "steps": [],
                "msg": f"replication is still bringing the data of {', '.join(peers)}",
            }
        await_data(local, options["suffix"], peers, options["timeout"])

    have = read(local, want)
    refused = {dn for dn, password in passwords.items() if not accepts(dn, password)}
    steps = plan(have, want, refused)
    if not check_mode:
        for step in steps:
            apply(local, step, passwords)
    return {
        "changed": bool(steps),
        "steps": [f"{verb} {dn}" for verb, dn, _ in steps],
        "diff": {"before": text(have, passwords, refused), "after": text(want, passwords, set())},
    }


def main() -> None:
    entry = {
        "dn": {"type": "str", "required": True},
        "attributes": {"type": "dict", "required": True},
        "password": {"type": "str", "no_log": True},
    }
    replicator = {
        "dn": {"type": "str", "required": True},
        "password": {"type": "str", "required": True, "no_log": True},
    }
    module = AnsibleModule(
        argument_spec={
            "suffix": {"type": "str", "required": True},
            "entries": {"type": "list", "elements": "dict", "required": True, "options": entry},
            "peers": {"type": "list", "elements": "str", "default": []},
            "replicator": {"type": "dict", "required": True, "options": replicator},
            "timeout": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    if LDAP_ERROR:
        module.fail_json(msg=missing_required_lib("python3-ldap"), exception=LDAP_ERROR)
    try:
        module.exit_json(**run(module.params, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=str(problem))
    except ldap.LDAPError as error:
        details = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
        reason = ": ".join(str(details[key]) for key in ("desc", "info") if key in details) or str(error)
        module.fail_json(msg=f"the directory refused: {reason}; look at: journalctl -u slapd")


if __name__ == "__main__":
    main()
