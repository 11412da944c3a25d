"""A frozen linear layer with LoRA, its backward pass written out: nothing is computed or kept that has no use.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional


class LoraProduct(torch.autograd.Function):
    """``x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`` with frozen W and bias; each stretch of tokens has its own A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        scale: float,
        bounds: tuple[int, ...],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """The product; ``factors`` are A [R, I] and B [O, R] of the first stretch, then of the next."""
        y_NO = functional.linear(x_NI, weight_OI, bias_O)
        cast = [factor.to(x_NI.dtype) for factor in factors]
        inner = []
        for (start, stop), a_RI, b_OR in zip(pairwise(bounds), cast[::2], cast[1::2], strict=True):
            inner.append(_narrow(x_NI[start:stop], a_RI.T))
            y_NO[start:stop].addmm_(inner[-1], b_OR.T, alpha=scale)
        ctx.scale, ctx.bounds = scale, bounds
        ctx.save_for_backward(x_NI, weight_OI, *cast, *inner)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Gradients at the input and at every A and B; none at W."""
        (dy_NO,) = gradients
        x_NI, weight_OI, *saved = ctx.saved_tensors
        stretches = len(ctx.bounds) - 1
        cast, inner = saved[: 2 * stretches], saved[2 * stretches :]
        dx_NI = dy_NO @ weight_OI if ctx.needs_input_grad[0] else None
        at_factors: list[torch.Tensor] = []
        for (start, stop), a_RI, b_OR, u_NR in zip(pairwise(ctx.bounds), cast[::2], cast[1::2], inner, strict=True):
            dy = dy_NO[start:stop]
            du_NR = _narrow(dy, b_OR).mul_(ctx.scale)
            if dx_NI is not None:
                dx_NI[start:stop].addmm_(du_NR, a_RI)
            at_factors += [(du_NR.T @ x_NI[start:stop]).float(), _narrow(dy.T, u_NR).float().mul_(ctx.scale)]
        return dx_NI, None, None, None, None, *at_factors


def _narrow(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right``, where the right side has as many columns as the rank.

    Below 16 columns MKL takes two to five times as long as for the same numbers as rows, on a processor with AVX2.
    """
    return (right.T @ left.T).T if right.shape[1] < 16 else left @ right


def lora_layers(model: torch.nn.Module) -> list[Any]:
    """PEFT's layers of a model that compute just what :class:`LoraProduct` does: plain LoRA on a plain linear layer."""
    from peft.tuners import lora

    return [layer for layer in model.modules() if type(layer) is lora.Linear and _is_plain(layer)]


def _is_plain(layer: Any) -> bool:
    return (
        type(layer.base_layer) is torch.nn.Linear
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        and not (layer.lora_variant or any(layer.lora_bias.values()))
        and all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values())
    )


@contextlib.contextmanager
def written_out(layers: Sequence[Any], names: Sequence[str], bounds: tuple[int, ...]) -> Iterator[None]:
    """Let layers compute their products by :class:`LoraProduct` as long as the context lasts.

    Args:
        layers: from :func:`lora_layers`.
        names: the adapter of each stretch of tokens.
        bounds: where the stretches begin, and where the last one ends.
    """
    for layer in layers:
        layer.forward = functools.partial(_product, layer, names, bounds)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(layer: Any, names: Sequence[str], bounds: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    if layer.disable_adapters:
        base_output: torch.Tensor = base(x)
        return base_output
    factors = [weights[name].weight for name in names for weights in (layer.lora_A, layer.lora_B)]
    y: torch.Tensor = LoraProduct.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2).to(base.weight.dtype), base.weight, base.bias, layer.scaling[names[0]], bounds, *factors
    )
    return y.view(*x.shape[:-1], -1)
