"""dnsmasq for provisioning: addresses (or only the boot file, beside another DHCP server), and first stages by TFTP."""

from __future__ import annotations

import shutil
from pathlib import Path

from posthouse.model import Site
from posthouse.provision import records

# iPXE for firmware that brings none: BIOS, and UEFI (which then uses the firmware's own network driver).
FIRST_STAGES = {"undionly.kpxe": Path("/usr/lib/ipxe/undionly.kpxe"), "snponly.efi": Path("/usr/lib/ipxe/snponly.efi")}


def config(site: Site, folder: Path) -> str:
    """dnsmasq's configuration. folder: where leases and TFTP's files are."""
    network, provision = site.network, site.provision
    netmask = network.cidr.netmask
    script = f"http://{network.controller}:{provision.http_port}/boot.ipxe"
    lines = [
        "port=0",  # no DNS
        f"listen-address={network.controller}",
        "bind-interfaces",
        "log-dhcp",
        "log-facility=-",
        f"dhcp-leasefile={folder}/leases",
        "enable-tftp",
        f"tftp-root={folder}/tftp",
        # Firmware asks for the first stage, iPXE for the script. Debian's installer asks too, and takes a URL for its
        # preseed file: so only iPXE is told one.
        "dhcp-match=set:ipxe,175",
        *(f"dhcp-match=set:efi,option:client-arch,{arch}" for arch in (7, 9)),
    ]
    if provision.dhcp == "proxy":
        lines += [
            f"dhcp-range={network.cidr.network},proxy,{netmask}",
            "pxe-service=tag:!ipxe,x86PC,posthouse,undionly.kpxe",
            "pxe-service=tag:!ipxe,X86-64_EFI,posthouse,snponly.efi",
            "pxe-service=tag:!ipxe,BC_EFI,posthouse,snponly.efi",
            f"dhcp-boot=tag:ipxe,{script}",
        ]
        return "".join(f"{line}\n" for line in lines)
    lines += [
        "dhcp-authoritative",
        f"dhcp-range={network.cidr.network},static,{netmask}",
        *([f"dhcp-range={provision.guests[0]},{provision.guests[-1]},{netmask},10m"] if provision.guests else []),
        *(f"dhcp-host={node.mac},{node.address},{node.name}" for node in site.nodes.values() if node.mac),
        f"dhcp-option=option:router,{network.gateway or network.controller}",
        f"dhcp-option=option:dns-server,{','.join(map(str, network.resolvers))}",
        # "No proxy": otherwise iPXE waits for another server's offer of a boot file, and none will come.
        "dhcp-option=tag:ipxe,encap:175,176,1b",
        f"dhcp-boot=tag:ipxe,{script}",
        "dhcp-boot=tag:!ipxe,tag:efi,snponly.efi",
        "dhcp-boot=tag:!ipxe,tag:!efi,undionly.kpxe",
    ]
    return "".join(f"{line}\n" for line in lines)


def prepare(site: Site) -> list[str]:
    """Writes what dnsmasq reads; returns its command, which stays in the foreground."""
    folder = records.folder(site) / "dhcp"
    (folder / "tftp").mkdir(parents=True, exist_ok=True)
    for name, source in FIRST_STAGES.items():
        shutil.copyfile(source, folder / "tftp" / name)
    file = folder / "dnsmasq.conf"
    file.write_text(config(site, folder))
    return ["dnsmasq", "--keep-in-foreground", "--user=root", f"--conf-file={file}"]
