"""One optimizer step: rows in, loss and gradient norm out. Everything random in it depends on (seed, step).

Engines whose adapters lie on one base can take their steps together: each row passes through its own adapter, and each
engine has its own loss, clipping, optimizer and schedule, as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sheily_train.core.training.adapters import LONE_ADAPTER
from sheily_train.core.training.data import Pass, TokenRow, split_by_tokens
from sheily_train.core.training.forward import choose_forward
from sheily_train.core.training.request import TrainRequest
from sheily_train.errors import TrainingError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.core.training.training_router import Placement

_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class StepResult:
    """What one step did: mean answer loss (nats per token), gradient norm before clipping, learning rate, tokens."""

    loss: float
    grad_norm: float
    lr: float
    answer_tokens: int
    tokens: int


def schedule_factor(kind: str, step: int, warmup: int, total: int) -> float:
    """The learning rate of ``step`` (from 0) as a part of its peak: linear warm-up, then cosine, linear or constant.

    The same curves as transformers' schedules of these names.
    """
    if step < warmup:
        return step / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(request: TrainRequest, total: int) -> int:
    """How many steps the learning rate rises."""
    asked = request.warmup_steps
    return math.ceil(asked * total) if asked < 1 else int(asked)


def _not_finite(what: str, step: int, value: float) -> TrainingError:
    return TrainingError(
        _("{what} del paso {step} no es un número ({value}).").format(what=what, step=step + 1, value=value),
        mend=_("Prueba una --lr menor o --precision fp32; el último punto de control está intacto."),
    )


def step_seed(seed: int, step: int) -> int:
    """The random seed of one step."""
    return (seed * 1_000_003 + step) % 2**63


class Engine:
    """A model with its optimizer, ready to take steps.

    Args:
        model: a causal LM whose parameters to train have ``requires_grad``.
        request: learning rate, schedule, clipping, weight decay, seed.
        placement: device and precision.
        total_steps: the length of the schedule.
        adapter: the one to train, of those on ``model``; in ``parameters`` it is called like a lone one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        request: TrainRequest,
        placement: Placement,
        total_steps: int,
        adapter: str = LONE_ADAPTER,
    ) -> None:
        self.model, self.adapter = model, adapter
        self.forward = choose_forward(model, placement)
        others = {f".{name}." for name in getattr(model, "peft_config", {}) if name != adapter}
        self.parameters = {
            name.replace(f".{adapter}.", f".{LONE_ADAPTER}."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(other in name for other in others)
        }
        if not self.parameters:
            raise TrainingError(_("El modelo no tiene ningún parámetro entrenable."))
        self._request = request
        self._total_steps = total_steps
        self._warmup = warmup_steps(request, total_steps)
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        plain = [p for p in self.parameters.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": request.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=request.learning_rate,
            betas=_ADAM_BETAS,
            eps=_ADAM_EPSILON,
            fused=placement.device != "mps",
        )
        self.scaler = torch.amp.GradScaler(placement.device, enabled=placement.precision == "fp16")

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` (from 0)."""
        return self._request.learning_rate * schedule_factor(
            self._request.schedule, step, self._warmup, self._total_steps
        )

    def begin_step(self, step: int) -> None:
        """Make everything random in ``step`` (from 0) depend on it and the seed alone."""
        torch.manual_seed(step_seed(self._request.seed, step))
        self.model.train()

    def clip(self, step: int) -> float:
        """Clip the gradient that has been added up; returns its norm before. Raises when that is not a number."""
        self.scaler.unscale_(self.optimizer)
        limit = self._request.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise _not_finite(_("La norma del gradiente"), step, norm)
        return norm

    def update(self, step: int) -> None:
        """Take the optimizer's step with the gradient that has been clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        """Forget what a step that did not end has added up."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer moments by name, to be written to a checkpoint."""
        tensors = {f"weights/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], scaler: dict[str, Any]) -> None:
        """Take weights, optimizer moments and the loss scaler's numbers back from a checkpoint."""
        keys = {name.partition("/")[0] for name in tensors} - {"weights", "best"}
        self.load_weights(tensors, "weights")
        self.scaler.load_state_dict(scaler)
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(
                    "cpu" if key == "step" and not self._steps_on_device() else parameter.device
                )
                for key in keys
            }

    def load_weights(self, tensors: dict[str, torch.Tensor], prefix: str) -> None:
        """Set the trained parameters to the tensors named ``prefix/…``."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"{prefix}/{name}"])

    def _steps_on_device(self) -> bool:
        return bool(self.optimizer.defaults["fused"])


def take_step(engines: Sequence[Engine], step: int, passes: Sequence[Pass]) -> list[StepResult]:
    """Take optimizer step ``step`` (from 0) of every engine. No weight has changed when an error is raised.

    Args:
        engines: one, or several with adapters on one model.
        step: the step's number.
        passes: of :func:`~sheily_train.core.training.data.split_into_passes`; an engine's gradient is that of all its
            rows as one batch.

    Raises:
        TrainingError: a batch without answers; a loss or gradient that is not a number.
    """
    pieces = [piece for whole in passes for piece in whole]
    tokens = [
        sum(len(row.ids) for at, rows in pieces if at == number for row in rows) for number in range(len(engines))
    ]
    answers = [
        sum(row.answer_tokens for at, rows in pieces if at == number for row in rows) for number in range(len(engines))
    ]
    if 0 in answers:
        raise TrainingError(_("El lote del paso {step} no contiene ningún token de respuesta.").format(step=step + 1))
    for engine in engines:
        engine.begin_step(step)
    sums = [0.0] * len(engines)
    for whole in passes:
        for (number, _rows), loss in zip(whole, add_gradients(engines, whole, answers), strict=True):
            sums[number] += loss
    losses = [loss / count for loss, count in zip(sums, answers, strict=True)]
    for loss in losses:
        if not math.isfinite(loss):
            raise _not_finite(_("La pérdida"), step, loss)
    norms = [engine.clip(step) for engine in engines]
    for engine in engines:
        engine.update(step)
    rates = [engine.rate(step) for engine in engines]
    return [StepResult(*numbers) for numbers in zip(losses, norms, rates, answers, tokens, strict=True)]


def add_gradients(engines: Sequence[Engine], pieces: Pass, answers: Sequence[int]) -> list[float]:
    """Add the gradients of a pass up; each engine's loss is divided by its number of ``answers``. Returns the sums."""
    numbers, groups = zip(*pieces, strict=True)
    sums = engines[0].forward.losses(groups, [engines[number].adapter for number in numbers])
    torch.autograd.backward(
        [engines[number].scaler.scale(loss / answers[number]) for number, loss in zip(numbers, sums, strict=True)]
    )
    return [float(loss) for loss in sums.tolist()]


def mean_loss(
    model: torch.nn.Module, rows: Sequence[TokenRow], placement: Placement, adapter: str = LONE_ADAPTER
) -> float:
    """Mean answer loss (nats per answer token) of rows, through an adapter, without training."""
    forward = choose_forward(model, placement)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(
            forward.losses([group], [adapter]).item() for group in split_by_tokens(rows, placement.micro_tokens)
        )
    model.train(was_training)
    return total / sum(row.answer_tokens for row in rows)
