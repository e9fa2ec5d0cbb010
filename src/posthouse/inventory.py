"""A site as Ansible and ssh see it: inventory, known host keys, connection settings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from posthouse import render
from posthouse.model import Site
from posthouse.roles import RoleError
from posthouse.secrets import Secrets
from posthouse.sitefile import SiteError, load

# Keys and ssh's control sockets: on a memory file system, private to root, gone after a reboot.
RUNTIME = Path("/run/posthouse")


def inventory(site: Site) -> dict[str, Any]:
    """What `ansible-inventory --list` wants of a dynamic inventory, without any secret."""
    groups = {name: {"hosts": [node.name for node in nodes]} for name, nodes in site.groups.items() if nodes}
    groups["providers"] = {"hosts": list(site.directory.providers)}
    hostvars = {
        node.name: {"ansible_host": node.address} | render.node_variables(site, node) for node in site.nodes.values()
    }
    shared = render.shared_variables(site) | {
        "ansible_user": "root",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(ssh_folder(site) / "id"),
        "ansible_ssh_common_args": f"-F {ssh_folder(site) / 'config'}",
        "posthouse_site": site.name,
    }
    return {"_meta": {"hostvars": hostvars}, "all": {"vars": shared, "children": list(groups)}, **groups}


def ssh_folder(site: Site) -> Path:
    """Where the site's ssh configuration lies while commands run: config, id, known_hosts."""
    return RUNTIME / site.name / "ssh"


def write_ssh(site: Site, secrets: Secrets) -> Path:
    """Writes the ssh configuration that reaches the site's nodes and accepts their known keys only; returns it."""
    folder = ssh_folder(site)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = secrets.ssh["host_keys"]
    known = "".join(f"{node.address},{node.name} {keys[node.name]['public']}\n" for node in site.nodes.values())
    config = [
        *(f"Host {node.name}\n  HostName {node.address}" for node in site.nodes.values()),
        "Host *",
        "  User root",
        f"  IdentityFile {folder / 'id'}",
        "  IdentitiesOnly yes",
        f"  UserKnownHostsFile {folder / 'known_hosts'}",
        "  StrictHostKeyChecking yes",
        "  ConnectTimeout 10",
        "  ServerAliveInterval 5",
        "  ServerAliveCountMax 2",
        "  ControlMaster auto",
        "  ControlPersist 60s",
        f"  ControlPath {folder}/%C",
    ]
    for name, text in {"known_hosts": known, "id": secrets.ssh["private"], "config": "\n".join(config) + "\n"}.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            beside = folder / f"{name}.{os.getpid()}"
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            beside.replace(path)
    return folder / "config"


def main(name: str) -> None:
    """The inventory script's own main: prints the inventory of a site as JSON."""
    try:
        json.dump({} if "--host" in sys.argv else inventory(load(name)), sys.stdout)
    except (SiteError, RoleError) as error:
        sys.exit(str(error))
