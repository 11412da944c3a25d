"""The worker: OMEGA 21's learner behind HTTP.

    event loop       reads requests, checks them, puts a run's events in order, answers from cards
    learner thread   one; owns every run; a bounded queue stands before it, and 429 is the answer when that is full
    writer thread    one; writes snapshots from copies

Requests that a model must answer go through the queue; ``/health``, ``/status`` and ``/metricas`` never do. Every error
is a JSON object with ``status``, ``error``, ``help`` and ``code``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sheily_train.colab.batches import BINARY_FORM, JSON_FORM, MAX_SAMPLES, VECTOR, Batch, Feedback, make_batch
from sheily_train.colab.docs_page import DOCS_PAGE
from sheily_train.colab.intake import (
    MAX_SEED,
    RunRequest,
    body_form,
    damaged_body,
    read_content,
    read_event,
    read_run_request,
    rebase_chain,
    required_owner,
    required_run,
    sha256_of,
    unknown_form,
    whole_body,
)
from sheily_train.colab.learner_thread import LearnerThread
from sheily_train.colab.openapi import describe_api, describe_operations
from sheily_train.colab.protocol import (
    ANONYMOUS_RUN,
    DIGEST_HEADER,
    PROTOCOL,
    RUN_HEADER,
    SEQ_HEADER,
    Claim,
    Event,
    Kind,
    Ledger,
    check_run_id,
)
from sheily_train.colab.responses import (
    MODEL_NAME,
    MODEL_VERSION,
    describe_network,
    error_answer,
    http_error_answer,
    json_answer,
)
from sheily_train.colab.runs import Capture, Card, Run, Runs, Standing, Statistics, detached_run
from sheily_train.colab.security import Guard
from sheily_train.colab.snapshots import Snapshot, pack_snapshot, unpack_snapshot
from sheily_train.colab.turns import RunTurns
from sheily_train.core.omega.learner import Learner, Prediction
from sheily_train.errors import RefusedError, RequestError, SheilyError
from sheily_train.i18n import _

REPLAYED_HEADER = "Sheily-Replayed"
STATE_PIECE = 1024 * 1024

_worker_log = logging.getLogger("sheily_train.colab.worker")
_Asked = TypeVar("_Asked")


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is set up."""

    state_dir: Path
    """Where its runs' snapshots lie; nothing is written elsewhere."""
    token: str | None = None
    """What clients must show; ``None`` asks for nothing and is for loopback only."""
    seed: int = 0
    """The seed of the run of clients that name none."""
    device: str = "auto"
    """Where the network computes: auto, cpu or cuda."""
    queue: int = 8
    """How many requests may wait for the learner."""
    runs_in_memory: int = 4
    """How many runs may be in memory at once."""
    snapshot_seconds: float = 45.0
    """How old a run's newest snapshot may become while it trains."""
    reorder_seconds: float = 10.0
    """How long an event that came early waits for the one before it."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(
                _("La semilla es {found}; se esperaba de 0 a {limit}.").format(found=self.seed, limit=MAX_SEED)
            )
        if min(self.queue, self.runs_in_memory) < 1:
            raise RequestError(_("La cola y los entrenamientos en memoria son al menos 1."))


class WorkerApp:
    """The ASGI app of a worker. A server closes it by ASGI's lifespan; who calls it otherwise calls :meth:`close`."""

    def __init__(self, settings: WorkerSettings, learner_factory: Callable[[int, str], Learner]) -> None:
        self._worker = OmegaWorker(settings, learner_factory)
        self._app = Guard(_build_api(self._worker), settings.token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        await self._app(scope, receive, send)

    def warm_up(self) -> None:
        """Do once what is slow the first time: libraries, kernels, CUDA's context. Raises what a learner raises."""
        self._worker.warm_up()

    def close(self) -> None:
        """Finish what is queued, save every run and stop. Again: nothing.

        Raises :class:`OSError` when a run could not be saved.
        """
        self._worker.close()


def create_app(settings: WorkerSettings, learner_factory: Callable[[int, str], Learner] = Learner) -> WorkerApp:
    """A worker's ASGI app; it loads no model before the first request that needs one.

    Args:
        settings: how it is set up.
        learner_factory: a fresh learner for a seed and a device.
    """
    return WorkerApp(settings, learner_factory)


class WorkerMeters:
    """What ``GET /metrics`` tells Prometheus."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter("sheily_events", "Events applied", ["kind"], registry=self.registry)
        self.vectors = Counter("sheily_vectors", "Vectors learned from", registry=self.registry)
        self.replayed = Counter("sheily_replayed", "Stored answers given again", registry=self.registry)
        self.refused = Counter("sheily_refused", "Requests refused", ["code"], registry=self.registry)
        self.seconds = Histogram("sheily_event_seconds", "Seconds to apply an event", registry=self.registry)
        self.snapshots = Counter("sheily_snapshots", "Snapshots", ["outcome"], registry=self.registry)
        depth = Gauge("sheily_queue", "Requests that wait for the learner", registry=self.registry)
        depth.set_function(waiting)


class OmegaWorker:
    """What the endpoints share: the runs and their thread, and the cards that answer without them."""

    def __init__(self, settings: WorkerSettings, learner_factory: Callable[[int, str], Learner]) -> None:
        self._settings = settings
        self._factory = learner_factory
        self._boot = secrets.token_hex(8)
        self._started = time.monotonic()
        self._thread = LearnerThread(settings.queue)
        self._writer = ThreadPoolExecutor(1, "sheily-writer")
        self._writing: Future[None] | None = None
        self._runs = Runs(
            settings.state_dir / "runs",
            self._make_learner,
            seed=settings.seed,
            in_memory=settings.runs_in_memory,
            snapshot_seconds=settings.snapshot_seconds,
        )
        self._turns: dict[str, RunTurns] = {}
        self._cards = {card.run: card for card in self._runs.saved_cards()}
        self._latest = next(reversed(self._cards), ANONYMOUS_RUN)
        self._device = _expected_device(settings.device)
        self._parameters: tuple[int, int] | None = None
        self._fingerprint: dict[str, str] | None = None
        self._meters = WorkerMeters(lambda: self._thread.waiting)
        self._closed = False

    def warm_up(self) -> None:
        """Teach a learner that is thrown away one vector, on the learner thread.

        A second thread that computes would have a pool of OpenMP threads of its own; two pools on few cores go to sleep
        between any two steps, which costs a third of the speed.
        """
        batch = make_batch(np.zeros((1, VECTOR), np.float32))
        self._thread.submit(lambda: self._make_learner(0).train(batch, 0)).result()

    def close(self) -> None:
        """Finish what is queued, save every run and stop."""
        if self._closed:
            return
        self._closed = True
        self._thread.close()
        self._writer.shutdown()
        self._runs.close()

    # The endpoints

    async def train(self, request: Request) -> Response:
        """Learn from a batch."""
        return await self._event(request, Kind.TRAIN)

    async def feedback(self, request: Request) -> Response:
        """Learn what came of a batch's dendrite adjustments."""
        return await self._event(request, Kind.FEEDBACK)

    async def predict(self, request: Request) -> Response:
        """Judge vectors without learning; labels are not needed."""
        form, run = body_form(request), self._asked_run(request)
        content = await asyncio.to_thread(read_content, Kind.TRAIN, form, await whole_body(request))
        assert isinstance(content, Batch)  # noqa: S101
        prediction = await self._ask(lambda: run().learner.predict(content.input_data))
        return json_answer({"status": "ok", "anomaly_prob": prediction.anomaly_prob, "threshold": prediction.threshold})

    async def status(self, request: Request) -> Response:
        """What has been learned so far."""
        card = self._card(self._named_run(request))
        machine = {
            "tiempo_transcurrido_seg": time.monotonic() - card.opened,
            "dispositivo": self._device,
            "gpu_memoria_mb": _gpu_megabytes(),
        }
        return json_answer(
            {
                "status": "online",
                "modelo": MODEL_NAME,
                "estadisticas": {**card.summary, **machine},
                "torch_version": str(torch.__version__),
                "cuda_available": torch.cuda.is_available(),
            }
        )

    async def metricas(self, request: Request) -> Response:
        """The latest losses and where they go."""
        return json_answer(self._card(self._named_run(request)).trend)

    async def health(self, _request: Request) -> Response:
        """Whether the worker lives."""
        return json_answer(
            {"alive": True, "timestamp": _now_text(), "uptime_seconds": time.monotonic() - self._started}
        )

    async def info(self, request: Request) -> Response:
        """The network's build."""
        run = self._asked_run(request)
        if self._parameters is None:
            await self._ask(run)
        return json_answer(describe_network(*(self._parameters or (0, 0))))

    async def diagnose(self, request: Request) -> Response:
        """Pass a test vector through the network."""
        run, test_NV = self._asked_run(request), np.zeros((1, VECTOR), np.float32)
        prediction: Prediction = await self._ask(lambda: run().learner.predict(test_NV))
        return json_answer(
            {
                "status": "diagnostico_ok",
                "test_input_shape": list(test_NV.shape),
                "outputs_shapes": {
                    "anomaly": list(prediction.anomaly_prob.shape),
                    "dendrites": list(prediction.dendrites.shape),
                    "coherence": list(prediction.coherence.shape),
                },
                "gpu_info": {"cuda": torch.cuda.is_available(), "device": self._device},
            }
        )

    async def look(self, request: Request) -> Response:
        """Where a run stands; nothing is taken or changed."""
        return json_answer(await self._ask(partial(self._look_now, required_run(request))))

    async def attach(self, request: Request) -> Response:
        """Take a run over, as its new owner; a name that is new begins a run."""
        body, digest = await whole_body(request), request.headers.get(DIGEST_HEADER)
        if digest is not None and sha256_of(body) != digest:
            raise damaged_body()
        asked = read_run_request(body_form(request), body)
        content = await self._ask(partial(self._attach_now, asked))
        turns = self._turns.setdefault(asked.run, RunTurns(0, 0))
        turns.restart(content["last_seq"], content["owner"])
        return json_answer(content)

    async def download(self, request: Request) -> Response:
        """The whole state of a run, as it is right now."""
        name = required_run(request)
        snapshot = await self._ask(lambda: self._runs.get(name).snapshot())
        content, digest = await asyncio.to_thread(_pack_with_digest, snapshot)
        headers = {SEQ_HEADER: str(snapshot.seq), DIGEST_HEADER: digest, "Content-Length": str(len(content))}
        return StreamingResponse(_in_pieces(content), headers=headers, media_type=BINARY_FORM)

    async def upload(self, request: Request) -> Response:
        """Put a state that was downloaded in the place of a run's own."""
        name, owner, digest = required_run(request), required_owner(request), request.headers.get(DIGEST_HEADER)
        chain = rebase_chain(request)
        if body_form(request) != BINARY_FORM:
            raise unknown_form(BINARY_FORM)
        body = await whole_body(request)
        if await asyncio.to_thread(sha256_of, body) != digest:
            raise damaged_body()
        snapshot = await asyncio.to_thread(unpack_snapshot, body)
        ledger, capture = await self._ask(partial(self._replace_now, name, owner, snapshot, chain))
        await asyncio.wrap_future(self._writer.submit(self._write, capture, True))
        self._turns.setdefault(name, RunTurns(0, 0)).restart(snapshot.seq, owner)
        return json_answer({"status": "ok", "last_seq": ledger.last_seq, "chain": ledger.chain})

    async def prometheus(self, _request: Request) -> Response:
        """The worker's meters."""
        return Response(generate_latest(self._meters.registry), media_type=CONTENT_TYPE_LATEST)

    def refuse(self, error: RefusedError) -> Response:
        """The answer that an error becomes."""
        self._meters.refused.labels(error.code).inc()
        return error_answer(error)

    # Events

    async def _event(self, request: Request, kind: Kind) -> Response:
        claim = Claim.from_headers(request.headers)
        form = body_form(request)
        body = await whole_body(request)
        event = Event(claim.seq if claim else 0, kind, claim.time if claim else _now_text(), form, body)
        digest, content = await asyncio.to_thread(read_event, event, claim.digest if claim else None)
        if claim is None:
            answer = await self._ask(partial(self._apply_plain_now, event.time, digest, content))
            return Response(answer, media_type=JSON_FORM)
        if turns := self._turns.get(claim.run):
            await turns.wait(claim, self._settings.reorder_seconds)
        future = self._thread.submit(partial(self._apply_now, claim, content))
        if turns:
            turns.passed(claim)
        try:
            answer, replayed = await asyncio.wrap_future(future)
        except RefusedError:
            if turns:
                turns.fall_back(claim, self._cards[claim.run].last_seq)
            raise
        if turns:
            turns.passed(claim)
        return Response(answer, media_type=JSON_FORM, headers={REPLAYED_HEADER: "1"} if replayed else None)

    async def _ask(self, work: Callable[[], _Asked]) -> _Asked:
        """The result of some work on the learner thread."""
        return await asyncio.wrap_future(self._thread.submit(work))

    def _named_run(self, request: Request) -> str:
        """The run that a request names, or the one that trained last."""
        name = request.headers.get(RUN_HEADER)
        return self._latest if name is None else check_run_id(name)

    def _asked_run(self, request: Request) -> Callable[[], Run]:
        """What gives, on the learner thread, the run that a request is about; one that it names must be attached."""
        return partial(self._runs.get if RUN_HEADER in request.headers else self._runs.saved, self._named_run(request))

    def _card(self, name: str) -> Card:
        if name in self._cards:
            return self._cards[name]
        if name == ANONYMOUS_RUN:
            return Card(name, 0, self._started, Statistics().summary(), Statistics().trend())
        raise detached_run(name)

    # On the learner thread

    def _make_learner(self, seed: int) -> Learner:
        learner = self._factory(seed, self._settings.device)
        self._device = learner.fingerprint.get("device", self._device)
        self._parameters = learner.parameter_counts
        self._fingerprint = learner.fingerprint
        return learner

    def _apply_now(self, claim: Claim, content: Batch | Feedback) -> tuple[bytes, bool]:
        with self._meters.seconds.time():
            answer, replayed = self._runs.apply(claim, content)
        if replayed:
            self._meters.replayed.inc()
        else:
            self._note_event(claim.run, content)
        return answer, replayed

    def _apply_plain_now(self, time_text: str, digest: str, content: Batch | Feedback) -> bytes:
        with self._meters.seconds.time():
            answer = self._runs.apply_plain(time_text, digest, content)
        self._note_event(ANONYMOUS_RUN, content)
        return answer

    def _note_event(self, name: str, content: Batch | Feedback) -> None:
        """What follows an event: its run's card, the meters, a snapshot when one is due."""
        self._publish(self._runs.get(name))
        self._latest = name
        self._meters.events.labels("train" if isinstance(content, Batch) else "feedback").inc()
        self._meters.vectors.inc(len(content) if isinstance(content, Batch) else 0)
        self._save_due()

    def _save_due(self) -> None:
        """Hand the snapshots that are due to the writer; the event that led here stays good if that fails."""
        try:
            if self._writing is None or self._writing.done():
                for capture in self._runs.due():
                    self._writing = self._writer.submit(self._write, capture)
        except Exception:
            self._meters.snapshots.labels("failed").inc()
            _worker_log.exception("a snapshot could not be taken")

    def _look_now(self, name: str) -> dict[str, Any]:
        standing = self._runs.look(name)
        fingerprint = self._fingerprint or self._make_learner(0).fingerprint
        known = standing or Standing(0, 0, 0, "", None)
        return {
            **self._place(name, known, fingerprint),
            "known": standing is not None,
            "state_fingerprint": known.fingerprint or {},
        }

    def _attach_now(self, asked: RunRequest) -> dict[str, Any]:
        try:
            run = self._runs.attach(asked.run, asked.seed, asked.owner, chain=asked.chain, aside=asked.rebase)
        except OSError as error:
            raise _no_storage(error) from error
        self._publish(run)
        return self._place(asked.run, run.ledger, run.learner.fingerprint)

    def _place(self, name: str, run: Standing | Ledger, fingerprint: dict[str, str]) -> dict[str, Any]:
        """What a client is told of a run and of this worker."""
        return {
            "status": "ok",
            "run": name,
            "seed": run.seed,
            "owner": run.owner,
            "last_seq": run.last_seq,
            "chain": run.chain,
            "fingerprint": fingerprint,
            "boot": self._boot,
            "protocol": PROTOCOL,
            "max_samples": MAX_SAMPLES,
            "queue": self._settings.queue,
        }

    def _replace_now(self, name: str, owner: int, snapshot: Snapshot, chain: str) -> tuple[Ledger, Capture]:
        run = self._runs.replace(name, owner, snapshot, chain)
        self._publish(run)
        return run.ledger, self._runs.capture(run)

    def _publish(self, run: Run) -> None:
        self._cards[run.ledger.run] = run.card()

    # On the writer thread

    def _write(self, capture: Capture, must: bool = False) -> None:
        """Write a snapshot; one that cannot be written is noted, unless somebody waits for it."""
        try:
            self._runs.save(capture)
            self._meters.snapshots.labels("saved").inc()
        except OSError as error:
            self._meters.snapshots.labels("failed").inc()
            _worker_log.exception("snapshot of run %s could not be written", capture.run)
            if must:
                raise _no_storage(error) from error


def _no_storage(error: OSError) -> RefusedError:
    return RefusedError(
        _("El trabajador no pudo escribir en su disco: {reason}.").format(reason=error.strerror or error),
        mend=_("Libera espacio en su carpeta de estado."),
        status=503,
        code="storage",
        retry_after=5,
    )


def _pack_with_digest(snapshot: Snapshot) -> tuple[bytes, str]:
    content = pack_snapshot(snapshot)
    return content, sha256_of(content)


async def _in_pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), STATE_PIECE):
        yield content[start : start + STATE_PIECE]


def _now_text() -> str:
    return datetime.now(UTC).isoformat()


def _expected_device(device: str) -> str:
    """The device's name before the first learner tells it."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _gpu_megabytes() -> float:
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


# The API


def _build_api(worker: OmegaWorker) -> FastAPI:
    """The endpoints, without the guard before them."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)  # noqa: S101
        return worker.refuse(error)

    async def by_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        path = request.scope["path"]
        answer = worker.refuse(http_error_answer(error, path))
        methods = [method for method, known, _endpoint in _routes_of(worker) if known == path]
        answer.headers.update({"Allow": ", ".join(methods)} if methods else error.headers or {})
        return answer

    async def explained(_request: Request, error: Exception) -> Response:
        assert isinstance(error, SheilyError)  # noqa: S101
        return worker.refuse(RefusedError(error.message, mend=error.mend, status=500, code="worker"))

    async def unexpected(_request: Request, _error: Exception) -> Response:
        message, mend = _("Fallo inesperado del trabajador."), _("La causa está en su registro.")
        return worker.refuse(RefusedError(message, mend=mend, status=500, code="internal"))

    api = FastAPI(
        title="OMEGA 21",
        version=MODEL_VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={
            RefusedError: refused,
            SheilyError: explained,
            HTTPException: by_framework,
            Exception: unexpected,
        },
    )
    operations = describe_operations()
    for method, path, endpoint in _routes_of(worker):
        description = operations[endpoint.__name__]
        api.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_class=Response,
            operation_id=endpoint.__name__,
            summary=description.pop("summary"),
            responses=description.pop("responses"),
            openapi_extra=description,
        )
    api.add_api_route("/docs", _docs_page, methods=["GET", "HEAD"], include_in_schema=False)
    api.openapi = cache(partial(describe_api, api))  # type: ignore[method-assign]  # nobody may ask for it
    return api


def _routes_of(worker: OmegaWorker) -> list[tuple[str, str, Callable[[Request], Any]]]:
    """Every endpoint: method, path and function."""
    return [
        ("POST", "/train_layer2", worker.train),
        ("POST", "/feedback_dendritas", worker.feedback),
        ("POST", "/predict", worker.predict),
        ("GET", "/status", worker.status),
        ("GET", "/health", worker.health),
        ("GET", "/info", worker.info),
        ("POST", "/diagnostico", worker.diagnose),
        ("GET", "/metricas", worker.metricas),
        ("GET", "/run", worker.look),
        ("POST", "/run", worker.attach),
        ("GET", "/state", worker.download),
        ("PUT", "/state", worker.upload),
        ("GET", "/metrics", worker.prometheus),
    ]


async def _docs_page() -> Response:
    return HTMLResponse(DOCS_PAGE)
