"""What each head is asked to do, and why.

Anomaly
    Binary cross-entropy of the labelled vectors, both classes weighing the same however rare anomalies are. Vectors
    without a label take no part in it.
Reconstruction
    Five of the 25 subspaces are hidden from layers 2 to 4; the decoder rebuilds all 25. It needs no label, so every
    batch teaches the trunk.
Coherence
    64 numbers, self-supervised: the coherent average. Position by position, the standardised subspaces are averaged,
    multiplied by √25 (so that noise has size 1 whatever the number of subspaces) and squashed by tanh(·/2). What the
    subspaces share survives an average, what each has alone cancels: 0 means that the windows have nothing in common
    there, ±1 that they agree. The network must say it of the whole vector while it sees four fifths of it; so the head
    learns what is common, and cannot copy it.
Dendrites
    16 adjustments, learned from feedback on adjustments that were applied. The state a batch left in layer 4 is
    remembered with what was applied then; validated adjustments pull the head towards them (squared distance), rejected
    ones push it away while it is nearer than a margin. Without feedback this head does not move.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sheily_train.colab.batches import NO_LABEL
from sheily_train.core.omega.surprise import SUBSPACES

HIDDEN_SUBSPACES = 5
MARGIN = 0.5


def anomaly_loss(logits_N: Tensor, labels_N: Tensor) -> Tensor:
    """Class-balanced cross-entropy; 0 when nothing is labelled. Labels: 1, 0, −1 for none."""
    known = labels_N != NO_LABEL
    if not known.any():
        return logits_N.sum() * 0
    target = (labels_N[known] == 1).float()
    losses = functional.binary_cross_entropy_with_logits(logits_N[known], target, reduction="none")
    classes = [losses[target == kind].mean() for kind in (0, 1) if (target == kind).any()]
    return torch.stack(classes).mean()


def coherence_target(x_NSW: Tensor) -> Tensor:
    """The coherent average of standardised vectors [N, S, W]: [N, W] in −1..1."""
    return torch.tanh(x_NSW.mean(1) * SUBSPACES**0.5 / 2)


def visible_subspaces(count: int, generator: torch.Generator) -> Tensor:
    """Which subspaces layers 2 to 4 may see: float [N, S], five zeros a row."""
    order_NS = torch.rand(count, SUBSPACES, generator=generator).argsort(1)
    return (order_NS >= HIDDEN_SUBSPACES).float()


def dendrite_loss(dendrites_KD: Tensor, adjustments_KD: Tensor, verdict_K: Tensor) -> Tensor:
    """Pull to what was validated (verdict 1), push from what was rejected (−1); 0 marks an empty place."""
    distance_K = (dendrites_KD - adjustments_KD).square().mean(1)
    push_K = (MARGIN - (distance_K + 1e-6).sqrt()).clamp(min=0).square()
    losses_K = torch.where(verdict_K > 0, distance_K, push_K) * verdict_K.abs()
    return losses_K.sum() / verdict_K.abs().sum().clamp(min=1)
