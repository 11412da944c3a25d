"""``connect`` against the real worker app over a real socket, with a learner of a few numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from sheily_train import paths, runlog
from sheily_train.colab.address import Address
from sheily_train.colab.batches import DENDRITES, batch_from_binary
from sheily_train.colab.client import ClienteColabEntrenamiento
from sheily_train.colab.connect import Order, Outcome, connect, discard, load_data, seconds_of
from sheily_train.colab.journal import Journal
from sheily_train.colab.presets import Settings
from sheily_train.colab.protocol import Kind
from sheily_train.colab.wire import ClientSettings
from sheily_train.colab.worker import WorkerSettings, create_app
from sheily_train.errors import (
    BusyError,
    DataError,
    Interrupted,
    RefusedError,
    RequestError,
    ResourceError,
    UnreachableError,
    WorkerError,
)
from sheily_train.tools.monitoring.omega_view import PlainOmegaView
from tests.colab.tiny_learner import TinyLearner
from tests.full_disk import full_disk_after

TOKEN = "t0ken-of-the-tests-" + "x" * 30
SMALL = Settings(muestras=20, lote=4)
AT_ONCE = ClientSettings(wait_initial=0.01, wait_jitter=0.01)


class Worker:
    """A worker at a port of its own; it may be stopped and started again with the same folder.

    Args:
        seconds: what a batch takes.
        plain: know no runs, as OMEGA 21 v4.0 does.
    """

    learner: type[TinyLearner] = TinyLearner

    def __init__(self, folder: Path, seconds: float = 0.0, *, plain: bool = False) -> None:
        self._folder = folder
        self._plain = plain
        self._seconds = seconds
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = Address(f"http://127.0.0.1:{self._port}", TOKEN)

    def start(self) -> None:
        settings = WorkerSettings(self._folder, token=TOKEN)
        self._app = create_app(settings, self._learner)
        config = uvicorn.Config(
            self._answer, port=self._port, interface="asgi3", log_config=None, lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def _learner(self, seed: int, device: str) -> Any:
        return self.learner(seed, device, seconds=self._seconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._plain and scope["path"] == "/run":
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._app.close()


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root of the test's own."""
    monkeypatch.setenv("SHEILY_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def down(tmp_path: Path) -> Worker:
    """A worker that was not started."""
    return Worker(tmp_path / "worker")


@pytest.fixture
def worker(down: Worker) -> Iterator[Worker]:
    """A worker that answers."""
    down.start()
    yield down
    down.stop()


def order(worker: Worker, settings: Settings = SMALL, **more: Any) -> Order:
    return Order(worker.address, settings, client=AT_ONCE, **more)


def journal(run: str = "principal") -> Journal:
    return Journal(paths.omega_dir() / run, run)


def records(event: str | None = None, run: str = "principal") -> list[runlog.Record]:
    return list(runlog.read(paths.logs_dir() / f"omega_{run}.jsonl", event))


def library(worker: Worker) -> ClienteColabEntrenamiento:
    """Another program of the same desk, on the same run."""
    return ClienteColabEntrenamiento(worker.address.url, TOKEN, settings=AT_ONCE)


def die_at(event: str, count: int = 1) -> Callable[[runlog.Record], None]:
    """A listener at which the command dies, at the record of so many of this event: nothing is sent after it."""
    seen: list[runlog.Record] = []

    def listen(record: runlog.Record) -> None:
        if record["event"] == event:
            seen.append(record)
            if len(seen) == count:
                raise ZeroDivisionError

    return listen


def stop_at(event: str, count: int = 1, number: int = signal.SIGINT) -> Callable[[runlog.Record], None]:
    """A listener that sends this process a signal, once, at the record of so many of this event."""
    seen: list[runlog.Record] = []

    def listen(record: runlog.Record) -> None:
        if record["event"] == event:
            seen.append(record)
            if len(seen) == count:
                os.kill(os.getpid(), number)

    return listen


def test_a_session_trains_every_vector_and_sums_up(worker: Worker) -> None:
    """Five batches of four: five events, five steps in the log, and an outcome with their numbers."""
    heard: list[runlog.Record] = []
    outcome = connect(order(worker), listeners=(heard.append,))
    steps = records("step")
    assert [step["seq"] for step in steps] == [1, 2, 3, 4, 5]
    numbers = outcome.numbers
    assert (numbers["run"], numbers["session"], numbers["batches"], numbers["vectors"]) == ("principal", 1, 5, 20)
    assert (numbers["loss_first"], numbers["loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert numbers["anomalies"] == 2
    assert numbers["anomaly_prob"] == pytest.approx(np.mean([step["anomaly_prob"] for step in steps]))
    assert outcome.log == paths.logs_dir() / "omega_principal.jsonl"
    assert heard == records()
    assert heard[-1] == {"event": "done", **numbers}
    with journal() as book:
        assert (book.last_seq, book.seed, book.sessions[0]["done"]) == (5, 42, True)


def test_the_token_is_written_nowhere(worker: Worker, root: Path) -> None:
    """Neither in the log nor in the journal nor in the report."""
    connect(order(worker, report=root / "informe.html"))
    ours = [file for file in root.rglob("*") if file.is_file() and worker._folder not in file.parents]
    assert len(ours) >= 5
    assert [file for file in ours if TOKEN.encode() in file.read_bytes()] == []


def test_a_finished_session_run_again_is_a_new_one_with_fresh_vectors(worker: Worker) -> None:
    """The same command, other vectors; the run goes on where it was."""
    connect(order(worker))
    assert connect(order(worker)).numbers["session"] == 2
    with journal() as book:
        bodies = [entry.event.body for entry in book.entries()]
        assert len(set(bodies)) == len(bodies) == 10
        assert [session["first_seq"] for session in book.sessions] == [1, 6]


@pytest.mark.parametrize("settings", [SMALL, Settings(muestras=18, lote=4, feedback=True)], ids=["plain", "feedback"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_session_goes_on_to_the_same_end(worker: Worker, settings: Settings, number: int) -> None:
    """Stopped after the second batch: a line on how to go on; the same order ends with the steps of no stop at all."""
    connect(order(worker, settings, run="undisturbed"))
    with pytest.raises(Interrupted, match=r"--continuar") as caught:
        connect(order(worker, settings, run="disturbed"), listeners=(stop_at("step", 2, number),))
    assert caught.value.exit_code == 128 + number
    heard: list[runlog.Record] = []
    outcome = connect(order(worker, settings, run="disturbed"), listeners=(heard.append,))
    assert (outcome.numbers["session"], outcome.numbers["batches"]) == (1, 5)
    [session] = [record for record in heard if record["event"] == "session"]
    assert session["resumed"]
    assert session["done"] >= 2
    for event in ("step", "feedback"):
        told = {record["seq"]: record for record in records(event, "disturbed")}
        assert list(told.values()) == records(event, "undisturbed")
    undisturbed = records("done", "undisturbed")[0]
    differing = {name for name, value in outcome.numbers.items() if undisturbed[name] != value}
    assert differing <= {"run", "seconds", "vectors_per_second"}
    assert outcome.numbers["vectors_per_second"] * outcome.numbers["seconds"] < 14


def test_a_second_session_that_goes_on_is_counted_alone(worker: Worker) -> None:
    """The numbers of the first one, in the same log, are not its own."""
    connect(order(worker))
    with pytest.raises(Interrupted):
        connect(order(worker), listeners=(stop_at("step", 2),))
    numbers = connect(order(worker)).numbers
    assert (numbers["session"], numbers["batches"], numbers["vectors"]) == (2, 5, 20)
    assert numbers["loss_first"] == records("step")[5]["loss"]


def test_feedback_follows_each_batch_but_the_runs_first(worker: Worker) -> None:
    """Validated when the loss fell; a later session compares its first batch with the run's last."""
    settings = Settings(muestras=12, lote=4, feedback=True)
    outcome = connect(order(worker, settings))
    with journal() as book:
        assert [entry.event.kind for entry in book.entries()] == [Kind.TRAIN, *[Kind.TRAIN, Kind.FEEDBACK] * 2]
    losses = [step["loss"] for step in records("step")]
    validated = [later < earlier for earlier, later in pairwise(losses)]
    assert [record["validated"] for record in records("feedback")] == validated
    assert (outcome.numbers["feedback"], outcome.numbers["validated"]) == (2, sum(validated))
    assert connect(order(worker, settings)).numbers["feedback"] == 3


@pytest.mark.parametrize("count", [3, 5])
def test_a_batch_is_judged_however_much_feedback_stands_before_it(worker: Worker, count: int) -> None:
    """Another program's feedback lies between the run's batches; they are compared all the same, after a cut too."""
    settings = Settings(muestras=8, lote=4, feedback=True)
    connect(order(worker, settings))
    with library(worker) as client:
        for _time in range(count):
            client.enviar_feedback([0.5] * DENDRITES, validacion=True)
    with pytest.raises(ZeroDivisionError):
        connect(order(worker, settings), listeners=(die_at("step"),))
    outcome = connect(order(worker, settings))
    assert (outcome.numbers["session"], outcome.numbers["feedback"]) == (2, 2)
    losses = [step["loss"] for step in records("step")]
    judged = [record["validated"] for record in records("feedback")]
    assert [judged[0], *judged[-2:]] == [later < earlier for earlier, later in pairwise(losses)]


def test_continuar_needs_no_flags_and_takes_no_others(worker: Worker) -> None:
    """It has the session's own settings; a flag that differs from them is refused, one that does not is fine."""
    with pytest.raises(RequestError, match="ninguna sesión"):
        connect(order(worker, Settings(), resume=True))
    with pytest.raises(Interrupted):
        connect(order(worker), listeners=(stop_at("step", 2),))
    with pytest.raises(RequestError, match="--lote no es el suyo"):
        connect(order(worker, Settings(lote=5), given={"lote"}, resume=True))
    outcome = connect(order(worker, Settings(lote=4, metricas=True), given={"lote", "metricas"}, resume=True))
    assert (outcome.numbers["session"], outcome.numbers["vectors"]) == (1, 20)
    assert len(outcome.numbers["metrics"]["ultimos_20_losses"]) == 5
    again = connect(order(worker, Settings(), resume=True))
    assert (again.numbers["session"], again.numbers["batches"]) == (1, 5)
    with journal() as book:
        assert book.last_seq == 5


def test_another_plan_begins_another_session_and_says_so(worker: Worker) -> None:
    """What the first one had written down is kept and comes first."""
    with pytest.raises(Interrupted):
        connect(order(worker), listeners=(stop_at("step", 2),))
    with journal() as book:
        written = book.last_seq
    outcome = connect(order(worker, Settings(muestras=8, lote=4)))
    assert (outcome.numbers["session"], outcome.numbers["vectors"]) == (2, 8)
    assert "La sesión 1 quedó a medias" in records("note")[0]["text"]
    with journal() as book:
        assert (book.last_seq, book.answered_seq) == (written + 2, written + 2)
        assert [session["done"] for session in book.sessions] == [False, True]


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_session_goes_on_after_what_another_program_sent(worker: Worker, feedback: bool, cut: int) -> None:
    """A program of one's own uses the run between a cut and the next call: no batch of the session is left out."""
    settings = Settings(muestras=80, lote=4, feedback=feedback)
    rows = load_data(settings, 1)[:].input_data
    for _time in range(2):
        with pytest.raises(ZeroDivisionError):
            connect(order(worker, settings), listeners=(die_at("step", cut),))
        with library(worker) as client:
            client.entrenar_multiples_lotes(np.full((6, 1600), 0.5), tamano_lote=2)
            client.enviar_feedback([0.5] * DENDRITES, validacion=True)
    outcome = connect(order(worker, settings))
    with journal() as book:
        trained = [batch_from_binary(entry.event.body) for entry in book.entries() if entry.event.kind is Kind.TRAIN]
    own = [batch.input_data for batch in trained if len(batch) == 4]
    assert np.array_equal(np.concatenate(own), rows)
    assert (outcome.numbers["session"], outcome.numbers["batches"], outcome.numbers["vectors"]) == (1, 20, 80)
    assert re.match(r"Otro programa envió \d eventos a «principal».* la sesión 1 sigue", records("note")[0]["text"])
    assert connect(order(worker)).numbers["session"] == 2


def test_a_file_is_read_in_an_order_of_the_sessions_own(worker: Worker, root: Path) -> None:
    """Every vector once; a file that has changed is another plan, and --continuar refuses it."""
    rows = np.arange(10 * 1600, dtype=np.float32).reshape(10, 1600)
    file = root / "mis datos.npy"
    np.save(file, rows)
    settings = Settings(datos=file, lote=4)
    first, second = load_data(settings, 1)[:], load_data(settings, 2)[:]
    assert not np.array_equal(first.input_data, second.input_data)
    for batch in (first, second):
        assert np.array_equal(np.sort(batch.input_data, axis=0), rows)
    assert np.array_equal(load_data(Settings(datos=file, muestras=3), 1)[:].input_data, first.input_data[:3])

    with pytest.raises(Interrupted):
        connect(order(worker, settings), listeners=(stop_at("step"),))
    np.save(file, rows + 1)
    with pytest.raises(RequestError, match="ha cambiado"):
        connect(order(worker, Settings(), resume=True))
    assert connect(order(worker, settings)).numbers["session"] == 2
    assert records("session")[-1]["source"] == "mis datos.npy"


def test_a_large_npy_stays_on_the_disk(root: Path) -> None:
    """Only the batch that is asked for is in memory, however large the file."""
    rows = np.lib.format.open_memmap(root / "grande.npy", "w+", np.float32, (32768, 1600))
    tracemalloc.start()
    try:
        vectors = load_data(Settings(datos=root / "grande.npy"), 1)
        part = vectors[64:128]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(vectors), len(part)) == (len(rows), 64)
    assert peak < rows.nbytes / 8


def test_a_long_session_is_gathered_part_by_part(worker: Worker, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches are those of a session gathered at once, in their order, after a cut too."""
    monkeypatch.setattr("sheily_train.colab.connect._VECTORS_AT_ONCE", 10)
    rows = np.arange(50 * 1600, dtype=np.float32).reshape(50, 1600)
    np.save(root / "datos.npy", rows)
    settings = Settings(datos=root / "datos.npy", lote=4)
    with pytest.raises(ZeroDivisionError):
        connect(order(worker, settings), listeners=(die_at("step", 3),))
    outcome = connect(order(worker, settings))
    assert (outcome.numbers["session"], outcome.numbers["batches"], outcome.numbers["vectors"]) == (1, 13, 50)
    with journal() as book:
        sent = [batch_from_binary(entry.event.body).input_data for entry in book.entries()]
    assert [len(part) for part in sent] == [4] * 12 + [2]
    assert np.array_equal(np.concatenate(sent), load_data(settings, 1)[:].input_data)


def test_made_up_vectors_are_decided_by_seed_and_session() -> None:
    """The same bytes for the same two numbers, others for any other."""

    def bytes_of(seed: int, session: int) -> bytes:
        return load_data(Settings(muestras=3, semilla=seed), session)[:].input_data.tobytes()

    assert bytes_of(1, 1) == bytes_of(1, 1)
    assert len({bytes_of(1, 1), bytes_of(1, 2), bytes_of(2, 1)}) == 3
    assert int((load_data(Settings(muestras=50, anomalias=20, tipo="neuronal"), 1)[:].labels == 1).sum()) == 10


def test_diagnosis_comes_before_and_metrics_after(worker: Worker) -> None:
    """Both stand in the log where they happened."""
    connect(order(worker, Settings(muestras=4, lote=4, diagnostico=True, metricas=True)))
    events = [record["event"] for record in records()]
    kept = [event for event in events if event not in {"wire", "retry", "snapshot"}]
    assert kept == ["worker", "diagnosis", "session", "step", "metrics", "done"]


def test_a_report_is_written_in_three_forms(worker: Worker, root: Path) -> None:
    """Beside the name that was given; a name that cannot be used is refused before anything is sent."""
    outcome = connect(order(worker, report=root / "informe.html"))
    assert [file.name for file in outcome.report] == ["informe.html", "informe.json", "informe.md"]
    assert json.loads((root / "informe.json").read_text(encoding="utf-8"))["summary"]["vectors"] == 20
    for name in ("informe.pdf", "no/informe.html"):
        with pytest.raises(RequestError, match="informe"):
            order(worker, report=root / name)


def test_a_report_that_would_replace_a_file_of_ones_own_is_refused_before_training(down: Worker, root: Path) -> None:
    """Not after a night of it: nothing is sent, and the file is as it was."""
    (root / "informe.md").write_text("# Mis notas")
    with pytest.raises(RequestError, match=r"informe\.md ya existe y no es un informe"):
        order(down, report=root / "informe.html")
    assert (root / "informe.md").read_text() == "# Mis notas"


def test_cada_repeats_until_it_is_stopped(worker: Worker) -> None:
    """Each time a session with fresh vectors; the stop comes in the pause."""
    outcomes: list[Outcome] = []

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        connect(order(worker, every=0.05), ended=ended)
    assert [outcome.numbers["session"] for outcome in outcomes] == [1, 2, 3]


def test_cada_goes_on_first_and_then_repeats(worker: Worker) -> None:
    """With --continuar: the session that was cut, then new ones with its settings."""
    with pytest.raises(Interrupted):
        connect(order(worker), listeners=(stop_at("step", 2),))
    outcomes: list[Outcome] = []

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        connect(order(worker, Settings(), resume=True, every=0.05), ended=ended)
    assert [(outcome.numbers["session"], outcome.numbers["vectors"]) for outcome in outcomes] == [(1, 20), (2, 20)]


def test_cada_survives_a_worker_that_is_away(down: Worker) -> None:
    """It says so, and the next time does what the first one could not; without --cada it is an error."""
    with pytest.raises(UnreachableError):
        connect(order(down))
    notes: list[str] = []

    def listen(record: runlog.Record) -> None:
        if record["event"] == "note":
            notes.append(record["text"])
            if len(notes) == 2:
                down.start()

    def ended(_outcome: Outcome) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        connect(order(down, every=0.5), listeners=(listen,), ended=ended)
    down.stop()
    assert "Próxima sesión dentro de" in notes[1]
    assert [step["seq"] for step in records("step")] == [1, 2, 3, 4, 5]


def test_a_worker_that_goes_away_in_the_middle_is_waited_for(worker: Worker) -> None:
    """What was pending comes first at the next time; nothing is sent twice."""
    away: list[bool] = []

    def listen(record: runlog.Record) -> None:
        if record["event"] == "step" and record["seq"] == 2 and not away:
            away.append(True)
            threading.Thread(target=worker.stop).start()
        if record["event"] == "note" and "Próxima" in record["text"] and len(away) == 1:
            away.append(False)
            worker.start()

    def ended(_outcome: Outcome) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    settings = Settings(muestras=160, lote=4)
    with pytest.raises(Interrupted):
        connect(order(worker, settings, every=0.1), listeners=(listen,), ended=ended)
    assert away == [True, False]
    assert [session["done"] for session in journal_sessions()] == [True]
    assert sorted({step["seq"] for step in records("step")}) == list(range(1, 41))


def journal_sessions() -> list[dict[str, Any]]:
    with journal() as book:
        return book.sessions


def test_a_plain_worker_is_trained_without_the_promise(tmp_path: Path) -> None:
    """It says so; sessions follow each other with fresh vectors, and none can be gone on with."""
    plain = Worker(tmp_path / "plain", plain=True)
    plain.start()
    try:
        settings = Settings(muestras=12, lote=4, feedback=True, metricas=True)
        first, second = (connect(order(plain, settings)) for _time in range(2))
        with pytest.raises(Interrupted):
            connect(order(plain), listeners=(stop_at("step", 2),))
        third = connect(order(plain))
        with pytest.raises(RequestError, match="ninguna sesión que continuar"):
            connect(order(plain, resume=True))
    finally:
        plain.stop()
    assert [outcome.numbers["session"] for outcome in (first, second, third)] == [1, 2, 4]
    assert (second.numbers["batches"], second.numbers["feedback"]) == (3, 2)
    assert third.numbers["batches"] == 5
    assert len(records("plain")) == 5
    assert first.numbers["loss"] != second.numbers["loss"]


class Reticent(Worker):
    """A plain v4.0 worker that answers null wherever it may not know."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = {
            "/status": {"modelo": "v4", "estadisticas": None},
            "/train_layer2": {
                **{"loss": None, "anomaly_prob": None, "dendrites": [0.0] * DENDRITES, "coherence": None},
                **{"batch_size": 4, "timestamp": None},
            },
            "/metricas": {"ultimos_20_losses": None, "tendencia": None, "feedback_tasa_exito": "?"},
        }
        found = answers.get(scope["path"])
        await JSONResponse(found or {"detail": "Not Found"}, 200 if found else 404)(scope, receive, send)


def test_a_plain_worker_that_does_not_know_its_loss_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No number is made up, no batch is judged by one, and view and summaries can tell it."""
    reticent = Reticent(tmp_path / "reticent")
    reticent.start()
    try:
        settings = Settings(muestras=8, lote=4, feedback=True, metricas=True)
        outcome = connect(order(reticent, settings), listeners=(PlainOmegaView(sys.stdout),))
        with library(reticent) as client:
            client.entrenar_multiples_lotes(np.zeros((8, 1600)), 4)
            summary = client.mostrar_resumen()
    finally:
        reticent.stop()
    assert (outcome.numbers["batches"], outcome.numbers["loss"], outcome.numbers["feedback"]) == (2, None, 0)
    assert "Lotes: 2 (8 vectores)" in summary
    assert "Vectores: 8 en 2 lotes" in capsys.readouterr().out


def test_two_at_once_on_one_run_are_not_allowed(worker: Worker) -> None:
    """The second is told, and the first one's log is left alone."""
    connect(order(worker))
    before = (paths.logs_dir() / "omega_principal.jsonl").read_bytes()
    with journal(), pytest.raises(BusyError):
        connect(order(worker))
    assert (paths.logs_dir() / "omega_principal.jsonl").read_bytes() == before


def test_a_wrong_token_is_said_at_once(worker: Worker) -> None:
    """No session is begun; the right token begins the first."""
    with pytest.raises(RefusedError):
        connect(Order(Address(worker.address.url, "wrong-" + "x" * 40), SMALL))
    assert journal_sessions() == []
    assert connect(order(worker)).numbers["session"] == 1


def test_a_log_whose_last_line_was_cut_goes_on_with_whole_lines(worker: Worker) -> None:
    """As a kill leaves it."""
    connect(order(worker))
    log = paths.logs_dir() / "omega_principal.jsonl"
    whole = len(records())
    with log.open("ab") as file:
        file.write(b'{"event": "st')
    connect(order(worker))
    assert len(records()) > whole
    assert len(records("done")) == 2


def test_a_log_that_cannot_be_written_is_told(worker: Worker) -> None:
    """With its name; the session goes on once it can."""
    log = paths.logs_dir() / "omega_principal.jsonl"
    log.mkdir(parents=True)
    with pytest.raises(ResourceError, match=r"omega_principal\.jsonl"):
        connect(order(worker))
    log.rmdir()
    assert connect(order(worker)).numbers["vectors"] == 20


def test_a_disk_that_fills_up_under_the_log_is_told(worker: Worker) -> None:
    """The line that had no room is named as such, also when the log is closed; with room the run goes on."""
    connect(order(worker))
    log = paths.logs_dir() / "omega_principal.jsonl"
    with log.open("ab") as file:  # the log, not the journal, comes to its end
        file.write(b'{"event": "note", "text": "%s"}\n' % (b"x" * 2_000_000))
    with full_disk_after(log.stat().st_size + 10), pytest.raises(ResourceError, match=r"omega_principal\.jsonl"):
        connect(order(worker))
    assert connect(order(worker)).numbers["vectors"] == 20


def test_a_damaged_line_of_the_log_is_named(worker: Worker) -> None:
    """Before anything is sent."""
    connect(order(worker))
    log = paths.logs_dir() / "omega_principal.jsonl"
    log.write_bytes(b'{"event": "st\n' + log.read_bytes())
    with pytest.raises(DataError, match=r"omega_principal\.jsonl:1:"):
        connect(order(worker))


def test_more_vectors_than_the_memory_holds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up or read, with what to do about it."""

    def too_many(*_arguments: Any, **_options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("sheily_train.core.omega.generator.np.empty", too_many)
    with pytest.raises(ResourceError, match="--muestras"):
        load_data(Settings(muestras=100_000_000), 1)


def test_an_unreadable_file_is_an_error_before_a_session_begins(worker: Worker, root: Path) -> None:
    """Absent, or damaged."""
    with pytest.raises(RequestError, match=r"^No existe .*no\.npy"):  # said before the worker is asked
        order(worker, Settings(datos=root / "no.npy"))
    (root / "bad.npy").write_bytes(b"no array")
    with pytest.raises(DataError):
        connect(order(worker, Settings(datos=root / "bad.npy")))
    assert journal_sessions() == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h", 3600), ("30m", 1800), ("45s", 45), ("1h30m", 5400), (" 2H ", 7200), ("5min", 300)]
)
def test_an_interval_is_read(text: str, seconds: float) -> None:
    """Hours, minutes, seconds, or several of them."""
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "0s", "h", "1d", "-1h", "1.5h", "s30"])
def test_what_is_no_interval_is_told(text: str) -> None:
    """With what was expected."""
    with pytest.raises(RequestError, match="1h, 30m o 45s"):
        seconds_of(text)


@pytest.mark.parametrize("run", ["worker", "Worker", "anonimo", "../x", "a b", ""])
def test_a_name_that_cannot_be_a_run_is_refused(run: str, down: Worker) -> None:
    """It names a folder; two are the worker's own. Nothing is sent, so the refusal is no worker's."""
    with pytest.raises(RequestError, match="--run"):
        order(down, run=run)


class OtherMachine(TinyLearner):
    """Another kind of machine, with other numbers."""

    fingerprint = {"device": "cuda", "torch": "tiny"}  # noqa: RUF012

    def train(self, batch: Any, step: int) -> Any:
        self.weight *= 1.25
        return super().train(batch, step)


def test_a_session_goes_on_at_another_machine(worker: Worker, root: Path) -> None:
    """Refused without --rebase; with it, the log tells the return, and each batch counts once, as it was told last."""
    connect(order(worker))
    before = records("step")
    worker.stop()
    worker.learner = OtherMachine
    worker.start()
    with pytest.raises(WorkerError, match="otra clase de máquina"):
        connect(order(worker, Settings(), resume=True))
    outcome = connect(order(worker, Settings(), resume=True, rebase=True, report=root / "informe.md"))
    [told] = records("rebase")
    assert told == {"event": "rebase", "seq": 0, "from": TinyLearner.fingerprint, "to": OtherMachine.fingerprint}
    again = records("step")[5:]
    assert [step["seq"] for step in again] == [1, 2, 3, 4, 5]
    assert again[0]["loss"] != before[0]["loss"]
    assert (outcome.numbers["batches"], outcome.numbers["loss"]) == (5, again[-1]["loss"])
    assert outcome.numbers["loss_first"] == again[0]["loss"]
    report = (root / "informe.md").read_text(encoding="utf-8")
    assert "siguió en otra máquina (--rebase)" in report
    assert "device cpu → cuda" in report
    connect(order(worker))
    assert len(records("rebase")) == 1


def test_a_return_that_a_kill_left_out_of_the_log_is_told(worker: Worker) -> None:
    """The journal had gone back, the log did not say so yet: it is told before what was trained anew."""
    connect(order(worker))
    worker.stop()
    shutil.rmtree(worker._folder)
    with journal() as book:
        book.rebase(0, OtherMachine.fingerprint)
    worker.learner = OtherMachine
    worker.start()
    outcome = connect(order(worker, Settings(), resume=True))
    told = [(record["event"], record["seq"]) for record in records() if record["event"] in ("step", "rebase")]
    assert told == [*(("step", seq) for seq in range(1, 6)), ("rebase", 0), *(("step", seq) for seq in range(1, 6))]
    assert outcome.numbers["loss"] == records("step")[-1]["loss"]


class Choking(TinyLearner):
    """A network that fails at certain vectors each time."""

    bad: ClassVar[set[bytes]] = set()

    def train(self, batch: Any, step: int) -> Any:
        if batch.input_data.tobytes() in self.bad:
            raise RuntimeError("the device fell off the bus")
        return super().train(batch, step)


@pytest.mark.parametrize("choking", [0, 2])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_session_goes_on_after_what_was_discarded(down: Worker, feedback: bool, choking: int) -> None:
    """A batch at which the worker always fails is removed with those behind it, and only they are left out."""
    settings = Settings(muestras=40, lote=4, feedback=feedback)
    rows = load_data(settings, 1)[:].input_data
    Choking.bad = {rows[4 * choking : 4 * choking + 4].tobytes()}
    down.learner = Choking
    down.start()
    try:
        with pytest.raises(WorkerError, match="--descartar"):
            connect(order(down, settings))
        with journal() as book:
            waiting = book.last_seq - book.answered_seq
        assert waiting == (1 if feedback else waiting) > 0
        heard: list[runlog.Record] = []
        assert discard(order(down, Settings()), listeners=(heard.append,)) == waiting
        told = [record for record in heard if record["event"] != "resync"]
        assert told == [{"event": "note", "text": f"Eventos quitados del diario de «principal»: {waiting}"}]
        assert discard(order(down, Settings())) == 0
        outcome = connect(order(down, Settings(), resume=True))
    finally:
        down.stop()
    with journal() as book:
        batches = [entry for entry in book.entries() if entry.event.kind is Kind.TRAIN]
        assert book.answered_seq == book.last_seq == len(batches) + (len(batches) - 1 if feedback else 0)
    assert (outcome.numbers["session"], outcome.numbers["batches"]) == (1, 10 - waiting)
    left = [*range(choking), *range(choking + waiting, 10)]
    assert [batch_from_binary(entry.event.body).input_data.tobytes() for entry in batches] == [
        rows[4 * number : 4 * number + 4].tobytes() for number in left
    ]
