"""The plots of a report: inline SVG, which takes its size and colours from the page that it stands in.

Colours are placeholders that become the page's own (light or dark) once the SVG is written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from sheily_train.colab.amounts import count_text, number_text, percent_text, time_text
from sheily_train.colab.story import Story, split
from sheily_train.i18n import _

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float]]

_MARKS = 160
"""Most marks a plot shows; beyond it, each stands for the mean of several batches."""
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


def draw_plots(story: Story) -> list[Plot]:
    """Every plot of a report, in its order."""
    return [_loss_plot(story), _anomaly_plot(story), _feedback_plot(story), _latency_plot(story)]


def _loss_plot(story: Story) -> Plot:
    points = [(number, step.loss) for number, step in enumerate(story.steps, 1) if step.loss is not None]
    title = _("Pérdida por lote")
    if len(points) < 2:
        return Plot(title, "", _too_few(points, number_text))
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
        first=number_text(story.summary.loss_first),
        last=number_text(story.summary.loss_last),
        best=number_text(story.summary.loss_best),
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
        return Plot(title, "", _too_few(found, count_text))

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
        count=count_text(story.summary.anomalies), share=percent_text(story.summary.anomaly_share)
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
        good=count_text(story.summary.feedback_validated),
        count=count_text(story.summary.feedback),
        rate=percent_text(story.summary.feedback_rate),
    )
    return Plot(title, _svg("feedback", 1, draw, f"{title}. {caption}"), caption)


def _latency_plot(story: Story) -> Plot:
    points = [(wire.seq, 1000 * wire.seconds) for wire in story.wires]
    retried = [(wire.seq, 1000 * wire.seconds) for wire in story.wires if wire.attempts > 1]
    many = len(points) > _MARKS
    title = _("Latencia por envío")
    summary = story.summary
    if len(points) < 2 or summary.latency_p50 is None or summary.latency_p95 is None or summary.latency_max is None:
        return Plot(title, "", _too_few(points, lambda value: time_text(value / 1000)))
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
        middle=time_text(summary.latency_p50), high=time_text(summary.latency_p95), worst=time_text(summary.latency_max)
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
    parts = split(points, _MARKS)
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
