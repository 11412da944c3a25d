"""The run log in a person's words: one Spanish line per record, for ``training_*.log``, pipes and terminals."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from sheily_train import durable
from sheily_train.i18n import _, ngettext
from sheily_train.runlog import Record


def describe(record: Record) -> list[str]:
    """The lines that tell a record; none for those that are only for machines."""
    teller = _TELLERS.get(record["event"])
    return teller(record) if teller else []


def _start(record: Record) -> list[str]:
    lines = [
        _("Rama {branch}: {rows} ({format}), {heldout}; base {model}"),
        _("Dónde: {reason}"),
        _("Trabajo: {work}; por pasada {tokens} tokens, {answer_tokens} de respuesta; fila más larga: {longest_row}"),
        _("Parámetros: {trainable} entrenables de {all}"),
        _("Memoria: unos {memory:.1f} GB de {memory_free:.1f} GB libres"),
        _("Disco: unos {disk:.0f} MB de {disk_free:.0f} MB libres"),
    ]
    if record["init_adapter"]:
        lines.insert(1, _("Parte del adaptador {init_adapter}"))
    if record["early_stopping"] and not record["heldout_examples"]:
        lines.append(_("Aviso: sin ejemplos reservados, --early-stopping no para nada: se dan todas las pasadas"))
    examples, heldout, steps = record["examples"], record["heldout_examples"], record["steps"]
    values = record | {
        "rows": ngettext("{count} ejemplo", "{count} ejemplos", examples).format(count=examples),
        "heldout": ngettext("{count} reservado", "{count} reservados", heldout).format(count=heldout),
        "work": ngettext("{count} paso", "{count} pasos", steps).format(count=steps),
        "reason": record["placement"]["reason"],
        "trainable": f"{record['trainable_parameters']:,}".replace(",", " "),
        "all": f"{record['parameters']:,}".replace(",", " "),
        "memory": record["memory_bytes"] / 1e9,
        "memory_free": record["memory_free_bytes"] / 1e9,
        "disk": record["disk_bytes"] / 1e6,
        "disk_free": record["disk_free_bytes"] / 1e6,
    }
    return [line.format(**values) for line in lines]


def _resume(record: Record) -> list[str]:
    return [*_start(record), _("Sigue desde el paso {step} de {steps}").format(**record)]


def _eval(record: Record) -> list[str]:
    return [_("Paso {step}: pérdida reservada {loss:.4f} (perplejidad {perplexity:.2f})").format(**record)]


def _timing(record: Record) -> list[str]:
    return [
        _("Paso {step}/{steps}: {tokens_per_second:.0f} tokens/s, quedan {left}, {memory_mb} MB").format(
            left=duration(record["eta_seconds"]), **record
        )
    ]


def _done(record: Record) -> list[str]:
    return [_("Terminado en {time}").format(time=duration(record["timing"]["seconds"]))]


def _note(record: Record) -> list[str]:
    return [str(record["text"])]


_TELLERS: dict[str, Callable[[Record], list[str]]] = {
    "start": _start,
    "resume": _resume,
    "eval": _eval,
    "timing": _timing,
    "done": _done,
    "note": _note,
}


def duration(seconds: float) -> str:
    """``75`` → ``1 min 15 s``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


class TextLog:
    """A listener that appends every told line to a file, with the time before it."""

    def __init__(self, path: Path) -> None:
        durable.make_folder(path.parent)  # a person may have cleared it away before the run goes on
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, record: Record) -> None:
        """Append the record's lines."""
        for line in describe(record):
            self._file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
