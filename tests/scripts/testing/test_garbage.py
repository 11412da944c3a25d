from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from sheily_train.colab.batches import BINARY_FORM
from sheily_train.colab.protocol import Claim, Event, Kind
from sheily_train.colab.snapshots import Snapshot
from sheily_train.scripts.testing import garbage
from sheily_train.scripts.testing.garbage import Storm
from sheily_train.scripts.testing.garbage_requests import Draft, Garbage, Shot, Target

TOKEN = "the-right-token-of-a-test-0123456789"
ROOT = Path(__file__).parents[3]


def target() -> Target:
    event = Event(1, Kind.TRAIN, "2026-01-31T12:00:00+00:00", BINARY_FORM, b"body")
    facts = {"ledger": {"run": "principal", "last_seq": 1}, "statistics": {"samples": 8}, "fingerprint": {}}
    claim = Claim("principal", 1, 3, event.time, event.digest(), "0" * 64)
    return Target(TOKEN, claim, event, Snapshot(1, facts, {"x": torch.zeros(1)}))


def shots(count: int, seed: int = 1) -> list[Shot]:
    return list(islice(Garbage(seed, target()), count))


def test_a_worker_stands_a_storm() -> None:
    """1,500 shots at a real worker: nobody gets in, nothing breaks, the run's state and the memory stay."""
    command = [sys.executable, "-m", "sheily_train.scripts.testing.garbage", "--requests", "1500", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert done.returncode == 0
    assert not {status for status in result["without_token"] if status.startswith("2")}
    assert {"401", "429"} <= result["without_token"].keys()
    assert {"200", "400", "404", "405", "409", "413", "415", "422"} <= result["with_token"].keys()
    assert result["public"].keys() == {"200", "405"}


def test_the_same_seed_gives_the_same_garbage() -> None:
    """A failure can be sent again; another seed gives other requests."""
    assert shots(300) == shots(300)
    assert shots(300) != shots(300, seed=2)


def test_every_kind_comes_with_the_token_and_without() -> None:
    """Half of the shots show the token, and each kind is among both halves."""
    kinds = Counter((shot.kind, shot.known) for shot in shots(3000))
    assert {kind for kind, _known in kinds} == {
        *("anything", "batch", "json", "tensors", "length", "chunks", "claim", "upload", "run"),
        *("head", "pipeline", "public"),
    }
    assert all(kinds[kind, True] for kind, _known in kinds if kind != "public")
    assert 0.4 < sum(count for (_kind, known), count in kinds.items() if known) / 3000 < 0.55


def test_strangers_never_show_the_token_where_it_counts() -> None:
    """The one header that lets in is in no stranger's shot, except twice, which is refused."""
    line = f"Authorization: Bearer {TOKEN}\r\n".encode()
    for shot in shots(3000):
        once = shot.content.replace(b"Proxy-" + line, b"").replace(line * 2, b"")
        assert shot.known or line not in once, shot
        assert line in once or not shot.known or shot.kind == "head", shot


@pytest.mark.parametrize(
    ("method", "path", "public"),
    [
        ("GET", "/health", True),
        ("HEAD", "/docs?x=/state", True),
        ("GET", "/%68ealth", True),
        ("POST", "/health", False),
        ("GET", "/health/", False),
        ("GET", "/status", False),
    ],
)
def test_what_everybody_may_read(method: str, path: str, public: bool) -> None:
    """Only a plain reading of the two public paths, however they are spelled, may be answered to strangers."""
    assert Draft(method, path).public is public


@pytest.mark.parametrize(
    ("shot", "answer", "fault"),
    [
        (Shot("batch", False, b""), b"HTTP/1.1 200 OK\r\n\r\n{}", "200"),
        (Shot("batch", True, b""), b"HTTP/1.1 500 No\r\n\r\n", "500"),
        (Shot("pipeline", True, b""), b"HTTP/1.1 400 No\r\n\r\n{}HTTP/1.1 503 No\r\n\r\n", "503"),
        (Shot("batch", True, b""), b"", "sin respuesta"),
        (Shot("batch", True, b""), b"HTTP/1.1 200 OK\r\n\r\n{}", ""),
        (Shot("public", False, b"", public=True), b"HTTP/1.1 200 OK\r\n\r\n{}", ""),
        (Shot("head", False, b"", unfinished=True), b"", ""),
        (Shot("batch", False, b""), b'HTTP/1.1 400 No\r\n\r\n{"error": "HTTP/1.1 200 "}', ""),
    ],
)
def test_what_must_not_be_is_noticed(shot: Shot, answer: bytes, fault: str) -> None:
    """A stranger who is let in, a 5xx and silence are kept as wrong, and nothing else is."""
    storm = Storm()
    storm.note(shot, answer)
    assert [text for text in storm.wrong if fault in text] == storm.wrong
    assert bool(storm.wrong) is bool(fault)


def test_the_table_and_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was wrong is shown and makes the command fail; with nothing wrong it says so and succeeds."""
    figures = {
        **{"requests": 9, "seconds": 1.0, "with_token": {200: 1}, "without_token": {401: 8}, "public": {}},
        **{"unfinished_without_answer": 0, "peak_rss_mb_before": 1, "peak_rss_mb_after": 2, "state_sha256": "ab"},
    }
    for wrong, code, last in ([], 0, "Todo en orden"), (["200: batch"], 1, "Mal: 1"):
        monkeypatch.setattr(garbage, "campaign", lambda *_given, found=wrong: {**figures, "wrong": found})
        done = CliRunner().invoke(garbage.main, [])
        assert (done.exit_code, done.output.splitlines()[-1]) == (code, last)
        assert "401" in done.output


def test_what_a_worker_must_not_write_is_noticed(tmp_path: Path) -> None:
    """A traceback, or the token outside an address, in its output is a complaint; the address is none."""
    worker = SimpleNamespace(log=tmp_path / "log", token=TOKEN)
    worker.log.write_text(f"http://127.0.0.1:1#token={TOKEN}\n  sheily connect 'http://127.0.0.1:1#token={TOKEN}'\n")
    assert garbage.Worker.complaints(worker) == []  # type: ignore[arg-type]
    worker.log.write_text(f"GET /status?token={TOKEN}\nTraceback (most recent call last):\n")
    assert len(garbage.Worker.complaints(worker)) == 2  # type: ignore[arg-type]
