"""YAML read strictly: all that is wrong with a file at once, each problem with its line, its reason and its fix."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Collection
from functools import cached_property
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

Place = tuple[str, ...]
Problem = tuple[Place, str]
"""Where (the path of keys into the file), and what is wrong with how to mend it."""

# No file of ours is nested more deeply; the YAML library does not survive what is nested without end.
DEEPEST = 50

# What pydantic says of a value, in the words of somebody who writes YAML. {…} are pydantic's own limits.
REASONS = {
    "model_type": "must be a mapping of keys and values",
    "dict_type": "must be a mapping of keys and values",
    "list_type": "must be a list, like [a, b]",
    "string_type": "must be text; put quotes around it",
    "invalid_key": "a key must be text; put quotes around it",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number that ends",
    "bool_type": "must be true or false",
    "too_short": "needs at least {min_length}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
}


class Strict(BaseModel):
    """Unknown keys are refused everywhere, and so is `yes` for a number; a typo must never silently change nothing."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        ignored_types=(cached_property,),
    )


class NotYaml(Exception):
    """A text that is not a YAML mapping; the message has the line, the reason and the fix."""


class Document:
    """A YAML mapping with the line of every key. Raises NotYaml.

    `data` is what it says; `problems` are keys that stand twice, of which YAML itself keeps the last without a word.
    """

    def __init__(self, text: str) -> None:
        self.problems: list[Problem] = []
        self._lines: dict[Place, int] = {}
        loader: yaml.CSafeLoader | None = None
        try:
            _check_depth(text)
            loader = yaml.CSafeLoader(text)
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise NotYaml("line 1: the file must be a mapping of keys and values; start with `key: value`")
            self._walk(loader, root, (), set())
            self.data: dict[Any, Any] = loader.construct_document(root)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise NotYaml(
                f"line {line}: not YAML: a character that no text has (#x{error.character:02x}); take it out"
            ) from None
        except yaml.MarkedYAMLError as error:
            raise NotYaml(_not_yaml(text, error)) from None
        finally:
            if loader:
                loader.dispose()

    def line(self, problem: Problem) -> tuple[int, str]:
        """A problem as (line number, or 0 if it has none; "line 3: stores.s02: reason")."""
        place, reason = problem
        known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in self._lines), ())
        number = self._lines.get(known, 0)
        where = f"{'.'.join(place)}: " if place else ""
        return number, f"line {number}: {where}{reason}" if number else f"{where}{reason}"

    def text(self, problems: Collection[Problem]) -> list[str]:
        """All problems in the order of the file, each once."""
        return [text for _, text in sorted(map(self.line, dict.fromkeys(problems)), key=lambda found: found[0])]

    def without(self, error: ValidationError) -> dict[Any, Any]:
        """`data` without what the model refused, so that the rest can be looked at."""
        # Backwards, so that what is taken out of a list does not move what is still to be taken out.
        for details in reversed(error.errors()):
            _take_out(self.data, tuple(part for part in details["loc"] if part != "[key]"))
        return self.data

    def _walk(self, loader: yaml.CSafeLoader, node: yaml.Node, place: Place, seen: set[int]) -> None:
        """Notes the line of every key, and the keys that stand twice. An anchor is walked once: it may hold itself."""
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            try:
                loader.construct_object(node)
            except (ValueError, OverflowError) as error:  # it looks like a date or a number of YAML's, and is none
                line = node.start_mark.line + 1
                reason = f"{reprlib.repr(node.value)}: {error}; put quotes around what is text"
                raise NotYaml(f"line {line}: {'.'.join(place)}: {reason}") from None
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._lines[(*place, str(i))] = item.start_mark.line + 1
                self._walk(loader, item, (*place, str(i)), seen)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*place, str(key.value))
                if here in self._lines:
                    self.problems.append((here, f"the key stands twice (first on line {self._lines[here]}); keep one"))
                else:
                    self._walk(loader, value, here, seen)
                self._lines[here] = key.start_mark.line + 1


def did_you_mean(value: Any, known: Collection[str]) -> str:
    """The fix for a name that is not one of `known`."""
    close = difflib.get_close_matches(str(value), known, 1)
    if close:
        return f"did you mean {close[0]!r}?"
    names = sorted(known)
    return f"known here: {', '.join(names[:15])}{', …' if len(names) > 15 else ''}"


def problems(model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """What pydantic found, as problems."""
    return [_problem(model, details) for details in error.errors()]


def _problem(model: type[BaseModel], details: ErrorDetails) -> Problem:
    place = tuple(str(part) for part in details["loc"] if part != "[key]")
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return place, f"unknown key {place[-1]!r}; {did_you_mean(place[-1], _keys(model, place[:-1]))}"
    if kind == "missing":
        return place, "is missing; add it"
    if kind == "value_error":
        return place, str(context["error"])
    reason = REASONS[kind].format(**context) if kind in REASONS else details["msg"]
    if details["input"] is None:
        return place, f"has no value; it {reason}, or leave the key out"
    return place, f"{reason}, not {reprlib.repr(details['input'])}"


def _keys(model: Any, place: Place) -> list[str]:
    """The keys that may stand at a place of the model."""
    for part in place:
        model = _inner(model)
        if get_origin(model) is dict:
            model = get_args(model)[1]
        elif get_origin(model) is list:
            model = get_args(model)[0]
        else:
            model = next(f.annotation for name, f in model.model_fields.items() if part in (name, f.alias))
    return [field.alias or name for name, field in _inner(model).model_fields.items()]


def _inner(model: Any) -> Any:
    """A type without the wrappers around it: Annotated[X, …] and X | None are X."""
    while get_origin(model) in (Annotated, Union, types.UnionType):
        model = next(arg for arg in get_args(model) if arg is not types.NoneType)
    return model


def _take_out(data: Any, place: tuple[int | str, ...]) -> None:
    try:
        for part in place[:-1]:
            data = data[part]
        del data[place[-1]]
    except (LookupError, TypeError):
        pass  # a key that is missing, or below something that is out already


def _not_yaml(text: str, error: yaml.MarkedYAMLError) -> str:
    """What YAML says of a text that it cannot read, with the line and a fix."""
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    fix = "close what is open, or put quotes around what is text"
    if "\t" in "".join(text.splitlines()[line : line + 1]):
        fix = "indent with spaces, not tabs"
    return f"line {line + 1}: not YAML: {reason}; {fix}"


def _check_depth(text: str) -> None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise _too_deep(event.start_mark)
    except yaml.MarkedYAMLError as error:
        # Newer versions of the YAML library have a limit of their own, and look ahead far enough to meet it first.
        if "nesting depth" in (error.problem or ""):
            raise _too_deep(error.problem_mark) from None
        raise


def _too_deep(mark: Any) -> NotYaml:
    return NotYaml(f"line {mark.line + 1 if mark else 1}: nested more than {DEEPEST} deep; close the brackets")
