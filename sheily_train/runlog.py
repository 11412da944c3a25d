"""The run log: one JSON object a line, written by training, read by terminal, reports and dashboards.

Every record has an ``event``. ``step`` and ``eval`` records hold only what the run's inputs decide, so that a resumed
run writes them byte for byte as an undisturbed one would; what the clock and the machine say goes into records of other
names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sheily_train import durable
from sheily_train.errors import DataError
from sheily_train.i18n import _

Record = dict[str, Any]
Listener = Callable[[Record], None]

DETERMINISTIC_EVENTS = frozenset({"step", "eval"})


class RunLog:
    """An append-only log whose records are also passed to listeners (progress bars, trackers).

    Args:
        path: the ``.jsonl`` file; created if absent, and appended to.
        keep: how many bytes of an existing file are kept; what a killed run wrote after its checkpoint is cut off.
        listeners: called with each record after it was written.
    """

    def __init__(self, path: Path, *, keep: int = 0, listeners: tuple[Listener, ...] = ()) -> None:
        durable.make_folder(path.parent)
        self.path = path
        self._listeners = listeners
        self._file = path.open("ab")
        self._file.truncate(keep)
        self._file.seek(0, os.SEEK_END)

    def write(self, event: str, **fields: Any) -> None:
        """Append one record and hand it to the listeners. A number that is not finite becomes ``null``."""
        record: Record = {"event": event} | {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        with durable.naming(self.path):
            self._file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
            self._file.flush()
        for listener in self._listeners:
            listener(record)

    def sync(self) -> int:
        """Push everything written to the disk; returns the log's length in bytes."""
        with durable.naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        with durable.naming(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path, event: str | None = None) -> Iterator[Record]:
    """The records of a log, or those of one event. A last line that a kill cut short is passed over.

    Raises :class:`DataError` for a line that is no record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record: Record = json.loads(line)
                found = record["event"]
            except (ValueError, KeyError, TypeError) as error:
                raise no_record(path, number) from error
            if not isinstance(found, str):
                raise no_record(path, number)
            if event is None or found == event:
                yield record


def whole_lines(path: Path) -> int:
    """The length of a log, if there is one, without a last line that a kill cut short."""
    return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0


def no_record(path: Path, line: int) -> DataError:
    """The error of a line that is no record of a run."""
    return DataError(
        _("{log}:{line}: no es una línea de un registro de entrenamiento.").format(log=path, line=line),
        mend=_("Quita esa línea y repite."),
    )


def deterministic_lines(path: Path) -> list[str]:
    """The lines that two runs of the same request on the same kind of machine have in common."""
    return [json.dumps(record) for record in read(path) if record["event"] in DETERMINISTIC_EVENTS]
