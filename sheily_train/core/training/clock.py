"""What the clock says during a run: rates, time left, and when the next checkpoint is due."""

from __future__ import annotations

import time
from typing import Any

import psutil

_WRITING_SHARE = 0.05
"""At most this part of the time goes into checkpoints that are written by the minute."""

_SECONDS_BETWEEN_TIMINGS = 1.0


class Clock:
    """Counts from the moment it is made.

    Args:
        seconds_before: of earlier sittings of the same run.
        step, steps: where the run stands and where it ends.
        save_steps, save_minutes: how often a checkpoint is wanted; steps count when they are not 0.
    """

    def __init__(self, *, seconds_before: float, step: int, steps: int, save_steps: int, save_minutes: float) -> None:
        self._seconds_before = seconds_before
        self._first_step = self._step = step
        self._steps = steps
        self._save_steps, self._save_seconds = save_steps, save_minutes * 60
        self._started = self._saved = self._timed = self._counted = time.monotonic()
        self._saved_step = step
        self._writing = 0.0
        self._tokens = self._examples = 0
        self._share = 1.0

    @property
    def seconds(self) -> float:
        """Seconds of training over all sittings; of time that several branches shared, this one's part."""
        return self._seconds_before + self._share * (time.monotonic() - self._counted)

    def count(self, tokens: int, examples: int, share: float = 1.0) -> None:
        """One more step is done; ``share`` of it was this branch's."""
        self._share = share
        self._seconds_before, self._counted = self.seconds, time.monotonic()
        self._step += 1
        self._tokens += tokens
        self._examples += examples

    def timing(self) -> dict[str, Any] | None:
        """Rates and time left, about once a second; ``None`` in between."""
        now = time.monotonic()
        if now - self._timed < _SECONDS_BETWEEN_TIMINGS and self._step < self._steps:
            return None
        self._timed = now
        elapsed = now - self._started
        left = (self._steps - self._step) * elapsed / max(1, self._step - self._first_step)
        return {
            "step": self._step,
            "steps": self._steps,
            "tokens_per_second": round(self._tokens / elapsed, 1),
            "examples_per_second": round(self._examples / elapsed, 2),
            "seconds": round(self.seconds, 2),
            "eta_seconds": round(left, 1),
            "memory_mb": psutil.Process().memory_info().rss // 2**20,
        }

    def checkpoint_due(self) -> bool:
        """Whether it is time to save, between two steps."""
        if self._save_steps:
            return self._step - self._saved_step >= self._save_steps
        return time.monotonic() - self._saved >= max(self._save_seconds, self._writing / _WRITING_SHARE)

    def checkpoint_written(self, seconds: float) -> None:
        """A checkpoint was written and took this long."""
        self._saved, self._saved_step, self._writing = time.monotonic(), self._step, seconds
