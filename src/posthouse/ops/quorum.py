"""A member of the site's cluster that lost its disk: the others forget the one it was, and take it in as a new one."""

from __future__ import annotations

from posthouse import render, secrets
from posthouse.model import Site
from posthouse.ops import service
from posthouse.remote import Remote, RemoteError

_ETCDCTL = (
    "etcdctl --cacert /etc/ssl/posthouse/ca.pem --cert /etc/ssl/posthouse/node.pem --key /etc/ssl/posthouse/node.key "
    "--endpoints https://{address}:2379"
)

# Asked of a member that is well. Until the new one has started, the majority is as large as with a member that is dead.
_TAKE_IN = """
{forget}
{ctl} member add {name} --peer-urls=https://{address}:2380 >&2
"""

_FORGET = """
set -eu
old=$({ctl} member list | awk -F', ' '$4 == "https://{address}:2380" {{ print $1 }}')
[ -z "$old" ] || {ctl} member remove "$old" >&2
"""

# The first start of a member that comes later has to say so; after that its data tells it. It comes before the node is
# converged as a whole: the others refuse an etcd that says it is new, and a service that does not run is rolled back.
_JOIN = """
set -eu
systemctl stop etcd 2>/dev/null || true
rm -rf /srv/etcd
install -d -o etcd -g etcd -m 0700 /srv/etcd
mkdir -p /run/posthouse
sed 's/^initial-cluster-state: new/initial-cluster-state: existing/' >/run/posthouse/etcd-join.yml
systemd-run --quiet --collect --unit=posthouse-etcd-join --uid=etcd --property=SupplementaryGroups=ssl-cert \\
    etcd --config-file /run/posthouse/etcd-join.yml
trap 'systemctl stop posthouse-etcd-join 2>/dev/null' EXIT
until {ctl} endpoint health >/dev/null 2>&1; do
    systemctl --quiet is-active posthouse-etcd-join
    sleep 0.2
done
"""


def members(site: Site) -> list[str]:
    """The nodes that decide together; none in a site without a cluster."""
    return list(site.cluster.members) if site.cluster else []


def listed(site: Site, remote: Remote) -> list[str]:
    """The addresses that the cluster itself counts as its members. Raises RemoteError; none in a site without one."""
    if not site.cluster:
        return []
    complaint = None
    for name in site.cluster.members:
        try:
            text = remote.run(name, f"{_ETCDCTL.format(address=site.nodes[name].address)} member list", timeout=30)
        except RemoteError as error:
            complaint = error
            continue
        return [line.split(", ")[3].removeprefix("https://").partition(":")[0] for line in text.splitlines()]
    assert complaint
    raise complaint


def replace(site: Site, remote: Remote, old: str, new: str) -> None:
    """Has `new` take the place of `old`: the others first forget the one, then learn of the other.

    In between one of them that dies takes the majority with it. Raises RemoteError, Stopped.
    """
    helper = next(name for name in members(site) if name != new)
    asked = _ETCDCTL.format(address=site.nodes[helper].address)
    remote.run(helper, _FORGET.format(ctl=asked, address=site.nodes[old].address))
    # What the others have forgotten ends, and would be started again and again: meanwhile systemd does not look whether
    # the node is still to run it.
    remote.run(old, "systemctl stop etcd")
    rejoin(site, remote, new, helper)


def rejoin(site: Site, remote: Remote, node: str, helper: str) -> None:
    """Has a node that lost its data take part again; `helper` is a member that is well. Raises RemoteError, Stopped."""
    service.deploy(site, node, ["base", "directory"])  # certificates, names, firewall; and deploy waits for a directory
    entry = site.nodes[node]
    asked = _ETCDCTL.format(address=site.nodes[helper].address)
    forget = _FORGET.format(ctl=asked, address=entry.address)
    remote.run(helper, _TAKE_IN.format(forget=forget, ctl=asked, name=node, address=entry.address))
    variables = render.shared_variables(site) | render.node_variables(site, entry) | secrets.load(site).for_node(entry)
    settings = render.generation(variables, ["store"])["files"]["/etc/posthouse/etcd.yml"]["content"]
    remote.run(node, _JOIN.format(ctl=_ETCDCTL.format(address=entry.address)), text=settings, timeout=180)
