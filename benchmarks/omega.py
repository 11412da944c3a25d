"""OMEGA 21 end to end: what it learns, how fast, and what the wire costs. Worker and client are two processes.

    python benchmarks/omega.py [learning] [speed] [table]

learning  a fresh network, 512 labelled vectors in 8 batches of 64 through client and worker, 10 % anomalies, five seeds
          of each type: AUROC on 1,000 fresh vectors; the coherence objective of the last batch against the first; the
          distance of the dendrites to the adjustments that feedback validated, last against first
speed     vectors a second: the learner called in its own process; client and worker over loopback in binary (journalled
          and pipelined) and in JSON; the same in binary with 100 ms added to every round trip. In turn, three rounds.
          Then how long /health and /status take while the worker trains
table     seconds to connect, to make 500 vectors, to train 8 batches, and of the whole command

Results are printed, and written with machine and command to ``benchmarks/<date>-omega.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import numpy as np

from sheily_train.colab.client import ClienteColabEntrenamiento
from sheily_train.colab.wire import ClientSettings
from sheily_train.core.omega.generator import TYPES, GeneradorDatosEntrenamiento
from sheily_train.core.training.hardware import fingerprint

SEEDS, BATCH, LESSONS, FRESH = 5, 64, 512, 1000
TIMED_BATCHES, ROUNDS, ADDED_SECONDS = 64, 3, 0.1

IN_PROCESS = f"""
import sys, time
from sheily_train.core.omega.generator import GeneradorDatosEntrenamiento
from sheily_train.core.omega.learner import Learner
learner, data = Learner(0), GeneradorDatosEntrenamiento(3).generar_series_temporal({BATCH * 8})
batches = [data[start : start + {BATCH}] for start in range(0, {BATCH * 8}, {BATCH})]
for step, batch in enumerate(batches[:4]):
    learner.train(batch, step + 1)
began = time.perf_counter()
for step in range({TIMED_BATCHES}):
    learner.train(batches[step % 8], step + 5)
print({TIMED_BATCHES * BATCH} / (time.perf_counter() - began))
"""


@contextmanager
def worker(folder: Path) -> Iterator[str]:
    """The address of a worker that is a process of its own."""
    words = [sys.executable, "-m", "sheily_train", "worker", "--port", "0", "--state-dir", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
    finally:
        process.terminate()
        process.wait()


def auroc(labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]) -> float:
    """The share of pairs (anomaly, normal) that the scores put in order."""
    above = scores[labels == 1][:, None] - scores[labels == 0]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def learn(address: str, folder: Path, kind: str, seed: int) -> dict[str, float]:
    """One fresh network's first 512 vectors."""
    lessons = GeneradorDatosEntrenamiento([seed, 1]).generar(kind, LESSONS, 0.1)
    fresh = GeneradorDatosEntrenamiento([seed, 2]).generar(kind, FRESH, 0.1)
    rng = np.random.default_rng(seed)
    wanted = rng.uniform(-0.8, 0.8, 16)
    run = f"{kind}-{seed}"
    with ClienteColabEntrenamiento(address, run=run, seed=seed, folder=folder / run) as client:
        client.conectar()
        answers = []
        for start in range(0, LESSONS, BATCH):
            answers.append(client.entrenar_lote(lessons[start : start + BATCH]))
            client.enviar_feedback(np.clip(wanted + rng.normal(0, 0.05, 16), -1, 1), True)
        scores = np.array(client.predecir(fresh)["anomaly_prob"])
    distances = [float(np.square(np.array(answer["dendrites"]) - wanted).mean()) for answer in answers]
    coherence = [answer["objetivos"]["coherence"] for answer in answers]
    return {
        "auroc": auroc(fresh.labels, scores),
        "coherence_last_to_first": coherence[-1] / coherence[0],
        "dendrites_last_to_first": distances[-1] / distances[0],
    }


def learning(folder: Path) -> dict[str, dict[str, float]]:
    """The median over the seeds, by type."""
    with worker(folder / "worker") as address:
        found = {kind: [learn(address, folder, kind, seed) for seed in range(SEEDS)] for kind in TYPES}
    medians = {kind: {name: median(row[name] for row in rows) for name in rows[0]} for kind, rows in found.items()}
    for kind, row in medians.items():
        print(f"{kind:10}", "   ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
    return medians


class DelayProxy:
    """Passes bytes on after half of the added round trip, each way, without holding the next ones up."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def send() -> None:
            while True:
                when, piece = await due.get()
                await asyncio.sleep(max(0.0, when - self._loop.time()))
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()

        sending = self._loop.create_task(send())
        while piece := await reader.read(1 << 20):
            due.put_nowait((self._loop.time() + ADDED_SECONDS / 2, piece))
        due.put_nowait((self._loop.time() + ADDED_SECONDS / 2, b""))
        await sending


def over_http(address: str, folder: Path, run: str, form: str) -> float:
    """Vectors a second of a client, its journal included."""
    lessons = GeneradorDatosEntrenamiento(3).generar_series_temporal(BATCH * TIMED_BATCHES)
    settings = ClientSettings(form=form, pull_after=10**6)
    with ClienteColabEntrenamiento(address, run=run, folder=folder / run, settings=settings) as client:
        client.conectar()
        client.entrenar_multiples_lotes(lessons[: 4 * BATCH], BATCH)
        began = time.perf_counter()
        client.entrenar_multiples_lotes(lessons, BATCH)
        return len(lessons) / (time.perf_counter() - began)


def speed(folder: Path) -> dict[str, float]:
    """Medians of the rounds, in vectors a second, and their ratios to the learner alone."""
    rates: dict[str, list[float]] = {"in process": [], "binary": [], "json": [], "binary, +100 ms": []}
    with worker(folder / "worker") as address:
        port = int(address.partition("#")[0].rpartition(":")[2])
        far = address.replace(f":{port}", f":{DelayProxy(port).port}")
        for turn in range(ROUNDS):
            alone = subprocess.run([sys.executable, "-c", IN_PROCESS], check=True, capture_output=True, text=True)
            rates["in process"].append(float(alone.stdout))
            rates["binary"].append(over_http(address, folder, f"binary-{turn}", "binary"))
            rates["json"].append(over_http(address, folder, f"json-{turn}", "json"))
            rates["binary, +100 ms"].append(over_http(far, folder, f"far-{turn}", "binary"))
    medians = {name: median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        rounds = " ".join(f"{value:.0f}" for value in rates[name])
        print(f"{name:16} {rate:7.0f} vectors/s   {rate / medians['in process']:.3f}   rounds {rounds}", flush=True)
    with worker(folder / "busy-worker") as address:
        return medians | while_training(address, folder)


def while_training(address: str, folder: Path) -> dict[str, float]:
    """Milliseconds of /health and /status, asked every 20 ms while a client trains as fast as it can."""
    url, _, token = address.partition("#token=")
    taken: dict[str, list[float]] = {"/health": [], "/status": []}
    training = threading.Thread(target=over_http, args=(address, folder, "busy", "binary"))
    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}) as client:
        training.start()
        while training.is_alive():
            for path, times in taken.items():
                times.append(1000 * timed(lambda path=path: client.get(path).raise_for_status()))
            time.sleep(0.02)
    found = {}
    for path, times in taken.items():
        found |= {f"{path} median ms": median(times), f"{path} p99 ms": float(np.quantile(times, 0.99))}
        found[f"{path} longest ms"] = max(times)
        print(f"{path:16} median {median(times):.1f} ms   longest of {len(times)}: {max(times):.1f} ms", flush=True)
    return found


def timed(work: Callable[[], Any]) -> float:
    """Its seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(folder: Path) -> dict[str, float]:
    """The operations of the guide's performance table."""
    with worker(folder / "worker") as address:
        made: list[Any] = []
        seconds = {}
        with ClienteColabEntrenamiento(address, run="table", folder=folder / "table") as client:
            seconds["connect"] = timed(client.conectar)
            seconds["generate 500"] = timed(lambda: made.append(GeneradorDatosEntrenamiento(1).generar_muestras(500)))
            seconds["train 8 batches"] = timed(lambda: client.entrenar_multiples_lotes(made[0], BATCH))
        words = [sys.executable, "-m", "sheily_train", "connect", address, "--muestras", "500", "--quiet"]
        environment = os.environ | {"SHEILY_HOME": str(folder)}
        seconds["whole command"] = timed(lambda: subprocess.run(words, check=True, env=environment))
    for name, value in seconds.items():
        print(f"{name:16} {value:7.2f} s", flush=True)
    return seconds


def main() -> None:
    """Measure, print, write."""
    parts = {"learning": learning, "speed": speed, "table": table}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], metavar="|".join(parts))
    chosen = parser.parse_args().parts or list(parts)
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/omega.py", *chosen]),
        "machine": fingerprint("cpu"),
    }
    for name in chosen:
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](Path(folder))
    path = Path(__file__).with_name(f"{date.today()}-omega.json")
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
