"""A run's place on disk: who holds the branch, what was begun, its checkpoints and its unfinished result.

``.<output>.work/`` beside the output holds ``lock``, ``holder.json`` and one folder per unfinished run, named by its
key: ``run.json``, ``checkpoints/``, ``result/``, and ``group.json`` when it takes its steps together with others.
Requests that differ have different keys, so none overwrites another's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from sheily_train import durable, paths
from sheily_train.core.training import checkpoint
from sheily_train.core.training.checkpoint import Checkpoint
from sheily_train.errors import BusyError, Interrupted, RequestError
from sheily_train.i18n import _

_GROUP = "group.json"


class Run:
    """The folder of the run ``key`` that will fill ``output``. Nothing is created before :meth:`begin`."""

    def __init__(self, output: Path, key: str) -> None:
        self.folder = paths.work_dir(output) / key
        self.checkpoints = self.folder / "checkpoints"
        self.result = self.folder / "result"

    @property
    def record(self) -> dict[str, Any] | None:
        """What :meth:`begin` wrote: log, placement, fingerprint; ``None`` when the run was never begun."""
        return durable.read_json(self.folder / "run.json")

    def begin(self, branch: str, placement: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
        """The run's record, written now if this is its first sitting."""
        record = self.record
        if record is None:
            log = _new_log(branch)
            record = {"log": str(log), "placement": placement, "fingerprint": fingerprint}
            durable.write_json(self.folder / "run.json", record)
        return record

    @property
    def group(self) -> list[str]:
        """The model folders of the branches that take their steps together with this one; empty when it goes alone."""
        return list((durable.read_json(self.folder / _GROUP) or {}).get("outputs", []))

    def remember_group(self, outputs: list[str]) -> None:
        """Write down who goes together."""
        if outputs != self.group:
            durable.make_folder(self.folder)
            durable.write_json(self.folder / _GROUP, {"outputs": outputs})

    def forget_group(self) -> None:
        """From now on it goes alone."""
        (self.folder / _GROUP).unlink(missing_ok=True)

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[Path]]:
        """The checkpoint to go on from, and damaged ones that were passed over."""
        return checkpoint.load_newest(self.checkpoints)

    def discard(self) -> None:
        """Forget the run: its result is published, or it is to start anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def others(self) -> list[Path]:
        """Unfinished runs of the same output with other settings or data."""
        return sorted(path.parent for path in self.folder.parent.glob("*/run.json") if path.parent != self.folder)


def newest_common_step(runs: Sequence[Run]) -> int | None:
    """The newest step that all runs can go on from (0: anew), or ``None``."""
    steps = [checkpoint.steps_to_go_on_from(run.checkpoints) for run in runs]
    return max(set.intersection(*steps), default=None)


def _new_log(branch: str) -> Path:
    """A log name that no other run has, claimed by creating the file."""
    folder = paths.logs_dir()
    durable.make_folder(folder)
    stem = f"training_{branch}_{datetime.now():%Y%m%d-%H%M%S}"
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 100))):
        path = folder / f"{name}.jsonl"
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise FileExistsError(path)


@contextlib.contextmanager
def hold(output: Path, branch: str) -> Iterator[None]:
    """Hold ``output`` for this process; a dead process holds nothing.

    Raises :class:`BusyError` saying who has it, :class:`RequestError` when it can be no folder.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(
            _("{output} es un archivo; se esperaba una carpeta.").format(output=output),
            mend=_("Elige otra con --output."),
        )
    work = paths.work_dir(output)
    durable.make_folder(work)
    holder = work / "holder.json"
    try:
        lock = FileLock(work / "lock").acquire(timeout=0)
    except Timeout:
        who = durable.read_json(holder) or {"pid": "?", "host": "?", "since": "?"}
        raise BusyError(
            _("La rama «{branch}» ya se está entrenando: proceso {pid} en {host}, desde {since}.").format(
                branch=branch, **who
            ),
            mend=_("Espera a que termine, o detenlo: guardará lo hecho."),
        ) from None
    with lock:
        durable.write_json(
            holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        )
        yield


def interrupted(number: int, text: str) -> Interrupted:
    """The error that ends the program at the signal ``number``."""
    error = Interrupted(text, mend=_("Repite la misma orden para seguir."))
    error.exit_code = 128 + number
    return error


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step, and says so; a second stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(OSError, RuntimeError):  # a closed terminal; a line that was just being written
            sys.stderr.write(_("Se para tras este paso, con todo guardado; otra señal corta ya.") + "\n")
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
