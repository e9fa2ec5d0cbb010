#!/usr/bin/python
# GNU General Public License v3.0+ (https://www.gnu.org/licenses/gpl-3.0.txt)
"""Takes a node's servers out of the local HAProxy's pools, or puts them back: read, plan, apply, one comparison."""

from __future__ import annotations

import csv
import io
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: balancer_server
short_description: Drain a node in HAProxy's pools, or put it back
description:
  - Runs on a balancer, as root, over HAProxy's admin socket. Changes every pool that has a server of the node's name.
  - A drained server keeps its sessions until they end and gets no new ones.
  - The state is also written where HAProxy reads it when it reloads or starts, so it lasts.
  - Refuses to drain the last server of a pool that still serves, unless told to.
options:
  node:
    description: The node, which is the servers' name.
    type: str
    required: true
  state:
    description: What its servers are to be.
    type: str
    choices: [drain, ready]
    required: true
  wait:
    description: Seconds to wait for the sessions of drained servers to end. Those that have not by then go on.
    type: int
    default: 0
  force:
    description: Drain it even if a pool has nobody else.
    type: bool
    default: false
  socket:
    description: HAProxy's admin socket.
    type: path
    default: /run/haproxy/admin.sock
  state_file:
    description: HAProxy's server-state-file.
    type: path
    default: /var/lib/haproxy/server-state
author: posthouse
"""

EXAMPLES = r"""
- name: Take mail1 out of service
  balancer_server:
    node: mail1
    state: drain
    wait: 60
"""

RETURN = r"""
steps:
  description: "What was, or in check mode would be, done: the state and the server."
  returned: always
  type: list
  elements: str
sessions:
  description: "Sessions that the node's servers still have: {pool: number}."
  returned: always
  type: dict
lines:
  description: The same in words.
  returned: always
  type: list
  elements: str
"""

# Of HAProxy's srv_admin_state: set by command; by the configuration or another server it is not ours to change.
FORCED_MAINTENANCE = 0x01
FORCED_DRAIN = 0x08
RUNNING = 2


class Problem(Exception):
    """What is wrong and what to do about it."""


class Server(NamedTuple):
    """A server of a pool, as HAProxy sees it now."""

    pool: str
    name: str
    admin: int
    running: bool
    sessions: int

    @property
    def state(self) -> str:
        if self.admin & FORCED_MAINTENANCE:
            return "maint"
        return "drain" if self.admin & FORCED_DRAIN else "ready"

    @property
    def serves(self) -> bool:
        return self.running and not self.admin


def ask(path: str, command: str) -> str:
    """HAProxy's answer to one command. Raises Problem."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(path)
            connection.sendall(f"{command}\n".encode())
            return connection.makefile().read()
    except OSError as error:
        raise Problem(f"haproxy does not answer on {path} ({error}); look at: systemctl status haproxy") from None


def parse(states: str, statistics: str) -> list[Server]:
    """All servers, from the answers to `show servers state` and `show stat`."""
    rows = csv.DictReader(io.StringIO(statistics.removeprefix("# ")))
    sessions = {(row["pxname"], row["svname"]): int(row["scur"] or 0) for row in rows}
    lines = states.splitlines()
    names = next(line for line in lines if line.startswith("# ")).removeprefix("# ").split()
    servers = []
    for line in lines:
        row = dict(zip(names, line.split(), strict=False))
        if line.startswith("#") or "srv_admin_state" not in row:
            continue
        pool, name = row["be_name"], row["srv_name"]
        admin, running = int(row["srv_admin_state"]), int(row["srv_op_state"]) == RUNNING
        servers.append(Server(pool, name, admin, running, sessions.get((pool, name), 0)))
    return servers


def read(path: str) -> list[Server]:
    return parse(ask(path, "show servers state"), ask(path, "show stat"))


def plan(have: list[Server], node: str, state: str, force: bool) -> list[Server]:
    """The servers whose state is to change. Raises Problem."""
    mine = [server for server in have if server.name == node]
    if not mine:
        known = ", ".join(sorted({server.name for server in have}))
        raise Problem(f"no pool has a server {node}; there are: {known}")
    steps = [server for server in mine if server.state != state]
    if state == "drain" and not force:
        for server in steps:
            others = [other for other in have if other.pool == server.pool and other.name != node]
            if server.serves and not any(other.serves for other in others):
                raise Problem(
                    f"{server.pool}: {node} is the only one that serves; put another one back first, "
                    "or insist with drain_force=true"
                )
    return steps


def save(path: str, state_file: str) -> None:
    """Writes down the state of all servers, whole or not at all."""
    target = Path(state_file)
    draft = target.with_name(target.name + ".new")
    with draft.open("w") as file:
        file.write(ask(path, "show servers state"))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)


def text(servers: list[Server]) -> str:
    return "".join(f"{server.pool}/{server.name}: {server.state}\n" for server in servers)


def run(options: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Returns the module's result. Raises Problem."""
    path, node, state = options["socket"], options["node"], options["state"]
    have = read(path)
    steps = plan(have, node, state, options["force"])
    before = text([server for server in have if server.name == node])
    if steps and not check_mode:
        for server in steps:
            answer = ask(path, f"set server {server.pool}/{server.name} state {state}").strip()
            if answer:
                raise Problem(f"{server.pool}/{server.name}: {answer}")
        save(path, options["state_file"])

    deadline = time.monotonic() + (options["wait"] if state == "drain" and not check_mode else 0)
    while True:
        mine = [server for server in read(path) if server.name == node]
        left = {server.pool: server.sessions for server in mine if server.sessions}
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(1)
    return {
        "changed": bool(steps),
        "steps": [f"{state} {server.pool}/{server.name}" for server in steps],
        "sessions": left,
        "lines": [f"{pool}: {number} session(s) of {node} go on" for pool, number in left.items() if state == "drain"],
        "diff": {
            "before": before,
            "after": text([server._replace(admin=FORCED_DRAIN * (state == "drain")) for server in mine]),
        },
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "state": {"type": "str", "required": True, "choices": ["drain", "ready"]},
            "wait": {"type": "int", "default": 0},
            "force": {"type": "bool", "default": False},
            "socket": {"type": "path", "default": "/run/haproxy/admin.sock"},
            "state_file": {"type": "path", "default": "/var/lib/haproxy/server-state"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module.params, module.check_mode))
    except Problem as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
