"""The processes of a run: a worker and a client, each the product's own, each killed at any moment.

Both are told what to do, and tell what they did, over a pipe; when its other end is gone, so are they.

    to a worker    ("arm", point, count)  ("jump", seconds)
    to a client    ("arm", point, count)  ("jump", seconds)  ("credit", event)
    from a worker  ("ready", port)  ("stopped",)
    from a client  ("idle", last event)  ("told", event)  ("ended", exit code, code, text)
"""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson
import torch

from sheily_train.colab import async_client, serve
from sheily_train.colab.client import ClienteColabEntrenamiento
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import Kind
from sheily_train.colab.wire import ClientSettings
from sheily_train.colab.worker import WorkerSettings, create_app
from sheily_train.errors import RefusedError, SheilyError
from sheily_train.scripts.testing.counted_learner import CountedLearner, narrow_the_network
from sheily_train.scripts.testing.kill_points import KillPoints
from sheily_train.scripts.testing.workload import SEED, Workload

RUN = "faults"
TOKEN = "a-token-of-the-fault-campaign-0123"  # noqa: S105
_QUICK: dict[str, Any] = {
    **{"timeout": 0.8, "transfer_timeout": 3.0, "wait_initial": 0.02, "wait_max": 0.1, "wait_jitter": 0.02}
}
_START = datetime(2026, 1, 1, tzinfo=UTC)
_PORT = re.compile(r"http://127\.0\.0\.1:(\d+)")

Prepare = Callable[[], None]
"""What a process does to itself before anything else."""


@dataclass(frozen=True)
class WorkerPart:
    """What a worker is started with."""

    folder: Path
    log: Path
    full_size: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    armed: tuple[str, int] = ("", 0)
    prepare: Prepare | None = None


@dataclass(frozen=True)
class ClientPart:
    """What a client is started with.

    Attributes:
        told: the last event that was told to the person at this desk before.
        credit: the event up to which it may go at first.
        jump: how many seconds the clock is wrong.
    """

    url: str
    folder: Path
    log: Path
    workload: Workload
    settings: dict[str, Any] = field(default_factory=dict)
    armed: tuple[str, int] = ("", 0)
    told: int = 0
    credit: int = 0
    jump: float = 0.0


def be_worker(part: WorkerPart, pipe: Connection) -> None:
    """Serve until the end."""
    _write_to(part.log)
    torch.set_num_threads(1)
    if not part.full_size:
        narrow_the_network()
    if part.prepare is not None:
        part.prepare()
    points, clock = KillPoints(), _Clock(0.0)
    points.in_worker()
    points.arm(*part.armed)
    time.time = clock.seconds
    vars(serve)["create_app"] = partial(create_app, learner_factory=CountedLearner)
    _listen(pipe, {"arm": points.arm, "jump": clock.jump})

    def notify(text: str) -> None:
        if found := _PORT.search(text):
            pipe.send(("ready", int(found[1])))

    settings = WorkerSettings(part.folder, TOKEN, device="cpu", **part.settings)
    serve.serve(settings, port=0, notify=notify)
    pipe.send(("stopped",))


def be_client(part: ClientPart, pipe: Connection) -> None:
    """Do what the command does: go on with the run until all its events are answered."""
    _write_to(part.log)
    points, clock, credit = KillPoints(), _Clock(part.jump), _Credit(part.credit)
    points.in_client()
    points.arm(*part.armed)
    time.time = clock.seconds
    vars(async_client)["Journal"] = partial(Journal, clock=clock.now)
    _listen(pipe, {"arm": points.arm, "jump": clock.jump, "credit": credit.raise_to})
    desk = _Desk(part, pipe, points)
    try:
        desk.work(credit)
        pipe.send(("ended", 0, "", ""))
    except SheilyError as error:
        code = error.code if isinstance(error, RefusedError) else type(error).__name__
        pipe.send(("ended", error.exit_code, code, str(error)))
    except BaseException:
        pipe.send(("ended", 70, "defect", traceback.format_exc()))


class _Desk:
    """A session of the run."""

    def __init__(self, part: ClientPart, pipe: Connection, points: KillPoints) -> None:
        self._part, self._pipe, self._points = part, pipe, points

    def work(self, credit: _Credit) -> None:
        """Deliver what waits, then what is new."""
        part = self._part
        settings = ClientSettings(**_QUICK, form=part.workload.form, **part.settings)
        with ClienteColabEntrenamiento(
            part.url, TOKEN, run=RUN, seed=SEED, folder=part.folder, record=self._record, settings=settings
        ) as client:
            for seq, _kind, _answer in client.journal.answers(after=part.told):  # a kill left it untold
                self._tell(seq)
            client.conectar()
            while (done := client.journal.last_seq) < part.workload.events:
                self._go_on(client, done + 1, credit.beyond(done, self._pipe))

    def _go_on(self, client: ClienteColabEntrenamiento, first: int, last: int) -> None:
        """Send the next events: batches up to the next feedback, or that feedback."""
        workload = self._part.workload
        if workload.kind(first) is Kind.FEEDBACK:
            answers = client.journal.answers(after=max(0, first - 4))
            adjustments, validated = workload.feedback(
                [orjson.loads(body) for _s, kind, body in answers if kind == "train"]
            )
            client.enviar_feedback(adjustments, validated)
            return
        last = workload.train_until(first, last)
        client.entrenar_multiples_lotes(workload.batches(first, last), workload.size, workload.epochs)

    def _record(self, event: str, **fields: Any) -> None:
        if event in ("step", "feedback"):
            self._tell(fields["seq"])

    def _tell(self, seq: int) -> None:
        self._points.reach("before tell")
        self._pipe.send(("told", seq))
        self._points.reach("after tell")


class _Credit:
    """The event up to which a client may go."""

    def __init__(self, seq: int) -> None:
        self._seq = seq
        self._raised = threading.Condition()

    def raise_to(self, seq: int) -> None:
        """Let it go further."""
        with self._raised:
            self._seq = seq
            self._raised.notify()

    def beyond(self, done: int, pipe: Connection) -> int:
        """Wait until it may go further than ``done``; says so when it has to."""
        with self._raised:
            if self._seq <= done:
                pipe.send(("idle", done))
            self._raised.wait_for(lambda: self._seq > done)
            return self._seq


class _Clock:
    """A wall clock that can jump. The journal's stands still otherwise, so that a run's times are always the same."""

    def __init__(self, wrong: float) -> None:
        self._wrong, self._true_seconds = wrong, time.time

    def jump(self, seconds: float) -> None:
        """Be so wrong from now on."""
        self._wrong = seconds

    def now(self) -> datetime:
        """The journal's time."""
        return _START + timedelta(seconds=self._wrong)

    def seconds(self) -> float:
        """The process's time."""
        return self._true_seconds() + self._wrong


def _listen(pipe: Connection, orders: dict[str, Callable[..., None]]) -> None:
    def listen() -> None:
        try:
            while True:
                name, *values = pipe.recv()
                orders[name](*values)
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


def _write_to(log: Path) -> None:
    """Let all that this process writes by itself go to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
