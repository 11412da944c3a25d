"""One run of the campaign: a worker, a client and a proxy between them, struck stage by stage, judged at the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sheily_train.errors import SheilyError
from sheily_train.i18n import _
from sheily_train.scripts.testing.actors import ClientPart, Prepare, WorkerPart, be_client, be_worker
from sheily_train.scripts.testing.ending import Ending, differences, read_ending, saved_ending
from sheily_train.scripts.testing.fault_proxy import FaultProxy
from sheily_train.scripts.testing.scenario import Scenario

PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "sheily_train.scripts.testing.actors"]
"""What is imported once, before any process is forked."""

PAUSE = 1.1
"""Longer than the client waits for an answer."""

_DEADLINE = 40.0
_MOST_REPEATS = 40
_LOOK = 0.005


class Failure(Exception):
    """What a run did that it must not do."""


@dataclass
class Report:
    """What came of a run.

    Attributes:
        reason: why it failed; empty when it passed.
        faults: how many of each kind were injected.
        repeats: how often the command ended and was given again, by the reason it told.
    """

    seed: int
    workload: str
    reason: str = ""
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)
    ending: Ending | None = None


class Actor:
    """A process, and the pipe to it."""

    def __init__(self, be: Callable[..., None], part: WorkerPart | ClientPart) -> None:
        self.part = part
        self._pipe, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=be, args=(part, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid or 0
        self.doomed = bool(part.armed[0])
        """Whether it is no wonder when it dies."""

    @property
    def alive(self) -> bool:
        """Whether it runs, or is stopped."""
        return self._process.is_alive()

    def heard(self, seconds: float = 0.0) -> list[tuple[Any, ...]]:
        """What it has said since; waits so long for the first word."""
        words: list[tuple[Any, ...]] = []
        with suppress(EOFError, OSError):
            while self._pipe.poll(0.0 if words else seconds):
                words.append(self._pipe.recv())
        return words

    def tell(self, *order: Any) -> None:
        """Give it an order; the dead hear nothing."""
        with suppress(OSError):
            self._pipe.send(order)

    def arm(self, point: str, count: int) -> None:
        """Let it die there."""
        self.doomed = True
        self.tell("arm", point, count)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        self.doomed = True
        self.send(signal.SIGKILL)
        self._process.join()

    def ends(self, seconds: float) -> bool:
        """Whether it has ended after at most so long."""
        self._process.join(seconds)
        return not self.alive


class Drill:
    """A run under faults.

    Args:
        expected: what it must come to; ``None`` for the undisturbed run itself.
        folder: of its own, empty.
        prepare: what each worker process does to itself first.
    """

    def __init__(
        self, scenario: Scenario, expected: Ending | None, folder: Path, prepare: Prepare | None = None
    ) -> None:
        self.scenario, self.folder = scenario, folder
        self.report = Report(scenario.seed, scenario.workload.name)
        self.told: list[int] = []
        self.tolerated = {"UnreachableError", "OutOfStep", "fenced"}
        self.idle_at = -1
        self.credit = 0
        self.jump = 0.0
        self.worker_folder, self.desk = folder / "worker", folder / "desk"
        self._expected, self._prepare = expected, prepare
        self._spoilt: dict[int, str] = {}
        self._requests = 0
        self._actors: list[Actor] = []
        self._worker: Actor | None = None
        self._client: Actor | None = None
        self._ended: tuple[int, str, str] | None = None
        self._ports: set[int] = set()
        self.proxy = FaultProxy(0, self._weather, pause=PAUSE)

    def run(self) -> Report:
        """Strike by strike to the end; never raises."""
        from sheily_train.scripts.testing.strikes import strike

        begun = time.monotonic()
        try:
            with self.proxy:
                for stage in self.scenario.stages:
                    self._spoilt, self._requests = stage.spoilt, 0
                    self.report.faults[strike(self, stage)] += 1
                    if stage.recovers:
                        self.recover(stage.upto)
                self._finish()
        except (Failure, SheilyError) as error:
            self.report.reason = str(error)
        except Exception:
            self.report.reason = _("defecto de la campaña: {error}").format(error=traceback.format_exc())
        finally:
            for actor in self._actors:
                actor.kill()
        if not self.report.reason and (open_ports := [port for port in self._ports if _answers(port)]):
            self.report.reason = _("puertos que siguen abiertos: {ports}").format(ports=open_ports)
        self.report.seconds = time.monotonic() - begun
        return self.report

    # The two sides

    @property
    def worker(self) -> Actor:
        """The worker that the proxy leads to, started when there is none."""
        self._bury()
        if self._worker is None:
            self.start_worker()
        assert self._worker is not None  # noqa: S101
        return self._worker

    @property
    def client(self) -> Actor:
        """The client, started again when there is none."""
        self._bury()
        if self._client is None:
            self.start_client()
        assert self._client is not None  # noqa: S101
        return self._client

    def start_worker(self, *, armed: tuple[str, int] = ("", 0)) -> Actor:
        """Start a worker on the present folder, and let the proxy lead to it."""
        scenario = self.scenario
        part = WorkerPart(
            self.worker_folder,
            self.folder / "worker.log",
            scenario.workload.full_size,
            scenario.worker,
            armed,
            self._prepare,
        )
        self._worker = self._enter(Actor(be_worker, part))
        words = self._worker.heard(_DEADLINE)
        if not words:
            raise Failure(_("el trabajador no arrancó: {log}").format(log=_tail(part.log)))
        self.proxy.port = words[0][1]
        self._ports.add(self.proxy.port)
        return self._worker

    def start_client(self, desk: Path | None = None, *, armed: tuple[str, int] = ("", 0)) -> Actor:
        """Give the command again."""
        if desk is not None:
            self.desk = desk
        self._ended, self.idle_at = None, -1
        self._client = self.another_client(self.desk, armed=armed)
        return self._client

    def another_client(
        self, desk: Path, *, armed: tuple[str, int] = ("", 0), credit: int | None = None, told: int = 0
    ) -> Actor:
        """A client beside the run's own; ``told``: the last event told at its desk, if after those of the run."""
        part = ClientPart(
            self.proxy.url,
            desk,
            self.folder / "client.log",
            self.scenario.workload,
            self.scenario.client,
            armed,
            told=max([told, *self.told]),
            credit=self.credit if credit is None else credit,
            jump=self.jump,
        )
        return self._enter(Actor(be_client, part))

    def calm(self) -> bool:
        """No more requests are spoilt in this stage; whether none of those that were can still have an effect."""
        self._spoilt = {}
        return self.proxy.quiet

    def take_worker(self, worker: Actor, folder: Path, port: int) -> None:
        """Let the proxy lead to another worker that runs."""
        self._worker, self.worker_folder, self.proxy.port = worker, folder, port

    def lose_worker(self) -> None:
        """Kill it."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def lose_client(self) -> None:
        """Kill it; what it said before counts."""
        if self._client is not None:
            self._client.kill()
            self.listen()
            self._client = self._ended = None

    # Time

    def allow(self, seq: int) -> None:
        """Let the client go on up to an event."""
        self.credit = max(self.credit, seq)
        self.client.tell("credit", self.credit)

    def listen(self, seconds: float = 0.0) -> None:
        """Take in what the client says."""
        if self._client is None:
            return
        for word, *values in self._client.heard(seconds):
            if word == "told":
                self.told.append(values[0])
            elif word == "idle":
                self.idle_at = values[0]
            else:
                self._ended = values[0], values[1], values[2]

    def pause(self, seconds: float) -> None:
        """Let some time pass."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
            self.listen()

    def is_at(self, seq: int) -> bool:
        """Whether the client has all answers up to ``seq``."""
        self.listen()
        return self.idle_at >= seq or (self._ended is not None and self._ended[0] == 0)

    def recover(self, seq: int) -> None:
        """Start again what died or ended, until the client has all answers up to ``seq``."""
        deadline = time.monotonic() + _DEADLINE
        while not self.is_at(seq):
            if time.monotonic() > deadline:
                text = _("no se llegó al evento {seq} en {seconds:g} s: {log}")
                raise Failure(text.format(seq=seq, seconds=_DEADLINE, log=_tail(self.folder / "client.log")))
            if self.worker.alive and self.client.alive:
                self.listen(_LOOK)
        self._spoilt = {}

    def may_repeat(self, name: str) -> bool:
        """Whether a command that ended with this error may be given again; counts it."""
        self.report.repeats[name] += 1
        return name in self.tolerated and self.report.repeats.total() <= _MOST_REPEATS

    # Inside

    def _enter(self, actor: Actor) -> Actor:
        self._actors.append(actor)
        return actor

    def _bury(self) -> None:
        """Forget who is dead, after asking why."""
        if self._worker is not None and not self._worker.alive:
            if not self._worker.doomed:
                raise Failure(_("el trabajador se murió solo: {log}").format(log=_tail(self.folder / "worker.log")))
            self._worker = None
        if self._client is not None and not self._client.alive:
            self.listen()
            self._judge_the_end()
            self._client = None

    def _judge_the_end(self) -> None:
        """Whether the command ended as it may; it is then given again."""
        assert self._client is not None  # noqa: S101
        if self._ended is None:
            if not self._client.doomed:
                raise Failure(_("el cliente se murió solo: {log}").format(log=_tail(self.folder / "client.log")))
            return
        code, name, text = self._ended
        if code and not self.may_repeat(name):
            raise Failure(_("el cliente acabó con {code} {name}: {text}").format(code=code, name=name, text=text))

    def _weather(self, _number: int, _method: str, _path: str) -> str:
        fault = self._spoilt.get(self._requests, "pass")
        self._requests += 1
        if fault != "pass":
            self.report.faults[f"wire: {fault}"] += 1
            if fault == "echo":
                self.tolerated.add("WorkerError")
        return fault

    def _finish(self) -> None:
        """No more faults: it ends within its time, and is what it must be."""
        self._spoilt = {}
        events = self.scenario.workload.events
        self.allow(events)
        self.recover(events)
        while not (self.proxy.quiet and self._client is not None and self._client.ends(_DEADLINE)):
            time.sleep(_LOOK)
        self.worker.arm("", 0)
        found = read_ending(f"http://127.0.0.1:{self.proxy.port}", self.desk)
        self.end_worker()
        saved = saved_ending(self.worker_folder / "runs", found.answers)
        self.report.ending = found
        if saved is None or replace(saved, answers=found.answers) != found:
            raise Failure(_("la última copia del trabajador no es su estado"))
        if self.told != list(range(1, events + 1)):
            raise Failure(_("contados: {told}; se esperaba del 1 al {last}").format(told=self.told, last=events))
        if self._expected is not None:
            wrong = differences(found, self._expected, same_clock=self.scenario.keeps_its_clock)
            if reason := "; ".join(wrong):
                raise Failure(reason)

    def end_worker(self) -> None:
        """SIGTERM: it saves and ends in good order."""
        worker = self.worker
        worker.doomed = True
        worker.send(signal.SIGTERM)
        if not worker.ends(_DEADLINE):
            raise Failure(_("el trabajador no acabó con SIGTERM"))
        if ("stopped",) not in worker.heard():
            text = _("el trabajador no acabó en orden: {log}")
            raise Failure(text.format(log=_tail(self.folder / "worker.log")))
        self._worker = None


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-600:] if log.is_file() else "no log"
