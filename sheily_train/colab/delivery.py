"""How the events of a journal reach a worker: each applied once, in order, several on their way at a time.

The journal says what the run is; the worker says how far it is. :meth:`Delivery.run` attaches to the worker, and sends
whatever that worker lacks, from the journal, before anything new. An answer that the journal has already must come back
byte for byte. So after a kill, on either side, at any moment, the same call simply goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from sheily_train.colab.answers import PATHS, event_record
from sheily_train.colab.attachment import Attachment
from sheily_train.colab.journal import Entry, Journal
from sheily_train.colab.protocol import Claim, Kind
from sheily_train.colab.pulled import PulledStates, another_history
from sheily_train.colab.threads import in_thread
from sheily_train.colab.verdicts import Hiccup, foreign
from sheily_train.colab.wire import ClientSettings, Record, Wire
from sheily_train.errors import OutOfStep, RefusedError, WorkerError
from sheily_train.i18n import _

Draft = tuple[Kind, str, bytes]
"""An event before it has a number: its kind, form and body."""
Supply = Callable[[int], list[Draft]]
"""Gives up to so many next events; none when there are no more. It is called in a thread of its own."""

_WITHDRAWN = {"invalid", "too_large", "form", "encoding"}


@dataclass(frozen=True)
class _Sent:
    """An event on its way."""

    entry: Entry
    task: asyncio.Task[bytes]
    since: float
    queue: int


class Delivery:
    """The delivery of one run's events to one worker. One call of :meth:`run` at a time."""

    def __init__(
        self, wire: Wire, journal: Journal, states: PulledStates, settings: ClientSettings, record: Record
    ) -> None:
        self._wire, self._journal, self._states = wire, journal, states
        self._settings, self._record = settings, record
        self._attachment = Attachment(wire, journal, states, settings, record)
        self._rebase = False
        self.worker: dict[str, Any] | None = None
        self._settled = 0
        self._ready: dict[int, Entry] = {}
        self._tries: Counter[int] = Counter()
        self._answers: dict[int, dict[str, Any]] = {}
        self._supply: Supply = _nothing
        self._moves = self._resyncs = 0

    async def run(self, supply: Supply | None = None, *, rebase: bool = False) -> list[dict[str, Any]]:
        """Deliver what waits in the journal, then what ``supply`` gives; returns the answers to the latter.

        With ``rebase`` the run may go back, and on with the numbers of another kind of machine.

        Raises :class:`UnreachableError`, :class:`WorkerError`, :class:`RefusedError`, and :class:`NoRuns` for a worker
        that knows no runs.
        """
        self._supply, self._answers, self._rebase = supply or _nothing, {}, rebase
        first = self._journal.last_seq + 1
        try:
            while not await self._wire.retried(self._pass):
                pass
        except RefusedError as refusal:
            await self._take_back(refusal)
            raise
        return [self._answers[seq] for seq in sorted(self._answers) if seq >= first]

    def detach(self) -> None:
        """Ask the worker where it is before anything else."""
        self.worker = None

    async def attach(self) -> int:
        """Become the run's owner at the worker, and find out what it lacks; returns the last event that it has."""
        breaks = self._journal.breaks
        try:
            worker, reached = await self._attachment.attach(rebase=self._rebase)
        finally:
            if self._journal.breaks is not breaks:
                self._ready.clear()  # the chain has changed
        self._settled = min(reached, self._journal.answered_seq)
        if self._settled < self._journal.last_seq:
            self._record("resync", from_seq=self._settled + 1, to_seq=self._journal.last_seq)
        self.worker = worker
        return reached

    # Sending

    async def _pass(self) -> bool:
        """Go as far as it goes: whether all is done, or only a part before a hiccup. No step at all is a hiccup."""
        before = self._moves
        try:
            if self.worker is None:
                await self.attach()
            await self._pump()
            return True
        except OutOfStep as step:
            hiccup = self._out_of_step(step)
        except RefusedError as refusal:
            if refusal.code != "fenced" or not self._attachment.ghosts:
                raise
            self._attachment.ghosts -= 1
            hiccup = self._out_of_step(OutOfStep("ghost", refusal.message))
        except Hiccup as found:
            hiccup = found
        if self._moves == before and hiccup.reason != "detached":  # a worker that asks to be attached to is there
            raise hiccup
        await self._wire.note(hiccup, 1, 0.0)
        return False

    async def _pump(self) -> None:
        """Keep the wire busy until nothing is left to send."""
        flight: deque[_Sent] = deque()
        assert self.worker is not None  # noqa: S101
        depth = max(1, min(self._settings.depth, self.worker["queue"]))
        try:
            cursor = self._settled
            while True:
                while len(flight) < depth and not (flight and flight[0].task.done()):
                    entry = await self._next(cursor + 1, depth)
                    if entry is None:
                        break
                    cursor = entry.event.seq
                    task = asyncio.create_task(self._send(entry))
                    flight.append(_Sent(entry, task, time.monotonic(), len(flight)))
                if not flight:
                    return
                await flight[0].task
                arrived = [flight.popleft()]
                while flight and flight[0].task.done() and not flight[0].task.exception():
                    arrived.append(flight.popleft())
                await self._settle(arrived)
        finally:
            for sent in flight:
                sent.task.cancel()
            await asyncio.gather(*(sent.task for sent in flight), return_exceptions=True)

    async def _next(self, seq: int, count: int) -> Entry | None:
        """The event to send next: from the journal or, at its end, from the supply, by way of the journal."""
        if seq not in self._ready:
            self._ready.update(await in_thread(self._read_or_write, seq, count))
        return self._ready.get(seq)

    def _read_or_write(self, seq: int, count: int) -> dict[int, Entry]:
        if seq <= self._journal.last_seq:
            return {seq: self._journal.entry(seq)}
        drafts = self._supply(count)
        with self._journal.group():
            entries = [self._journal.append(*draft) for draft in drafts]
        return {entry.event.seq: entry for entry in entries}

    async def _send(self, entry: Entry) -> bytes:
        assert self.worker is not None  # noqa: S101
        event, path = entry.event, PATHS[entry.event.kind]
        self._tries[event.seq] += 1
        claim = Claim(
            self._journal.run, event.seq, self.worker["owner"], event.time, entry.digest, entry.chain
        ).headers()
        answer = await self._wire.ask("POST", path, content=event.body, form=event.form, headers=claim)
        if answer.content["timestamp"] != event.time:
            raise foreign(
                _(
                    "La respuesta al evento {seq} tiene forma de un OMEGA 21 v4.0, pero no es de ese evento: "
                    "contestó otro trabajador."
                ).format(seq=event.seq)
            )
        return answer.body

    async def _settle(self, arrived: list[_Sent]) -> None:
        """Write the answers down, then tell of them, in order."""
        bodies = [(sent.entry, sent.task.result()) for sent in arrived]
        await in_thread(self._write_answers, bodies)
        for sent, (entry, body) in zip(arrived, bodies, strict=True):
            seq = entry.event.seq
            self._settled = seq
            self._moves += 1
            self._ready.pop(seq, None)
            attempts = self._tries.pop(seq)
            if entry.answer is not None:
                continue
            self._resyncs = 0
            self._answers[seq] = content = orjson.loads(body)
            name, fields = event_record(seq, entry.event.kind, content)
            self._record(name, **fields)
            seconds = round(time.monotonic() - sent.since, 6)
            size = len(entry.event.body)
            self._record("wire", seq=seq, seconds=seconds, attempts=attempts, bytes=size, queue=sent.queue)
        self._states.pull_when_due(self._settled)

    def _write_answers(self, bodies: list[tuple[Entry, bytes]]) -> None:
        with self._journal.group():
            for entry, body in bodies:
                if entry.answer is None:
                    self._journal.answered(entry.event.seq, body)
                elif entry.answer != body:
                    raise another_history(entry.event.seq)

    def _out_of_step(self, step: OutOfStep) -> Hiccup:
        """What follows when the worker is elsewhere: only an event that came too early needs no new attachment."""
        if step.code != "gap" or step.expected != self._settled + 1:
            self.worker = None
            self._resyncs += 1
        if self._resyncs > self._settings.resyncs:
            raise WorkerError(
                _("El trabajador pierde su estado una y otra vez en el evento {seq}: {reason}").format(
                    seq=self._journal.answered_seq + 1, reason=step.message
                ),
                mend=_("Mira el registro del trabajador. {discard}").format(discard=_how_to_discard()),
            )
        text = f"{step.message} {_how_to_discard()}" if step.code == "restarted" else step.message
        return Hiccup(step.code, text)

    async def _take_back(self, refusal: RefusedError) -> None:
        """Remove from the journal what the worker will never accept, once it is sure that it was not applied."""
        self._ready.clear()
        seq = self._settled + 1
        if refusal.code not in _WITHDRAWN or self.worker is None or seq != self._journal.answered_seq + 1:
            return
        with contextlib.suppress(WorkerError):  # it stays, and is taken back next time
            if await self._wire.retried(self._attach_again) < seq <= self._journal.last_seq:
                await in_thread(self._journal.withdraw, seq)

    async def discard(self) -> int:
        """Remove from the journal the events that have no answer and that the worker has not applied; how many."""
        self._rebase = False
        self._ready.clear()
        reached = await self._wire.retried(self._attach_again)
        return await in_thread(self._withdraw, max(reached, self._journal.answered_seq) + 1)

    async def _attach_again(self) -> int:
        try:
            return await self.attach()
        except OutOfStep as step:
            raise Hiccup(step.code, step.message) from step

    def _withdraw(self, seq: int) -> int:
        count = self._journal.last_seq - seq + 1
        if count:
            self._journal.withdraw(seq)
        return count


def _nothing(_count: int) -> list[Draft]:
    return []


def _how_to_discard() -> str:
    return _(
        "Si la culpa es siempre del mismo lote, la misma orden con --descartar (en Python, descartar_pendientes()) "
        "quita del diario lo que espera."
    )
