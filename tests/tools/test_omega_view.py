from __future__ import annotations

import os
import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sheily_train.tools.monitoring.omega_view import LiveOmegaView, PlainOmegaView, omega_view
from sheily_train.tools.monitoring.terminal import SilentView

Record = dict[str, Any]

WORKER: Record = {"event": "worker", "run": "principal", "url": "https://a.app", "device": "cuda:0"}
SESSION: Record = {
    "event": "session",
    "run": "principal",
    "session": 3,
    "batches": 8,
    "done": 0,
    "samples": 500,
    "lote": 64,
    "epochs": 1,
    "source": "simple",
    "resumed": False,
}
RETRY: Record = {"event": "retry", "reason": "502 [Bad Gateway]", "attempt": 2, "wait": 0.75}
DONE: Record = {
    "event": "done",
    "run": "principal",
    "session": 3,
    "batches": 8,
    "vectors": 500,
    "loss_first": 0.9,
    "loss": 0.234567,
    "anomaly_prob": 0.4523,
    "anomalies": 50,
    "feedback": 7,
    "validated": 5,
    "retries": 1,
    "seconds": 10.0,
    "vectors_per_second": 50.0,
}


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(seq: int, samples: int = 64) -> Record:
    return {"event": "step", "seq": seq, "samples": samples, "loss": 1 / seq, "anomaly_prob": 0.25, "anomalies": 16}


def wire(seq: int, queue: int) -> Record:
    return {"event": "wire", "seq": seq, "seconds": 0.1, "attempts": 1, "bytes": 9, "queue": queue}


def live(*records: Record) -> list[str]:
    """What a live view leaves on a terminal, without its colours and cursor moves; two seconds between records."""
    stream, clock = StringIO(), Clock()
    console = Console(force_terminal=True, file=stream, width=130, height=20)
    with LiveOmegaView(console, clock) as view:
        for record in records:
            view(record)
            clock.now += 2
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines() if line]


def plain(*records: Record | float) -> list[str]:
    """What a plain view prints; a number lets so many seconds pass."""
    stream, clock = StringIO(), Clock()
    with PlainOmegaView(stream, clock) as view:
        for record in records:
            if isinstance(record, dict):
                view(record)
            else:
                clock.now += record
    return stream.getvalue().splitlines()


def test_the_live_bar_tells_loss_anomalies_rate_retries_and_queue() -> None:
    """Beside the session and its batches, on one line."""
    last = live(WORKER, SESSION, step(1), RETRY, step(2), wire(2, queue=3))[-1]
    assert last.startswith("sesión 3")
    told = "2/8 pérdida 0.5000 · anomalía 25.0 % · 16 vectores/s · reintentos 1 · en cola 3"
    assert last.endswith(told)


def test_what_happened_stands_above_the_bar_as_it_was_said() -> None:
    """The worker, the session, each retry with its brackets, and the summary, which stays."""
    lines = live(WORKER, SESSION, step(1), RETRY, DONE)
    told = [line for line in lines if not line.startswith("sesión 3 ")]
    assert told[0] == "Conectado a https://a.app (entrenamiento «principal», dispositivo cuda:0)"
    assert told[1] == "Sesión 3: 500 vectores (simple) en 8 lotes de 64, pasadas: 1"
    assert told[2] == "Reintento 2 en 0.8 s: 502 [Bad Gateway]"
    assert told[3] == "✅ Entrenamiento completado"


def test_a_session_that_goes_on_has_a_bar_that_begins_there() -> None:
    """With what was in the journal done already; the next session has a bar of its own."""
    resumed = SESSION | {"resumed": True, "done": 5}
    lines = live(resumed, step(6))
    assert "Sigue la sesión 3: de sus lotes, ya estaban en el diario 5 de 8" in lines
    assert "6/8" in lines[-1]
    lines = live(resumed, step(6), DONE, SESSION | {"session": 4})
    assert lines[-1].startswith("sesión 4")
    assert "0/8" in lines[-1]


def test_a_batch_that_is_told_twice_counts_once() -> None:
    """As after a replay."""
    assert "1/8" in live(SESSION, step(1), step(1))[-1]


def test_plain_lines_come_every_five_seconds_and_at_the_end() -> None:
    """Of the progress; anything else at once."""
    lines = plain(SESSION, step(1), 4.9, step(2), 0.2, step(3), RETRY, *map(step, range(4, 9)))
    assert [line.partition(":")[0] for line in lines] == [*("Sesión 3", "Lote 3/8", "Reintento 2 en 0.8 s", "Lote 8/8")]
    assert lines[1] == "Lote 3/8: pérdida 0.3333 · anomalía 25.0 % · 38 vectores/s · reintentos 0 · en cola 0"


def test_the_summary_is_that_of_the_guide() -> None:
    """✅, Loss with six decimals, Anomalía with two; then vectors, feedback and retries."""
    assert plain(DONE) == [
        "✅ Entrenamiento completado",
        "   Loss: 0.234567   (al principio: 0.900000)",
        "   Anomalía: 45.23%",
        "   Vectores: 500 en 8 lotes",
        "   Tiempo: 10.0 s (50 vectores/s)",
        "   Feedback: 5 de 7 validados",
        "   Reintentos: 1",
    ]


def test_the_summary_leaves_out_what_there_was_not() -> None:
    """No batch, no time, no feedback, no retry."""
    nothing = DONE | {"batches": 0, "vectors": 0, "loss": None, "loss_first": None, "anomaly_prob": None}
    lines = plain(nothing | {"feedback": 0, "retries": 0, "seconds": 0, "vectors_per_second": None})
    assert lines == ["✅ Entrenamiento completado", "   Vectores: 0 en 0 lotes", "   Tiempo: 0.0 s"]
    assert plain(DONE | {"vectors_per_second": 0.0})[4] == "   Tiempo: 10.0 s"  # nothing was left to train


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("connection", "no hay conexión"),
        ("busy", "el trabajador está ocupado"),
        ("http-524", "contestó 524"),
        ("502 [Bad Gateway]", "502 [Bad Gateway]"),
    ],
)
def test_a_retry_says_why_in_words(reason: str, told: str) -> None:
    """The log's one word for it is for programs."""
    assert plain(RETRY | {"reason": reason}) == [f"Reintento 2 en 0.8 s: {told}"]


def test_diagnosis_metrics_resync_rebase_and_notes_are_told() -> None:
    """Also by a worker that says little."""
    diagnosis = {
        "event": "diagnosis",
        "status": "diagnostico_ok",
        "test_input_shape": [1, 1600],
        "outputs_shapes": {"anomaly": [1], "dendrites": [1, 16]},
        "gpu_info": {"cuda": True, "device": "cuda:0"},
    }
    metrics = {
        "event": "metrics",
        "ultimos_20_losses": [0.5, 0.25, None],
        "tendencia": "bajando",
        "anomalias_detectadas": 7,
        "feedback_tasa_exito": 0.75,
    }
    resync = {"event": "resync", "from_seq": 3, "to_seq": 9}
    rebase = {"event": "rebase", "seq": 2, "from": {"device": "cpu"}, "to": {"device": "cuda"}}
    note = {"event": "note", "text": "Una [nota]"}
    beginning = {**rebase, "seq": 0, "from": rebase["to"]}
    assert plain(diagnosis, metrics, resync, rebase, beginning, note) == [
        "Diagnóstico correcto: entrada [1, 1600]; salidas anomaly [1] · dendrites [1, 16]; CUDA: sí",
        "Métricas del trabajador:",
        "   Últimas pérdidas: 0.5000 0.2500",
        "   Tendencia: bajando",
        "   Anomalías detectadas: 7",
        "   Éxito del feedback: 75.0 %",
        "El trabajador recupera desde el diario los eventos 3 a 9",
        "El entrenamiento vuelve al evento 2 y se entrena de nuevo desde ahí: device cpu → cuda",
        "El entrenamiento vuelve al principio y se entrena de nuevo desde ahí",
        "Una [nota]",
    ]
    little = [{"event": name} for name in ("diagnosis", "metrics", "retry")]
    assert plain(*little) == [
        "Diagnóstico correcto: entrada ?; salidas ?; CUDA: no",
        "Métricas del trabajador:",
        "Reintento ? en 0.0 s: ?",
    ]


def test_steps_before_a_session_and_unknown_records_are_passed_over() -> None:
    """A replay tells steps before the session is known; other programs' records are none of ours."""
    assert live(step(1), {"event": "snapshot", "seq": 1}, {"event": "later"}) == []
    assert plain(step(1), 60, step(2)) == []


def test_one_is_told_as_one() -> None:
    """A session of a single vector reads right."""
    lines = plain({**SESSION, "samples": 1, "batches": 1}, {**DONE, "vectors": 1, "batches": 1})
    assert "Sesión 3: 1 vector (simple) en 1 lote de 64, pasadas: 1" in lines
    assert "   Vectores: 1 en 1 lote" in lines


def test_what_a_worker_says_cannot_steer_the_terminal() -> None:
    """Escape sequences in its words are shown as spaces, in a pipe and on a terminal."""
    record = {**WORKER, "device": "\x1b]0;mine\x07\x1b[2Jcpu\r"}
    told = "Conectado a https://a.app (entrenamiento «principal», dispositivo  ]0;mine  [2Jcpu )"
    assert plain(record) == [told]
    assert live(record) == [told]


def test_the_view_suits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live on a terminal, plain in a pipe, silent when asked, whatever the stream."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:  # noqa: PTH123
        assert isinstance(omega_view(terminal, quiet=False), LiveOmegaView)
        assert type(omega_view(terminal, quiet=True)) is SilentView
    os.close(ours)
    assert isinstance(omega_view(StringIO(), quiet=False), PlainOmegaView)
