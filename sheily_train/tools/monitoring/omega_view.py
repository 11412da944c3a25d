"""A session of remote training on a screen: a live bar on a terminal, plain lines in a pipe, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import TextIOWrapper
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sheily_train.colab.breaks import differences, whereto
from sheily_train.colab.tally import Tally
from sheily_train.colab.verdicts import reason_text
from sheily_train.i18n import _, _n
from sheily_train.runlog import Record
from sheily_train.tools.monitoring.terminal import SilentView

Clock = Callable[[], float]

_SECONDS_BETWEEN_LINES = 5.0


class Pulse:
    """What the progress shows of a session: counted from its records, timed by the clock."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._tally = Tally()
        self._queue = 0
        self.done = self.batches = 0

    def add(self, record: Record) -> None:
        """Count a record; a session's own begins the count anew, its retries while connecting apart."""
        if record["event"] == "session":
            self._started, self._tally = self._clock(), Tally(retries=self._tally.retries)
            self.done, self.batches = record["done"], record["batches"]
        before = self._tally.batches
        self._tally.add(record)
        self.done += self._tally.batches - before
        if record["event"] == "wire":
            self._queue = record.get("queue") or 0

    def numbers(self) -> str:
        """Loss, anomaly share, vectors a second, retries and queue, those that there are."""
        tally, seconds = self._tally, self._clock() - self._started
        told = []
        if tally.loss is not None:
            told.append(_("pérdida {loss:.4f}").format(loss=tally.loss))
        if tally.anomaly_prob is not None:
            told.append(_("anomalía {percent:.1f} %").format(percent=100 * tally.anomaly_prob))
        if tally.vectors and seconds > 0:
            told.append(_("{rate:.0f} vectores/s").format(rate=tally.vectors / seconds))
        told.append(_("reintentos {count}").format(count=tally.retries))
        told.append(_("en cola {count}").format(count=self._queue))
        return " · ".join(told)


class PlainOmegaView(SilentView):
    """Prints each record's lines as they come, and the progress at most every five seconds."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._pulse = Pulse(clock)
        self._told = clock()

    def __call__(self, record: Record) -> None:
        """Print the record."""
        self._pulse.add(record)
        lines = tell(record)
        if record["event"] == "step" and self._is_due():
            progress = _("Lote {done}/{batches}: {numbers}")
            lines = [progress.format(done=self._pulse.done, batches=self._pulse.batches, numbers=self._pulse.numbers())]
        for line in lines:
            print(line, file=self._stream, flush=True)

    def _is_due(self) -> bool:
        now = self._clock()
        if not self._pulse.batches:  # a replay, before the session
            return False
        if now - self._told < _SECONDS_BETWEEN_LINES and self._pulse.done != self._pulse.batches:
            return False
        self._told = now
        return True


class LiveOmegaView(SilentView):
    """A progress bar with the numbers beside it; every other record as lines above it."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._pulse = Pulse(clock)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __call__(self, record: Record) -> None:
        """Show the record."""
        self._pulse.add(record)
        event = record["event"]
        if event in {"session", "done"} and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        for line in tell(record):
            self._progress.console.print(line, highlight=False, markup=False)
        if event == "session":
            name = _("sesión {number}").format(number=record["session"])
            self._task = self._progress.add_task(name, total=self._pulse.batches, numbers="")
        if self._task is not None:
            self._progress.update(self._task, completed=self._pulse.done, numbers=self._pulse.numbers())

    def __enter__(self) -> LiveOmegaView:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()


def omega_view(stream: TextIO, *, quiet: bool) -> LiveOmegaView | SilentView:
    """The view that suits the stream: live on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        return SilentView()
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal without «✅» gets a question mark
    console = Console(file=stream)
    return LiveOmegaView(console) if console.is_terminal else PlainOmegaView(stream)


def tell(record: Record) -> list[str]:
    """The lines that tell a record; none for those that only move the progress on."""
    teller = _TELLERS.get(record["event"])
    return teller(record) if teller else []


def _plain(_record: Record) -> list[str]:
    return [_("El trabajador es un OMEGA 21 v4.0: aprende igual, pero un corte puede perder o repetir lotes.")]


def _worker(record: Record) -> list[str]:
    return [_("Conectado a {url} (entrenamiento «{run}», dispositivo {device})").format(**record)]


def _diagnosis(record: Record) -> list[str]:
    gpu = record.get("gpu_info") or {}
    shapes = " · ".join(f"{name} {shape}" for name, shape in (record.get("outputs_shapes") or {}).items())
    line = _("Diagnóstico correcto: entrada {shape}; salidas {shapes}; CUDA: {cuda}")
    cuda = _("sí") if gpu.get("cuda") else _("no")
    return [line.format(shape=record.get("test_input_shape", "?"), shapes=shapes or "?", cuda=cuda)]


def _session(record: Record) -> list[str]:
    if record["resumed"]:
        done = _n(
            "Sigue la sesión {session}: {done} de {batches} lotes ya estaba en el diario",
            "Sigue la sesión {session}: {done} de {batches} lotes ya estaban en el diario",
            record["done"],
        )
        return [done.format(**record)]
    line = _("Sesión {session}: {vectors} ({source}) en {parts} de {lote}, pasadas: {epochs}")
    return [line.format(vectors=_vectors(record["samples"]), parts=_batches(record["batches"]), **record)]


def _vectors(count: int) -> str:
    return _n("{count} vector", "{count} vectores", count).format(count=count)


def _batches(count: int) -> str:
    return _n("{count} lote", "{count} lotes", count).format(count=count)


def _retry(record: Record) -> list[str]:
    wait = record.get("wait") or 0.0
    return [
        _("Reintento {attempt} en {wait:.1f} s: {reason}").format(
            attempt=record.get("attempt", "?"), wait=wait, reason=reason_text(str(record.get("reason", "?")))
        )
    ]


def _resync(record: Record) -> list[str]:
    return [_("El trabajador recupera desde el diario los eventos {from_seq} a {to_seq}").format(**record)]


def _rebase(record: Record) -> list[str]:
    place = _("El entrenamiento vuelve {whereto} y se entrena de nuevo desde ahí").format(
        whereto=whereto(record["seq"])
    )
    machines = differences(record["from"], record["to"])
    return [f"{place}: {machines}" if machines else place]


def _metrics(record: Record) -> list[str]:
    losses = [loss for loss in record.get("ultimos_20_losses") or [] if isinstance(loss, int | float)]
    lines = [_("Métricas del trabajador:")]
    if losses:
        lines.append(_("   Últimas pérdidas: {losses}").format(losses=" ".join(f"{loss:.4f}" for loss in losses[-5:])))
    for name, label in (("tendencia", _("Tendencia")), ("anomalias_detectadas", _("Anomalías detectadas"))):
        if record.get(name) is not None:
            lines.append(f"   {label}: {record[name]}")
    rate = record.get("feedback_tasa_exito")
    if rate is not None:
        lines.append(_("   Éxito del feedback: {percent:.1f} %").format(percent=100 * rate))
    return lines


def _done(record: Record) -> list[str]:
    """The final summary."""
    lines = ["✅ " + _("Entrenamiento completado")]
    if record["loss"] is not None:
        before = "" if record["batches"] < 2 else _("   (al principio: {loss:.6f})").format(loss=record["loss_first"])
        lines.append(_("   Loss: {loss:.6f}").format(loss=record["loss"]) + before)
    if record["anomaly_prob"] is not None:
        lines.append(_("   Anomalía: {percent:.2f}%").format(percent=100 * record["anomaly_prob"]))
    batches = _batches(record["batches"])
    lines.append(_("   Vectores: {vectors} en {batches}").format(vectors=record["vectors"], batches=batches))
    rate = record["vectors_per_second"]
    speed = _(" ({rate:.0f} vectores/s)").format(rate=rate) if rate else ""
    lines.append(_("   Tiempo: {seconds:.1f} s").format(seconds=record["seconds"]) + speed)
    if record["feedback"]:
        lines.append(_("   Feedback: {validated} de {feedback} validados").format(**record))
    if record["retries"]:
        lines.append(_("   Reintentos: {retries}").format(**record))
    return lines


def _note(record: Record) -> list[str]:
    return [str(record["text"])]


_TELLERS: dict[str, Callable[[Record], list[str]]] = {
    "plain": _plain,
    "worker": _worker,
    "diagnosis": _diagnosis,
    "session": _session,
    "retry": _retry,
    "resync": _resync,
    "rebase": _rebase,
    "metrics": _metrics,
    "done": _done,
    "note": _note,
}
