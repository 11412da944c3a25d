"""Several branches over one base, side by side or one after the other: one that fails does not stop the others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sheily_train import paths
from sheily_train.core.training import specialist
from sheily_train.core.training.identity import identify
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.run import Run, StopSignal
from sheily_train.core.training.specialist import TrainingResult
from sheily_train.errors import INTERNAL_ERROR, SheilyError, internal_error_text
from sheily_train.runlog import Listener, RunLog

State = Literal["trained", "current", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How one branch ended: with a result or with an error; its part of the seconds that its group took by then."""

    branch: str
    result: TrainingResult | None
    error: SheilyError | None
    seconds: float = 0.0

    @property
    def state(self) -> State:
        """Whether it was trained now, was up to date already, or failed."""
        if self.result is None:
            return "failed"
        return "current" if self.result.skipped else "trained"

    def to_record(self) -> dict[str, Any]:
        """What the fleet's log says of it."""
        metrics = self.result.metrics if self.result else {}
        return {
            "branch": self.branch,
            "state": self.state,
            "heldout_before": metrics.get("heldout_before"),
            "heldout_after": metrics.get("heldout_after"),
            "tokens": metrics.get("tokens"),
            "seconds": round(self.seconds, 2),
            "log": str(self.result.log) if self.result else None,
            "error": str(self.error) if self.error else None,
        }


def new_log() -> Path:
    """The log of a fleet that starts now."""
    return paths.logs_dir() / f"fleet_{datetime.now():%Y%m%d-%H%M%S-%f}.jsonl"


def train_branches(
    requests: Sequence[TrainRequest],
    *,
    log: Path | None = None,
    listeners: tuple[Listener, ...] = (),
    fresh: bool = False,
) -> Iterator[Outcome]:
    """Train each request's branch and yield how it ended. Only an interruption ends the whole.

    Args:
        requests: one per branch; those with one base share it in memory, and those that differ in their branch only
            take their steps together where that is faster.
        log: the fleet's own log, one record per branch; none is written without it.
        listeners: called with every record of the fleet's log and of each branch's.
        fresh: train anew what is up to date.
    """
    if log is None:
        yield from _train_each(requests, listeners, fresh)
        return
    with RunLog(log, listeners=listeners) as records:
        records.write("fleet_start", at=_now(), branches=[request.branch for request in requests])
        states: Counter[str] = Counter()
        for outcome in _train_each(requests, listeners, fresh):
            states[outcome.state] += 1
            records.write("fleet_branch", at=_now(), **outcome.to_record())
            records.sync()
            yield outcome
        records.write("fleet_done", at=_now(), **states)
        records.sync()


def _train_each(requests: Sequence[TrainRequest], listeners: tuple[Listener, ...], fresh: bool) -> Iterator[Outcome]:
    """Those that are up to date first: nothing that takes seconds to load is needed for them."""
    left: list[TrainRequest] = []
    for request in requests:
        result = None if fresh else _current(request)
        if result is None:
            left.append(request)
        else:
            yield Outcome(request.branch, result, None)
    if left:
        yield from _train_rest(left, listeners, fresh)


def _current(request: TrainRequest) -> TrainingResult | None:
    """The request's result, when it is there and nothing of the run is left to be ended or cleared away."""
    try:
        key = identify(request).key
    except SheilyError:
        return None  # it is told when its turn comes
    return None if Run(request.model_folder, key).folder.exists() else specialist.result_of(request.model_folder, key)


def _train_rest(requests: Sequence[TrainRequest], listeners: tuple[Listener, ...], fresh: bool) -> Iterator[Outcome]:
    from sheily_train.core.training.grouping import plan
    from sheily_train.core.training.shared_base import SharedBase
    from sheily_train.core.training.trainer import train_together

    shared, stop = SharedBase(), StopSignal()
    for group in plan(requests, fresh=fresh, shared=shared):
        begun = time.monotonic()
        for request, ended in train_together(group, listeners=listeners, fresh=fresh, shared=shared, stop=stop):
            seconds = (time.monotonic() - begun) / len(group)
            if isinstance(ended, Exception):
                yield Outcome(request.branch, None, told(ended), seconds)
            else:
                yield Outcome(request.branch, ended, None, seconds)


def told(error: Exception) -> SheilyError:
    """The error itself when it is meant for people, else one that says what happened and leaves with 70."""
    if isinstance(error, SheilyError):
        return error
    unexpected = SheilyError(internal_error_text(error))
    unexpected.exit_code = INTERNAL_ERROR
    unexpected.__cause__ = error
    return unexpected


def _now() -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}"
