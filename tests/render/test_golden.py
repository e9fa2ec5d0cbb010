"""What the lab's nodes are rendered to, word for word. A change in a template shows here as the change on the nodes.

`pytest tests/render --update-golden` rewrites `golden/`; its diff in git is then what to review.
"""

import difflib
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from posthouse import render, roles, zones
from posthouse.model import Site
from posthouse.sitefile import load

GOLDEN = Path(__file__).parent / "golden"
KEY = {
    "name": "lab.test",
    "domain": "lab.test",
    "selector": "ph1",
    "key": "the DKIM key\n",
    "record": "v=DKIM1; k=rsa; p=record",
}


@pytest.fixture(scope="module")
def site() -> Site:
    return load("lab")


def node(site: Site, name: str) -> dict[str, str]:
    """A node's rendered files by path, with secrets that say what they stand for; all else of it in generation.yml."""
    this = site.nodes[name]
    fake = {
        "release": "the release",
        "secrets": {secret: f"secret-{secret}" for tier in this.tiers for secret in roles.manifest(tier)["secrets"]},
        "tls": {"ca": "the site's CA\n", "cert": f"{name}'s certificate\n", "key": f"{name}'s key\n"},
        "dkim": [KEY] if "outbound" in this.tiers else [],
    }
    variables = render.shared_variables(site) | render.node_variables(site, this) | fake
    generation: dict[str, Any] = render.generation(variables, list(this.tiers))
    files = {path[1:]: file.pop("content") for path, file in generation["files"].items() if "content" in file}
    plain = {source.read_text() for tier in this.tiers for source in render.sources(tier).values()}
    rendered = {path: content for path, content in files.items() if content not in plain}
    return rendered | {"generation.yml": yaml.safe_dump(generation, sort_keys=False, width=120)}


def compare(name: str, files: dict[str, str], update: bool) -> None:
    folder = GOLDEN / name
    if update:
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
    golden = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    difference = ""
    for path in sorted(golden.keys() | files.keys()):
        have, want = (side.get(path, "").splitlines(keepends=True) for side in (golden, files))
        difference += "".join(difflib.unified_diff(have, want, f"golden/{name}/{path}", f"rendered/{name}/{path}", n=1))
    if difference:
        pytest.fail(f"{difference}\nif this is meant: pytest tests/render --update-golden", pytrace=False)


@pytest.mark.parametrize("name", ["lb1", "mail1"])
def test_node(site: Site, name: str, pytestconfig: pytest.Config) -> None:
    compare(name, node(site, name), pytestconfig.getoption("--update-golden"))


def test_zones(site: Site, pytestconfig: pytest.Config) -> None:
    files = {f"{'root' if name == '.' else name}.zone": text for name, text in zones.zones(site, [KEY]).items()}
    compare("zones", files, pytestconfig.getoption("--update-golden"))
