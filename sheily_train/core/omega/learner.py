"""Placeholder while the network is being designed: the interface is final, the inside is not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sheily_train.colab.batches import COHERENCE, DENDRITES, VECTOR, Batch, Feedback


@dataclass(frozen=True)
class Lesson:
    """What one batch gave.

    Attributes:
        loss: the whole objective, of the last epoch.
        anomaly_prob: the batch's mean probability.
        anomalies: how many vectors are above the threshold.
        dendrites: float32 [16], the batch's mean.
        coherence: float32 [64], the batch's mean.
        objectives: each part of the loss, by name.
        activations: mean absolute activation of layers 2, 3 and 4.
    """

    loss: float
    anomaly_prob: float
    anomalies: int
    dendrites: NDArray[np.float32]
    coherence: NDArray[np.float32]
    objectives: dict[str, float]
    activations: tuple[float, float, float]


@dataclass(frozen=True)
class Prediction:
    """What the network says of N vectors: float32 [N], [N, 16], [N, 64], and the threshold of an anomaly."""

    anomaly_prob: NDArray[np.float32]
    dendrites: NDArray[np.float32]
    coherence: NDArray[np.float32]
    threshold: float


class Learner:
    """One batch in, one result out; the state changes in no other way."""

    def __init__(self, seed: int, device: str = "auto") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu" if device == "auto" else device)
        self._weight = torch.randn(VECTOR, DENDRITES + COHERENCE + 1, generator=generator) / VECTOR**0.5
        self._steps = torch.zeros(1, dtype=torch.int64)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What bit equality depends on."""
        return {"device": str(self.device), "torch": torch.__version__, "threads": str(torch.get_num_threads())}

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that are trained."""
        return self._weight.numel(), self._weight.numel()

    def train(self, batch: Batch, step: int) -> Lesson:
        """Learn from a batch; ``step`` seeds whatever is random in it."""
        x = torch.from_numpy(batch.input_data)
        out = torch.tanh(x @ self._weight)
        self._weight -= 1e-3 * x.T @ out / len(x)
        self._steps += step
        prob = torch.sigmoid(out[:, 0])
        return Lesson(
            float((out**2).mean()),
            float(prob.mean()),
            int((prob > 0.5).sum()),
            out[:, 1:17].mean(0).numpy(),
            out[:, 17:].mean(0).numpy(),
            {"reconstruction": float((out**2).mean())},
            (0.0, 0.0, 0.0),
        )

    def feedback(self, feedback: Feedback, step: int) -> None:
        """Learn from feedback."""
        sign = 1 if feedback.validated else -1
        self._weight[:, 1:17] += sign * 1e-3 * torch.from_numpy(feedback.adjustments)
        self._steps += step

    def predict(self, input_data: NDArray[np.float32]) -> Prediction:
        """Judge vectors [N, 1600] without learning."""
        out = torch.tanh(torch.from_numpy(input_data) @ self._weight)
        return Prediction(torch.sigmoid(out[:, 0]).numpy(), out[:, 1:17].numpy(), out[:, 17:].numpy(), 0.5)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that decides what comes next, as copies on the CPU."""
        return {"weight": self._weight.clone(), "steps": self._steps.clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take a state that :meth:`state` gave."""
        self._weight, self._steps = state["weight"].clone(), state["steps"].clone()
