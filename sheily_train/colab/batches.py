"""What the client sends and the worker learns from, and its two forms on the wire: JSON and safetensors.

JSON is what OMEGA 21 v4.0 clients speak. The binary form is two to five times smaller: a safetensors file with the
tensors ``input_data`` (float32 [N, 1600]), ``anomaly_label`` (int8 [N], −1 where there is no label; may be absent) and
``epochs`` (int32 [1]; may be absent), or ``ajustes_aplicados`` (float32 [16]) and ``validacion`` (uint8 [1]).

Whatever is not exactly that raises :class:`~sheily_train.errors.RefusedError`, which names the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from sheily_train.errors import RefusedError
from sheily_train.i18n import _

VECTOR = 1600
DENDRITES = 16
COHERENCE = 64
NO_LABEL = -1

MAX_SAMPLES = 4096
MAX_EPOCHS = 100
MAX_MAGNITUDE = 1e9
MAX_HEADER_BYTES = 64 * 1024

JSON_FORM = "application/json"
BINARY_FORM = "application/x-safetensors"


@dataclass(frozen=True)
class Batch:
    """Vectors to learn from, or to judge.

    Attributes:
        input_data: float32 [N, 1600], finite, contiguous.
        labels: int8 [N]; 1 anomaly, 0 normal, −1 unknown.
        epochs: how often the worker passes over the batch.
    """

    input_data: NDArray[np.float32]
    labels: NDArray[np.int8]
    epochs: int = 1

    def __len__(self) -> int:
        return len(self.input_data)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(np.ascontiguousarray(self.input_data[part]), self.labels[part], self.epochs)


@dataclass(frozen=True)
class Feedback:
    """What came of applying a batch's dendrite adjustments: float32 [16] in −1..1, and whether it was good."""

    adjustments: NDArray[np.float32]
    validated: bool


def make_batch(input_data: Any, labels: Any = None, epochs: int = 1) -> Batch:
    """A checked batch from anything numpy can read: [N, 1600] numbers and, maybe, N labels (0, 1, −1 or None)."""
    if not isinstance(epochs, int) or isinstance(epochs, bool) or not 1 <= epochs <= MAX_EPOCHS:
        raise RefusedError(
            _("«epochs» es {found}; se esperaba un entero de 1 a {limit}.").format(
                found=shown(epochs), limit=MAX_EPOCHS
            )
        )
    inputs_NV = _matrix(input_data)
    return Batch(inputs_NV, _labels(labels, len(inputs_NV)), epochs)


def make_feedback(adjustments: Any, validated: Any) -> Feedback:
    """Checked feedback from a sequence of 16 numbers in −1..1 and a boolean."""
    if not isinstance(validated, bool | np.bool_):
        raise RefusedError(_("«validacion» es {found}; se esperaba true o false.").format(found=shown(validated)))
    values_D = _numbers(adjustments, _("«ajustes_aplicados»"))
    if values_D.shape != (DENDRITES,):
        raise RefusedError(
            _("«ajustes_aplicados»: se esperaban {expected} números, llegaron {found}.").format(
                expected=DENDRITES, found=values_D.size
            )
        )
    if not np.all(np.abs(values_D) <= 1):
        raise RefusedError(_("«ajustes_aplicados» tiene valores fuera de −1..1."))
    return Feedback(values_D, bool(validated))


def batch_from_json(body: bytes) -> Batch:
    """The batch in a v4.0 body: ``{"samples": [{"input_data": [1600], "anomaly_label": 0 or 1}], "epochs": 1}``."""
    content = _json_object(body)
    samples = content.get("samples")
    if not isinstance(samples, list):
        raise RefusedError(_("Falta «samples»: una lista de objetos con «input_data»."))
    _check_count(len(samples))
    rows, labels = [], []
    for index, sample in enumerate(samples):
        row = sample.get("input_data") if isinstance(sample, dict) else None
        if not isinstance(row, list):
            raise RefusedError(_("Muestra {index}: falta «input_data», una lista de números.").format(index=index))
        if len(row) != VECTOR:
            raise RefusedError(
                _("Se esperaban {expected}, llegaron {found}, muestra {index}.").format(
                    expected=VECTOR, found=len(row), index=index
                ),
                mend=_("Cada «input_data» lleva {expected} números.").format(expected=VECTOR),
            )
        rows.append(row)
        labels.append(sample.get("anomaly_label"))
    return make_batch(rows, labels, content.get("epochs", 1))


def batch_to_json(batch: Batch) -> bytes:
    """A v4.0 body; the numbers read back are the very float32 values."""
    samples = [
        {"input_data": row} if label == NO_LABEL else {"input_data": row, "anomaly_label": int(label)}
        for row, label in zip(batch.input_data, batch.labels, strict=True)
    ]
    return orjson.dumps({"samples": samples, "epochs": batch.epochs}, option=orjson.OPT_SERIALIZE_NUMPY)


def batch_from_binary(body: bytes) -> Batch:
    """The batch in a safetensors body."""
    tensors = _tensors(body, {"input_data", "anomaly_label", "epochs"})
    if "input_data" not in tensors:
        raise RefusedError(_("Falta el tensor «input_data»."))
    epochs = tensors.get("epochs", np.array([1]))
    if epochs.size != 1 or epochs.dtype.kind not in "iu":
        raise RefusedError(_("El tensor «epochs» no es un entero."))
    return make_batch(tensors["input_data"], tensors.get("anomaly_label"), int(epochs.item()))


def batch_to_binary(batch: Batch) -> bytes:
    """A safetensors body."""
    tensors: dict[str, NDArray[Any]] = {"input_data": batch.input_data, "epochs": np.array([batch.epochs], np.int32)}
    if np.any(batch.labels != NO_LABEL):
        tensors["anomaly_label"] = batch.labels
    return save_safetensors(tensors)


def feedback_from_json(body: bytes) -> Feedback:
    """The feedback in a v4.0 body: ``{"ajustes_aplicados": [16], "validacion": bool, "timestamp": …}``."""
    content = _json_object(body)
    for name in ("ajustes_aplicados", "validacion"):
        if name not in content:
            raise RefusedError(_("Falta «{name}».").format(name=name))
    return make_feedback(content["ajustes_aplicados"], content["validacion"])


def feedback_to_json(feedback: Feedback, timestamp: str) -> bytes:
    """A v4.0 body."""
    content = {
        "ajustes_aplicados": feedback.adjustments,
        "validacion": feedback.validated,
        "timestamp": timestamp,
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def feedback_from_binary(body: bytes) -> Feedback:
    """The feedback in a safetensors body."""
    tensors = _tensors(body, {"ajustes_aplicados", "validacion"})
    if len(tensors) != 2:
        raise RefusedError(_("Faltan los tensores «ajustes_aplicados» y «validacion»."))
    validated = tensors["validacion"]
    if validated.size != 1 or validated.item() not in (0, 1):
        raise RefusedError(_("El tensor «validacion» no es 0 ni 1."))
    return make_feedback(tensors["ajustes_aplicados"], bool(validated.item()))


def feedback_to_binary(feedback: Feedback) -> bytes:
    """A safetensors body."""
    return save_safetensors(
        {"ajustes_aplicados": feedback.adjustments, "validacion": np.array([feedback.validated], np.uint8)}
    )


def shown(value: Any) -> str:
    """The beginning of a value that cannot be used; of one that is nested too deep to be written, what it is."""
    try:
        return repr(value)[:40]
    except RecursionError:
        return type(value).__name__


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_SAMPLES:
        raise RefusedError(
            _("El lote trae {found} muestras; se esperaban de 1 a {limit}.").format(found=count, limit=MAX_SAMPLES),
            mend=_("Divide el lote.") if count else _("Pon alguna muestra."),
            status=413 if count else 400,
        )


def _matrix(input_data: Any) -> NDArray[np.float32]:
    inputs_NV = _numbers(input_data, _("«input_data»"))
    if inputs_NV.ndim != 2 or inputs_NV.shape[1] != VECTOR:
        raise RefusedError(
            _("«input_data» tiene forma {found}; se esperaba [N, {expected}].").format(
                found=list(inputs_NV.shape), expected=VECTOR
            )
        )
    _check_count(len(inputs_NV))
    with np.errstate(invalid="ignore"):
        unusable = np.flatnonzero(~np.all(np.abs(inputs_NV) <= MAX_MAGNITUDE, axis=1))
    if unusable.size:
        raise RefusedError(
            _("Muestra {index}: hay un valor no finito o mayor que {limit:g} en magnitud.").format(
                index=unusable[0], limit=MAX_MAGNITUDE
            ),
            mend=_("Quita o corrige esa muestra."),
        )
    return inputs_NV


def _numbers(values: Any, name: str) -> NDArray[np.float32]:
    """The values as contiguous float32; text, nulls, booleans and ragged lists are refused, never converted."""
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu":
        raise RefusedError(_("{name}: se esperaban solo números.").format(name=name))
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def _labels(labels: Any, count: int) -> NDArray[np.int8]:
    values = [None] * count if labels is None else labels if isinstance(labels, list) else np.asarray(labels).tolist()
    if not isinstance(values, list) or len(values) != count:
        raise RefusedError(_("Se esperaba una etiqueta por muestra: {count} en total.").format(count=count))
    for index, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or value not in (0, 1, NO_LABEL)):
            raise RefusedError(
                _("Muestra {index}: «anomaly_label» es {found}; se esperaba 0 o 1.").format(
                    index=index, found=shown(value)
                )
            )
    return np.array([NO_LABEL if value is None else value for value in values], np.int8)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(
            _("El cuerpo no es JSON que se pueda leer: {reason}.").format(reason=str(error).rstrip(".")),
            mend=_("NaN, Infinity y números sin fin no son JSON."),
        ) from error
    if not isinstance(content, dict):
        raise RefusedError(_("El cuerpo JSON no es un objeto."))
    return content


def _tensors(body: bytes, known: set[str]) -> dict[str, NDArray[Any]]:
    header = int.from_bytes(body[:8], "little")
    if len(body) < 8 or header > min(MAX_HEADER_BYTES, len(body) - 8):
        raise RefusedError(_("El cuerpo no es un archivo safetensors entero."))
    try:
        tensors: dict[str, NDArray[Any]] = load_safetensors(body)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RefusedError(_("El cuerpo no es un archivo safetensors entero.")) from error
    if unknown := sorted(set(tensors) - known):
        raise RefusedError(
            _("Tensor desconocido: «{name}»; se esperaban {known}.").format(
                name=unknown[0], known=", ".join(sorted(known))
            )
        )
    return tensors
