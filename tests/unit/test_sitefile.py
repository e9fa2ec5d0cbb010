import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from posthouse import sitefile
from posthouse.sitefile import SiteError, load, parse, refuse_foreign_macs


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: str) -> Path:
    """An inventory with the one site `lab`."""
    monkeypatch.setattr(sitefile, "INVENTORY", tmp_path)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "site.yml").write_text(sound)
    return tmp_path


def refusal(name: str) -> str:
    with pytest.raises(SiteError) as caught:
        load(name)
    return str(caught.value)


def test_site_is_loaded_by_its_folders_name(inventory: Path) -> None:
    assert load("lab").name == "lab"


def test_error_names_file_line_reason_and_fix(inventory: Path, sound: str) -> None:
    (inventory / "lab" / "site.yml").write_text(sound.replace("vips:", "vip:"))
    assert refusal("lab").splitlines() == [
        f"{inventory}/lab/site.yml: 2 problems; nothing was changed",
        "  vips: is missing; add it",
        "  line 12: vip: unknown key 'vip'; did you mean 'vips'?",
    ]


def test_name_must_be_the_folders(inventory: Path) -> None:
    (inventory / "lab").rename(inventory / "other")
    assert "line 1: name: is 'lab' in the folder 'other'; give both the same name" in refusal("other")


def test_unknown_site_is_told_of_the_known_ones(inventory: Path) -> None:
    assert "no such site; the sites are lab; make one with: posthouse init labb" in refusal("labb")


@pytest.mark.parametrize("name", ["../lab", "/etc", "", ".", "Lab", "lab/", "lab\n", "-h"])
def test_name_cannot_leave_the_inventory(inventory: Path, name: str) -> None:
    assert "is not the name of a site" in refusal(name)


def test_text_that_is_not_utf8(inventory: Path) -> None:
    (inventory / "lab" / "site.yml").write_bytes(b"name: l\xe4b\n")
    assert "byte 7 is not UTF-8; save the file as UTF-8 text" in refusal("lab")


def test_folder_instead_of_a_file(inventory: Path) -> None:
    (inventory / "lab" / "site.yml").unlink()
    (inventory / "lab" / "site.yml").mkdir()
    assert "Is a directory; make it a file that you may read" in refusal("lab")


def test_nesting_that_would_crash_the_yaml_library() -> None:
    with pytest.raises(SiteError, match="nested more than 50 deep"):
        parse("name: " + "[" * 100_000)


def test_anchors_that_multiply_are_refused_without_being_multiplied() -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 20)]
    with pytest.raises(SiteError, match="a19: unknown key 'a19'"):
        parse("\n".join(lines))


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


WRONG: list[Any] = [None, True, -1, 0, 7, 1.5, "", "x", "- :", "mail1", [], ["x"], [None], {}, {"x": 1}, {7: 7}]


def test_any_wrong_value_at_any_place_is_an_error_of_ours(sound: str) -> None:
    tree = yaml.safe_load(sound)
    tried = refused = 0
    for path in places(tree):
        for value in WRONG:
            changed = copy.deepcopy(tree)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            tried += 1
            try:
                parse(yaml.safe_dump(changed))
            except SiteError as error:
                refused += 1
                assert all(": " in problem and "pydantic" not in problem for problem in error.problems), (path, value)
    assert tried > 500
    assert refused > 0.9 * tried


MAC = "52:54:00:ab:00:01"


def with_mac(text: str, mac: str, name: str = "lab") -> str:
    named = text.replace("name: lab", f"name: {name}")
    return named.replace("lb[1:2]: {class: lb}", f'lb1: {{class: lb, mac: "{mac}"}}')


def test_machines_of_another_site_are_refused(inventory: Path, sound: str) -> None:
    (inventory / "lab" / "site.yml").write_text(with_mac(sound, MAC))
    (inventory / "corp").mkdir()
    (inventory / "corp" / "site.yml").write_text(with_mac(sound, MAC.upper(), "corp"))
    with pytest.raises(SiteError) as caught:
        refuse_foreign_macs(load("lab"))
    assert caught.value.problems == [
        f"nodes.lb1.mac: {MAC} is lb1's in the site corp; take it out of one of the two",
    ]
    (inventory / "corp" / "site.yml").write_text(with_mac(sound, "52:54:00:ab:00:02", "corp"))
    refuse_foreign_macs(load("lab"))


def test_a_site_that_cannot_be_read_may_hold_any_machine(inventory: Path, sound: str) -> None:
    (inventory / "lab" / "site.yml").write_text(with_mac(sound, MAC))
    (inventory / "corp").mkdir()
    (inventory / "corp" / "site.yml").write_text("name: [")
    with pytest.raises(SiteError, match=r"inventory/corp/site\.yml may name the same machines and cannot be read"):
        refuse_foreign_macs(load("lab"))
