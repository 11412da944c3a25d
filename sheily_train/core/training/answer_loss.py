"""Cross entropy of the answer tokens with its gradient at hand, some tokens at a time: no logits are kept.

Shapes: A answer tokens, D hidden size, V vocabulary, G groups of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sheily_train.core.training.kernels import available, kernel

LOGITS_AT_ONCE = 8_388_608
"""Numbers of one chunk of logits: 170 tokens of a vocabulary of 49,152."""


class AnswerLoss(torch.autograd.Function):
    """Summed cross entropy (nats) of each group's tokens under a frozen head, as float32 [G]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_A: torch.Tensor,
        answers: tuple[int, ...],
        softcap: float | None,
    ) -> torch.Tensor:
        """Loss and, where it is wanted, the gradient at the hidden states, in one pass over chunks of tokens."""
        losses_A = torch.empty(len(targets_A), dtype=torch.float32, device=hidden_AD.device)
        gradient_AD = torch.empty_like(hidden_AD) if ctx.needs_input_grad[0] else None
        size = max(1, LOGITS_AT_ONCE // len(weight_VD))
        compiled = softcap is None and hidden_AD.device.type == "cpu" and available(hidden_AD.dtype)
        for start in range(0, len(targets_A), size):
            chunk = slice(start, start + size)
            targets = targets_A[chunk, None]
            logits = functional.linear(hidden_AD[chunk], weight_VD, bias_V)
            if compiled:
                wanted = int(gradient_AD is not None)
                kernel("cross_entropy", logits.dtype)(logits, targets, losses_A[chunk], *logits.shape, wanted)
                if gradient_AD is not None:
                    torch.mm(logits, weight_VD, out=gradient_AD[chunk])
                continue
            if softcap is not None:
                logits = logits.div_(softcap).tanh_()
            scaled = logits if softcap is None else logits * softcap
            logs = torch.log_softmax(scaled, -1, dtype=torch.float32)
            losses_A[chunk] = -logs.gather(1, targets).squeeze(1)
            if gradient_AD is not None:
                slope = logs.exp_().scatter_add_(1, targets, logs.new_full(targets.shape, -1.0))
                if softcap is not None:
                    slope *= 1 - logits.float().square_()
                torch.mm(slope.to(weight_VD.dtype), weight_VD, out=gradient_AD[chunk])
        ctx.answers = answers
        ctx.save_for_backward(gradient_AD)
        return _group_sums(losses_A, answers)

    @staticmethod
    def backward(ctx: Any, *gradient_G: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The kept gradient, weighted by what each group's loss weighs."""
        (gradient_AD,) = ctx.saved_tensors
        counts = torch.tensor(ctx.answers, device=gradient_AD.device)
        weights_A = gradient_G[0].to(gradient_AD.dtype).repeat_interleave(counts)
        return gradient_AD * weights_A[:, None], None, None, None, None, None


def answer_loss(
    hidden_AD: torch.Tensor,
    head: torch.nn.Module,
    targets_A: torch.Tensor,
    answers: tuple[int, ...],
    softcap: float | None = None,
) -> torch.Tensor:
    """Summed cross entropy (nats) of each group's answer tokens, float32 [G], with gradient.

    Args:
        hidden_AD: what the head reads, where an answer token follows.
        head: the layer that gives logits.
        targets_A: the tokens that follow, group by group.
        answers: how many of them each group has.
        softcap: bound of the logits (Gemma 2).
    """
    if type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters()):
        loss: torch.Tensor = AnswerLoss.apply(  # type: ignore[no-untyped-call]
            hidden_AD.to(head.weight.dtype), head.weight, head.bias, targets_A, answers, softcap
        )
        return loss
    logits_AV = head(hidden_AD).float()
    if softcap is not None:
        logits_AV = softcap * torch.tanh(logits_AV / softcap)
    losses_A = functional.cross_entropy(logits_AV, targets_A, reduction="none")
    return _group_sums(losses_A, answers)


def _group_sums(losses_A: torch.Tensor, answers: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([losses.sum() for losses in torch.split(losses_A, list(answers))])
