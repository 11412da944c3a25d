from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from sheily_train.core.training.engine import schedule_factor, warmup_steps
from sheily_train.core.training.request import TrainRequest


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (0, 1), (1, 1), (12, 10)])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_the_curves_are_transformers_own(ours: str, theirs: str, warmup: int, total: int) -> None:
    """Step by step, with and without warm-up, one longer than the run included."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    expected = []
    for _step in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [schedule_factor(ours, step, warmup, total) for step in range(total)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("total", [1, 10, 33, 1000])
@pytest.mark.parametrize("asked", [0.0, 0.03, 0.1, 0.999, 1.0, 2.7, 50.0])
def test_the_warm_up_is_as_long_as_transformers(asked: float, total: int) -> None:
    """Below one it is a part of the run, from one on a number of steps."""
    theirs: Any = TrainingArguments.get_warmup_steps
    assert warmup_steps(TrainRequest(warmup_steps=asked), total) == theirs(SimpleNamespace(warmup_steps=asked), total)
