from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn

from sheily_train.colab.batches import (
    BINARY_FORM,
    JSON_FORM,
    batch_to_binary,
    batch_to_json,
    feedback_to_binary,
    make_batch,
    make_feedback,
)
from sheily_train.colab.protocol import Claim, Event, Kind, first_chain, next_chain
from sheily_train.colab.snapshots import Snapshot, pack_snapshot, unpack_snapshot
from sheily_train.colab.worker import WorkerApp, WorkerSettings, create_app
from sheily_train.errors import RequestError
from tests.colab.test_snapshots import LIES
from tests.colab.tiny_learner import POISON, TinyLearner

TOKEN = "a-token-of-the-tests-0123456789"
PATHS = {Kind.TRAIN: "/train_layer2", Kind.FEEDBACK: "/feedback_dendritas"}


@dataclass
class Desk:
    """What a client keeps: the next number, the chain, its owner number, and what it sent."""

    http: httpx2.AsyncClient
    run: str = "uno"
    owner: int = 0
    seq: int = 0
    chain: str = field(default_factory=lambda: first_chain("uno", 7))

    async def attach(self) -> dict[str, Any]:
        answer = await self.http.post("/run", json={"run": self.run, "seed": 7, "owner": self.owner})
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        self.owner = content["owner"]
        return content

    def next(self, kind: Kind = Kind.TRAIN, body: bytes | None = None) -> tuple[Claim, Event]:
        self.seq += 1
        if body is None:
            body = batch_body(self.seq) if kind is Kind.TRAIN else feedback_body(self.seq)
        event = Event(self.seq, kind, f"2026-01-31T12:00:00.{self.seq:06d}+00:00", BINARY_FORM, body)
        self.chain = next_chain(self.chain, event.digest())
        return Claim(self.run, self.seq, self.owner, event.time, event.digest(), self.chain), event

    async def send(self, claim: Claim, event: Event, **headers: str) -> httpx2.Response:
        headers = {**claim.headers(), "Content-Type": event.form, **headers}
        return await self.http.post(PATHS[event.kind], content=event.body, headers=headers)

    async def feed(self, count: int) -> list[bytes]:
        answers = []
        for _number in range(count):
            answer = await self.send(*self.next(Kind.FEEDBACK if self.seq % 4 == 3 else Kind.TRAIN))
            assert answer.status_code == 200, answer.text
            answers.append(answer.content)
        return answers

    async def state(self) -> bytes:
        answer = await self.http.get("/state", headers={"Sheily-Run": self.run})
        assert answer.status_code == 200, answer.text
        assert answer.headers["Sheily-Digest"] == hashlib.sha256(answer.content).hexdigest()
        return answer.content


def batch_body(seq: int, first: float = 0.5) -> bytes:
    rows = np.random.default_rng(seq).normal(size=(3, 1600))
    rows[0, 0] = first
    return batch_to_binary(make_batch(rows, [0, 1, 0]))


def feedback_body(seq: int) -> bytes:
    return feedback_to_binary(make_feedback([seq / 100] * 16, seq % 2 == 0))


def plain_sample(label: int | None = 1) -> dict[str, Any]:
    return {"input_data": [0.5] * 1600, "anomaly_label": label}


def tensors_of(state: bytes) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in unpack_snapshot(state).tensors.items()}


@asynccontextmanager
async def calling(app: WorkerApp, token: str | None = TOKEN) -> AsyncIterator[Desk]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    transport = httpx2.ASGITransport(app)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as http:
        yield Desk(http)


@contextmanager
def worker(folder: Path, factory: Callable[[int, str], Any] = TinyLearner, **more: Any) -> Iterator[WorkerApp]:
    app = create_app(WorkerSettings(folder, TOKEN, seed=7, **more), factory)
    try:
        yield app
    finally:
        app.close()


def run_async(folder: Path, work: Callable[[Desk], Awaitable[None]], **more: Any) -> None:
    """Run the work against a worker in process."""

    async def body(app: WorkerApp) -> None:
        async with calling(app) as desk:
            await work(desk)

    with worker(folder, **more) as app:
        asyncio.run(body(app))


def check_error(answer: httpx2.Response, status: int, code: str | None = None) -> dict[str, Any]:
    content: dict[str, Any] = answer.json()
    assert (answer.status_code, content["status"]) == (status, "error"), answer.text
    assert isinstance(content["error"], str)
    assert content["error"]
    assert isinstance(content["help"], str)
    assert code is None or content["code"] == code
    return content


# Exact shapes


def test_plain_v4_clients_get_the_exact_shapes(tmp_path: Path) -> None:
    """The seven endpoints answer a JSON client that knows nothing of runs with the keys of v4.0."""

    async def work(desk: Desk) -> None:
        http = desk.http
        trained = (await http.post("/train_layer2", json={"samples": [plain_sample()] * 3, "epochs": 1})).json()
        assert list(trained) == [
            *("status", "loss", "anomaly_prob", "dendrites", "coherence", "batch_size", "outputs", "capa_info"),
            *("timestamp", "anomalias", "objetivos"),
        ]
        assert (trained["status"], trained["batch_size"]) == ("trained", 3)
        assert (len(trained["dendrites"]), len(trained["coherence"])) == (16, 64)
        assert list(trained["outputs"]) == ["anomaly_prob", "dendrite_adjustments", "coherence_state"]
        assert list(trained["capa_info"]) == ["capa2_activations", "capa3_activations", "capa4_activations"]
        feedback = {"ajustes_aplicados": [0.1] * 16, "validacion": True, "timestamp": "whenever"}
        received = (await http.post("/feedback_dendritas", json=feedback)).json()
        assert list(received) == ["status", "validacion", "timestamp", "estadisticas"]
        assert (received["status"], received["validacion"]) == ("feedback_recibido", True)
        status = (await http.get("/status")).json()
        assert list(status) == ["status", "modelo", "estadisticas", "torch_version", "cuda_available"]
        assert (status["status"], status["modelo"]) == ("online", "CortezaCognitivaV4")
        assert set(status["estadisticas"]) == {
            *("total_muestras", "total_batches", "loss_promedio_global", "loss_promedio_ultimos_100"),
            *("anomalia_media", "tiempo_transcurrido_seg", "dispositivo", "gpu_memoria_mb", "feedback"),
        }
        assert status["estadisticas"]["feedback"] == {"recibido": 1, "exitoso": 1, "tasa_exito": 1.0}
        assert status["estadisticas"]["total_muestras"] == 3
        assert list((await http.get("/health")).json()) == ["alive", "timestamp", "uptime_seconds"]
        info = (await http.get("/info")).json()
        assert list(info) == ["nombre", "version", "arquitectura", "flujo", "protocol"]
        assert info["version"] == "4.0"
        assert list(info["arquitectura"]) == ["capas", "parametros_totales", "parametros_entrenables"]
        assert info["arquitectura"]["parametros_totales"] == 64
        assert list(info["flujo"]) == ["entrada", "procesamiento", "salida"]
        assert list(info["flujo"]["salida"]) == ["anomaly", "dendrites", "coherence"]
        checked = (await http.post("/diagnostico")).json()
        assert checked["status"] == "diagnostico_ok"
        assert checked["test_input_shape"] == [1, 1600]
        assert checked["outputs_shapes"] == {"anomaly": [1], "dendrites": [1, 16], "coherence": [1, 64]}
        assert list(checked["gpu_info"]) == ["cuda", "device"]
        trend = (await http.get("/metricas")).json()
        assert list(trend) == ["ultimos_20_losses", "tendencia", "anomalias_detectadas", "feedback_tasa_exito"]
        assert (trend["anomalias_detectadas"], trend["feedback_tasa_exito"]) == (3, 1.0)

    run_async(tmp_path, work)


def test_info_before_anything_was_trained(tmp_path: Path) -> None:
    """A fresh worker tells its build, its empty figures and its health."""

    async def work(desk: Desk) -> None:
        status = (await desk.http.get("/status")).json()
        assert status["estadisticas"]["total_batches"] == 0
        assert (await desk.http.get("/metricas")).json()["tendencia"] == "estable"
        assert (await desk.http.get("/info")).json()["arquitectura"]["parametros_entrenables"] == 48

    run_async(tmp_path, work)


def test_predict_learns_nothing(tmp_path: Path) -> None:
    """Predicting, in JSON and binary, with labels and without, gives one probability a vector and no change."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(2)
        before = await desk.state()
        samples = {"samples": [plain_sample(), {"input_data": [9.0] * 1600}]}
        content = (await desk.http.post("/predict", json=samples)).json()
        assert list(content) == ["status", "anomaly_prob", "threshold"]
        assert len(content["anomaly_prob"]) == 2
        headers = {"Content-Type": BINARY_FORM, "Sheily-Run": "uno"}
        answer = await desk.http.post("/predict", content=batch_body(1), headers=headers)
        assert len(answer.json()["anomaly_prob"]) == 3
        assert await desk.state() == before

    run_async(tmp_path, work)


def test_attach_tells_what_a_client_needs(tmp_path: Path) -> None:
    """``POST /run`` answers with the run's place, the worker's fingerprint and its limits."""

    async def work(desk: Desk) -> None:
        first = await desk.attach()
        boot = first.pop("boot")
        assert first == {
            "status": "ok",
            "run": "uno",
            "seed": 7,
            "owner": 1,
            "last_seq": 0,
            "chain": first_chain("uno", 7),
            "fingerprint": TinyLearner.fingerprint,
            "protocol": 1,
            "max_samples": 4096,
            "queue": 8,
        }
        await desk.feed(3)
        second = await desk.attach()
        assert (second["last_seq"], second["owner"], second["chain"]) == (3, 2, desk.chain)
        assert second["boot"] == boot

    run_async(tmp_path, work)


def test_a_look_takes_nothing(tmp_path: Path) -> None:
    """``GET /run`` tells where a run stands; owner, state and the client in hand stay as they are."""

    async def work(desk: Desk) -> None:
        async def look(**headers: str) -> httpx2.Response:
            return await desk.http.get("/run", headers={"Sheily-Run": "uno", **headers})

        unknown = (await look()).json()
        assert (unknown["known"], unknown["owner"], unknown["fingerprint"]) == (False, 0, TinyLearner.fingerprint)
        attached = await desk.attach()
        await desk.feed(3)
        seen = (await look()).json()
        assert seen == {
            **attached,
            "last_seq": 3,
            "chain": desk.chain,
            "known": True,
            "state_fingerprint": TinyLearner.fingerprint,
        }
        assert (await look()).json() == seen
        await desk.feed(1)
        check_error(await look(**{"Sheily-Run": "../x"}), 400, "invalid")
        check_error(await desk.http.get("/run"), 400, "invalid")

    run_async(tmp_path, work)


# Applied once


def test_an_event_sent_twice_is_applied_once(tmp_path: Path) -> None:
    """The second answer is byte for byte the first, says so in a header, and the state does not move."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        claim, event = desk.next()
        first = await desk.send(claim, event)
        assert "Sheily-Replayed" not in first.headers
        assert first.json()["timestamp"] == event.time
        before = await desk.state()
        second = await desk.send(claim, event)
        assert second.content == first.content
        assert second.headers["Sheily-Replayed"] == "1"
        assert await desk.state() == before

    run_async(tmp_path, work)


def test_a_duplicate_of_an_event_in_hand_waits_for_its_answer(tmp_path: Path) -> None:
    """Two copies of one event at the same moment get the same answer from one application."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        claim, event = desk.next()
        answers = await asyncio.gather(*(desk.send(claim, event) for _copy in range(4)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert sum("Sheily-Replayed" in answer.headers for answer in answers) == 3

    run_async(tmp_path, work, factory=lambda seed, device: TinyLearner(seed, seconds=0.1))


def test_events_that_overtake_each_other_are_put_in_order(tmp_path: Path) -> None:
    """Eight events sent at once in reverse give the answers and the bits of events sent one by one."""
    states, answers = [], []

    async def in_order(desk: Desk) -> None:
        await desk.attach()
        answers.append(await desk.feed(8))
        states.append(await desk.state())

    async def reversed_order(desk: Desk) -> None:
        await desk.attach()
        made = [desk.next(Kind.FEEDBACK if desk.seq % 4 == 3 else Kind.TRAIN) for _number in range(8)]
        tasks = []
        for pair in reversed(made):
            tasks.append(asyncio.create_task(desk.send(*pair)))
            await asyncio.sleep(0.02)
        answers.append([answer.content for answer in reversed(await asyncio.gather(*tasks))])
        states.append(await desk.state())

    run_async(tmp_path / "a", in_order)
    run_async(tmp_path / "b", reversed_order)
    assert answers[0] == answers[1]
    assert states[0] == states[1]


def test_a_gap_a_conflict_a_fence_and_damage(tmp_path: Path) -> None:
    """Each is refused by its own code, and the state stays."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(2)
        before = await desk.state()
        chain = desk.chain
        claim, event = desk.next()
        check_error(
            await desk.send(claim, Event(3, Kind.TRAIN, event.time, event.form, event.body[:-1])), 400, "damaged"
        )
        check_error(await desk.send(claim, event, **{"Sheily-Time": "2026-01-31T12:00:00Z"}), 400, "damaged")
        check_error(await desk.send(claim, event, **{"Sheily-Chain": "0" * 64}), 422, "conflict")
        started = time.monotonic()
        content = check_error(await desk.send(*desk.next()), 409, "gap")
        assert content["expected"] == 3
        assert 0.2 <= time.monotonic() - started < 2
        started = time.monotonic()
        check_error(await desk.send(claim, event, **{"Sheily-Seq": "90"}), 409, "gap")
        assert time.monotonic() - started < 0.2
        check_error(await desk.send(claim, event, **{"Sheily-Run": "dos"}), 409, "detached")
        check_error(await desk.send(claim, event, **{"Sheily-Seq": "x"}), 400, "invalid")
        check_error(await desk.http.post("/run", json={"run": "uno", "seed": 8, "owner": 1}), 422, "conflict")
        assert await desk.state() == before
        other = Desk(desk.http, seq=2, chain=chain)
        await other.attach()
        check_error(await desk.send(claim, event), 409, "fenced")
        await other.feed(2)

    run_async(tmp_path, work, reorder_seconds=0.3)


def test_a_worker_started_again_tells_what_its_runs_had_learned(tmp_path: Path) -> None:
    """Before any client is back, all that names no run is answered for the run that was saved last; events are not."""

    async def learned(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(3)

    async def told(desk: Desk) -> None:
        status, metrics = (await desk.http.get("/status")).json(), (await desk.http.get("/metricas")).json()
        assert status["estadisticas"]["total_batches"] == len(metrics["ultimos_20_losses"]) == 3
        for answer in (
            await desk.http.get("/info"),
            await desk.http.post("/diagnostico"),
            await desk.http.post("/predict", json={"samples": [plain_sample()]}),
        ):
            assert answer.status_code == 200, answer.text
        desk.owner = 1
        check_error(await desk.send(*desk.next()), 409, "detached")
        newest = max(tmp_path.rglob("state.safetensors"))
        newest.write_bytes(newest.read_bytes()[:9])

    async def nothing_whole(desk: Desk) -> None:
        assert (await desk.http.get("/status")).json()["estadisticas"]["total_batches"] == 0

    for work in (learned, told, nothing_whole):
        run_async(tmp_path, work)


def test_restart_and_replay_give_the_same_bits(tmp_path: Path) -> None:
    """A worker whose process was lost after a snapshot, and one that never had the run, replay to equal states."""
    sent: list[tuple[Claim, Event]] = []
    kept: dict[str, Any] = {}

    async def first(desk: Desk) -> None:
        await desk.attach()
        for number in range(10):
            sent.append(desk.next(Kind.FEEDBACK if number % 4 == 3 else Kind.TRAIN))
        kept["answers"] = [(await desk.send(*pair)).content for pair in sent[:6]]
        kept["middle"] = await desk.state()

    async def second(desk: Desk) -> None:
        check_error(await desk.send(*sent[6]), 409, "detached")
        attached = await desk.attach()
        assert attached["last_seq"] == 6
        again = [await desk.send(_owned(claim, desk.owner), event) for claim, event in sent]
        assert [answer.content for answer in again[:6]] == kept["answers"]
        assert ["Sheily-Replayed" in answer.headers for answer in again] == [True] * 6 + [False] * 4
        kept["end"] = await desk.state()
        kept["late"] = [answer.content for answer in again[6:]]

    async def fresh(desk: Desk) -> None:
        await desk.attach()
        answers = [(await desk.send(_owned(claim, desk.owner), event)).content for claim, event in sent]
        assert answers == kept["answers"] + kept["late"]
        assert tensors_of(await desk.state()) == tensors_of(kept["end"])

    async def uploaded(desk: Desk) -> None:
        await desk.attach()
        digest = hashlib.sha256(kept["middle"]).hexdigest()
        headers = {"Sheily-Run": "uno", "Sheily-Owner": str(desk.owner), "Content-Type": BINARY_FORM}
        answer = await desk.http.put("/state", content=kept["middle"], headers={**headers, "Sheily-Digest": digest})
        assert answer.json() == {"status": "ok", "last_seq": 6, "chain": sent[5][0].chain}
        late = [(await desk.send(_owned(claim, desk.owner), event)).content for claim, event in sent[6:]]
        assert late == kept["late"]
        assert tensors_of(await desk.state()) == tensors_of(kept["end"])

    run_async(tmp_path / "a", first)
    run_async(tmp_path / "a", second)
    run_async(tmp_path / "b", fresh)
    run_async(tmp_path / "c", uploaded)


def _owned(claim: Claim, owner: int) -> Claim:
    return Claim(claim.run, claim.seq, owner, claim.time, claim.digest, claim.chain)


def test_an_upload_is_on_the_disk_when_it_is_answered(tmp_path: Path) -> None:
    """After a good upload and no clean end, a new worker has the state."""

    async def body() -> None:
        with worker(tmp_path / "a") as source:
            async with calling(source) as desk:
                await desk.attach()
                await desk.feed(3)
                state = await desk.state()
        lost = create_app(WorkerSettings(tmp_path / "b", TOKEN), TinyLearner)  # type: ignore[arg-type]
        async with calling(lost) as desk:
            await desk.attach()
            headers = {"Sheily-Run": "uno", "Sheily-Owner": "1", "Content-Type": BINARY_FORM}
            headers["Sheily-Digest"] = hashlib.sha256(state).hexdigest()
            assert (await desk.http.put("/state", content=state, headers=headers)).status_code == 200
        with worker(tmp_path / "b") as again:
            async with calling(again) as desk:
                assert (await desk.attach())["last_seq"] == 3

    asyncio.run(body())


def test_a_poisoned_run_is_replayed(tmp_path: Path) -> None:
    """A failure in mid-change is answered with 503; attached again and replayed the run has the same answers."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        made = [desk.next() for _number in range(2)]
        answers = [(await desk.send(*pair)).content for pair in made]
        poison = Desk(desk.http, owner=desk.owner, seq=desk.seq, chain=desk.chain)
        refused = check_error(await poison.send(*poison.next(body=batch_body(3, POISON))), 503, "restarted")
        assert "fell off the bus" in refused["error"]
        check_error(await desk.send(*desk.next()), 409, "gap")
        assert (await desk.attach())["last_seq"] == 0
        again = [(await desk.send(_owned(claim, desk.owner), event)).content for claim, event in made]
        assert again == answers

    run_async(tmp_path, work, reorder_seconds=0.2)


def test_a_snapshot_is_written_while_it_trains(tmp_path: Path) -> None:
    """When one is due, a snapshot appears without anybody stopping the worker."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(3)
        for _wait in range(500):
            metrics = (await desk.http.get("/metrics")).text
            if 'sheily_snapshots_total{outcome="saved"}' in metrics:
                break
            await asyncio.sleep(0.02)
        assert list(tmp_path.glob("runs/uno/snapshot-*"))
        assert 'sheily_events_total{kind="train"} 3.0' in metrics

    run_async(tmp_path, work, snapshot_seconds=0.0)


def test_a_snapshot_that_cannot_be_taken_does_not_spoil_the_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When memory is short for a copy, the event was applied all the same and is answered."""

    def no_memory(learner: TinyLearner) -> Any:
        raise MemoryError

    async def work(desk: Desk) -> None:
        await desk.attach()
        with monkeypatch.context() as patch:
            patch.setattr(TinyLearner, "state", no_memory)
            await desk.feed(2)
        assert 'sheily_snapshots_total{outcome="failed"}' in (await desk.http.get("/metrics")).text

    run_async(tmp_path, work, snapshot_seconds=0.0)


# Bad input


def bad_requests() -> dict[str, tuple[int, dict[str, Any]]]:
    """Each bad request: the status expected, and what is sent."""
    train, feedback = "/train_layer2", "/feedback_dendritas"
    sample = plain_sample()
    text = json.dumps({"samples": [sample]}).encode()

    def as_json(content: Any, path: str = train) -> dict[str, Any]:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return {"url": path, "content": body, "headers": {"Content-Type": JSON_FORM}}

    def as_binary(body: bytes, path: str = train) -> dict[str, Any]:
        return {"url": path, "content": body, "headers": {"Content-Type": BINARY_FORM}}

    return {
        "wrong length": (400, as_json({"samples": [sample, {"input_data": [0.5] * 1599}]})),
        "NaN": (400, as_json(text.replace(b"0.5", b"NaN", 1))),
        "Infinity": (400, as_json(text.replace(b"0.5", b"-Infinity", 1))),
        "1e999": (400, as_json(text.replace(b"0.5", b"1e999", 1))),
        "label 2": (400, as_json({"samples": [plain_sample(2)]})),
        "label text": (400, as_json({"samples": [{**sample, "anomaly_label": "1"}]})),
        "empty batch": (400, as_json({"samples": []})),
        "100,000 samples": (413, as_json(b'{"samples":[' + b",".join([b"{}"] * 100_000) + b"]}")),
        "deep": (400, as_json(b"[" * 200_000)),
        "no JSON": (400, as_json(b"hello")),
        "no body": (400, as_json(b"")),
        "gzip": (415, {**as_json(b"\x1f\x8b\x08"), "headers": {"Content-Encoding": "gzip"}}),
        "form": (415, {**as_json(text), "headers": {"Content-Type": "text/plain"}}),
        "multipart": (415, {"url": train, "files": {"x": b"y"}}),
        "half a file": (400, as_binary(batch_body(1)[:-1])),
        "no file": (400, as_binary(b"")),
        "huge header": (400, as_binary(b"\xff" * 64)),
        "feedback in the wrong place": (400, as_binary(feedback_body(1))),
        "feedback of 15": (400, as_json({"ajustes_aplicados": [0.1] * 15, "validacion": True}, feedback)),
        "feedback beyond 1": (400, as_json({"ajustes_aplicados": [1.1] * 16, "validacion": True}, feedback)),
        "feedback without verdict": (400, as_json({"ajustes_aplicados": [0.1] * 16}, feedback)),
        "predict wrong length": (400, as_json({"samples": [{"input_data": [1]}]}, "/predict")),
        "predict of no run": (409, {**as_json(text, "/predict"), "headers": {"Sheily-Run": "nobody"}}),
        "run of no run": (400, as_json({}, "/run")),
        "run with a path": (400, as_json({"run": "../../etc"}, "/run")),
        "run with a bad seed": (400, as_json({"run": "dos", "seed": -1}, "/run")),
        "run with a bad owner": (400, as_json({"run": "dos", "owner": "1"}, "/run")),
        "run with true": (400, as_json({"run": "dos", "seed": True}, "/run")),
        "run with a deep seed": (400, as_json(b'{"run": "dos", "seed": ' + b"[" * 1000 + b"]" * 1000 + b"}", "/run")),
        "run with a deep chain": (400, as_json(b'{"run": "dos", "chain": ' + b"[" * 1000 + b"]" * 1000 + b"}", "/run")),
        "run with a bad chain": (400, as_json({"run": "dos", "chain": "0"}, "/run")),
        "run with a bad rebase": (400, as_json({"run": "dos", "rebase": True}, "/run")),
        "run reserved": (422, as_json({"run": "anonimo"}, "/run")),
        "run no JSON": (400, as_json(b"{", "/run")),
        "run as binary": (415, as_binary(b"{}", "/run")),
        "state without run": (400, {"url": "/state", "method": "GET"}),
        "state of no run": (409, {"url": "/state", "method": "GET", "headers": {"Sheily-Run": "nobody"}}),
        "upload without headers": (400, {**as_binary(b"", "/state"), "method": "PUT"}),
        "status of no run": (409, {"url": "/status", "method": "GET", "headers": {"Sheily-Run": "nobody"}}),
        "status of a path": (400, {"url": "/status", "method": "GET", "headers": {"Sheily-Run": "../x"}}),
        "wrong method": (405, {"url": train, "method": "GET"}),
        "wrong method too": (405, {"url": "/status", "method": "DELETE"}),
        "wrong method of two": (405, {"url": "/state", "method": "POST"}),
        "wrong path": (404, {"url": "/nothing"}),
        "wrong token": (401, {**as_json(text), "headers": {"Authorization": "Bearer " + "x" * 30}}),
        "no token": (401, {**as_json(text), "headers": {"Authorization": ""}}),
    }


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    """Every bad request is refused in full words, and afterwards the state has the sha256 it had before."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(3)
        await desk.http.post("/train_layer2", json={"samples": [plain_sample()]})
        before = hashlib.sha256(await desk.state()).hexdigest()
        plain = await desk.http.get("/state", headers={"Sheily-Run": "anonimo"})
        for name, (status, request) in bad_requests().items():
            answer = await desk.http.request(request.pop("method", "POST"), **request)
            content = check_error(answer, status)
            assert content["code"], name
            if name == "wrong length":
                assert content["error"] == "Se esperaban 1600, llegaron 1599, muestra 1."
            if status == 405:
                assert (
                    answer.headers["allow"]
                    == {"/train_layer2": "POST", "/status": "GET", "/state": "GET, PUT"}[request["url"]]
                )
        assert hashlib.sha256(await desk.state()).hexdigest() == before
        after = await desk.http.get("/state", headers={"Sheily-Run": "anonimo"})
        assert after.content == plain.content

    run_async(tmp_path, work)


def test_bad_events_of_a_run_change_nothing(tmp_path: Path) -> None:
    """An event with good headers and a bad body is refused, and the next good one still has its number."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(1)
        before = await desk.state()
        lost = Desk(desk.http, owner=desk.owner, seq=desk.seq, chain=desk.chain)
        check_error(await lost.send(*lost.next(body=b"rubbish")), 400, "invalid")
        assert await desk.state() == before
        await desk.feed(1)

    run_async(tmp_path, work)


HOSTILE_FACTS = [
    ("ledger", "last_seq", 4),
    ("ledger", "last_seq", -3),
    ("ledger", "owner", -1),
    ("ledger", "owner", 2**63),
    ("ledger", "run", "../../x"),
    ("ledger", "answers", {"x": ["a", "b"]}),
    ("ledger", "answers", []),
    ("ledger", "more", 1),
    ("statistics", "samples", 2**64 - 1),
    ("statistics", "feedback", -1),
    ("statistics", "batches", True),
    ("statistics", "losses", [None]),
    ("statistics", "losses", "x"),
]
"""What a state may say of its run that no run can be: part, name, value."""


def test_a_bad_upload_changes_nothing(tmp_path: Path) -> None:
    """A damaged, foreign, fenced or meaningless upload is refused by its code."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(3)
        state = await desk.state()

        async def put(body: bytes, owner: int = 1, run: str = "uno", digest: str | None = None) -> httpx2.Response:
            headers = {"Sheily-Run": run, "Sheily-Owner": str(owner), "Content-Type": BINARY_FORM}
            headers["Sheily-Digest"] = digest or hashlib.sha256(body).hexdigest()
            return await desk.http.put("/state", content=body, headers=headers)

        check_error(await put(state, digest="0" * 64), 400, "damaged")
        check_error(await put(state[:-1]), 400, "invalid")
        check_error(await put(batch_body(1)), 400, "invalid")
        check_error(await put(state, owner=2), 409, "fenced")
        check_error(await put(state, run="dos"), 409, "detached")
        await desk.http.post("/run", json={"run": "dos", "seed": 7, "owner": 0})
        check_error(await put(state, run="dos"), 422, "conflict")
        foreign = state.replace(b'\\"device\\":\\"cpu\\"', b'\\"device\\":\\"gpu\\"')
        assert foreign != state
        check_error(await put(foreign), 409, "fingerprint")
        for lie in LIES.values():
            text = lie.replace(b"%s", b'{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}')
            check_error(await put(struct.pack("<Q", len(text)) + text + b"\1\1\1\1"), 400, "invalid")
        for part, name, value in HOSTILE_FACTS:
            facts = json.loads(json.dumps(unpack_snapshot(state).facts))
            facts[part][name] = value
            hostile = pack_snapshot(Snapshot(3, facts, unpack_snapshot(state).tensors))
            check_error(await put(hostile), 400 if name == "run" else 422)
        assert await desk.state() == state

    run_async(tmp_path, work)


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    """Where the state folder cannot be written, attaching is answered with 503 and the advice to make room."""
    (tmp_path / "runs").write_text("in the way")

    async def work(desk: Desk) -> None:
        answer = await desk.http.post("/run", json={"run": "uno", "seed": 7, "owner": 0})
        check_error(answer, 503, "storage")
        assert answer.headers["Retry-After"] == "5"

    run_async(tmp_path, work)


def test_an_explained_failure_keeps_its_words(tmp_path: Path) -> None:
    """A device that is not there is answered with the message and the advice that name it."""

    def absent(seed: int, device: str) -> Any:
        raise RequestError("El dispositivo «cuda» no está disponible.", mend="Usa --device cpu.")

    async def work(desk: Desk) -> None:
        content = check_error(await desk.http.get("/info"), 500, "worker")
        assert content["help"] == "Usa --device cpu."

    run_async(tmp_path, work, factory=absent)


def test_a_defect_is_answered_as_an_error_too(tmp_path: Path) -> None:
    """What nobody expected becomes a 500 in the usual form."""

    def broken(seed: int, device: str) -> Any:
        raise LookupError("no such network")

    async def body(app: WorkerApp) -> None:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            answer = await http.get("/info", headers={"Authorization": f"Bearer {TOKEN}"})
            check_error(answer, 500, "internal")
            assert "no such network" not in answer.text

    with worker(tmp_path, broken) as app:
        asyncio.run(body(app))


# While it trains


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    """Beyond one in hand and two waiting, a request gets 429 with Retry-After; the others are answered."""
    gate = threading.Event()

    def gated(seed: int, device: str) -> TinyLearner:
        learner = TinyLearner(seed)
        learner.gate = gate
        return learner

    async def work(desk: Desk) -> None:
        await desk.attach()
        claims = [desk.next() for _number in range(5)]
        tasks = []
        for pair in claims[:3]:
            tasks.append(asyncio.create_task(desk.send(*pair)))
            await asyncio.sleep(0.1)
        refused = await desk.send(*claims[3])
        check_error(refused, 429, "busy")
        assert refused.headers["Retry-After"] == "1"
        gate.set()
        assert [(await task).status_code for task in tasks] == [200] * 3
        assert (await desk.send(*claims[3])).status_code == 200
        assert (await desk.send(*claims[4])).status_code == 200

    run_async(tmp_path, work, factory=gated, queue=2)


def test_health_and_status_answer_while_it_trains(tmp_path: Path) -> None:
    """While a slow batch is learned, ``/health``, ``/status`` and ``/metricas`` answer within 50 ms."""

    async def work(desk: Desk) -> None:
        await desk.attach()
        await desk.feed(1)
        training = asyncio.create_task(desk.send(*desk.next()))
        await asyncio.sleep(0.1)
        for path in ("/health", "/status", "/metricas") * 3:
            started = time.perf_counter()
            assert (await desk.http.get(path)).status_code == 200
            assert time.perf_counter() - started < 0.05
        assert not training.done()
        assert (await training).status_code == 200

    run_async(tmp_path, work, factory=lambda seed, device: TinyLearner(seed, seconds=0.8))


def test_close_finishes_what_is_queued(tmp_path: Path) -> None:
    """Closing answers what was accepted, saves it, refuses what comes later, and may be called twice."""

    async def body() -> None:
        app = create_app(WorkerSettings(tmp_path, TOKEN), lambda seed, device: TinyLearner(seed, seconds=0.1))  # type: ignore[arg-type,return-value]
        async with calling(app) as desk:
            await desk.attach()
            task = asyncio.create_task(desk.send(*desk.next()))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(app.close)
            app.close()
            assert (await task).status_code == 200
            check_error(await desk.send(*desk.next()), 503, "restarted")
        with worker(tmp_path) as again:
            async with calling(again) as desk:
                assert (await desk.attach())["last_seq"] == 1

    asyncio.run(body())


# The page, the description, the settings


def test_the_page_holds_no_data_and_the_description_needs_the_token(tmp_path: Path) -> None:
    """``/docs`` is the same page for everyone and says what fails in Spanish; ``/openapi.json`` is for the token."""

    async def body(app: WorkerApp) -> None:
        async with calling(app, token=None) as desk:
            page = await desk.http.get("/docs")
            assert page.status_code == 200
            assert "No se pudo cargar Swagger UI" in page.text
            assert "cdn.jsdelivr.net/npm/swagger-ui-dist@5/" in page.text
            assert str(tmp_path) not in page.text
            check_error(await desk.http.get("/openapi.json"), 401, "auth")
            assert (await desk.http.get("/health")).status_code == 200
            check_error(await desk.http.get("/metrics"), 401, "auth")

    with worker(tmp_path) as app:
        asyncio.run(body(app))


def test_the_description_names_every_endpoint_with_its_body_and_answer(tmp_path: Path) -> None:
    """OpenAPI lists the endpoints with both forms of their bodies, a schema for each answer and one for errors."""

    async def work(desk: Desk) -> None:
        content = (await desk.http.get("/openapi.json")).json()
        found = {(method.upper(), path) for path, methods in content["paths"].items() for method in methods}
        assert found == {
            ("POST", "/train_layer2"),
            ("POST", "/feedback_dendritas"),
            ("POST", "/predict"),
            ("GET", "/status"),
            ("GET", "/health"),
            ("GET", "/info"),
            ("POST", "/diagnostico"),
            ("GET", "/metricas"),
            ("GET", "/run"),
            ("POST", "/run"),
            ("GET", "/state"),
            ("PUT", "/state"),
            ("GET", "/metrics"),
        }
        for method, path in found:
            operation = content["paths"][path][method.lower()]
            assert {"200", "400", "401", "413", "429", "500"} <= set(operation["responses"])
            assert all("schema" in body for body in operation["responses"]["200"]["content"].values())
        for path in ("/train_layer2", "/feedback_dendritas", "/predict"):
            body = content["paths"][path]["post"]["requestBody"]["content"]
            assert set(body) == {JSON_FORM, BINARY_FORM}
            assert (await desk.http.post(path, json=body[JSON_FORM]["example"])).status_code == 200
        for path in ("/train_layer2", "/predict"):
            schema = content["paths"][path]["post"]["requestBody"]["content"][JSON_FORM]["schema"]
            labels = schema["properties"]["samples"]["items"]["properties"]["anomaly_label"]["enum"]
            assert labels == [0, 1, -1, None]
            for label in labels:
                sample = {"input_data": [0.5] * 1600, "anomaly_label": label}
                assert (await desk.http.post(path, json={"samples": [sample]})).status_code == 200

    run_async(tmp_path, work)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**63}, {"queue": 0}, {"runs_in_memory": 0}])
def test_settings_are_checked(tmp_path: Path, wrong: dict[str, int]) -> None:
    """Settings that cannot be used are refused at once."""
    with pytest.raises(RequestError):
        WorkerSettings(tmp_path, **wrong)  # type: ignore[arg-type]


def test_two_binary_and_json_forms_teach_the_same(tmp_path: Path) -> None:
    """The same batch in either form gives the same numbers."""

    async def work(desk: Desk) -> None:
        batch = make_batch(np.random.default_rng(3).normal(size=(4, 1600)).astype(np.float32), [0, 1, 0, 1])
        answers = []
        for form, body in ((JSON_FORM, batch_to_json(batch)), (BINARY_FORM, batch_to_binary(batch))):
            run = Desk(desk.http, run=form[-4:], chain=first_chain(form[-4:], 7))
            await run.attach()
            event = Event(1, Kind.TRAIN, "2026-01-31T12:00:00Z", form, body)
            chain = next_chain(run.chain, event.digest())
            answers.append(await run.send(Claim(run.run, 1, run.owner, event.time, event.digest(), chain), event))
        assert answers[0].content == answers[1].content

    run_async(tmp_path, work)


# Over a real socket


def test_over_a_real_socket(tmp_path: Path) -> None:
    """uvicorn in a thread serves it; stopping uvicorn saves the run, and a second start goes on with it."""
    for round_number in (0, 1):
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(WorkerSettings(tmp_path, TOKEN), TinyLearner)  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            asyncio.run(_talk(f"http://127.0.0.1:{listener.getsockname()[1]}", round_number * 4))
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


async def _talk(url: str, expected: int) -> None:
    async with httpx2.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        desk = Desk(http)
        attached = await desk.attach()
        assert attached["last_seq"] == expected
        desk.seq, desk.chain = expected, attached["chain"]
        await desk.feed(4)
        assert unpack_snapshot(await desk.state()).seq == expected + 4
        check_error(await http.get("/nothing"), 404)
        check_error(await http.get("/status", headers={"Authorization": "Bearer wrong"}), 401)
