from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

import sheily_train.colab.runs
from sheily_train.colab.batches import make_batch, make_feedback
from sheily_train.colab.protocol import ANONYMOUS_RUN, Claim, first_chain, next_chain
from sheily_train.colab.runs import ASIDE_SUFFIX, Run, Runs, Standing, Statistics
from sheily_train.colab.snapshots import Snapshots, pack_snapshot
from sheily_train.errors import RefusedError
from tests.colab.tiny_learner import POISON, TinyLearner

TIME = "2026-01-31T12:00:00Z"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runs(tmp_path: Path, clock: Clock) -> Runs:
    return make_runs(tmp_path, clock)


def make_runs(folder: Path, clock: Clock | None = None, **more: object) -> Runs:
    return Runs(folder, TinyLearner, in_memory=2, clock=clock or Clock(), **more)  # type: ignore[arg-type]


def content_of(seq: int, first: float = 0.5) -> object:
    if seq % 5 == 4:
        return make_feedback([seq / 100] * 16, seq % 2 == 0)
    rows = np.random.default_rng(seq).normal(size=(3, 1600))
    rows[0, 0] = first
    return make_batch(rows, [0, 1, 0], 2)


def claim_next(run: Run) -> Claim:
    seq = run.ledger.last_seq + 1
    digest = f"{seq:064x}"
    return Claim(run.ledger.run, seq, run.ledger.owner, TIME, digest, next_chain(run.ledger.chain, digest))


def feed(runs: Runs, name: str, until: int) -> list[bytes]:
    answers = []
    while (run := runs.get(name)).ledger.last_seq < until:
        answer, replayed = runs.apply(claim_next(run), content_of(run.ledger.last_seq + 1))  # type: ignore[arg-type]
        assert not replayed
        answers.append(answer)
    return answers


def bits(run: Run) -> bytes:
    """Every bit of a run's state, apart from who owns it."""
    run.ledger.owner = 0
    return pack_snapshot(run.snapshot())


def code_of(caught: pytest.ExceptionInfo[RefusedError]) -> tuple[str, int]:
    return caught.value.code, caught.value.status


def test_a_run_is_a_deterministic_machine(tmp_path: Path) -> None:
    """The same events give the same answers and the same bits; another seed gives others."""
    ends = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs = make_runs(tmp_path / folder)
        runs.attach("uno", seed, 0)
        ends.append((feed(runs, "uno", 12), bits(runs.get("uno"))))
    assert ends[0] == ends[1]
    assert ends[0][0] != ends[2][0]


def test_what_is_random_in_an_event_follows_from_its_number(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner is given each event's own number, for batches and for feedback."""
    steps: list[int] = []
    for name in ("train", "feedback"):
        real = getattr(TinyLearner, name)
        monkeypatch.setattr(TinyLearner, name, lambda *given, real=real: (steps.append(given[2]), real(*given))[1])
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 6)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_an_answer_is_made_of_the_event_alone(runs: Runs) -> None:
    """The training answer has the v4.0 keys, float32 values and the claim's time."""
    runs.attach("uno", 1, 0)
    answer = orjson.loads(feed(runs, "uno", 1)[0])
    assert answer["status"] == "trained"
    assert answer["timestamp"] == TIME
    assert answer["batch_size"] == 3
    assert answer["anomalias"] == 1
    assert answer["dendrites"] == answer["outputs"]["dendrite_adjustments"]
    assert answer["coherence"] == answer["outputs"]["coherence_state"]
    assert answer["capa_info"] == {"capa2_activations": 0.25, "capa3_activations": 0.5, "capa4_activations": 1.0}


def test_an_event_applied_before_gets_its_stored_answer(runs: Runs) -> None:
    """The same claim again gets the same bytes and changes nothing."""
    run = runs.attach("uno", 1, 0)
    claim = claim_next(run)
    answer = feed(runs, "uno", 1)[0]
    before = pack_snapshot(run.snapshot())
    assert runs.apply(claim, content_of(1)) == (answer, True)  # type: ignore[arg-type]
    assert pack_snapshot(run.snapshot()) == before


def test_snapshot_and_replay_give_the_bits_of_an_undisturbed_run(tmp_path: Path, clock: Clock) -> None:
    """A process that dies after a snapshot and some events more is brought back by snapshot and replay."""
    undisturbed = make_runs(tmp_path / "a")
    undisturbed.attach("uno", 1, 0)
    answers = feed(undisturbed, "uno", 12)
    runs = make_runs(tmp_path / "b", clock)
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 6)
    clock.now = 46
    for capture in runs.due():
        runs.save(capture)
    feed(runs, "uno", 9)
    again = make_runs(tmp_path / "b")
    assert again.attach("uno", 1, 1).ledger.last_seq == 6
    assert feed(again, "uno", 12) == answers[6:]
    assert bits(again.get("uno")) == bits(undisturbed.get("uno"))


def test_a_snapshot_is_due_by_time_and_by_change(runs: Runs, clock: Clock) -> None:
    """No snapshot before 45 s, none without a new event, one after both."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 1)
    clock.now = 44
    assert runs.due() == []
    clock.now = 45
    assert [(capture.run, capture.snapshot.seq) for capture in runs.due()] == [("uno", 1)]
    clock.now = 900
    assert runs.due() == []
    feed(runs, "uno", 2)
    assert [capture.snapshot.seq for capture in runs.due()] == [2]


def test_a_copy_does_not_change_with_its_run(runs: Runs) -> None:
    """What is captured is the state of that moment, whatever is applied later."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    capture = runs.capture(runs.get("uno"))
    before = pack_snapshot(capture.snapshot)
    feed(runs, "uno", 6)
    assert pack_snapshot(capture.snapshot) == before


def test_an_older_copy_never_replaces_a_later_one(runs: Runs, tmp_path: Path) -> None:
    """Of two copies that are written in the wrong order, the later one stays."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    early = runs.capture(runs.get("uno"))
    feed(runs, "uno", 6)
    runs.save(runs.capture(runs.get("uno")))
    runs.save(early)
    found, _damaged = Snapshots(tmp_path / "uno").newest()
    assert found is not None
    assert found.seq == 6


def test_the_run_used_longest_ago_is_saved_and_comes_back(runs: Runs) -> None:
    """With room for two, a third run puts the oldest on the disk; its next event finds it as it was."""
    for name in ("uno", "dos"):
        runs.attach(name, 1, 0)
        feed(runs, name, 3)
    before = bits(runs.get("dos"))
    feed(runs, "uno", 4)
    runs.attach("tres", 1, 0)
    assert list(runs._open) == ["uno", "tres"]
    assert runs.get("dos").ledger.last_seq == 3
    assert bits(runs.get("dos")) == before
    assert list(runs._open) == ["tres", "dos"]


def test_a_failure_in_mid_change_poisons_the_run(runs: Runs, clock: Clock) -> None:
    """After an exception in the learner the run comes back from its snapshot, and replay brings the same bits."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    clock.now = 50
    runs.save(runs.due()[0])
    feed(runs, "uno", 6)
    expected = bits(runs.get("uno"))
    runs.get("uno").ledger.owner = 1
    with pytest.raises(RefusedError, match="fell off the bus") as caught:
        runs.apply(claim_next(runs.get("uno")), content_of(7, POISON))  # type: ignore[arg-type]
    assert code_of(caught) == ("restarted", 503)
    assert runs.get("uno").ledger.last_seq == 3
    assert runs.get("uno").ledger.owner == 1
    feed(runs, "uno", 6)
    assert bits(runs.get("uno")) == expected


def test_a_loss_that_is_no_number_poisons_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that gave such a loss is not kept."""
    runs.attach("uno", 1, 0)
    real = TinyLearner.train
    monkeypatch.setattr(TinyLearner, "train", lambda *arguments: replace(real(*arguments), loss=float("nan")))
    with pytest.raises(RefusedError, match="número finito") as caught:
        feed(runs, "uno", 1)
    assert caught.value.code == "restarted"
    assert runs.get("uno").ledger.last_seq == 0


def test_owners_outlive_the_process(tmp_path: Path) -> None:
    """A worker that starts again knows the latest owner, though no snapshot was written."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    assert runs.attach("uno", 1, 0).ledger.owner == 2
    again = make_runs(tmp_path)
    assert again.attach("uno", 1, 1).ledger.owner == 3
    assert again.attach("uno", 1, 9).ledger.owner == 10


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        ('"seed": 1', '"seed": 3'),
        ('"owner": 2', '"owner": "2"'),
        ('"chain": "', '"chain": "0'),
        ('"seed"', '"sead"'),
        ("{", ""),
    ],
)
def test_a_damaged_note_of_a_run_is_told_and_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: str, damaged: str
) -> None:
    """Its seed, owner and chain come with the client; the run goes on from its snapshot, the note is written anew."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    runs.attach("uno", 1, 1)
    feed(runs, "uno", 2)
    runs.close()
    note = tmp_path / "uno" / "run.json"
    note.write_text(note.read_text().replace(whole, damaged, 1))
    again = make_runs(tmp_path)
    standing = again.look("uno")
    assert standing is not None
    assert (standing.seed, standing.last_seq) == (1, 2)
    assert f"{note} is not as it was written" in caplog.text
    assert again.attach("uno", 1, 2).ledger.owner == 3
    caplog.clear()
    assert again.attach("uno", 1, 3).ledger.owner == 4
    assert not caplog.text


def test_an_owner_that_cannot_be_written_is_not_given(tmp_path: Path) -> None:
    """Where the disk refuses the new owner, the former one stays the owner."""
    runs = make_runs(tmp_path)
    run = runs.attach("uno", 1, 0)
    (tmp_path / "uno" / "run.json").unlink()
    (tmp_path / "uno" / "run.json").mkdir()
    with pytest.raises(OSError, match=r"run\.json"):
        runs.attach("uno", 1, 1)
    assert run.ledger.owner == 1


def test_another_seed_is_a_conflict(tmp_path: Path) -> None:
    """In memory and after a restart, with a snapshot and without, another seed is refused."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    for each in (runs, make_runs(tmp_path)):
        with pytest.raises(RefusedError, match="semilla 1") as caught:
            each.attach("uno", 2, 0)
        assert code_of(caught) == ("conflict", 422)


def test_a_run_that_nobody_attached_to_is_detached(tmp_path: Path) -> None:
    """After a restart a run is known only once its client has attached."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    with pytest.raises(RefusedError) as caught:
        make_runs(tmp_path).get("uno")
    assert code_of(caught) == ("detached", 409)


def test_a_saved_run_can_be_asked_before_its_client_is_back(tmp_path: Path) -> None:
    """It has the state of its snapshot, takes no event, and its client goes on with it; an unknown one is detached."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 2)
    expected = runs.get("uno").snapshot()
    runs.close()
    again = make_runs(tmp_path)
    asked = again.saved("uno")
    assert pack_snapshot(asked.snapshot()) == pack_snapshot(expected)
    for refused in (lambda: again.get("uno"), lambda: again.saved("dos")):
        with pytest.raises(RefusedError) as caught:
            refused()
        assert code_of(caught) == ("detached", 409)
    assert again.attach("uno", 1, 0) is asked
    assert again.saved("uno") is asked


def test_a_state_of_another_kind_of_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another fingerprint stops a run, by name of what differs, from its own disk and by upload."""
    runs = make_runs(tmp_path / "a")
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 2)
    snapshot = runs.get("uno").snapshot()
    runs.close()
    monkeypatch.setattr(TinyLearner, "fingerprint", {"device": "cuda", "torch": "tiny"})
    with pytest.raises(RefusedError, match="device cpu → cuda") as caught:
        make_runs(tmp_path / "a").attach("uno", 1, 0)
    assert code_of(caught) == ("fingerprint", 409)
    other = make_runs(tmp_path / "b")
    other.attach("uno", 1, 0)
    with pytest.raises(RefusedError) as caught:
        other.replace("uno", 1, snapshot)
    assert code_of(caught) == ("fingerprint", 409)


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Where a run stands is told from memory, from its snapshot or its facts, and not known where it never was."""
    runs = make_runs(tmp_path)
    assert runs.look("uno") is None
    runs.attach("uno", 1, 3)
    fresh = make_runs(tmp_path).look("uno")
    assert fresh == Standing(1, 4, 0, first_chain("uno", 1), None)
    feed(runs, "uno", 2)
    seen = runs.look("uno")
    assert seen == Standing(1, 4, 2, runs.get("uno").ledger.chain, TinyLearner.fingerprint)
    runs.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = make_runs(tmp_path)
    assert again.look("uno") == seen
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not again._open


def test_looking_passes_over_a_damaged_snapshot(tmp_path: Path, clock: Clock) -> None:
    """What is told is what an attachment would find."""
    runs = make_runs(tmp_path, clock)
    runs.attach("uno", 1, 0)
    for count in (2, 4):
        feed(runs, "uno", count)
        runs.save(runs.capture(runs.get("uno")))
    newest = Snapshots(tmp_path / "uno").folders()[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    standing = make_runs(tmp_path).look("uno")
    assert standing is not None
    assert standing.last_seq == make_runs(tmp_path).attach("uno", 1, 0).ledger.last_seq == 2


def test_a_run_set_aside_begins_anew(tmp_path: Path) -> None:
    """All of it is kept beside, whoever owned it is fenced off, and nothing of it comes back."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    left, late = runs.get("uno").ledger.chain, runs.capture(runs.get("uno"))
    with pytest.raises(RefusedError, match="ya no está") as caught:
        runs.attach("uno", 1, 0, aside="0" * 64)
    assert code_of(caught) == ("conflict", 422)
    run = runs.attach("uno", 1, 0, chain="c" * 64, aside=left)
    assert (run.ledger.last_seq, run.ledger.chain, run.ledger.owner) == (0, "c" * 64, 2)
    runs.save(late)
    assert not Snapshots(tmp_path / "uno").folders()
    assert Snapshots(tmp_path / f"uno{ASIDE_SUFFIX}").newest()[0] is not None
    assert [card.last_seq for card in runs.saved_cards()] == []
    again = make_runs(tmp_path).attach("uno", 1, 0, chain="d" * 64)
    assert (again.ledger.last_seq, again.ledger.chain, again.ledger.owner) == (0, "c" * 64, 3)


def test_a_copy_that_comes_after_its_run_was_set_aside_is_not_written(tmp_path: Path) -> None:
    """Not even of a run that had left the memory by then."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    late = runs.capture(runs.get("uno"))
    for name in ("dos", "tres"):
        runs.attach(name, 1, 0)
    standing = runs.look("uno")
    assert standing is not None
    runs.attach("uno", 1, 0, chain="c" * 64, aside=standing.chain)
    runs.save(late)
    assert not Snapshots(tmp_path / "uno").folders()


def test_what_learned_nothing_does_not_push_out_what_was_set_aside(tmp_path: Path) -> None:
    """Setting aside a run without events keeps the state that was set aside before it."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    runs.attach("uno", 1, 0, aside=runs.get("uno").ledger.chain)
    run = runs.attach("uno", 1, 0, chain="c" * 64, aside=runs.get("uno").ledger.chain)
    assert (run.ledger.chain, run.ledger.owner) == ("c" * 64, 3)
    snapshot, _damaged = Snapshots(tmp_path / f"uno{ASIDE_SUFFIX}").newest()
    assert snapshot is not None
    assert snapshot.seq == 3


def test_a_state_of_another_machine_goes_on_under_a_new_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its client says so; from then on it is this worker's own, and its events must follow that chain."""
    runs = make_runs(tmp_path / "a")
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 2)
    snapshot = runs.get("uno").snapshot()
    monkeypatch.setattr(TinyLearner, "fingerprint", {"device": "cuda", "torch": "tiny"})
    other = make_runs(tmp_path / "b")
    other.attach("uno", 1, 0)
    run = other.replace("uno", 1, snapshot, "c" * 64)
    assert (run.ledger.last_seq, run.ledger.chain) == (2, "c" * 64)
    assert run.snapshot().facts["fingerprint"] == TinyLearner.fingerprint
    other.save(other.capture(run))
    assert make_runs(tmp_path / "b").attach("uno", 1, 1).ledger.chain == "c" * 64


def test_a_state_can_be_put_in_another_worker(tmp_path: Path) -> None:
    """A brand-new worker with an uploaded state goes on to the same bits; the owner stays the one it attached."""
    runs = make_runs(tmp_path / "a")
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 5)
    snapshot = runs.get("uno").snapshot()
    answers = feed(runs, "uno", 8)
    other = make_runs(tmp_path / "b")
    other.attach("uno", 1, 6)
    assert other.replace("uno", 7, snapshot).ledger.owner == 7
    assert feed(other, "uno", 8) == answers
    assert bits(other.get("uno")) == bits(runs.get("uno"))


def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """A state of another run, seed, owner or network, or with broken facts, is refused and the run stays."""
    runs = make_runs(tmp_path)
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 3)
    good = runs.get("uno").snapshot()
    before = pack_snapshot(good)
    ledger = good.facts["ledger"]
    bad = [
        replace(good, facts={**good.facts, "ledger": {**ledger, "run": "dos"}}),
        replace(good, facts={**good.facts, "ledger": {**ledger, "seed": 2}}),
        replace(good, facts={**good.facts, "ledger": {**ledger, "answers": {"x": "y"}}}),
        replace(good, facts={**good.facts, "statistics": {"samples": "many"}}),
        replace(good, facts={**good.facts, "fingerprint": None}),
        replace(good, facts={}),
        replace(good, tensors={}),
        replace(good, tensors={**good.tensors, "weight": good.tensors["weight"][:3]}),
        replace(good, seq=9),
    ]
    for each in bad:
        with pytest.raises(RefusedError) as caught:
            runs.replace("uno", 1, each)
        assert 400 <= caught.value.status < 500
    with pytest.raises(RefusedError) as caught:
        runs.replace("uno", 2, good)
    assert caught.value.code == "fenced"
    assert pack_snapshot(runs.get("uno").snapshot()) == before


def test_clients_without_a_run_share_one(runs: Runs, tmp_path: Path) -> None:
    """Plain events go to one run of their own, which no client can attach to and which a restart keeps."""
    for seq in (1, 2):
        answer = orjson.loads(runs.apply_plain(TIME, f"{seq:064x}", content_of(seq)))  # type: ignore[arg-type]
        assert answer["timestamp"] == TIME
    with pytest.raises(RefusedError):
        runs.attach(ANONYMOUS_RUN, 0, 0)
    before = bits(runs.get(ANONYMOUS_RUN))
    runs.close()
    assert bits(make_runs(tmp_path, seed=5).get(ANONYMOUS_RUN)) == before


def test_close_saves_what_was_not(runs: Runs, tmp_path: Path) -> None:
    """A clean end writes a snapshot of each run that changed, and of no other."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 2)
    runs.attach("dos", 1, 0)
    runs.close()
    assert len(Snapshots(tmp_path / "uno").folders()) == 1
    assert Snapshots(tmp_path / "dos").folders() == []


def test_close_saves_what_failed_before(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that could not be written is written at the end, though no event came since; one that was is not again."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 2)
    with monkeypatch.context() as full:
        full.setattr(Snapshots, "save", lambda _store, _snapshot: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            runs.save(runs.capture(runs.get("uno")))
    runs.close()
    snapshot, _damaged = Snapshots(tmp_path / "uno").newest()
    assert snapshot is not None
    assert snapshot.seq == 2

    runs.attach("uno", 1, 1)
    feed(runs, "uno", 3)
    runs.save(runs.capture(runs.get("uno")))
    written: list[object] = []
    monkeypatch.setattr(Snapshots, "save", lambda _store, snapshot: written.append(snapshot))
    runs.close()
    assert written == []


def test_close_tells_what_could_not_be_saved(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot be written is told at the end, after the others were."""
    for name in ("uno", "dos"):
        runs.attach(name, 1, 0)
        feed(runs, name, 1)
    real = Snapshots.save

    def save(store: Snapshots, snapshot: object) -> None:
        if store.folder.name == "dos":
            raise OSError(28, "No space left on device")
        real(store, snapshot)  # type: ignore[arg-type]

    monkeypatch.setattr(Snapshots, "save", save)
    with pytest.raises(OSError, match="No space left"):
        runs.close()
    assert len(Snapshots(runs.folder / "uno").folders()) == 1


def test_a_damaged_snapshot_is_told(runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A snapshot that does not verify is passed over with a line in the log."""
    runs.attach("uno", 1, 0)
    feed(runs, "uno", 2)
    runs.close()
    file = Snapshots(tmp_path / "uno").folders()[0] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert make_runs(tmp_path).attach("uno", 1, 0).ledger.last_seq == 0
    assert "does not verify" in caplog.text


def test_statistics_are_part_of_the_state() -> None:
    """The sums of a mixed history, and what is shown of them."""
    statistics = Statistics()
    learner = TinyLearner(1)
    losses = []
    for seq in range(1, 131):
        content = content_of(1)
        lesson = learner.train(content, seq)  # type: ignore[arg-type]
        losses.append(lesson.loss)
        statistics.add_lesson(lesson, 3)
    statistics.add_feedback(make_feedback([0] * 16, True))
    statistics.add_feedback(make_feedback([0] * 16, False))
    summary = statistics.summary()
    assert summary["total_muestras"] == 390
    assert summary["total_batches"] == 130
    assert summary["loss_promedio_global"] == pytest.approx(sum(losses) / 130)
    assert summary["loss_promedio_ultimos_100"] == pytest.approx(sum(losses[-100:]) / 100)
    assert summary["feedback"] == {"recibido": 2, "exitoso": 1, "tasa_exito": 0.5}
    trend = statistics.trend()
    assert trend["ultimos_20_losses"] == losses[-20:]
    assert trend["anomalias_detectadas"] == 130
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([], "estable"),
        ([1.0], "estable"),
        ([2.0, 1.0], "mejorando"),
        ([1.0, 2.0], "empeorando"),
        ([1, 1.001], "estable"),
    ],
)
def test_tendency(losses: list[float], word: str) -> None:
    """Falling losses are better, rising ones worse, and small moves are neither."""
    assert Statistics(losses=losses).trend()["tendencia"] == word


def test_runs_know_nothing_of_http() -> None:
    """The module imports no event loop and no web framework."""
    tree = ast.parse(Path(sheily_train.colab.runs.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {"asyncio", "anyio", "fastapi", "starlette", "uvicorn", "http", "socket"}
