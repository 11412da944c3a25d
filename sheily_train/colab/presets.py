"""What a session at the worker does: its settings, their checks, and four sets of them with a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sheily_train.colab.batches import MAX_EPOCHS, MAX_SAMPLES
from sheily_train.errors import RequestError
from sheily_train.i18n import _

TYPES = ("simple", "temporal", "neuronal")
MAX_SEED = 2**32 - 1
DEFAULT_COUNT = 500


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, value, _("un entero de {low} a {high}").format(low=low, high=high))


def _wrong(name: str, value: Any, expected: str) -> RequestError:
    return RequestError(
        _("{name} vale {value}; se esperaba {expected}.").format(name=name, value=value, expected=expected)
    )


@dataclass(frozen=True)
class Settings:
    """One session. Raises :class:`RequestError` for a value that cannot be used."""

    muestras: int | None = None
    """Vectors to send; ``None``: 500 of made-up ones, all those of a file."""
    lote: int = 64
    """Vectors per batch."""
    tipo: str = "simple"
    """Kind of made-up vectors."""
    anomalias: float = 10.0
    """Anomalies among the made-up vectors, in percent."""
    semilla: int = 42
    """Decides, with the session's number, the made-up vectors, or the order of a file's; and a new run's weights."""
    epocas: int = 1
    """Passes of the worker over each batch."""
    datos: Path | None = None
    """File to read the vectors from (.npy, .npz, .csv, .parquet) instead of making them up."""
    paso: int | None = None
    """Values from one window to the next, where the file is a long series; ``None``: those of a whole window."""
    etiquetas: str | None = None
    """Name of the file's label column; ``None``: the reader looks for it."""
    feedback: bool = False
    """Tell the worker after each batch whether the loss fell."""
    diagnostico: bool = False
    """Let the worker test itself before the first batch."""
    metricas: bool = False
    """Ask the worker for its metrics after the last batch."""

    def __post_init__(self) -> None:
        if self.muestras is not None:
            _check_whole("--muestras", self.muestras, 1, 100_000_000)
        _check_whole("--lote", self.lote, 1, MAX_SAMPLES)
        _check_whole("--epocas", self.epocas, 1, MAX_EPOCHS)
        _check_whole("--semilla", self.semilla, 0, MAX_SEED)
        if self.paso is not None:
            _check_whole("--paso", self.paso, 1, 100_000_000)
        if self.tipo not in TYPES:
            raise _wrong("--tipo", self.tipo, ", ".join(TYPES))
        if not 0 <= self.anomalias <= 100:
            raise _wrong("--anomalias", self.anomalias, _("un porcentaje de 0 a 100"))
        if self.datos is None and (self.paso is not None or self.etiquetas is not None):
            raise RequestError(_("--paso y --etiquetas hablan de un archivo."), mend=_("Dalo con --datos ARCHIVO."))

    @property
    def count(self) -> int | None:
        """How many vectors at most; ``None`` for all those of the file."""
        return self.muestras if self.datos is not None else self.muestras or DEFAULT_COUNT

    def plan(self) -> dict[str, Any]:
        """Everything that decides which events the session makes, as JSON values, the file's content apart."""
        made_up = {"tipo": self.tipo, "anomalias": float(self.anomalias)}
        read = {"datos": str(Path(self.datos or "").absolute()), "paso": self.paso, "etiquetas": self.etiquetas}
        common = {
            "muestras": self.count,
            "lote": self.lote,
            "semilla": self.semilla,
            "epocas": self.epocas,
            "feedback": self.feedback,
        }
        return common | (made_up if self.datos is None else read)

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> Settings:
        """The settings whose :meth:`plan` this was."""
        values = {item.name: plan[item.name] for item in fields(cls) if item.name in plan}
        if "datos" in values:
            values["datos"] = Path(values["datos"])
        return cls(**values)


PRESETS = {
    "prueba_rapida": Settings(muestras=100, lote=32, diagnostico=True),
    "entrenamiento_estandar": Settings(muestras=1000, metricas=True),
    "deteccion_anomalias": Settings(muestras=5000, tipo="temporal", anomalias=20.0, feedback=True, metricas=True),
    "entrenamiento_pesado": Settings(muestras=10_000, lote=128, tipo="neuronal", epocas=2, metricas=True),
}


def resolve(preset: str | None, given: Mapping[str, Any]) -> Settings:
    """A preset's settings, or the defaults, with those that were given in their place; ``None`` is not given."""
    if preset is not None and preset not in PRESETS:
        raise _wrong("--preset", preset, ", ".join(PRESETS))
    base = PRESETS[preset] if preset else Settings()
    chosen = {name: value for name, value in given.items() if value is not None}
    if preset and "datos" in chosen and "muestras" not in chosen:
        chosen["muestras"] = None  # a preset's count is that of made-up vectors
    return replace(base, **chosen)
