"""A trained model's folder: what it holds, whether it is current, and how a new one takes its place. Loads no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sheily_train import durable, paths
from sheily_train.errors import RequestError
from sheily_train.i18n import _

State = Literal["none", "current", "stale"]


@dataclass(frozen=True)
class TrainingResult:
    """Where the specialist and its log lie, its metrics, and whether it had been trained before."""

    folder: Path
    log: Path
    metrics: dict[str, Any]
    skipped: bool = False


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's ``training_config.json``, or ``None`` when there is no finished model."""
    config = _parse_config(folder)
    return config if config and all((folder / name).is_file() for name in config["files"]) else None


def _parse_config(folder: Path) -> dict[str, Any] | None:
    config = durable.read_json(folder / paths.TRAINING_CONFIG)
    return config if config and {"files", "data", "request"} <= config.keys() else None


def require_config(folder: Path, branch: str) -> dict[str, Any]:
    """As :func:`read_config`, but raises :class:`RequestError` when there is no finished model."""
    config = read_config(folder)
    if config is None:
        raise RequestError(
            _("La rama «{branch}» no tiene modelo entrenado en {folder}.").format(branch=branch, folder=folder),
            mend=_("Entrénalo con: sheily train --branch {branch} --lora").format(branch=branch),
        )
    return config


def result_of(folder: Path, key: str) -> TrainingResult | None:
    """What the run ``key`` has left in ``folder``, or ``None`` when it holds another's model or no finished one."""
    config = read_config(folder)
    if config is None or config["key"] != key:
        return None
    metrics = durable.read_json(folder / paths.TRAINING_METRICS) or {}
    return TrainingResult(folder, Path(config["log"]), metrics, skipped=True)


def state_of(folder: Path, data_hash: str) -> State:
    """Whether ``folder`` holds no model, one of the data with this hash, or one of other data."""
    config = read_config(folder)
    if config is None:
        return "none"
    return "current" if config["data"]["hash"] == data_hash else "stale"


def publish(staging: Path, output: Path) -> None:
    """Move a finished model's files from ``staging`` to ``output``, each whole, ``training_config.json`` last.

    Files of an earlier model of ours that the new one lacks are removed; whatever else lies in the folder stays. After
    a kill in between, the next call with the same ``staging`` ends the move.
    """
    durable.make_folder(output)
    earlier, new = (_parse_config(folder) or {"files": {}} for folder in (output, staging))
    for name in earlier["files"].keys() - new["files"].keys():
        (output / name).unlink(missing_ok=True)
    (output / paths.TRAINING_CONFIG).unlink(missing_ok=True)
    moved = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for name in sorted(moved, key=lambda name: name.name == paths.TRAINING_CONFIG):
        durable.make_folder((output / name).parent)
        durable.move(staging / name, output / name)
    durable.sync_folder(output)
    shutil.rmtree(staging)


def is_complete(staging: Path) -> bool:
    """Whether ``staging`` was fully written: its ``training_config.json`` is written last."""
    return (staging / paths.TRAINING_CONFIG).is_file()
