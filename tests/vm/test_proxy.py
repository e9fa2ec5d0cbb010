"""`dhcp: proxy`: the site's own DHCP server gives addresses, and posthouse says, beside it, what to boot."""

from __future__ import annotations

from collections.abc import Iterator

import pxe
import pytest
from machines import STRANGER, STRANGERS_MAC, console, machine_lab, until

from posthouse import lab
from posthouse.lab import machine, network, processes
from posthouse.lab.layout import NETNS, Layout
from posthouse.lab.machine import Machine
from posthouse.probe.clients import eventually

pytestmark = pytest.mark.vm

NAME, CONTROLLER = "tmp-proxy", "10.77.0.1"
SERVER, CLIENT = "10.77.0.2", "10.77.0.3"  # the site's own DHCP server, and where firmware asks from
NODE, MAC = "box1", "02:70:00:00:02:01"
SITE = f"""\
nodes:
  lb1: {{class: lb}}
  mail1: {{class: mail}}
  {NODE}: {{class: mail, mac: "{MAC}"}}
provision: {{dhcp: proxy}}
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Layout]:
    """A site where dnsmasq with the simplest of settings gives addresses, from a machine of its own."""
    with machine_lab(NAME, SITE) as site:
        layout = Layout(NAME)
        for name, address in (("dhcp", SERVER), ("client", CLIENT)):
            network.plug(layout, name, "eth0", address, 24, CONTROLLER)
        command = ["dnsmasq", "--keep-in-foreground", "--user=root", "--port=0", "--no-ping", "--conf-file=/dev/null"]
        command += ["--dhcp-range=10.77.0.201,10.77.0.210,10m", "--log-facility=-", f"--pid-file={layout.state}/pid"]
        command += [f"--dhcp-leasefile={layout.state}/leases"]
        namespace = f"--net={NETNS / layout.node_namespace('dhcp')}"
        processes.spawn(layout.services / "dhcp", ["nsenter", namespace, *command], layout.state / "dhcp.log")
        lab.provide(site)
        yield layout


def offers(served: Layout, arch: int, ipxe: bool = False) -> dict[str, pxe.Answer]:
    """What both servers offer; firmware asks again, too, while one of them does not answer yet."""

    def both() -> dict[str, pxe.Answer] | None:
        found = pxe.discover(STRANGERS_MAC, arch, ipxe)
        return found if set(found) == {SERVER, CONTROLLER} else None

    with network.inside(served.node_namespace("client")):
        return eventually(both, 60, "an offer from either server")


@pytest.mark.parametrize(("arch", "file"), [(pxe.BIOS, "undionly.kpxe"), (pxe.EFI, "snponly.efi")])
def test_firmware_has_its_address_from_the_site_and_iPXE_from_posthouse(served: Layout, arch: int, file: str):
    found = offers(served, arch)
    assert found[SERVER].address.startswith("10.77.0.20")
    assert found[CONTROLLER].address == "0.0.0.0"
    assert found[CONTROLLER].options[pxe.VENDOR] == b"PXEClient"
    with network.inside(served.node_namespace("client")):
        chosen = pxe.ask(CONTROLLER, CLIENT, STRANGERS_MAC, arch)
    assert chosen
    assert chosen.file == file


def test_iPXE_has_its_script_from_posthouse(served: Layout):
    found = offers(served, pxe.EFI, ipxe=True)
    assert found[CONTROLLER].file == f"http://{CONTROLLER}:8480/boot.ipxe"
    assert found[SERVER].address.startswith("10.77.0.20")


def test_a_UEFI_machine_comes_to_its_menu(served: Layout):
    """Its firmware asks both servers, and so does the iPXE that it is given."""
    hardware = Machine(STRANGERS_MAC, True, 512, ())
    machine.make(served, STRANGER, hardware)
    machine.power_on(served, STRANGER, hardware)
    until(served, STRANGER, lambda: "is no machine of" in console(served, STRANGER))
    leases = (served.state / "leases").read_text()
    assert STRANGERS_MAC in leases
    assert "DHCPOFFER" not in (served.state / "provision.log").read_text()
