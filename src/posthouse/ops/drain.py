"""A node out of service, and back into it, without a failed delivery or login."""

from __future__ import annotations

import getpass
import logging
import time
from typing import Any

from posthouse import PosthouseError
from posthouse.model import Site
from posthouse.ops import failover, queues, service, state
from posthouse.ops.state import State
from posthouse.ops.steps import Refused, Step, Stopped, carry_out
from posthouse.remote import Remote

log = logging.getLogger(__name__)

# How long mail in the middle of its way through a balancer may hold up handing over the VIP. New connections wait
# meanwhile: whoever gets no answer asks again after 1, 3, 7 and 15 s.
HANDOVER_SECONDS = 15
# How long a replica may take to have everything again after it, or its connection, was started anew.
IN_SYNC_SECONDS = 60

# New connections to the VIP get no answer, rather than one from a balancer that is about to lose the address; those
# who ask again get it from the next. Sessions with mail in hand end first. The timer is for the case that this dies.
_HAND_OVER = """
set -u
end() {{ nft delete table inet posthouse_handover 2>/dev/null; systemctl stop posthouse-handover.timer 2>/dev/null; }}
trap end EXIT
systemd-run --quiet --collect --on-active={seconds}s --unit=posthouse-handover \\
    nft delete table inet posthouse_handover
nft -f - <<END
table inet posthouse_handover {{
    chain input {{
        type filter hook input priority filter - 10
        ip daddr {vip} tcp flags & (syn | ack) == syn drop
    }}
}}
END
until=$(($(date +%s) + {seconds}))
busy() {{
    echo 'show stat' | socat -t 5 - /run/haproxy/admin.sock |
        awk -F, '$1 ~ /^(smtp|submissions?)$/ && $2 == "FRONTEND" && $5 > 0 {{ found = 1 }} END {{ exit !found }}'
}}
while busy && [ $(date +%s) -lt $until ]; do sleep 0.1; done
mkdir -p {folder}
printf '%s' '{{"state": "handing over"}}' >{mark}
until=$(($(date +%s) + 10))
while ip -4 -o address | grep -q ' {vip}/'; do
    [ $(date +%s) -lt $until ] || {{ echo "keepalived keeps the VIP" >&2; exit 1; }}
    sleep 0.05
done
# The other one has it a moment later: until then nobody may be refused here.
sleep 0.5
"""


def plan(site: Site, have: State, node: str, switch: bool = True) -> list[Step]:
    """The steps that take a node out of service; none if it is. switch: whether stores can be handed over.

    Raises Refused.
    """
    state.known(site, node)
    state.need_answers(site, have, [node])
    if node in have.drained:
        return []
    for pool, served in have.others_serving(node).items():
        if not served:
            raise Refused(
                f"{pool}: {node} is the only one that serves; put another one back first; nothing was changed"
            )
    steps = []
    if service.pooled(site, node):
        # One that is not told goes on sending clients here when it is back.
        state.need_answers(site, have, (lb.name for lb in site.groups["lb"]))
        steps.append(Step("pools", node, "take it out of the balancers' pools, let its sessions end"))
    if "lb" in site.nodes[node].tiers:
        others = [lb.name for lb in site.groups["lb"] if lb.name != node and lb.name in have.answers - have.drained]
        if not others:
            raise Refused(f"{node}: is the only balancer in service; put another one back first; nothing was changed")
        if have.vip == node:
            steps.append(Step("vip", node, f"hand the VIP to {' or '.join(others)}"))
    if switch:
        steps += [
            Step("switch", node, f"hand {store} to {target}", f"{store} {target}")
            for store, target in _targets(site, have, node).items()
        ]
    if queues.instances(site, node):
        steps.append(Step("queues", node, "deliver what waits in its queues, hand the rest to another node"))
    return [*steps, Step("mark", node, "note that it is drained")]


def _targets(site: Site, have: State, node: str) -> dict[str, str]:
    """Who gets each store that the node serves now. Raises Refused if nobody has all of it."""
    found = {}
    for store, primary in have.primaries.items():
        if primary != node:
            continue
        entry = site.stores[store]
        able = have.answers - have.drained - {node}
        members = [name for name in (entry.primary, *entry.replicas) if name in able and (store, name) not in have.late]
        if not members:
            raise Refused(
                f"{store}: {node} has the only copy that is complete and in service; give it a replica, or bring one "
                "back; nothing was changed"
            )
        found[store] = members[0]
    return found


def plan_undrain(site: Site, have: State, node: str, switch: bool = True) -> list[Step]:
    """The steps that put a node back into service; none if it is in service. Raises Refused."""
    state.known(site, node)
    state.need_answers(site, have, [node])
    steps = []
    if service.pooled(site, node) and (node in have.drained or not service.in_service(have, node)):
        steps.append(service.ready(site, have, node))
    if switch:
        steps += [
            Step("switch", have.primaries[name], f"hand {name} back to {node}", f"{name} {node}")
            for name, store in site.stores.items()
            if store.primary == node and have.primaries.get(name, node) != node
        ]
    if node in have.drained:
        steps.append(Step("unmark", node, "forget that it was drained"))
    return [*steps, Step("serve", node, "wait until the balancers send it clients")] if steps else []


class Drains:
    """Drains and undrains nodes of a site: the actions, and what is put back when one fails."""

    def __init__(self, site: Site, remote: Remote, wait: int = 60, purpose: str | None = None) -> None:
        self.site, self.remote, self.wait, self.purpose = site, remote, wait, purpose
        # Without a cluster nothing can hand a store over, and it stays where it is.
        self.movable = site.cluster is not None

    def drain(self, node: str, check: bool = False) -> dict[str, Any]:
        """Takes a node out of service. Raises Refused, Stopped. Returns the report of `carry_out`."""
        steps = plan(self.site, state.read(self.site, self.remote), node, self.movable)
        stores = [step.what.split()[0] for step in steps if step.do == "switch"]
        self._need_copies(stores, 0 if check else IN_SYNC_SECONDS)
        return carry_out(f"drain {node}", steps, self._actions, check, self._put_back)

    def _need_copies(self, stores: list[str], seconds: float) -> None:
        """Waits until each store has a replica that could take over; refuses if that takes longer."""
        deadline, said = time.monotonic() + seconds, False
        while stores:
            states = failover.states(self.site, self.remote)
            stores = [name for name in stores if not states[name].in_sync]
            if stores and seconds and not said:
                said = True
                log.info("%s: waiting for a replica to be in sync, for %.0f s at most", ", ".join(stores), seconds)
            if stores and time.monotonic() > deadline:
                raise Refused(
                    f"{stores[0]}: no replica has all of it now; see: posthouse stores {self.site.name}; run this "
                    "again when one is in sync; nothing was changed"
                )
            time.sleep(min(seconds, 1))

    def undrain(self, node: str, check: bool = False) -> dict[str, Any]:
        """Puts a node back into service. Raises Refused, Stopped. Returns the report of `carry_out`."""
        steps = plan_undrain(self.site, state.read(self.site, self.remote), node, self.movable)
        return carry_out(f"undrain {node}", steps, self._actions, check)

    @property
    def _actions(self) -> dict[str, Any]:
        return {
            "pools": lambda step: service.pools(self.site, step.node, "drain", self.wait),
            "ready": lambda step: service.put_into_pools(self.site, step),
            "vip": self._hand_over,
            "switch": self._switch,
            "queues": self._queues,
            "mark": self._mark,
            "unmark": lambda step: state.unmark(self.remote, step.node),
            "serve": lambda step: service.await_service(self.site, self.remote, step.node),
        }

    def _mark(self, step: Step) -> None:
        data = {"state": "drained", "since": time.strftime("%FT%T%z"), "by": getpass.getuser()}
        if self.purpose:
            data["for"] = self.purpose
        state.mark(self.remote, step.node, data)

    def _hand_over(self, step: Step) -> str:
        vip = str(self.site.vips["mail"])
        folder = state.MARK.rpartition("/")[0]
        script = _HAND_OVER.format(vip=vip, seconds=HANDOVER_SECONDS, folder=folder, mark=state.MARK)
        self.remote.run(step.node, script, timeout=120)
        deadline = time.monotonic() + 10
        while not (holder := state.read(self.site, self.remote).vip):
            if time.monotonic() > deadline:
                raise Stopped("no other balancer took the VIP within 10 s; there, journalctl -u keepalived says why")
        return f"{holder} has it"

    def _switch(self, step: Step) -> str:
        store, target = step.what.split()
        deadline = time.monotonic() + IN_SYNC_SECONDS
        while True:
            try:
                failover.switch(self.site, store, target, remote=self.remote)
                return ""
            except PosthouseError:
                # A replica that was restarted has to catch up first.
                if time.monotonic() > deadline:
                    raise
            time.sleep(2)

    def _queues(self, step: Step) -> str:
        left = queues.flush(self.site, self.remote, step.node, min(self.wait, 30))
        if not left:
            return "all delivered"
        have = state.read(self.site, self.remote)
        others = [name for name in self.site.nodes if name != step.node and name in have.answers - have.drained]
        moved, stay = queues.move(self.site, self.remote, step.node, others)
        return f"{moved} handed to another node, {stay} stay on its disk"

    def _put_back(self, begun: list[Step]) -> str:
        """Undoes what a drain had begun."""
        node = begun[0].node
        errors = []
        for step in begun:
            if step.do == "switch":
                back = Step("switch", node, "", f"{step.what.split()[0]} {node}")
                errors.append(service.quietly(lambda back=back: self._switch(back)))
            elif step.do == "pools":
                errors.append(service.quietly(lambda: service.pools(self.site, node, "ready")))
            elif step.do in ("vip", "mark"):
                errors.append(service.quietly(lambda: state.unmark(self.remote, node)))
        complaints = "; ".join(error for error in errors if error)
        if not complaints:
            return f"{node} is back in service"
        return f"it could not all be put back: {complaints}; run: posthouse undrain {node} --site {self.site.name}"


def drain(site: Site, node: str, check: bool = False, wait: int = 60) -> dict[str, Any]:
    """Takes a node out of service, or says how. wait: seconds in which its sessions may end by themselves."""
    state.known(site, node)
    return Drains(site, Remote(site), wait).drain(node, check)


def undrain(site: Site, node: str, check: bool = False) -> dict[str, Any]:
    """Puts a node back into service, or says how."""
    state.known(site, node)
    return Drains(site, Remote(site)).undrain(node, check)
