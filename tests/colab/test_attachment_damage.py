from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.types import Receive, Scope, Send

from sheily_train.colab.batches import batch_to_binary, make_batch
from sheily_train.colab.client import ClienteColabAsincrono
from sheily_train.colab.journal import JOURNAL_FILE, Journal
from sheily_train.colab.protocol import Kind
from sheily_train.colab.wire import FORMS, ClientSettings
from sheily_train.colab.worker import WorkerApp, WorkerSettings, create_app
from sheily_train.errors import DataError
from tests.colab.tiny_learner import TinyLearner

ROWS = np.random.default_rng(1).normal(size=(30, 1600)).astype(np.float32)
RUN = "uno"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerApp]:
    app = create_app(WorkerSettings(tmp_path / "worker"), TinyLearner)  # type: ignore[arg-type]
    yield app
    app.close()


def train(app: Any, folder: Path, rows: Any, records: list[str] | None = None) -> int:
    """Train rows in batches of ten; returns the journal's last event."""
    quick = ClientSettings(timeout=5, wait_initial=0.01, wait_max=0.02, wait_jitter=0.01)
    told = [] if records is None else records

    async def work() -> int:
        async with ClienteColabAsincrono(
            "http://127.0.0.1",
            transport=httpx2.ASGITransport(app),
            run=RUN,
            folder=folder,
            settings=quick,
            record=lambda _event, **fields: told.append(fields.get("reason", "")),
        ) as client:
            await client.conectar()
            await client.entrenar_multiples_lotes(rows, 10)
            return client.journal.last_seq

    return asyncio.run(work())


def killed(folder: Path, copy: Path) -> Path:
    """What a kill would leave of a folder now."""
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.lock", "*-shm")))


def test_a_request_for_the_run_that_is_damaged_on_its_way_is_sent_again(tmp_path: Path, worker: WorkerApp) -> None:
    """A bit of POST /run that flips on the way is no reason to stop: the worker notices, and is asked again."""
    damaged, records = [True], []

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_damaged() -> Any:
            message = await receive()
            if body := message.get("body"):
                message["body"] = body[:-1] + bytes([body[-1] ^ 1])
            return message

        hit = (scope["method"], scope["path"]) == ("POST", "/run") and damaged and damaged.pop()
        await worker(scope, receive_damaged if hit else receive, send)

    assert train(front, tmp_path / "desk", ROWS, records) == 3
    assert records.count("damaged") == 1


def test_a_journal_that_lost_what_was_sent_is_named(tmp_path: Path, worker: WorkerApp) -> None:
    """When the end of a killed client's journal is damaged, and the worker has the event that stood there, the damage
    is what is told; the copy that was kept goes on."""
    desk = tmp_path / "desk"
    train(worker, desk, ROWS)
    with Journal(desk, RUN) as journal:
        journal.append(Kind.TRAIN, FORMS["binary"], batch_to_binary(make_batch(ROWS[:10])))
        torn, whole = killed(desk, tmp_path / "torn"), killed(desk, tmp_path / "whole")
    assert train(worker, desk, ROWS[:10]) == 5  # the fourth was sent
    log = torn / f"{JOURNAL_FILE}-wal"
    log.write_bytes(log.read_bytes()[:-1] + b"!")
    shutil.copytree(torn, tmp_path / "torn again")
    with pytest.raises(DataError, match=f"{JOURNAL_FILE} está dañado: evento [45]: no está"):
        train(worker, torn, ROWS[:10])
    with Journal(tmp_path / "torn again", RUN) as journal:
        assert (journal.last_seq, journal.lost_its_tail) == (3, True)
    with Journal(whole, RUN) as journal:
        assert (journal.last_seq, journal.lost_its_tail) == (4, False)
