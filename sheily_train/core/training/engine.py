"""One optimizer step: micro-batches in, loss and gradient norm out. Everything random in it depends on (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sheily_train.core.training.data import TokenRow, split_by_tokens
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
    """

    def __init__(self, model: torch.nn.Module, request: TrainRequest, placement: Placement, total_steps: int) -> None:
        self.model = model
        self.forward = choose_forward(model, placement)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
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

    def step(self, step: int, groups: Sequence[Sequence[TokenRow]]) -> StepResult:
        """Take optimizer step ``step`` (from 0) on micro-batches whose gradients add up to those of one large batch."""
        torch.manual_seed(step_seed(self._request.seed, step))
        answer_tokens = sum(row.answer_tokens for rows in groups for row in rows)
        if answer_tokens == 0:
            raise TrainingError(
                _("El lote del paso {step} no contiene ningún token de respuesta.").format(step=step + 1)
            )
        self.model.train()
        loss = sum(self._backward(rows, answer_tokens) for rows in groups) / answer_tokens
        if not math.isfinite(loss):
            raise _not_finite(_("La pérdida"), step, loss)
        lr = self._request.learning_rate * schedule_factor(
            self._request.schedule, step, self._warmup, self._total_steps
        )
        norm = self._update(step, lr)
        return StepResult(loss, norm, lr, answer_tokens, sum(len(row.ids) for rows in groups for row in rows))

    def _backward(self, rows: Sequence[TokenRow], answer_tokens: int) -> float:
        loss_sum = self.forward.losses([rows])[0]
        torch.autograd.backward(self.scaler.scale(loss_sum / answer_tokens))
        return loss_sum.item()

    def _update(self, step: int, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = self._request.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise _not_finite(_("La norma del gradiente"), step, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's numbers (empty unless the precision is fp16)."""
        return self.scaler.state_dict()


def mean_loss(model: torch.nn.Module, rows: Sequence[TokenRow], placement: Placement) -> float:
    """Mean answer loss (nats per answer token) of rows, without training."""
    forward = choose_forward(model, placement)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(forward.losses([group]).item() for group in split_by_tokens(rows, placement.micro_tokens))
    model.train(was_training)
    return total / sum(row.answer_tokens for row in rows)
