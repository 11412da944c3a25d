"""Checkpoints that are whole or absent.

A checkpoint is a folder ``step-00000042`` with ``state.safetensors``, ``state.json`` and ``manifest.json``. It is
written under a temporary name, every file is fsynced, the manifest with the sha256 of the others comes last, then the
folder is renamed and its parent fsynced. The newest one whose hashes verify is the one that is loaded; two are kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheily_train import durable

if TYPE_CHECKING:
    import torch

_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
UNFINISHED = "unfinished"
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by name, and the numbers beside them."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint of ``step`` below ``folder`` and drop all but the newest two.

    Raises :class:`OSError` when the disk is full; the earlier checkpoints are then intact.
    """
    durable.make_folder(folder)
    final = folder / f"step-{step:08d}"
    temporary = folder / UNFINISHED
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_files(temporary, tensors, state)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    durable.sync_folder(folder)
    kept = [path for path in _folders(folder) if path <= final][-_KEPT:]  # later ones did not verify
    for other in set(_folders(folder)) - set(kept):
        shutil.rmtree(other)


def _write_files(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    durable.save_tensors(folder / _TENSORS, tensors)
    durable.write_json(folder / _STATE, state)
    durable.write_json(folder / _MANIFEST, {name: durable.sha256_file(folder / name) for name in (_TENSORS, _STATE)})


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint that verifies (or none), and the newer ones that did not and were passed over."""
    from safetensors.torch import load_file

    damaged: list[Path] = []
    for candidate in reversed(_folders(folder)):
        if _verifies(candidate):
            state = json.loads((candidate / _STATE).read_text(encoding="utf-8"))
            return Checkpoint(_step(candidate), load_file(candidate / _TENSORS), state), damaged
        damaged.append(candidate)
    return None, damaged


def steps_to_go_on_from(folder: Path) -> set[int]:
    """The steps whose checkpoints verify, and 0 as long as none has been dropped."""
    folders = _folders(folder)
    return {_step(path) for path in folders if _verifies(path)} | ({0} if len(folders) < _KEPT else set())


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in _folders(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _verifies(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return set(manifest) == {_TENSORS, _STATE} and all(
            durable.sha256_file(folder / name) == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError):
        return False


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-????????"))
