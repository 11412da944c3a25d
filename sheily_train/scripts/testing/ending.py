"""What a run came to, read with the product's own code, and how it differs from what it should have come to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from sheily_train.colab.client import ClienteColabEntrenamiento
from sheily_train.colab.journal import Journal
from sheily_train.colab.snapshots import Snapshot, Snapshots, unpack_snapshot
from sheily_train.i18n import _
from sheily_train.scripts.testing.actors import RUN, TOKEN
from sheily_train.scripts.testing.counted_learner import APPLIED


@dataclass(frozen=True)
class Ending:
    """A run's final state and answers.

    Attributes:
        tensors: the sha256 of each tensor of weights, moments, optimizer and memory, by name.
        applied: the events that were applied to this very state, counted beside the ledger.
        statistics: what they add up to.
        answers: the journal's, each to its last byte.
    """

    tensors: dict[str, str]
    applied: list[int]
    statistics: dict[str, Any]
    answers: list[bytes]

    def without_times(self) -> list[dict[str, Any]]:
        """The answers but for their timestamps."""
        return [{**orjson.loads(answer), "timestamp": ""} for answer in self.answers]


def read_ending(url: str, desk: Path) -> Ending:
    """Fetch the state from the worker, and walk through the whole journal; each part checks itself."""
    with ClienteColabEntrenamiento(url, TOKEN, run=RUN, folder=desk) as client:
        client.conectar()
        state = client.descargar_estado()
    with Journal(desk, RUN) as journal:
        for _each in journal.entries(after=journal.pruned_seq):
            pass
        answers = [answer for _seq, _kind, answer in journal.answers()]
    return _ending(unpack_snapshot(state.read_bytes()), answers)


def saved_ending(runs: Path, answers: list[bytes]) -> Ending | None:
    """What the worker's newest snapshot says."""
    snapshot, _damaged = Snapshots(runs / RUN).newest()
    return None if snapshot is None else _ending(snapshot, answers)


def _ending(snapshot: Snapshot, answers: list[bytes]) -> Ending:
    tensors = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in snapshot.tensors.items()}
    return Ending(tensors, snapshot.tensors[APPLIED].tolist(), snapshot.facts["statistics"], answers)


def differences(found: Ending, expected: Ending, *, same_clock: bool) -> Iterator[str]:
    """What is wrong with a run, one phrase each."""
    count = len(expected.answers)
    if found.applied != list(range(1, count + 1)):
        yield _("aplicados al estado: {found}; se esperaba del 1 al {last}").format(found=found.applied, last=count)
    names = found.tensors.keys() | expected.tensors.keys()
    if other := sorted(name for name in names if found.tensors.get(name) != expected.tensors.get(name)):
        yield _("difieren {count} de {all} tensores, como {name}").format(
            count=len(other), all=len(names), name=other[0]
        )
    if found.statistics != expected.statistics:
        yield _("estadísticas: {found}; se esperaba {expected}").format(
            found=found.statistics, expected=expected.statistics
        )
    if len(found.answers) != count:
        yield _("{found} respuestas; se esperaban {expected}").format(found=len(found.answers), expected=count)
    elif (found.answers if same_clock else found.without_times()) != (
        expected.answers if same_clock else expected.without_times()
    ):
        yield _("las respuestas guardadas difieren")
