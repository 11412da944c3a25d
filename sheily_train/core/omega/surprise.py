"""How far a vector strays from what was seen before: sixteen statistics of each subspace, and what to expect of them.

A vector of 1,600 numbers is read as 25 subspaces of 64. Each subspace is summed up by sixteen statistics (level, power,
roughness, peaks, eight bands of its spectrum). Running moments tell what is usual, statistic by statistic, and what the
other 24 subspaces of the same vector lead one to expect of each; the differences, pooled over the subspaces, are the
vector's surprise. It needs no label, and says most of what an anomaly detector can know after a few dozen vectors; the
network's anomaly head starts from it.

Everything here is state without gradient; it changes only when vectors are read together with which are usual.
Shapes: N vectors, V = 1600, S = 25 subspaces, W = 64 numbers in each, F = 16 statistics, P pooled numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SUBSPACES = 25
WIDTH = 64
STATISTICS = 16
POOLED = 23 * STATISTICS
MEMORY = 20_000.0
"""Vectors that the moments remember: the older ones fade from then on."""

_BANDS = (1, 2, 3, 4, 6, 9, 14, 21, 33)
_SHRINKAGE = 16.0
_LIMIT = 8.0


class Moments(nn.Module):
    """Running mean and variance of vectors [N, *shape], in float64 whatever comes in."""

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(shape, dtype=torch.float64))

    def update(self, values: Tensor) -> None:
        """Take N ≥ 1 more vectors in."""
        values = values.double()
        share = len(values) / (self.count + len(values))
        mean, variance = values.mean(0), values.var(0, unbiased=False)
        step = mean - self.mean
        self.variance += share * (variance - self.variance) + share * (1 - share) * step**2
        self.mean += share * step
        self.count.add_(len(values)).clamp_(max=MEMORY)

    def standardise(self, values: Tensor, floor: float = 1e-3, limit: float = _LIMIT) -> Tensor:
        """The values in standard deviations from the mean, float32, cut off at ``limit``.

        No deviation counts as smaller than ``floor`` times the usual one of all positions.
        """
        least = floor**2 * self.variance.mean() + 1e-30
        return ((values.double() - self.mean) / (self.variance + least).sqrt()).clamp(-limit, limit).float()


@dataclass(frozen=True)
class Reading:
    """What is read off N vectors, all of it in standard deviations.

    Attributes:
        x_NSW: the vectors.
        statistics_NSF: the sixteen statistics of each subspace.
        surprise_NP: the pooled surprise.
    """

    x_NSW: Tensor
    statistics_NSF: Tensor
    surprise_NP: Tensor


class Surprise(nn.Module):
    """The running moments of a stream of vectors, and each vector's distance from them."""

    weights: Tensor
    products: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inputs = Moments(SUBSPACES * WIDTH)
        self.statistics = Moments(SUBSPACES, STATISTICS)
        self.pooled = Moments(POOLED)
        self.register_buffer("weights", torch.zeros(()))
        self.register_buffer("products", torch.zeros(STATISTICS, SUBSPACES, SUBSPACES))

    def forward(self, input_NV: Tensor, usual_N: Tensor | None = None) -> Reading:
        """Read vectors; when ``usual_N`` (bool) is given, learn first what is usual from those that it marks.

        Vectors of which none is usual teach nothing, unless nothing at all is known yet.
        """
        if usual_N is None or not (usual_N.any() or self.inputs.count == 0):
            x_NSW = self.standardise(input_NV)
            z_NSF = self.statistics.standardise(summarise(x_NSW))
            return Reading(x_NSW, z_NSF, self._standardise_pooled(self._pool(z_NSF)))
        usual_N = usual_N if usual_N.any() else torch.ones_like(usual_N)
        self.inputs.update(input_NV[usual_N])
        x_NSW = self.standardise(input_NV)
        statistics_NSF = summarise(x_NSW)
        self.statistics.update(statistics_NSF[usual_N])
        z_NSF = self.statistics.standardise(statistics_NSF)
        self._add_products(z_NSF[usual_N])
        pooled_NP = self._pool(z_NSF)
        self.pooled.update(pooled_NP[usual_N])
        return Reading(x_NSW, z_NSF, self._standardise_pooled(pooled_NP))

    def standardise(self, input_NV: Tensor) -> Tensor:
        """The vectors in standard deviations of each of the 1,600 positions: [N, S, W]."""
        return self.inputs.standardise(input_NV, limit=2 * _LIMIT).view(-1, SUBSPACES, WIDTH)

    def _standardise_pooled(self, pooled_NP: Tensor) -> Tensor:
        return self.pooled.standardise(pooled_NP, floor=1e-2, limit=5.0)

    def _add_products(self, z_NSF: Tensor) -> None:
        self.products += torch.einsum("nsf,ntf->fst", z_NSF, z_NSF)
        self.weights += len(z_NSF)
        if self.weights > MEMORY:
            self.products *= MEMORY / self.weights
            self.weights.fill_(MEMORY)

    def _pool(self, z_NSF: Tensor) -> Tensor:
        against_others_NSF = self._against_others(z_NSF)
        error = (against_others_NSF**2).mean(1).add(1e-3).log()
        return torch.cat([_pool_subspaces(z_NSF), _pool_subspaces(against_others_NSF), error], 1)

    def _against_others(self, z_NSF: Tensor) -> Tensor:
        """Each statistic of each subspace less what the other 24 predict of it, in standard deviations.

        It is the conditional residual of a normal distribution: with A the inverse covariance, (A z)_s / √A_ss.
        """
        covariance_FSS = self.products / self.weights.clamp(min=1)
        ridge = 0.1 + _SHRINKAGE / self.weights.clamp(min=1)
        inverse_FSS = torch.linalg.inv(covariance_FSS + ridge * torch.eye(SUBSPACES, device=z_NSF.device))
        scale_SF = torch.diagonal(inverse_FSS, dim1=1, dim2=2).sqrt().T
        return (torch.einsum("fst,ntf->nsf", inverse_FSS, z_NSF) / scale_SF).clamp(-_LIMIT, _LIMIT)


def summarise(x_NSW: Tensor) -> Tensor:
    """The sixteen statistics of each subspace: [N, S, F], mostly logarithms of powers."""
    level = x_NSW.mean(-1)
    centred = x_NSW - level[..., None]
    variance = centred.square().mean(-1)
    first, second = x_NSW.diff(dim=-1), x_NSW.diff(n=2, dim=-1)
    peak = centred.abs().amax(-1) / (variance.sqrt() + 0.05)
    jump = torch.cat([level[:, 1:2] - level[:, :1], level.diff(dim=1)], 1)
    window = torch.hann_window(WIDTH, device=x_NSW.device)
    power = torch.fft.rfft(centred * window, dim=-1).abs().square() / WIDTH
    bands = [power[..., low:high].mean(-1) for low, high in itertools.pairwise(_BANDS)]
    powers = [x_NSW.square().mean(-1), variance, first.square().mean(-1), second.square().mean(-1), jump.square()]
    logarithms = torch.stack([*powers, *bands], -1).add(1e-3).log()
    return torch.cat([torch.stack([level, jump, peak.add(1e-3).log()], -1), logarithms], -1)


def _pool_subspaces(z_NSF: Tensor) -> Tensor:
    """Eleven numbers of each statistic over the subspaces: [N, 11·F]. Extremes, spread, steps, drift.

    Sorting and a triangular product stand for median and running sum, which CUDA does not repeat bit for bit.
    """
    middle = z_NSF.sort(1).values[:, SUBSPACES // 2, None]
    around = z_NSF - middle
    so_far = torch.ones(SUBSPACES, SUBSPACES, device=z_NSF.device).tril() / SUBSPACES**0.5
    drift = so_far @ (z_NSF - z_NSF.mean(1, keepdim=True))
    place = torch.linspace(-1, 1, SUBSPACES, device=z_NSF.device)[:, None]
    parts = [middle[:, 0], z_NSF.mean(1), around.amax(1), around.amin(1), z_NSF.amax(1), z_NSF.amin(1)]
    parts += [z_NSF.abs().mean(1), z_NSF.std(1), drift.abs().amax(1), (z_NSF * place).mean(1)]
    parts += [z_NSF.diff(dim=1).abs().amax(1)]
    return torch.cat(parts, 1)
