"""Reading `site.yml`: every problem at once, each with its place, its reason and its fix."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from posthouse import PosthouseError, roles, soundness
from posthouse.model import Site, site_model
from posthouse.strict import Document, NotYaml, problems
from posthouse.values import NAME

INVENTORY = roles.ROOT / "inventory"


class SiteError(PosthouseError):
    """A site that cannot be used. `problems` holds one line for each: place, reason, fix."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.path, self.problems = path, problems
        shown = path.relative_to(roles.ROOT) if path.is_relative_to(roles.ROOT) else path
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{shown}: {count}; nothing was changed\n" + "\n".join(f"  {problem}" for problem in problems))


def load(name: str) -> Site:
    """The site of `inventory/NAME/site.yml`. Raises SiteError."""
    path = INVENTORY / name / "site.yml"
    if not NAME.fullmatch(name):
        raise SiteError(path, [f"{name!r} is not the name of a site; use a to z, 0 to 9 and hyphens, a letter first"])
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(sorted(found.parent.name for found in INVENTORY.glob("*/site.yml")))
        raise SiteError(path, [f"no such site; the sites are {known}; make one with: posthouse init {name}"]) from None
    except OSError as error:
        raise SiteError(path, [f"{error.strerror}; make it a file that you may read"]) from None
    except UnicodeDecodeError as error:
        raise SiteError(path, [f"byte {error.start} is not UTF-8; save the file as UTF-8 text"]) from None
    return parse(text, path)


def parse(text: str, path: Path = Path("site.yml")) -> Site:
    """The site that `text`, the content of `path`, describes. Raises SiteError with all that is wrong with it."""
    try:
        document = Document(text)
    except NotYaml as error:
        raise SiteError(path, [str(error)]) from None
    model = site_model()
    found = list(document.problems)
    try:
        site = model.model_validate(document.data)
    except ValidationError as error:
        found += problems(model, error)
        # Look at the rest as well: what does not fit its type is left out, and what then stands is checked.
        broken = {str(details["loc"][0]) for details in error.errors() if details["type"] != "extra_forbidden"}
        with suppress(ValidationError):  # or too little is left to say more
            found += soundness.problems(model.model_validate(document.without(error)), broken)
        raise SiteError(path, document.text(found)) from None
    found += soundness.problems(site)
    if path.parent.name not in ("", site.name):
        found.append((("name",), f"is {site.name!r} in the folder {path.parent.name!r}; give both the same name"))
    if found:
        raise SiteError(path, document.text(found))
    return site


def refuse_foreign_macs(site: Site) -> None:
    """Raises SiteError if a machine of this site is another site's in inventory/, too: who wipes it would be luck."""
    mine = {node.mac: node.name for node in site.nodes.values() if node.mac}
    found = [
        f"nodes.{mine[mac]}.mac: {mac} is {node}'s in the site {name}; take it out of one of the two"
        for mac, (name, node) in (foreign_macs(site).items() if mine else ())
        if mac in mine
    ]
    if found:
        raise SiteError(INVENTORY / site.name / "site.yml", found)


def foreign_macs(site: Site) -> dict[str, tuple[str, str]]:
    """The machines of all other sites in inventory/: {MAC address: (site, node)}. Raises SiteError.

    A site file that cannot be read might hold any machine, so it stops this.
    """
    found: dict[str, tuple[str, str]] = {}
    for other in sorted(INVENTORY.glob("*/site.yml")):
        name = other.parent.name
        if name == site.name:
            continue
        try:
            nodes = load(name).nodes.values()
        except SiteError as error:
            reason = f"inventory/{name}/site.yml may name the same machines and cannot be read: {error.problems[0]}"
            path = INVENTORY / site.name / "site.yml"
            raise SiteError(path, [f"nodes: {reason}; mend it, or take the folder away"]) from None
        found |= {node.mac: (name, node.name) for node in nodes if node.mac}
    return found
