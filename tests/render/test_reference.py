"""docs/reference says what the site model, the roles and the command line are now."""

import difflib

import pytest

from posthouse import reference, render, roles
from posthouse.sitefile import load


@pytest.mark.parametrize("name", ["site.md", "roles.md", "manifest.md", "cli.md"])
def test_reference_is_current(name: str, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--update-golden"):
        reference.write()
    have = (reference.FOLDER / name).read_text().splitlines(keepends=True)
    want = reference.pages()[name].splitlines(keepends=True)
    difference = "".join(difflib.unified_diff(have, want, f"docs/reference/{name}", "made anew", n=1))
    if difference:
        pytest.fail(f"{difference}\nrun: posthouse docs", pytrace=False)


def test_there_are_no_other_pages() -> None:
    assert {path.name for path in reference.FOLDER.iterdir()} == set(reference.pages())


def test_the_guide_names_every_variable_of_a_template() -> None:
    site = load("lab")
    variables = {*render.shared_variables(site), *render.node_variables(site, site.nodes["mail1"])}
    variables -= {name for tier in roles.TIERS for name in site.settings(tier)}
    table = (roles.ROOT / "docs" / "engine.md").read_text().partition("## Variables")[2].partition("\n## ")[0]
    assert sorted(name for name in variables if f"`{name}`" not in table) == []
