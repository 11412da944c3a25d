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

from sheily_train.core.training.kernels import LANE, available, kernel


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
        ctx.compiled = _is_compiled(x_NI, weight_OI, factors)
        if not ctx.compiled:
            factors = tuple(factor.to(x_NI.dtype) for factor in factors)
        add = _add_compiled if ctx.compiled else _add
        inner = [
            add(x_NI[start:stop], a_RI, b_OR, y_NO[start:stop], scale)
            for (start, stop), a_RI, b_OR in zip(pairwise(bounds), factors[::2], factors[1::2], strict=True)
        ]
        ctx.scale, ctx.bounds = scale, bounds
        ctx.save_for_backward(x_NI, weight_OI, *factors, *inner)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Gradients at the input and at every A and B; none at W."""
        dy_NO = gradients[0].contiguous()
        x_NI, weight_OI, *saved = ctx.saved_tensors
        stretches = len(ctx.bounds) - 1
        factors, inner = saved[: 2 * stretches], saved[2 * stretches :]
        dx_NI = dy_NO @ weight_OI if ctx.needs_input_grad[0] else None
        gradients_at = _gradients_compiled if ctx.compiled else _gradients
        at_factors: list[torch.Tensor] = []
        for (start, stop), a_RI, b_OR, u in zip(pairwise(ctx.bounds), factors[::2], factors[1::2], inner, strict=True):
            dx = None if dx_NI is None else dx_NI[start:stop]
            at_factors += gradients_at(dy_NO[start:stop], x_NI[start:stop], a_RI, b_OR, u, dx, ctx.scale)
        return dx_NI, None, None, None, None, *at_factors


def _add(x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """Add ``scale · (x Aᵀ) Bᵀ`` to y; returns what is between the two products."""
    inner = _narrow(x, a_RI.T)
    y.addmm_(inner, b_OR.T, alpha=scale)
    return inner


def _gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    inner: torch.Tensor,
    dx: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 gradients at A and B; that at x is added to dx."""
    at_inner = _narrow(dy, b_OR).mul_(scale)
    if dx is not None:
        dx.addmm_(at_inner, a_RI)
    return (at_inner.T @ x).float(), _narrow(dy.T, inner).float().mul_(scale)


def _narrow(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right``, where the right side has as many columns as the rank.

    Below 16 columns MKL takes two to five times as long as for the same numbers as rows, on a processor with AVX2.
    """
    return (right.T @ left.T).T if right.shape[1] < 16 else left @ right


def _is_compiled(x_NI: torch.Tensor, weight_OI: torch.Tensor, factors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels compute the narrow products: whole lanes, a low rank, where there are kernels."""
    return (
        all(size % LANE == 0 for size in weight_OI.shape)
        and all(len(a_RI) <= LANE for a_RI in factors[::2])
        and all(factor.dtype == torch.float32 for factor in factors)
        and x_NI.device.type in ("cpu", "meta")
        and available(x_NI.dtype)
    )


def _add_compiled(
    x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, y: torch.Tensor, scale: float
) -> torch.Tensor:
    inner = torch.empty(len(x), LANE, device=x.device)
    kernel("lora", x.dtype)(x, a_RI, b_OR, y, inner, len(x), x.shape[1], y.shape[1], len(a_RI), scale)
    return inner


def _gradients_compiled(
    dy: torch.Tensor,
    x: torch.Tensor,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    inner: torch.Tensor,
    dx: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    da, db = torch.empty_like(a_RI), torch.empty_like(b_OR)
    kernel("lora_backward", x.dtype)(
        dy, x, a_RI, b_OR, inner, dx, da, db, len(x), x.shape[1], dy.shape[1], len(a_RI), scale
    )
    return da, db


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
