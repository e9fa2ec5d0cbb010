"""What a single value of a site file may be: an address, a name, a line of text. Each says how to write it instead."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any

from netaddr import IPAddress, IPNetwork, IPRange
from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from posthouse import roles
from posthouse.strict import did_you_mean

# More under one name is a slip of the keyboard; it must be refused before anything is made of it.
LARGEST_RANGE = 4096


def _ip(value: Any) -> IPAddress:
    try:
        return IPAddress(str(value), version=4)
    except Exception:
        raise ValueError(f"{reprlib.repr(value)} is not an IPv4 address; write it like 10.77.0.5") from None


def _cidr(value: Any) -> IPNetwork:
    try:
        network = IPNetwork(str(value), version=4)
    except Exception:
        raise ValueError(f"{reprlib.repr(value)} is not an IPv4 network; write it like 10.77.0.0/24") from None
    if network.ip != network.network:
        raise ValueError(f"{value} has host bits set; did you mean {network.cidr}?")
    return network


def _range(value: Any) -> IPRange:
    first, dash, last = str(value).partition("-")
    if not dash:
        raise ValueError(f"{reprlib.repr(value)} is not an address range; write it like 10.77.0.11-10.77.0.99")
    low, high = _ip(first.strip()), _ip(last.strip())
    if high < low:
        raise ValueError(f"{value} ends before it begins; write the smaller address first")
    return IPRange(low, high)


def _tier(value: str) -> str:
    if value == "base":
        raise ValueError("base is on every node; leave it out here")
    if value not in roles.TIERS:
        raise ValueError(f"no tier {value!r}; {did_you_mean(value, roles.TIERS[1:])}")
    return value


def _node_names(value: str) -> str:
    match = re.fullmatch(r"([a-z][a-z0-9-]{0,30})\[(\d{1,99}):(\d{1,99})\]", value)
    if not match:
        return checked(NAME, "the name of a node; write it like mail1, or mail[1:3] for three of them")(value)
    count = int(match[3]) - int(match[2]) + 1
    if count < 1:
        raise ValueError("the range is empty; write the smaller number first, like mail[1:3]")
    if count > LARGEST_RANGE:
        raise ValueError(f"the range stands for {count} nodes, and {LARGEST_RANGE} is the most; did you mean fewer?")
    return value


def checked(pattern: str | re.Pattern[str], what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{reprlib.repr(value)} is not {what}")
        return value

    return check


NAME = re.compile(r"[a-z]([a-z0-9-]{0,29}[a-z0-9])?")
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
# The last label has a letter in it: 10.77.0.1 is no domain.
_DOMAIN = rf"(?=.{{1,253}}$)({_LABEL}\.)+(?=[a-z0-9-]*[a-z]){_LABEL}"

_text = PlainSerializer(str, return_type=str)
Address = Annotated[Any, BeforeValidator(_ip), _text]
Cidr = Annotated[Any, BeforeValidator(_cidr), _text]
AddressRange = Annotated[Any, BeforeValidator(_range), _text]
Name = Annotated[str, AfterValidator(checked(NAME, "a name; use a to z, 0 to 9 and hyphens, a letter first: mail1"))]
NodeNames = Annotated[str, AfterValidator(_node_names)]
StoreName = Annotated[str, AfterValidator(checked(r"s\d{2,3}", "the name of a store; they are s01, s02, … s999"))]
Tier = Annotated[str, AfterValidator(_tier)]
Domain = Annotated[
    str,
    AfterValidator(checked(_DOMAIN, "a mail domain; write it in lower case, like example.org (others as xn--…)")),
]
# What a site says ends up in configuration files of many kinds; none of them means a line break by it.
Text = Annotated[str, AfterValidator(checked(r"[^\x00-\x1f\x7f]*", "text of one line; leave out control characters"))]
RepositoryPlace = Annotated[
    str,
    AfterValidator(
        checked(
            r"(/|rclone:[\w.-]+:)[^\x00-\x1f\x7f]*",
            "a backup repository; write it like /srv/backup/corp, or rclone:REMOTE:PATH for one of rclone's remotes",
        )
    ),
]


def expand(name: str) -> list[str]:
    """`mail[08:10]` → mail08, mail09, mail10; a name without a range stays as it is."""
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", name)
    if not match:
        return [name]
    head, first, last = match.groups()
    return [f"{head}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
