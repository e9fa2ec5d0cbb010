"""What a machine meets on the server: from its first boot to the one from its disk, and what it may not do."""

from __future__ import annotations

import asyncio
import io
import json
import re
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from posthouse import provision, secrets, sitefile
from posthouse.provision import records
from posthouse.provision.media import Media
from posthouse.provision.records import Records
from posthouse.provision.server import Server
from posthouse.sitefile import parse

MAC = "52:54:00:ab:00:01"
DISK = {"name": "vda", "type": "disk", "size": 2**40, "model": None, "serial": "V1", "ro": False, "rm": False}


def report(**disk: object) -> str:
    return f"firmware bios\nmemory_kib 8388608\ndisks\n{json.dumps({'blockdevices': [DISK | disk]})}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The server of a site with one machine; its image is a few bytes."""
    folder = tmp_path_factory.mktemp("inventory")
    with pytest.MonkeyPatch.context() as patch:
        for module in (sitefile, secrets):
            patch.setattr(module, "INVENTORY", folder)
        patch.setattr(records, "STATE", folder / "state")
        patch.setattr(records, "LABS", folder / "labs")
        patch.delenv("ANSIBLE_VAULT_PASSWORD_FILE", raising=False)
        text = (Path(__file__).parents[1] / "cases" / "sound.yml").read_text()
        text = text.replace("lb[1:2]: {class: lb}", f'lb1: {{class: lb, mac: "{MAC}"}}')
        (folder / "lab").mkdir()
        (folder / "etc/apt").mkdir(parents=True)
        for name, content in {
            "stream": "image",
            "kernel": "k",
            "initrd": "i",
            "etc/apt/sources.list": "deb x\n",
        }.items():
            (folder / name).write_text(content)
        site = parse(text)
        media = Media(folder, folder / "stream", folder / "kernel", folder / "initrd", {"sha256": "5a"})
        yield Server(site, secrets.ensure(site), {"lb": media}, Records(site))


@pytest.fixture(autouse=True)
def blank(server: Server) -> None:
    """Each test begins with a machine that never booted."""
    for file in server.records.folder.glob("*.json"):
        file.unlink()


def visit(server: Server, visitor: Callable[[TestClient, TestClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with (
            TestClient(TestServer(server.by_http())) as plain,
            TestClient(TestServer(server.by_https())) as trusted,
        ):
            await visitor(plain, trusted)

    asyncio.run(run())


async def boot(plain: TestClient) -> dict[str, str]:
    """Boots; the header that the machine speaks under."""
    script = await (await plain.get(f"/boot/{MAC.replace(':', '-')}")).text()
    token = re.search(r"posthouse.token=(\w+)", script)[1]
    return {"Authorization": f"Bearer {token}"}


def test_from_first_boot_to_its_disk(server: Server) -> None:
    key = secrets._ssh_key("lb1")["public"]

    async def machine(plain: TestClient, trusted: TestClient) -> None:
        bearer = await boot(plain)
        plan = await (await trusted.post("/node/lb1/hardware", data=report(), headers=bearer)).text()
        assert "sfdisk" in plan and "/image/5a" in plan
        assert await (await plain.get("/image/5a")).text() == "image"
        assert (await plain.get("/image/5b")).status == 404
        await trusted.post("/node/lb1/phase", data="streaming the image", headers=bearer)
        # The server may be started anew at any time.
        again = Server(server.site, server.secrets, server.media, Records(server.site))
        async with TestClient(TestServer(again.by_https())) as restarted:
            archive = await (await restarted.get("/node/lb1/identity", headers=bearer)).read()
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            assert files.extractfile("etc/hostname").read() == b"lb1\n"
            assert files.getmember("root/.ssh/authorized_keys").mode == 0o600
            fstab = files.extractfile("etc/fstab").read().decode()
        assert re.search(r"^UUID=\S+ /srv ext4 ", fstab, re.MULTILINE)
        assert (await trusted.post("/node/lb1/installed", data="no key", headers=bearer)).status == 400
        assert (await trusted.post("/node/lb1/installed", data=key, headers=bearer)).status == 200
        # The token is used up: nobody can report another key with it.
        assert (await trusted.post("/node/lb1/installed", data=key, headers=bearer)).status == 403
        assert "starts from its disk" in await (await plain.get(f"/boot/{MAC}")).text()

    visit(server, machine)
    assert secrets.load(server.site).ssh["host_keys"]["lb1"] == {"public": f"{' '.join(key.split()[:2])} lb1.lab.test"}
    row = provision.status(server.site)[0]
    assert (row["phase"], row["attempts"], set(row["seconds"])) == (
        "installed",
        1,
        {"booting", "checking", "streaming"},
    )


def test_a_machine_that_is_installed_anew_is_not_installed_meanwhile(server: Server) -> None:
    with server.records.change("lb1") as record:
        record.finish()
    provision.arm(server.site, "lb1")

    async def machine(plain: TestClient, _: TestClient) -> None:
        await boot(plain)
        assert not server.records.read("lb1").installed

    visit(server, machine)


def test_only_the_token_of_the_last_boot_opens_anything(server: Server) -> None:
    async def machine(plain: TestClient, trusted: TestClient) -> None:
        old = await boot(plain)
        new = await boot(plain)
        for header in ({}, old, {"Authorization": "Bearer "}):
            for path in ("hardware", "phase", "installed", "failed"):
                assert (await trusted.post(f"/node/lb1/{path}", data=report(), headers=header)).status == 403
            assert (await trusted.get("/node/lb1/identity", headers=header)).status == 403
        assert (await trusted.post("/node/mail1/hardware", data=report(), headers=new)).status == 403
        assert (await trusted.post("/node/lb1/hardware", data=report(), headers=new)).status == 200

    visit(server, machine)


def test_a_disk_with_something_on_it_is_refused_until_the_operator_says_otherwise(server: Server) -> None:
    async def machine(plain: TestClient, trusted: TestClient) -> None:
        used = report(pttype="gpt")
        answer = await trusted.post("/node/lb1/hardware", data=used, headers=await boot(plain))
        assert (answer.status, "provision reinstall lb1" in await answer.text()) == (409, True)
        assert server.records.read("lb1").phase == "refused"
        # It is booted as often as one likes: only the operator's word counts.
        assert (await trusted.post("/node/lb1/hardware", data=used, headers=await boot(plain))).status == 409
        assert "vda (1024.0 GiB, serial V1)" in provision.target(server.site, "lb1")
        provision.arm(server.site, "lb1")
        # Somebody put another disk in: that one was not named.
        other = report(serial="V2", pttype="gpt")
        assert (await trusted.post("/node/lb1/hardware", data=other, headers=await boot(plain))).status == 409
        assert (await trusted.post("/node/lb1/hardware", data=other, headers=await boot(plain))).status == 409
        assert "serial V2" in provision.target(server.site, "lb1")
        provision.arm(server.site, "lb1")
        assert (await trusted.post("/node/lb1/hardware", data=other, headers=await boot(plain))).status == 200

    visit(server, machine)


def test_an_installation_that_was_cut_short_may_go_over_its_own_traces(server: Server) -> None:
    async def machine(plain: TestClient, trusted: TestClient) -> None:
        assert (await trusted.post("/node/lb1/hardware", data=report(), headers=await boot(plain))).status == 200
        half = report(name="vdb", pttype="gpt")
        assert (await trusted.post("/node/lb1/hardware", data=half, headers=await boot(plain))).status == 200
        another = report(serial="V2", pttype="gpt")
        assert (await trusted.post("/node/lb1/hardware", data=another, headers=await boot(plain))).status == 409

    visit(server, machine)


@pytest.mark.parametrize("mac", ["02-00-00-00-00-01", "nonsense", "..%2f..%2fetc%2fpasswd"])
def test_a_machine_that_is_no_node_gets_the_menu_and_leaves_no_record(server: Server, mac: str) -> None:
    async def stranger(plain: TestClient, _: TestClient) -> None:
        script = await (await plain.get(f"/boot/{mac}")).text()
        assert "menu" in script and "kernel" not in script

    visit(server, stranger)
    assert not list(server.records.folder.glob("*.json"))


def test_the_status_and_the_menu_say_of_a_stranger_whose_it_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "foreign", {"02:00:00:00:00:07": ("corp", "mail7")})
    (server.records.folder / "strangers").unlink(missing_ok=True)

    async def strangers(plain: TestClient, _: TestClient) -> None:
        script = await (await plain.get("/boot/02-00-00-00-00-07")).text()
        assert "mail7 of the site corp, no machine of the site lab" in script
        for number in range(records.STRANGERS):
            await plain.get(f"/boot/02-00-00-00-01-{number:02x}")
        assert "02:00:00:00:00:07" not in server.records.strangers()  # the last ones are kept
        await plain.get("/boot/02-00-00-00-00-07")

    visit(server, strangers)
    first, *_, last = provision.status(server.site)
    assert (first["node"], first["phase"]) == ("lb1", "waiting")
    assert (last["node"], last["mac"], last["phase"]) == (None, "02:00:00:00:00:07", "no node")
    assert last["reason"].startswith("it is mail7 of the site corp")


def test_first_contact_waits_for_what_the_machine_reports(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision.contact, "wait", lambda *_: 1.0)
    with pytest.raises(provision.ProvisionError, match="lb1: it went no further than: waiting"):
        provision.reach(server.site, "lb1", 60, lambda: False)
    with server.records.change("lb1") as record:
        record.enter("refused", "it has no disk at all")
    with pytest.raises(provision.ProvisionError, match="lb1: it has no disk at all"):
        provision.reach(server.site, "lb1", 60)
    with server.records.change("lb1") as record:
        record.finish()
    provision.reach(server.site, "lb1", 60)
    assert server.records.read("lb1").phase == "reached"
