"""What `rebuild --site` says when it comes to grief: the same command goes on until somebody may have been let in."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest

from posthouse.model import Site
from posthouse.ops import rebuild_site, service
from posthouse.ops.backup import Backup
from posthouse.ops.rebuild_site import plan
from posthouse.ops.state import FILLING, State
from posthouse.ops.steps import GOES_ON, Refused, Stopped

BACKUP = "20261126T020000Z"
PARTS = {"directory": 9, "queues:mail1": 0, "store:s01": 0}
STEPS = ["machines", "close", "deploy", "directory", "stores", "queues", "open", "replicas", "verify"]


def standing(site: Site, *shut: str, silent: tuple[str, ...] = ()) -> State:
    """All nodes were converged; some still let nobody in, and some do not answer."""
    answers = frozenset(site.nodes) - set(silent)
    return State(answers=answers, deployed=answers, filling=dict.fromkeys(shut, BACKUP))


@pytest.fixture
def last_words(site: Site, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a rebuild of which one step fails; returns what it ends with. have: what the nodes say then."""

    def run(failing: str, have: State) -> str:
        def act(do: str) -> Any:
            if do == failing:
                raise Stopped("it rains")
            return {}

        for do in ("machines", "close", "stores", "open", "replicas"):
            monkeypatch.setattr(rebuild_site._Rebuild, f"_{do}", lambda self, step: act(step.do))
        for do in ("deploy", "verify"):
            monkeypatch.setattr(service, do, lambda *_, do=do, **__: act(do))
        monkeypatch.setattr(rebuild_site.state, "read", lambda *_: have)
        made = rebuild_site._Rebuild.__new__(rebuild_site._Rebuild)
        made.site, made.started, made.backup = site, time.time(), Backup(BACKUP)
        made.remote = object()
        made._stack = contextlib.ExitStack()
        made._filling = SimpleNamespace(directory=lambda: act("directory"), queue=lambda *_: act("queues"))
        made.steps = plan(site, State(), BACKUP, PARTS)
        assert [step.do for step in made.steps] == STEPS
        with pytest.raises(Stopped, match="it rains") as caught:
            made.run(check=False)
        return str(caught.value).partition("\n  now: ")[2]

    return run


@pytest.mark.parametrize("failing", STEPS[: STEPS.index("replicas")])
def test_before_anybody_is_let_in_the_same_command_goes_on(site: Site, last_words: Any, failing: str) -> None:
    assert last_words(failing, standing(site, *site.nodes)) == GOES_ON


@pytest.mark.parametrize("failing", ["open", "replicas", "verify"])
def test_a_site_that_lets_everybody_in_is_not_filled_again_and_the_last_words_say_so(
    site: Site, last_words: Any, failing: str
) -> None:
    have = standing(site)
    assert last_words(failing, have).startswith("the same command would be refused: lb1: is alive, ")
    with pytest.raises(Refused, match="is alive"):
        plan(site, have, BACKUP, PARTS)


def test_nor_is_one_that_lets_in_some_and_who_is_left_is_named(site: Site, last_words: Any) -> None:
    have = standing(site, "mail3", silent=("mail2",))
    words = last_words("open", have)
    assert words.startswith(
        "the same command would be refused: lb1: is alive and lets people in, though mail3 does not "
    )
    assert f"remove {FILLING} there" in words
    with pytest.raises(Refused, match="lets people in"):
        plan(site, have, BACKUP, PARTS)


def test_one_that_comes_back_with_its_data_while_it_is_closed_is_named(site: Site, last_words: Any) -> None:
    assert "would be refused: lb1: is alive" in last_words("close", standing(site))
