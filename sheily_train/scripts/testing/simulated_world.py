"""Everything of one simulated history: the events, the machines, the network between them, and the trouble."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson

from sheily_train.colab.batches import BINARY_FORM, Batch, Feedback, batch_to_binary, make_batch, make_feedback
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import Claim, Event, Kind, next_chain
from sheily_train.colab.snapshots import unpack_snapshot
from sheily_train.colab.wire import ClientSettings
from sheily_train.colab.worker import WorkerSettings
from sheily_train.scripts.testing.forgetful_disk import Crash, ForgetfulDisk
from sheily_train.scripts.testing.simulated_desk import ADDRESS, RUN, SEED, TOKEN, Broken, Desk
from sheily_train.scripts.testing.simulated_network import Answered, SimulatedNetwork
from sheily_train.scripts.testing.simulated_worker import SimulatedLearner, SimulatedWorker

QUIET_SECONDS = 900.0
"""Virtual seconds in which a run must end once nothing goes wrong any more."""

_PATIENCE = 5.0
_WIDTH = 1600
_NOW_AND_THEN = {429, 503}
"""What a worker may answer to anybody whom it serves."""

_Trouble = Callable[[], Awaitable[None]]


class World:
    """The history of one seed.

    Args:
        chance: decides everything.
        root: where the disks lie.

    Attributes:
        events: what is to be trained, in order.
        quiet: nothing goes wrong any more.
        troubles: how often what went wrong.
    """

    def __init__(self, chance: random.Random, root: Path) -> None:
        self.chance = chance
        self.events = _plan(chance)
        self.quiet = False
        self.troubles: Counter[str] = Counter()
        self.client_settings = ClientSettings(
            depth=chance.randint(1, 4),
            timeout=_PATIENCE,
            transfer_timeout=3 * _PATIENCE,
            wait_initial=0.2,
            wait_max=2.0,
            wait_jitter=0.5,
            pull_after=chance.randint(3, 8),
            keep_bytes=chance.choice([0, 0, 10**9]),
        )
        self.network = SimulatedNetwork(self._deliver, chance, _PATIENCE)
        self._root = root
        self._folders = 0
        self._clock_shift = timedelta(0)
        self._machine = 0
        self._expected = _quiet_outcome(self.events)
        self._worker: SimulatedWorker | None = None
        self._worker_disk = self._new_disk("worker")
        self._old_disk: ForgetfulDisk | None = None
        self.desks = [Desk(self, "desk", self._new_disk("desk"))]

    # What desks ask

    def new_folder(self, name: str) -> Path:
        """A name for a disk's folder."""
        self._folders += 1
        return self._root / f"{name}-{self._folders}"

    def batches_from(self, done: int) -> list[Batch]:
        """The planned batches after event ``done``, up to the next feedback."""
        found: list[Batch] = []
        for event in self.events[done:]:
            if isinstance(event, Feedback):
                break
            found.append(event)
        return found

    def clock(self) -> datetime:
        """What the desks' clocks show."""
        now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=asyncio.get_running_loop().time())
        return now + self._clock_shift

    def check_outcome(self, name: str, journal: Journal, state: Path) -> None:
        """The state, the events that made it, and every answer are those of a learner that was given the events."""
        learner, answers = self._expected
        tensors = unpack_snapshot(state.read_bytes()).tensors
        applied = [int(seq) for seq in tensors["applied"]]
        if applied != learner.applied:
            raise Broken(f"{name}: applied {applied}, expected 1 to {len(answers)}")
        if tensors["weight"].numpy().tobytes() != learner.state()["weight"].numpy().tobytes():
            raise Broken(f"{name}: other weights")
        if [_essence(orjson.loads(body)) for _seq, _kind, body in journal.answers()] != answers:
            raise Broken(f"{name}: other answers")

    # The history

    async def play(self) -> None:
        """The whole of it; raises :class:`Broken` when the promise is."""
        self._start_worker()
        working = [asyncio.create_task(self.desks[0].work())]
        trouble = asyncio.create_task(self._make_trouble(working))
        end = asyncio.create_task(self._deadline(trouble))
        try:
            while not (trouble.done() and all(task.done() for task in working)):
                for task in (trouble, end, *working):
                    if task.done():
                        await task
                if self._worker is None or not self._worker.alive:
                    await asyncio.sleep(self.chance.uniform(0, 1))
                    self._start_worker()
                await asyncio.sleep(0.05)
            await asyncio.gather(trouble, *working)
        finally:
            end.cancel()
        if not any(desk.done for desk in self.desks):
            raise Broken(f"no desk did the work: {[desk.errors[-1:] for desk in self.desks]}")

    async def _deadline(self, trouble: asyncio.Task[None]) -> None:
        await asyncio.wait([trouble])
        await asyncio.sleep(QUIET_SECONDS)
        raise Broken(f"no end in {QUIET_SECONDS:.0f} quiet seconds: {[desk.errors[-2:] for desk in self.desks]}")

    async def _deliver(self, request: httpx2.Request) -> Answered:
        if self._worker is None:
            raise httpx2.ConnectError("no worker")
        answer = await self._worker.answer(request)
        if answer.status >= 500 and answer.status not in _NOW_AND_THEN:
            raise Broken(f"the worker answered {answer.status}: {answer.body[:300]!r}")
        return answer

    def _start_worker(self) -> None:
        if self._worker_disk.dead:
            self._worker_disk = self._worker_disk.restore(self.new_folder("worker"))
        settings = WorkerSettings(self._worker_disk.root / "state", TOKEN, snapshot_seconds=1.0, reorder_seconds=2.0)
        with contextlib.suppress(Crash):
            self._worker = SimulatedWorker(self._worker_disk, settings, self.chance, self._machine)

    def _new_disk(self, name: str) -> ForgetfulDisk:
        return ForgetfulDisk(self.new_folder(name), self.chance)

    # Trouble

    async def _make_trouble(self, working: list[asyncio.Task[None]]) -> None:
        self.network.fault_share = self.chance.choice([0.0, 0.1, 0.3])
        for _number in range(self.chance.randint(3, 9)):
            await asyncio.sleep(self.chance.expovariate(1.2))
            if all(task.done() for task in working):
                break
            name, act = self.chance.choice(self._choices(working))
            self.troubles[name] += 1
            await act()
        self.network.fault_share = 0.0
        self.quiet = True

    def _choices(self, working: list[asyncio.Task[None]]) -> list[tuple[str, _Trouble]]:
        desk = self.desks[-1]
        return [
            ("worker killed", partial(self._crash, self._worker_disk, power=False)),
            ("worker without power", partial(self._crash, self._worker_disk, power=True)),
            ("worker dies at a sync", partial(self._arm, self._worker_disk)),
            ("worker stopped", self._stop_worker),
            ("worker's folder lost", self._lose_worker),
            ("worker of another kind", self._change_machine),
            ("stale worker", self._stale_worker),
            ("worker's disk full", partial(self._fill, self._worker_disk)),
            ("snapshot damaged", self._damage_snapshot),
            ("desk killed", partial(self._crash, desk.disk, power=False)),
            ("desk without power", partial(self._crash, desk.disk, power=True)),
            ("desk dies at a sync", partial(self._arm, desk.disk)),
            ("desk's disk full", partial(self._fill, desk.disk)),
            ("fetched state damaged", self._damage_state),
            ("clock jumps", self._jump),
            ("second desk", partial(self._second_desk, working)),
            ("event of another history", partial(self._intrude, owner_shift=0, chain="0" * 64)),
            ("event of a former owner", partial(self._intrude, owner_shift=-1, chain=None)),
        ]

    async def _crash(self, disk: ForgetfulDisk, *, power: bool) -> None:
        disk.crash(power=power)

    async def _arm(self, disk: ForgetfulDisk) -> None:
        disk.arm(self.chance.randint(1, 12), self.chance.choice(["before", "after"]), power=self.chance.random() < 0.7)

    async def _fill(self, disk: ForgetfulDisk) -> None:
        disk.full = True
        await asyncio.sleep(self.chance.uniform(0.5, 4))
        disk.full = False

    async def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    async def _lose_worker(self) -> None:
        self._worker_disk.crash(power=False)
        self._worker_disk = self._new_disk("worker")

    async def _change_machine(self) -> None:
        """The next worker computes otherwise; it has the old one's folder, or none."""
        self._machine += 1
        await (self._lose_worker if self.chance.random() < 0.5 else self._stop_worker)()

    async def _stale_worker(self) -> None:
        """What a worker's folder was some time ago comes back; the first time it is only put aside."""
        if self._old_disk is None:
            self._old_disk = self._new_disk("aside")
            shutil.copytree(self._worker_disk.root, self._old_disk.root, dirs_exist_ok=True)
            self._old_disk.settle()
            return
        self._worker_disk.crash(power=False)
        self._worker_disk, self._old_disk = self._old_disk, None

    async def _damage_snapshot(self) -> None:
        """A bit of the worker's newest snapshot flips while it is off."""
        self._worker_disk.crash(power=False)
        self._worker_disk = self._worker_disk.restore(self.new_folder("worker"))
        self._flip(sorted(self._worker_disk.root.rglob("snapshot-*/state.safetensors"))[-1:])

    async def _damage_state(self) -> None:
        """A bit of the newest state that the desk fetched flips while it is off."""
        desk = self.desks[-1]
        desk.disk.crash(power=False)
        desk.disk = desk.disk.restore(self.new_folder("desk"))
        self._flip(sorted(desk.disk.root.rglob("*.safetensors"))[-1:])

    def _flip(self, files: list[Path]) -> None:
        for file in files:
            content = bytearray(file.read_bytes())
            if content:
                content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
                file.write_bytes(content)

    async def _jump(self) -> None:
        self._clock_shift += timedelta(hours=self.chance.uniform(-30, 30))

    async def _second_desk(self, working: list[asyncio.Task[None]]) -> None:
        """A copy of the desk's folder, as it is now, goes on elsewhere; the first desk does not know."""
        first = self.desks[0]
        if first.done or len(self.desks) > 1:
            return
        second = Desk(self, "second desk", self._new_disk("second"))
        first.disk.copy_to(second.disk)
        self.desks.append(second)
        working.append(asyncio.create_task(second.work()))

    async def _intrude(self, *, owner_shift: int, chain: str | None) -> None:
        """Somebody sends the next event, made so that it fits but for one thing; it must be refused."""
        worker = self._worker
        ledger = worker.ledger(RUN) if worker is not None and worker.alive else None
        if ledger is None or ledger.owner + owner_shift < 1:
            return
        body = batch_to_binary(make_batch(np.full((1, _WIDTH), 0.5)))
        event = Event(ledger.last_seq + 1, Kind.TRAIN, self.clock().isoformat(), BINARY_FORM, body)
        chain = chain or next_chain(ledger.chain, event.digest())
        claim = Claim(RUN, event.seq, ledger.owner + owner_shift, event.time, event.digest(), chain)
        headers = {**claim.headers(), "Authorization": f"Bearer {TOKEN}", "Content-Type": event.form}
        request = httpx2.Request("POST", f"{ADDRESS}/train_layer2", headers=headers, content=event.body)
        with contextlib.suppress(httpx2.HTTPError):
            answer = await self._deliver(request)
            if answer.status not in {409, 422, *_NOW_AND_THEN}:
                raise Broken(f"an intruder was answered {answer.status}: {answer.body[:120]!r}")


def _plan(chance: random.Random) -> list[Batch | Feedback]:
    """Batches of one vector, and some feedback."""
    events: list[Batch | Feedback] = []
    for number in range(chance.randint(6, 14)):
        if number % 5 == 4:
            events.append(make_feedback([chance.uniform(-1, 1) for _ in range(16)], chance.random() < 0.5))
        else:
            events.append(make_batch(np.full((1, _WIDTH), chance.uniform(-1, 1), np.float32)))
    return events


def _quiet_outcome(events: list[Batch | Feedback]) -> tuple[SimulatedLearner, list[dict[str, Any]]]:
    """A learner that was simply given the events, and what it answered."""
    learner, answers = SimulatedLearner(SEED), list[dict[str, Any]]()
    for seq, event in enumerate(events, 1):
        if isinstance(event, Feedback):
            learner.feedback(event, seq)
            answers.append({"validacion": event.validated})
        else:
            lesson = learner.train(event, seq)
            answers.append({"loss": lesson.loss, "dendrites": [float(value) for value in lesson.dendrites]})
    return learner, answers


def _essence(answer: dict[str, Any]) -> dict[str, Any]:
    """What of an answer the learner decides."""
    if "loss" not in answer:
        return {"validacion": answer["validacion"]}
    return {"loss": answer["loss"], "dendrites": [float(np.float32(value)) for value in answer["dendrites"]]}
