"""Broken site files, as data: each file below `site/` is a case, and a new case is a new file.

why: …                          what is wrong, where its name does not say it
replace: {TEXT: TEXT, …}        what is different from sound.yml; or `site:`, a whole file
expect: [line, …]               every problem that is reported, word for word; empty if the site is accepted
"""

from pathlib import Path

import pytest
import yaml

from posthouse.sitefile import SiteError, parse

HERE = Path(__file__).parent
SOUND = (HERE / "sound.yml").read_text()
CASES = sorted((HERE / "site").glob("*.yml"))


def text(case: dict) -> str:
    """The site file of a case."""
    site = case.get("site", SOUND)
    for old, new in case.get("replace", {}).items():
        assert site.count(old) == 1, f"{old!r} must stand in sound.yml once"
        site = site.replace(old, new)
    return site


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_site(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    try:
        parse(text(case))
        found = []
    except SiteError as error:
        found = error.problems
    assert found == case["expect"]
