"""Experiment trackers as listeners of the run log: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sheily_train.errors import MissingExtraError
from sheily_train.i18n import _
from sheily_train.runlog import Listener, Record

_NUMBERS = {
    "step": ("loss", "lr", "grad_norm"),
    "eval": ("loss", "perplexity"),
    "timing": ("tokens_per_second", "memory_mb"),
}

LogNumbers = Callable[[dict[str, float], int], None]


def tracker(name: str, run_name: str, folder: Path) -> Listener:
    """A listener that sends a run's numbers to ``tensorboard``, ``wandb`` or ``mlflow``.

    Args:
        name: the tracker.
        run_name: what the run is called there.
        folder: where trackers that write files put them.

    Raises:
        MissingExtraError: the tracker's package is not installed.
    """
    send, finish = _TRACKERS[name](run_name, folder)

    def listen(record: Record) -> None:
        event = record["event"]
        if names := _NUMBERS.get(event):
            send({f"{event}/{key}": record[key] for key in names if record[key] is not None}, record["step"])
        elif event == "done":
            finish()

    return listen


def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(package, "trackers", _("--report-to")) from None


def _tensorboard(run_name: str, folder: Path) -> tuple[LogNumbers, Callable[[], None]]:
    _load("tensorboard", "tensorboard")
    writer = _load("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / run_name))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _wandb(run_name: str, folder: Path) -> tuple[LogNumbers, Callable[[], None]]:
    folder.mkdir(parents=True, exist_ok=True)
    run = _load("wandb", "wandb").init(project="sheily-train", name=run_name, dir=str(folder))
    return lambda numbers, step: run.log(numbers | {"step": step}), run.finish


def _mlflow(run_name: str, _folder: Path) -> tuple[LogNumbers, Callable[[], None]]:
    mlflow = _load("mlflow", "mlflow-skinny")
    mlflow.set_experiment("sheily-train")
    mlflow.start_run(run_name=run_name)
    return lambda numbers, step: mlflow.log_metrics(numbers, step=step), mlflow.end_run


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
TRACKERS = tuple(_TRACKERS)
