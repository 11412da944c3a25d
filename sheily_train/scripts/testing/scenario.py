"""What a seed draws: a workload, how client and worker are set, and the faults that strike, stage by stage.

A stage lets the client go on by a few events, strikes once, and may spoil some of the requests meanwhile. Some stages
end only when both sides have recovered; after the others the next one strikes in the midst of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sheily_train.scripts.testing.fault_proxy import FAULTS as WIRE_FAULTS
from sheily_train.scripts.testing.workload import FULL_SIZE, WORKLOADS, Workload

STRIKES = {
    "kill worker": 2.0,
    "kill client": 2.0,
    "kill worker at": 5.0,
    "kill client at": 5.0,
    "end worker": 0.5,
    "stop worker": 0.6,
    "stop client": 0.6,
    "folder lost": 1.0,
    "stale folder": 0.8,
    "stale worker": 0.8,
    "disk full at worker": 1.0,
    "disk full at client": 1.0,
    "bit in snapshot": 1.0,
    "bit in pulled state": 1.0,
    "bit in journal": 1.2,
    "second desk": 0.8,
    "second process": 0.5,
    "empty journal": 0.5,
    "clock at worker": 0.5,
    "clock at client": 0.5,
}
"""What can strike, and how often."""

WORKER_POINTS = ("apply", "record", "answer", "tensors", "manifest", "rename", "owner", "attach", "upload")
CLIENT_POINTS = ("append", "commit", "answered", "answers", "tell", "owner", "keep", "rename", "prune")
POINTS = {
    "kill worker at": [f"{when} {name}" for name in WORKER_POINTS for when in ("before", "after")],
    "kill client at": [f"{when} {name}" for name in CLIENT_POINTS for when in ("before", "after")],
}
"""The commit points: a process dies just before, or just after it has passed one."""
OFTEN = {"apply", "record", "answer", "append", "answered", "answers", "tell", "commit"}
"""Those that each event passes."""

STAGES = (10, 12)
SPOILT_SHARE = 0.5
MOST_SPOILT = 3
HOURS = 3600.0


@dataclass(frozen=True)
class Stage:
    """One strike.

    Attributes:
        point: where a process dies, for ``kill … at``.
        count: the how-manieth time it reaches that point.
        upto: the event up to which the client may go.
        wait: the share of the stage that passes before the strike.
        spoilt: the faults of the stage's requests, by their number from 0.
        recovers: whether the stage waits until both sides have recovered.
        draw: further chance of the stage's own.
    """

    strike: str
    point: str
    count: int
    upto: int
    wait: float
    spoilt: dict[int, str]
    recovers: bool
    draw: int


@dataclass(frozen=True)
class Scenario:
    """All that a seed decides."""

    seed: int
    workload: Workload
    client: dict[str, Any]
    worker: dict[str, Any]
    stages: tuple[Stage, ...] = field(default=())

    @property
    def keeps_its_clock(self) -> bool:
        """Whether the client's clock never jumps, so that its answers are the undisturbed run's to the last byte."""
        return all(stage.strike != "clock at client" for stage in self.stages)


def draw(seed: int, *, full_size: bool = False) -> Scenario:
    """The scenario of a seed."""
    chance = Random(seed)  # noqa: S311
    workload = FULL_SIZE if full_size else chance.choice(WORKLOADS)
    client = {
        "depth": chance.choice((1, 2, 4, 4)),
        "pull_after": chance.choice((2, 3, 5, 8)),
        "keep_bytes": chance.choice((0, 0, 4 * 1024**3)),
        "retries": chance.choice((1, 2, 3)),
    }
    worker = {"snapshot_seconds": chance.choice((0.0, 0.05, 0.3, 2.0)), "reorder_seconds": chance.choice((0.1, 0.5))}
    count = chance.randint(*STAGES)
    strikes = _strikes(chance, count)
    ends = [*sorted(chance.sample(range(2, workload.events), count - 1)), workload.events]
    stages = tuple(_stage(chance, strike, upto) for strike, upto in zip(strikes, ends, strict=True))
    points = {stage.point.partition(" ")[2] for stage in stages}
    if points & {"tensors", "manifest", "rename"}:
        worker["snapshot_seconds"] = 0.0
    if points & {"keep", "prune", "rename"}:
        client |= {"pull_after": 2, "keep_bytes": 0}
    return Scenario(seed, workload, client, worker, stages)


def undisturbed(workload: Workload) -> Scenario:
    """The workload with nothing in its way."""
    return Scenario(0, workload, {"pull_after": 1000}, {"snapshot_seconds": 1000.0})


def _strikes(chance: Random, count: int) -> list[str]:
    """So many strikes; the costly ones at most once each."""
    costly = {"stop worker", "stop client", "second desk", "stale worker", "stale folder", "bit in journal"}
    found: Counter[str] = Counter()
    while found.total() < count:
        [strike] = chance.choices(list(STRIKES), list(STRIKES.values()))
        found[strike] += strike not in costly or not found[strike]
    strikes = list(found.elements())
    chance.shuffle(strikes)
    return strikes


def _stage(chance: Random, strike: str, upto: int) -> Stage:
    spoilt = {}
    if chance.random() < SPOILT_SHARE:
        spoilt = {chance.randrange(6): chance.choice(WIRE_FAULTS) for _time in range(chance.randint(1, MOST_SPOILT))}
    point = chance.choice(POINTS[strike]) if strike in POINTS else ""
    return Stage(
        strike,
        point,
        count=chance.choice((1, 1, 2, 3)) if point.partition(" ")[2] in OFTEN else 1,
        upto=upto,
        wait=chance.random(),
        spoilt=spoilt,
        recovers=chance.random() < 0.6,
        draw=chance.randrange(2**32),
    )
