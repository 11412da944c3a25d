"""Two views of the run log on a screen: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sheily_train.core.training.narration import describe, duration
from sheily_train.i18n import _
from sheily_train.runlog import Record
from sheily_train.tools.monitoring.fleet_view import FleetView

_SECONDS_BETWEEN_LINES = 10.0


class SilentView:
    """Shows nothing."""

    def __call__(self, record: Record) -> None:
        """Pass the record over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PlainView(SilentView):
    """Prints each record's lines as they come, of several branches with their names.

    Rates at most every ten seconds of training.
    """

    def __init__(self, stream: TextIO, *, several: bool = False) -> None:
        self._stream, self._several = stream, several
        self._told: dict[str, float] = {}

    def __call__(self, record: Record) -> None:
        """Print the record."""
        if record["event"] == "timing" and not self._is_due(record):
            return
        for line in describe(record):
            told = _("{branch}: {line}").format(branch=record["branch"], line=line) if self._several else line
            print(told, file=self._stream, flush=True)

    def _is_due(self, record: Record) -> bool:
        seconds, last = record["seconds"], record["step"] == record["steps"]
        told = self._told.get(record["branch"], 0.0)
        if not last and seconds - told < _SECONDS_BETWEEN_LINES and seconds >= told:
            return False
        self._told[record["branch"]] = seconds
        return True


class LiveView:
    """A progress bar with loss, rate, time left and memory; every other record as lines above it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._loss = ""

    def __call__(self, record: Record) -> None:
        """Show the record."""
        event = record["event"]
        if event in {"start", "resume"}:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(
                record["branch"], total=record["steps"], completed=record["step"], numbers=""
            )
        if event == "step" and self._task is not None:
            self._loss = _("pérdida {loss:.4f}").format(**record)
            self._progress.update(self._task, completed=record["step"])
        elif event == "timing" and self._task is not None:
            numbers = _("{loss} · {tokens_per_second:.0f} tokens/s · quedan {left} · {memory_mb} MB").format(
                loss=self._loss, left=duration(record["eta_seconds"]), **record
            )
            self._progress.update(self._task, numbers=numbers)
        else:
            for line in describe(record):
                self._progress.console.print(line, highlight=False, markup=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def view_for(stream: TextIO, *, quiet: bool, several: bool = False) -> FleetView | LiveView | SilentView:
    """The view that suits the stream: live on a terminal (a table for several branches), plain lines elsewhere."""
    if quiet:
        return SilentView()
    console = Console(file=stream)
    if not console.is_terminal:
        return PlainView(stream, several=several)
    return FleetView(console) if several else LiveView(console)
