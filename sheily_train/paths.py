"""Every folder and file name of the project, once."""

from __future__ import annotations

import os
from pathlib import Path

BRANCHES_FOLDER = "all-Branches"
TRAINING_DATA = Path("training") / "data"
EVALUATION_DATA = Path("evaluation") / "data"
ROWS_SUFFIX = ".jsonl"

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_CONFIG = "config.json"
TRAINING_CONFIG = "training_config.json"
TRAINING_METRICS = "training_metrics.json"
MODEL_CARD = "README.md"


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser().resolve() if value else None


def project_root() -> Path:
    """The folder that holds ``all-Branches/`` and ``var/``.

    ``SHEILY_HOME`` when set; else the nearest folder from the current one upwards that holds ``all-Branches``; else the
    checkout this package lies in, when it holds one; else the current folder.
    """
    if home := _from_environment("SHEILY_HOME"):
        return home
    here = Path.cwd()
    checkout = Path(__file__).resolve().parent.parent
    for folder in (here, *here.parents, checkout):
        if (folder / BRANCHES_FOLDER).is_dir():
            return folder
    return here


def branches_dir() -> Path:
    """The folder with one folder per branch: ``SHEILY_BRANCHES_DIR`` when set."""
    return _from_environment("SHEILY_BRANCHES_DIR") or project_root() / BRANCHES_FOLDER


def models_dir() -> Path:
    """The folder that receives one trained model per branch: ``SHEILY_MODELS_DIR`` when set."""
    return _from_environment("SHEILY_MODELS_DIR") or project_root() / "var" / "central_models"


def logs_dir() -> Path:
    """The folder that receives the run logs."""
    return project_root() / "var" / "central_logs"


def omega_dir() -> Path:
    """The folder of OMEGA 21: one folder per run on the desk (journal, snapshots), ``worker`` for a worker's own."""
    return project_root() / "var" / "omega"


def cache_dir() -> Path:
    """The folder for what can be fetched again: ``SHEILY_CACHE``, else ``sheily-train`` in the user's cache folder."""
    if cache := _from_environment("SHEILY_CACHE"):
        return cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sheily-train"


def work_dir(output: Path) -> Path:
    """Where a run keeps its lock, its checkpoints and its unfinished result, beside the ``output`` it will fill."""
    return output.parent / f".{output.name}.work"
