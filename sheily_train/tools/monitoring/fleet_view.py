"""Several branches on a terminal: one table that changes in place, a row per branch."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sheily_train.core.training.narration import duration
from sheily_train.i18n import _
from sheily_train.runlog import Record

STATES = {"trained": _("entrenada"), "current": _("al día"), "failed": _("falló")}
"""How a branch ended, in a word."""
_LINES_BESIDE_ROWS = 5


@dataclass
class _Row:
    """What the table shows of a branch."""

    state: str = _("en espera")
    loss: str = ""
    rate: str = ""
    left: str = ""
    ended: bool = False


class FleetView:
    """A live table of branch, state, loss, tokens/s and time left; as many rows as the terminal has room for."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, _Row] = {}
        self._now = ""
        self._trained_seconds: list[float] = []
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __call__(self, record: Record) -> None:
        """Take the record in."""
        event = record["event"]
        if event == "fleet_start":
            self._rows = {name: _Row() for name in record["branches"]}
        elif event in {"start", "resume"}:
            self._now = record["branch"]
            self._rows[record["branch"]].state = _("paso {step}/{steps}").format(**record)
        elif event == "timing":
            row = self._rows[record["branch"]]
            row.state = _("paso {step}/{steps}").format(**record)
            row.rate = f"{record['tokens_per_second']:.0f}"
            row.left = duration(record["eta_seconds"])
        elif event == "step":
            self._rows[record["branch"]].loss = f"{record['loss']:.4f}"
        elif event == "fleet_branch":
            self._end(record)

    def _end(self, record: Record) -> None:
        row = self._rows[record["branch"]]
        before, after = record["heldout_before"], record["heldout_after"]
        row.state, row.left, row.ended = STATES[record["state"]], "", True
        row.loss = f"{before['loss']:.4f} → {after['loss']:.4f}" if before and after else ""
        if record["state"] == "trained":
            self._trained_seconds.append(record["seconds"])
            row.rate = f"{record['tokens'] / record['seconds']:.0f}" if record["seconds"] else ""
        elif record["error"]:
            row.loss = record["error"]

    def _render(self) -> RenderableType:
        table = Table(box=None, header_style="bold")
        for title, right in (
            (_("Rama"), False),
            (_("Estado"), False),
            (_("Pérdida"), False),
            (_("tokens/s"), True),
            (_("Quedan"), True),
        ):
            table.add_column(title, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        for name in self._window():
            row = self._rows[name]
            table.add_row(*map(Text, (name, row.state, row.loss, row.rate, row.left)))
        return Group(table, Text(self._summary()))

    def _window(self) -> list[str]:
        """The branches there is room for: the one at work, as many before it as after it."""
        names = list(self._rows)
        room = max(3, self._console.height - _LINES_BESIDE_ROWS)
        at = names.index(self._now) if self._now else 0
        first = max(0, min(at - room // 2, len(names) - room))
        return names[first : first + room]

    def _summary(self) -> str:
        """How many have ended, and the time left when the rest takes as long as those trained now."""
        ended = sum(row.ended for row in self._rows.values())
        text = _("{ended} de {count} ramas").format(ended=ended, count=len(self._rows))
        waiting = len(self._rows) - ended
        if waiting and self._trained_seconds:
            mean = sum(self._trained_seconds) / len(self._trained_seconds)
            text += _("; quedan unos {time}").format(time=duration(mean * waiting))
        return text

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
