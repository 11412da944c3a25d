from __future__ import annotations

import pytest
import torch

from sheily_train.colab.batches import VECTOR
from sheily_train.core.omega.model import HIDDEN, Cortex, CortezaCognitivaV4
from sheily_train.core.omega.surprise import SUBSPACES, WIDTH, Reading


@pytest.fixture(scope="module")
def model() -> CortezaCognitivaV4:
    torch.manual_seed(0)
    model = CortezaCognitivaV4()
    model.surprise(torch.randn(64, 1600), torch.ones(64, dtype=torch.bool))
    return model


def read(model: CortezaCognitivaV4, input_NV: torch.Tensor) -> Reading:
    reading: Reading = model.surprise(input_NV)
    return reading


def test_twelve_million_parameters(model: CortezaCognitivaV4) -> None:
    """12 M within 10 %."""
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(12e6, rel=0.1)


def test_shapes_and_ranges(model: CortezaCognitivaV4) -> None:
    """One logit, 16 and 64 numbers in −1..1, a layer 4 of 512 and a rebuilt vector for each vector."""
    cortex: Cortex = model(read(model, torch.randn(3, VECTOR) * 50))
    assert cortex.anomaly_N.shape == (3,)
    assert cortex.dendrites_ND.shape == (3, 16)
    assert cortex.coherence_NC.shape == (3, 64)
    assert cortex.layer4_NH.shape == (3, HIDDEN)
    assert cortex.rebuilt_NSW.shape == (3, SUBSPACES, WIDTH)
    for bounded in (cortex.dendrites_ND, cortex.coherence_NC):
        assert bounded.abs().max() <= 1


def test_a_vector_is_judged_alone(model: CortezaCognitivaV4) -> None:
    """What stands beside it in the batch does not change what the network says of it."""
    x = torch.randn(5, VECTOR)
    with torch.no_grad():
        alone, among = model(read(model, x[:1])), model(read(model, x))
    assert torch.allclose(alone.anomaly_N, among.anomaly_N[:1], atol=1e-5)
    assert torch.allclose(alone.coherence_NC, among.coherence_NC[:1], atol=1e-5)


def test_hidden_subspaces_are_not_seen(model: CortezaCognitivaV4) -> None:
    """Layer 4 is the same whatever a hidden subspace holds, and differs when it is not hidden."""
    x, other = torch.randn(2, VECTOR), torch.randn(2, VECTOR)
    other[:, WIDTH:] = x[:, WIDTH:]
    readings = [read(model, part) for part in (x, other)]
    visible = torch.ones(2, SUBSPACES)
    with torch.no_grad():
        seen, changed = (model(reading).layer4_NH for reading in readings)
        assert (seen - changed).abs().max() > 1e-2
        visible[:, 0] = 0
        seen, changed = (model(reading, visible).layer4_NH for reading in readings)
    jump_of_the_next = readings[0].statistics_NSF[:, 1:] - readings[1].statistics_NSF[:, 1:]
    assert jump_of_the_next[..., 1].abs().max() > 0, "what the neighbour's statistics tell of it is another matter"
    for reading in readings:
        reading.statistics_NSF[:, 1] = 0
    with torch.no_grad():
        seen, changed = (model(reading, visible).layer4_NH for reading in readings)
    assert torch.equal(seen, changed)


def test_every_parameter_gets_gradient(model: CortezaCognitivaV4) -> None:
    """No part of the network is idle, the heads included."""
    cortex = model(read(model, torch.randn(8, VECTOR)))
    parts = (cortex.anomaly_N, cortex.dendrites_ND, cortex.coherence_NC, cortex.rebuilt_NSW)
    model.zero_grad()
    sum((part.square().mean() for part in parts), torch.zeros(())).backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
