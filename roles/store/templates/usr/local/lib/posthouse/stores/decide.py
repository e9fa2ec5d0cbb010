"""Who serves a store: what one of its nodes does next, from what it knows. No side effects.

The nodes of a store agree on one record, which etcd keeps (`{store}/state`):

    primary   the node that serves
    term      goes up with each change of the primary
    beat      goes up with each sign of life of the primary
    in_sync   replicas that have every message that was acknowledged: any of them may take over
    base      {node: the copy it has}: these nodes' copies lack nothing but what the primary's log has for them
    to        the node that an operator wants to be the primary; absent otherwise
    lag       {replica: seconds}, for people

and each notes which copy of the mail it has (`{store}/copy/{node}`): a node that lost power, or its disk, gets another
name for its copy, for nobody can say any more that it is complete.

A primary beats every 0.8 s, by a change of the record that succeeds only if nobody else made one. One that could not
do so for HOLD seconds stops serving by itself. A replica in sync takes over, by such a change, when it has watched
the record stay the same for TTL seconds. The time counts from when the one began to beat, and from when the other saw
it: so the first is over before the second, however long messages take. (Not etcd's own leases: a new leader of etcd
gives all of them their full time again, and the leader is often what died.)
"""

TTL = 5.0
HOLD = 3.8
BEAT = 0.8
# How long a primary that lost power leaves it to replicas that did not.
PATIENCE = 3 * TTL
# Replicas that are further behind than this are not waited for any more.
LATE = 8.0


def decide(view):
    """(action, reason) for a view of the store from one node.

    view: {"me": node, "nodes": [all of the store, the preferred one first], "role": "primary" or "replica" (what it
    runs as now), "reached": whether etcd answered, "left": seconds until this node's own time is up, "age": seconds
    since the record was last seen to change, "up": seconds since this keeper began, "state": the record or None,
    "copies": {node: copy}}.

    Actions: `create` the record, `renew` it (and serve), `take` over, `stop` serving, `wait`.
    """
    me, state, role = view["me"], view["state"], view["role"]
    if not view["reached"]:
        if role == "primary" and view["left"] <= 0:
            return "stop", "could not renew its time in time"
        return "wait", "etcd does not answer"
    if state is None:
        if me == view["nodes"][0]:
            return "create", "nobody has served this store before"
        return "wait", f"{view['nodes'][0]} has to begin"
    if state["primary"] == me:
        if state["base"].get(me) != view["copies"].get(me) and view["up"] < PATIENCE:
            better = [node for node in state["in_sync"] if complete(view, node)]
            if better:
                return "wait", f"lost power, and leaves it to {', '.join(better)}"
        return "renew", "serves"
    if role == "primary":
        return "stop", f"{state['primary']} serves now"
    if view["age"] >= TTL and me in state["in_sync"]:
        if complete(view, me):
            return "take", f"{state['primary']} has given no sign of life for {view['age']:.1f} s"
        return "wait", "lost power since it was in sync"
    return "wait", f"{state['primary']} serves"


def complete(view, node):
    """Whether the copy that a node has is the one that is known to be complete."""
    copy = view["copies"].get(node)
    return copy is not None and view["state"]["base"].get(node) == copy


def created(me, copies):
    """The first record of a store."""
    return {"primary": me, "term": 1, "beat": 0, "in_sync": [], "base": {me: copies.get(me)}, "lag": {}}


def taken(state, me, copies):
    """The record of a node that took over: until they are compared, nobody else is known to have what it has."""
    return {
        "primary": me,
        "term": state["term"] + 1,
        "beat": 0,
        "in_sync": [],
        "base": {me: copies[me]},
        "lag": {},
    }


def handed_over(state, to, copies):
    """The record after a planned change: everything is where it was, so all that were in sync still are."""
    in_sync = [state["primary"], *(node for node in state["in_sync"] if node != to)]
    return {
        "primary": to,
        "term": state["term"] + 1,
        "beat": 0,
        "in_sync": in_sync,
        "base": {node: copies[node] for node in (to, *in_sync)},
        "lag": {},
    }


def renewed(state, copies, confirmed, based, lag):
    """The record of a primary that goes on.

    confirmed: replicas that were brought up to the present while acknowledgements already waited for them; based:
    {node: the copy that was compared whole}; lag: {node: seconds}. A replica that is late, or has another copy, is in
    sync no more.
    """
    me = state["primary"]
    base = {**state["base"], **based, me: copies.get(me)}
    base = {node: copy for node, copy in base.items() if copies.get(node) == copy}
    in_sync = [
        node
        for node in dict.fromkeys([*state["in_sync"], *confirmed])
        if node in base and node != me and lag.get(node, 0.0) < LATE
    ]
    return {
        **state,
        "beat": state["beat"] + 1,
        "in_sync": in_sync,
        "base": base,
        "lag": {node: round(seconds, 1) for node, seconds in lag.items()},
    }
