"""The lab's name server: knot on the controller's address. It answers for the site, the outside world, and all else."""

from __future__ import annotations

import subprocess
import time

from posthouse.lab import processes
from posthouse.lab.layout import Layout, run
from posthouse.model import Site
from posthouse.secrets import Secrets
from posthouse.zones import zones

_CONFIG = """\
server:
    rundir: {runtime}
    pidfile: {runtime}/knot.pid
    listen: [{address}@53, 127.0.0.1@53]
control:
    listen: {runtime}/knot.sock
log:
  - target: stderr
    any: info
database:
    storage: {state}/knot
template:
  - id: default
    storage: {state}/zones
    zonefile-sync: -1
    journal-content: none
zone:
"""


def start(layout: Layout, site: Site, secrets: Secrets) -> None:
    """Brings the name server and its zones to what the site says; a server that runs stays, and loads what changed."""
    layout.runtime.mkdir(parents=True, exist_ok=True)
    folder = layout.state / "zones"
    folder.mkdir(parents=True, exist_ok=True)
    # The serial goes up with every change and only then: by it knot sees that a zone is to be loaded anew.
    last = layout.state / "serial"
    serial = int(last.read_text()) if last.exists() else 0
    wanted = _files(zones(site, secrets.dkim, serial))
    if wanted != {file.name: file.read_text() for file in folder.iterdir()}:
        serial = int(time.time())
        wanted = _files(zones(site, secrets.dkim, serial))
        for file in folder.iterdir():
            file.unlink()
        for name, text in wanted.items():
            (folder / name).write_text(text)
        last.write_text(str(serial))
    config = _CONFIG.format(runtime=layout.runtime, state=layout.state, address=site.network.controller)
    config += "".join(f'  - domain: "{name.removesuffix(".zone") or "."}"\n    file: "{name}"\n' for name in wanted)
    file = layout.state / "knot.conf"
    file.write_text(config)
    run(["knotc", "--config", str(file), "zone-check"])
    group = layout.services / "dns"
    control = ["knotc", "--timeout", "3", "--socket", str(layout.runtime / "knot.sock")]
    if processes.running(group) and _succeeds([*control, "reload"]):
        return
    processes.end(group)
    # Left by one that was killed; knotd would take whoever has its number now for itself.
    (layout.runtime / "knot.pid").unlink(missing_ok=True)
    server = ["ip", "netns", "exec", layout.namespace, "knotd", "--config", str(file)]
    log = layout.state / "knot.log"
    processes.spawn(group, server, log)
    complaint = f"{layout.lab}: the name server does not start; {log} says why"
    processes.until(lambda: _succeeds([*control, "status"]), 20, complaint)


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _files(texts: dict[str, str]) -> dict[str, str]:
    """Zones by the name of their file; the root's is just `.zone`."""
    return {f"{name.removesuffix('.')}.zone": text for name, text in texts.items()}
