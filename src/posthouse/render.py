"""From a site to what a node should be: variables, files, services. Pure: reads roles, changes nothing.

The converge action plugin, `posthouse render`, the golden tests and the benchmark all render through `generation`.
"""

from __future__ import annotations

import subprocess
import traceback
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from posthouse import PosthouseError, __version__, roles
from posthouse.model import Node, Site, Store

Variables = dict[str, Any]


class RenderError(PosthouseError):
    """A template that cannot be rendered: names the file, the line and the reason."""


@cache
def release() -> str:
    """What is stamped on every node: the version and, in a git checkout, the commit of its roles."""
    git = ["git", "-C", str(roles.ROOT), "log", "-1", "--format=%h", "--", "roles"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return f"{__version__}+{commit}" if commit else __version__


def shared_variables(site: Site) -> Variables:
    """The template variables that are the same on every node (docs/engine.md lists them)."""
    variables: Variables = {
        "site": {
            "name": site.name,
            "domain": site.domain,
            "domains": site.domains,
            "postmaster": f"postmaster@{site.domain}",
        },
        "release": release(),
        "network": {
            "cidr": str(site.network.cidr),
            "prefixlen": site.network.cidr.prefixlen,
            "controller": str(site.network.controller),
            "interface": site.network.interface,
            "resolvers": [str(address) for address in site.network.resolvers],
        },
        "nodes": [_node(node) for node in site.nodes.values()],
        "tier_nodes": {tier: [_node(node) for node in site.groups[tier]] for tier in roles.TIERS},
        "vips": {name: str(address) for name, address in site.vips.items()},
        "vip_hosts": {name: f"{name}.{site.domain}" for name in site.vips},
        "stores": [_store(store) for store in site.stores.values()],
        "directory": {
            "suffix": site.suffix,
            "providers": [{"id": i, **_node(site.nodes[name])} for i, name in enumerate(site.directory.providers, 1)],
        },
        "cluster": {"members": [_node(site.nodes[name]) for name in site.cluster.members]} if site.cluster else None,
        "accounts": site.accounts.model_dump(),
        "tls_minimum": site.tls.minimum_version,
        "lab": site.lab.model_dump(mode="json") if site.lab else None,
    }
    for tier in roles.TIERS:
        variables |= site.settings(tier)
    return variables


def node_variables(site: Site, node: Node) -> Variables:
    """The template variables of one node, without its secrets."""
    stores = []
    for store in site.stores.values():
        names = [store.primary, *store.replicas]
        if node.name in names:
            stores.append(
                _store(store)
                | {
                    "role": "primary" if node.name == store.primary else "replica",
                    "nodes": names,
                    "peers": [_node(site.nodes[name]) for name in names if name != node.name],
                }
            )
    return {"node": _node(node), "node_stores": stores, "firewall": site.firewall(node)}


def generation(variables: Variables, tiers: list[str]) -> dict[str, Any]:
    """What these tiers make of a node: the desired generation that the converge module compares and applies.

    Returns {"tiers", "packages": [name], "groups": [{"user", "group", "tier"}],
    "directories": {path: {mode, owner, group}}, "files": {path: {"content", "mode", "owner", "group", "tier"}},
    "services": [{"unit", "tier", "owns", "check", "on_change", "restart_for", "ready"}]}. Raises RenderError.
    """
    desired: dict[str, Any] = {
        "tiers": tiers,
        "packages": roles.packages(tiers),
        "groups": [],
        "directories": {},
        "files": {},
        "services": [],
    }
    for tier in tiers:
        manifest = roles.manifest(tier)
        each = manifest.get("each", {})
        for user, groups in manifest.get("groups", {}).items():
            desired["groups"] += [{"user": user, "group": group, "tier": tier} for group in groups]
        for unit in manifest.get("masked", []):
            desired["files"][f"/etc/systemd/system/{unit_name(unit)}"] = {"link": "/dev/null", "tier": tier}
        for path, text in manifest.get("directories", {}).items():
            for name, _ in instances(path, each, variables):
                desired["directories"][name] = access(text)
        for path, source in sources(tier).items():
            for name, extra in instances(path, each, variables):
                content = _content(source, variables | extra)
                if content.strip():
                    desired["files"][name] = {"content": content, "tier": tier, **access(mode(manifest, path))}
        for unit, service in manifest.get("services", {}).items():
            for name, _ in instances(unit, each, variables):
                desired["services"].append(_service(tier, unit, name, service or {}))
    return desired


@cache
def sources(tier: str) -> dict[str, Path]:
    """The files below a role's templates/, by the path where they land on a node (which may contain {each} names)."""
    folder = roles.ROLES / tier / "templates"
    return {
        f"/{path.relative_to(folder)}".removesuffix(".j2"): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "__pycache__"
    }


def _node(node: Node) -> Variables:
    fields = node.model_dump(mode="json")
    return {"class" if name == "klass" else name: value for name, value in fields.items()}


def _store(store: Store) -> Variables:
    return store.model_dump(mode="json")


def instances(text: str, each: dict[str, str], variables: Variables) -> list[tuple[str, Variables]]:
    """`text` itself, or once per item where it names one of the manifest's `each`: [(text, item variables)]."""
    for name, items in each.items():
        if f"{{{name}}}" in text:
            return [(text.replace(f"{{{name}}}", item["name"]), {name: item}) for item in variables[items]]
    return [(text, {})]


def _content(source: Path, variables: Variables) -> str:
    if source.suffix != ".j2":
        return source.read_text()
    try:
        # As Ansible's own templates have it: a file ends as its template does, what it includes ends without a newline.
        text = _environment().get_template(str(source.relative_to(roles.ROLES))).render(variables)
        return text if text.endswith("\n") else f"{text}\n"
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"{_relative(error.filename or source)}:{error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Jinja2 gives its templates frames of their own in the traceback: the last one is where it happened.
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(roles.ROLES))]
        where = f"{_relative(frames[-1].filename)}:{frames[-1].lineno}" if frames else _relative(source)
        hint = "; is the variable declared for this tier?" if isinstance(error, jinja2.UndefinedError) else ""
        raise RenderError(f"{where}: {error}{hint}") from None


def _relative(path: str | Path) -> Path:
    return Path(path).relative_to(roles.ROOT)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(roles.ROLES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def mode(manifest: dict[str, Any], path: str) -> str:
    return next((a for pattern, a in manifest.get("modes", {}).items() if fnmatchcase(path, pattern)), "0644 root:root")


def access(text: str) -> dict[str, str]:
    mode, _, names = text.partition(" ")
    owner, _, group = names.partition(":")
    return {"mode": mode, "owner": owner or "root", "group": group or owner or "root"}


def _service(tier: str, template: str, unit: str, service: dict[str, Any]) -> dict[str, Any]:
    """A service of a manifest with its instance's name put in and its defaults made explicit."""
    each = {}
    if template != unit:
        head, _, rest = template.partition("{")
        name, _, tail = rest.partition("}")
        each = {f"{{{name}}}": unit.removeprefix(head).removesuffix(tail)}

    def texts(key: str) -> list[str]:
        value = service.get(key, [])
        found = [value] if isinstance(value, str) else list(value)
        for placeholder, instance in each.items():
            found = [text.replace(placeholder, instance) for text in found]
        return found

    unit = unit_name(unit)
    own_files = [f"/etc/systemd/system/{unit}", f"/etc/systemd/system/{unit}.d"]
    if "@" in unit:
        own_files.append(f"/etc/systemd/system/{unit.partition('@')[0]}@.{unit.rpartition('.')[2]}")
    return {
        "unit": unit,
        "tier": tier,
        "owns": [*texts("owns"), *own_files],
        "check": texts("check"),
        "on_change": service.get("on_change", "restart"),
        "restart_for": [*texts("restart_for"), *own_files],
        "ready": texts("ready"),
    }


def unit_name(name: str) -> str:
    return name if name.endswith((".service", ".socket", ".timer", ".path", ".mount", ".target")) else f"{name}.service"
