#!/usr/bin/env python3
"""Ansible's inventory of one site, derived from its site.yml.

POSTHOUSE_SITE names the site (a folder beside this file; default: lab). Groups are the site's classes and tiers.
Secrets are not in here: the converge action plugin opens them for the node that it renders, and no other time.
"""

import os
import sys
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "python"
if __name__ == "__main__" and "posthouse" not in sys.modules and ENVIRONMENT.exists():
    # Ansible may be started from anywhere; the model lives in posthouse's own environment.
    try:
        import posthouse  # noqa: F401
    except ImportError:
        os.execv(ENVIRONMENT, [str(ENVIRONMENT), *sys.argv])

from posthouse.inventory import main  # noqa: E402

main(os.environ.get("POSTHOUSE_SITE", "lab"))
