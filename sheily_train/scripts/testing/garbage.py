"""A storm of garbage at a real worker: who has no token gets nothing, who has it breaks nothing.

    python -m sheily_train.scripts.testing.garbage --requests 100000 --seed 1

A worker is started as a process of its own, on a free port of the loopback, with an empty state folder and the real
network. A run learns one batch. Then the requests of :mod:`~sheily_train.scripts.testing.garbage_requests` come over
real sockets, several at once, and at the end this must hold:

    nobody without the token got a 2xx, but for ``/health`` and ``/docs``
    nobody with it got a 5xx
    every request that was whole was answered
    the run's state, as ``GET /state`` gives it, is the one before; so are its ``/status`` and ``/metricas``
    the worker's memory did not grow beyond :data:`MEMORY_ALLOWED`
    the worker wrote no traceback, and its token on address lines only
    it saved and ended in good order

Exit code 1 when something does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np
import psutil

from sheily_train.colab.batches import BINARY_FORM, batch_to_binary, make_batch
from sheily_train.colab.protocol import DIGEST_HEADER, OWNER_HEADER, RUN_HEADER, Claim, Event, Kind, next_chain
from sheily_train.colab.snapshots import Snapshot, unpack_snapshot
from sheily_train.i18n import _
from sheily_train.scripts.testing.garbage_requests import Garbage, Shot, Target

RUN, SEED = "principal", 8_675_309
AT_ONCE = 16
MEMORY_ALLOWED = 192 * 1024 * 1024
"""Bytes by which the worker's peak may grow: one body as large as a body may be.

All that garbage can make it hold is the bodies in hand, 2 MB at most here, and what they become when they are read.
Copies of a state, which are larger, are in the peak before already. Whatever piles up with the requests goes beyond it.
"""
_PATIENCE = 60.0
_BRIEF = 0.25
_STATUS = re.compile(rb"(?:^|[\r\n}>])HTTP/1\.1 (\d{3}) ")
_READ_BYTES = 1 << 20


@dataclass
class Storm:
    """What came of the shots.

    Attributes:
        known: statuses of those who showed the token.
        strangers: statuses of those who did not.
        public: statuses of what everybody may read.
        silent: how many connections, left unfinished by us, were closed without an answer.
        wrong: what must not be, as text.
    """

    known: Counter[int] = field(default_factory=Counter)
    strangers: Counter[int] = field(default_factory=Counter)
    public: Counter[int] = field(default_factory=Counter)
    silent: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, shot: Shot, answer: bytes) -> None:
        """Count an answer; keep what must not be."""
        statuses = [int(status) for status in _STATUS.findall(answer)]
        if not statuses and not shot.unfinished:
            self.wrong.append(_("sin respuesta: {shot}").format(shot=_shown(shot)))
        self.silent += not statuses
        counts = self.public if shot.public else self.known if shot.known else self.strangers
        counts.update(statuses)
        for status in statuses:
            let_in = 200 <= status < 300 and not (shot.known or shot.public)
            if let_in or status >= 500:
                self.wrong.append(_("{status}: {shot}").format(status=status, shot=_shown(shot)))


@dataclass(frozen=True)
class Held:
    """What must not change: the run's state and what is said of it."""

    state: str
    said: str


class Worker:
    """A worker that is a process of its own, and what is asked of it as its owner."""

    def __init__(self, folder: Path) -> None:
        words = ["worker", "--port", "0", "--device", "cpu", "--state-dir", str(folder / "state")]
        self.log = folder / "worker.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sheily_train", *words], stdout=log, stderr=subprocess.STDOUT, cwd=folder
            )
        self.peak = 0
        url, _sign, self.token = self._address().partition("#token=")
        self.http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {self.token}"}, timeout=_PATIENCE)

    def stop(self) -> int:
        """Its exit code, once it has saved and ended."""
        self.http.close()
        self.process.terminate()
        return self.process.wait(_PATIENCE)

    def prepare(self) -> tuple[Target, Held]:
        """Bring in three runs, as many as the garbage can name, and put the state of one back in its place.

        Returns what is known of the one to be kept, and what it holds. What takes much memory was done once by then.
        """
        self.http.post("/run", json={"run": "otro"}).raise_for_status()
        body = batch_to_binary(make_batch(np.random.default_rng(0).normal(size=(8, 1600)), [0, 1] * 4))
        self._train(body, {}).raise_for_status()
        place = self.http.post("/run", json={"run": RUN, "seed": SEED}).raise_for_status().json()
        event = Event(1, Kind.TRAIN, "2026-01-31T12:00:00+00:00", BINARY_FORM, body)
        chain = next_chain(place["chain"], event.digest())
        claim = Claim(RUN, 1, place["owner"], event.time, event.digest(), chain)
        self._train(body, claim.headers()).raise_for_status()
        state = self._state()
        headers = {RUN_HEADER: RUN, OWNER_HEADER: str(claim.owner), DIGEST_HEADER: hashlib.sha256(state).hexdigest()}
        self.http.put("/state", content=state, headers={"Content-Type": BINARY_FORM, **headers}).raise_for_status()
        snapshot = unpack_snapshot(state)
        return Target(self.token, claim, event, Snapshot(snapshot.seq, snapshot.facts, {})), self.held(state)

    def held(self, state: bytes | None = None) -> Held:
        """What must not change; ``state`` is what ``GET /state`` has just given, if it was asked."""
        said: list[dict[str, Any]] = []
        for path in ("/status", "/metricas"):
            said.append(self.http.get(path, headers={RUN_HEADER: RUN}).raise_for_status().json())
        for name in ("tiempo_transcurrido_seg", "gpu_memoria_mb"):
            del said[0]["estadisticas"][name]
        return Held(hashlib.sha256(state or self._state()).hexdigest(), json.dumps(said))

    def look_at_memory(self) -> None:
        """Note its peak so far."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.peak = max(self.peak, psutil.Process(self.process.pid).memory_info().rss)

    def complaints(self) -> list[str]:
        """What its output should not hold."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        found = [line for line in text.splitlines() if self.token in line and "#token=" not in line]
        wrong = [_("el token en la salida del trabajador: {line}").format(line=line[:200]) for line in found]
        if "Traceback" in text:
            wrong.append(
                _("el trabajador escribió una traza: {text}").format(text=text[text.index("Traceback") :][:3000])
            )
        return wrong

    def _address(self) -> str:
        while self.process.poll() is None:
            for line in self.log.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.startswith("http") and line.endswith("\n"):
                    return line.strip()
            time.sleep(0.05)
        raise click.ClickException(self.log.read_text(encoding="utf-8"))

    def _train(self, body: bytes, headers: dict[str, str]) -> httpx2.Response:
        return self.http.post("/train_layer2", content=body, headers={"Content-Type": BINARY_FORM, **headers})

    def _state(self) -> bytes:
        return self.http.get("/state", headers={RUN_HEADER: RUN}).raise_for_status().content


@contextlib.contextmanager
def running_worker() -> Iterator[Worker]:
    """A worker in an empty folder, ended at the end whatever happened."""
    with tempfile.TemporaryDirectory(prefix="sheily-garbage-") as folder:
        worker = Worker(Path(folder))
        try:
            yield worker
        finally:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()


async def bombard(worker: Worker, shots: Iterator[Shot]) -> Storm:
    """Send all the shots, :data:`AT_ONCE` at a time."""
    storm = Storm()
    host, port = worker.http.base_url.host, worker.http.base_url.port or 80

    async def gunner() -> None:
        for shot in shots:
            storm.note(shot, await _answer(host, port, shot))

    async def watcher() -> None:
        while True:
            worker.look_at_memory()
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watcher())
    try:
        await asyncio.gather(*(gunner() for _number in range(AT_ONCE)))
    finally:
        watching.cancel()
    return storm


async def _answer(host: str, port: int, shot: Shot) -> bytes:
    """All that comes back; of what was left unfinished, what comes back soon."""
    said = b""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return said
    try:
        async with asyncio.timeout(_BRIEF if shot.unfinished else _PATIENCE):
            writer.write(shot.content)
            await writer.drain()
            while piece := await reader.read(_READ_BYTES):
                said += piece
    except (TimeoutError, OSError):
        pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return said


def campaign(requests: int, seed: int) -> dict[str, Any]:
    """Start a worker, send the garbage, look at what is left; returns the figures, with what was wrong as text."""
    with running_worker() as worker:
        target, before = worker.prepare()
        worker.look_at_memory()
        peak = worker.peak
        began = time.monotonic()
        storm = asyncio.run(bombard(worker, islice(iter(Garbage(seed, target)), requests)))
        seconds = time.monotonic() - began
        wrong = storm.wrong[:]
        if worker.process.poll() is not None:
            wrong.append(_("el trabajador acabó con {code}").format(code=worker.process.poll()))
        else:
            if worker.held() != before:
                wrong.append(_("el estado del entrenamiento cambió"))
            worker.look_at_memory()
            if code := worker.stop():
                wrong.append(_("al pararlo, el trabajador acabó con {code}").format(code=code))
        if worker.peak > peak + MEMORY_ALLOWED:
            wrong.append(_("la memoria creció más de lo admitido"))
        wrong += worker.complaints()
        return {
            "requests": requests,
            "seed": seed,
            "at_once": AT_ONCE,
            "seconds": round(seconds, 1),
            "with_token": dict(sorted(storm.known.items())),
            "without_token": dict(sorted(storm.strangers.items())),
            "public": dict(sorted(storm.public.items())),
            "unfinished_without_answer": storm.silent,
            "peak_rss_mb_before": round(peak / 2**20),
            "peak_rss_mb_after": round(worker.peak / 2**20),
            "state_sha256": before.state,
            "wrong": wrong,
        }


def _shown(shot: Shot) -> str:
    who = _("con token") if shot.known else _("sin token")
    return f"{shot.kind}, {who}: {shot.content[:600]!r}"


def _table(result: dict[str, Any]) -> str:
    """The figures, for the screen."""
    groups = [result[name] for name in ("with_token", "without_token", "public")]
    rows = [_("{:>8} {:>12} {:>12} {:>12}").format(_("estado"), _("con token"), _("sin token"), _("públicas"))]
    for status in sorted({status for group in groups for status in group}):
        rows.append("{:>8} {:>12} {:>12} {:>12}".format(status, *(group.get(status, 0) for group in groups)))
    rows += [
        _("Peticiones: {count} en {seconds:.0f} s; a medias y sin respuesta: {silent}").format(
            count=result["requests"], seconds=result["seconds"], silent=result["unfinished_without_answer"]
        ),
        _("Memoria máxima del trabajador: {before} MB antes, {after} MB después; se admiten {allowed} más").format(
            before=result["peak_rss_mb_before"], after=result["peak_rss_mb_after"], allowed=MEMORY_ALLOWED // 2**20
        ),
        _("Estado del entrenamiento: {digest}").format(digest=result["state_sha256"]),
    ]
    rows += [_("MAL: {text}").format(text=text) for text in result["wrong"][:20]]
    rows.append(_("Mal: {count}").format(count=len(result["wrong"])) if result["wrong"] else _("Todo en orden"))
    return "\n".join(rows)


@click.command(help=_("Lanza peticiones absurdas a un trabajador de verdad y comprueba que nada entra ni se rompe."))
@click.option("--requests", type=click.IntRange(1), default=1500, show_default=True, help=_("Cuántas."))
@click.option("--seed", type=int, default=0, show_default=True, help=_("La misma semilla da las mismas peticiones."))
@click.option("--json", "as_json", is_flag=True, help=_("Escribe las cifras como una línea de JSON."))
def main(requests: int, seed: int, as_json: bool) -> None:
    """The command."""
    result = campaign(requests, seed)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else _table(result))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
