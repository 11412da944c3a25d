from __future__ import annotations

import os
import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sheily_train.tools.monitoring.terminal import LiveView, PlainView, SilentView, view_for

START: dict[str, Any] = {
    "event": "start",
    "branch": "physics",
    "model": "smollm2-135m",
    "init_adapter": "",
    "early_stopping": 0,
    "placement": {"reason": "CPU con [2] hilos"},
    "format": "prompt/completion",
    "examples": 64,
    "heldout_examples": 16,
    "tokens": 3000,
    "answer_tokens": 1200,
    "longest_row": 90,
    "steps": 24,
    "step": 0,
    "parameters": 1000,
    "trainable_parameters": 10,
    "memory_bytes": 1e9,
    "memory_free_bytes": 2e9,
    "disk_bytes": 1e6,
    "disk_free_bytes": 2e9,
}
NOTE = {"event": "note", "text": "Una nota con [corchetes]."}


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 2.5}


def timing(number: int, seconds: float, steps: int = 24) -> dict[str, Any]:
    return {
        "event": "timing",
        "branch": "physics",
        "step": number,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": 512.3,
        "eta_seconds": 75.0,
        "memory_mb": 900,
    }


def shown(*records: dict[str, Any]) -> str:
    """What a live view leaves on a terminal, without its colours and cursor moves."""
    stream = StringIO()
    with LiveView(Console(force_terminal=True, file=stream, width=120, height=20)) as view:
        for record in records:
            view(record)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_the_live_bar_tells_loss_rate_time_left_and_memory() -> None:
    """Beside branch and steps, on one line."""
    last = shown(START, step(3), timing(3, 1.0)).rstrip().splitlines()[-1]
    assert last.startswith("physics")
    assert last.endswith("3/24 pérdida 2.5000 · 512 tokens/s · quedan 1 min 15 s · 900 MB")


def test_what_is_told_stands_above_the_live_bar() -> None:
    """First lines and notes stay, brackets as they are; a rate is no line."""
    told = [
        line for line in shown(START, step(1), timing(1, 1.0), NOTE).splitlines() if not line.startswith("physics ")
    ]
    beginnings = [line.partition(":")[0] for line in told if line]
    assert beginnings == [
        *("Rama physics", "Dónde", "Trabajo", "Parámetros", "Memoria", "Disco"),
        "Una nota con [corchetes].",
    ]
    assert "Dónde: CPU con [2] hilos" in told


def test_a_resumed_run_and_a_next_branch_have_bars_of_their_own() -> None:
    """The bar begins where the run goes on; the one before it goes."""
    music = START | {"event": "resume", "branch": "music", "step": 9}
    bars = [line for line in shown(START, step(24), music).splitlines() if re.match("(music|physics) ", line)]
    begun = next(index for index, bar in enumerate(bars) if bar.startswith("music"))
    assert all(bar.startswith("music") and "9/24" in bar for bar in bars[begun:])


def test_records_before_a_start_are_told_too() -> None:
    """A note may come first; a step without a run is nothing to show."""
    assert "Una nota" in shown(step(1), NOTE)
    assert "Paso 1/24" in shown(timing(1, 1.0))


def test_plain_lines_are_told_at_once_and_rates_every_ten_seconds() -> None:
    """Of training, not of the clock; the last step's always, and each branch anew."""
    stream = StringIO()
    seconds = [0.5, 9.9, 10.0, 19.9, 20.1, 20.2]
    with PlainView(stream) as view:
        for number, at in enumerate(seconds, 1):
            view(timing(number, at, steps=6))
        view(NOTE)
        view(timing(1, 1.0, steps=6))
        view(timing(2, 2.0, steps=6))
    told = [line.partition(":")[0] for line in stream.getvalue().splitlines()]
    assert told == ["Paso 3/6", "Paso 5/6", "Paso 6/6", "Una nota con [corchetes].", "Paso 1/6"]


def test_plain_lines_of_several_branches_begin_with_their_names() -> None:
    """So that those of branches side by side can be told apart; the seconds between rates are each one's own."""
    stream = StringIO()
    with PlainView(stream, several=True) as view:
        for branch in ("music", "physics"):
            view(NOTE | {"branch": branch})
            view(timing(3, 10.0) | {"branch": branch})
    told = [line.split(":")[:2] for line in stream.getvalue().splitlines()]
    assert told == [
        [branch, told] for branch in ("music", "physics") for told in (" Una nota con [corchetes].", " Paso 3/24")
    ]


def test_the_silent_view_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Of anything."""
    with SilentView() as view:
        for record in (START, step(1), timing(1, 1.0), NOTE):
            view(record)
    assert capsys.readouterr() == ("", "")


def test_the_view_suits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live on a terminal, plain in a pipe, silent when asked, whatever the stream."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:  # noqa: PTH123
        assert isinstance(view_for(terminal, quiet=False), LiveView)
        assert isinstance(view_for(terminal, quiet=True), SilentView)
    os.close(ours)
    assert isinstance(view_for(StringIO(), quiet=False), PlainView)
