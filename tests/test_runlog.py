from __future__ import annotations

import math
from pathlib import Path

import pytest

from sheily_train import runlog
from sheily_train.errors import DataError
from sheily_train.runlog import Record, RunLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "run.jsonl"


def test_records_are_lines_in_order(path: Path) -> None:
    """One JSON object a line, event first, accents as they are; an event can be asked for alone."""
    with RunLog(path) as log:
        log.write("note", text="así")
        log.write("step", step=1, loss=0.5)
    assert path.read_text(encoding="utf-8").splitlines()[0] == '{"event": "note", "text": "así"}'
    assert [record["event"] for record in runlog.read(path)] == ["note", "step"]
    assert list(runlog.read(path, "step")) == [{"event": "step", "step": 1, "loss": 0.5}]


def test_a_listener_hears_of_what_is_already_written(path: Path) -> None:
    """When a listener is called, a reader of the file sees the record too."""
    heard: list[tuple[Record, list[Record]]] = []
    with RunLog(path, listeners=(lambda record: heard.append((record, list(runlog.read(path)))),)) as log:
        log.write("step", step=1)
    assert heard == [({"event": "step", "step": 1}, [{"event": "step", "step": 1}])]


def test_what_came_after_the_checkpoint_is_cut_off(path: Path) -> None:
    """``sync`` tells the length to keep; a later sitting goes on from there, a new run from nothing."""
    with RunLog(path) as log:
        log.write("step", step=1)
        kept = log.sync()
        log.write("step", step=2)
    assert kept < path.stat().st_size
    with RunLog(path, keep=kept) as log:
        assert path.stat().st_size == kept
        log.write("step", step=3)
    assert [record["step"] for record in runlog.read(path)] == [1, 3]
    RunLog(path).close()
    assert path.stat().st_size == 0


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_last_line_cut_short_is_passed_over(cut: int, path: Path) -> None:
    """A kill in the middle of a write, the newline alone missing included, costs that record and no other."""
    with RunLog(path) as log:
        log.write("step", step=1)
        log.write("step", step=2)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in runlog.read(path)] == [1]


@pytest.mark.parametrize("line", [b"\x00\x00", b'{"event": "st', b"[1]", b"3", b'{"step": 1}', b'{"event": ["step"]}'])
def test_a_line_that_is_no_record_is_named(line: bytes, path: Path) -> None:
    """Damage ahead of the last line is told with file and line, whichever records were asked for."""
    with RunLog(path) as log:
        log.write("step", step=1)
    path.write_bytes(path.read_bytes() + line + b"\n")
    for event in (None, "step"):
        with pytest.raises(DataError, match=r"run\.jsonl:2: no es una línea"):
            list(runlog.read(path, event))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_becomes_null(value: float, path: Path) -> None:
    """The gradient norm of an overflowed fp16 step is no number; the log stays JSON that any tool reads."""
    with RunLog(path) as log:
        log.write("step", step=1, loss=0.5, grad_norm=value)
    assert list(runlog.read(path)) == [{"event": "step", "step": 1, "loss": 0.5, "grad_norm": None}]


def test_deterministic_lines_leave_clock_and_machine_out(path: Path) -> None:
    """Two sittings that did the same steps at other times have these lines in common."""
    logs = path.with_name("a"), path.with_name("b")
    for number, file in enumerate(logs):
        with RunLog(file) as log:
            log.write("start", at=number)
            log.write("eval", step=0, loss=2.0)
            log.write("step", step=1, loss=1.5)
            log.write("timing", seconds=number)
            log.write("checkpoint", step=1, seconds=number)
            log.write("done", at=number)
    first, second = map(runlog.deterministic_lines, logs)
    assert first == second == ['{"event": "eval", "step": 0, "loss": 2.0}', '{"event": "step", "step": 1, "loss": 1.5}']
