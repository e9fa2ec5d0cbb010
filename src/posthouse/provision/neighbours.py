"""Answers iPXE's question for an IPv6 router: there is none here.

Unanswered, iPXE asks for 13 seconds, at every boot, before it goes on with the address that it long has. The answer
names no router and no prefix, and goes to the one that asked, so it changes nothing for anybody.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Collection

import psutil
from netaddr import EUI, mac_bare

log = logging.getLogger(__name__)

_IPV6, _ICMPV6 = 0x86DD, 58
_SOLICITATION, _ADVERTISEMENT = 133, 134
_HEADERS = 14 + 40  # Ethernet's and IPv6's


def listen(address: str, macs: Collection[str]) -> None:
    """From now on answers these machines, in the running loop, on the interface that has the address."""
    interface, found = next(
        (name, found)
        for name, found in psutil.net_if_addrs().items()
        if any(entry.address == address for entry in found)
    )
    own = _raw(next(entry.address for entry in found if entry.family == psutil.AF_LINK))
    listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_IPV6))
    listening.bind((interface, _IPV6))
    listening.setblocking(False)
    known = {_raw(mac) for mac in macs}

    def heard() -> None:
        frame = listening.recv(2048)
        if frame[6:12] in known and (reply := answer(frame, own)):
            try:
                listening.send(reply)
            except OSError as error:
                log.warning("%s: an answer to iPXE could not be sent: %s", interface, error.strerror)

    asyncio.get_running_loop().add_reader(listening, heard)


def answer(frame: bytes, own: bytes) -> bytes | None:
    """The frame that answers a router solicitation; None for anything else."""
    if len(frame) <= _HEADERS or frame[20] != _ICMPV6 or frame[_HEADERS] != _SOLICITATION:
        return None
    asker, source = frame[22:38], bytes([0xFE, 0x80, *bytes(6), own[0] ^ 2, *own[1:3], 0xFF, 0xFE, *own[3:]])
    # No hop limit, no flags, a lifetime of 0: not a router, and nothing is to be asked by DHCPv6.
    message = struct.pack("!BBHBBHII", _ADVERTISEMENT, 0, 0, 0, 0, 0, 0, 0)
    checked = source + asker + struct.pack("!II", len(message), _ICMPV6) + message
    total = sum(struct.unpack(f"!{len(checked) // 2}H", checked))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    message = message[:2] + struct.pack("!H", checksum) + message[4:]
    header = struct.pack("!IHBB", 6 << 28, len(message), _ICMPV6, 255) + source + asker
    return frame[6:12] + own + struct.pack("!H", _IPV6) + header + message


def _raw(mac: str) -> bytes:
    return bytes.fromhex(str(EUI(mac, dialect=mac_bare)))
