"""A linear layer whose products run in bfloat16 on processors that have it, with float32 weights and gradients.

Autocast would convert weights and gradients anew at each use, which costs more than the products themselves at these
sizes; here a bfloat16 copy of the weights is kept, and refreshed once after each optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WideLinear(nn.Linear):
    """``nn.Linear``; after :meth:`use_bfloat16`, its three products (output, both gradients) are bfloat16 ones."""

    half_weight: Tensor | None = None

    def use_bfloat16(self) -> None:
        """Keep a bfloat16 copy of the weights from now on; call again whenever they have changed."""
        with torch.no_grad():
            if self.half_weight is None:
                self.half_weight = torch.empty_like(self.weight, dtype=torch.bfloat16)
            self.half_weight.copy_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        if self.half_weight is None:
            return super().forward(input)
        output: Tensor = _HalfProduct.apply(input, self.weight, self.half_weight) + self.bias  # type: ignore[no-untyped-call]
        return output


class _HalfProduct(torch.autograd.Function):
    """x Wᵀ with the bfloat16 copy; the gradient of the copy is handed to the float32 weights."""

    @staticmethod
    def forward(context: Any, x_NI: Tensor, _weight_OI: Tensor, half_OI: Tensor) -> Tensor:
        half_NI = x_NI.bfloat16()
        context.save_for_backward(half_NI, half_OI)
        return (half_NI @ half_OI.T).float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        half_NI, half_OI = context.saved_tensors
        gradient_NO = gradients[0].bfloat16()
        return (gradient_NO @ half_OI).float(), (gradient_NO.T @ half_NI).float(), None
