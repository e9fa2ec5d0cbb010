"""The reference in docs/reference, made from what it describes: the site model, the roles and the command line."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from posthouse import machines, model, roles, values

FOLDER = roles.ROOT / "docs" / "reference"
MADE = "<!-- Made by `posthouse docs`; edit what it describes instead. -->\n"

PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "value"}
PARSED = {
    values._ip: "address",
    values._cidr: "network",
    values._range: "range of addresses, `FIRST-LAST`",
    machines._macs: "MAC address, or a list of them",
}


def write() -> list[Path]:
    """Writes all pages anew, and returns their paths."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return [FOLDER / name for name in pages()]


def pages() -> dict[str, str]:
    """{file name: Markdown} of every page."""
    made = {"site.md": _site, "roles.md": _roles, "manifest.md": _manifest, "cli.md": _cli}
    return {name: MADE + "\n".join(lines()) + "\n" for name, lines in made.items()}


# --- models -----------------------------------------------------------------------------------------------------------


def _site() -> Iterator[str]:
    yield from (
        "# site.yml",
        "",
        "All that a site may say. Unknown keys are refused. The guide is [site.md](../site.md).",
        "",
    )
    yield from _table(model.Site)
    sections: dict[str, type[BaseModel]] = {
        "network": model.Network,
        "classes.NAME": model.NodeClass,
        "classes.NAME.install": machines.Install,
        "classes.NAME.install.disk": machines.Disk,
        "nodes.NAME": model.NodeEntry,
        "stores.NAME": model.StoreEntry,
        "cluster": model.Cluster,
        "directory": model.Directory,
        "accounts": model.Accounts,
        "tls": model.Tls,
        "load": model.Load,
        "provision": model.Provision,
        "backup": model.Backup,
        "backup.keep": model.Keep,
        "lab": model.Lab,
    }
    for name, section in sections.items():
        yield from ("", f"## {name}", "", str(section.__doc__), "")
        yield from _table(section)
    tiers = ", ".join(f"[`{tier}`](roles.md#{tier})" for tier in roles.TIERS if roles.settings(tier))
    yield from ("", "## Settings of the tiers", "", f"Each under the name of its tier: {tiers}.")


def _manifest() -> Iterator[str]:
    yield from ("# manifest.yml", "", "What a role declares. The guide is [engine.md](../engine.md).", "")
    yield from _table(roles.Manifest)
    sections: dict[str, type[BaseModel]] = {"ports": roles.Port, "services.UNIT": roles.Service}
    for name, section in sections.items():
        yield from ("", f"## {name}", "", str(section.__doc__), "")
        yield from _table(section)


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        cells = (
            f"`{field.alias or name}`",
            _kind(field),
            _default(field),
            field.description or _documented(field.annotation),
        )
        yield f"| {' | '.join(cells)} |"


def _kind(field: FieldInfo) -> str:
    """What may stand there, in words: "list of addresses", "number, more than 0"."""
    bounds = []
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge(ge=bound):
                bounds.append(f"{bound} or more")
            case annotated_types.Gt(gt=bound):
                bounds.append(f"more than {bound}")
            case annotated_types.Le(le=bound):
                bounds.append(f"{bound} or less")
    return ", ".join([_words(field.annotation, field.metadata), *bounds])


def _words(kind: Any, metadata: Any = ()) -> str:
    parsed = [PARSED[m.func] for m in metadata if isinstance(m, BeforeValidator) and m.func in PARSED]
    if parsed:
        return parsed[0]
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _words(arguments[0], arguments[1:])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments if argument is not types.NoneType)
    if get_origin(kind) is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if get_origin(kind) is list:
        return f"list of: {_words(arguments[0])}"
    if get_origin(kind) is dict:
        return f"mapping of: {_words(arguments[1])}"
    return PLAIN.get(kind, "section")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if default is None or isinstance(default, BaseModel) or default in ([], {}) else _value(default)


def _value(value: Any) -> str:
    """As it would stand in a YAML file."""
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _documented(kind: Any) -> str:
    """The docstring of the section that a field holds."""
    inner = [kind, *get_args(kind)]
    return next((str(part.__doc__) for part in inner if isinstance(part, type) and issubclass(part, BaseModel)), "")


# --- roles ------------------------------------------------------------------------------------------------------------


def _roles() -> Iterator[str]:
    yield from ("# Roles", "")
    yield "A role for each tier, in the order in which a node's are converged. A site sets a tier's settings under the"
    yield "tier's name, without the prefix: `mx: {message_size: 50}` in `site.yml` is the role's `mx_message_size`."
    for tier in roles.TIERS:
        manifest = roles.manifest(tier)
        yield from ("", f"## {tier}", "", f"{roles.description(tier)}. [More](../../roles/{tier}/README.md)", "")
        needs = ", ".join(f"`{needed}` ({why})" for needed, why in roles.NEEDS.get(tier, {}).items())
        excludes = ", ".join(f"`{other}` ({why})" for other, why in roles.CONFLICTS.get(tier, {}).items())
        ports = "; ".join(
            f"{port.get('port', port.get('protocol'))} from {', '.join(port['from'])}"
            for port in manifest.get("ports", [])
        )
        facts = {"Needs on the same node": needs, "Cannot share a node with": excludes, "Ports": ports}
        facts["Services"] = ", ".join(f"`{unit}`" for unit in manifest.get("services", {}))
        yield from (f"- {name}: {fact}." for name, fact in facts.items() if fact)
        if roles.settings(tier):
            yield from ("", "| setting | type | default | meaning |", "|---|---|---|---|")
        for name, spec in roles.settings(tier).items():
            kind = " or ".join(f"`{choice}`" for choice in spec.get("choices", [])) or spec["type"]
            kind += f" of {spec['elements']}" if "elements" in spec else ""
            default = "required" if spec.get("required") else _value(spec["default"])
            # C(…) is how Ansible's documentation marks code.
            meaning = re.sub(r"\bC\((.*?)\)", r"`\1`", " ".join(spec["description"].split()))
            yield f"| `{name}` | {kind} | {default} | {meaning} |"


# --- command line -----------------------------------------------------------------------------------------------------


def _cli() -> Iterator[str]:
    from posthouse.cli import app  # it imports this module

    yield from (
        "# Command line",
        "",
        "Errors name the place, the reason and the fix, and end with a status other than 0.",
    )
    yield from _command("posthouse", typer.main.get_command(app))


def _command(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for verb in sorted(command.commands):
            yield from _command(f"{name} {verb}", command.commands[verb])
        return
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    options = [p for p in command.params if p not in arguments]
    usage = " ".join([name, *(_argument(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    yield from ("", f"## {name}", "", f"`{usage}`", "", str(command.help), "")
    for parameter in command.params:
        shown = _argument(parameter) if parameter in arguments else ", ".join(parameter.opts)
        default = (
            f" Default: `{parameter.default}`."
            if isinstance(parameter.default, str | int | float | Path) and parameter.default
            else ""
        )
        needed = " Required." if parameter.required and parameter in options else ""
        yield f"- `{shown}`: {parameter.help or ''}{needed}{default}"


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper())
    return name if parameter.required or name.startswith("[") else f"[{name}]"


if __name__ == "__main__":
    write()
