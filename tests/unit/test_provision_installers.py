"""What a distribution's installer meets on the server: scripts, answers, the choice of its disks, its last report."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from posthouse import secrets, sitefile
from posthouse.provision import ProvisionError, bench, bootfiles, debian_installer, disks, records
from posthouse.provision.records import Records
from posthouse.provision.server import Server
from posthouse.sitefile import parse

MAC = "52:54:00:ab:00:01"
REPORT = """firmware efi
memory_kib 8388608
disks
{"blockdevices": [
{"name": "sda", "type": "disk", "size": 600000000000, "model": "PERC H750", "serial": "1", "ro": false, "rm": false}
]}
"""


@pytest.fixture
def server(sound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server of a site whose balancers are installed by Debian's installer."""
    for module in (sitefile, secrets):
        monkeypatch.setattr(module, "INVENTORY", tmp_path)
    monkeypatch.setattr(records, "STATE", tmp_path / "state")
    monkeypatch.setattr(records, "LABS", tmp_path / "labs")
    monkeypatch.delenv("ANSIBLE_VAULT_PASSWORD_FILE", raising=False)
    text = sound.replace("lb[1:2]: {class: lb}", f'lb1: {{class: lb, mac: "{MAC}"}}')
    text += 'classes: {lb: {install: {method: preseed, source: "http://mirror.lab.test/debian"}}}\n'
    (tmp_path / "lab").mkdir()
    site = parse(text)
    return Server(site, secrets.ensure(site), {}, Records(site))


def visit(server: Server, visitor: Callable[[TestClient, TestClient], Awaitable[None]]) -> None:
    """Runs a visitor with a client for what is plain and one for what needs a token."""

    async def run() -> None:
        async with (
            TestClient(TestServer(server.by_http())) as plain,
            TestClient(TestServer(server.by_https())) as trusted,
        ):
            await visitor(plain, trusted)

    asyncio.run(run())


async def token(plain: TestClient) -> str:
    script = await (await plain.get(f"/boot/{MAC.replace(':', '-')}")).text()
    return re.search(r"posthouse\.token=(\w+)", script)[1]


def test_the_server_chooses_the_disk_and_hears_of_the_end(server: Server) -> None:
    key = secrets._ssh_key("lb1")["public"]

    async def machine(plain: TestClient, trusted: TestClient) -> None:
        script = await (await plain.get(f"/boot/{MAC}")).text()
        assert "/answers/lb1-${platform}.preseed" in script
        bearer = {"Authorization": f"Bearer {await token(plain)}"}
        answer = await trusted.post("/node/lb1/hardware", data=REPORT, headers=bearer)
        assert (answer.status, await answer.text()) == (200, "/dev/sda")
        assert (await trusted.post("/node/lb1/phase", data="running the installer", headers=bearer)).status == 200
        assert server.records.read("lb1").phase == "installing"
        assert (await trusted.post("/node/lb1/installed", data=key, headers=bearer)).status == 200
        assert "starts from its disk" in await (await plain.get(f"/boot/{MAC}")).text()

    visit(server, machine)
    assert server.records.read("lb1").installed
    assert secrets.load(server.site).ssh["host_keys"]["lb1"]["public"].split()[1] == key.split()[1]


def test_a_disk_that_does_not_fit_ends_it(server: Server) -> None:
    async def machine(plain: TestClient, trusted: TestClient) -> None:
        bearer = {"Authorization": f"Bearer {await token(plain)}"}
        small = REPORT.replace("600000000000", "6000000000")
        answer = await trusted.post("/node/lb1/hardware", data=small, headers=bearer)
        assert answer.status == 409
        assert "no disks fit its class's rule" in await answer.text()

    visit(server, machine)
    assert server.records.read("lb1").phase == "refused"


def test_answers_are_for_machines_with_an_installer(server: Server) -> None:
    async def anybody(plain: TestClient, trusted: TestClient) -> None:
        for file in ("lb1-efi.preseed", "lb1-pcbios.preseed", "lb1.sh"):
            answer = await plain.get(f"/answers/{file}")
            assert (answer.status, await answer.text()) == (
                200,
                bootfiles.answers(server.site, server.site.nodes["lb1"], server.secrets)[file],
            )
        for file in ("mail1-efi.preseed", "lb1.preseed", "lb1-efi.ks", "nobody.sh", "..%2f..%2fetc%2fpasswd"):
            assert (await plain.get(f"/answers/{file}")).status == 404, file
        assert (await plain.get("/debian-installer/..%2fsecrets.yml")).status == 404
        assert (await trusted.post("/node/lb1/hardware", data=REPORT)).status == 403

    visit(server, anybody)


def test_the_installers_shell_reports_disks_as_lsblk_does(server: Server, tmp_path: Path) -> None:
    """In whatever shell and on whatever machine this runs; there may be no disk here, but what is said can be read."""
    script = tmp_path / "lb1.sh"
    script.write_text(bootfiles.answers(server.site, server.site.nodes["lb1"], server.secrets)["lb1.sh"])
    udev = r"ID_MODEL_ENC=A\x20\"disk\"\nID_SERIAL_SHORT=S1\nID_PART_TABLE_TYPE=gpt"
    program = f"udevadm() {{ printf '%s\\n' '{udev}' | sed 's/\\\\n/\\n/g'; }}; . {script}; disks"
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True)
    found = disks.hardware(f"firmware bios\nmemory_kib 1024\ndisks\n{done.stdout}")
    assert all((disk.model, disk.serial, disk.holds) == ("A disk", "S1", "gpt") for disk in found.disks)


def test_there_is_no_image_to_measure(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_installer, "make", lambda: None)
    with pytest.raises(ProvisionError, match="there is no image to serve"):
        bench.bench(server.site)
