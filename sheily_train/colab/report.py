"""What a session of remote training gave, as a page (HTML with plots), for programs (JSON) and for notes (Markdown).

Everything is read from the run log; the same log gives the same bytes. The page is one file: its plots are inline SVG,
there is no script, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

from sheily_train import __version__, durable, runlog
from sheily_train.errors import DataError, RequestError, ResourceError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".html", ".json", ".md")
REPORT_FORMAT = 1

_MARKS = 160
"""Most marks a plot shows; beyond it, each stands for the mean of several batches."""
_PARTS = 10
_SESSIONS = 24
_FLAT = 0.02

T = TypeVar("T")
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """A trained batch. What the worker did not say, or what is no number, is ``None``."""

    seq: int
    samples: int
    loss: float | None
    anomaly_prob: float | None
    anomalies: int | None


@dataclass(frozen=True)
class Wire:
    """What sending an event took: seconds from its first byte to its answer, attempts, and bytes of its body."""

    seq: int
    seconds: float
    attempts: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The numbers of a log. Shares are 0..1, times are seconds; ``None`` where the log does not say."""

    run: str | None
    sessions: int
    finished: bool
    batches: int
    vectors: int
    loss_first: float | None
    loss_last: float | None
    loss_best: float | None
    loss_change: float | None
    tendency: str | None
    anomalies: int | None
    anomaly_share: float | None
    anomaly_prob: float | None
    feedback: int
    feedback_validated: int
    feedback_rate: float | None
    latency_p50: float | None
    latency_p95: float | None
    latency_max: float | None
    vectors_per_second: float | None
    bytes: int
    retries: int
    retry_reasons: dict[str, int]
    resyncs: int
    snapshots: int


@dataclass(frozen=True)
class Session:
    """A session that came to its end, as its ``done`` record counts it."""

    number: int | None
    batches: int | None
    vectors: int
    loss: float | None
    anomalies: int | None
    seconds: float | None


@dataclass(frozen=True)
class Story:
    """A log, read: its batches, feedback (number, validated), deliveries and ended sessions, and their summary."""

    summary: Summary
    steps: list[Step]
    feedback: list[tuple[int, bool]]
    wires: list[Wire]
    sessions: list[Session]


def write_report(log: Path, target: Path) -> list[Path]:
    """Write the report of a run log as HTML, JSON and Markdown, side by side, each wholly or not at all.

    Args:
        log: the run log of a session, or of several.
        target: one of the three files, as ``informe.html``; the other two stand beside it.

    Returns:
        The three files, HTML first.

    Raises:
        RequestError: the target's suffix or folder, or the log, cannot be used.
        DataError: a line of the log is damaged.
        ResourceError: the disk is full.
    """
    files = _report_files(target)
    story = read_story(log)
    contents = (_page(story, log.name), _as_json(story, log.name), _notes(story, log.name))
    try:
        for file, content in zip(files, contents, strict=True):
            durable.write_bytes(file, content.encode())
    except OSError as error:
        message = _("No se pudo escribir el informe {file}: {reason}.").format(file=file, reason=error.strerror)
        if durable.is_full_disk(error):
            raise ResourceError(message, mend=_("Libera espacio, o elige otra carpeta.")) from error
        raise RequestError(message, mend=_("Elige una carpeta en la que puedas escribir.")) from error
    return files


def _report_files(target: Path) -> list[Path]:
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise RequestError(
            _("El informe «{name}» no acaba en .html, .json ni .md.").format(name=target.name),
            mend=_("Ponle uno de los tres, como informe.html: se escriben los tres archivos."),
        )
    files = [target if suffix == other else target.with_suffix(other) for other in SUFFIXES]
    if not target.parent.is_dir():
        raise RequestError(
            _("No existe la carpeta del informe: {folder}").format(folder=target.parent),
            mend=_("Créala, o elige otra."),
        )
    if folder := next((file for file in files if file.is_dir()), None):
        raise RequestError(_("{folder} es una carpeta.").format(folder=folder), mend=_("Da otro nombre al informe."))
    return files


def read_story(log: Path) -> Story:
    """The batches, feedback and deliveries of a log.

    An event that is told again counts once. If it is told otherwise, the run was begun anew or taken back to an earlier
    point: what had been told from there on is forgotten.
    """
    records = _read(log)
    steps: dict[int, Step] = {}
    wires: dict[int, Wire] = {}
    feedback: dict[int, bool] = {}
    for record in records:
        if record["event"] == "wire":
            wires[record["seq"]] = _wire(record)
        elif record["event"] in {"step", "feedback"}:
            seq = record["seq"]
            told = _step(record) if record["event"] == "step" else bool(record["validated"])
            if steps.get(seq, feedback.get(seq, told)) != told:
                _forget_from(seq, steps, feedback)
                _forget_from(seq + 1, wires)  # its own may have been told before it
            if isinstance(told, Step):
                steps[seq] = told
            else:
                feedback[seq] = told
    sessions = _ended_sessions(records)
    ordered, answers = [steps[seq] for seq in sorted(steps)], sorted(feedback.items())
    deliveries = [wires[seq] for seq in sorted(wires)]
    summary = _summarise(records, ordered, answers, deliveries, sessions)
    return Story(summary, ordered, answers, deliveries, sessions)


def _forget_from(first: int, *told: dict[int, Any]) -> None:
    for events in told:
        for seq in [seq for seq in events if seq >= first]:
            del events[seq]


def _ended_sessions(records: list[runlog.Record]) -> list[Session]:
    """The sessions that have a ``done`` record; one that does not count its vectors has those since its beginning."""
    sessions, pending = [], 0
    for record in records:
        if record["event"] in {"start", "session", "worker"}:
            pending = 0
        elif record["event"] == "step":
            pending += record.get("samples") or 0
        elif record["event"] == "done":
            number, batches, loss, anomalies, seconds = map(
                record.get, ("session", "batches", "loss", "anomalies", "seconds")
            )
            sessions.append(Session(number, batches, record.get("vectors", pending), loss, anomalies, seconds))
            pending = 0
    return sessions


def _read(log: Path) -> list[runlog.Record]:
    records: list[runlog.Record] = []
    try:
        for record in runlog.read(log):
            needed = {"step", "wire", "feedback"} & {record["event"]}
            if needed and not isinstance(record["seq"], int):
                raise TypeError("seq")
            records.append(record)
    except OSError as error:
        raise RequestError(
            _("No se puede leer el registro {log}: {reason}.").format(log=log, reason=error.strerror),
            mend=_("Lo escribe «sheily connect» al entrenar."),
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            _("{log}:{line}: no es una línea de un registro de entrenamiento.").format(log=log, line=len(records) + 1),
            mend=_("Quita esa línea y repite."),
        ) from error
    return records


def _step(record: runlog.Record) -> Step:
    return Step(
        record["seq"], record.get("samples") or 0, *(record.get(key) for key in ("loss", "anomaly_prob", "anomalies"))
    )


def _wire(record: runlog.Record) -> Wire:
    return Wire(record["seq"], *(record.get(key) or 0 for key in ("seconds", "attempts", "bytes")))


def _summarise(
    records: list[runlog.Record],
    steps: list[Step],
    feedback: list[tuple[int, bool]],
    wires: list[Wire],
    sessions: list[Session],
) -> Summary:
    losses = [step.loss for step in steps if step.loss is not None]
    counted = [step for step in steps if step.anomalies is not None]
    probable = [step for step in steps if step.anomaly_prob is not None]
    anomalies = sum(step.anomalies or 0 for step in counted)
    validated = sum(good for _seq, good in feedback)
    middle, high, worst = _percentiles([wire.seconds for wire in wires])
    events = Counter(record["event"] for record in records)
    tendency, change = _tendency(losses)
    return Summary(
        run=next((str(record["run"]) for record in reversed(records) if record.get("run")), None),
        sessions=max(len(sessions), len({str(record) for record in records if record["event"] == "session"})),
        finished=bool(records) and events["done"] > 0 and records[-1]["event"] == "done",
        batches=len(steps),
        vectors=sum(step.samples for step in steps),
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        loss_best=min(losses, default=None),
        loss_change=change,
        tendency=tendency,
        anomalies=anomalies if counted else None,
        anomaly_share=_share(anomalies, sum(step.samples for step in counted)),
        anomaly_prob=_share(
            sum((step.anomaly_prob or 0) * step.samples for step in probable), sum(step.samples for step in probable)
        ),
        feedback=len(feedback),
        feedback_validated=validated,
        feedback_rate=_share(validated, len(feedback)),
        latency_p50=middle,
        latency_p95=high,
        latency_max=worst,
        vectors_per_second=_rate(sessions),
        bytes=sum(wire.bytes for wire in wires),
        retries=events["retry"],
        retry_reasons=dict(Counter(str(r.get("reason", "?")) for r in records if r["event"] == "retry").most_common()),
        resyncs=events["resync"],
        snapshots=events["snapshot"],
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percentiles(seconds: list[float]) -> tuple[float | None, float | None, float | None]:
    if not seconds:
        return None, None, None
    import numpy as np

    middle, high, worst = (float(value) for value in np.percentile(seconds, (50, 95, 100)))
    return middle, high, worst


def _tendency(losses: list[float]) -> tuple[str | None, float | None]:
    """``falling``, ``flat`` or ``rising``: the last quarter's mean against the first's, and the change as a share."""
    quarter = len(losses) // 4
    if not quarter:
        return None, None
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if first == 0:
        return None, None
    change = (last - first) / abs(first)
    return "flat" if abs(change) < _FLAT else "falling" if change < 0 else "rising", change


def _rate(sessions: list[Session]) -> float | None:
    """Vectors a second over the sessions that came to their end: a cut one does not know how long it took."""
    timed = [(session.vectors, session.seconds) for session in sessions if session.seconds]
    return _share(sum(vectors for vectors, _seconds in timed), sum(seconds for _vectors, seconds in timed))


def _as_json(story: Story, log: str) -> str:
    content = {
        "format": REPORT_FORMAT,
        "log": log,
        "version": __version__,
        "summary": asdict(story.summary),
        "steps": [asdict(step) for step in story.steps],
        "feedback": [{"seq": seq, "validated": good} for seq, good in story.feedback],
        "wire": [asdict(wire) for wire in story.wires],
        "sessions": [asdict(session) for session in story.sessions],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _page(story: Story, log: str) -> str:
    return _render("report.html.j2", story, log, plots=_plots(story))


def _notes(story: Story, log: str) -> str:
    return _render("report.md.j2", story, log)


def _render(template: str, story: Story, log: str, **more: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["_"] = _
    environment.filters["cell"] = lambda text: re.sub(r"[\r\n]+", " ", text).replace("|", "\\|")
    return environment.get_template(template).render(
        summary=story.summary,
        verdict=_verdict(story.summary),
        tiles=_tiles(story.summary),
        tables=_tables(story.summary),
        lists=_lists(story),
        log=log,
        version=__version__,
        **more,
    )


def _verdict(summary: Summary) -> str:
    """What happened, in a sentence or two."""
    if not summary.batches:
        return _("El registro no tiene todavía ningún lote entrenado: no hay nada que medir.")
    told = (
        _("Un lote, {vectors}.").format(vectors=_vectors(summary.vectors))
        if summary.batches == 1
        else _("{batches} lotes, {vectors}.").format(batches=_count(summary.batches), vectors=_vectors(summary.vectors))
    )
    words = {
        "falling": _("La pérdida baja: {first} al principio, {last} al final."),
        "flat": _("La pérdida se mantiene: {first} al principio, {last} al final."),
        "rising": _("La pérdida sube: {first} al principio, {last} al final."),
        None: _("Son pocos lotes para hablar de tendencia."),
    }
    told += " " + words[summary.tendency].format(first=_number(summary.loss_first), last=_number(summary.loss_last))
    if not summary.finished:
        told += " " + _("El registro no llega al final de la sesión: son las cifras hasta donde llegó.")
    return told


def _tiles(summary: Summary) -> list[tuple[str, str]]:
    return [
        (_("Pérdida final"), _number(summary.loss_last)),
        (_("Vectores"), _count(summary.vectors)),
        (_("Anomalías"), _percent(summary.anomaly_share)),
        (_("Feedback aceptado"), _percent(summary.feedback_rate)),
        (_("Latencia mediana"), _time(summary.latency_p50)),
        (_("Vectores por segundo"), _count(summary.vectors_per_second)),
    ]


def _tables(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every number with its name, in groups."""
    tendencies = {"falling": _("baja"), "flat": _("estable"), "rising": _("sube"), None: _("pocos lotes")}
    change = "" if summary.loss_change is None else f" ({_percent(summary.loss_change, sign='+')})"
    return [
        (
            _("Aprendizaje"),
            [
                (_("Lotes"), _count(summary.batches)),
                (_("Vectores"), _count(summary.vectors)),
                (_("Pérdida inicial"), _number(summary.loss_first)),
                (_("Pérdida final"), _number(summary.loss_last)),
                (_("Mejor pérdida"), _number(summary.loss_best)),
                (_("Tendencia"), tendencies[summary.tendency] + change),
            ],
        ),
        (
            _("Anomalías y feedback"),
            [
                (_("Anomalías encontradas"), _count(summary.anomalies)),
                (_("Proporción de anomalías"), _percent(summary.anomaly_share)),
                (_("Probabilidad media de anomalía"), _percent(summary.anomaly_prob)),
                (_("Feedback enviado"), _count(summary.feedback)),
                (_("Feedback aceptado"), _count(summary.feedback_validated)),
                (_("Tasa de éxito"), _percent(summary.feedback_rate)),
            ],
        ),
        (
            _("Red"),
            [
                (_("Latencia mediana (p50)"), _time(summary.latency_p50)),
                (_("Latencia p95"), _time(summary.latency_p95)),
                (_("Latencia máxima"), _time(summary.latency_max)),
                (_("Vectores por segundo"), _count(summary.vectors_per_second)),
                (_("Enviado"), _size(summary.bytes)),
                (_("Reintentos"), _count(summary.retries)),
                (_("Resincronizaciones"), _count(summary.resyncs)),
                (_("Copias del estado"), _count(summary.snapshots)),
            ],
        ),
    ]


def _parts(story: Story) -> list[tuple[str, ...]]:
    """The session in at most ten parts: events, vectors, mean loss, anomaly share, median latency."""
    seconds = {wire.seq: wire.seconds for wire in story.wires}
    rows: list[tuple[str, ...]] = []
    for steps in _split(story.steps, _PARTS):
        losses = [step.loss for step in steps if step.loss is not None]
        counted = [step for step in steps if step.anomalies is not None]
        share = _share(sum(step.anomalies or 0 for step in counted), sum(step.samples for step in counted))
        middle, _high, _worst = _percentiles([seconds[step.seq] for step in steps if step.seq in seconds])
        first, last = steps[0].seq, steps[-1].seq
        rows.append(
            (
                str(first) if first == last else f"{first}–{last}",
                _count(sum(step.samples for step in steps)),
                _number(_share(sum(losses), len(losses))),
                _percent(share),
                _time(middle),
            )
        )
    return rows


def _sessions(sessions: list[Session]) -> list[tuple[str, ...]]:
    """The latest sessions: number, batches, vectors, last loss, anomaly share, vectors a second."""
    return [
        (
            _count(session.number),
            _count(session.batches),
            _count(session.vectors),
            _number(session.loss),
            _percent(None if session.anomalies is None else _share(session.anomalies, session.vectors)),
            _count(_share(session.vectors, session.seconds or 0)),
        )
        for session in sessions[-_SESSIONS:]
    ]


def _lists(story: Story) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """The tables with several columns: title, column names, rows; only those that say more than the rest."""
    reasons = [(reason, str(count)) for reason, count in story.summary.retry_reasons.items()]
    lists: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        (
            _("Por sesión"),
            (_("Sesión"), _("Lotes"), _("Vectores"), _("Pérdida"), _("Anomalías"), _("Vectores/s")),
            _sessions(story.sessions) if len(story.sessions) > 1 else [],
        ),
        (
            _("Por tramos"),
            (_("Eventos"), _("Vectores"), _("Pérdida media"), _("Anomalías"), _("Latencia")),
            _parts(story) if len(story.steps) > 1 else [],
        ),
        (_("Motivos de los reintentos"), (_("Motivo"), _("Veces")), [*reasons]),
    ]
    return [each for each in lists if each[2]]


def _split(values: Sequence[T], parts: int) -> list[Sequence[T]]:
    """The values in order, in at most so many parts of nearly equal length, none empty."""
    parts = min(parts, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    return [values[start:end] for start, end in pairwise(edges)]


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"


def _count(value: float | None) -> str:
    """A whole number, its thousands apart."""
    return "—" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def _vectors(count: int) -> str:
    return _("un vector") if count == 1 else _("{count} vectores").format(count=_count(count))


def _percent(share: float | None, sign: str = "") -> str:
    return "—" if share is None else f"{share:{sign}.1%}".replace("%", "\u202f%").replace("-", "−")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    return f"{seconds:.1f}\u202fs" if seconds >= 1 else f"{seconds * 1000:.0f}\u202fms"


def _size(amount: int) -> str:
    unit, divisor = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if amount >= unit[1]), ("kB", 1e3))
    return f"{amount / divisor:.1f}\u202f{unit}"


# The plots. Colours are placeholders that become the page's own (light or dark) once the SVG is written.

_COLOURS = {
    "ink": "#010101",
    "soft": "#020202",
    "line": "#030303",
    "blue": "#040404",
    "orange": "#050505",
    "green": "#060606",
    "red": "#070707",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["soft"],
    "axes.titlecolor": _COLOURS["ink"],
    "text.color": _COLOURS["soft"],
    "xtick.color": _COLOURS["line"],
    "ytick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["soft"],
    "ytick.labelcolor": _COLOURS["soft"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "grid.alpha": 0.5,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "ncols": 4,
    "borderaxespad": 0,
    "handlelength": 1.4,
    "columnspacing": 1.2,
}
"""Above the plot, where it hides nothing."""


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its heading, its inline SVG (empty when the log has nothing to draw), and what it says."""

    title: str
    svg: str
    caption: str


def _plots(story: Story) -> list[Plot]:
    return [_loss_plot(story), _anomaly_plot(story), _feedback_plot(story), _latency_plot(story)]


def _loss_plot(story: Story) -> Plot:
    points = [(number, step.loss) for number, step in enumerate(story.steps, 1) if step.loss is not None]
    title = _("Pérdida por lote")
    if len(points) < 2:
        return Plot(title, "", _too_few(points, _number))
    window = max(3, min(50, len(points) // 10))
    means = _running_mean(points, window)

    def draw(axes: Sequence[Axes]) -> None:
        shown = _thin(points)
        axes[0].plot(*shown, color=_COLOURS["blue"], alpha=0.45, linewidth=1, label=_("lote"), **_markers(shown))
        if len(points) > window:
            axes[0].plot(*_thin(means), color=_COLOURS["blue"], linewidth=2, label=_("media móvil"))
            axes[0].legend(**_LEGEND)
        axes[0].set_xlabel(_("lote"))

    caption = _("De {first} a {last}; la mejor, {best}.").format(
        first=_number(story.summary.loss_first),
        last=_number(story.summary.loss_last),
        best=_number(story.summary.loss_best),
    )
    if len(points) > window:
        caption += " " + _("La media móvil abarca {window} lotes.").format(window=window)
    if len(points) > _MARKS:
        caption += " " + _("Cada punto resume varios lotes.")
    return Plot(title, _svg("loss", 1, draw, f"{title}. {caption}"), caption)


def _anomaly_plot(story: Story) -> Plot:
    counted = [(number, step) for number, step in enumerate(story.steps, 1) if step.anomalies is not None]
    found = [(number, float(step.anomalies or 0)) for number, step in counted]
    shares = [(number, 100 * (step.anomalies or 0) / step.samples) for number, step in counted if step.samples]
    title = _("Anomalías por lote")
    if not found:
        return Plot(title, "", _("El registro no dice cuántas anomalías se encontraron."))
    if len(found) < 2:
        return Plot(title, "", _too_few(found, _count))

    def draw(axes: Sequence[Axes]) -> None:
        batches, counts = _thin(found)
        width = 0.8 * max(1.0, (batches[-1] - batches[0]) / max(1, len(batches) - 1))
        axes[0].bar(batches, counts, width=width, color=_COLOURS["orange"])
        axes[0].set_title(_("encontradas"), loc="left", fontsize=8.5)
        shown = _thin(shares)
        axes[1].plot(*shown, color=_COLOURS["orange"], linewidth=1.5, **_markers(shown))
        axes[1].set_title(_("% del lote"), loc="left", fontsize=8.5)
        axes[1].set_ylim(bottom=0)
        axes[1].set_xlabel(_("lote"))

    caption = _("{count} en total, el {share} de los vectores.").format(
        count=_count(story.summary.anomalies), share=_percent(story.summary.anomaly_share)
    )
    return Plot(title, _svg("anomalies", 2, draw, f"{title}. {caption}"), caption)


def _feedback_plot(story: Story) -> Plot:
    title = _("Éxito del feedback")
    if not story.feedback:
        return Plot(title, "", _("En este registro no hay feedback."))
    accepted = 0
    rates: Points = []
    for number, (_seq, good) in enumerate(story.feedback, 1):
        accepted += good
        rates.append((number, 100 * accepted / number))

    def draw(axes: Sequence[Axes]) -> None:
        shown = _thin(rates)
        axes[0].plot(*shown, color=_COLOURS["green"], linewidth=2, label=_("tasa acumulada"), **_markers(shown))
        if len(story.feedback) <= _MARKS:
            for good, colour, label in ((True, "green", _("aceptado")), (False, "red", _("rechazado"))):
                numbers = [number for number, (_seq, found) in enumerate(story.feedback, 1) if found == good]
                height = 108 if good else -8
                axes[0].plot(numbers, [height] * len(numbers), "|", color=_COLOURS[colour], markersize=7, label=label)
        axes[0].set_ylim(-16, 116)
        axes[0].set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes[0].set_xlabel(_("feedback"))
        axes[0].legend(**_LEGEND)

    caption = _("{good} de {count} aceptados: {rate}.").format(
        good=_count(story.summary.feedback_validated),
        count=_count(story.summary.feedback),
        rate=_percent(story.summary.feedback_rate),
    )
    return Plot(title, _svg("feedback", 1, draw, f"{title}. {caption}"), caption)


def _latency_plot(story: Story) -> Plot:
    points = [(wire.seq, 1000 * wire.seconds) for wire in story.wires]
    retried = [(wire.seq, 1000 * wire.seconds) for wire in story.wires if wire.attempts > 1]
    many = len(points) > _MARKS
    title = _("Latencia por envío")
    summary = story.summary
    if len(points) < 2 or summary.latency_p50 is None or summary.latency_p95 is None or summary.latency_max is None:
        return Plot(title, "", _too_few(points, lambda value: _time(value / 1000)))
    levels = {"p50": 1000 * summary.latency_p50, "p95": 1000 * summary.latency_p95}
    spread = summary.latency_p50 > 0 and summary.latency_max > 20 * summary.latency_p50

    def draw(axes: Sequence[Axes]) -> None:
        if many:
            axes[0].plot(*_thin(points, median), color=_COLOURS["blue"], linewidth=1.5, label=_("mediana"))
            axes[0].plot(*_thin(points, max), ".", color=_COLOURS["red"], markersize=3, label=_("máxima"))
        else:
            axes[0].plot(*_thin(points), "o", color=_COLOURS["blue"], alpha=0.7, markersize=3.5)
            if retried:
                axes[0].plot(*_thin(retried), "x", color=_COLOURS["red"], markersize=6, label=_("con reintentos"))
        for (name, level), dashes in zip(levels.items(), ("-", "--"), strict=True):
            axes[0].axhline(level, color=_COLOURS["ink"], linewidth=1, linestyle=dashes, label=name)
        if spread:
            axes[0].set_yscale("log")
        else:
            axes[0].set_ylim(bottom=0)
        axes[0].yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes[0].set_ylabel("ms")
        axes[0].set_xlabel(_("n.º de evento"))
        axes[0].legend(**_LEGEND)

    caption = _("p50 {middle}, p95 {high}, máxima {worst}.").format(
        middle=_time(summary.latency_p50), high=_time(summary.latency_p95), worst=_time(summary.latency_max)
    )
    if many:
        caption += " " + _("Cada punto resume varios envíos.")
    if spread:
        caption += " " + _("Escala logarítmica.")
    return Plot(title, _svg("latency", 1, draw, f"{title}. {caption}"), caption)


def _too_few(points: Points, show: Callable[[float], str]) -> str:
    """What stands in place of a plot of no point, or of one."""
    if not points:
        return _("El registro no tiene ningún dato de esto.")
    return _("Un solo dato, {value}: no hay curva que dibujar.").format(value=show(points[0][1]))


def _running_mean(points: Points, window: int) -> Points:
    """At each point, the mean of it and those before it, ``window`` in all."""
    means, total = [], 0.0
    for index, (seq, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0)
        means.append((seq, total / min(index + 1, window)))
    return means


def _thin(points: Points, resume: Callable[[list[float]], float] = fmean) -> tuple[list[float], list[float]]:
    """The points as x and y, in at most :data:`_MARKS` marks, each at the middle of its part, with its mean or so."""
    parts = _split(points, _MARKS)
    return [fmean(x for x, _y in part) for part in parts], [resume([y for _x, y in part]) for part in parts]


def _markers(shown: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Few points are seen as points, and one alone is seen at all."""
    return {"marker": "o", "markersize": 3.5} if len(shown[0]) <= 40 else {}


def _svg(name: str, rows: int, draw: Callable[[Sequence[Axes]], None], label: str) -> str:
    """An inline SVG that takes its size and colours from the page; its ids begin with ``name``."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.1, 2.75), layout="constrained")
        axes: list[Axes] = list(figure.subplots(rows, 1, sharex=True, squeeze=False).flat)
        for axis in axes:
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        draw(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg")
    return _inline(written.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """A written SVG made fit to stand in a page: no prologue, no metadata, no style of its own, ids that are unique."""
    from xml.sax.saxutils import quoteattr

    box = re.search(r'viewBox="[^"]+"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"(?s)<metadata>.*?</metadata>|<defs>\s*<style[^>]*>.*?</style>\s*</defs>|<!--.*?-->", "", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    for colour, code in _COLOURS.items():
        body = body.replace(code, f"var(--{colour})")
    return f'<svg {box[0] if box else ""} role="img" aria-label={quoteattr(label)}>{body}'
