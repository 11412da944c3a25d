from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import pytest

from sheily_train.errors import MissingExtraError
from sheily_train.tools.monitoring.trackers import TRACKERS, tracker

RUN: list[dict[str, Any]] = [
    {"event": "start", "branch": "physics"},
    {"event": "eval", "step": 0, "loss": 3.0, "perplexity": 20.0},
    {"event": "step", "step": 1, "loss": 2.5, "lr": 0.5, "grad_norm": None, "tokens": 100},
    {"event": "step", "step": 2, "loss": 1.5, "lr": 0.25, "grad_norm": 2.0, "tokens": 100},
    {"event": "timing", "step": 2, "steps": 2, "tokens_per_second": 512.0, "memory_mb": 900, "seconds": 1.0},
    {"event": "note", "text": "algo"},
    {"event": "done", "loss": 9.0},
]
EXPECTED = {
    "eval/loss": [(0, 3.0)],
    "eval/perplexity": [(0, 20.0)],
    "step/loss": [(1, 2.5), (2, 1.5)],
    "step/lr": [(1, 0.5), (2, 0.25)],
    "step/grad_norm": [(2, 2.0)],
    "timing/tokens_per_second": [(2, 512.0)],
    "timing/memory_mb": [(2, 900.0)],
}


def test_tensorboard_reads_back_every_number(tmp_path: Path) -> None:
    """Names, steps and values, one folder a run; a number that a step did not have is left out."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("physics", "music"):
        listen = tracker("tensorboard", name, tmp_path)
        for record in RUN:
            listen(record)
    assert {path.name for path in tmp_path.iterdir()} == {"physics", "music"}
    events = EventAccumulator(str(tmp_path / "physics")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == EXPECTED


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("tensorboard", "tensorboard", "tensorboard"), ("wandb", "wandb", "wandb"), ("mlflow", "mlflow", "mlflow-skinny")],
)
def test_a_missing_package_is_told_with_its_install_line(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the training starts."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"«{package}», necesario para --report-to") as caught:
        tracker(name, "physics", tmp_path)
    assert "pip install 'sheily-train[trackers]'" in caught.value.mend


def test_the_command_line_offers_every_tracker() -> None:
    """``--report-to`` has the same names."""
    from sheily_train.cli.train import train

    (choice,) = (parameter.type for parameter in train.params if parameter.name == "report_to")
    assert isinstance(choice, click.Choice)
    assert tuple(choice.choices) == TRACKERS
