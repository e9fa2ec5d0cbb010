"""The server that machines boot from: boot files and images by HTTP, and what concerns one machine by HTTPS.

by HTTP    /boot.ipxe → /boot/MAC, /kernel/CLASS, /initrd/CLASS, /start/CLASS, /image/SHA256, /ca.pem
           and for the distributions' installers /answers/FILE, /debian-installer/FILE
by HTTPS   /node/NODE/{hardware,phase,identity,installed,failed}, under the token that the boot script carried

What goes by HTTP is no secret; the image is checked by its digest, which comes by HTTPS. The boot script pins the CA.
The firmware's own part of the way (DHCP, TFTP, iPXE) is as trustworthy as the network it goes through, and no more.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

from aiohttp import web
from netaddr import EUI, AddrFormatError, mac_unix_expanded

from posthouse import image
from posthouse import secrets as vault
from posthouse.machines import SOURCES
from posthouse.model import Node, Site
from posthouse.provision import bootfiles, debian_installer, disks, identity
from posthouse.provision.media import Media
from posthouse.provision.records import Records
from posthouse.secrets import Secrets

log = logging.getLogger(__name__)

PHASES = {
    "dividing the disk": "dividing",
    "streaming the image": "streaming",
    "writing its identity": "identity",
    "installing the boot loader": "boot loader",
    "running the installer": "installing",
}
_REPORT_BYTES = 1 << 18


@dataclass
class Server:
    """What is served of one site."""

    site: Site
    secrets: Secrets
    media: dict[str, Media]
    records: Records
    foreign: dict[str, tuple[str, str]] = field(default_factory=dict)  # machines of other sites, by MAC: (site, node)

    def __post_init__(self) -> None:
        self.by_mac = {node.mac: node for node in self.site.nodes.values() if node.mac}

    def by_http(self) -> web.Application:
        """The application for what is no secret."""
        app = web.Application()
        app.router.add_get("/boot.ipxe", self.first)
        app.router.add_get("/boot/{mac}", self.boot)
        app.router.add_get("/ca.pem", self.authority)
        app.router.add_get("/{kind:kernel|initrd|start}/{class}", self.environment)
        app.router.add_get("/image/{sha256}", self.image)
        app.router.add_get("/answers/{file}", self.answers)
        app.router.add_get("/debian-installer/{file}", self.debian_installer)
        return app

    def by_https(self) -> web.Application:
        """The application for machines with a token."""
        app = web.Application(client_max_size=_REPORT_BYTES, middlewares=[self.admitted])
        app.router.add_post("/node/{node}/hardware", self.hardware)
        app.router.add_post("/node/{node}/phase", self.phase)
        app.router.add_get("/node/{node}/identity", self.identity)
        app.router.add_post("/node/{node}/installed", self.installed)
        app.router.add_post("/node/{node}/failed", self.failed)
        return app

    # --- by HTTP

    async def first(self, request: web.Request) -> web.Response:
        """The script for every machine: it asks for its own."""
        return web.Response(text=bootfiles.first_script(self.site))

    async def boot(self, request: web.Request) -> web.Response:
        """A machine's own boot script: to install it, or to start it from its disk."""
        asked = request.match_info["mac"]
        mac = _unix(asked)
        node = self.by_mac.get(mac)
        if not node:
            whose = "{1} of the site {0}".format(*self.foreign[mac]) if mac in self.foreign else ""
            if mac:
                self.records.note_stranger(mac, whose)
            log.info("%s is %s: it gets the menu", asked, whose or "no node's")
            return web.Response(text=bootfiles.menu_script(self.site, asked, whose))
        method = self.site.classes[node.klass].install.method
        with self.records.change(node.name) as record:
            if record.installed and not record.armed and method != "diskless":
                log.info("%s: starts from its disk", node.name)
                return web.Response(text=bootfiles.local_script(self.site, node))
            token = record.admit()
        log.info("%s: boots to be installed", node.name)
        return web.Response(text=bootfiles.boot_script(self.site, node, self.secrets, token))

    async def authority(self, request: web.Request) -> web.Response:
        """The site's CA certificate; machines compare it with the digest in their boot script."""
        return web.Response(text=self.secrets.ca_cert)

    async def environment(self, request: web.Request) -> web.StreamResponse:
        """Kernel and initramfs of a class, and what starts a UEFI machine's disk."""
        media = self.media.get(request.match_info["class"])
        if not media:
            raise web.HTTPNotFound
        return web.FileResponse(getattr(media, request.match_info["kind"]))

    async def image(self, request: web.Request) -> web.StreamResponse:
        """An image by its digest. The kernel copies it from file to socket: it takes no memory of ours."""
        for media in self.media.values():
            if media.sha256 == request.match_info["sha256"]:
                return web.FileResponse(media.stream, chunk_size=1 << 18)
        raise web.HTTPNotFound

    async def answers(self, request: web.Request) -> web.Response:
        """What the installer of a distribution would ask."""
        file = request.match_info["file"]
        # Node names have no dots, and firmwares no hyphens.
        node = self.site.nodes.get(file.rpartition(".")[0].removesuffix("-efi").removesuffix("-pcbios"))
        made = bootfiles.answers(self.site, node, self.secrets) if node else {}
        if file not in made:
            raise web.HTTPNotFound
        log.info("%s: its installer has %s", node.name if node else "", file)
        return web.Response(text=made[file])

    async def debian_installer(self, request: web.Request) -> web.StreamResponse:
        """Kernel and initrd of Debian's installer."""
        file = request.match_info["file"]
        if file not in debian_installer.FILES:
            raise web.HTTPNotFound
        return web.FileResponse(debian_installer.FOLDER / file)

    # --- by HTTPS

    @web.middleware
    async def admitted(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Lets in whoever has the token of the machine that it speaks for."""
        node = self.site.nodes.get(request.match_info.get("node", ""))
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not node or not node.mac or not self.records.read(node.name).knows(token):
            raise web.HTTPForbidden(text="this token is not the one of the machine's last boot")
        return await handler(request)

    async def hardware(self, request: web.Request) -> web.Response:
        """What a machine has → what it is to do, or why it is to do nothing."""
        node = self._speaker(request)
        report = await request.text()
        install = self.site.classes[node.klass].install
        with self.records.change(node.name) as record:
            record.enter("checking")
            try:
                found = disks.hardware(report)
                least = self.site.least_disk_gib(node.klass)
                allowed = record.disks if record.begun or record.armed else []
                if install.method == "diskless":
                    layout, chosen = disks.diskless(install, least, found, allowed, record.armed)
                else:
                    chosen = disks.choose(install, least, found, allowed, record.armed)
                    layout = disks.layout(install, chosen)
            except disks.Refused as refusal:
                reason = str(refusal).replace("NODE", node.name)
                record.enter("refused", reason)
                if refusal.disks:
                    # These are what the operator is asked about next; what was said of others does not go for them.
                    record.disks = [disk.record() for disk in refusal.disks]
                    record.begun = record.armed = False
                log.warning("%s: refused: %s", node.name, reason)
                return web.Response(status=409, text=reason)
            record.begun, record.disks = True, [disk.record() for disk in chosen]
            record.layout = asdict(layout)
        log.info("%s: to be written: %s", node.name, ", ".join(map(str, chosen)))
        if install.method in SOURCES:
            return web.Response(text=" ".join(layout.boot_disks))
        sha256 = self.media[node.klass].sha256
        plan = bootfiles.render(
            "installer/plan.sh.j2",
            node=node,
            layout=layout,
            image_url=f"{bootfiles.plain(self.site)}/image/{sha256}",
            image_sha256=sha256,
        )
        return web.Response(text=plan)

    async def phase(self, request: web.Request) -> web.Response:
        """A machine says what it does now."""
        said = await request.text()
        if said not in PHASES:
            raise web.HTTPBadRequest(text=f"the phases are {', '.join(PHASES)}")
        with self.records.change(self._speaker(request).name) as record:
            record.enter(PHASES[said])
        log.info("%s: %s", self._speaker(request).name, said)
        return web.Response()

    async def identity(self, request: web.Request) -> web.Response:
        """What makes the machine this node."""
        node = self._speaker(request)
        layout = None
        if self.site.classes[node.klass].install.method in SOURCES:
            mirror = await asyncio.to_thread(image.mirror)
            sources = "".join(f"{line}\n" for line in mirror.sources)
        else:
            layout = disks.Layout(**self.records.read(node.name).layout)
            sources = (self.media[node.klass].tree / "etc/apt/sources.list").read_text()
        made = identity.files(self.site, node, layout, self.secrets.ssh["public"], sources)
        return web.Response(body=identity.stream(made))

    async def installed(self, request: web.Request) -> web.Response:
        """The machine is done, and this is the host key that it made for itself."""
        node = self._speaker(request)
        key = (await request.text()).strip()
        try:
            await asyncio.to_thread(vault.note_host_key, self.site, node, key)
        except vault.SecretsError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        with self.records.change(node.name) as record:
            record.finish()
        log.info("%s: installed; its host key is noted", node.name)
        return web.Response()

    async def failed(self, request: web.Request) -> web.Response:
        """The machine gave up."""
        reason = (await request.text())[:500]
        with self.records.change(self._speaker(request).name) as record:
            record.enter("failed", reason)
        log.warning("%s: failed: %s", self._speaker(request).name, reason)
        return web.Response()

    def _speaker(self, request: web.Request) -> Node:
        """The node for which a request came in that was admitted."""
        return self.site.nodes[request.match_info["node"]]


def _unix(mac: str) -> str:
    """A MAC address as site files have it; nothing if it is none."""
    try:
        return str(EUI(mac, dialect=mac_unix_expanded))
    except (AddrFormatError, ValueError):
        return ""


async def run(server: Server, addresses: str) -> tuple[web.AppRunner, web.AppRunner]:
    """Begins to serve on an address; returns what has to be cleaned up in the end."""
    runners = []
    site = server.site
    context = tls(site, server.secrets)
    for app, port, guard in (
        (server.by_http(), site.provision.http_port, None),
        (server.by_https(), site.provision.https_port, context),
    ):
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, addresses, port, ssl_context=guard).start()
        runners.append(runner)
    return runners[0], runners[1]


def tls(site: Site, secrets: Secrets) -> ssl.SSLContext:
    """The server's side of TLS, with a certificate for the controller's address that is made for this run."""
    certificate, key = secrets.for_address(str(site.network.controller))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The library reads files only.
    with tempfile.NamedTemporaryFile("w", prefix="posthouse-tls-") as file:
        file.write(key + certificate)
        file.flush()
        context.load_cert_chain(file.name)
    return context
