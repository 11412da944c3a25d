"""What the worker answers: JSON, errors in their one form, and what there is to say of the network."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Response
from starlette.exceptions import HTTPException

from sheily_train.colab.batches import COHERENCE, DENDRITES, JSON_FORM, VECTOR
from sheily_train.colab.protocol import PROTOCOL
from sheily_train.errors import RefusedError
from sheily_train.i18n import _

MODEL_NAME = "CortezaCognitivaV4"
MODEL_VERSION = "4.0"


def json_answer(content: dict[str, Any]) -> Response:
    """A JSON answer; numpy arrays become lists."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON_FORM)


def error_answer(error: RefusedError) -> Response:
    """The one form of every error."""
    content = {"status": "error", "error": error.message, "help": error.mend, "code": error.code, **error.facts}
    headers = {"Retry-After": str(error.facts["retry_after"])} if "retry_after" in error.facts else None
    return Response(orjson.dumps(content), error.status, headers, JSON_FORM)


def http_error_answer(error: HTTPException, path: str) -> RefusedError:
    """What the framework refuses, in the worker's own form."""
    if error.status_code == 404:
        message, mend = _("No existe {path}.").format(path=path[:80]), _("Las direcciones que hay están en /docs.")
    elif error.status_code == 405:
        message, mend = _("{path} no admite ese método.").format(path=path[:80]), _("Los métodos están en /docs.")
    else:
        message, mend = _("La petición no vale: {reason}.").format(reason=error.detail), ""
    return RefusedError(message, mend=mend, status=error.status_code, code="http")


def describe_network(total: int, trainable: int) -> dict[str, Any]:
    """The answer of ``/info``, for a network of so many parameters."""
    return {
        "nombre": MODEL_NAME,
        "version": MODEL_VERSION,
        "arquitectura": {
            "capas": {
                "capa1": _("Entrada: {size} números, en el cliente").format(size=VECTOR),
                "capa2": _("LSTM y Transformer sobre 25 subespacios de 64"),
                "capa3": _("MLP residual, 512"),
                "capa4": _("Autoatención, 512"),
                "capa5": _("Tres cabezas: anomalía, dendritas y coherencia"),
            },
            "parametros_totales": total,
            "parametros_entrenables": trainable,
        },
        "flujo": {
            "entrada": f"[N, {VECTOR}]",
            "procesamiento": "capa2 → capa3 → capa4 → capa5",
            "salida": {
                "anomaly": _("1 número, de 0 a 1"),
                "dendrites": _("{size} números, de −1 a 1").format(size=DENDRITES),
                "coherence": _("{size} números, de −1 a 1").format(size=COHERENCE),
            },
        },
        "protocol": PROTOCOL,
    }
