"""Norm, gated MLP and attention of Llama-like decoders through the compiled kernels, their backward passes written out.

Shapes: N nodes, D hidden size, H query heads, K key-value heads, S numbers a head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sheily_train.core.training.kernels import LANE, available, kernel
from sheily_train.core.training.packing import Pack

_MODELS = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Beginnings of transformers' class names; each one is tested against its own form."""


Fused = Callable[..., Any]
"""What computes a module's output in its place, called with the module first."""


class RmsNorm(torch.autograd.Function):
    """``weight · x / rms(x)`` with a frozen weight, for x [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The product, computed in float32."""
        x = x.contiguous()
        y, size = torch.empty_like(x), x.shape[-1]
        inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        kernel("rms_norm", x.dtype)(x, weight_D, y, inverse, inverse.numel(), size, epsilon)
        ctx.save_for_backward(x, weight_D, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient at x."""
        x, weight_D, inverse = ctx.saved_tensors
        dy, dx = gradients[0].contiguous(), torch.empty_like(x)
        kernel("rms_norm_backward", x.dtype)(dy, x, weight_D, inverse, dx, inverse.numel(), x.shape[-1])
        return dx, None, None


class SwiGlu(torch.autograd.Function):
    """``silu(gate) · up``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product, computed in float32."""
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        kernel("swiglu", gate.dtype)(gate, up, y, gate.numel())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients at gate and up."""
        gate, up = ctx.saved_tensors
        dy, dgate, dup = gradients[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        kernel("swiglu_backward", gate.dtype)(dy, gate, up, dgate, dup, gate.numel())
        return dgate, dup


class RotaryAttention(torch.autograd.Function):
    """Causal attention over the rows of a pack, queries and keys turned by their rotary embedding first."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NHS: torch.Tensor,
        key_NKS: torch.Tensor,
        value_NKS: torch.Tensor,
        cosine_NS: torch.Tensor,
        sine_NS: torch.Tensor,
        pack: Pack,
        window: int,
        scale: float,
    ) -> torch.Tensor:
        """The output [N, H, S], computed in float32."""
        inputs = [states.contiguous() for states in (query_NHS, key_NKS, value_NKS, cosine_NS, sine_NS)]
        output_NHS = torch.zeros_like(inputs[0])
        ctx.pack, ctx.sizes = pack, (*pack.nodes_BT.shape, query_NHS.shape[1], *key_NKS.shape[1:], window, scale)
        ctx.save_for_backward(*inputs)
        kernel("attention", query_NHS.dtype)(*inputs, *_rows(pack), output_NHS, *ctx.sizes)
        return output_NHS

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients at query, key and value."""
        inputs = ctx.saved_tensors
        changes = [torch.zeros_like(states) for states in inputs[:3]]
        kernel("attention_backward", inputs[0].dtype)(
            gradients[0].contiguous(), *inputs, *_rows(ctx.pack), *changes, len(inputs[0]), *ctx.sizes
        )
        return *changes, None, None, None, None, None


def _rows(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pack.nodes_BT, pack.firsts_B, pack.lengths_B


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    y: torch.Tensor = RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return y


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    inner: torch.Tensor = SwiGlu.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    return module.down_proj(inner)  # type: ignore[no-any-return]


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *,
    pack: Pack,
    **_further: Any,
) -> tuple[torch.Tensor, None]:
    query_NHS, key_NKS, value_NKS = (
        projection(hidden_states[0]).view(hidden_states.shape[1], -1, module.head_dim)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query_NHS, key_NKS = module.q_norm(query_NHS), module.k_norm(key_NKS)
    cosine_NS, sine_NS = (part[0].to(query_NHS.dtype) for part in position_embeddings)
    output_NHS: torch.Tensor = RotaryAttention.apply(  # type: ignore[no-untyped-call]
        query_NHS, key_NKS, value_NKS, cosine_NS, sine_NS, pack, _window(module) or 0, module.scaling
    )
    return module.o_proj(output_NHS.flatten(1)[None]), None


def _window(module: Any) -> int | None:
    own = module if hasattr(module, "sliding_window") else module.config
    window: int | None = getattr(own, "sliding_window", None)
    return window


def fused_layers(decoder: torch.nn.Module, dtype: torch.dtype, attention: str) -> list[tuple[Any, Fused]]:
    """The modules of a decoder on a CPU that the kernels can stand in for, each with what does.

    Args:
        decoder: transformers' module.
        dtype: what its products are computed in.
        attention: ``sdpa`` keeps PyTorch's own, which is the faster one for rows of a thousand tokens and more.
    """
    if not available(dtype):
        return []
    layers = [(module, fused) for module in decoder.modules() if (fused := _fused(module))]
    return [(module, fused) for module, fused in layers if fused is not _attention or attention == "eager"]


def _fused(module: Any) -> Fused | None:
    name = type(module).__name__
    model = next((model for model in _MODELS if name.startswith(model)), "")
    part = name.removeprefix(model) if model else ""
    if part == "RMSNorm" and not module.weight.requires_grad:
        return _norm
    if part == "MLP" and module.config.hidden_act == "silu":
        return _mlp
    if part == "Attention" and not module.attention_dropout and module.head_dim % LANE == 0:
        return _attention
    return None


@contextlib.contextmanager
def fused(layers: Sequence[tuple[Any, Fused]]) -> Iterator[None]:
    """Let the modules of :func:`fused_layers` compute by the kernels as long as the context lasts.

    The decoder is to be called with ``pack=``.
    """
    for module, stand_in in layers:
        module.forward = functools.partial(stand_in, module)
    try:
        yield
    finally:
        for module, _stand_in in layers:
            del module.forward
