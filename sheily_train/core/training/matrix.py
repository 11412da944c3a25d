"""Every specialist on every branch's held-out rows: whether each knows its own branch best.

A cell takes seconds, the whole of it hours, so each one is written down as soon as it is known: a matrix that was cut
off goes on, and one whose specialists or rows have changed measures the changed cells alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sheily_train import durable, paths, runlog
from sheily_train.core.branches import catalog
from sheily_train.core.training import specialist
from sheily_train.core.training.evaluation import Specialist, held_out_loss, held_out_rows, open_specialist
from sheily_train.errors import RequestError
from sheily_train.i18n import _

_CELL = "cell"


@dataclass(frozen=True)
class Matrix:
    """Held-out losses, in nats per answer token.

    Attributes:
        names: the branches, each with its specialist.
        base: by branch, the loss of the base that its specialist was trained from.
        loss: by specialist and branch.
    """

    names: tuple[str, ...]
    base: dict[str, float]
    loss: dict[str, dict[str, float]]

    def best(self, branch: str) -> str:
        """The specialist with the least loss on the branch's held-out rows; on a tie the branch's own."""
        return min(self.names, key=lambda name: (self.loss[name][branch], name != branch))

    def rank(self, branch: str) -> int:
        """The place of the branch's own specialist among all, from 1."""
        own = self.loss[branch][branch]
        return 1 + sum(self.loss[name][branch] < own for name in self.names)

    @property
    def own_best(self) -> int:
        """On how many branches no specialist does better than the branch's own."""
        return sum(self.rank(name) == 1 for name in self.names)

    def change(self, branch: str, name: str) -> float:
        """What specialist ``name`` adds to the base's loss on the branch, as a share of it: -0.2 is a fifth less."""
        return self.loss[name][branch] / self.base[branch] - 1

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        best = {name: self.best(name) for name in self.names}
        rank = {name: self.rank(name) for name in self.names}
        return {"branches": list(self.names), "base": self.base, "loss": self.loss, "best": best, "rank": rank}


def trained_branches(branches_dir: Path, models_dir: Path) -> tuple[str, ...]:
    """The branches that have held-out rows and a trained specialist. Raises RequestError when there are none."""
    names = tuple(
        branch.name
        for branch in catalog.find_branches(branches_dir)
        if branch.evaluation_files and specialist.read_config(models_dir / branch.name)
    )
    if not names:
        raise RequestError(
            _("No hay ningún especialista en {folder}.").format(folder=models_dir),
            mend=_("Entrénalos con: sheily train --all --lora"),
        )
    return names


def measure(
    names: Sequence[str],
    branches_dir: Path,
    models_dir: Path,
    log: Path,
    *,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Matrix:
    """Measure what ``log`` does not know yet, and write it there.

    Args:
        names: the branches whose specialists meet.
        branches_dir: where their held-out rows are.
        models_dir: where their specialists are, one folder per branch.
        log: the cells, appended to.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        progress: called with the cells that are known, and how many there are.

    Raises:
        RequestError: a branch has no specialist.
        DataError: a branch has no held-out rows, or one that is too long for its own specialist.
    """
    branches = [catalog.find_branch(branches_dir, name) for name in dict.fromkeys(names)]
    known, kept = _known(log)
    configs = {branch.name: specialist.require_config(models_dir / branch.name, branch.name) for branch in branches}
    rows = {branch.name: _rows(branch, configs[branch.name]["request"]["max_length"]) for branch in branches}
    total = len(branches) * (len(branches) + 1)
    base: dict[str, float] = {}
    loss: dict[str, dict[str, float]] = {}
    with runlog.RunLog(log, keep=kept) as written:
        for branch in branches:
            cells = _Cells(models_dir / branch.name, branch.name, device, rows, known, written)
            base[branch.name] = cells.loss(branch, of_base=True)
            row = loss[branch.name] = {}
            for other in branches:
                row[other.name] = cells.loss(other)
                progress(sum(map(len, loss.values())) + len(base), total)
    return Matrix(tuple(loss), base, loss)


class _Rows(NamedTuple):
    """A branch's held-out rows: what they are known by, and the tokens of each at most, the same for all specialists.

    A specialist that was trained on shorter rows would refuse those that another one is judged on, or lose their start.
    """

    hash: str
    max_length: int


class _Cells:
    """One specialist's cells; the model is loaded when the first unknown one is asked for."""

    def __init__(
        self,
        folder: Path,
        name: str,
        device: str,
        rows: dict[str, _Rows],
        known: dict[tuple[str, str, bool], float],
        log: runlog.RunLog,
    ) -> None:
        self._folder, self._name, self._device = folder, name, device
        self._rows, self._known, self._log = rows, known, log
        self._model = durable.sha256_file(folder / paths.TRAINING_CONFIG)  # it holds the hashes of all other files
        self._loaded: Specialist | None = None

    def loss(self, branch: catalog.Branch, *, of_base: bool = False) -> float:
        key = (self._model, self._rows[branch.name].hash, of_base)
        if key not in self._known:
            self._known[key] = self._measure(branch, of_base)
            model, rows, _of_base = key
            self._log.write(
                _CELL,
                specialist=self._name,
                branch=branch.name,
                loss=self._known[key],
                of_base=of_base,
                model=model,
                rows=rows,
            )
            self._log.sync()
        return self._known[key]

    def _measure(self, branch: catalog.Branch, of_base: bool) -> float:
        self._loaded = self._loaded or open_specialist(self._folder, self._name, self._device)
        rows = held_out_rows(branch, self._loaded, self._rows[branch.name].max_length)
        if not of_base:
            return held_out_loss(self._loaded, rows).loss
        with self._loaded.base() as base:
            return held_out_loss(base, rows).loss


def _known(log: Path) -> tuple[dict[tuple[str, str, bool], float], int]:
    """The cells of the log by model, rows and whether it is the base's, and the bytes of its whole lines."""
    records = runlog.read(log, _CELL) if log.is_file() else ()
    cells = {(cell["model"], cell["rows"], cell["of_base"]): cell["loss"] for cell in records}
    return cells, runlog.whole_lines(log)


def _rows(branch: catalog.Branch, max_length: int) -> _Rows:
    hashes = " ".join(durable.sha256_file(file) for file in branch.evaluation_files)
    return _Rows(hashlib.sha256(f"{hashes} {max_length}".encode()).hexdigest(), max_length)
