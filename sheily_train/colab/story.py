"""What a run log tells, read: its batches, feedback, deliveries and sessions, and the numbers that sum them up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from sheily_train import runlog
from sheily_train.errors import RequestError
from sheily_train.i18n import _

_FLAT = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A trained batch. What the worker did not say, or what is no number, is ``None``."""

    seq: int
    samples: int
    loss: float | None
    anomaly_prob: float | None
    anomalies: int | None


@dataclass(frozen=True)
class Wire:
    """What sending an event took: seconds from its first byte to its answer, attempts, and bytes of its body."""

    seq: int
    seconds: float
    attempts: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The numbers of a log. Shares are 0..1, times are seconds; ``None`` where the log does not say."""

    run: str | None
    sessions: int
    finished: bool
    batches: int
    vectors: int
    loss_first: float | None
    loss_last: float | None
    loss_best: float | None
    loss_change: float | None
    tendency: str | None
    anomalies: int | None
    anomaly_share: float | None
    anomaly_prob: float | None
    feedback: int
    feedback_validated: int
    feedback_rate: float | None
    latency_p50: float | None
    latency_p95: float | None
    latency_max: float | None
    vectors_per_second: float | None
    bytes: int
    retries: int
    retry_reasons: dict[str, int]
    resyncs: int
    rebases: int
    snapshots: int


@dataclass(frozen=True)
class Session:
    """A session that came to its end, as its ``done`` record counts it."""

    number: int | None
    batches: int | None
    vectors: int
    loss: float | None
    anomalies: int | None
    seconds: float | None


@dataclass(frozen=True)
class Rebase:
    """A return to the state after event ``seq``, and from there on the numbers of another machine."""

    seq: int
    left: dict[str, str]
    taken: dict[str, str]


@dataclass(frozen=True)
class Story:
    """A log, read: batches, feedback (number, validated), deliveries, ended sessions, returns, and their summary."""

    summary: Summary
    steps: list[Step]
    feedback: list[tuple[int, bool]]
    wires: list[Wire]
    sessions: list[Session]
    rebases: list[Rebase]


def read_story(log: Path) -> Story:
    """The batches, feedback and deliveries of a log.

    An event that is told again counts once. If it is told otherwise, the run was begun anew or taken back to an earlier
    point: what had been told from there on is forgotten.
    """
    records = _read(log)
    steps: dict[int, Step] = {}
    wires: dict[int, Wire] = {}
    feedback: dict[int, bool] = {}
    for record in records:
        if record["event"] == "rebase":
            _forget_from(record["seq"] + 1, steps, feedback, wires)
        elif record["event"] == "wire":
            wires[record["seq"]] = _wire(record)
        elif record["event"] in {"step", "feedback"}:
            seq = record["seq"]
            told = _step(record) if record["event"] == "step" else bool(record["validated"])
            if steps.get(seq, feedback.get(seq, told)) != told:
                _forget_from(seq, steps, feedback)
                _forget_from(seq + 1, wires)  # its own may have been told before it
            if isinstance(told, Step):
                steps[seq] = told
            else:
                feedback[seq] = told
    sessions = _ended_sessions(records)
    ordered, answers = [steps[seq] for seq in sorted(steps)], sorted(feedback.items())
    deliveries = [wires[seq] for seq in sorted(wires)]
    rebases = [_rebase(record) for record in records if record["event"] == "rebase"]
    summary = _summarise(records, ordered, answers, deliveries, sessions)
    return Story(summary, ordered, answers, deliveries, sessions, rebases)


def _forget_from(first: int, *told: dict[int, Any]) -> None:
    for events in told:
        for seq in [seq for seq in events if seq >= first]:
            del events[seq]


def _ended_sessions(records: list[runlog.Record]) -> list[Session]:
    """The sessions that have a ``done`` record; one that does not count its vectors has those since its beginning."""
    sessions, pending = [], 0
    for record in records:
        if record["event"] in {"start", "session", "worker"}:
            pending = 0
        elif record["event"] == "step":
            pending += record.get("samples") or 0
        elif record["event"] == "done":
            number, batches, loss, anomalies, seconds = map(
                record.get, ("session", "batches", "loss", "anomalies", "seconds")
            )
            sessions.append(Session(number, batches, record.get("vectors", pending), loss, anomalies, seconds))
            pending = 0
    return sessions


def _read(log: Path) -> list[runlog.Record]:
    records: list[runlog.Record] = []
    try:
        for record in runlog.read(log):
            if record["event"] in {"step", "wire", "feedback", "rebase"} and not isinstance(record.get("seq"), int):
                raise runlog.no_record(log, len(records) + 1)
            records.append(record)
    except OSError as error:
        raise RequestError(
            _("No se puede leer el registro {log}: {reason}.").format(log=log, reason=error.strerror),
            mend=_("Lo escribe «sheily connect» al entrenar."),
        ) from error
    return records


def _step(record: runlog.Record) -> Step:
    return Step(
        record["seq"], record.get("samples") or 0, *(record.get(key) for key in ("loss", "anomaly_prob", "anomalies"))
    )


def _rebase(record: runlog.Record) -> Rebase:
    return Rebase(record["seq"], record.get("from") or {}, record.get("to") or {})


def _wire(record: runlog.Record) -> Wire:
    return Wire(record["seq"], *(record.get(key) or 0 for key in ("seconds", "attempts", "bytes")))


def _summarise(
    records: list[runlog.Record],
    steps: list[Step],
    feedback: list[tuple[int, bool]],
    wires: list[Wire],
    sessions: list[Session],
) -> Summary:
    losses = [step.loss for step in steps if step.loss is not None]
    counted = [step for step in steps if step.anomalies is not None]
    probable = [step for step in steps if step.anomaly_prob is not None]
    anomalies = sum(step.anomalies or 0 for step in counted)
    validated = sum(good for _seq, good in feedback)
    middle, high, worst = percentiles([wire.seconds for wire in wires])
    events = Counter(record["event"] for record in records)
    tendency, change = _tendency(losses)
    return Summary(
        run=next((str(record["run"]) for record in reversed(records) if record.get("run")), None),
        sessions=max(len(sessions), len({str(record) for record in records if record["event"] == "session"})),
        finished=bool(records) and events["done"] > 0 and records[-1]["event"] == "done",
        batches=len(steps),
        vectors=sum(step.samples for step in steps),
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        loss_best=min(losses, default=None),
        loss_change=change,
        tendency=tendency,
        anomalies=anomalies if counted else None,
        anomaly_share=share(anomalies, sum(step.samples for step in counted)),
        anomaly_prob=share(
            sum((step.anomaly_prob or 0) * step.samples for step in probable), sum(step.samples for step in probable)
        ),
        feedback=len(feedback),
        feedback_validated=validated,
        feedback_rate=share(validated, len(feedback)),
        latency_p50=middle,
        latency_p95=high,
        latency_max=worst,
        vectors_per_second=_rate(sessions),
        bytes=sum(wire.bytes for wire in wires),
        retries=events["retry"],
        retry_reasons=dict(Counter(str(r.get("reason", "?")) for r in records if r["event"] == "retry").most_common()),
        resyncs=events["resync"],
        rebases=events["rebase"],
        snapshots=events["snapshot"],
    )


def share(part: float, whole: float) -> float | None:
    """A part of the whole, 0..1; ``None`` of nothing."""
    return part / whole if whole else None


def percentiles(seconds: list[float]) -> tuple[float | None, float | None, float | None]:
    """The median, the 95th percentile and the longest; ``None`` where nothing was measured."""
    if not seconds:
        return None, None, None
    import numpy as np

    middle, high, worst = (float(value) for value in np.percentile(seconds, (50, 95, 100)))
    return middle, high, worst


def _tendency(losses: list[float]) -> tuple[str | None, float | None]:
    """``falling``, ``flat`` or ``rising``: the last quarter's mean against the first's, and the change as a share."""
    quarter = len(losses) // 4
    if not quarter:
        return None, None
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if first == 0:
        return None, None
    change = (last - first) / abs(first)
    return "flat" if abs(change) < _FLAT else "falling" if change < 0 else "rising", change


def _rate(sessions: list[Session]) -> float | None:
    """Vectors a second over the sessions that came to their end: a cut one does not know how long it took."""
    timed = [(session.vectors, session.seconds) for session in sessions if session.seconds]
    return share(sum(vectors for vectors, _seconds in timed), sum(seconds for _vectors, seconds in timed))


def split(values: Sequence[T], parts: int) -> list[Sequence[T]]:
    """The values in order, in at most so many parts of nearly equal length, none empty."""
    parts = min(parts, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    return [values[start:end] for start, end in pairwise(edges)]
