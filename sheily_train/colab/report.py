"""What a session of remote training gave, as a page (HTML with plots), for programs (JSON) and for notes (Markdown).

Everything is read from the run log; the same log gives the same bytes. The page is one file: its plots are inline SVG,
there is no script, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sheily_train import __version__, durable
from sheily_train.colab.amounts import count_text, number_text, percent_text, size_text, time_text
from sheily_train.colab.breaks import differences
from sheily_train.colab.plots import draw_plots
from sheily_train.colab.story import Session, Story, Summary, percentiles, read_story, share, split
from sheily_train.colab.verdicts import reason_text
from sheily_train.errors import RequestError, ResourceError
from sheily_train.i18n import _

SUFFIXES = (".html", ".json", ".md")
REPORT_FORMAT = 1

_PARTS = 10
_SESSIONS = 24


def write_report(log: Path, target: Path) -> list[Path]:
    """Write the report of a run log as HTML, JSON and Markdown, side by side, each wholly or not at all.

    Args:
        log: the run log of a session, or of several.
        target: one of the three files, as ``informe.html``; the other two stand beside it.

    Returns:
        The three files, HTML first.

    Raises:
        RequestError: the target's suffix or folder, or the log, cannot be used; one of the files is no report.
        DataError: a line of the log is damaged.
        ResourceError: the disk is full.
    """
    files = report_files(target)
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


def report_files(target: Path) -> list[Path]:
    """The three files of a report; :class:`RequestError` when they cannot be, or would replace somebody's own."""
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
    if other := next((file for file in files if file.exists() and not _is_report(file)), None):
        raise RequestError(
            _("{file} ya existe y no es un informe: el informe son tres archivos y ocuparía su lugar.").format(
                file=other
            ),
            mend=_("Da otro nombre al informe, o aparta ese archivo."),
        )
    return files


def _is_report(file: Path) -> bool:
    """Whether a file is an earlier report, by its first words, or nothing at all."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            head = opened.read(1000)
    except OSError:
        return False
    beginnings = (f"# {_title()}", f'{{\n "format": {REPORT_FORMAT},\n "log": ')
    return not head or head.startswith(beginnings) or f"<title>{_title()}" in head


def _title() -> str:
    return _("Informe de entrenamiento")


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
        "rebases": [{"seq": made.seq, "from": made.left, "to": made.taken} for made in story.rebases],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _page(story: Story, log: str) -> str:
    return _render("report.html.j2", story, log, plots=draw_plots(story))


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
        heading=_title(),
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
        else _("{batches} lotes, {vectors}.").format(
            batches=count_text(summary.batches), vectors=_vectors(summary.vectors)
        )
    )
    words = {
        "falling": _("La pérdida baja: {first} al principio, {last} al final."),
        "flat": _("La pérdida se mantiene: {first} al principio, {last} al final."),
        "rising": _("La pérdida sube: {first} al principio, {last} al final."),
        None: _("Son pocos lotes para hablar de tendencia."),
    }
    told += " " + words[summary.tendency].format(
        first=number_text(summary.loss_first), last=number_text(summary.loss_last)
    )
    if summary.rebases:
        told += " " + _("El entrenamiento volvió atrás y siguió en otra máquina (--rebase): cuenta lo último.")
    if not summary.finished:
        told += " " + _("El registro no llega al final de la sesión: son las cifras hasta donde llegó.")
    return told


def _tiles(summary: Summary) -> list[tuple[str, str]]:
    return [
        (_("Pérdida final"), number_text(summary.loss_last)),
        (_("Vectores"), count_text(summary.vectors)),
        (_("Anomalías"), percent_text(summary.anomaly_share)),
        (_("Feedback aceptado"), percent_text(summary.feedback_rate)),
        (_("Latencia mediana"), time_text(summary.latency_p50)),
        (_("Vectores por segundo"), count_text(summary.vectors_per_second)),
    ]


def _tables(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every number with its name, in groups."""
    tendencies = {"falling": _("baja"), "flat": _("estable"), "rising": _("sube"), None: _("pocos lotes")}
    change = "" if summary.loss_change is None else f" ({percent_text(summary.loss_change, sign='+')})"
    return [
        (
            _("Aprendizaje"),
            [
                (_("Lotes"), count_text(summary.batches)),
                (_("Vectores"), count_text(summary.vectors)),
                (_("Pérdida inicial"), number_text(summary.loss_first)),
                (_("Pérdida final"), number_text(summary.loss_last)),
                (_("Mejor pérdida"), number_text(summary.loss_best)),
                (_("Tendencia"), tendencies[summary.tendency] + change),
            ],
        ),
        (
            _("Anomalías y feedback"),
            [
                (_("Anomalías encontradas"), count_text(summary.anomalies)),
                (_("Proporción de anomalías"), percent_text(summary.anomaly_share)),
                (_("Probabilidad media de anomalía"), percent_text(summary.anomaly_prob)),
                (_("Feedback enviado"), count_text(summary.feedback)),
                (_("Feedback aceptado"), count_text(summary.feedback_validated)),
                (_("Tasa de éxito"), percent_text(summary.feedback_rate)),
            ],
        ),
        (
            _("Red"),
            [
                (_("Latencia mediana (p50)"), time_text(summary.latency_p50)),
                (_("Latencia p95"), time_text(summary.latency_p95)),
                (_("Latencia máxima"), time_text(summary.latency_max)),
                (_("Vectores por segundo"), count_text(summary.vectors_per_second)),
                (_("Enviado"), size_text(summary.bytes)),
                (_("Reintentos"), count_text(summary.retries)),
                (_("Resincronizaciones"), count_text(summary.resyncs)),
                (_("Vueltas atrás (--rebase)"), count_text(summary.rebases)),
                (_("Copias del estado"), count_text(summary.snapshots)),
            ],
        ),
    ]


def _parts(story: Story) -> list[tuple[str, ...]]:
    """The session in at most ten parts: events, vectors, mean loss, anomaly share, median latency."""
    seconds = {wire.seq: wire.seconds for wire in story.wires}
    rows: list[tuple[str, ...]] = []
    for steps in split(story.steps, _PARTS):
        losses = [step.loss for step in steps if step.loss is not None]
        counted = [step for step in steps if step.anomalies is not None]
        anomalies = share(sum(step.anomalies or 0 for step in counted), sum(step.samples for step in counted))
        middle, _high, _worst = percentiles([seconds[step.seq] for step in steps if step.seq in seconds])
        first, last = steps[0].seq, steps[-1].seq
        rows.append(
            (
                str(first) if first == last else f"{first}–{last}",
                count_text(sum(step.samples for step in steps)),
                number_text(share(sum(losses), len(losses))),
                percent_text(anomalies),
                time_text(middle),
            )
        )
    return rows


def _sessions(sessions: list[Session]) -> list[tuple[str, ...]]:
    """The latest sessions: number, batches, vectors, last loss, anomaly share, vectors a second."""
    return [
        (
            count_text(session.number),
            count_text(session.batches),
            count_text(session.vectors),
            number_text(session.loss),
            percent_text(None if session.anomalies is None else share(session.anomalies, session.vectors)),
            count_text(share(session.vectors, session.seconds or 0)),
        )
        for session in sessions[-_SESSIONS:]
    ]


def _lists(story: Story) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """The tables with several columns: title, column names, rows; only those that say more than the rest."""
    reasons = [(reason_text(reason), str(count)) for reason, count in story.summary.retry_reasons.items()]
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
        (
            _("Vueltas atrás"),
            (_("Desde el evento"), _("Máquina")),
            [(count_text(made.seq), differences(made.left, made.taken) or "—") for made in story.rebases],
        ),
        (_("Motivos de los reintentos"), (_("Motivo"), _("Veces")), [*reasons]),
    ]
    return [each for each in lists if each[2]]


def _vectors(count: int) -> str:
    return _("un vector") if count == 1 else _("{count} vectores").format(count=count_text(count))
