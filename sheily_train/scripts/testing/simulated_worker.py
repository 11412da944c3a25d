"""The product's worker inside a virtual loop: the real app, runs and snapshots; only its two threads are turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from random import Random
from typing import Any

import httpx2
import numpy as np
import torch

from sheily_train.colab import worker as worker_module
from sheily_train.colab.batches import COHERENCE, DENDRITES, Batch, Feedback
from sheily_train.colab.learner_thread import LearnerThread
from sheily_train.colab.protocol import Ledger
from sheily_train.colab.worker import WorkerSettings, create_app
from sheily_train.core.omega.learner import Lesson, Prediction
from sheily_train.scripts.testing.forgetful_disk import Crash, ForgetfulDisk
from sheily_train.scripts.testing.simulated_network import Answered

_STEP_SECONDS = (0.005, 0.05)
_WRITE_SECONDS = (0.0, 0.4)


class SimulatedLearner:
    """A network of eight numbers: each step depends on every bit before it, on the batch, and on its own number.

    Its state also lists the events that made it, which nobody else counts.
    """

    parameter_counts = (8, 8)

    def __init__(self, seed: int, _device: str = "cpu", *, machine: int = 0) -> None:
        self.fingerprint = {"device": "cpu", "torch": f"simulated {machine}"}
        self._weight = torch.from_numpy(np.random.default_rng(seed).standard_normal(8))
        self._applied = torch.zeros(0, dtype=torch.int64)

    @property
    def applied(self) -> list[int]:
        """The events that made this state, in order."""
        return [int(seq) for seq in self._applied]

    def train(self, batch: Batch, step: int) -> Lesson:
        """Learn from a batch."""
        noise = torch.from_numpy(np.random.default_rng(step).standard_normal(8))
        self._take(step, torch.sin(3 * self._weight + float(batch.input_data.sum()) + noise))
        values = self._weight.float().numpy()
        return Lesson(
            loss=float(self._weight.square().mean()),
            anomaly_prob=float(abs(values[0]) / (1 + abs(values[0]))),
            anomalies=int((values > 0).sum()),
            dendrites=np.resize(np.tanh(values), DENDRITES),
            coherence=np.resize(np.tanh(values), COHERENCE),
            objectives={},
            activations=(0.25, 0.5, 1.0),
        )

    def feedback(self, feedback: Feedback, step: int) -> None:
        """Learn from feedback."""
        sign = 1.0 if feedback.validated else -1.0
        self._take(step, self._weight + sign * float(feedback.adjustments.sum()) / step)

    def predict(self, input_data: Any) -> Prediction:
        """Nothing here asks for it."""
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of both tensors."""
        return {"weight": self._weight.clone(), "applied": self._applied.clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take a state."""
        self._weight, self._applied = state["weight"].clone(), state["applied"].clone()

    def _take(self, step: int, weight: torch.Tensor) -> None:
        self._weight = weight
        self._applied = torch.cat([self._applied, torch.tensor([step])])


class SimulatedWorker:
    """One start of a worker on a disk, until its end.

    Args:
        settings: how it is set up; its state folder lies on ``disk``.
        machine: what kind of machine it is.
    """

    def __init__(self, disk: ForgetfulDisk, settings: WorkerSettings, chance: Random, machine: int) -> None:
        self.disk = disk
        self._ended = asyncio.Event()
        disk.on_crash = self._ended.set
        with _without_threads(chance, lambda: not disk.dead):
            learner: Any = partial(SimulatedLearner, machine=machine)
            self._app = create_app(settings, learner)
        self._app._worker._runs._clock = asyncio.get_running_loop().time

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return not self._ended.is_set()

    def ledger(self, run: str) -> Ledger | None:
        """What it knows of a run that is in its memory."""
        found = self._app._worker._runs._open.get(run)
        return found.ledger if found else None

    async def answer(self, request: httpx2.Request) -> Answered:
        """What it answers; a worker that dies meanwhile answers nothing."""
        if not self.alive:
            raise httpx2.ConnectError("no worker")
        asking = asyncio.create_task(self._ask(request))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({asking, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not self.alive:
                raise httpx2.ReadError("the worker died")
            return asking.result()
        finally:
            ended.cancel()
            asking.cancel()
            await asyncio.gather(asking, ended, return_exceptions=True)

    def stop(self) -> None:
        """End it in good order, as a signal does."""
        with contextlib.suppress(Crash, OSError):
            self._app.close()
        self.disk.crash(power=False)

    async def _ask(self, request: httpx2.Request) -> Answered:
        try:
            response = await httpx2.ASGITransport(self._app).handle_async_request(request)
            return Answered(response.status_code, response.headers.raw, await response.aread())
        except Crash:
            raise httpx2.ReadError("the worker died") from None


class _LearnerTurns(LearnerThread):
    """The learner thread's queue, worked off one job at a time by the loop."""

    def __init__(self, size: int, chance: Random, alive: Callable[[], bool]) -> None:
        super().__init__(size)
        self._thread = self  # type: ignore[assignment]
        self._chance, self._alive = chance, alive
        self.ident = None  # every submit starts the thread, which does one job

    def start(self) -> None:
        """Do the next job a little later."""
        asyncio.get_running_loop().call_later(self._chance.uniform(*_STEP_SECONDS), self._one_job)

    def close(self) -> None:
        """Do what is queued."""
        self._closed = True
        while self.waiting and self._alive():  # the dead do nothing more
            self._one_job()

    def _one_job(self) -> None:
        if self.waiting and self._alive():
            job = self._jobs.get_nowait()
            assert job is not None  # noqa: S101
            job()


class _WriterTurns:
    """The writer's executor, worked off by the loop."""

    def __init__(self, chance: Random, alive: Callable[[], bool]) -> None:
        self._chance, self._alive = chance, alive
        self._jobs: list[Callable[[], None]] = []

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def job() -> None:
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.append(job)
        asyncio.get_running_loop().call_later(self._chance.uniform(*_WRITE_SECONDS), self._one_job)
        return future

    def shutdown(self) -> None:
        while self._jobs and self._alive():
            self._one_job()

    def _one_job(self) -> None:
        if self._jobs and self._alive():
            self._jobs.pop(0)()


@contextlib.contextmanager
def _without_threads(chance: Random, alive: Callable[[], bool]) -> Iterator[None]:
    """While a worker is built, its threads are turns of the loop."""
    threads: Any = worker_module
    learner_thread, executor = threads.LearnerThread, threads.ThreadPoolExecutor
    threads.LearnerThread = lambda size: _LearnerTurns(size, chance, alive)
    threads.ThreadPoolExecutor = lambda _count, _name: _WriterTurns(chance, alive)
    try:
        yield
    finally:
        threads.LearnerThread, threads.ThreadPoolExecutor = learner_thread, executor
