"""The real learner, whose state also says by itself which events were applied to it."""

from __future__ import annotations

import torch
from torch import Tensor

from sheily_train.colab.batches import Batch, Feedback
from sheily_train.core.omega import learner, model
from sheily_train.core.omega.learner import Learner, Lesson

APPLIED = "count.applied"

_NARROWED = {"HIDDEN": 128, "_WIDE": 64, "_NARROW": 32}


class CountedLearner(Learner):
    """A :class:`Learner` that notes each event's number in a tensor of its state, whatever a ledger says."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        super().__init__(seed, device)
        self._applied = torch.zeros(0, dtype=torch.int64)

    def train(self, batch: Batch, step: int) -> Lesson:
        """Learn from a batch, and note its number."""
        self._note(step)
        return super().train(batch, step)

    def feedback(self, feedback: Feedback, step: int) -> None:
        """Learn from feedback, and note its number."""
        self._note(step)
        super().feedback(feedback, step)

    def state(self) -> dict[str, Tensor]:
        """The learner's state and the numbers."""
        return {**super().state(), APPLIED: self._applied.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take both."""
        super().load({name: tensor for name, tensor in state.items() if name != APPLIED})
        self._applied = state[APPLIED].clone()

    def _note(self, step: int) -> None:
        self._applied = torch.cat([self._applied, torch.tensor([step])])


def narrow_the_network() -> None:
    """Make the networks of this process narrow, so that a step takes milliseconds; all their parts are there."""
    for name, width in _NARROWED.items():
        for module in (model, learner):
            if hasattr(module, name):
                setattr(module, name, width)
