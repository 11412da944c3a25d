"""The runs of a worker: each a ledger, a learner and statistics that change together, event by event.

A run is a deterministic machine: the same events give the same bits and the same answers, here or on another machine of
the same fingerprint. It may be thrown away at any moment: its newest snapshot and the client's journal bring it back.

Nothing here knows of HTTP, sockets or threads of its own; the clock is passed in. Every method is called from one
thread, except :meth:`Runs.save`, which may be called from another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from sheily_train.colab.batches import Batch, Feedback
from sheily_train.colab.protocol import (
    ANONYMOUS_RUN,
    Claim,
    Ledger,
    another_seed,
    check_run_id,
    first_chain,
    next_chain,
)
from sheily_train.colab.snapshots import Snapshot, Snapshots
from sheily_train.core.omega.learner import Learner, Lesson
from sheily_train.durable import read_json, sync_folder, write_json
from sheily_train.errors import RefusedError, TrainingError, WorkerError
from sheily_train.i18n import _

LOSSES_KEPT = 100
LOSSES_SHOWN = 20
STEADY_SHARE = 0.01
RUN_FACTS_FILE = "run.json"
MAX_COUNT = 10**15
"""No count of a run's state comes near it; sums of two such are still numbers that JSON can carry."""
ASIDE_SUFFIX = ".aside"
"""Ends the folder of a state that was set aside; no run's name has a dot."""

_runs_log = logging.getLogger("sheily_train.colab.runs")


@dataclass
class Statistics:
    """What a run's events add up to; a part of its state.

    Attributes:
        losses: the latest ones, oldest first.
        anomaly_sum: the sum of the anomaly probabilities of all vectors.
        anomalies: how many vectors were above the threshold.
    """

    samples: int = 0
    batches: int = 0
    loss_sum: float = 0.0
    losses: list[float] = field(default_factory=list)
    anomaly_sum: float = 0.0
    anomalies: int = 0
    feedback: int = 0
    feedback_validated: int = 0

    def add_lesson(self, lesson: Lesson, samples: int) -> None:
        """Count a batch."""
        self.samples += samples
        self.batches += 1
        self.loss_sum += lesson.loss
        self.losses = [*self.losses, lesson.loss][-LOSSES_KEPT:]
        self.anomaly_sum += lesson.anomaly_prob * samples
        self.anomalies += lesson.anomalies

    def add_feedback(self, feedback: Feedback) -> None:
        """Count feedback."""
        self.feedback += 1
        self.feedback_validated += feedback.validated

    def summary(self) -> dict[str, Any]:
        """The ``estadisticas`` of an answer, without what clock and machine say."""
        return {
            "total_muestras": self.samples,
            "total_batches": self.batches,
            "loss_promedio_global": _share(self.loss_sum, self.batches),
            "loss_promedio_ultimos_100": _share(sum(self.losses), len(self.losses)),
            "anomalia_media": _share(self.anomaly_sum, self.samples),
            "feedback": {
                "recibido": self.feedback,
                "exitoso": self.feedback_validated,
                "tasa_exito": _share(self.feedback_validated, self.feedback),
            },
        }

    def trend(self) -> dict[str, Any]:
        """The answer of ``/metricas``."""
        return {
            "ultimos_20_losses": self.losses[-LOSSES_SHOWN:],
            "tendencia": _tendency(self.losses[-LOSSES_SHOWN:]),
            "anomalias_detectadas": self.anomalies,
            "feedback_tasa_exito": _share(self.feedback_validated, self.feedback),
        }


@dataclass(frozen=True)
class Card:
    """What may be said of a run at once, without its model: a copy made after each event."""

    run: str
    last_seq: int
    opened: float
    summary: dict[str, Any]
    trend: dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """Where a run stands, and the fingerprint of its state, when it has one."""

    seed: int
    owner: int
    last_seq: int
    chain: str
    fingerprint: dict[str, str] | None


class Run:
    """One run in memory.

    Args:
        opened: the clock when it came into memory.
    """

    def __init__(self, ledger: Ledger, learner: Learner, statistics: Statistics, opened: float) -> None:
        self.ledger = ledger
        self.learner = learner
        self.statistics = statistics
        self.opened = opened
        self.captured = opened
        self.captured_seq = ledger.last_seq

    def snapshot(self) -> Snapshot:
        """The whole state right now, as copies."""
        facts = {
            "ledger": self.ledger.to_json(),
            "statistics": asdict(self.statistics),
            "fingerprint": self.learner.fingerprint,
        }
        return Snapshot(self.ledger.last_seq, facts, self.learner.state())

    def apply(self, claim: Claim, content: Batch | Feedback) -> bytes:
        """Apply the next event, which was judged and checked before; returns its answer.

        An exception leaves the run in a state that nobody knows: it must be thrown away.
        """
        if isinstance(content, Batch):
            lesson = self.learner.train(content, claim.seq)
            if not math.isfinite(lesson.loss):
                raise TrainingError(_("la pérdida no es un número finito"))
            self.statistics.add_lesson(lesson, len(content))
            answer = _lesson_answer(lesson, len(content), claim.time)
        else:
            self.learner.feedback(content, claim.seq)
            self.statistics.add_feedback(content)
            answer = _feedback_answer(content, self.statistics, claim.time)
        self.ledger.record(claim, answer)
        return answer

    def card(self) -> Card:
        """What may be said of it without its model."""
        return _card_of(self.ledger, self.statistics, self.opened)


@dataclass(frozen=True)
class Capture:
    """A snapshot on its way to the disk; of two of one run, the one with the higher number counts."""

    run: str
    number: int
    snapshot: Snapshot


class Runs:
    """The runs of one worker: those in memory, and those whose snapshots lie in ``folder``, one folder each.

    Args:
        make_learner: a fresh learner for a seed.
        seed: that of the run of clients that name none.
        in_memory: how many runs may be in memory; beyond it, the one used longest ago is saved and dropped.
        snapshot_seconds: how old a run's newest snapshot may become while it trains.
    """

    def __init__(
        self,
        folder: Path,
        make_learner: Callable[[int], Learner],
        *,
        seed: int = 0,
        in_memory: int = 4,
        snapshot_seconds: float = 45.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._make_learner = make_learner
        self._in_memory = in_memory
        self._snapshot_seconds = snapshot_seconds
        self._clock = clock
        self._open: OrderedDict[str, Run] = OrderedDict()
        self._attached: dict[str, tuple[int, int]] = {ANONYMOUS_RUN: (seed, 0)}
        self._captures = 0
        self._written: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._disk = threading.Lock()

    def look(self, name: str) -> Standing | None:
        """Where a run stands, from memory or its newest snapshot; ``None`` when it is not known. Nothing changes."""
        known = self._written_facts(name)
        if run := self._open.get(name):
            ledger, fingerprint = run.ledger, run.learner.fingerprint
            return Standing(ledger.seed, ledger.owner, ledger.last_seq, ledger.chain, fingerprint)
        with self._disk:
            facts = Snapshots(self.folder / name).newest_facts(verified=True)
        owner = max((known or {}).get("owner", 0), self._attached.get(name, (0, 0))[1])
        if facts is not None:
            ledger, _statistics, fingerprint = _read_run_facts(Snapshot(facts["seq"], facts, {}))
            return Standing(ledger.seed, max(owner, ledger.owner), ledger.last_seq, ledger.chain, fingerprint)
        if known is None:
            return None
        return Standing(known["seed"], owner, 0, known.get("chain") or first_chain(name, known["seed"]), None)

    def attach(self, name: str, seed: int, owner: int, *, chain: str = "", aside: str = "") -> Run:
        """Give a run to a client, as its new owner; the run is created when it is new.

        Args:
            name: the run.
            seed: of the network of a new run; that of one that is there must be the same.
            owner: the highest owner's number that the client knows.
            chain: the chain value before the first event of a new run; the protocol's own unless given.
            aside: the chain value of a state that is to be set aside, so that the run begins anew.

        Raises :class:`RefusedError` (``conflict`` for another seed, ``fingerprint``), and :class:`OSError` when the new
        owner cannot be written down: it must outlive this process, or two clients could hold one run.
        """
        if check_run_id(name) == ANONYMOUS_RUN:
            raise RefusedError(
                _("«{run}» es el entrenamiento de los clientes que no dan nombre.").format(run=name),
                mend=_("Usa otro nombre."),
                status=422,
            )
        if aside:
            self._set_aside(name, seed, aside)
        run = self._open.get(name) or self._load(name, seed, chain)
        if run.ledger.seed != seed:
            raise another_seed(name, run.ledger.seed, seed)
        before, file = run.ledger.owner, self.folder / name / RUN_FACTS_FILE
        begin = (self._written_facts(name) or {}).get("chain") or chain or first_chain(name, seed)
        try:
            facts = {"seed": seed, "owner": run.ledger.attach(owner), "chain": begin}
            write_json(file, {**facts, "sha256": _digest_of_facts(facts)})
        except OSError:
            run.ledger.owner = before
            raise
        self._attached[name] = seed, run.ledger.owner
        return run

    def get(self, name: str) -> Run:
        """A run that a client attached to in this process, from memory or its newest snapshot.

        Raises :class:`RefusedError` (``detached``) for any other.
        """
        if name not in self._attached:
            raise detached_run(name)
        run = self._open.get(name) or self._load(name, self._attached[name][0])
        self._open.move_to_end(name)
        return run

    def saved(self, name: str) -> Run:
        """A run to be asked and not changed: before a client is back, as its newest snapshot has it.

        Raises :class:`RefusedError` (``detached``) for one that is not known.
        """
        if name in self._attached:
            return self.get(name)
        if (standing := self.look(name)) is None:
            raise detached_run(name)
        return self._open.get(name) or self._load(name, standing.seed)

    def apply(self, claim: Claim, content: Batch | Feedback) -> tuple[bytes, bool]:
        """The answer of an event, and whether it is the stored one of an event applied before."""
        run = self.get(claim.run)
        stored = run.ledger.judge(claim)
        return (self._apply(run, claim, content), False) if stored is None else (stored, True)

    def apply_plain(self, time: str, digest: str, content: Batch | Feedback) -> bytes:
        """Apply what a client without a run sent, as the next event of :data:`ANONYMOUS_RUN`."""
        run = self.get(ANONYMOUS_RUN)
        ledger = run.ledger
        chain = next_chain(ledger.chain, digest)
        return self._apply(run, Claim(ledger.run, ledger.last_seq + 1, ledger.owner, time, digest, chain), content)

    def replace(self, name: str, owner: int, snapshot: Snapshot, chain: str = "") -> Run:
        """Put a state in the place of the run's, whose owner asks for it. The caller saves it.

        With ``chain`` the state may be of another kind of machine, and goes on here under that chain value.

        Raises :class:`RefusedError` (``fenced``, ``conflict``, ``fingerprint``, ``invalid``) with the run unchanged.
        """
        present = self.get(name).ledger
        present.check_owner(owner)
        run = self._restore(name, present.seed, snapshot, chain)
        run.ledger.owner = present.owner
        self._open[name] = run
        return run

    def saved_cards(self) -> list[Card]:
        """What the snapshots on the disk say of their runs, the one that was saved last at the end."""
        folders = [path for path in self.folder.glob("*") if path.is_dir() and path.suffix != ASIDE_SUFFIX]
        found = [(path.stat().st_mtime, Snapshots(path)) for path in folders]
        cards = []
        for _saved, snapshots in sorted(found, key=lambda pair: pair[0]):
            if (facts := snapshots.newest_facts()) is None:
                continue
            with suppress(RefusedError):
                ledger, statistics, _fingerprint = _read_run_facts(Snapshot(facts["seq"], facts, {}))
                cards.append(_card_of(ledger, statistics, self._clock()))
        return cards

    def due(self) -> list[Capture]:
        """Copies of the runs whose newest snapshot is too old; :meth:`save` writes them."""
        now = self._clock()
        return [
            self.capture(run)
            for run in self._open.values()
            if run.ledger.last_seq != run.captured_seq and now - run.captured >= self._snapshot_seconds
        ]

    def capture(self, run: Run) -> Capture:
        """A copy of a run, to be saved."""
        snapshot = run.snapshot()
        run.captured, run.captured_seq = self._clock(), run.ledger.last_seq
        self._captures += 1
        self._unwritten[run.ledger.run] = self._captures
        return Capture(run.ledger.run, self._captures, snapshot)

    def save(self, capture: Capture) -> None:
        """Write a copy to the disk, unless a later one has been written."""
        with self._disk:
            if capture.number > self._written.get(capture.run, 0):
                Snapshots(self.folder / capture.run).save(capture.snapshot)
                self._written[capture.run] = capture.number
                if self._unwritten.get(capture.run) == capture.number:
                    del self._unwritten[capture.run]

    def close(self) -> None:
        """Save and drop every run. Raises the first :class:`OSError`, after all were tried."""
        failures: list[OSError] = []
        while self._open:
            _name, run = self._open.popitem()
            try:
                self._save_changes(run)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _apply(self, run: Run, claim: Claim, content: Batch | Feedback) -> bytes:
        try:
            return run.apply(claim, content)
        except Exception as error:
            del self._open[claim.run]  # loaded again from its snapshot when it is next asked for
            _runs_log.exception("event %d of run %s failed; the run is loaded again", claim.seq, claim.run)
            raise RefusedError(
                _("El evento {seq} falló a medias ({reason}); el trabajador vuelve a su última copia.").format(
                    seq=claim.seq, reason=" ".join(str(error).split())[:300] or type(error).__name__
                ),
                mend=_("El cliente reenvía lo que falte; si se repite, mira el registro del trabajador."),
                status=503,
                code="restarted",
            ) from error

    def _set_aside(self, name: str, seed: int, chain: str) -> None:
        """Save a run and move its folder out of the way; of what was set aside the latest is kept."""
        standing = self.look(name)
        if standing is None:
            return
        if standing.seed != seed:
            raise another_seed(name, standing.seed, seed)
        if standing.chain != chain:
            raise RefusedError(
                _("«{run}» ya no está donde estaba el estado que se quería apartar.").format(run=name),
                mend=_("Repite la orden."),
                status=422,
                code="conflict",
            )
        if run := self._open.get(name):
            if run.ledger.last_seq:
                self.save(self.capture(run))  # the latest copy may not have reached the disk yet
            del self._open[name]
        self._attached[name] = seed, standing.owner
        folder, aside = self.folder / name, self.folder / f"{name}{ASIDE_SUFFIX}"
        with self._disk:
            self._written[name] = self._captures  # a copy of it that still waits for the writer is not written any more
            self._unwritten.pop(name, None)
            if not Snapshots(folder).folders():  # nothing was learned: what was set aside before is worth more
                shutil.rmtree(folder)
            else:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            sync_folder(self.folder)

    def _written_facts(self, name: str) -> dict[str, Any] | None:
        """What ``run.json`` says of a run. One that is not as it was written is told, and counts as absent.

        What it says comes with the client, too; the state has its own sha256.
        """
        file = self.folder / name / RUN_FACTS_FILE
        facts = read_json(file) or {}
        if facts.pop("sha256", None) == _digest_of_facts(facts):
            return facts
        if file.exists():
            _runs_log.warning("%s is not as it was written and was passed over", file)
        return None

    def _load(self, name: str, seed: int, chain: str = "") -> Run:
        """Bring a run into memory: from its newest good snapshot, or new."""
        known = self._written_facts(name) or {}
        if known.get("seed", seed) != seed:
            raise another_seed(name, known["seed"], seed)
        with self._disk:
            snapshot, damaged = Snapshots(self.folder / name).newest()
        for folder in damaged:
            _runs_log.warning("snapshot %s does not verify and was passed over", folder)
        while len(self._open) >= self._in_memory:
            self._drop_oldest()
        if snapshot is None:
            ledger = Ledger(name, seed, chain=known.get("chain") or chain)
            run = Run(ledger, self._make_learner(seed), Statistics(), self._clock())
        else:
            run = self._restore(name, seed, snapshot)
        run.ledger.owner = max(run.ledger.owner, known.get("owner", 0), self._attached.get(name, (0, 0))[1])
        self._open[name] = run
        return run

    def _restore(self, name: str, seed: int, snapshot: Snapshot, chain: str = "") -> Run:
        """The run in a snapshot, when it is that run, of that seed, of a machine of this kind or under a new chain."""
        ledger, statistics, fingerprint = _read_run_facts(snapshot)
        if name == ANONYMOUS_RUN:
            seed = ledger.seed  # it makes no promise: whatever it was, it goes on, here too
        if (ledger.run, ledger.seed) != (name, seed):
            raise RefusedError(
                _("El estado es de «{found}», semilla {seed}; se esperaba «{run}», semilla {expected}.").format(
                    found=ledger.run, seed=ledger.seed, run=name, expected=seed
                ),
                mend=_("Usa el estado de ese entrenamiento."),
                status=422,
                code="conflict",
            )
        learner = self._make_learner(seed)
        if chain:
            ledger.chain = chain
        elif name != ANONYMOUS_RUN:
            _check_fingerprint(fingerprint, learner.fingerprint)
        try:
            learner.load(snapshot.tensors)
        except (WorkerError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _unfit_state() from error
        return Run(ledger, learner, statistics, self._clock())

    def _drop_oldest(self) -> None:
        name, run = self._open.popitem(last=False)
        try:
            self._save_changes(run)
        except OSError:
            _runs_log.exception("run %s could not be saved; its client replays from the last snapshot", name)

    def _save_changes(self, run: Run) -> None:
        """Save a run whose latest state is not on the disk: it changed since its copy was made, or that failed."""
        if run.ledger.last_seq != run.captured_seq or run.ledger.run in self._unwritten:
            self.save(self.capture(run))


def _digest_of_facts(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _card_of(ledger: Ledger, statistics: Statistics, opened: float) -> Card:
    return Card(ledger.run, ledger.last_seq, opened, statistics.summary(), statistics.trend())


def _read_run_facts(snapshot: Snapshot) -> tuple[Ledger, Statistics, dict[str, str]]:
    """Ledger, statistics and fingerprint of a snapshot; :class:`RefusedError` when they are not of their types."""
    try:
        ledger = Ledger.from_json(snapshot.facts["ledger"])
        statistics = Statistics(**snapshot.facts["statistics"])
        fingerprint = snapshot.facts["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unfit_state() from error
    alike = [(ledger, Ledger("x", 0, chain="x")), (statistics, Statistics())]
    fits = all(type(value) is type(vars(model)[name]) for found, model in alike for name, value in vars(found).items())
    if not (fits and isinstance(fingerprint, dict) and all(isinstance(loss, float) for loss in statistics.losses)):
        raise _unfit_state()
    counts = [ledger.owner, *(count for count in vars(statistics).values() if isinstance(count, int))]
    if ledger.last_seq != snapshot.seq or not all(0 <= count <= MAX_COUNT for count in counts):
        raise _unfit_state()
    return ledger, statistics, fingerprint


def _lesson_answer(lesson: Lesson, size: int, time: str) -> bytes:
    content = {
        "status": "trained",
        "loss": lesson.loss,
        "anomaly_prob": lesson.anomaly_prob,
        "dendrites": lesson.dendrites,
        "coherence": lesson.coherence,
        "batch_size": size,
        "outputs": {
            "anomaly_prob": lesson.anomaly_prob,
            "dendrite_adjustments": lesson.dendrites,
            "coherence_state": lesson.coherence,
        },
        "capa_info": {
            f"capa{layer}_activations": value for layer, value in zip((2, 3, 4), lesson.activations, strict=True)
        },
        "timestamp": time,
        "anomalias": lesson.anomalies,
        "objetivos": lesson.objectives,
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _feedback_answer(feedback: Feedback, statistics: Statistics, time: str) -> bytes:
    content = {
        "status": "feedback_recibido",
        "validacion": feedback.validated,
        "timestamp": time,
        "estadisticas": statistics.summary(),
    }
    return orjson.dumps(content)


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0


def _tendency(losses: list[float]) -> str:
    """Whether the later half of the losses lies below the earlier one, above it, or within one part in a hundred."""
    half = len(losses) // 2
    if not half:
        return "estable"
    earlier, later = sum(losses[:half]) / half, sum(losses[-half:]) / half
    if abs(later - earlier) <= STEADY_SHARE * abs(earlier):
        return "estable"
    return "mejorando" if later < earlier else "empeorando"


def _check_fingerprint(found: dict[str, str], expected: dict[str, str]) -> None:
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise RefusedError(
            _("El estado es de otra clase de máquina: {differences}.").format(
                differences=", ".join(f"{name} {found.get(name)} → {expected.get(name)}" for name in differing)
            ),
            mend=_(
                "Sigue en una máquina como la anterior, empieza otro entrenamiento, o da --rebase: aparta ese estado y "
                "sigue desde la última copia del PC con los números de esta máquina."
            ),
            status=409,
            code="fingerprint",
        )


def detached_run(name: str) -> RefusedError:
    """The refusal of a run that nobody attached to in this process."""
    return RefusedError(
        _("Este trabajador acaba de arrancar y aún no tiene «{run}».").format(run=name[:80]),
        mend=_("El cliente se presenta otra vez con POST /run y reenvía lo que falte."),
        status=409,
        code="detached",
    )


def _unfit_state() -> RefusedError:
    return RefusedError(
        _("El estado no es de la red de este trabajador."),
        mend=_("Usa la misma versión en los dos lados."),
        status=422,
        code="conflict",
    )
