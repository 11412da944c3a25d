from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sheily_train.core.omega.surprise import POOLED, STATISTICS, SUBSPACES, Moments, Surprise, summarise


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 1600)).astype(np.float32))


def test_moments_in_parts_are_the_moments_of_the_whole() -> None:
    """Three uneven batches give the mean and variance of all their vectors together."""
    values = vectors(100)[:, :7] * 3 + 5
    moments = Moments(7)
    for part in values.split([10, 60, 30]):
        moments.update(part)
    assert torch.allclose(moments.mean, values.double().mean(0))
    assert torch.allclose(moments.variance, values.double().var(0, unbiased=False))


@pytest.mark.parametrize(("scale", "offset"), [(1e-9, 0.0), (1.0, 1e3), (1e6, -1e9 + 1e7)])
def test_inputs_of_any_scale_look_alike_once_standardised(scale: float, offset: float) -> None:
    """A stream multiplied by a billionth, or moved far from zero, gives the same standardised vectors."""
    plain, moved = Surprise(), Surprise()
    stream = vectors(64)
    seen = torch.from_numpy((stream.double().numpy() * scale + offset).astype(np.float64))
    plain(stream, torch.ones(64, dtype=torch.bool))
    moved(seen, torch.ones(64, dtype=torch.bool))
    assert torch.allclose(plain.standardise(stream), moved.standardise(seen), atol=1e-3)


def test_a_position_that_never_moves_is_no_division_by_zero() -> None:
    """Constant vectors, and constant positions, stay finite in every statistic."""
    for stream in (torch.zeros(8, 1600), vectors(8) * (torch.arange(1600) > 800)):
        surprise = Surprise()
        surprise(stream, torch.ones(8, dtype=torch.bool))
        reading = surprise(stream)
        assert torch.isfinite(reading.statistics_NSF).all()
        assert torch.isfinite(reading.surprise_NP).all()


def test_labelled_anomalies_do_not_tell_what_is_usual() -> None:
    """A batch with marked outliers leaves the moments of the batch without them."""
    stream, wild = vectors(32), vectors(8, 1) * 100
    clean, mixed = Surprise(), Surprise()
    clean(stream, torch.ones(32, dtype=torch.bool))
    mixed(torch.cat([stream, wild]), torch.arange(40) < 32)
    assert all(torch.equal(a, b) for a, b in zip(clean.buffers(), mixed.buffers(), strict=True))


def test_anomalies_alone_count_only_when_nothing_else_is_known() -> None:
    """The first vectors set the scale whatever their label; afterwards a batch of anomalies changes nothing."""
    surprise, nothing_usual = Surprise(), torch.zeros(8, dtype=torch.bool)
    surprise(vectors(8), nothing_usual)
    assert surprise.inputs.count == 8
    before = [buffer.clone() for buffer in surprise.buffers()]
    surprise(vectors(8, 1), nothing_usual)
    assert all(torch.equal(a, b) for a, b in zip(before, surprise.buffers(), strict=True))


def test_each_statistic_moves_with_what_it_is_named_after() -> None:
    """Level follows a shift; power, variance and roughness a gain; the peak a spike; the eight bands their sines."""
    x = vectors(1).view(1, SUBSPACES, 64)
    plain = summarise(x)
    assert plain.shape == (1, SUBSPACES, STATISTICS)
    shifted = x.clone()
    shifted[:, 3] += 5
    assert torch.isclose(summarise(shifted)[0, 3, 0], plain[0, 3, 0] + 5, atol=1e-4)
    assert torch.allclose(summarise(2 * x)[..., 3:7] - plain[..., 3:7], torch.tensor(4.0).log(), atol=0.02)
    spiked = x.clone()
    spiked[:, 3, 10] = 50
    assert summarise(spiked)[0, 3, 2] > plain[0, 3, 2] + 0.5
    for band, cycles in enumerate([1, 2, 3, 5, 8, 11, 17, 27]):
        wave = torch.sin(2 * torch.pi * cycles * torch.arange(64) / 64).expand(1, SUBSPACES, 64)
        assert int(summarise(wave)[0, 0, 8:].argmax()) == band


def test_what_the_other_subspaces_lead_to_expect_shows_the_odd_one() -> None:
    """When all levels rise together that is usual; one that rises alone is a surprise, though small in itself."""
    rng = np.random.default_rng(0)

    def together(count: int) -> Tensor:
        common = rng.normal(size=(count, 1, 1)) * 3
        return torch.from_numpy((common + rng.normal(size=(count, SUBSPACES, 64))).astype(np.float32)).flatten(1)

    surprise = Surprise()
    surprise(together(500), torch.ones(500, dtype=torch.bool))
    usual, odd = together(50), together(50)
    odd.view(50, SUBSPACES, 64)[:, 7] += 2
    strangeness = [surprise(part).surprise_NP.abs().amax(1) for part in (usual, odd)]
    assert strangeness[1].min() > strangeness[0].median()


def test_pooled_surprise_has_the_announced_width() -> None:
    """The anomaly head is built for POOLED numbers."""
    surprise = Surprise()
    surprise(vectors(4), torch.ones(4, dtype=torch.bool))
    assert surprise(vectors(4)).surprise_NP.shape == (4, POOLED)
