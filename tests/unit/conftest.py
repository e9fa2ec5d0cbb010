from pathlib import Path

import pytest

from posthouse.model import Site
from posthouse.sitefile import parse

CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="session")
def sound() -> str:
    """The text of a small site: two lb nodes, three mail nodes, three stores."""
    return (CASES / "sound.yml").read_text()


@pytest.fixture(scope="session")
def site(sound: str) -> Site:
    """That site, loaded."""
    return parse(sound)
