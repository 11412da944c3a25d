"""Causal attention over a pack: rows are gathered for it and laid back, every other layer sees nodes only.

Registered with transformers under the names of ``IMPLEMENTATIONS``; a model that is set to one of them must be called
with ``pack=``. Shapes: B rows, T tokens, N nodes, K key-value heads, G query heads of each, D numbers a head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from sheily_train.core.training.packing import Pack

IMPLEMENTATIONS = {"eager": "sheily_packed_eager", "sdpa": "sheily_packed_sdpa"}
"""transformers' name of each way to compute attention."""


def attend(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    pack: Pack,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    fused: bool = False,
    **_further: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, in transformers' form: query [1, heads, N, D] to output [1, N, heads, D].

    Args:
        query, key, value: after the rotary embedding; key and value may have fewer heads.
        pack: which node stands where in which row.
        scaling: factor of the scores.
        dropout: part of the probabilities that is switched off.
        softcap: bound of the scores (Gemma 2).
        sliding_window: tokens that a token sees, itself included.
        fused: whether PyTorch's fused kernel is asked where it can do it.
    """
    kv_heads = key.shape[1]
    query_BKGTD = _rows(query, pack.nodes_BT, kv_heads)
    key_BK1TD, value_BK1TD = (_rows(states.to(value.dtype), pack.nodes_BT, kv_heads) for states in (key, value))
    if fused and softcap is None and sliding_window is None:
        output_BHTD = functional.scaled_dot_product_attention(  # its kernels want four dimensions
            query_BKGTD.flatten(1, 2),
            key_BK1TD.expand_as(query_BKGTD).flatten(1, 2),
            value_BK1TD.expand_as(query_BKGTD).flatten(1, 2),
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
        output_BKGTD = output_BHTD.reshape(query_BKGTD.shape)
    else:
        output_BKGTD = _eager(query_BKGTD, key_BK1TD, value_BK1TD, scaling, dropout, softcap, sliding_window)
    output = output_BKGTD.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    return functional.embedding(pack.places_N, output).view(1, -1, query.shape[1], value.shape[-1]), None


def _rows(states: torch.Tensor, nodes_BT: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Nodes' vectors [1, heads, N, D] gathered into rows [B, K, heads / K, T, D]."""
    heads, size = states.shape[1], states.shape[3]
    flat = states[0].transpose(0, 1).reshape(-1, heads * size)
    rows_BTH = functional.embedding(nodes_BT, flat)
    return rows_BTH.view(*nodes_BT.shape, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)


def _eager(
    query_BKGTD: torch.Tensor,
    key_BK1TD: torch.Tensor,
    value_BK1TD: torch.Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    groups, tokens = query_BKGTD.shape[2:4]
    query, key, value = (states.flatten(2, 3).flatten(0, 1) for states in (query_BKGTD, key_BK1TD, value_BK1TD))
    mask = _causal_mask(tokens, groups, sliding_window, query.dtype, query.device)
    if softcap is None:
        scores = torch.baddbmm(mask.expand(len(query), -1, -1), query, key.mT, alpha=scaling)
    else:
        scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap)) + mask
    shares = scores.softmax(-1)
    if dropout:
        shares = functional.dropout(shares, dropout)
    return (shares @ value).view(query_BKGTD.shape[:4] + value.shape[-1:])


@functools.lru_cache(maxsize=4)  # the layers of one pass share it, and long rows make it large
def _causal_mask(
    tokens: int, groups: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What is added to the scores [G·T, T] of one key-value head: 0 where a token may look, else the least number."""
    row, column = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    seen = column <= row
    if window is not None:
        seen &= column > row - window
    mask = torch.zeros(tokens, tokens, dtype=dtype, device=device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).repeat(groups, 1)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    for kind, name in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, functools.partial(attend, fused=kind == "sdpa"))


@contextlib.contextmanager
def packed_attention(config: Any, attention: str) -> Iterator[None]:
    """Let a model with this configuration attend over packs, ``eager`` or ``sdpa``, as long as the context lasts."""
    _register()
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATIONS[attention]
    try:
        yield
    finally:
        config._attn_implementation = before
