"""What the controller serves to nodes that have no way out: virus signatures on port 80, Debian packages on 3142."""

from __future__ import annotations

import json
import socket
import sys

from posthouse import image
from posthouse.lab import network, processes, server
from posthouse.lab.layout import Layout

# ClamAV's extended format: name, any kind of file, any offset, and the test string of eicar.org in hexadecimal.
SIGNATURES = (
    "Eicar-Test-Signature:0:*:58354f2150254041505b345c505a58353428505e2937434329377d24"
    "45494341522d5354414e444152442d414e544956495255532d544553542d46494c452124482b482a\n"
)


def start(layout: Layout, address: str) -> None:
    """Starts the server on the controller's address, unless it runs."""
    folder = layout.state / "updates"
    (folder / "clamav").mkdir(parents=True, exist_ok=True)
    signatures = folder / "clamav" / "lab.ndb"
    if not signatures.exists():
        signatures.write_text(SIGNATURES)
    group = layout.services / "updates"
    if processes.running(group):
        return
    processes.end(group)
    source = image.mirror()
    # A node says http, whatever the mirror speaks: it has no certificates for what this machine may have in between.
    mirrors = {uri.replace("https://", "http://"): uri for uri in (line.split()[2] for line in source.sources)}
    proxies = {
        scheme: option.split('"')[1]
        for option in source.options
        for scheme in ("http", "https")
        if option.startswith(f"Acquire::{scheme}::Proxy ") and '"DIRECT"' not in option
    }
    with network.inside(layout.namespace):
        listeners = [socket.create_server((address, port)) for port in (80, 3142)]
    descriptors = [listener.fileno() for listener in listeners]
    arguments = [str(folder), json.dumps(mirrors), json.dumps(proxies), *map(str, descriptors)]
    processes.spawn(
        group, [sys.executable, "-I", server.__file__, *arguments], layout.state / "updates.log", fds=descriptors
    )
    for listener in listeners:
        listener.close()
