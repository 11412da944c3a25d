from __future__ import annotations

import torch
from torch import nn

from sheily_train.core.omega.wide import WideLinear


def test_bfloat16_products_follow_the_plain_layer() -> None:
    """Output and all gradients agree with float32 within bfloat16's precision, and come as float32."""
    torch.manual_seed(0)
    wide, plain = WideLinear(300, 200), nn.Linear(300, 200)
    plain.load_state_dict(wide.state_dict())
    wide.use_bfloat16()
    results = []
    for layer in (wide, plain):
        x = torch.randn(64, 300, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        (y * torch.linspace(-1, 1, 200)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad])
    for half, full in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert torch.linalg.vector_norm(half - full) < 0.01 * torch.linalg.vector_norm(full)


def test_the_copy_follows_the_weights_only_when_told() -> None:
    """After a change of the weights the layer goes on with its copy until the copy is refreshed."""
    layer = WideLinear(8, 8)
    layer.use_bfloat16()
    x = torch.ones(1, 8)
    before = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(x), before)
    layer.use_bfloat16()
    assert torch.equal(layer(x)[0], layer.bias)


def test_the_copy_is_no_part_of_the_state() -> None:
    """A state holds the float32 weights alone."""
    layer = WideLinear(8, 8)
    layer.use_bfloat16()
    assert set(layer.state_dict()) == {"weight", "bias"}
