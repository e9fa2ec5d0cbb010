"""What balancer_server reads from HAProxy 3.0, and what it plans from that."""

import importlib.util
from types import ModuleType

import pytest

from posthouse import roles

# Recorded: mail1 drained by command in one pool, mail2 down, mail3 in maintenance in the other.
STATES = """\
1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight
2 smtp 1 mail1 10.77.0.21 2 8 1 1
2 smtp 2 mail2 10.77.0.22 0 0 1 1
2 smtp 3 mail3 10.77.0.23 2 0 1 1
3 submission 1 mail1 10.77.0.21 2 0 1 1
3 submission 3 mail3 10.77.0.23 0 1 1 1

"""
STATISTICS = """\
# pxname,svname,qcur,qmax,scur,smax
smtp,FRONTEND,,,3,9
smtp,mail1,0,0,2,9
smtp,mail2,0,0,0,9
smtp,mail3,0,0,1,9
submission,mail1,0,0,4,9
submission,mail3,0,0,0,9

"""


@pytest.fixture(scope="module")
def balancer() -> ModuleType:
    path = roles.ROOT / "library" / "modules" / "balancer_server.py"
    spec = importlib.util.spec_from_file_location("balancer_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_read(balancer: ModuleType) -> None:
    found = {(s.pool, s.name): (s.state, s.serves, s.sessions) for s in balancer.parse(STATES, STATISTICS)}
    assert found == {
        ("smtp", "mail1"): ("drain", False, 2),
        ("smtp", "mail2"): ("ready", False, 0),
        ("smtp", "mail3"): ("ready", True, 1),
        ("submission", "mail1"): ("ready", True, 4),
        ("submission", "mail3"): ("maint", False, 0),
    }


@pytest.mark.parametrize(
    ("node", "state", "force", "pools"),
    [
        ("mail1", "ready", False, ["smtp"]),
        ("mail2", "ready", False, []),
        ("mail2", "drain", False, ["smtp"]),  # it is down: draining it takes nothing away
        ("mail3", "ready", False, ["submission"]),
        ("mail3", "drain", True, ["smtp", "submission"]),
    ],
)
def test_plan(balancer: ModuleType, node: str, state: str, force: bool, pools: list[str]) -> None:
    have = balancer.parse(STATES, STATISTICS)
    assert [server.pool for server in balancer.plan(have, node, state, force)] == pools


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("mail1", "submission: mail1 is the only one that serves; put another one back first"),
        ("mail3", "smtp: mail3 is the only one that serves"),
        ("mail9", "no pool has a server mail9; there are: mail1, mail2, mail3"),
    ],
)
def test_plan_refuses(balancer: ModuleType, node: str, message: str) -> None:
    with pytest.raises(balancer.Problem, match=message):
        balancer.plan(balancer.parse(STATES, STATISTICS), node, "drain", False)
