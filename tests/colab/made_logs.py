"""Run logs as a session writes them, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sheily_train.runlog import RunLog

Event = tuple[str, dict[str, Any]]


def write_log(path: Path, *events: Event) -> Path:
    with RunLog(path) as log:
        for event, fields in events:
            log.write(event, **fields)
    return path


def step(seq: int, loss: float | None, *, samples: int = 64, anomalies: int | None = 8) -> Event:
    return "step", {"seq": seq, "samples": samples, "loss": loss, "anomaly_prob": 0.25, "anomalies": anomalies}


def wire(seq: int, seconds: float, attempts: int = 1, size: int = 1000) -> Event:
    return "wire", {"seq": seq, "seconds": seconds, "attempts": attempts, "bytes": size, "queue": 0}


def session() -> list[Event]:
    """Eight batches and two feedbacks, with a retry, a resync and a snapshot; 492 vectors in two seconds."""
    events: list[Event] = [("start", {"run": "principal", "seed": 3}), ("session", {"number": 1})]
    for seq, loss in enumerate((2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.4, 0.6), 1):
        last = seq == 8
        events += [step(seq, loss, samples=44 if last else 64), wire(seq, 0.1 * seq, attempts=2 if seq == 3 else 1)]
    events += [("retry", {"reason": "502", "attempt": 1, "wait": 0.5}), ("resync", {"from_seq": 2, "to_seq": 3})]
    for seq, good in ((9, True), (10, False)):
        events += [("feedback", {"seq": seq, "validated": good}), wire(seq, 0.05, size=200)]
    return [*events, ("snapshot", {"seq": 10, "bytes": 5, "seconds": 0.1}), ("done", {"seconds": 2.0})]
