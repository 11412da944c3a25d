"""The plots of a report: what is drawn, and what is said in place of a curve that would not be true."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from sheily_train.colab.plots import Plot, draw_plots
from sheily_train.colab.story import read_story
from tests.colab.made_logs import Event, session, step, wire, write_log


def plots(folder: Path, *events: Event) -> list[Plot]:
    return draw_plots(read_story(write_log(folder / "l.jsonl", *events)))


def test_a_session_has_four_plots(tmp_path: Path) -> None:
    """Each with a heading, a caption with its numbers, and an SVG that is well-formed and told to who cannot see it."""
    found = plots(tmp_path, *session())
    assert [plot.title for plot in found] == [
        "Pérdida por lote",
        "Anomalías por lote",
        "Éxito del feedback",
        "Latencia por envío",
    ]
    assert [plot.caption.partition(";")[0] for plot in found] == [
        "De 2.0000 a 0.6000",
        "64 en total, el 13.0\u202f% de los vectores.",
        "1 de 2 aceptados: 50.0\u202f%.",
        "p50 350\u202fms, p95 755\u202fms, máxima 800\u202fms.",
    ]
    for plot in found:
        svg = ElementTree.fromstring(plot.svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
        assert svg.get("aria-label") == f"{plot.title}. {plot.caption}"


def test_one_point_is_no_curve(tmp_path: Path) -> None:
    """Its value is said; where there is no point at all, so is that."""
    loss, anomalies, feedback, latency = plots(tmp_path, step(1, 0.5, anomalies=3), wire(1, 12.0))
    assert loss.caption == "Un solo dato, 0.5000: no hay curva que dibujar."
    assert anomalies.caption == "Un solo dato, 3: no hay curva que dibujar."
    assert feedback.caption == "En este registro no hay feedback."
    assert latency.caption == "Un solo dato, 12.0\u202fs: no hay curva que dibujar."
    assert {plot.svg for plot in (loss, anomalies, feedback, latency)} == {""}


def test_many_points_are_summed_up(tmp_path: Path) -> None:
    """A plot stays small however long the log is, and says that its marks stand for several batches."""
    events = [
        each for seq in range(1, 1001) for each in (step(seq, 1000 / seq), wire(seq, 9.0 if seq % 97 == 0 else 0.1))
    ]
    loss, anomalies, _feedback, latency = plots(tmp_path, *events)
    assert loss.caption.endswith("La media móvil abarca 50 lotes. Cada punto resume varios lotes.")
    assert latency.caption.endswith("Cada punto resume varios envíos. Escala logarítmica.")
    assert max(len(plot.svg) for plot in (loss, anomalies, latency)) < 100_000
