"""Made-up vectors to try OMEGA 21 with: three kinds of signal, each with labelled anomalies.

A vector is 1,600 numbers, read as 25 subspaces (or windows) of 64. The world behind each kind (profiles, bands,
proportions) is fixed; the seed only draws from it, so what is learned with one seed holds for another.

The same seed and the same calls give the same bytes. Everything is computed in float64 and rounded to multiples of
1/1024 at the end, as a converter would, so that the last bit of a processor's sine does not show.

Anomalies are of every severity, from faint to plain, inside a normal data set that is itself varied: a detector that
sees no labels should find most and miss some, one that has seen a few hundred labels should find nearly all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from sheily_train.colab.batches import VECTOR, Batch
from sheily_train.errors import RequestError
from sheily_train.i18n import _

SUBSPACES = 25
WIDTH = 64
TYPES = ("simple", "temporal", "neuronal")
DEFAULT_SHARE = 0.1

_BLOCK = 512
_GRID = 1024.0
_SAMPLE_RATE = 256.0
_WORLD = 21

_Array = NDArray[np.float64]
_Damage = Callable[[Generator, _Array], None]


class GeneradorDatosEntrenamiento:
    """Draws batches; each call advances the generator, so the order of calls is part of what the seed decides.

    Args:
        semilla: a whole number from 0, or a sequence of them, as ``[7, 3]`` for the third session of run 7.

    Raises:
        RequestError: the seed is negative or no whole number.
    """

    def __init__(self, semilla: int | Sequence[int] = 42) -> None:
        numbers = list(semilla) if isinstance(semilla, Sequence) else [semilla]
        if not numbers or any(not isinstance(number, int) or number < 0 for number in numbers):
            raise RequestError(
                _("La semilla es {found!r}; se esperaba un entero desde 0, o varios.").format(found=semilla)
            )
        self._random = Generator(PCG64(numbers))

    def generar(self, tipo: str, cantidad: int, anomalias: float = DEFAULT_SHARE) -> Batch:
        """Vectors of the kind named ``simple``, ``temporal`` or ``neuronal``; see the method of each.

        Args:
            tipo: the kind.
            cantidad: N, from 1.
            anomalias: share of anomalies, 0 to 1; exactly ``round(cantidad * anomalias)`` vectors are anomalous.

        Returns:
            float32 [N, 1600] and labels 0 or 1, in random order. N may exceed what one request to a worker holds.

        Raises:
            RequestError: a kind, count or share that cannot be used.
        """
        makers = {
            "simple": self.generar_muestras,
            "temporal": self.generar_series_temporal,
            "neuronal": self.generar_patrones_neuronales,
        }
        if tipo not in makers:
            raise RequestError(
                _("Tipo de datos desconocido: «{found}»; se esperaba {known}.").format(
                    found=tipo, known=", ".join(TYPES)
                )
            )
        return makers[tipo](cantidad, anomalias)

    def generar_muestras(self, cantidad: int, anomalias: float = DEFAULT_SHARE) -> Batch:
        """Kind ``simple``: 25 sensors of 64 readings each, in units of a sensor's usual noise (1).

        Normal: each sensor's fixed profile (level within ±4, waveform up to ±2), six factors that move all sensors
        together, each in its own measure (together about 0.9), a gain of the whole vector (sd 8 %), noise whose
        size varies by a quarter between vectors, correlated over 4 readings within a sensor.
        Anomaly: 4 to 10 sensors, anywhere, are stuck at their first reading, gained (×1.9 to ×3.2) or shifted
        (all by the same 3.5 to 6.5, up or down), or 8 to 16 are swapped among themselves.
        """
        return self._batch(cantidad, anomalias, _simple)

    def generar_series_temporal(self, cantidad: int, anomalias: float = DEFAULT_SHARE) -> Batch:
        """Kind ``temporal``: a series of 1,600 samples, in units of its usual seasonal amplitude (1).

        Normal: a level (sd 0.7), a straight trend (sd 0.4 over the series), three seasonalities of random phase
        (periods around 320, 64 and 16 samples ± 12 %, amplitudes around 1, 0.8 and 0.6 ± 25 %), AR(1) noise
        (φ 0.2 to 0.7, sd around 0.2 ± 25 %).
        Anomaly: from some moment on, a level shift (3 to 6), a drift (8 to 13 a series length) or all seasonalities
        2.5 to 4 times as fast; or, for a while, a burst of noise (sd 1.5 to 3.5, 100 to 400 samples) or a flat line
        (160 to 480 samples).
        """
        return self._batch(cantidad, anomalias, _temporal)

    def generar_patrones_neuronales(self, cantidad: int, anomalias: float = DEFAULT_SHARE) -> Batch:
        """Kind ``neuronal``: 25 windows of 64 samples at 256 Hz (6.25 s of one electrode), in tens of µV.

        Normal: pink noise (power as 1/f to the 0.8–1.2), bands around 6, 10, 20 and 40 Hz (± 10 %) that wax and
        wane, each of a size of its own (± 40 %), the whole around 2 (± 25 %), and some isolated spikes of 3 to 8
        (Poisson, 2 a vector).
        Anomaly: a synchronous discharge (2.5–4 Hz, waves 5 to 10 high, spikes 2.5 times that, for 1.25 to 3.75 s),
        silence (5–20 % of the usual, for 1 to 3 s) or bursts of 65–100 Hz (3 to 7 high) in 4 to 10 windows anywhere.
        """
        return self._batch(cantidad, anomalias, _neuronal)

    def _batch(self, count: int, share: float, make: Callable[[Generator, NDArray[np.int8]], _Array]) -> Batch:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise RequestError(_("«cantidad» es {found!r}; se esperaba un entero desde 1.").format(found=count))
        if not 0 <= share <= 1:
            raise RequestError(_("«anomalias» es {found!r}; se esperaba una proporción de 0 a 1.").format(found=share))
        labels = np.zeros(count, np.int8)
        labels[: round(count * share)] = 1
        self._random.shuffle(labels)
        input_data = np.empty((count, VECTOR), np.float32)
        for start in range(0, count, _BLOCK):
            part = slice(start, start + _BLOCK)
            signal = make(self._random, labels[part])
            input_data[part] = np.rint(signal.reshape(-1, VECTOR) * _GRID) / _GRID
        return Batch(input_data, labels)


def _damage(rng: Generator, signal: _Array, rows: NDArray[np.intp], kinds: Sequence[_Damage]) -> None:
    """Each of the rows suffers one of the kinds, in place."""
    chosen = rng.integers(len(kinds), size=len(rows))
    for number, damage in enumerate(kinds):
        hit = rows[chosen == number]
        damaged = signal[hit]
        damage(rng, damaged)
        signal[hit] = damaged


def _per_row(rng: Generator, rows: int, low: float, high: float) -> _Array:
    """A number a row, [M, 1], evenly from ``low`` to ``high``."""
    return rng.uniform(low, high, (rows, 1))


def _sign(rng: Generator, rows: int) -> _Array:
    """−1 or 1 a row, [M, 1]."""
    return np.where(rng.integers(2, size=(rows, 1)), 1.0, -1.0)


def _some(rng: Generator, rows: int, low: int, high: int) -> NDArray[np.bool_]:
    """From ``low`` to ``high`` of the 25 subspaces, anywhere: bool [M, 25]."""
    ranks = np.argsort(rng.random((rows, SUBSPACES)), axis=1)
    return ranks < rng.integers(low, high + 1, (rows, 1))


def _stretch(rng: Generator, rows: int, low: int, high: int) -> NDArray[np.bool_]:
    """One run of ``low`` to ``high`` samples, anywhere: bool [M, 1600]."""
    length = rng.integers(low, high + 1, (rows, 1))
    start = np.floor(rng.random((rows, 1)) * (VECTOR - length))
    time = np.arange(VECTOR)
    return (time >= start) & (time < start + length)


def _waves(amplitude: _Array, frequency: _Array, phase: _Array) -> _Array:
    """Sum of K sine waves a row, [N, 1600]; frequencies in cycles a sample. Sines of sums, so few are computed."""
    coarse = 2 * np.pi * (frequency[..., None] * (np.arange(SUBSPACES) * WIDTH) + phase[..., None])
    fine = 2 * np.pi * frequency[..., None] * np.arange(WIDTH)
    size = amplitude[..., None]
    left = np.concatenate([size * np.sin(coarse), size * np.cos(coarse)], axis=1)
    right = np.concatenate([np.cos(fine), np.sin(fine)], axis=1)
    waves: _Array = left.transpose(0, 2, 1) @ right
    return waves.reshape(-1, VECTOR)


def _coloured(rng: Generator, spectrum: _Array) -> _Array:
    """Stationary noise with the given amplitude spectrum [N, 801], sd 1 a row: [N, 1600]."""
    parts = rng.standard_normal((*spectrum.shape, 2))
    parts *= spectrum[..., None]
    noise: _Array = np.fft.irfft(parts.view(np.complex128)[..., 0], n=VECTOR, axis=1)
    power = np.einsum("nf,nf->n", spectrum, spectrum)
    noise *= (VECTOR / (2 * np.sqrt(power)))[:, None]
    return noise


@cache
def _sensors() -> tuple[_Array, _Array, _Array]:
    """The fixed world of kind simple: profile [1600], factors [6, 1600], colouring of noise [64, 64]."""
    rng = Generator(PCG64(_WORLD))
    level_S = rng.uniform(-4, 4, (SUBSPACES, 1))
    time = np.arange(WIDTH) / WIDTH
    waves = rng.uniform(0.5, 1.5, (SUBSPACES, 1)) * np.sin(
        2 * np.pi * (rng.integers(1, 4, (SUBSPACES, 1)) * time + rng.random((SUBSPACES, 1)))
    )
    waves += 0.5 * np.sin(2 * np.pi * (rng.integers(4, 7, (SUBSPACES, 1)) * time + rng.random((SUBSPACES, 1))))
    loadings = 0.35 * rng.standard_normal((6, SUBSPACES, 1)) * np.ones(WIDTH)
    distance = np.abs(np.subtract.outer(np.arange(WIDTH), np.arange(WIDTH)))
    colouring = np.linalg.cholesky(np.exp(-distance / 4.0)).T
    return (level_S + waves).reshape(-1), loadings.reshape(6, -1), colouring


def _simple(rng: Generator, labels: NDArray[np.int8]) -> _Array:
    count = len(labels)
    profile, loadings, colouring = _sensors()
    noise = (rng.standard_normal((count * SUBSPACES, WIDTH)) @ colouring).reshape(count, VECTOR)
    noise *= np.exp(0.25 * rng.standard_normal((count, 1)))
    gain = 1 + 0.08 * rng.standard_normal((count, 1))
    signal = gain * profile + rng.standard_normal((count, len(loadings))) @ loadings + noise
    signal_NSW = signal.reshape(count, SUBSPACES, WIDTH)
    _damage(rng, signal_NSW, np.flatnonzero(labels), (_stuck, _gained, _shifted, _swapped))
    return signal_NSW


def _stuck(rng: Generator, signal: _Array) -> None:
    hit = _some(rng, len(signal), 4, 10)
    held = signal[..., :1] + 0.05 * rng.standard_normal(signal.shape)
    signal[hit] = held[hit]


def _gained(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    hit = _some(rng, rows, 4, 10)[..., None]
    signal *= np.where(hit, _per_row(rng, rows, 1.9, 3.2)[..., None], 1)


def _shifted(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    hit = _some(rng, rows, 4, 10)[..., None]
    signal += np.where(hit, (_sign(rng, rows) * _per_row(rng, rows, 3.5, 6.5))[..., None], 0)


def _swapped(rng: Generator, signal: _Array) -> None:
    """The chosen subspaces take each other's places, in a ring."""
    hit = _some(rng, len(signal), 8, 16)
    order = np.argsort(~hit, axis=1, kind="stable")
    places = np.broadcast_to(np.arange(SUBSPACES), hit.shape).copy()
    chosen = hit.sum(axis=1, keepdims=True)
    turned = np.take_along_axis(order, (np.arange(SUBSPACES) + 1) % chosen, axis=1)
    inside = np.arange(SUBSPACES) < chosen
    rows = np.broadcast_to(np.arange(len(hit))[:, None], hit.shape)
    places[rows[inside], order[inside]] = turned[inside]
    signal[:] = np.take_along_axis(signal, places[..., None], axis=1)


def _temporal(rng: Generator, labels: NDArray[np.int8]) -> _Array:
    count = len(labels)
    time = np.arange(VECTOR)
    amplitude = np.array([1.0, 0.8, 0.6]) * np.exp(0.25 * rng.standard_normal((count, 3)))
    frequency = np.exp(0.12 * rng.standard_normal((count, 3))) / np.array([320, 64, 16])
    phase = rng.random((count, 3))
    memory = _per_row(rng, count, 0.2, 0.7)
    turn = np.cos(2 * np.pi * np.fft.rfftfreq(VECTOR))
    noise = _coloured(rng, 1 / np.sqrt(1 + memory**2 - 2 * memory * turn))
    noise *= 0.2 * np.exp(0.25 * rng.standard_normal((count, 1)))
    signal = noise + _waves(amplitude, frequency, phase)
    signal += 0.7 * rng.standard_normal((count, 1)) + 0.4 * rng.standard_normal((count, 1)) * (time / VECTOR - 0.5)

    rows = np.flatnonzero(labels)
    kinds = rng.integers(5, size=len(rows))
    hit = rows[kinds == 0]
    signal[hit] += _change_of_frequency(rng, amplitude[hit], frequency[hit], phase[hit])
    _damage(rng, signal, rows[kinds > 0], (_level_shift, _burst, _flat_line, _drift))
    return signal


def _change_of_frequency(rng: Generator, amplitude: _Array, frequency: _Array, phase: _Array) -> _Array:
    """What to add so that all seasonalities run 2.5 to 4 times as fast from some moment on: [M, 1600]."""
    rows = len(amplitude)
    begin = _per_row(rng, rows, 0.1, 0.6) * VECTOR
    extra = _per_row(rng, rows, 1.5, 3.0)
    time = np.arange(VECTOR)
    warped = time + extra * np.maximum(0, time - begin)
    frequency_MK1, phase_MK1 = frequency[..., None], phase[..., None]
    faster = np.sin(2 * np.pi * (frequency_MK1 * warped[:, None] + phase_MK1))
    usual = np.sin(2 * np.pi * (frequency_MK1 * time + phase_MK1))
    added: _Array = np.einsum("mk,mkv->mv", amplitude, faster - usual)
    return added


def _level_shift(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    begin = _per_row(rng, rows, 0.1, 0.75) * VECTOR
    signal += (np.arange(VECTOR) >= begin) * _sign(rng, rows) * _per_row(rng, rows, 3, 6)


def _burst(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    noise = rng.standard_normal(signal.shape) * _per_row(rng, rows, 1.5, 3.5)
    signal += _stretch(rng, rows, 100, 400) * noise


def _flat_line(rng: Generator, signal: _Array) -> None:
    hit = _stretch(rng, len(signal), 160, 480)
    first = np.take_along_axis(signal, hit.argmax(axis=1)[:, None], axis=1)
    signal[:] = np.where(hit, first, signal)


def _drift(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    begin = _per_row(rng, rows, 0.0, 0.5) * VECTOR
    signal += _sign(rng, rows) * _per_row(rng, rows, 8, 13) * np.maximum(0, np.arange(VECTOR) - begin) / VECTOR


def _neuronal(rng: Generator, labels: NDArray[np.int8]) -> _Array:
    count = len(labels)
    hertz = np.fft.rfftfreq(VECTOR, 1 / _SAMPLE_RATE)
    spectrum = np.exp(-0.5 * _per_row(rng, count, 0.8, 1.2) * np.log(np.maximum(hertz, 0.5)))
    spectrum[:, 0] = 0
    for centre, width, size in ((6, 1.0, 0.7), (10, 1.0, 1.2), (20, 2.5, 0.4), (40, 4.0, 0.15)):
        middle = centre * np.exp(0.1 * rng.standard_normal((count, 1)))
        near = np.flatnonzero(np.abs(hertz - centre) < 6 * width)
        bump = np.exp(-0.5 * ((hertz[near] - middle) / width) ** 2)
        spectrum[:, near] += size * np.exp(0.4 * rng.standard_normal((count, 1))) * bump
    signal = _coloured(rng, spectrum)
    signal *= 2 * np.exp(0.25 * rng.standard_normal((count, 1)))
    _add_spikes(rng, signal, rng.poisson(2.0, count))
    _damage(rng, signal, np.flatnonzero(labels), (_discharge, _silence, _bursts))
    return signal


def _add_spikes(rng: Generator, signal: _Array, spikes: NDArray[np.int64]) -> None:
    """Isolated spikes of 12 samples (47 ms), sharp up and slow down, 3 to 8 high."""
    row = np.repeat(np.arange(len(spikes)), spikes)
    time = np.arange(12)
    shape = np.where(time < 3, time / 2, 1.6 * np.exp(-(time - 2) / 3) - 0.6)
    column = rng.integers(0, VECTOR - len(shape), len(row))
    height = rng.uniform(3, 8, len(row))
    places = row[:, None] * VECTOR + column[:, None] + time
    np.add.at(signal.reshape(-1), places.reshape(-1), (height[:, None] * shape).reshape(-1))


def _discharge(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    hertz = _per_row(rng, rows, 2.5, 4)
    turn = (np.arange(VECTOR) * hertz / _SAMPLE_RATE + rng.random((rows, 1))) % 1
    spike = 2.5 * np.exp(-(((turn - 0.2) / 0.04) ** 2))
    wave = np.sin(np.pi * np.clip((turn - 0.35) / 0.4, 0, 1))
    signal += _stretch(rng, rows, 320, 960) * _per_row(rng, rows, 5, 10) * (spike - wave)


def _silence(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    signal *= np.where(_stretch(rng, rows, 256, 768), _per_row(rng, rows, 0.05, 0.2), 1)


def _bursts(rng: Generator, signal: _Array) -> None:
    rows = len(signal)
    frequency = _per_row(rng, rows, 65, 100) / _SAMPLE_RATE
    wave = _waves(np.ones((rows, 1)), frequency, rng.random((rows, 1)))
    swell = np.sin(np.pi * (np.arange(WIDTH) + 0.5) / WIDTH)
    windows = (_some(rng, rows, 4, 10)[..., None] * swell).reshape(-1, VECTOR)
    signal += windows * _per_row(rng, rows, 3, 7) * wave
