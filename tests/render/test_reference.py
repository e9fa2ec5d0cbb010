"""docs/reference says what the site model, the roles and the command line are now."""

import difflib

import pytest

from posthouse import reference


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
