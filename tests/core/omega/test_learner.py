from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from sheily_train.colab.batches import Batch, make_batch, make_feedback
from sheily_train.core.omega.generator import TYPES, GeneradorDatosEntrenamiento
from sheily_train.core.omega.learner import Learner
from sheily_train.core.omega.objective import coherence_target
from sheily_train.errors import RequestError, WorkerError


def state_hash(learner: Learner) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(learner.state().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs (anomaly, normal) that the scores put in order."""
    above = scores[labels == 1][:, None] - scores[labels == 0]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def draw(kind: str, count: int, seed: int) -> Batch:
    return GeneradorDatosEntrenamiento([7, seed]).generar(kind, count, 0.1)


@pytest.fixture(scope="module")
def stream() -> list[Batch]:
    batch = draw("temporal", 6 * 32, 1)
    return [batch[start : start + 32] for start in range(0, len(batch), 32)]


@pytest.mark.parametrize("kind", TYPES)
def test_it_learns_what_an_anomaly_is_and_what_coheres(kind: str) -> None:
    """After 512 labelled vectors AUROC is at least 0.99 on fresh ones, and the coherence error has halved."""
    learner, fresh = Learner(0, "cpu"), draw(kind, 400, 2)
    lessons = draw(kind, 512, 1)
    errors = []
    for step in range(8):
        learner.train(lessons[step * 64 : step * 64 + 64], step + 1)
        if step in (0, 7):
            target = coherence_target(learner.model.surprise.standardise(torch.from_numpy(fresh.input_data))).numpy()
            prediction = learner.predict(fresh.input_data)
            errors.append(np.square(prediction.coherence - target).mean())
    assert auroc(fresh.labels, prediction.anomaly_prob) > 0.99
    assert np.mean((prediction.anomaly_prob > prediction.threshold) == fresh.labels) > 0.95
    assert errors[1] < np.square(target).mean() / 2


def test_without_labels_it_learns_from_reconstruction() -> None:
    """Unlabelled batches lower the reconstruction loss, and surprise alone tells most anomalies."""
    learner, fresh, lessons = Learner(0, "cpu"), draw("simple", 400, 2), draw("simple", 512, 1)
    losses = []
    for step in range(8):
        batch = make_batch(lessons.input_data[step * 64 : step * 64 + 64])
        losses.append(learner.train(batch, step + 1).objectives)
    assert losses[0]["anomaly"] == losses[-1]["anomaly"] == 0
    assert losses[-1]["reconstruction"] < losses[0]["reconstruction"]
    assert auroc(fresh.labels, learner.predict(fresh.input_data).anomaly_prob) > 0.97


def test_dendrites_go_where_feedback_validates(stream: list[Batch]) -> None:
    """The distance to the adjustments that are validated falls by half; rejected ones are kept away from."""
    learner, rng = Learner(0, "cpu"), np.random.default_rng(0)
    wanted = rng.uniform(-0.8, 0.8, 16)
    refused = -wanted

    def distance(target: np.ndarray) -> float:
        return float(np.square(learner.predict(stream[0].input_data).dendrites - target).mean())

    learner.train(stream[0], 1)
    before = distance(wanted)
    for step in range(4):
        learner.feedback(make_feedback(wanted, True), 2 * step + 2)
        learner.feedback(make_feedback(refused, False), 2 * step + 3)
    assert distance(wanted) < before / 2
    assert distance(refused) > 0.25


def test_rejection_alone_pushes_away(stream: list[Batch]) -> None:
    """Adjustments that were applied and rejected are farther from what is proposed next."""
    learner = Learner(0, "cpu")
    given = learner.train(stream[0], 1).dendrites
    learner.feedback(make_feedback(given, False), 2)
    after = learner.predict(stream[0].input_data).dendrites.mean(0)
    assert np.square(after - given).mean() > 1e-3


def test_the_same_seed_and_events_give_the_same_bits(stream: list[Batch]) -> None:
    """Two learners agree in every bit, whatever the global random state; another seed or order does not."""

    def learn(seed: int, order: list[int]) -> str:
        torch.manual_seed(np.random.default_rng().integers(2**31))
        learner = Learner(seed, "cpu")
        for step, index in enumerate(order):
            learner.train(stream[index], step + 1)
        return state_hash(learner)

    assert learn(5, [0, 1, 2]) == learn(5, [0, 1, 2])
    assert learn(5, [0, 1, 2]) != learn(6, [0, 1, 2])
    assert learn(5, [0, 1, 2]) != learn(5, [0, 2, 1])


def test_going_on_from_a_saved_state_changes_no_bit(stream: list[Batch]) -> None:
    """Saved and loaded in the middle, feedback included, the rest of the run ends in the same bits."""
    straight = Learner(5, "cpu")
    straight.train(stream[0], 1)
    straight.feedback(make_feedback(np.full(16, 0.3), True), 2)
    resumed = Learner(5, "cpu")
    resumed.load(straight.state())
    for learner in (straight, resumed):
        learner.train(stream[1], 3)
        learner.feedback(make_feedback(np.full(16, -0.3), False), 4)
        learner.train(stream[2], 5)
    assert state_hash(straight) == state_hash(resumed)


def test_a_state_is_a_copy(stream: list[Batch]) -> None:
    """Training on does not reach into a state given before."""
    learner = Learner(5, "cpu")
    before = learner.state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    learner.train(stream[0], 1)
    assert all(torch.equal(before[name], kept[name]) for name in kept)


def test_epochs_are_passes_over_the_batch(stream: list[Batch]) -> None:
    """Three epochs learn more from a batch than one, and the moments count its vectors once."""
    once, thrice = Learner(5, "cpu"), Learner(5, "cpu")
    batch = stream[0]
    once.train(batch, 1)
    lesson = thrice.train(Batch(batch.input_data, batch.labels, epochs=3), 1)
    assert lesson.objectives["coherence"] < once.train(stream[1], 2).objectives["coherence"]
    assert thrice.model.surprise.inputs.count == (batch.labels != 1).sum()


def test_prediction_changes_nothing(stream: list[Batch]) -> None:
    """The state has the same bits after a prediction; one vector or many are judged alike."""
    learner = Learner(5, "cpu")
    learner.train(stream[0], 1)
    before = state_hash(learner)
    many = learner.predict(np.concatenate([batch.input_data for batch in stream * 3]))
    assert state_hash(learner) == before
    assert np.allclose(many.anomaly_prob[:1], learner.predict(stream[0].input_data[:1]).anomaly_prob, atol=2e-3)


def test_a_network_that_has_read_nothing_still_answers(stream: list[Batch]) -> None:
    """Prediction before the first batch gives finite numbers."""
    prediction = Learner(5, "cpu").predict(stream[0].input_data)
    assert np.isfinite(prediction.anomaly_prob).all()
    assert np.isfinite(prediction.coherence).all()


def test_one_vector_alone_can_be_learned_from(stream: list[Batch]) -> None:
    """A batch of one, labelled or not, keeps every tensor finite."""
    learner = Learner(5, "cpu")
    learner.train(stream[0][:1], 1)
    learner.train(make_batch(stream[0].input_data[1:2]), 2)
    assert all(torch.isfinite(tensor).all() for tensor in learner.state().values())


def test_a_state_that_does_not_fit_is_refused_whole(stream: list[Batch]) -> None:
    """A missing, surplus or misshapen tensor is named, and nothing is loaded."""
    learner, other = Learner(5, "cpu"), Learner(6, "cpu").state()
    name = "model.layer3.read.weight"
    before = state_hash(learner)
    for damaged in (
        {key: tensor for key, tensor in other.items() if key != name},
        {**other, "model.extra": torch.zeros(1)},
        {**other, name: other[name][:5]},
        {**other, name: other[name].double()},
    ):
        with pytest.raises(WorkerError, match=r"model\.(layer3\.read\.weight|extra)"):
            learner.load(damaged)
    assert state_hash(learner) == before


def test_an_absent_device_is_named() -> None:
    """A device that is not there is an error with its mend, not a traceback."""
    with pytest.raises(RequestError, match=r"«mps».*--device cpu"):
        Learner(0, "mps")


def test_another_process_reaches_the_same_bits(stream: list[Batch]) -> None:
    """A fresh interpreter ends in the state that this one has: what the promise to replay rests on."""
    code = (
        "from tests.core.omega.test_learner import *\n"
        "batch = draw('temporal', 6 * 32, 1)\n"
        "learner = Learner(5, 'cpu')\n"
        "for step in range(3): learner.train(batch[step * 32 : step * 32 + 32], step + 1)\n"
        "print(state_hash(learner))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    learner = Learner(5, "cpu")
    for step in range(3):
        learner.train(stream[step], step + 1)
    assert done.stdout.strip() == state_hash(learner)


def test_no_accepted_input_makes_the_state_unusable() -> None:
    """Numbers of every size that a worker lets in, constant or wildly mixed, leave everything finite."""
    rng, learner = np.random.default_rng(0), Learner(0, "cpu")
    shape = (6, 1600)
    extremes = [
        np.zeros(shape),
        np.full(shape, 1e9),
        rng.choice([-1e9, 0, 1e9], shape),
        rng.normal(size=shape) * 1e-30,
        rng.normal(size=shape) * 10.0 ** rng.uniform(-30, 8, (1, 1600)),
        rng.normal(size=shape) * 10.0 ** rng.uniform(-30, 8, (6, 1)),
    ]
    for step, values in enumerate(extremes):
        batch = make_batch(np.clip(values, -1e9, 1e9).astype(np.float32), rng.choice([-1, 0, 1], 6).tolist())
        assert np.isfinite(learner.train(batch, step + 1).loss)
        assert np.isfinite(learner.predict(batch.input_data).anomaly_prob).all()
    assert all(torch.isfinite(tensor).all() for tensor in learner.state().values())
