"""`posthouse bench provision`: how large, and how fast.

What machines took is read from their records. Serving is measured here, with simulated clients: each asks for the boot
script and reads the beginning of a real image, as a machine does, and throws it away. So the figure is the server's,
and not a disk's or an emulator's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from posthouse import image, lab, secrets
from posthouse.model import Site
from posthouse.provision import ProvisionError, prepare, server, status
from posthouse.provision.media import Media
from posthouse.provision.records import Records

CLIENTS = (1, 10, 50)
SHARE_MIB = 64  # of the image that each client reads: enough for a rate, and 50 of them end within the minute


def bench(site: Site) -> dict[str, Any]:
    """{"image": sizes, "serving": [{"clients", "seconds", "mib_s", "memory_mib"}], "machines", "containers"}."""
    made = prepare(site)
    if not made:
        raise ProvisionError(
            f"{site.name}: installers install all of its machines, so there is no image to serve; "
            "name a site in which a class with machines has `method: image`"
        )
    media = next(iter(made.values()))
    return {
        "image": {
            "class": next(iter(made)),
            "stream_mib": _mib(media.manifest["bytes"]),
            "tree_mib": _mib(media.manifest["unpacked"]),
            "environment_mib": _mib(media.initrd.stat().st_size + media.kernel.stat().st_size),
        },
        "serving": [_serving(site, media, clients) for clients in CLIENTS],
        "machines": {row["node"]: row["seconds"] for row in status(site) if row["seconds"]},
        "containers": _containers(site) if site.lab else None,
    }


def _mib(count: int) -> float:
    return round(count / 2**20, 1)


def _serving(site: Site, media: Media, clients: int) -> dict[str, Any]:
    """Serves a number of clients at once, from a process of its own, whose memory is what is reported."""
    with tempfile.TemporaryDirectory(prefix="posthouse-bench-") as folder:
        share = Path(folder) / "share"
        with media.stream.open("rb") as source:
            share.write_bytes(source.read(SHARE_MIB << 20))
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        child = context.Process(target=_server, args=(site, media, share, there))
        child.start()
        port = here.recv()
        begun = time.monotonic()
        read = asyncio.run(_clients(port, clients, media.sha256))
        seconds = time.monotonic() - begun
        here.send("stop")
        memory = here.recv()
        child.join()
    return {
        "clients": clients,
        "seconds": round(seconds, 2),
        "mib_s": round(read / 2**20 / seconds),
        "memory_mib": round(memory / 1024, 1),
    }


def _server(site: Site, media: Media, share: Path, pipe: Any) -> None:
    """The real server's HTTP side, on a free port of loopback, over the beginning of the real image."""

    async def run() -> None:
        made = {node.klass: Media(media.tree, share, media.kernel, media.initrd, media.manifest) for node in machines}
        serving = server.Server(site, secrets.placeholders(site), made, Records(site))
        runner = web.AppRunner(serving.by_http(), access_log=None, shutdown_timeout=1)
        await runner.setup()
        listening = web.TCPSite(runner, "127.0.0.1", 0)
        await listening.start()
        pipe.send(runner.addresses[0][1])
        await asyncio.to_thread(pipe.recv)
        await runner.cleanup()

    machines = [node for node in site.nodes.values() if node.mac]
    asyncio.run(run())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


async def _clients(port: int, count: int, sha256: str) -> int:
    """Clients at the same time; returns how many bytes they read in all."""

    async def one(session: aiohttp.ClientSession) -> int:
        total = 0
        for path in ("boot.ipxe", f"image/{sha256}"):
            async with session.get(f"http://127.0.0.1:{port}/{path}") as answer:
                answer.raise_for_status()
                async for part in answer.content.iter_chunked(1 << 18):
                    total += len(part)
        return total

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return sum(await asyncio.gather(*(one(session) for _ in range(count))))


def _containers(site: Site) -> dict[str, Any]:
    """Seconds until all nodes of the site take ssh as new containers, in a lab of their own."""
    copy = site.model_copy(update={"name": "tmp-bench"})
    image.build_all(copy)
    begun = time.monotonic()
    try:
        lab.up(copy, secrets.placeholders(copy))
        return {"nodes": len(copy.nodes), "seconds": round(time.monotonic() - begun, 1)}
    finally:
        lab.down(copy.name)
