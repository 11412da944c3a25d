"""What a run is asked to learn: its events, which follow from its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sheily_train.colab.batches import VECTOR, Batch, make_batch
from sheily_train.colab.protocol import Kind

SEED = 7


@dataclass(frozen=True)
class Workload:
    """A run's events.

    Attributes:
        events: how many.
        size: vectors a batch.
        feedback_every: each so many-th event is feedback; 0 for none.
        form: how batches travel.
        full_size: whether the network is the real one of 12 million parameters, or a narrow one.
    """

    name: str
    events: int
    size: int
    feedback_every: int = 0
    epochs: int = 1
    form: str = "binary"
    full_size: bool = False

    def kind(self, seq: int) -> Kind:
        """What event ``seq`` is."""
        return Kind.FEEDBACK if self.feedback_every and seq % self.feedback_every == 0 else Kind.TRAIN

    def batches(self, first: int, last: int) -> Batch:
        """The vectors of the batches ``first`` to ``last``, one after the other."""
        draws = [np.random.default_rng((self.size, self.events, seq)) for seq in range(first, last + 1)]
        rows = [draw.normal(size=(self.size, VECTOR)).astype(np.float32) for draw in draws]
        labels = [draw.integers(-1, 2, self.size).astype(np.int8) for draw in draws]
        return make_batch(np.concatenate(rows), np.concatenate(labels))

    def train_until(self, first: int, last: int) -> int:
        """The last of the batches that follow each other from ``first`` on, up to ``last``."""
        return next((seq - 1 for seq in range(first, last + 1) if self.kind(seq) is Kind.FEEDBACK), last)

    def feedback(self, answers: Sequence[dict[str, Any]]) -> tuple[list[float], bool]:
        """What a person says of the latest of the run's answers: its adjustments, and whether the loss fell."""
        *before, now = answers
        return now["dendrites"], not before or now["loss"] < before[-1]["loss"]


WORKLOADS = (
    Workload("feedback", 24, 6, feedback_every=5),
    Workload("json", 22, 4, form="json"),
    Workload("large", 28, 8),
    Workload("epochs", 20, 5, feedback_every=3, epochs=2),
)
FULL_SIZE = Workload("full size", 20, 8, feedback_every=7, full_size=True)
