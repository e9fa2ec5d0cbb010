# GNU General Public License v3.0+ (https://www.gnu.org/licenses/gpl-3.0.txt)
"""One line per node as it finishes, the differences where asked for, and the whole as JSON for `deploy --json`."""

from __future__ import annotations

DOCUMENTATION = """
name: converge
type: stdout
short_description: One line per node
description: Prints one line per node and task, and writes a report as JSON if asked to.
options:
  report:
    description: Where to write the report.
    env: [{name: POSTHOUSE_REPORT}]
    ini: [{section: callback_converge, key: report}]
    type: path
"""

import json
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

WORDS = {
    "packages": "installed",
    "write": "wrote",
    "remove": "removed",
    "start": "started",
    "stop": "stopped",
    "restart": "restarted",
    "reload": "reloaded",
    "unhealthy": "unhealthy",
    "did": "did",
}


class CallbackModule(CallbackBase):
    """Prints what happened to each node."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "converge"

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, dict[str, Any]] = {}

    def _note(self, result: Any, word: str, text: str, color: str, ok: bool) -> None:
        node, data = result.host.get_name(), result.result
        steps = _steps(data)
        entry = self.nodes.setdefault(node, {"ok": True, "changed": False, "restarted": [], "seconds": 0.0})
        entry["ok"] &= ok
        entry["changed"] |= bool(data.get("changed"))
        entry["restarted"] += steps.get("restart", [])
        entry["seconds"] = round(entry["seconds"] + data.get("seconds", 0), 2)
        if not ok:
            entry["error"] = text
        self._display.display(f"{node:<10} {word:<9} {text}", color=color)
        for line in data.get("lines") or []:
            self._display.display(f"{'':<10} | {line}")

    def v2_runner_on_ok(self, result: Any) -> None:
        data = result.result
        steps = _steps(data)
        parts = [f"{word} {_list(steps[key])}" for key, word in WORDS.items() if steps.get(key)]
        seconds = f" ({data['seconds']} s)" if "seconds" in data else ""
        changed = data.get("changed", False)
        self._note(
            result, "changed" if changed else "ok", "; ".join(parts) + seconds, "yellow" if changed else "green", True
        )

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._note(result, "failed", str(result.result.get("msg", "no reason given")), "red", False)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        text = " ".join(str(result.result.get("msg", "")).split())
        self._note(result, "unreachable", text, "red", False)

    def v2_on_file_diff(self, result: Any) -> None:
        if result.result.get("diff") and result.result.get("changed"):
            self._display.display(self._get_diff(result.result["diff"]))

    def v2_playbook_on_stats(self, stats: Any) -> None:
        report = self.get_option("report")
        if report:
            Path(report).write_text(json.dumps({"nodes": self.nodes}))


def _steps(data: dict[str, Any]) -> dict[str, list[Any]]:
    """The steps by kind, as converge gives them; other modules give a list of sentences."""
    steps = data.get("steps") or {}
    return steps if isinstance(steps, dict) else {"did": steps}


def _list(items: list[Any]) -> str:
    shown = [str(item).removesuffix(".service") for item in items[:4]]
    return ", ".join(shown) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
