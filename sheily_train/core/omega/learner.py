"""The learner: one batch in, one result out; state in and out.

On one kind of machine (:attr:`Learner.fingerprint`), the same seed and the same sequence of batches and feedback give
the same bits, whatever interruptions, saves and loads lie between: nothing here reads a clock or a global random state,
and what is random in a step is decided by the seed and the step's number.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sheily_train.colab.batches import DENDRITES, Batch, Feedback
from sheily_train.core.omega.model import HIDDEN, Cortex, CortezaCognitivaV4
from sheily_train.core.omega.objective import anomaly_loss, coherence_target, dendrite_loss, visible_subspaces
from sheily_train.core.omega.wide import WideLinear
from sheily_train.core.processor import cpu_has_fast_bf16
from sheily_train.errors import RequestError, TrainingError, WorkerError
from sheily_train.i18n import _

TRUNK_RATE = 5e-4
RATES = {"anomaly.": 5e-3, "coherence.": 1e-3, "layer3.mean.": 1e-3}
"""Learning rates of the parts that learn faster than the trunk."""
DENDRITES_PART = "dendrites."
DENDRITE_RATE = 0.05
DENDRITE_STEPS = 8
GRADIENT_LIMIT = 1.0
FEEDBACK_KEPT = 32
THRESHOLD = 0.5

_BETAS = (0.9, 0.99)
_AT_ONCE = 512


@dataclass(frozen=True)
class Lesson:
    """What one batch gave.

    Attributes:
        loss: the sum of the objectives, in the last epoch.
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


class FeedbackMemory(nn.Module):
    """The latest feedback, with what layer 4 held when the adjustments it speaks of were given."""

    latest: Tensor
    layer4: Tensor
    adjustments: Tensor
    verdict: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latest", torch.zeros(HIDDEN))
        self.register_buffer("layer4", torch.zeros(FEEDBACK_KEPT, HIDDEN))
        self.register_buffer("adjustments", torch.zeros(FEEDBACK_KEPT, DENDRITES))
        self.register_buffer("verdict", torch.zeros(FEEDBACK_KEPT))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def remember(self, adjustments_D: Tensor, validated: bool) -> None:
        """Keep one more; the oldest gives way."""
        place = int(self.count) % FEEDBACK_KEPT
        self.layer4[place] = self.latest
        self.adjustments[place] = adjustments_D
        self.verdict[place] = 1.0 if validated else -1.0
        self.count += 1


class Learner:
    """CortezaCognitivaV4 with its optimizers and its memory; :meth:`train` and :meth:`feedback` alone change them.

    Args:
        seed: decides the first weights and everything random afterwards.
        device: ``auto`` (CUDA, else CPU), ``cpu`` or ``cuda``. Apple's MPS has no float64, which the moments need.
    """

    def __init__(self, seed: int, device: str = "auto") -> None:
        self.seed = seed
        self.device = _choose_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = CortezaCognitivaV4().to(self.device)
        self.memory = FeedbackMemory().to(self.device)
        self._wide = [part for part in self.model.modules() if isinstance(part, WideLinear)]
        self._halves = self.device.type == "cpu" and cpu_has_fast_bf16()
        named = list(self.model.named_parameters())
        parts = {part: [weight for name, weight in named if name.startswith(part)] for part in RATES}
        others = (*RATES, DENDRITES_PART)
        parts["trunk"] = [weight for name, weight in named if not name.startswith(others)]
        self._optimizer = _adam(parts)
        # Plain descent follows layer 4 itself; Adam's even steps would carry over to vectors unlike it.
        self._dendrites = torch.optim.SGD(self.model.dendrites.parameters(), lr=DENDRITE_RATE)
        self._refresh()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the bits depend on besides the seed and the data."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "machine": platform.machine(),
            "instructions": "" if cuda else torch.backends.cpu.get_cpu_capability(),
            "precision": "bf16" if self._halves else "fp32",
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        }

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that are trained."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    def train(self, batch: Batch, step: int) -> Lesson:
        """Learn from a batch.

        Args:
            batch: N vectors, some or all or none of them labelled.
            step: the event's number; with the seed it decides which subspaces are hidden.

        Raises:
            TrainingError: the loss is not a number. The state can no longer be trusted.
        """
        input_NV = torch.from_numpy(batch.input_data).to(self.device)
        labels_N = torch.from_numpy(batch.labels).to(self.device)
        reading = self.model.surprise(input_NV, labels_N != 1)
        target_NC = coherence_target(reading.x_NSW)
        for epoch in range(batch.epochs):
            visible_NS = visible_subspaces(len(batch), self._random(step, epoch)).to(self.device)
            cortex = self.model(reading, visible_NS)
            objectives = {
                "anomaly": anomaly_loss(cortex.anomaly_N, labels_N),
                "reconstruction": (cortex.rebuilt_NSW - reading.x_NSW).square().mean(),
                "coherence": (cortex.coherence_NC - target_NC).square().mean(),
            }
            loss = torch.stack(list(objectives.values())).sum()
            if not torch.isfinite(loss):
                raise TrainingError(_("La pérdida no es un número."), mend=_("Revisa los datos del lote."))
            self._descend(loss)
        return self._lesson(cortex, loss, objectives)

    def feedback(self, feedback: Feedback, step: int) -> None:  # noqa: ARG002 - nothing here is random
        """Learn from what came of the latest batch's adjustments: a few steps of the dendrite head alone."""
        self.memory.remember(torch.from_numpy(feedback.adjustments).to(self.device), feedback.validated)
        for _step in range(DENDRITE_STEPS):
            dendrites_KD = torch.tanh(self.model.dendrites(self.memory.layer4))
            loss = dendrite_loss(dendrites_KD, self.memory.adjustments, self.memory.verdict)
            self._dendrites.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._dendrites.step()

    @torch.no_grad()
    def predict(self, input_data: NDArray[np.float32]) -> Prediction:
        """Judge vectors [N, 1600] without learning."""
        parts = []
        for start in range(0, len(input_data), _AT_ONCE):
            input_NV = torch.from_numpy(input_data[start : start + _AT_ONCE]).to(self.device)
            cortex = self.model(self.model.surprise(input_NV))
            parts.append((torch.sigmoid(cortex.anomaly_N), cortex.dendrites_ND, cortex.coherence_NC))
        anomaly_N, dendrites_ND, coherence_NC = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        return Prediction(anomaly_N, dendrites_ND, coherence_NC, THRESHOLD)

    def state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, as copies on the CPU: weights, moments, optimizers, memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take a state that :meth:`state` gave.

        Raises:
            WorkerError: a tensor is missing, unknown or of another shape or type; nothing was changed.
        """
        tensors = self._tensors()
        wrong = sorted(
            name
            for name in tensors.keys() | state.keys()
            if name not in tensors
            or name not in state
            or (tensors[name].shape, tensors[name].dtype) != (state[name].shape, state[name].dtype)
        )
        if wrong:
            raise WorkerError(
                _("El estado no es de esta red: «{name}» falta, sobra o tiene otra forma.").format(name=wrong[0])
            )
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self._refresh()

    def _descend(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learned = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(learned, GRADIENT_LIMIT)
        self._optimizer.step()
        self._refresh()

    @torch.no_grad()
    def _lesson(self, cortex: Cortex, loss: Tensor, objectives: dict[str, Tensor]) -> Lesson:
        self.memory.latest.copy_(cortex.layer4_NH.mean(0))
        probability_N = torch.sigmoid(cortex.anomaly_N)
        layer2, layer3, layer4 = cortex.activations.tolist()
        return Lesson(
            loss=float(loss),
            anomaly_prob=float(probability_N.mean()),
            anomalies=int((probability_N > THRESHOLD).sum()),
            dendrites=cortex.dendrites_ND.mean(0).cpu().numpy(),
            coherence=cortex.coherence_NC.mean(0).cpu().numpy(),
            objectives={name: float(part) for name, part in objectives.items()},
            activations=(layer2, layer3, layer4),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """The state's own tensors, by name; writing into them changes the learner."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, moments in self._optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in moments.items()}
        return tensors

    def _refresh(self) -> None:
        if self._halves:
            for layer in self._wide:
                layer.use_bfloat16()

    def _random(self, step: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 128 + epoch) % 2**63)


def _adam(parts: dict[str, list[nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW without decay whose moments exist from the start, so that a state always has the same tensors."""
    groups = [{"params": weights, "lr": RATES.get(part, TRUNK_RATE)} for part, weights in parts.items()]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RequestError(
            _("El dispositivo «{device}» no está disponible.").format(device=device), mend=_("Usa --device cpu.")
        )
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)
