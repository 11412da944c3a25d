"""What a caller gives as vectors, as checked batches, and their bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheily_train.colab.batches import (
    BINARY_FORM,
    MAX_SAMPLES,
    VECTOR,
    Batch,
    Feedback,
    batch_to_binary,
    batch_to_json,
    feedback_to_binary,
    feedback_to_json,
    make_batch,
)
from sheily_train.errors import RefusedError, RequestError
from sheily_train.i18n import _

Samples = Batch | NDArray[Any] | Sequence[Mapping[str, Any]]
"""Vectors: a batch, an array [N, 1600], or objects with ``input_data`` and, maybe, ``anomaly_label``."""


@dataclass(frozen=True)
class Shuffled:
    """Some of a batch's vectors in an order of their own.

    A part is gathered when it is asked for: the batch may be a file's, and more than the memory holds.
    """

    batch: Batch
    order: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> Batch:
        rows = self.order[part]
        return Batch(self.batch.input_data[rows], self.batch.labels[rows], self.batch.epochs)


def one_batch(samples: Samples, epochs: int = 1) -> Batch:
    """The samples as one checked batch; :class:`RefusedError` names what is wrong with them."""
    if isinstance(samples, Batch):
        return make_batch(samples.input_data, samples.labels, epochs)
    if isinstance(samples, np.ndarray) or not samples:
        return make_batch(samples if len(samples) else np.empty((0, VECTOR)), None, epochs)
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or "input_data" not in sample:
            raise RefusedError(_("Muestra {index}: falta «input_data».").format(index=index))
    rows = [sample["input_data"] for sample in samples]
    return make_batch(rows, [sample.get("anomaly_label") for sample in samples], epochs)


def batches_of(samples: Samples, size: int, epochs: int = 1) -> list[Batch]:
    """The samples as checked batches of ``size``, the last one maybe smaller."""
    if not isinstance(size, int) or not 1 <= size <= MAX_SAMPLES:
        raise RequestError(
            _("El tamaño de lote es {found}; se esperaba de 1 a {limit}.").format(found=size, limit=MAX_SAMPLES)
        )
    if len(samples) <= size:
        return [one_batch(samples, epochs)]
    batches = []
    for start in range(0, len(samples), size):
        try:
            batches.append(one_batch(samples[start : start + size], epochs))
        except RefusedError as refusal:
            where = _("Lote {number}, desde la muestra {start}: {message}").format(
                number=len(batches) + 1, start=start, message=refusal.message
            )
            raise RefusedError(where, mend=refusal.mend, status=refusal.status, code=refusal.code) from refusal
    return batches


def encode(content: Batch | Feedback, form: str) -> bytes:
    """The content's bytes in a media type."""
    if isinstance(content, Batch):
        return batch_to_binary(content) if form == BINARY_FORM else batch_to_json(content)
    if form == BINARY_FORM:
        return feedback_to_binary(content)
    return feedback_to_json(content, datetime.now(UTC).isoformat(timespec="milliseconds"))
