# GNU General Public License v3.0+ (https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's half of converge: renders a node's tiers, ships them in one round trip, and paces the rollout."""

from __future__ import annotations

import base64
import fcntl
import getpass
import json
import os
import socket
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from posthouse import render, roles, secrets, sitefile
from posthouse.inventory import RUNTIME


class ActionModule(ActionBase):
    """`converge: {tiers: [...]}`; without tiers, all tiers of the node."""

    supports_check_mode = True
    supports_diff = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        assert task_vars is not None
        started = time.monotonic()
        try:
            desired = self._desired(task_vars)
        except (render.RenderError, roles.RoleError, secrets.SecretsError, sitefile.SiteError) as error:
            raise AnsibleActionFail(str(error)) from None
        packed = base64.b64encode(zlib.compress(json.dumps(desired).encode(), 1)).decode()

        def module(act: bool) -> dict[str, Any]:
            arguments = {"tiers": desired["tiers"], "desired": packed, "act": act}
            return self._execute_module("converge", module_args=arguments, task_vars=task_vars)

        result |= module(act=False)
        if result.get("changed") and not result.get("failed") and not self._task.check_mode:
            with turn(desired["site"], desired["class"], result["fresh"]) as refusal:
                if refusal:
                    raise AnsibleActionFail(refusal)
                applied = module(act=True)
                if applied.get("failed"):
                    give_up(desired["site"], desired["class"], task_vars["inventory_hostname"])
            # The first answer holds the exact differences; the second says what came of them.
            result |= applied | {"diff": result["diff"]}
        result["seconds"] = round(time.monotonic() - started, 2)
        return result

    def _desired(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        """The generation that this node should have, from its variables (so that Ansible's overrides count)."""
        site = sitefile.load(task_vars["posthouse_site"])
        node = site.nodes[task_vars["inventory_hostname"]]
        tiers = self._task.args.get("tiers") or list(node.tiers)
        names = [*render.shared_variables(site), *render.node_variables(site, node)]
        variables = {name: self._templar.template(task_vars[name]) for name in names}
        variables |= secrets.load(site).for_node(node)
        desired = render.generation(variables, [tier for tier in node.tiers if tier in tiers])
        who = f"{getpass.getuser()}@{socket.gethostname()} (pid {os.getppid()})"
        return desired | {"whole": set(tiers) >= set(node.tiers), "who": who, "site": site.name, "class": node.klass}


@contextmanager
def turn(site: str, klass: str, fresh: bool) -> Any:
    """Waits until this node may change: nodes of a class take turns, and stop after the first that fails.

    Yields None, or why this node must be left as it is. A node that serves nothing yet need not wait.
    """
    if fresh:
        yield None
        return
    folder = RUNTIME / site
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / f"turn-{klass}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = _given_up(site, klass)
        name = failed.read_text() if failed.exists() else None
        yield f"left as it is, because {name} of the same class failed; mend that first" if name else None


def give_up(site: str, klass: str, node: str) -> None:
    """Lets no further node of the class change in this run."""
    _given_up(site, klass).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _given_up(site, klass).write_text(node)


def _given_up(site: str, klass: str) -> Path:
    # Ansible forks a process for each task and node; their parent stands for the run.
    return RUNTIME / site / f"failed-{klass}-{os.getppid()}"
