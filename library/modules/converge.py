#!/usr/bin/python
# GNU General Public License v3.0+ (https://www.gnu.org/licenses/gpl-3.0.txt)
"""The node's half of converge as an Ansible module; the work itself is in module_utils/generation.py."""

DOCUMENTATION = r"""
module: converge
short_description: Bring a node to the generation that its tiers describe
description:
  - Compares packages, files, services and their health with what the roles' manifests say; where anything differs,
    stages, validates and swaps it in whole, and rolls back whole if a service does not come up healthy.
  - The controller half (an action plugin of the same name) renders the roles and fills in I(desired).
options:
  tiers:
    description: The tiers (roles) to converge; read by the controller half.
    type: list
    elements: str
  desired:
    description: The desired generation, packed; filled in by the controller half.
    type: str
  act:
    description: Whether to apply a difference or just to report it; filled in by the controller half.
    type: bool
    default: true
author: posthouse
"""

EXAMPLES = r"""
- name: Converge this role
  converge:
    tiers: ["{{ role_name }}"]
"""

RETURN = r"""
steps:
  description: What was, or in check mode would be, done.
  returned: always
  type: dict
fresh:
  description: Whether the node had never been converged before.
  returned: always
  type: bool
seconds:
  description: How long the node worked.
  returned: always
  type: float
"""

import base64
import inspect
import json
import os
import time
import zlib
from pathlib import Path

from ansible.module_utils import generation
from ansible.module_utils.basic import AnsibleModule

PROGRAM = Path("/usr/lib/posthouse/generation.py")


def main():
    module = AnsibleModule(
        argument_spec={
            "tiers": {"type": "list", "elements": "str"},
            # Holds passwords and keys, so Ansible must never print it.
            "desired": {"type": "str", "no_log": True},
            "act": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    started = time.monotonic()
    desired = json.loads(zlib.decompress(base64.b64decode(module.params["desired"])))
    fresh = not generation.CURRENT.exists()
    plan = generation.compare(desired)
    if not generation.is_empty(plan) and module.params["act"] and not module.check_mode:
        plan = apply(module, desired)
    module.exit_json(
        changed=not generation.is_empty(plan),
        steps=summary(plan),
        diff=differences(desired, plan) if module._diff else [],
        fresh=fresh,
        seconds=round(time.monotonic() - started, 2),
    )


def apply(module, desired):
    """Applies in a transient unit: it outlives this connection, and systemd puts things back if it is killed."""
    source = {"content": inspect.getsource(generation), "mode": "0644", "owner": "root", "group": "root"}
    if generation.read_file(PROGRAM) != source:
        generation.place(PROGRAM, source)
    generation.RUN.mkdir(exist_ok=True)
    mine = generation.RUN / f"desired-{os.getpid()}.json"
    generation.place(mine, {"content": json.dumps(desired), "mode": "0600", "owner": "root", "group": "root"})
    python, program = "/usr/bin/python3", str(PROGRAM)
    started = generation.run(
        "systemd-run",
        "--quiet",
        "--wait",
        "--collect",
        f"--unit=posthouse-converge-{os.getpid()}",
        f"--property=ExecStopPost={python} {program} recover",
        python,
        program,
        "apply",
        str(mine),
        timeout=3600,
    )
    result = generation.read_json(mine.with_suffix(".result"), None)
    for path in (mine, mine.with_suffix(".result")):
        path.unlink(missing_ok=True)
    if result is None:
        module.fail_json(
            msg="converge was killed on the node; the previous generation was put back; run it again "
            f"({started.stderr.strip()})"
        )
    if "failed" in result:
        module.fail_json(msg=result["failed"], lines=result["lines"])
    return result["plan"]


def summary(plan):
    """The plan without any content, for people and for JSON."""
    return {key: list(value) for key, value in plan.items() if value and key != "unfinished"}


def differences(desired, plan):
    """Ansible's diff of every file that changes. What is not world-readable counts as secret and is masked."""
    found = []
    for path, before in {**plan["write"], **plan["remove"]}.items():
        after = desired["files"].get(path)
        secret = any(side and int(side.get("mode", "0644"), 8) & 0o004 == 0 for side in (before, after))
        found.append(
            {
                "before_header": path,
                "after_header": path,
                "before": text(before, secret, "previous"),
                "after": text(after, secret, "new"),
            }
        )
    return found


def text(side, secret, word):
    if side is None:
        return ""
    access = "".join(f"# {key}: {side[key]}\n" for key in ("link", "mode", "owner", "group") if key in side)
    return access + (f"({word} secret)\n" if secret else side.get("content", ""))


if __name__ == "__main__":
    main()
