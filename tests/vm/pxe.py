"""A PXE client, as firmware has one: what it asks of the DHCP servers around, and what they answer."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

DISCOVER, REQUEST = 1, 3
KIND, VENDOR, PXE, ARCHITECTURE, IPXE = 53, 60, 43, 93, 175
BIOS, EFI = 0, 7
_COOKIE = b"\x63\x82\x53\x63"
_HEAD = "!BBBBIHH4s4s4s4s16s64s128s"
_FIRST_ITEM = b"\x47\x04\x80\x00\x00\x00\xff"  # the first line of the boot menu that a BIOS was offered


@dataclass(frozen=True)
class Answer:
    """What one server answered: the address that it lends, the file to boot, and options by number."""

    server: str
    address: str
    file: str
    options: dict[int, bytes]


def discover(mac: str, arch: int, ipxe: bool = False) -> dict[str, Answer]:
    """Asks everybody, from the card eth0; the answers that came within two seconds, by server."""
    with _socket() as client:
        client.bind(("", 68))
        client.sendto(_packet(DISCOVER, mac, arch, ipxe), ("255.255.255.255", 67))
        return {answer.server: answer for answer in _answers(client)}


def ask(server: str, own: str, mac: str, arch: int) -> Answer | None:
    """Asks the one that offered to boot it, from its own address: the second step, on a port for that."""
    with _socket() as client:
        client.bind((own, 68))
        client.sendto(_packet(REQUEST, mac, arch, own=own), (server, 4011))
        return next(iter(_answers(client, 1)), None)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return made


def _packet(kind: int, mac: str, arch: int, ipxe: bool = False, own: str = "") -> bytes:
    broadcast, address = (0, socket.inet_aton(own)) if own else (0x8000, bytes(4))
    hardware = bytes.fromhex(mac.replace(":", ""))
    made = struct.pack(
        _HEAD, 1, 1, 6, 0, 0x706F7374, 0, broadcast, address, bytes(4), bytes(4), bytes(4), hardware, b"", b""
    )
    options = {
        KIND: bytes([kind]),
        VENDOR: b"PXEClient:Arch:%05d:UNDI:002001" % arch,
        ARCHITECTURE: struct.pack("!H", arch),
        94: b"\x01\x02\x01",
        97: bytes(17),
        55: bytes([1, 3, 6, 12, 43, 54, 60, 66, 67, 175]),
    }
    if ipxe:
        options |= {77: b"iPXE", IPXE: b"\xb1\x01\x01"}
    if own and arch == BIOS:
        options[PXE] = _FIRST_ITEM
    return made + _COOKIE + b"".join(bytes([n, len(value)]) + value for n, value in options.items()) + b"\xff"


def _answers(client: socket.socket, wanted: int = 9) -> list[Answer]:
    found: list[Answer] = []
    deadline = time.monotonic() + 2
    while len(found) < wanted and (left := deadline - time.monotonic()) > 0:
        client.settimeout(left)
        try:
            data, (server, _) = client.recvfrom(2048)
        except TimeoutError:
            break
        found.append(_read(server, data))
    return found


def _read(server: str, data: bytes) -> Answer:
    options, rest = {}, data[240:]
    while rest and rest[0] != 255:
        length = rest[1] if rest[0] else -1  # zeros are filling
        if rest[0]:
            options[rest[0]] = rest[2 : 2 + length]
        rest = rest[2 + length :]
    file = data[108:236].split(b"\0")[0].decode()
    return Answer(server, socket.inet_ntoa(data[16:20]), file, options)
