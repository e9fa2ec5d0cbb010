"""Commands on a site's nodes, over ssh with the site's own keys. Connections are kept for a minute and shared.

reached = Remote(site)
reached.run("mail1", "systemctl is-active postfix")
reached.each(["mail1", "mail2"], "uptime")       # side by side: {node: what it prints}
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE
from typing import Any

from posthouse import PosthouseError, run
from posthouse.model import Site

SHOWN = 60  # characters of a command in an error
FIX = "its journal (journalctl -e) may say why; then run the command again"


class RemoteError(PosthouseError):
    """A command that failed on a node: `node`, `status` (255: the node cannot be reached) and what it complained of."""

    def __init__(self, node: str, status: int, complaint: str) -> None:
        super().__init__(f"{node}: {complaint}")
        self.node, self.status = node, status


class Remote:
    """The nodes of a site. Make it before any thread is started: for a lab site it enters the lab's network.

    A terminal's Ctrl-C does not reach what was begun on nodes: whoever began it says what is to become of it.
    """

    def __init__(self, site: Site) -> None:
        self.config = str(run.reach(site))

    def run(self, node: str, command: str, text: str | None = None, timeout: float = 120) -> str:
        """What a shell command prints on a node, as root, with `text` as its input. Raises RemoteError.

        timeout: seconds until it is given up. Secrets go by `text`: a command line can be read by anybody.
        """
        try:
            done = subprocess.run(
                ["ssh", "-F", self.config, node, command],
                input=text or "",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise RemoteError(node, 255, f"no answer within {timeout:g} s to {_shown(command)}; {FIX}") from None
        if done.returncode:
            silent = f"exit status {done.returncode}, and no word, of {_shown(command)}; {FIX}"
            raise RemoteError(node, done.returncode, done.stderr.strip() or done.stdout.strip() or silent)
        return done.stdout

    def pipe(self, source: str, command: str, target: str, into: str, timeout: float = 86400) -> None:
        """What a command prints on one node goes to a command on another, through the controller. Raises RemoteError.

        timeout: seconds until it is given up.
        """
        with (
            self._start(source, command, stdin=subprocess.DEVNULL) as giver,
            self._start(target, into, stdin=giver.stdout) as taker,
        ):
            assert giver.stdout
            giver.stdout.close()  # the taker's now: its end is the giver's, too
            try:
                complaints = {target: taker.communicate(timeout=timeout)[1]}
                assert giver.stderr
                complaints[source] = giver.stderr.read()
                giver.wait(timeout=60)
            except subprocess.TimeoutExpired:
                raise RemoteError(source, 255, f"no end within {timeout:g} s of {_shown(command)}; {FIX}") from None
            finally:
                giver.kill()
                taker.kill()
        for name, process in ((source, giver), (target, taker)):
            if process.returncode:
                text = complaints[name].decode(errors="replace").strip()
                raise RemoteError(name, process.returncode, text or f"exit status {process.returncode}; {FIX}")

    def open(self, node: str, command: str) -> subprocess.Popen[str]:
        """A command on a node that is talked to, by its standard input and output."""
        return self._start(node, command, stdin=PIPE, text=True, errors="replace")

    def _start(self, node: str, command: str, **options: Any) -> subprocess.Popen[Any]:
        ssh = ["ssh", "-F", self.config, node, command]
        return subprocess.Popen(ssh, stdout=PIPE, stderr=PIPE, start_new_session=True, **options)

    def each(self, nodes: Iterable[str], command: str, timeout: float = 120) -> dict[str, str]:
        """The same command on several nodes, side by side: {node: what it prints}. Raises the first RemoteError."""
        names = list(nodes)
        if not names:
            return {}
        with ThreadPoolExecutor(len(names)) as pool:
            return dict(zip(names, pool.map(lambda name: self.run(name, command, timeout=timeout), names), strict=True))


def _shown(command: str) -> str:
    """A command as an error shows it: of a script its first line."""
    first, *more = command.strip().splitlines()
    return f"`{first[:SHOWN]}{' …' if more or len(first) > SHOWN else ''}`"
