# GNU General Public License v3.0+ (https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's half of directory_entries: what the site's directory begins with."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from posthouse import secrets, sitefile
from posthouse.model import Site


def arguments(site: Site, passwords: dict[str, str], node: str) -> dict[str, Any]:
    """The module's arguments on the provider `node` of a site."""
    suffix = site.suffix

    def unit(name: str, what: str) -> dict[str, Any]:
        attributes = {"objectClass": ["organizationalUnit"], "ou": [name], "description": [what]}
        return {"dn": f"ou={name},{suffix}", "attributes": attributes}

    def service(name: str, what: str) -> dict[str, Any]:
        attributes = {"objectClass": ["person"], "cn": [name], "sn": [name], "description": [what]}
        password = passwords[f"directory_{name}"]
        return {"dn": f"cn={name},ou=services,{suffix}", "attributes": attributes, "password": password}

    base = {"objectClass": ["dcObject", "organization"], "dc": [site.domain.partition(".")[0]], "o": [site.name]}
    replicator = service("replicator", "Nodes copying the directory from its providers")
    return {
        "suffix": suffix,
        "entries": [
            {"dn": suffix, "attributes": base},
            unit("accounts", "People"),
            unit("services", "Programs that log in at the directory"),
            replicator,
            service("accounts", "posthouse account"),
        ],
        "peers": [site.nodes[name].fqdn for name in site.directory.providers if name != node],  # type: ignore[attr-defined]
        "replicator": {"dn": replicator["dn"], "password": replicator["password"]},
    }


class ActionModule(ActionBase):
    """`directory_entries:`, on one provider of a site whose providers run."""

    supports_check_mode = True
    supports_diff = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        assert task_vars is not None
        try:
            site = sitefile.load(task_vars["posthouse_site"])
            passwords = secrets.load(site).passwords
        except (sitefile.SiteError, secrets.SecretsError) as error:
            raise AnsibleActionFail(str(error)) from None
        module_args = arguments(site, passwords, task_vars["inventory_hostname"])
        return result | self._execute_module("directory_entries", module_args=module_args, task_vars=task_vars)
