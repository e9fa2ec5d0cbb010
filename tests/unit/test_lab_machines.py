"""What keeps a node of a lab from being a QEMU machine: said before anything is built or started."""

import pytest

from posthouse import lab, secrets
from posthouse.lab import LabError, machine
from posthouse.lab.layout import Layout
from posthouse.model import Site
from posthouse.sitefile import load, parse


def refusal(site: Site, *names: str) -> str:
    with pytest.raises(LabError) as caught:
        lab.up(site, secrets.placeholders(site), names)
    return str(caught.value)


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posthouse.image.build_all", lambda _: pytest.fail("it went on"))
    monkeypatch.setattr("posthouse.lab.network.entered", lambda _: False)


def test_a_name_that_is_no_nodes(sound: str) -> None:
    assert refusal(parse(sound), "mial3") == "mial3: no such node in lab; did you mean 'mail3'?"


def test_a_node_without_a_mac_address(sound: str) -> None:
    assert refusal(parse(sound), "mail3").endswith("give it one in site.yml: nodes.mail3.mac")


def test_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "nodes", ["mail3"])
    monkeypatch.setattr(machine, "load", lambda *_: None)
    assert "mail3: is a container of this lab" in refusal(load("lab"), "mail3")
