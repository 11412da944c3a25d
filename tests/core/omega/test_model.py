from __future__ import annotations

import pytest
import torch

from sheily_train.core.omega.model import HIDDEN, Cortex, CortezaCognitivaV4
from sheily_train.core.omega.surprise import SUBSPACES, WIDTH


@pytest.fixture(scope="module")
def model() -> CortezaCognitivaV4:
    torch.manual_seed(0)
    model = CortezaCognitivaV4()
    model.surprise.update(torch.randn(64, 1600), torch.ones(64, dtype=torch.bool))
    return model


def test_twelve_million_parameters(model: CortezaCognitivaV4) -> None:
    """12 M within 10 %."""
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(12e6, rel=0.1)


def test_shapes_and_ranges(model: CortezaCognitivaV4) -> None:
    """One logit, 16 and 64 numbers in −1..1, a layer 4 of 512 and a rebuilt vector for each vector."""
    cortex: Cortex = model(torch.randn(3, SUBSPACES, WIDTH) * 50)
    assert cortex.anomaly_N.shape == (3,)
    assert cortex.dendrites_ND.shape == (3, 16)
    assert cortex.coherence_NC.shape == (3, 64)
    assert cortex.layer4_NH.shape == (3, HIDDEN)
    assert cortex.rebuilt_NSW.shape == (3, SUBSPACES, WIDTH)
    for bounded in (cortex.dendrites_ND, cortex.coherence_NC):
        assert bounded.abs().max() <= 1


def test_a_vector_is_judged_alone(model: CortezaCognitivaV4) -> None:
    """What stands beside it in the batch does not change what the network says of it."""
    x = torch.randn(5, SUBSPACES, WIDTH)
    with torch.no_grad():
        alone, among = model(x[:1]), model(x)
    assert torch.allclose(alone.anomaly_N, among.anomaly_N[:1], atol=1e-5)
    assert torch.allclose(alone.coherence_NC, among.coherence_NC[:1], atol=1e-5)


def test_hidden_subspaces_are_not_seen(model: CortezaCognitivaV4) -> None:
    """Layer 4 is the same whatever a hidden subspace holds, and differs when it is not hidden."""
    x, other = torch.randn(2, SUBSPACES, WIDTH), torch.randn(2, SUBSPACES, WIDTH)
    other[:, 1:] = x[:, 1:]
    visible = torch.ones(2, SUBSPACES)
    with torch.no_grad():
        assert not torch.allclose(model(x).layer4_NH, model(other).layer4_NH, atol=1e-4)
        visible[:, 0] = 0
        seen, changed = (model(part, visible) for part in (x, other))
    statistics_apart = (seen.layer4_NH - changed.layer4_NH).abs().max()
    assert statistics_apart < 0.5 * (model(x).layer4_NH - model(other).layer4_NH).abs().max()


def test_every_parameter_gets_gradient(model: CortezaCognitivaV4) -> None:
    """No part of the network is idle, the heads included."""
    cortex = model(torch.randn(8, SUBSPACES, WIDTH))
    parts = (cortex.anomaly_N, cortex.dendrites_ND, cortex.coherence_NC, cortex.rebuilt_NSW)
    model.zero_grad()
    sum((part.square().mean() for part in parts), torch.zeros(())).backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
