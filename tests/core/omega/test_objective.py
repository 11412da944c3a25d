from __future__ import annotations

import torch

from sheily_train.core.omega.objective import (
    HIDDEN_SUBSPACES,
    MARGIN,
    anomaly_loss,
    coherence_target,
    dendrite_loss,
    visible_subspaces,
)
from sheily_train.core.omega.surprise import SUBSPACES


def test_both_classes_weigh_the_same() -> None:
    """One anomaly among ninety-nine normals pulls as hard as the ninety-nine."""
    logits = torch.zeros(100, requires_grad=True)
    labels = torch.zeros(100, dtype=torch.int8)
    labels[0] = 1
    anomaly_loss(logits, labels).backward()
    assert logits.grad is not None
    assert torch.isclose(-logits.grad[0], logits.grad[1:].sum())


def test_vectors_without_label_take_no_part() -> None:
    """An unlabelled batch has loss and gradient 0; an unlabelled vector in a labelled batch changes nothing."""
    logits = torch.tensor([2.0, -1.0, 5.0], requires_grad=True)
    nothing = anomaly_loss(logits, torch.tensor([-1, -1, -1]))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert anomaly_loss(logits, torch.tensor([1, 0, -1])) == anomaly_loss(logits[:2], torch.tensor([1, 0]))


def test_coherence_is_what_the_subspaces_share() -> None:
    """A pattern common to all subspaces shows at its full size, its opposite cancels it, noise stays small."""
    pattern = torch.sin(torch.arange(64) / 5).expand(1, SUBSPACES, 64)
    assert coherence_target(pattern).abs().max() > 0.98
    halves = torch.ones(1, SUBSPACES, 1)
    halves[:, ::2] = -1
    assert coherence_target(pattern * halves).abs().max() < 0.11
    noise = torch.randn(200, SUBSPACES, 64, generator=torch.Generator().manual_seed(0))
    assert 0.35 < coherence_target(noise).std() < 0.5


def test_five_subspaces_are_hidden_in_every_vector() -> None:
    """The generator alone decides which."""
    first, again = (visible_subspaces(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert ((first == 0).sum(1) == HIDDEN_SUBSPACES).all()
    assert first.std(0).min() > 0


def test_validated_adjustments_pull_and_rejected_ones_push() -> None:
    """The gradient leads towards the first, away from the second, and nowhere once these are beyond the margin."""
    target = torch.full((1, 16), 0.2)
    for verdict, towards in ((1.0, True), (-1.0, False)):
        dendrites = torch.zeros(1, 16, requires_grad=True)
        dendrite_loss(dendrites, target, torch.tensor([verdict])).backward()
        assert dendrites.grad is not None
        assert bool((-dendrites.grad > 0).all()) is towards
    far = torch.full((1, 16), 0.2 + MARGIN + 0.01)
    assert dendrite_loss(far, target, torch.tensor([-1.0])) == 0


def test_empty_places_of_the_memory_weigh_nothing() -> None:
    """The loss is the mean over the feedback there is."""
    dendrites, adjustments = torch.zeros(4, 16), torch.full((4, 16), 0.5)
    assert dendrite_loss(dendrites, adjustments, torch.zeros(4)) == 0
    assert dendrite_loss(dendrites, adjustments, torch.tensor([1.0, 0, 0, 0])) == 0.25
