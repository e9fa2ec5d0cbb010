"""Reading `site.yml`: every problem at once, each with its place, its reason and its fix."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from posthouse import roles
from posthouse.model import Problem, Site, site_model

INVENTORY = roles.ROOT / "inventory"
Place = tuple[str, ...]


class SiteError(Exception):
    """A site that cannot be used. `problems` holds one line for each: place, reason, fix."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.path, self.problems = path, problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{path}: {count}; nothing was changed\n" + "\n".join(f"  {problem}" for problem in problems))


def load(name: str) -> Site:
    """The site of `inventory/NAME/site.yml` (or of the folder NAME, if it is a path). Raises SiteError."""
    folder = Path(name) if "/" in name else INVENTORY / name
    path = folder / "site.yml"
    try:
        text = path.read_text()
    except OSError:
        known = sorted(p.parent.name for p in INVENTORY.glob("*/site.yml"))
        raise SiteError(
            path, [f"no such site; the sites are {', '.join(known)}; make one with: posthouse init {name}"]
        ) from None
    return parse(text, path)


def parse(text: str, path: Path = Path("site.yml")) -> Site:
    """The site that `text` describes. Raises SiteError with everything that is wrong with it."""
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise SiteError(path, [f"not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(root, yaml.MappingNode):
        raise SiteError(path, ["line 1: a site is a mapping; start with `name: …`"])
    lines: dict[Place, int] = {}
    found: list[Problem] = list(_walk(root, (), lines))
    data = yaml.load(text, Loader=yaml.CSafeLoader)
    model = site_model()
    try:
        site = model.model_validate(data)
    except ValidationError as error:
        found += [_problem(model, details, data) for details in error.errors()]
        # Look at the rest as well: what does not fit its type is left out, and what then stands is checked.
        for details in error.errors():
            _leave_out(data, details["loc"])
        try:
            found += model.model_validate(data).problems()
        except (ValidationError, AttributeError, TypeError):
            pass  # too little is left to say more
    else:
        found += site.problems()
    if found:
        raise SiteError(path, [_line(place, reason, lines) for place, reason in dict.fromkeys(found)])
    return site


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Iterator[Problem]:
    """Notes the line of every key; YAML itself keeps the last of two equal keys without a word, so that is said here."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*place, str(i))] = item.start_mark.line + 1
            yield from _walk(item, (*place, str(i)), lines)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, str(key.value))
            if here in lines:
                yield here, f"the key stands twice (first on line {lines[here]}); keep one"
            lines[here] = key.start_mark.line + 1
            yield from _walk(value, here, lines)


def _line(place: Place, reason: str, lines: dict[Place, int]) -> str:
    known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in lines), ())
    prefix = f"line {lines[known]}: " if known else ""
    return f"{prefix}{'.'.join(place) or 'site'}: {reason}"


def _problem(model: type[BaseModel], details: ErrorDetails, data: Any) -> Problem:
    place = tuple(str(part) for part in details["loc"] if part != "[key]")
    if details["type"] == "extra_forbidden":
        keys = _keys(model, place[:-1])
        close = difflib.get_close_matches(place[-1], keys, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(keys))}"
        return place, f"unknown key {place[-1]!r}; {hint}"
    if details["type"] == "missing":
        return place, "is missing; add it (see inventory/lab/site.yml for an example)"
    reason = details["msg"].removeprefix("Value error, ")
    return place, reason if details["type"] == "value_error" else f"{reason}, not {details['input']!r}"


def _keys(model: Any, place: Place) -> list[str]:
    """The keys that may stand at a place of the model."""
    for part in place:
        while get_origin(model) in (Annotated, Union, types.UnionType):
            model = next(arg for arg in get_args(model) if arg is not types.NoneType)
        if get_origin(model) is dict:
            model = get_args(model)[1]
        elif get_origin(model) is list:
            model = get_args(model)[0]
        else:
            model = next(f.annotation for name, f in model.model_fields.items() if part in (name, f.alias))
    while get_origin(model) in (Union, types.UnionType):
        model = next(arg for arg in get_args(model) if arg is not types.NoneType)
    return [field.alias or name for name, field in model.model_fields.items()]


def _leave_out(data: Any, place: tuple[int | str, ...]) -> None:
    place = tuple(part for part in place if part != "[key]")
    for part in place[:-1]:
        if not (isinstance(data, dict) and part in data):
            return
        data = data[part]
    if isinstance(data, dict):
        data.pop(place[-1], None)
