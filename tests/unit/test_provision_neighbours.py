"""What iPXE is answered when it asks for an IPv6 router, byte by byte."""

import struct

from posthouse.provision.neighbours import answer

OWN = bytes.fromhex("02770a4d0001")
ASKER = bytes.fromhex("027000000003")
SOURCE = bytes.fromhex("fe80000000000000007000fffe000003")
ALL_ROUTERS = bytes.fromhex("ff020000000000000000000000000002")


def frame(kind: int, protocol: int = 58) -> bytes:
    message = struct.pack("!BBHI", kind, 0, 0, 0)
    header = struct.pack("!IHBB", 6 << 28, len(message), protocol, 255)
    return bytes.fromhex("333300000002") + ASKER + b"\x86\xdd" + header + SOURCE + ALL_ROUTERS + message


def test_a_solicitation_is_answered_to_the_asker_alone():
    reply = answer(frame(133), OWN)
    assert reply
    assert (reply[:6], reply[6:12]) == (ASKER, OWN)
    assert reply[22:38] == bytes.fromhex("fe800000000000000077 0afffe4d0001")
    assert reply[38:54] == SOURCE
    assert reply[21] == 255  # others are dropped: they could come from elsewhere


def test_it_names_no_router_and_no_prefix():
    reply = answer(frame(133), OWN)
    assert reply
    message = reply[54:]
    assert message[0] == 134
    assert message[5] == 0  # no DHCPv6
    assert message[6:8] == b"\0\0"  # no router
    assert len(message) == 16  # no options


def test_its_checksum_is_right():
    reply = answer(frame(133), OWN)
    assert reply
    checked = reply[22:54] + struct.pack("!II", 16, 58) + reply[54:]
    total = sum(struct.unpack(f"!{len(checked) // 2}H", checked))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF


def test_nothing_else_is_answered():
    assert answer(frame(135), OWN) is None
    assert answer(frame(133, protocol=17), OWN) is None
    assert answer(frame(133)[:54], OWN) is None
