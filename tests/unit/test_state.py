"""What nodes say about themselves, taken apart."""

from __future__ import annotations

import pytest

from posthouse.model import Site
from posthouse.ops import state
from posthouse.ops.steps import Refused


def test_which_stores_a_node_was_converged_to_carry(site: Site) -> None:
    said = "deployed yes\ncarries /etc/cyrus/s01/store.json\ncarries /etc/cyrus/s03/store.json\n"
    have = state.parse(site, dict.fromkeys(site.nodes) | {"mail1": said})
    assert have.carries == {("s01", "mail1"), ("s03", "mail1")}
    assert have.answers == {"mail1"}


def test_what_a_former_primary_noted_is_not_late(site: Site) -> None:
    late = "late /srv/store/s01/config/sync/mail2/log\n"
    serves = f"address {site.stores['s01'].address}\n"
    nobody: dict[str, str | None] = dict.fromkeys(site.nodes)
    assert state.parse(site, nobody | {"mail1": late + serves}).late == {("s01", "mail2")}
    assert state.parse(site, nobody | {"mail1": late}).late == {("s01", "mail2")}
    assert state.parse(site, nobody | {"mail1": late, "mail2": serves}).late == set()


def test_who_does_not_answer_is_named_with_a_command_that_can_be_pasted(site: Site) -> None:
    with pytest.raises(Refused, match=f"posthouse rebuild mail2 --site {site.name}; nothing was changed"):
        state.need_answers(site, state.State(), ["mail2"])
