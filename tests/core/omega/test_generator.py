from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sheily_train.colab.batches import MAX_SAMPLES, VECTOR, Batch
from sheily_train.core.omega import generator
from sheily_train.core.omega.generator import TYPES, GeneradorDatosEntrenamiento
from sheily_train.errors import RequestError

FROZEN = {
    "simple": "6a724d3f4b6226054149efdba32f5ed7793466e4826c43db32a946876e8729a5",
    "temporal": "8d5bc2338a22efc9bfbf873f4c6d55e69a4ff06926df447a6ca4a0aae88cb067",
    "neuronal": "843d3b58565f7422e4f5701f7c25acb53970ffc5dfc72b948002f64bb8ffe3b0",
}
"""sha256 of 40 vectors, half of them anomalies, of seed 7. Whoever changes the signals changes these on purpose."""


def digest(batch: Batch) -> str:
    return hashlib.sha256(batch.input_data.tobytes() + batch.labels.tobytes()).hexdigest()


def auroc(labels: NDArray[np.int8], scores: NDArray[np.float64]) -> float:
    ranks = np.argsort(np.argsort(scores)) + 1.0
    positive = labels == 1
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (~positive).sum()))


def statistics(batch: Batch) -> NDArray[np.float64]:
    """Mean, deviation and roughness of the 25 subspaces, as they stand and in order of size."""
    windows = batch.input_data.reshape(-1, 25, 64).astype(float)
    facts = np.stack([windows.mean(2), windows.std(2), np.abs(np.diff(windows, axis=2)).mean(2)], axis=1)
    jumps = np.abs(np.diff(facts, axis=2))
    parts = [facts, np.sort(facts, axis=2), np.sort(jumps, axis=2)]
    return np.concatenate([part.reshape(len(batch), -1) for part in parts], axis=1)


@pytest.mark.parametrize("tipo", TYPES)
def test_the_same_seed_gives_the_same_bytes_for_ever(tipo: str) -> None:
    """The bytes of a seed are those recorded here, on every machine and at every start."""
    assert digest(GeneradorDatosEntrenamiento(7).generar(tipo, 40, 0.5)) == FROZEN[tipo]


@pytest.mark.parametrize("tipo", TYPES)
def test_each_call_advances_the_generator(tipo: str) -> None:
    """Two calls give different vectors; a second generator of the seed repeats both in order; another seed neither."""
    first, second, other = (GeneradorDatosEntrenamiento(seed) for seed in (3, 3, 4))
    calls = [digest(first.generar(tipo, 5)) for _call in range(2)]
    assert calls[0] != calls[1]
    assert [digest(second.generar(tipo, 5)) for _call in range(2)] == calls
    assert digest(other.generar(tipo, 5)) not in calls


def test_a_seed_of_several_numbers() -> None:
    """A sequence is a seed of its own; one number and the sequence of it are the same."""
    drawn = {
        str(seed): digest(GeneradorDatosEntrenamiento(seed).generar("simple", 2)) for seed in (7, [7], [7, 1], [1, 7])
    }
    assert drawn["7"] == drawn["[7]"]
    assert len(set(drawn.values())) == 3


def test_the_kinds_go_by_name() -> None:
    """``generar`` gives what the method of that kind gives."""
    methods = {
        "simple": GeneradorDatosEntrenamiento.generar_muestras,
        "temporal": GeneradorDatosEntrenamiento.generar_series_temporal,
        "neuronal": GeneradorDatosEntrenamiento.generar_patrones_neuronales,
    }
    assert tuple(methods) == TYPES
    for tipo, method in methods.items():
        direct = method(GeneradorDatosEntrenamiento(1), 3, 0.4)
        assert digest(direct) == digest(GeneradorDatosEntrenamiento(1).generar(tipo, 3, 0.4))


@pytest.mark.parametrize("tipo", TYPES)
@settings(max_examples=25, deadline=None)
@given(cantidad=st.integers(1, 60), anomalias=st.floats(0, 1), semilla=st.integers(0, 2**128))
def test_any_count_and_share(tipo: str, cantidad: int, anomalias: float, semilla: int) -> None:
    """The share of anomalies is exact, and the vectors are sound: shape, type, finite, small, on the grid."""
    batch = GeneradorDatosEntrenamiento(semilla).generar(tipo, cantidad, anomalias)
    assert batch.input_data.shape == (cantidad, VECTOR)
    assert batch.input_data.dtype == np.float32
    assert batch.input_data.flags.c_contiguous
    assert batch.labels.dtype == np.int8
    assert batch.labels.sum() == round(cantidad * anomalias)
    assert np.abs(batch.input_data).max() < 200
    assert np.array_equal(batch.input_data * 1024, np.rint(batch.input_data * 1024))


@pytest.mark.parametrize("tipo", TYPES)
def test_more_than_one_block(tipo: str) -> None:
    """Of thousands of vectors, more than a request holds, none repeats, and anomalies stand anywhere."""
    batch = GeneradorDatosEntrenamiento(5).generar(tipo, MAX_SAMPLES + 100, 0.25)
    assert batch.labels.sum() == (MAX_SAMPLES + 100) / 4
    assert len(np.unique(batch.input_data[:, :8], axis=0)) == len(batch)
    thirds = [part.mean() for part in np.array_split(batch.labels, 3)]
    assert thirds == pytest.approx([0.25] * 3, abs=0.05)


@pytest.mark.parametrize("tipo", TYPES)
def test_five_hundred_vectors_in_no_time(tipo: str) -> None:
    """500 vectors take well under a second."""
    maker = GeneradorDatosEntrenamiento(1)
    maker.generar(tipo, 10)
    begin = time.perf_counter()
    maker.generar(tipo, 500)
    assert time.perf_counter() - begin < 0.5


@pytest.mark.parametrize("tipo", TYPES)
def test_anomalies_can_be_learned_but_not_read_off(tipo: str) -> None:
    """A linear rule on statistics of the subspaces finds another seed's anomalies; a vector's spread does not."""
    train, test = (GeneradorDatosEntrenamiento(seed).generar(tipo, 2000, 0.2) for seed in (1, 2))
    facts, others = statistics(train), statistics(test)
    centre, size = facts.mean(0), facts.std(0) + 1e-9
    facts, others = (facts - centre) / size, (others - centre) / size
    gram = facts.T @ facts + 20 * np.eye(facts.shape[1])
    weights = np.linalg.solve(gram, facts.T @ (train.labels - train.labels.mean()))
    assert auroc(test.labels, others @ weights) > 0.97
    spread = auroc(test.labels, test.input_data.std(axis=1).astype(float))
    assert 0.15 < spread < 0.85


@pytest.mark.parametrize("tipo", TYPES)
def test_normal_vectors_vary(tipo: str) -> None:
    """Size, level and course differ between normal vectors: there is nothing to learn by heart."""
    vectors = GeneradorDatosEntrenamiento(1).generar(tipo, 200, 0).input_data.astype(float)
    vectors -= vectors.mean(axis=0)
    spread = vectors.std(axis=1)
    assert spread.std() / spread.mean() > 0.1
    likeness = np.corrcoef(vectors)[np.triu_indices(200, 1)]
    assert np.abs(likeness).max() < 0.95


def test_swapped_sensors_are_the_same_sensors() -> None:
    """The swap moves 8 to 16 of the 25 subspaces, loses none and makes none up."""
    signal = np.tile(np.arange(25.0)[None, :, None], (300, 1, 64))
    generator._swapped(np.random.default_rng(1), signal)
    assert np.array_equal(np.sort(signal, axis=1)[..., 0], np.tile(np.arange(25.0), (300, 1)))
    moved = (signal[..., 0] != np.arange(25)).sum(axis=1)
    assert (moved.min(), moved.max()) == (8, 16)


def test_waves_are_sines() -> None:
    """The sums of angles give what the sines themselves give."""
    amplitude, frequency, phase = np.array([[1.0, 0.5]]), np.array([[0.003, 0.11]]), np.array([[0.2, 0.9]])
    turns = frequency[..., None] * np.arange(VECTOR) + phase[..., None]
    expected = (amplitude[..., None] * np.sin(2 * np.pi * turns)).sum(axis=1)
    assert np.allclose(generator._waves(amplitude, frequency, phase), expected, atol=1e-9)


@pytest.mark.parametrize("semilla", [-1, 1.5, "7", [], [3, -3], None])
def test_a_seed_that_is_none(semilla: Any) -> None:
    """A seed that is not made of whole numbers from 0 is refused, with what was found."""
    with pytest.raises(RequestError, match="semilla"):
        GeneradorDatosEntrenamiento(semilla)


@pytest.mark.parametrize(
    ("tipo", "cantidad", "anomalias", "named"),
    [
        ("otro", 5, 0.1, "otro"),
        ("simple", 0, 0.1, "cantidad"),
        ("simple", 2.5, 0.1, "cantidad"),
        ("temporal", True, 0.1, "cantidad"),
        ("neuronal", 5, -0.1, "anomalias"),
        ("simple", 5, 20, "anomalias"),
        ("simple", 5, float("nan"), "anomalias"),
    ],
)
def test_requests_that_cannot_be_met(tipo: str, cantidad: Any, anomalias: float, named: str) -> None:
    """An unknown kind, a count below 1 or a share outside 0 to 1 is refused, naming it."""
    with pytest.raises(RequestError, match=named):
        GeneradorDatosEntrenamiento(1).generar(tipo, cantidad, anomalias)


def test_no_torch() -> None:
    """Making and reading data starts without torch."""
    code = (
        "import sys, sheily_train.core.omega.generator, sheily_train.core.omega.vectors; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
