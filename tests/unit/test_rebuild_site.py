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
from posthouse.ops.rebuild_site import plan, way_on
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


@pytest.mark.parametrize("failing", STEPS[: STEPS.index("open")])
def test_before_anybody_is_let_in_the_same_command_goes_on(site: Site, last_words: Any, failing: str) -> None:
    assert last_words(failing, standing(site, *site.nodes)) == GOES_ON


@pytest.mark.parametrize("failing", ["replicas", "verify"])
def test_a_site_that_serves_is_not_rebuilt_again(site: Site, last_words: Any, failing: str) -> None:
    have = standing(site)
    words = last_words(failing, have)
    assert words.startswith("the site serves, and the same command would be refused; ")
    assert "posthouse stores lab" in words
    assert "posthouse verify lab" in words
    with pytest.raises(Refused, match="is alive"):
        plan(site, have, BACKUP, PARTS)


def test_letting_in_that_has_not_begun_goes_on(site: Site, last_words: Any) -> None:
    have = standing(site, *site.nodes)
    assert last_words("open", have) == GOES_ON
    assert plan(site, have, BACKUP, PARTS)


def test_letting_in_that_reached_every_node_is_not_done_again(site: Site, last_words: Any) -> None:
    have = standing(site)
    assert last_words("open", have).startswith("everybody is let in, and the same command would be refused; see: ")
    with pytest.raises(Refused, match="is alive"):
        plan(site, have, BACKUP, PARTS)


@pytest.mark.parametrize(("shut", "silent"), [(("mail3",), ()), ((), ("mail3",)), (("mail3",), ("mail2",))])
def test_letting_in_that_got_half_way_names_who_is_left(
    site: Site, last_words: Any, shut: tuple[str, ...], silent: tuple[str, ...]
) -> None:
    words = last_words("open", standing(site, *shut, silent=silent))
    assert words.startswith(f"people are let in, but {', '.join([*silent, *shut])} may still let in nobody; ")
    assert f"remove {FILLING} there" in words
    assert GOES_ON not in words


def test_the_same_command_would_fill_a_site_once_more_that_is_open_in_part(site: Site) -> None:
    have = standing(site, "mail3")
    assert "directory" in [step.do for step in plan(site, have, BACKUP, PARTS)]
    assert "take all accounts back to the backup" in way_on(site, "open", have)
    # One that does not answer may be the last that is not open; nobody knows before it is back.
    with pytest.raises(Refused, match="is alive"):
        plan(site, standing(site, silent=("mail3",)), BACKUP, PARTS)
