"""Options that many verbs have in common."""

from __future__ import annotations

import math
from typing import Annotated

import typer


def finite(number: float | None) -> float | None:
    """Refuses `inf` and `nan`, which are in every range: a callback."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a number to count with; write digits")
    return number


SiteName = Annotated[str, typer.Argument(metavar="SITE", help="A folder in inventory/.")]
SiteOption = Annotated[str, typer.Option("--site", metavar="SITE", help="A folder in inventory/.")]
Check = Annotated[bool, typer.Option("--check", help="Say what would change; change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, everything else on standard error.")]
