from __future__ import annotations

import re
from io import StringIO
from typing import Any

from rich.console import Console

from sheily_train.tools.monitoring.fleet_view import FleetView
from sheily_train.tools.monitoring.terminal import LiveView, PlainView, view_for


def start(branch: str) -> dict[str, Any]:
    return {"event": "start", "branch": branch, "step": 0, "steps": 24}


def timing(branch: str, step: int) -> dict[str, Any]:
    rates = {"tokens_per_second": 512.3, "eta_seconds": 75.0}
    return {"event": "timing", "branch": branch, "step": step, "steps": 24, **rates}


def ended(branch: str, state: str, **more: Any) -> dict[str, Any]:
    losses: dict[str, Any] = {"heldout_before": {"loss": 3.4}, "heldout_after": {"loss": 2.6}}
    numbers = {"seconds": 10.0, "tokens": 2000, "error": None}
    return {"event": "fleet_branch", "branch": branch, "state": state, **losses, **numbers, **more}


def last_table(*records: dict[str, Any], names: tuple[str, ...] = ("art", "music", "physics"), height: int = 40) -> str:
    """The table as it stands in the end."""
    stream = StringIO()
    console = Console(force_terminal=True, file=stream, width=100, height=height)
    with FleetView(console) as view:
        for record in ({"event": "fleet_start", "branches": list(names)}, *records):
            view(record)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return text[text.rindex("Rama") :]


def test_the_table_tells_each_branch_state_loss_rate_and_time_left() -> None:
    """One has ended, one is at work, one waits; below, how many have ended and how long the rest may take."""
    step = {"event": "step", "branch": "music", "step": 7, "loss": 2.5}
    told = last_table(start("art"), ended("art", "trained"), start("music"), step, timing("music", 7))
    _head, art, music, physics, summary = told.strip().splitlines()
    assert art.split() == ["art", "entrenada", "3.4000", "→", "2.6000", "200"]
    assert re.split(r"\s{2,}", music.strip()) == ["music", "paso 7/24", "2.5000", "512", "1 min 15 s"]
    assert physics.split() == ["physics", "en", "espera"]
    assert summary == "1 de 3 ramas; quedan unos 20 s"


def test_branches_side_by_side_have_a_row_each_that_moves() -> None:
    """What is told of one changes no other's row."""
    losses = [{"event": "step", "branch": name, "loss": loss} for name, loss in (("art", 2.5), ("music", 3.5))]
    told = last_table(start("art"), start("music"), *losses, timing("art", 7), timing("music", 8))
    _head, art, music, *_rest = told.strip().splitlines()
    assert re.split(r"\s{2,}", art.strip())[:3] == ["art", "paso 7/24", "2.5000"]
    assert re.split(r"\s{2,}", music.strip())[:3] == ["music", "paso 8/24", "3.5000"]


def test_what_failed_says_why_and_what_is_current_says_so() -> None:
    """A failed branch shows the beginning of its error, an unchanged one its losses."""
    failed = ended("art", "failed", error="train.jsonl:1: [no] es JSON", heldout_before=None, heldout_after=None)
    told = last_table(failed, ended("music", "current"), names=("art", "music"))
    _head, art, music, summary = told.strip().splitlines()
    assert art.strip().split(maxsplit=2)[1:] == ["falló", "train.jsonl:1: [no] es JSON"]
    assert music.split()[1:3] == ["al", "día"]
    assert summary == "2 de 2 ramas"


def test_fifty_branches_on_a_small_terminal_show_the_one_at_work() -> None:
    """The table is as long as the terminal allows, and the branch at work is always in it."""
    names = tuple(f"branch-{number:02}" for number in range(50))
    for at in (0, 25, 49):
        lines = last_table(start(names[at]), names=names, height=24).strip().splitlines()
        assert len(lines) <= 22
        assert sum("paso 0/24" in line for line in lines) == 1


def test_several_branches_get_the_table_on_a_terminal_only(monkeypatch: Any) -> None:
    """One branch keeps its bar, a pipe its lines."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert isinstance(view_for(StringIO(), quiet=False, several=True), FleetView)
    assert isinstance(view_for(StringIO(), quiet=False), LiveView)
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    assert isinstance(view_for(StringIO(), quiet=False, several=True), PlainView)
