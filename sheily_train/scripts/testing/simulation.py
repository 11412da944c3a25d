"""A simulation of the protocol: the product's client and worker on a made-up clock, network and disk.

    python -m sheily_train.scripts.testing.simulation --runs 500 --seed 0

Each seed is a history: batches and feedback sent through a network that drops, repeats, cuts and reorders, while both
machines are killed, lose power at any sync, lose their folders, come back with old ones, become machines of another
kind, run out of disk, or meet a second client. Real are client, journal, protocol, worker, runs and snapshots; made up
are time, network, threads, what the disk remembers, and the learner, which is eight numbers. Once the trouble has
stopped it must end, with each event applied once and in order, counted by the learner itself; with the weights of a
learner that was simply given the events; and with the answers that it gave. The same seed gives the same history.
Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from sheily_train.colab import async_client
from sheily_train.colab.journal import Journal
from sheily_train.core.training.hardware import fingerprint
from sheily_train.i18n import _
from sheily_train.scripts.testing.forgetful_disk import watched
from sheily_train.scripts.testing.simulated_desk import Broken
from sheily_train.scripts.testing.simulated_world import World
from sheily_train.scripts.testing.virtual_time import NothingLeft, VirtualLoop

COMMAND = "python -m sheily_train.scripts.testing.simulation"

_CHUNK = 4
_CHUNKS_A_PROCESS = 200
"""A process is replaced after so many: FastAPI remembers every app, and each worker is a new one."""


@dataclass
class Report:
    """What happened to a seed.

    Attributes:
        troubles: how often what went wrong.
        failure: why the promise is broken; empty when it is not.
        history: a hash of every request, its time, its trouble and its answer.
    """

    seed: int
    troubles: Counter[str] = field(default_factory=Counter)
    failure: str = ""
    history: str = ""


def simulate(seed: int) -> Report:
    """Play the history of a seed."""
    logging.disable(logging.CRITICAL)
    random.seed(seed)  # the pauses between retries
    gc.freeze()
    gc.disable()  # what it finalises, and when, would depend on what ran before
    report, memory = Report(seed), Path("/dev/shm")  # noqa: S108 - nothing of it need outlive the process
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root, watched():
            world = World(random.Random(seed), Path(root))  # noqa: S311
            report.failure = _play(world)
        report.troubles = world.troubles + Counter(world.network.faults)
        report.history = world.network.history.hexdigest()
    finally:
        gc.collect()
        gc.enable()
        logging.disable(logging.NOTSET)
    return report


def _play(world: World) -> str:
    """Play a history; returns why the promise is broken."""
    try:
        with (
            _clocked_journals(world.clock),
            asyncio.Runner(loop_factory=lambda: VirtualLoop(world.chance)) as runner,
        ):
            runner.run(world.play())
    except (Broken, NothingLeft) as error:
        return f"{type(error).__name__}: {error}"
    except (Exception, asyncio.CancelledError):
        return traceback.format_exc()
    return ""


@contextlib.contextmanager
def _clocked_journals(clock: Callable[[], datetime]) -> Iterator[None]:
    """While it lasts, the client's journals read this clock."""
    module: Any = async_client
    module.Journal = partial(Journal, clock=clock)
    try:
        yield
    finally:
        module.Journal = Journal


def simulate_all(seeds: range, jobs: int) -> Iterator[Report]:
    """The reports of all seeds, in order."""
    if jobs == 1:
        yield from map(simulate, seeds)
        return
    fresh = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    # concurrent.futures can stop for good when its children are renewed (max_tasks_per_child, Python issue 115634)
    with fresh.Pool(jobs, maxtasksperchild=_CHUNKS_A_PROCESS) as pool:
        yield from pool.imap(simulate, seeds, chunksize=_CHUNK)


@click.command(help=_("Simula el protocolo: una historia por semilla, con todo lo que puede ir mal."))
@click.option("--runs", type=click.IntRange(1), default=500, show_default=True, help=_("Cuántas historias."))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help=_("Semilla de la primera."))
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help=_("Cuántas a la vez."))
@click.option("--until-failure", is_flag=True, help=_("Termina con la primera que falla."))
@click.option("--json", "file", type=click.Path(path_type=Path), help=_("Escribe el resultado en este archivo."))
def command(runs: int, seed: int, jobs: int, until_failure: bool, file: Path | None) -> None:
    """Play the histories, print what happened, and exit with 1 when the promise was broken."""
    begun, troubles, failed = time.monotonic(), Counter[str](), list[int]()
    for report in simulate_all(range(seed, seed + runs), jobs):
        troubles.update(report.troubles)
        if report.failure:
            failed.append(report.seed)
            click.echo(_("semilla {seed}: {failure}").format(seed=report.seed, failure=report.failure))
            if until_failure:
                break
    seconds = round(time.monotonic() - begun, 1)
    for name, count in sorted(troubles.items()):
        click.echo(f"{name:28} {count:9,}".replace(",", " "))
    click.echo(
        _("{runs} historias, {troubles} contratiempos, {failed} con la promesa rota, {seconds:.0f} s").format(
            runs=runs, troubles=sum(troubles.values()), failed=len(failed), seconds=seconds
        )
    )
    if file is not None:
        result = {
            "date": f"{date.today()}",
            "command": f"{COMMAND} --runs {runs} --seed {seed} --jobs {jobs}",
            "machine": fingerprint("cpu"),
            "runs": runs,
            "failed": failed,
            "seconds": seconds,
            "troubles": dict(sorted(troubles.items())),
        }
        file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    command()
