"""Writes a new site: a commented site.yml that is ready to be deployed, and its secrets."""

from __future__ import annotations

import shutil
from pathlib import Path

import jinja2
from netaddr import IPAddress, IPNetwork
from pydantic import TypeAdapter, ValidationError

from posthouse import roles, secrets, sitefile
from posthouse.sitefile import SiteError
from posthouse.values import NAME, Cidr, Domain

# Below this there is hardly room for a node more; above, no network is one.
SMALLEST, LARGEST = 26, 8
# "This" network, loopback, multicast and what lies behind it.
NOT_FOR_MACHINES = (IPNetwork("0.0.0.0/8"), IPNetwork("127.0.0.0/8"), IPNetwork("224.0.0.0/3"))
# Ranges set aside for documentation: they are nobody's, so the lab can be the rest of the world in them.
OUTSIDE = (IPNetwork("198.51.100.0/24"), IPNetwork("203.0.113.0/24"))


def write(name: str, domain: str, cidr: str, in_lab: bool) -> Path:
    """Writes inventory/NAME/site.yml and its secrets; returns the path of the site file.

    Raises SiteError or SecretsError, and then leaves nothing behind.
    """
    folder = sitefile.INVENTORY / name
    path = folder / "site.yml"
    problems = _problems(name, domain, cidr)
    if problems:
        raise SiteError(path, problems)
    if folder.exists():
        raise SiteError(path, [f"{name} exists already; edit it, or choose another name"])
    text = _render(name, domain, IPNetwork(cidr), in_lab)
    site = sitefile.parse(text, path)
    try:
        folder.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
        secrets.ensure(site)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SiteError(path, [f"{error.filename}: {error.strerror}"]) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path


def _problems(name: str, domain: str, cidr: str) -> list[str]:
    """What is wrong with the arguments, all at once."""
    found = []
    if not NAME.fullmatch(name):
        found.append(f"SITE: {name!r} is not a name for a site; use a to z, 0 to 9 and hyphens, a letter first")
    for option, kind, value in (("--domain", Domain, domain), ("--cidr", Cidr, cidr)):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            found += [f"{option}: {details['ctx']['error']}" for details in error.errors()]
    if not any(problem.startswith("--cidr") for problem in found):
        network = IPNetwork(cidr)
        if not LARGEST <= network.prefixlen <= SMALLEST:
            found.append(f"--cidr: {network} must be a /{LARGEST} to a /{SMALLEST}, to hold the nodes and their stores")
        elif any(network in other for other in NOT_FOR_MACHINES):
            found.append(f"--cidr: {network} is not for machines; choose one of your own, like 10.77.0.0/24")
    return found


def _render(name: str, domain: str, network: IPNetwork, in_lab: bool) -> str:
    """The text of the site file: half of the addresses are for nodes and for the site itself, a quarter for stores."""

    def address(number: int) -> IPAddress:
        return IPAddress(network.first + number)

    half = network.size // 2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(roles.ROOT / "templates" / "site"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("site.yml.j2").render(
        name=name,
        domain=domain,
        cidr=network,
        in_lab=in_lab,
        gateway=address(1),
        controller=address(1 if in_lab else 2),
        vip=address(5),
        nodes=f"{address(11)}-{address(half - 1)}",
        lb=address(11),
        mail=address(11 + (half - 11) // 4),
        stores=f"{address(half)}-{address(half + half // 2 - 1)}",
        outside=next(outside for outside in OUTSIDE if outside not in network and network not in outside),
    )
