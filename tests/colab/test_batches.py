from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sheily_train.colab import batches
from sheily_train.colab.batches import (
    Batch,
    Feedback,
    batch_from_binary,
    batch_from_json,
    batch_to_binary,
    batch_to_json,
    feedback_from_binary,
    feedback_from_json,
    feedback_to_binary,
    feedback_to_json,
    make_batch,
    make_feedback,
)
from sheily_train.errors import RefusedError

PATIENT = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def vectors(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 1600)).astype(np.float32)


def same(left: Batch, right: Batch) -> bool:
    return (
        left.input_data.tobytes() == right.input_data.tobytes()
        and left.labels.tobytes() == right.labels.tobytes()
        and left.epochs == right.epochs
    )


@pytest.mark.parametrize("labels", [None, [0, 1, None], [1, 1, 0], np.array([0, 1, -1])])
def test_both_forms_give_the_batch_back(labels: Any) -> None:
    """A batch survives JSON and safetensors with every bit of its vectors, labels and epochs."""
    batch = make_batch(vectors(), labels, 4)
    assert same(batch_from_json(batch_to_json(batch)), batch)
    assert same(batch_from_binary(batch_to_binary(batch)), batch)


def test_binary_is_much_smaller_than_json() -> None:
    """A batch of 64 takes less than half the bytes in the binary form."""
    batch = make_batch(vectors(64), [0] * 64)
    assert 2 * len(batch_to_binary(batch)) < len(batch_to_json(batch))


def test_both_forms_give_the_feedback_back() -> None:
    """Feedback survives JSON and safetensors."""
    feedback = make_feedback(np.linspace(-1, 1, 16), True)
    for back in (
        feedback_from_json(feedback_to_json(feedback, "2026-01-31T12:00:00Z")),
        feedback_from_binary(feedback_to_binary(feedback)),
    ):
        assert back.adjustments.tobytes() == feedback.adjustments.tobytes()
        assert back.validated is True


def test_a_slice_is_a_batch() -> None:
    """A part of a batch keeps labels and epochs and is contiguous."""
    part = make_batch(vectors(5), [0, 1, 0, 1, 1], 2)[1:3]
    assert len(part) == 2
    assert part.labels.tolist() == [1, 0]
    assert part.epochs == 2
    assert part.input_data.flags.c_contiguous


ROW = [0.5] * 1600


def body(*samples: Any, **more: Any) -> bytes:
    return json.dumps({"samples": list(samples), **more}).encode()


DEEP = b"[" * 1000 + b"]" * 1000
"""Nested as deep as JSON is read, and deeper than Python writes a value."""

REFUSED_JSON = {
    "not JSON": (b"{", "no es JSON"),
    "NaN": (b'{"samples": [{"input_data": [NaN]}]}', "no es JSON"),
    "Infinity": (b'{"samples": [{"input_data": [Infinity]}]}', "no es JSON"),
    "1e999": (body({"input_data": ROW}).replace(b"0.5", b"1e999", 1), "."),
    "deep": (b"[" * 200_000, "no es JSON"),
    "deep inside": (b'{"samples":' + b"[" * 5000 + b"]" * 5000 + b"}", "no es JSON"),
    "a list": (b"[]", "no es un objeto"),
    "no samples": (b"{}", "samples"),
    "samples no list": (b'{"samples": 3}', "samples"),
    "empty batch": (body(), "0 muestras"),
    "100,000 samples": (b'{"samples": [' + b",".join([b"{}"] * 100_000) + b"]}", "100000 muestras"),
    "sample no object": (body(3), "Muestra 0"),
    "no vector": (body({"input_data": ROW}, {}), "Muestra 1"),
    "wrong length": (body({"input_data": ROW}, {"input_data": ROW[1:]}), "esperaban 1600, llegaron 1599, muestra 1"),
    "text inside": (body({"input_data": [*ROW[1:], "x"]}), "solo números"),
    "null inside": (body({"input_data": [*ROW[1:], None]}), "solo números"),
    "nested": (body({"input_data": [[0.5]] * 1600}), "."),
    "ragged": (body({"input_data": [*ROW[1:], [1, 2]]}), "solo números"),
    "huge": (body({"input_data": ROW}, {"input_data": [1e10, *ROW[1:]]}), "Muestra 1"),
    "huge integer": (body({"input_data": [10**30, *ROW[1:]]}), "."),
    "label 2": (body({"input_data": ROW, "anomaly_label": 2}), "Muestra 0"),
    "label 0.5": (body({"input_data": ROW, "anomaly_label": 0.5}), "Muestra 0"),
    "label text": (body({"input_data": ROW}, {"input_data": ROW, "anomaly_label": "1"}), "Muestra 1"),
    "label true": (body({"input_data": ROW, "anomaly_label": True}), "Muestra 0"),
    "label list": (body({"input_data": ROW, "anomaly_label": [1]}), "Muestra 0"),
    "label huge": (body({"input_data": ROW, "anomaly_label": 1e300}), "Muestra 0"),
    "epochs 0": (body({"input_data": ROW}, epochs=0), "epochs"),
    "epochs 101": (body({"input_data": ROW}, epochs=101), "epochs"),
    "epochs text": (body({"input_data": ROW}, epochs="2"), "epochs"),
    "epochs true": (body({"input_data": ROW}, epochs=True), "epochs"),
    "label deep": (body({"input_data": ROW, "anomaly_label": 0}).replace(b": 0}", b": " + DEEP + b"}"), "Muestra 0"),
    "epochs deep": (body({"input_data": ROW}, epochs=7).replace(b": 7}", b": " + DEEP + b"}"), "«epochs» es list"),
    "epochs long": (body({"input_data": ROW}, epochs="x" * 100_000), "epochs"),
    "not UTF-8": (b'{"samples": "\xff"}', "no es JSON"),
}


@pytest.mark.parametrize("case", REFUSED_JSON)
def test_json_that_is_no_batch_is_refused(case: str) -> None:
    """Each kind of bad JSON is refused in words that name it."""
    content, words = REFUSED_JSON[case]
    with pytest.raises(RefusedError, match=words) as caught:
        batch_from_json(content)
    assert 400 <= caught.value.status < 500
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(("count", "mend"), [(0, "Pon alguna muestra."), (100_000, "Divide el lote.")])
def test_a_batch_of_no_fitting_size_is_told_what_to_do(count: int, mend: str) -> None:
    """None at all are not divided."""
    with pytest.raises(RefusedError) as caught:
        batch_from_json(b'{"samples": [' + b",".join([b"{}"] * count) + b"]}")
    assert caught.value.mend == mend


REFUSED_FEEDBACK = {
    "not 16": (b'{"ajustes_aplicados": [0, 0], "validacion": true}', "esperaban 16 números, llegaron 2"),
    "out of range": (json.dumps({"ajustes_aplicados": [2] * 16, "validacion": True}).encode(), "fuera de"),
    "text": (json.dumps({"ajustes_aplicados": ["a"] * 16, "validacion": True}).encode(), "solo números"),
    "no list": (b'{"ajustes_aplicados": null, "validacion": true}', "solo números"),
    "no verdict": (json.dumps({"ajustes_aplicados": [0] * 16}).encode(), "validacion"),
    "verdict 1": (json.dumps({"ajustes_aplicados": [0] * 16, "validacion": 1}).encode(), "true o false"),
    "verdict deep": (b'{"ajustes_aplicados": [0], "validacion": ' + DEEP + b"}", "es list; se esperaba true"),
    "1e999": (b'{"ajustes_aplicados": [1e999], "validacion": true}', "."),
}


@pytest.mark.parametrize("case", REFUSED_FEEDBACK)
def test_json_that_is_no_feedback_is_refused(case: str) -> None:
    """Each kind of bad feedback is refused in words that name it."""
    content, words = REFUSED_FEEDBACK[case]
    with pytest.raises(RefusedError, match=words):
        feedback_from_json(content)


FINE = {"input_data": vectors(2)}
REFUSED_TENSORS: dict[str, dict[str, np.ndarray]] = {
    "no vectors": {"anomaly_label": np.zeros(2, np.int8)},
    "unknown tensor": {**FINE, "other": np.zeros(1)},
    "one dimension": {"input_data": np.zeros(1600, np.float32)},
    "wrong length": {"input_data": np.zeros((2, 1599), np.float32)},
    "no rows": {"input_data": np.zeros((0, 1600), np.float32)},
    "too many rows": {"input_data": np.zeros((batches.MAX_SAMPLES + 1, 1600), np.int8)},
    "NaN": {"input_data": np.full((1, 1600), np.nan, np.float32)},
    "infinite": {"input_data": np.full((1, 1600), np.inf, np.float32)},
    "booleans": {"input_data": np.zeros((1, 1600), bool)},
    "labels short": {**FINE, "anomaly_label": np.zeros(1, np.int8)},
    "labels scalar": {**FINE, "anomaly_label": np.array(1, np.int8)},
    "labels matrix": {**FINE, "anomaly_label": np.zeros((2, 2), np.int8)},
    "labels column": {**FINE, "anomaly_label": np.zeros((2, 1), np.int8)},
    "labels 2": {**FINE, "anomaly_label": np.array([0, 2], np.int8)},
    "labels NaN": {**FINE, "anomaly_label": np.array([0, np.nan], np.float32)},
    "epochs two": {**FINE, "epochs": np.array([1, 2], np.int32)},
    "epochs float": {**FINE, "epochs": np.array([1.0], np.float32)},
    "epochs 0": {**FINE, "epochs": np.array([0], np.int32)},
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_are_no_batch_are_refused(case: str) -> None:
    """Each kind of bad tensor is refused."""
    with pytest.raises(RefusedError):
        batch_from_binary(save(REFUSED_TENSORS[case]))


@pytest.mark.parametrize(
    "tensors",
    [
        {"ajustes_aplicados": np.zeros(16, np.float32)},
        {"ajustes_aplicados": np.zeros(15, np.float32), "validacion": np.array([1], np.uint8)},
        {"ajustes_aplicados": np.zeros(16, np.float32), "validacion": np.array([2], np.uint8)},
        {"ajustes_aplicados": np.zeros(16, np.float32), "validacion": np.array([1, 1], np.uint8)},
        {"ajustes_aplicados": np.full(16, np.nan, np.float32), "validacion": np.array([1], np.uint8)},
    ],
)
def test_tensors_that_are_no_feedback_are_refused(tensors: dict[str, np.ndarray]) -> None:
    """Each kind of bad feedback tensor is refused."""
    with pytest.raises(RefusedError):
        feedback_from_binary(save(tensors))


def check_both_decoders(content: bytes) -> None:
    refused: list[RefusedError] = []
    for decode, kind in ((batch_from_binary, Batch), (feedback_from_binary, Feedback)):
        try:
            assert isinstance(decode(content), kind)
        except RefusedError as error:
            refused.append(error)
    assert all(400 <= error.status < 500 and str(error) for error in refused)


@given(st.binary(max_size=2000))
@PATIENT
def test_any_bytes_are_decoded_or_refused(content: bytes) -> None:
    """Any bytes give a batch or a RefusedError, nothing else."""
    check_both_decoders(content)


DTYPES = st.sampled_from(
    [
        "F64",
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "F8_E5M2",
        "F4",
        "C64",
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "U64",
        "BOOL",
        "Q9",
    ]
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": DTYPES,
        "shape": st.lists(st.integers(-1, 1600) | st.integers(2**31, 2**64), max_size=3),
        "data_offsets": st.lists(st.integers(0, 7000), min_size=2, max_size=2),
    }
)
NAMES = st.sampled_from(
    ["input_data", "anomaly_label", "epochs", "ajustes_aplicados", "validacion", "__metadata__", "x", ""]
)


@given(st.dictionaries(NAMES, ENTRY | st.none() | st.integers() | st.text(max_size=3)), st.integers(0, 7000))
@PATIENT
def test_any_header_is_decoded_or_refused(header: dict[str, Any], size: int) -> None:
    """A file with a well-formed header of any types, shapes and offsets gives a batch or a RefusedError."""
    text = json.dumps(header).encode()
    check_both_decoders(struct.pack("<Q", len(text)) + text + b"\x01" * size)


SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U64": 8,
    "BOOL": 1,
}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["input_data", "anomaly_label", "epochs", "ajustes_aplicados", "validacion"]),
            st.sampled_from(sorted(SIZES)),
            st.sampled_from([[], [0], [1], [2], [16], [1, 1], [2, 1600], [1, 1600], [0, 1600], [2, 1], [1, 16]]),
        ),
        unique_by=lambda part: part[0],
    ),
    st.binary(min_size=1, max_size=8),
)
@PATIENT
def test_any_valid_file_is_decoded_or_refused(parts: list[tuple[str, str, list[int]]], filling: bytes) -> None:
    """A valid safetensors file of the right names and any types, shapes and bits gives a batch or a RefusedError."""
    header, end = {}, 0
    for name, dtype, shape in parts:
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    data = (filling * (end // len(filling) + 1))[:end]
    check_both_decoders(struct.pack("<Q", len(text)) + text + data)


@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["samples", "input_data", "anomaly_label", "epochs", "ajustes_aplicados", "validacion"]
                ),
                inner,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
@PATIENT
def test_any_json_is_decoded_or_refused(content: bytes) -> None:
    """Any JSON, and any bytes, give a batch or a RefusedError from the JSON decoders."""
    for decode in (batch_from_json, feedback_from_json):
        with suppress(RefusedError):
            decode(content)


@given(
    st.lists(
        st.one_of(
            st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=2), st.just([]), st.just({})
        ),
        min_size=2,
        max_size=2,
    )
)
@PATIENT
def test_any_labels_are_taken_or_refused(labels: list[Any]) -> None:
    """Two vectors with any two labels give a batch of 0, 1 and −1, or a RefusedError."""
    try:
        batch = make_batch(FINE["input_data"], labels)
    except RefusedError:
        return
    assert set(batch.labels.tolist()) <= {0, 1, -1}
