from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sheily_train.core.training import clock
from sheily_train.core.training.clock import Clock


class Time:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=time.monotonic))
    return time


def make(**changes: Any) -> Clock:
    return Clock(**{"seconds_before": 0.0, "step": 0, "steps": 100, "save_steps": 0, "save_minutes": 1.0} | changes)


def test_seconds_add_up_over_all_sittings(time: Time) -> None:
    """Those of before a kill count."""
    seconds = make(seconds_before=50.0)
    time.now += 2.5
    assert seconds.seconds == 52.5


def test_rates_and_time_left_are_told_once_a_second(time: Time) -> None:
    """Nothing in between; then tokens, examples and seconds of this sitting."""
    running = make()
    for _step in range(10):
        running.count(tokens=50, examples=4)
    time.now += 0.9
    assert running.timing() is None
    time.now += 1.1
    timing = running.timing()
    assert timing is not None
    assert timing.pop("memory_mb") > 10
    assert timing == {
        "step": 10,
        "steps": 100,
        "tokens_per_second": 250.0,
        "examples_per_second": 20.0,
        "seconds": 2.0,
        "eta_seconds": 18.0,
    }
    assert running.timing() is None


def test_the_last_step_is_always_told(time: Time) -> None:
    """However short ago the last timing was; no time is left then."""
    running = make(steps=1)
    time.now += 0.1
    running.count(tokens=1, examples=1)
    timing = running.timing()
    assert timing is not None
    assert timing["eta_seconds"] == 0.0


def test_the_time_left_comes_from_this_sittings_steps(time: Time) -> None:
    """A resumed run has not done its earlier steps in no time."""
    running = make(step=90, seconds_before=900.0)
    running.count(tokens=1, examples=1)
    time.now += 10.0
    timing = running.timing()
    assert timing is not None
    assert (timing["eta_seconds"], timing["seconds"]) == (90.0, 910.0)


def test_checkpoints_by_steps(time: Time) -> None:
    """Every third step since the last one saved, also after a resume; time does not count."""
    running = make(step=4, save_steps=3)
    due = []
    for _step in range(7):
        running.count(tokens=1, examples=1)
        time.now += 1000.0
        due.append(running.checkpoint_due())
        if due[-1]:
            running.checkpoint_written(seconds=100.0)
    assert due == [False, False, True, False, False, True, False]


def test_checkpoints_by_time(time: Time) -> None:
    """A minute after the start, and a minute after the last one."""
    running = make()
    for _checkpoint in range(2):
        time.now += 59.0
        assert not running.checkpoint_due()
        time.now += 1.0
        assert running.checkpoint_due()
        running.checkpoint_written(seconds=0.1)


def test_slow_checkpoints_are_written_less_often(time: Time) -> None:
    """One that took ten seconds is not repeated before two hundred have passed, even when every step is asked."""
    running = make(save_minutes=0.0)
    assert running.checkpoint_due()
    running.checkpoint_written(seconds=10.0)
    time.now += 199.0
    assert not running.checkpoint_due()
    time.now += 1.0
    assert running.checkpoint_due()
