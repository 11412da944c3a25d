from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from sheily_train.colab.batches import (
    BINARY_FORM,
    batch_from_binary,
    batch_from_json,
    batch_to_binary,
    feedback_from_binary,
    make_batch,
)
from sheily_train.colab.client import ClienteColabAsincrono, ClienteColabEntrenamiento
from sheily_train.colab.delivery import Draft
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import Kind
from sheily_train.colab.pulled import PulledState
from sheily_train.colab.snapshots import unpack_snapshot
from sheily_train.colab.wire import PIECE, REPLY_LIMIT, ClientSettings
from sheily_train.colab.worker import WorkerApp, WorkerSettings, create_app
from sheily_train.durable import sha256_file
from sheily_train.errors import (
    BusyError,
    RefusedError,
    RequestError,
    ResourceError,
    SheilyError,
    UnreachableError,
    WorkerError,
)
from sheily_train.scripts.testing.fault_proxy import FAULTS, FaultProxy
from tests.colab.tiny_learner import POISON, TinyLearner

TOKEN = "a-token-of-the-tests-0123456789"
QUICK = {"timeout": 2.0, "wait_initial": 0.01, "wait_max": 0.05, "wait_jitter": 0.01}
ROWS = np.random.default_rng(1).normal(size=(60, 1600)).astype(np.float32)
LABELS = (np.arange(60) % 10 == 0).astype(np.int8)
SAMPLES = make_batch(ROWS, LABELS)
WIDE = np.ones((30, 1600))

Records = list[tuple[str, dict[str, Any]]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Other(TinyLearner):
    """A network that answers otherwise, on the same kind of machine."""

    def train(self, batch: Any, step: int) -> Any:
        self.weight += 1
        return super().train(batch, step)


class OtherMachine(TinyLearner):
    fingerprint = {"device": "cuda", "torch": "tiny"}  # noqa: RUF012


def new_worker(folder: Path, factory: Callable[[int, str], Any] = TinyLearner, **more: Any) -> WorkerApp:
    return create_app(WorkerSettings(folder, more.pop("token", None), **more), factory)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerApp]:
    app = new_worker(tmp_path / "worker")
    yield app
    app.close()


class Served:
    """A worker on a real socket. ``crash`` loses what it had in memory, as a kill does."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.folder, self._more = folder, more
        self._left: list[WorkerApp] = []
        self.start()

    def start(self) -> None:
        self.app = new_worker(self.folder, **self._more)
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, lifespan="off", log_level="critical"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]

    def crash(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._left.append(self.app)

    def close(self) -> None:
        self.crash()
        for app in self._left:
            app.close()


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    server = Served(tmp_path / "worker", **getattr(request, "param", {}))
    yield server
    server.close()


def desk(tmp_path: Path, app: Any, records: Records | None = None, **more: Any) -> ClienteColabAsincrono:
    """A client in process."""
    settings = ClientSettings(**{**QUICK, **more.pop("settings", {})})
    record = None if records is None else lambda event, **fields: records.append((event, fields))
    folder = more.pop("folder", tmp_path / "desk")
    transport = None if isinstance(app, str) else httpx2.ASGITransport(app)
    url = app if isinstance(app, str) else "http://127.0.0.1"
    return ClienteColabAsincrono(
        url, more.pop("token", None), transport, folder=folder, record=record, settings=settings, **{"seed": 7, **more}
    )


def run(client: ClienteColabAsincrono, work: Callable[[ClienteColabAsincrono], Awaitable[Any]]) -> Any:
    async def body() -> Any:
        async with client:
            return await work(client)

    return asyncio.run(body())


async def lesson(client: ClienteColabAsincrono) -> list[dict[str, Any]]:
    """What most tests send: six batches, feedback, one batch more."""
    answers = await client.entrenar_multiples_lotes(SAMPLES, 10)
    answers.append(await client.enviar_feedback(answers[-1]["dendrites"], True))
    return [*answers, await client.entrenar_lote(SAMPLES[:5], epocas=2)]


def expected(folder: Path) -> bytes:
    """The weights of a network to which each event of the journal was applied once, in order, with nothing between."""
    learner = TinyLearner(7)
    with Journal(folder, "principal") as journal:
        for entry in journal.entries(after=journal.pruned_seq):
            event = entry.event
            if event.kind is Kind.FEEDBACK:
                learner.feedback(feedback_from_binary(event.body), event.seq)
            else:
                read = batch_from_binary if event.form == BINARY_FORM else batch_from_json
                learner.train(read(event.body), event.seq)
    return learner.weight.numpy().tobytes()


def weights(state: Path) -> bytes:
    return unpack_snapshot(state.read_bytes()).tensors["weight"].numpy().tobytes()


def check_applied_once(tmp_path: Path, url: Any, count: int = 8) -> None:
    """The worker's weights are those of the journal's events, and each of them has its answer."""
    path = run(desk(tmp_path, url), lambda client: client.descargar_estado())
    with Journal(tmp_path / "desk", "principal") as journal:
        assert (journal.last_seq, journal.answered_seq) == (count, count)
    assert weights(path) == expected(tmp_path / "desk")


def answering(status: int, body: bytes, kind: str = "application/json", **headers: str) -> Asgi:
    """An app that says the same to everyone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode()), *named]}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    return app


def between(app: Asgi, answer: Callable[[Scope], Asgi | None], seen: list[Scope] | None = None) -> Asgi:
    """An app in front of another, which answers some requests itself."""

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        if seen is not None:
            seen.append(scope)
        await (answer(scope) or app)(scope, receive, send)

    return front


def only_v4(app: Asgi) -> Asgi:
    """A plain v4.0 worker: no runs, no binary bodies, and its own answer to what it does not know."""
    return between(
        app, lambda scope: answering(404, b'{"detail":"Not Found"}') if scope["path"] in ("/run", "/predict") else None
    )


# What a session gives


def test_a_session_reaches_the_worker_once_and_in_order(tmp_path: Path, worker: WorkerApp) -> None:
    """Batches and feedback are applied once each, in order; answers and records follow that order."""
    records: Records = []
    answers = run(desk(tmp_path, worker, records), lesson)
    check_applied_once(tmp_path, worker)
    with Journal(tmp_path / "desk", "principal") as journal:
        assert [orjson.loads(body) for _seq, _kind, body in journal.answers()] == answers
        assert [entry.event.time for entry in journal.entries()] == [answer["timestamp"] for answer in answers]
    told = [(event, fields["seq"]) for event, fields in records if event in ("step", "feedback")]
    assert told == [*(("step", seq) for seq in range(1, 7)), ("feedback", 7), ("step", 8)]
    first = next(fields for event, fields in records if event == "step")
    assert first == {
        "seq": 1,
        "samples": 10,
        "loss": answers[0]["loss"],
        "anomaly_prob": answers[0]["anomaly_prob"],
        "anomalies": 1,
    }
    wires = [fields for event, fields in records if event == "wire"]
    assert [sorted(fields) for fields in wires] == [["attempts", "bytes", "queue", "seconds", "seq"]] * 8
    assert [fields["attempts"] for fields in wires] == [1] * 8
    assert max(fields["queue"] for fields in wires) == 3


def test_everything_is_written_before_it_is_sent_or_shown(tmp_path: Path, worker: WorkerApp) -> None:
    """When a request reaches the worker its event is on the disk, and so is an answer when it is recorded."""
    found: list[tuple[int, int]] = []

    def count(condition: str) -> int:
        uri = f"{(tmp_path / 'desk' / 'journal.sqlite').as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True)
        [(number,)] = connection.execute(f"SELECT count(*) FROM events JOIN bodies USING (seq) WHERE {condition}")
        connection.close()
        return int(number)

    def answer(scope: Scope) -> Asgi | None:
        if seq := int(dict(scope["headers"]).get(b"sheily-seq", 0)):
            found.append((seq, count(f"seq = {seq}")))
        return None

    client = desk(tmp_path, between(worker, answer))
    client._listener = lambda event, **fields: (
        found.append((fields["seq"], count(f"seq = {fields['seq']} AND answer IS NOT NULL")))
        if event in ("step", "feedback")
        else None
    )
    run(client, lesson)
    assert sorted(found) == [(seq, 1) for seq in range(1, 9) for _time in range(2)]


def test_json_bodies_give_the_same_weights(tmp_path: Path, worker: WorkerApp) -> None:
    """The client can send JSON with the same promise, and the network becomes the same."""
    run(desk(tmp_path, worker, settings={"form": "json"}), lambda client: client.entrenar_multiples_lotes(SAMPLES, 10))
    check_applied_once(tmp_path, worker, 6)


def test_samples_come_in_three_forms(tmp_path: Path, worker: WorkerApp) -> None:
    """A batch, an array and a list of objects are all understood."""

    async def work(client: ClienteColabAsincrono) -> None:
        pairs = zip(ROWS, LABELS, strict=True)
        rows = [{"input_data": row.tolist(), "anomaly_label": int(label)} for row, label in pairs]
        for samples, anomalies in ((SAMPLES, 6), (ROWS, 0), (rows, 6), ([{"input_data": ROWS[0]}], 0)):
            answer = await client.entrenar_lote(samples)
            assert (answer["batch_size"], answer["anomalias"]) == (len(samples), anomalies)
            assert len((await client.predecir(samples))["anomaly_prob"]) == len(samples)

    run(desk(tmp_path, worker), work)


def test_the_wire_is_full_and_no_fuller_than_the_workers_queue(tmp_path: Path) -> None:
    """Four events are on their way at once; two when the worker's queue holds two."""
    for queue, most in ((8, 4), (2, 2)):
        app = new_worker(tmp_path / f"worker{queue}", queue=queue)
        now = [0, 0]

        async def counted(scope: Scope, receive: Receive, send: Send, app: Asgi = app, now: list[int] = now) -> None:
            now[0] += scope["path"] == "/train_layer2"
            now[1] = max(now)
            await asyncio.sleep(0.02)
            await app(scope, receive, send)
            now[0] -= scope["path"] == "/train_layer2"

        client = desk(tmp_path, counted, folder=tmp_path / f"desk{queue}")
        answers = run(client, lambda client: client.entrenar_multiples_lotes(SAMPLES, 4))
        assert len(answers) == 15
        assert now[1] == most
        app.close()


def test_calls_may_overlap(tmp_path: Path, worker: WorkerApp) -> None:
    """Calls made at once take turns, and each gets its own answers."""

    async def work(client: ClienteColabAsincrono) -> None:
        sizes = [1, 2, 3, 4]
        answers = await asyncio.gather(*(client.entrenar_lote(SAMPLES[:size]) for size in sizes))
        assert [answer["batch_size"] for answer in answers] == sizes

    run(desk(tmp_path, worker), work)
    check_applied_once(tmp_path, worker, 4)


def test_every_question_has_its_answer(tmp_path: Path, worker: WorkerApp, capsys: pytest.CaptureFixture[str]) -> None:
    """State, build, metrics, diagnosis, history and summary tell what was trained."""

    async def work(client: ClienteColabAsincrono) -> None:
        assert (await client.obtener_estado())["modelo"] == "CortezaCognitivaV4"  # before any attachment
        assert client.mostrar_resumen() == "Aún no se ha entrenado ningún lote."
        connected = await client.conectar()
        assert (connected["run"], connected["last_seq"], client.plain) == ("principal", 0, False)
        answers = await lesson(client)
        assert (await client.obtener_estado())["estadisticas"]["total_muestras"] == 65
        assert (await client.obtener_info())["arquitectura"]["parametros_totales"] == 64
        assert (await client.obtener_metricas())["ultimos_20_losses"][-1] == answers[-1]["loss"]
        assert (await client.diagnostico())["status"] == "diagnostico_ok"
        history = client.obtener_historial()
        assert [(entry["seq"], entry["kind"]) for entry in history[5:]] == [(6, "train"), (7, "feedback"), (8, "train")]
        assert history[0]["loss"] == answers[0]["loss"]
        summary = client.mostrar_resumen()
        assert f"Loss: {answers[-1]['loss']:.6f}" in summary
        assert "Lotes: 7 (65 vectores)" in summary
        assert "Anomalía: " in summary
        assert "Feedback: 1 de 1 con éxito (100%)" in summary
        assert capsys.readouterr().out.endswith(summary + "\n")

    run(desk(tmp_path, worker), work)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda client: client.entrenar_lote([{"input_data": [0.0] * 1599}]), "1599"),
        (lambda client: client.entrenar_lote([]), "0 muestras"),
        (lambda client: client.entrenar_lote([{"vector": [0.0] * 1600}]), "Muestra 0: falta «input_data»"),
        (lambda client: client.entrenar_lote([{"input_data": [0.0] * 1600, "anomaly_label": 2}]), "anomaly_label"),
        (lambda client: client.entrenar_multiples_lotes(np.full((30, 1600), np.nan), 10), "desde la muestra 0"),
        (lambda client: client.entrenar_multiples_lotes(np.diag([1.0] * 25 + [1e30] * 5) @ WIDE, 10), "Lote 3"),
        (lambda client: client.entrenar_multiples_lotes(ROWS, 0), "tamaño de lote"),
        (lambda client: client.entrenar_lote(np.zeros((5000, 1600))), "5000 muestras"),
        (lambda client: client.enviar_feedback([0.1] * 15, True), "15"),
        (lambda client: client.enviar_feedback([0.1] * 16, "yes"), "validacion"),
        (lambda client: client.predecir(np.zeros((1, 7))), "1600"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, worker: WorkerApp, call: Any, named: str
) -> None:
    """What the worker would refuse never reaches the journal or the wire."""
    with pytest.raises((RefusedError, RequestError), match=named):
        run(desk(tmp_path, worker), call)
    with Journal(tmp_path / "desk", "principal") as journal:
        assert journal.last_seq == 0


# Faults on the wire


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_wire_changes_nothing(tmp_path: Path, served: Served, fault: str) -> None:
    """Whatever a tunnel does to a third of the requests, on real sockets, weights and answers are as if it had not."""
    records: Records = []
    chance = np.random.default_rng(5)
    settings = {"retries": 12, **({"timeout": 0.4} if fault in ("slow", "late") else {})}
    with FaultProxy(served.port, lambda *_request: fault if chance.random() < 0.33 else "pass", pause=0.6) as proxy:
        answers = run(desk(tmp_path, proxy.url, records, settings=settings), lesson)
        assert sum(used == fault for _method, _path, used in proxy.seen) >= 2
    assert [answer["batch_size"] for answer in answers if "batch_size" in answer] == [*[10] * 6, 5]
    if fault == "echo":  # seen or not: an answer that is left over must only never be taken for another's
        assert {fields["reason"] for event, fields in records if event == "retry"} <= {"foreign", "connection", "cut"}
    elif fault not in ("twice", "again", "overtaken"):
        assert [event for event, _fields in records if event == "retry"]
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}")


def test_an_answer_left_over_is_not_taken_for_anothers(tmp_path: Path, served: Served) -> None:
    """Where each answer comes twice, the second one is never the answer to the next event."""
    with FaultProxy(served.port, lambda _n, _m, path: "echo" if path == "/train_layer2" else "pass") as proxy:
        client = desk(tmp_path, proxy.url, settings={"depth": 1, "retries": 1})
        answers = run(client, lambda client: client.entrenar_multiples_lotes(SAMPLES, 10))
    assert len({answer["timestamp"] for answer in answers}) == 6
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}", 6)


def test_after_a_hiccup_every_connection_is_new(tmp_path: Path, served: Served) -> None:
    """A connection over which something odd came is not used again, whatever may still be in it."""
    faults = ["502", "pass", "pass"]
    with FaultProxy(served.port, lambda *_request: faults.pop(0)) as proxy:

        async def work(client: ClienteColabAsincrono) -> None:
            await client.obtener_estado()
            await client.obtener_estado()

        run(desk(tmp_path, proxy.url), work)
        assert proxy.connections == 2


REASONS = {
    "drop_before": "connection",
    "drop_after": "connection",
    "502": "http-502",
    "524": "http-524",
    "cut": "cut",
    "page": "html",
    "slow": "timeout",
    "damage": "damaged",
}
TEXTS = {
    "drop_before": "No hay conexión con 127.0.0.1",
    "502": "502 con una página HTML («ngrok gateway error»)",
    "524": "524 con una página HTML",
    "cut": "llegó cortada",
    "page": "página HTML (200, «ngrok gateway error»)",
    "slow": "no contestó en 0.2 s",
    "damage": "llegó dañado",
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_fault_that_stays_ends_in_bounded_time_and_says_which(tmp_path: Path, served: Served, fault: str) -> None:
    """After the retries the error names what came in place of an answer, and how to go on; and going on works."""
    records: Records = []
    begun = time.monotonic()
    with FaultProxy(served.port, lambda _n, _m, path: "pass" if path == "/run" else fault, pause=0.5) as proxy:
        patience = 0.2 if REASONS[fault] == "timeout" else 2.0
        client = desk(tmp_path, proxy.url, records, settings={"timeout": patience, "retries": 2})
        with pytest.raises(UnreachableError, match=re.escape(TEXTS[fault])) as raised:
            run(client, lambda client: client.entrenar_multiples_lotes(SAMPLES, 10))
    assert time.monotonic() - begun < 5
    assert "Tras 3 intentos" in raised.value.message
    assert "4 eventos esperan en el diario" in raised.value.mend
    assert "Anotados 4 de 6 lotes" in raised.value.mend
    retries = [fields for event, fields in records if event == "retry"]
    assert [(fields["reason"], fields["attempt"]) for fields in retries] == [(REASONS[fault], 1), (REASONS[fault], 2)]

    async def go_on(client: ClienteColabAsincrono) -> None:
        await client.conectar()
        await client.entrenar_multiples_lotes(SAMPLES[40:], 10)

    run(desk(tmp_path, f"http://127.0.0.1:{served.port}"), go_on)
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}", 6)


def test_nobody_there_is_said_and_asked_a_few_times_only(tmp_path: Path) -> None:
    """Without any worker the client gives up after its retries; the journal is not touched."""
    records: Records = []
    client = desk(tmp_path, "http://127.0.0.1:9", records, token=TOKEN)
    with pytest.raises(UnreachableError, match="No hay conexión con 127") as raised:
        run(client, lesson)
    assert [fields["attempt"] for event, fields in records if event == "retry"] == [1, 2, 3]
    assert TOKEN not in str(raised.value) + repr(records)


def test_what_another_program_answers_steers_no_terminal(tmp_path: Path) -> None:
    """Words with a terminal's own commands, and fields of any name, become an error that can be shown."""
    said = {"error": "no\x1b[2J", "help": "\x1b]0;x\x07", "code": "\x9b5m", "self": "https://elsewhere"}
    with pytest.raises(RefusedError) as raised:
        run(desk(tmp_path, answering(400, orjson.dumps(said))), lambda client: client.conectar())
    assert str(raised.value) == "no [2J  ]0;x"
    assert raised.value.code == " 5m"
    odd = {"fine": 1, "\x1b[2J": 2}
    with pytest.raises(WorkerError, match="contestó otro trabajador") as other:
        run(desk(tmp_path, answering(200, orjson.dumps(odd))), lambda client: client.conectar())
    assert str(other.value).isprintable()


def test_an_answer_without_an_end_is_not_read_for_ever(tmp_path: Path) -> None:
    """Over a real socket: where something else than a worker sends and sends, the client stops reading and says so."""
    sent = 0

    def send_on(listener: socket.socket) -> None:
        nonlocal sent
        with closing(listener.accept()[0]) as connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while sent < 500 * PIECE:
                sent += connection.send(b" " * PIECE)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = threading.Thread(target=send_on, args=(listener,))
        sender.start()
        client = desk(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}", settings={"retries": 0, "timeout": 60})
        with pytest.raises(UnreachableError, match="cortada o dañada"):
            run(client, lambda client: client.obtener_estado())
        sender.join()
    assert REPLY_LIMIT < sent < 100 * PIECE


def test_a_busy_worker_is_asked_again_when_it_says(tmp_path: Path, worker: WorkerApp) -> None:
    """Retry-After decides the pause, up to the client's own limit."""
    records: Records = []
    refusals = [answering(429, b'{"status":"error","error":"llena","code":"busy"}', retry_after="1")] * 2
    busy = between(worker, lambda scope: refusals.pop() if scope["path"] == "/train_layer2" and refusals else None)
    client = desk(tmp_path, busy, records, settings={"depth": 1, "wait_max": 0.3})
    begun = time.monotonic()
    run(client, lambda client: client.entrenar_lote(SAMPLES))
    assert time.monotonic() - begun > 0.6
    retries = [fields for event, fields in records if event == "retry"]
    assert retries == [{"reason": "busy", "attempt": attempt, "wait": 0.3} for attempt in (1, 2)]


def answer_like(**changed: Any) -> bytes:
    whole = {
        **{"status": "trained", "loss": 0.5, "anomaly_prob": 0.5, "dendrites": [0.0] * 16, "coherence": [0.0] * 64},
        **{"batch_size": 10, "timestamp": "2020-01-01T00:00:00+00:00"},
    }
    return orjson.dumps({name: value for name, value in (whole | changed).items() if value is not None})


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (answering(200, answer_like(loss=None)), WorkerError, "otro trabajador o programa: falta «loss»"),
        (answering(200, answer_like()), WorkerError, "forma de un OMEGA 21 v4.0, pero no es de ese evento"),
        (answering(200, b"<html><title>Hola</title>", "text/html"), UnreachableError, "página HTML (200, «Hola»)"),
        (answering(404, b"<html>ERR_NGROK_3200", "text/html"), UnreachableError, "página HTML (404, «sin título»)"),
        (answering(200, answer_like()[:-30]), UnreachableError, "cortada o dañada"),
        (answering(200, b"[1, 2]"), UnreachableError, "cortada o dañada"),
        (answering(200, b'{"status":"error","error":"CUDA OOM"}'), RefusedError, "CUDA OOM"),
        (answering(503, b""), UnreachableError, "contestó 503"),
        (answering(503, b'{"error":"sin disco","code":"storage"}'), UnreachableError, "sin disco"),
        (answering(500, b'{"status":"error","error":"fallo","code":"internal"}'), WorkerError, "fallo"),
        (answering(500, b"Internal Server Error", "text/plain"), WorkerError, "Contestó 500"),
        (answering(302, b"", location="https://otra.example"), WorkerError, "reenvía a otra: https://otra.example"),
        (answering(422, b'{"status":"error","error":"difieren","code":"conflict"}'), RefusedError, "difieren"),
        (answering(401, b'{"status":"error","error":"token","help":"mira","code":"auth"}'), RefusedError, "token mira"),
        (answering(429, b'{"status":"error","error":"muchos","code":"auth"}'), RefusedError, "muchos"),
        (answering(413, b"<html>Too large", "text/html"), RefusedError, "no deja pasar"),
        (answering(400, b'{"detail":"no"}'), RefusedError, "no"),
    ],
)
def test_the_error_says_what_answered(
    tmp_path: Path, worker: WorkerApp, answer: Asgi, kind: type[SheilyError], text: str
) -> None:
    """Another worker, a page, a cut body, a refusal: the client's error tells one from the other."""
    odd = between(worker, lambda scope: answer if scope["path"] == "/train_layer2" else None)
    with pytest.raises(kind, match=re.escape(text)) as raised:
        run(desk(tmp_path, odd, settings={"retries": 1}), lambda client: client.entrenar_lote(SAMPLES))
    assert type(raised.value) is kind


def test_a_refused_batch_is_taken_back(tmp_path: Path, worker: WorkerApp) -> None:
    """What a tunnel or a worker will never accept does not block the run for ever, and was not applied."""
    too_large = answering(413, b"<html>Request Entity Too Large</html>", "text/html")
    closed = [3]

    def answer(scope: Scope) -> Asgi | None:
        seq = dict(scope["headers"]).get(b"sheily-seq")
        return too_large if closed and seq is not None and int(seq) >= closed[0] else None

    async def work(client: ClienteColabAsincrono) -> None:
        with pytest.raises(RefusedError, match="no deja pasar"):
            await client.entrenar_multiples_lotes(SAMPLES, 10)
        assert (client.journal.last_seq, client.journal.answered_seq) == (2, 2)
        closed.clear()
        await client.entrenar_multiples_lotes(SAMPLES[20:], 10)

    run(desk(tmp_path, between(worker, answer)), work)
    check_applied_once(tmp_path, worker, 6)


def test_a_batch_that_was_applied_is_never_taken_back(tmp_path: Path, worker: WorkerApp) -> None:
    """A refusal that comes after the batch was applied leaves it in the journal: the next call gets its answer."""
    lost = between(worker, lambda scope: lose(worker, 413) if scope["path"] == "/train_layer2" else None)
    with pytest.raises(RefusedError):
        run(desk(tmp_path, lost), lambda client: client.entrenar_lote(SAMPLES))
    check_applied_once(tmp_path, worker, 1)


# Workers that come and go


def test_a_worker_that_lost_its_memory_is_brought_back(tmp_path: Path, served: Served) -> None:
    """After a crash in mid-run the client attaches again by itself and replays from the journal, byte for byte."""
    records: Records = []
    with FaultProxy(served.port) as proxy:

        def crash(number: int, _method: str, path: str) -> str:
            if number in (6, 13):
                served.crash()
                served.start()
                proxy.port = served.port
            return "pass"

        proxy.plan = crash
        run(desk(tmp_path, proxy.url, records), lesson)
    resyncs = [(fields["from_seq"], fields["to_seq"]) for event, fields in records if event == "resync"]
    assert len(resyncs) == 2
    assert {first for first, _last in resyncs} == {1}
    told = [fields["seq"] for event, fields in records if event in ("step", "feedback")]
    assert told == list(range(1, 9)), "a replayed event is not told twice"
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}")


def test_a_brand_new_worker_is_given_the_state(tmp_path: Path) -> None:
    """Fetched states replace pruned bodies: a worker without anything gets the newest one, and the rest is replayed."""
    records: Records = []
    settings = {"pull_after": 2, "keep_bytes": 0, "depth": 1}

    async def work(client: ClienteColabAsincrono) -> None:
        for start in range(0, 60, 10):
            await client.entrenar_multiples_lotes(SAMPLES[start : start + 10], 10)
            await client._parts()[1].finish()

    app = new_worker(tmp_path / "first")
    run(desk(tmp_path, app, records, settings=settings), work)
    final = run(desk(tmp_path, app, folder=copy_of(tmp_path)), lambda client: client.descargar_estado())
    final = final.rename(tmp_path / "final")
    pulled = [fields["seq"] for event, fields in records if event == "snapshot"]
    assert pulled == [2, 4, 6]
    app.close()
    names = sorted(path.name[:12] for path in (tmp_path / "desk" / "snapshots").iterdir())
    assert names == ["000000000004", "000000000006"]
    with Journal(tmp_path / "desk", "principal") as journal:
        assert (journal.pruned_seq, journal.answered_seq) == (4, 6)
    newest = next((tmp_path / "desk" / "snapshots").glob("000000000006-*"))
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    for damaged, begin in ((False, 6), (True, 4)):
        if damaged:
            newest.write_bytes(content)
        seen: list[Scope] = []
        app = new_worker(tmp_path / f"new{damaged}")
        front = between(app, lambda _scope: None, seen)
        path = run(desk(tmp_path, front, folder=copy_of(tmp_path)), lambda client: client.descargar_estado())
        assert weights(path) == weights(final)
        assert [scope["method"] for scope in seen if scope["path"] == "/state"] == ["PUT", "GET"]
        assert sum(scope["path"] == "/train_layer2" for scope in seen) == 6 - begin
        app.close()
    for state in (tmp_path / "desk" / "snapshots").iterdir():
        state.unlink()
    app = new_worker(tmp_path / "last")
    with pytest.raises(WorkerError, match="ni el diario ni las copias"):
        run(desk(tmp_path, app), lambda client: client.conectar())
    app.close()


def test_a_state_fetched_again_takes_the_place_of_its_like(tmp_path: Path, worker: WorkerApp) -> None:
    """The two states that are kept are of two events, however often the last one is fetched."""

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_lote(SAMPLES)
        await client.descargar_estado()
        await client.entrenar_lote(SAMPLES)
        for _time in range(3):
            await client.conectar()
            assert (await client.descargar_estado()).is_file()
        assert client.journal.pruned_seq == 1

    run(desk(tmp_path, worker, settings={"keep_bytes": 0}), work)
    names = sorted(path.name[:12] for path in (tmp_path / "desk" / "snapshots").iterdir())
    assert names == ["000000000001", "000000000002"]


def test_an_old_state_takes_no_newer_one_away(tmp_path: Path, worker: WorkerApp) -> None:
    """A state from a worker that came back with an old folder is kept beside the two newest: bodies were dropped that
    only these stand for. A damaged one is not counted among them."""

    def seqs() -> list[int]:
        return sorted(int(path.name[:12]) for path in (tmp_path / "desk" / "snapshots").iterdir())

    async def work(client: ClienteColabAsincrono) -> None:
        old = tmp_path / "old.safetensors"
        for seq in (1, 2, 3):
            await client.entrenar_lote(SAMPLES[:5])
            path = await client.descargar_estado()
            if seq == 1:
                shutil.copy(path, old)
        assert seqs() == [2, 3]
        assert client.journal.pruned_seq == 2
        states = client._parts()[1]
        part = tmp_path / "desk" / "snapshots" / ".part"
        for damaged in (False, True):
            if damaged:
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
            shutil.copy(old, part)
            states._keep(PulledState(1, sha256_file(old), part))
            assert seqs() == ([1, 2] if damaged else [1, 2, 3])
            assert client.journal.pruned_seq == 2

    run(desk(tmp_path, worker, settings={"keep_bytes": 0}), work)


def test_a_tunnel_that_refuses_a_state_leaves_the_replay(tmp_path: Path) -> None:
    """The bodies that a fetched state stands for are kept, and rebuild a worker that the state cannot reach."""
    records: Records = []
    app = new_worker(tmp_path / "first")

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_multiples_lotes(np.repeat(ROWS, 20, axis=0), 200)
        await client.descargar_estado()

    run(desk(tmp_path, app), work)
    final = run(desk(tmp_path, app, folder=copy_of(tmp_path)), lambda client: client.descargar_estado())
    final = final.rename(tmp_path / "final")
    app.close()
    app = new_worker(tmp_path / "new")
    refusing = between(
        app, lambda scope: answering(413, b"<html><title>413</title></html>") if scope["method"] == "PUT" else None
    )
    path = run(desk(tmp_path, refusing, records), lambda client: client.descargar_estado())
    assert weights(path) == weights(final)
    assert [fields for event, fields in records if event == "snapshot_failed"]
    app.close()


def test_owners_numbers_grow_from_worker_to_worker(tmp_path: Path) -> None:
    """The next owner's number is higher than any before, at a worker that knows none of them too."""
    owners = []
    for name in ("a", "a", "b", "a", "c"):
        app = new_worker(tmp_path / name)
        owners.append(run(desk(tmp_path, app), lambda client: client.conectar())["owner"])
        app.close()
    assert owners == [1, 2, 3, 4, 5]


def copy_of(tmp_path: Path) -> Path:
    """A copy of the desk's folder."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    return Path(shutil.copytree(tmp_path / "desk", tmp_path / "copy"))


def test_a_state_that_comes_damaged_is_fetched_again(tmp_path: Path, served: Served) -> None:
    """A state cut on its way is not kept; the next attempt is, and nothing half is left behind."""
    cuts = ["cut", "drop_after", "page"]
    with FaultProxy(served.port, lambda _n, _m, path: cuts.pop() if path == "/state" and cuts else "pass") as proxy:

        async def work(client: ClienteColabAsincrono) -> Path:
            await lesson(client)
            return await client.descargar_estado()

        path = run(desk(tmp_path, proxy.url), work)
    assert [path] == list((tmp_path / "desk" / "snapshots").iterdir())
    assert weights(path) == expected(tmp_path / "desk")


def test_a_state_that_cannot_be_fetched_stops_nothing(tmp_path: Path, worker: WorkerApp) -> None:
    """Training goes on beside a fetch that fails; it is told, and tried again later."""
    records: Records = []
    odd = between(worker, lambda scope: answering(500, b"{}") if scope["path"] == "/state" else None)

    async def work(client: ClienteColabAsincrono) -> None:
        for part in (SAMPLES[:30], SAMPLES[30:]):
            await client.entrenar_multiples_lotes(part, 10)
            await client._parts()[1].finish()

    run(desk(tmp_path, odd, records, settings={"pull_after": 3}), work)
    assert [event for event, _fields in records if event.startswith("snapshot")] == ["snapshot_failed"] * 2
    check_applied_once(tmp_path, worker, 6)


def test_a_state_that_the_disk_does_not_take_is_told(tmp_path: Path, worker: WorkerApp) -> None:
    """As an explained error to who asked for it, as a record beside the training, which goes on."""
    records: Records = []

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_lote(SAMPLES[:30])
        (tmp_path / "desk" / "snapshots").write_text("a file where the folder should be")
        await client.entrenar_multiples_lotes(SAMPLES, 30)
        await client._parts()[1].finish()
        await client.descargar_estado()

    with pytest.raises(ResourceError, match="no se puede guardar en"):
        run(desk(tmp_path, worker, records, settings={"pull_after": 2}), work)
    [failed] = [fields for event, fields in records if event == "snapshot_failed"]
    assert "no se puede guardar" in failed["reason"]
    (tmp_path / "desk" / "snapshots").unlink()
    check_applied_once(tmp_path, worker, 3)


def test_a_state_larger_than_any_is_not_fetched(
    tmp_path: Path, worker: WorkerApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program in the worker's place cannot fill the disk: it is told, and nothing is left of what it sent."""
    monkeypatch.setattr("sheily_train.colab.pulled.STATE_LIMIT", 3 * PIECE)
    large = answering(200, b"x" * 4 * PIECE, sheily_digest=hashlib.sha256(b"x" * 4 * PIECE).hexdigest())

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_lote(SAMPLES)
        await client.descargar_estado()

    with pytest.raises(WorkerError, match="envía a /state más de 3"):
        run(desk(tmp_path, between(worker, lambda scope: large if scope["path"] == "/state" else None)), work)
    assert list((tmp_path / "desk" / "snapshots").iterdir()) == []


def test_an_answer_compressed_again_and_again_is_not_unpacked(tmp_path: Path) -> None:
    """A few bytes could become more than the memory holds; the client asks for none compressed."""
    bomb = answering(200, gzip.compress(gzip.compress(b" " * PIECE)), Content_Encoding="gzip, gzip")
    with pytest.raises(WorkerError, match="comprimida varias veces"):
        run(desk(tmp_path, bomb), lambda client: client.obtener_estado())


def test_another_history_is_noticed(tmp_path: Path) -> None:
    """A worker whose answers to replayed events differ by a byte is refused, and the journal keeps its own."""
    first, second = new_worker(tmp_path / "a"), new_worker(tmp_path / "b", Other)
    run(desk(tmp_path, first), lesson)
    with pytest.raises(WorkerError, match="historias distintas: difieren en el evento 1"):
        run(desk(tmp_path, second), lambda client: client.conectar())
    run(desk(tmp_path, first), lambda client: client.conectar())
    first.close()
    second.close()


def test_a_worker_with_another_past_is_refused(tmp_path: Path) -> None:
    """A worker that applied as many events, but others, is found out before anything is sent to it."""
    apps = [new_worker(tmp_path / "a"), new_worker(tmp_path / "b")]
    seen: list[Scope] = []
    for number, app in enumerate(apps):
        client = desk(tmp_path, app, folder=tmp_path / f"desk{number}")
        run(client, lambda client, number=number: client.entrenar_lote(SAMPLES[number : number + 3]))  # type: ignore[misc]
    front = between(apps[1], lambda _scope: None, seen)
    with pytest.raises(WorkerError, match="historias distintas: difieren en el evento 1 o antes"):
        run(desk(tmp_path, front, folder=tmp_path / "desk0"), lambda client: client.entrenar_lote(SAMPLES))
    assert [(scope["method"], scope["path"]) for scope in seen] == [("GET", "/run")]
    strange = between(apps[0], lambda scope: apps[1] if scope["path"] == "/state" else None)
    with pytest.raises(WorkerError, match="historias distintas"):
        run(desk(tmp_path, strange, folder=tmp_path / "desk0"), lambda client: client.descargar_estado())
    assert not list((tmp_path / "desk0" / "snapshots").iterdir())
    for app in apps:
        app.close()


def test_a_worker_that_is_ahead_of_the_journal_is_refused(tmp_path: Path, worker: WorkerApp) -> None:
    """An older copy of the journal, or an empty one, cannot go on with a worker that knows more."""
    run(desk(tmp_path, worker), lambda client: client.entrenar_lote(SAMPLES))
    old = copy_of(tmp_path)
    run(desk(tmp_path, worker), lambda client: client.entrenar_lote(SAMPLES))
    for folder in (old, tmp_path / "empty"):
        with pytest.raises(WorkerError, match="aplicó 2 eventos de «principal» y este diario solo"):
            run(desk(tmp_path, worker, folder=folder), lambda client: client.conectar())


def test_another_kind_of_machine_is_refused(tmp_path: Path) -> None:
    """A run with answers goes on only on the kind of machine that gave them; a run without any goes anywhere."""
    first, second = new_worker(tmp_path / "a"), new_worker(tmp_path / "b", OtherMachine)
    run(desk(tmp_path, second), lambda client: client.conectar())
    run(desk(tmp_path, first), lambda client: client.entrenar_lote(SAMPLES))
    with pytest.raises(WorkerError, match="otra clase de máquina: device cpu → cuda") as raised:
        run(desk(tmp_path, second), lambda client: client.conectar())
    assert "empieza otro entrenamiento" in raised.value.mend
    run(desk(tmp_path, first), lambda client: client.entrenar_lote(SAMPLES))
    first.close()
    second.close()


def test_the_older_of_two_clients_stops(tmp_path: Path, worker: WorkerApp) -> None:
    """When a second client takes a run over, the first one's next event is refused, applied by nobody, and it stops."""

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_lote(SAMPLES)
        async with desk(tmp_path, worker, folder=copy_of(tmp_path)) as other:
            await other.conectar()
            with pytest.raises(RefusedError, match="Otro cliente") as raised:
                await client.entrenar_lote(SAMPLES)
            assert raised.value.code == "fenced"
            await other.entrenar_lote(SAMPLES[:5])
            assert (await other.obtener_estado())["estadisticas"]["total_batches"] == 2

    run(desk(tmp_path, worker), work)


def test_a_clients_own_late_attachment_does_not_stop_it(tmp_path: Path, served: Served) -> None:
    """A request to attach that was given up, and reaches the worker after its repetition, is not another client."""
    faults = ["late"]

    def plan(_number: int, method: str, path: str) -> str:
        return faults.pop() if faults and (method, path) == ("POST", "/run") else "pass"

    async def work(client: ClienteColabAsincrono) -> None:
        await client.conectar()
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as http:
            while (await http.get("/run", headers={"Sheily-Run": "principal"})).json()["owner"] < 2:
                await asyncio.sleep(0.05)
        await lesson(client)

    with FaultProxy(served.port, plan, pause=2.0) as proxy:
        run(desk(tmp_path, proxy.url, settings={"timeout": 0.4}), work)
        assert [(method, path) for method, path, _fault in proxy.seen].count(("POST", "/run")) == 3
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}")


def test_an_event_that_always_fails_ends_the_call_and_can_be_discarded(tmp_path: Path, worker: WorkerApp) -> None:
    """A batch at which the worker breaks each time ends the call after a few replays; a person may discard it."""
    rows = ROWS.copy()
    rows[20, 0] = POISON

    async def work(client: ClienteColabAsincrono) -> None:
        with pytest.raises(WorkerError, match=r"una y otra vez en el evento 3: .*fell off the bus"):
            await client.entrenar_multiples_lotes(rows, 10)
        pending = client.journal.last_seq - client.journal.answered_seq
        assert client.journal.answered_seq == 2
        assert 1 <= pending <= 4  # as many as were on their way when the last replay failed
        with pytest.raises(WorkerError, match="evento 3"):
            await client.conectar()
        assert await client.descartar_pendientes() == pending
        assert await client.descartar_pendientes() == 0
        await client.entrenar_multiples_lotes(SAMPLES[20:], 10)

    run(desk(tmp_path, worker, settings={"resyncs": 3}), work)
    check_applied_once(tmp_path, worker, 6)


def test_what_was_applied_is_not_discarded(tmp_path: Path, worker: WorkerApp) -> None:
    """Discarding leaves an event that the worker has applied, although its answer never came."""
    lost = between(worker, lambda scope: lose(worker) if scope["path"] == "/train_layer2" else None)
    with pytest.raises(UnreachableError):
        run(desk(tmp_path, lost, settings={"retries": 0, "depth": 1}), lambda client: client.entrenar_lote(SAMPLES))
    assert run(desk(tmp_path, worker), lambda client: client.descartar_pendientes()) == 0
    check_applied_once(tmp_path, worker, 1)


def lose(app: Asgi, status: int = 502) -> Asgi:
    """The app, and in place of its answer that of a tunnel."""

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        async def nowhere(_message: Any) -> None:
            pass

        await app(scope, receive, nowhere)
        await answering(status, b"<html>", "text/html")(scope, receive, send)

    return front


def test_a_question_after_a_restart_brings_the_run_back(tmp_path: Path) -> None:
    """A worker started anew in mid-session answers questions about the run once it has been replayed."""
    apps = [new_worker(tmp_path / "a")]
    front = between(answering(500, b""), lambda _scope: apps[-1])

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_multiples_lotes(SAMPLES, 10)
        apps.append(new_worker(tmp_path / "b"))
        assert (await client.obtener_estado())["estadisticas"]["total_batches"] == 6

    run(desk(tmp_path, front), work)
    for app in apps:
        app.close()


# A plain v4.0 worker


def test_a_plain_v4_worker_is_served_without_the_promise(tmp_path: Path, worker: WorkerApp) -> None:
    """Where there are no runs, the client sends JSON, one at a time, and says so; the journal stays empty."""
    records: Records = []
    seen: list[Scope] = []

    async def work(client: ClienteColabAsincrono) -> None:
        status = await client.conectar()
        assert (status["modelo"], client.plain) == ("CortezaCognitivaV4", True)
        answers = await lesson(client)
        assert [entry["seq"] for entry in client.obtener_historial()] == list(range(1, 9))
        assert client.totals.batches == 7
        assert len(answers) == 8
        assert client.journal.last_seq == 0
        with pytest.raises(RefusedError, match="Not Found"):
            await client.predecir(SAMPLES[:2])

    run(desk(tmp_path, between(only_v4(worker), lambda _scope: None, seen), records), work)
    posts = [dict(scope["headers"]) for scope in seen if scope["path"] in ("/train_layer2", "/feedback_dendritas")]
    assert {headers[b"content-type"] for headers in posts} == {b"application/json"}
    assert not any(name.startswith(b"sheily-") for headers in posts for name in headers)
    assert records[0][0] == "plain"


def test_a_plain_v4_worker_is_found_by_the_first_batch_too(tmp_path: Path, worker: WorkerApp) -> None:
    """Without a call of conectar, the first batch finds out, and is trained once."""

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_multiples_lotes(SAMPLES, 30)
        assert (await client.obtener_estado())["estadisticas"]["total_batches"] == 2

    run(desk(tmp_path, only_v4(worker)), work)


def test_an_odd_answer_of_a_plain_worker_is_not_asked_for_twice(tmp_path: Path, worker: WorkerApp) -> None:
    """Where nothing tells a repetition from a new batch, an answer of another shape ends the call at once."""
    seen: list[Scope] = []
    odd = answering(200, answer_like(loss=None))
    front = between(only_v4(worker), lambda scope: odd if scope["path"] == "/train_layer2" else None, seen)
    with pytest.raises(WorkerError, match="falta «loss»"):
        run(desk(tmp_path, front), lambda client: client.entrenar_lote(SAMPLES))
    assert [scope["path"] for scope in seen].count("/train_layer2") == 1


def test_a_run_with_a_journal_does_not_go_on_at_a_plain_worker(tmp_path: Path, worker: WorkerApp) -> None:
    """The promise of a run is never dropped silently."""
    run(desk(tmp_path, worker), lambda client: client.entrenar_lote(SAMPLES))
    with pytest.raises(WorkerError, match=r"v4\.0 sin POST /run"):
        run(desk(tmp_path, only_v4(worker)), lambda client: client.conectar())


def test_another_program_is_no_plain_worker(tmp_path: Path) -> None:
    """What answers 404 to everything, or JSON of its own, is not taken for a v4.0 worker."""
    for program in (
        answering(404, b'{"detail":"Not Found"}'),
        between(answering(200, b'{"hello":1}'), lambda scope: only_404(scope)),
    ):
        with pytest.raises(WorkerError):
            run(desk(tmp_path, program), lambda client: client.conectar())


def only_404(scope: Scope) -> Asgi | None:
    return answering(404, b"{}") if scope["path"] == "/run" else None


# Token, face for code without asyncio, kills


def test_the_token_travels_in_its_header_only(tmp_path: Path) -> None:
    """The token of the address's fragment opens the worker, and is told nowhere else; ngrok's page is asked away."""
    app = new_worker(tmp_path / "worker", token=TOKEN)
    seen: list[Scope] = []
    records: Records = []
    client = ClienteColabAsincrono(
        f"http://127.0.0.1/#token={TOKEN}",
        transport=httpx2.ASGITransport(between(app, lambda _scope: None, seen)),
        folder=tmp_path / "desk",
        record=lambda event, **fields: records.append((event, fields)),
    )
    assert TOKEN not in client.url
    run(client, lambda client: client.entrenar_lote(SAMPLES))
    for scope in seen:
        headers = dict(scope["headers"])
        assert headers[b"authorization"] == f"Bearer {TOKEN}".encode()
        assert headers[b"ngrok-skip-browser-warning"]
        assert TOKEN not in scope["path"] + scope["query_string"].decode()
    assert TOKEN not in repr(records)
    assert TOKEN.encode() not in (tmp_path / "desk" / "journal.sqlite").read_bytes()
    with pytest.raises(RefusedError, match="token") as raised:
        run(desk(tmp_path, app, token="another-token-0123456789"), lambda client: client.conectar())
    assert raised.value.status == 401
    app.close()


@pytest.mark.parametrize(
    "settings", [{"form": "xml"}, {"depth": 0}, {"timeout": 0}, {"retries": -1}, {"pull_after": 0}, {"resyncs": 0}]
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any]) -> None:
    """A setting out of its range is an error at once."""
    with pytest.raises(RequestError):
        ClientSettings(**settings)


def test_the_blocking_client_has_the_same_methods(tmp_path: Path, worker: WorkerApp) -> None:
    """Every public method of the async client is there, and does the same, also where an event loop runs already."""
    names = {name for name in dir(ClienteColabAsincrono) if not name.startswith("_")}
    assert names <= {name for name in dir(ClienteColabEntrenamiento) if not name.startswith("_")}

    def work() -> None:
        client = ClienteColabEntrenamiento(
            "http://127.0.0.1", None, httpx2.ASGITransport(worker), seed=7, folder=tmp_path / "desk"
        )
        with client:
            assert client.conectar()["last_seq"] == 0
            answers = client.entrenar_multiples_lotes(SAMPLES, 10)
            client.enviar_feedback(answers[-1]["dendrites"], validacion=True)
            client.entrenar_lote(SAMPLES[:5], epocas=2)
            assert client.obtener_estado()["status"] == "online"
            assert client.obtener_info()["version"] == "4.0"
            assert client.obtener_metricas()["tendencia"]
            assert client.diagnostico()["status"] == "diagnostico_ok"
            assert len(client.predecir(SAMPLES)["anomaly_prob"]) == 60
            assert len(client.obtener_historial()) == client.journal.last_seq == 8
            assert "Lotes: 7" in client.mostrar_resumen()
            assert not client.plain
            assert client.descargar_estado().is_file()
            with pytest.raises(BusyError):
                Journal(tmp_path / "desk", "principal")
        client.desconectar()
        with pytest.raises(RequestError, match="desconectado"):
            client.entrenar_lote(SAMPLES)

    async def inside_a_loop() -> None:
        work()

    asyncio.run(inside_a_loop())
    check_applied_once(tmp_path, worker)


class Slow(TinyLearner):
    """A network that needs 20 ms a batch: what a test interrupts is not over before the interruption arrives."""

    def __init__(self, seed: int, device: str = "auto") -> None:
        super().__init__(seed, device, seconds=0.02)


@pytest.mark.parametrize("served", [{"factory": Slow}], indirect=True)
def test_ctrl_c_in_the_blocking_client_leaves_a_run_that_goes_on(tmp_path: Path, served: Served) -> None:
    """An interruption while answers are awaited ends the call and closes the journal; the rest is delivered later."""
    code = f"""if True:
        import os, signal, threading
        import numpy as np
        from pathlib import Path
        from sheily_train.colab.client import ClienteColabEntrenamiento
        def record(event, **fields):
            if event == "step" and fields["seq"] == 5:
                os.kill(os.getpid(), signal.SIGINT)
        try:
            with ClienteColabEntrenamiento(
                "http://127.0.0.1:{served.port}", seed=7, folder=Path({str(tmp_path / "desk")!r}), record=record
            ) as client:
                client.entrenar_multiples_lotes(np.ones((4000, 1600)), 10)
        except KeyboardInterrupt:
            print("stopped", threading.active_count())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("stopped 1\n", "")
    with Journal(tmp_path / "desk", "principal") as journal:
        count, answered = journal.last_seq, journal.answered_seq
    assert 5 <= answered < count
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}", count)


def test_a_script_that_never_disconnects_ends(tmp_path: Path, served: Served) -> None:
    """As in the guide's example: a process whose client is still there at its end does not hang."""
    code = f"""if True:
        import numpy as np
        from pathlib import Path
        from sheily_train.colab.client import ClienteColabEntrenamiento
        client = ClienteColabEntrenamiento(
            "http://127.0.0.1:{served.port}", seed=7, folder=Path({str(tmp_path / "desk")!r})
        )
        client.conectar()
        print(len(client.entrenar_multiples_lotes(np.ones((30, 1600)), 10)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
    check_applied_once(tmp_path, f"http://127.0.0.1:{served.port}", 3)


KILLED = """if True:
    import os, signal, sys, threading, time
    import numpy as np
    from pathlib import Path
    from sheily_train.colab import delivery, journal
    from sheily_train.colab.batches import make_batch
    from sheily_train.colab.client import ClienteColabEntrenamiento
    from sheily_train.colab.wire import ClientSettings
    url, folder, point, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    passed = 0
    def reach(name):
        global passed
        passed += name == point
        if passed == count:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(owner, method, name):
        inner = getattr(owner, method)
        def outer(self, *args, **kwargs):
            reach("before_" + name)
            result = inner(self, *args, **kwargs)
            reach("after_" + name)
            return result
        setattr(owner, method, outer)
    around(journal.Journal, "append", "append")
    around(journal.Journal, "answered", "answered")
    around(journal.Journal, "prune", "prune")
    around(delivery.Delivery, "_read_or_write", "commit")
    around(delivery.Delivery, "_write_answers", "answers")
    around(delivery.PulledStates, "_keep", "keep")
    rows = np.random.default_rng(3).normal(size=(200, 1600)).astype(np.float32)
    record = lambda event, **fields: reach(event)
    settings = ClientSettings(pull_after=5, keep_bytes=0)
    with ClienteColabEntrenamiento(url, seed=7, folder=folder, record=record, settings=settings) as client:
        client.conectar()
        while client.journal.last_seq < 20:
            done = client.journal.last_seq
            client.entrenar_multiples_lotes(rows[10 * done :], 10)
"""


@pytest.mark.parametrize(
    "point",
    [
        *("before_append", "after_append", "after_commit", "before_answered", "after_answered", "after_answers"),
        *("step", "wire", "before_keep", "after_keep", "after_prune", "snapshot"),
    ],
)
def test_a_killed_client_goes_on_to_the_same_bits(tmp_path: Path, served: Served, point: str) -> None:
    """After kill -9 at each named point, the same command run again ends with each batch applied once, in order."""
    url, folder = f"http://127.0.0.1:{served.port}", tmp_path / "desk"
    codes = []
    for count in ("6", "1", "-1") if point in ("before_append", "after_answered", "step") else ("1", "-1"):
        command = [sys.executable, "-c", KILLED, url, str(folder), point, count]
        codes.append(subprocess.run(command, timeout=60, check=False).returncode)
    assert codes == [*[-9] * (len(codes) - 1), 0]
    path = run(desk(tmp_path, url), lambda client: client.descargar_estado())
    learner = TinyLearner(7)
    rows = np.random.default_rng(3).normal(size=(200, 1600)).astype(np.float32)
    for seq in range(1, 21):
        learner.train(make_batch(rows[10 * seq - 10 : 10 * seq]), seq)
    assert weights(path) == learner.weight.numpy().tobytes()
    with Journal(folder, "principal") as journal:
        assert (journal.last_seq, journal.answered_seq) == (20, 20)


def test_the_client_loads_no_torch() -> None:
    """The client's side starts without torch, whatever it will do."""
    names = ("answers", "async_client", "client", "delivery", "journal", "pulled", "verdicts", "samples", "wire")
    modules = [f"sheily_train.colab.{name}" for name in names]
    code = f"import sys, {', '.join(modules)}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_cancelled_call_takes_nothing_of_the_next_one(tmp_path: Path, worker: WorkerApp) -> None:
    """A call that is cancelled while a thread asks for its batches waits for that thread: no event of the next call
    is taken by it."""
    taken: list[str] = []
    asked, go_on = threading.Event(), threading.Event()

    def supply(name: str, count: int) -> Callable[[int], list[Draft]]:
        drafts = iter([(Kind.TRAIN, BINARY_FORM, batch_to_binary(SAMPLES[:5]))] * count)

        def give(most: int) -> list[Draft]:
            taken.append(name)
            if name == "first":
                asked.set()
                go_on.wait(5)
            return list(islice(drafts, most))

        return give

    async def work(client: ClienteColabAsincrono) -> None:
        await client.conectar()
        delivery = client._parts()[2]
        first = asyncio.create_task(delivery.run(supply("first", 4)))
        await asyncio.to_thread(asked.wait, 5)
        first.cancel()
        await asyncio.sleep(0.05)
        assert not first.done()
        go_on.set()
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()
        assert len(await delivery.run(supply("second", 3))) == 3

    run(desk(tmp_path, worker), work)
    assert taken[0] == "first"
    assert set(taken[1:]) == {"second"}
    check_applied_once(tmp_path, worker, 7)


def test_cancelling_a_call_leaves_nothing_running(tmp_path: Path, worker: WorkerApp) -> None:
    """A cancelled call ends its requests; the next one delivers what was written down, and goes on."""

    begun, slow = asyncio.Event(), [True]

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        if slow and dict(scope["headers"]).get(b"sheily-seq", b"1") != b"1":
            await asyncio.sleep(30)
        await worker(scope, receive, send)

    async def work(client: ClienteColabAsincrono) -> None:
        task = asyncio.create_task(client.entrenar_multiples_lotes(np.repeat(ROWS, 20, axis=0), 10))
        await begun.wait()
        task.cancel()
        async with asyncio.timeout(1):
            await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert len(asyncio.all_tasks()) == 1
        slow.clear()
        await client.entrenar_lote(SAMPLES)

    client = desk(tmp_path, front)
    client._listener = lambda event, **_fields: begun.set() if event == "step" else None
    run(client, work)
    with Journal(tmp_path / "desk", "principal") as journal:
        count = journal.last_seq
    assert 1 < count < 121
    check_applied_once(tmp_path, worker, count)
