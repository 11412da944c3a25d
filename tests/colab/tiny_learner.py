"""A learner with a state of a few numbers: deterministic, sensitive to every bit of its past, and as slow as asked."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from sheily_train.colab.batches import COHERENCE, DENDRITES, Batch, Feedback
from sheily_train.core.omega.learner import Lesson, Prediction

POISON = 13.0
"""A batch whose first number this is changes half of the state, and then fails."""


class TinyLearner:
    fingerprint: ClassVar[dict[str, str]] = {"device": "cpu", "torch": "tiny"}
    parameter_counts = (64, 48)

    def __init__(self, seed: int, device: str = "auto", *, seconds: float = 0.0) -> None:
        self.weight = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.steps = torch.zeros(1, dtype=torch.int64)
        self.seconds = seconds
        self.gate: threading.Event | None = None

    def train(self, batch: Batch, step: int) -> Lesson:
        if self.gate is not None:
            self.gate.wait(20)
        time.sleep(self.seconds)
        noise = torch.randn(64, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for _epoch in range(batch.epochs):
            self.weight = torch.sin(self.weight * 3 + float(batch.input_data.sum()) + 0.1 * noise)
            if batch.input_data[0, 0] == POISON:
                raise RuntimeError("the device fell off the bus")
        self.steps += 1
        self.weight += float(batch.labels.sum())
        loss = float(self.weight.square().mean())
        values = self.weight.float().numpy()
        return Lesson(
            loss=loss,
            anomaly_prob=float(abs(values[0]) / (1 + abs(values[0]))),
            anomalies=int((batch.labels == 1).sum()),
            dendrites=np.tanh(values[:DENDRITES]),
            coherence=np.tanh(values[:COHERENCE]),
            objectives={"anomaly": loss / 2},
            activations=(0.25, 0.5, 1.0),
        )

    def feedback(self, feedback: Feedback, step: int) -> None:
        sign = 1 if feedback.validated else -1
        self.weight[:DENDRITES] += sign * torch.from_numpy(feedback.adjustments).double() / step
        self.steps += 1

    def predict(self, input_data: NDArray[np.float32]) -> Prediction:
        count = len(input_data)
        prob = 0.5 + 0.5 * np.tanh(input_data.mean(axis=1) / 2)
        wide = np.zeros((count, COHERENCE), np.float32)
        return Prediction(prob.astype(np.float32), wide[:, :DENDRITES], wide, 0.5)

    def state(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.clone(), "steps": self.steps.clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        if state["weight"].shape != self.weight.shape:
            raise ValueError("another network")
        self.weight, self.steps = state["weight"].clone(), state["steps"].clone()
