"""What OpenAPI says of the worker: every request, every answer, with an example of each."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sheily_train.colab.batches import (
    BINARY_FORM,
    COHERENCE,
    DENDRITES,
    JSON_FORM,
    MAX_EPOCHS,
    MAX_MAGNITUDE,
    MAX_SAMPLES,
    NO_LABEL,
    VECTOR,
)
from sheily_train.colab.intake import MAX_OWNER, MAX_SEED
from sheily_train.colab.protocol import (
    ANONYMOUS_RUN,
    DIGEST_HEADER,
    OWNER_HEADER,
    PROTOCOL,
    REBASE_HEADER,
    RUN_HEADER,
)
from sheily_train.colab.responses import MODEL_NAME, describe_network
from sheily_train.colab.runs import Statistics
from sheily_train.i18n import _

RUN_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"}
SHA256_SCHEMA = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

_SOME = frozenset({409, 422, 503})
"""Statuses that only some endpoints have."""
_OPEN = frozenset({"fingerprint", "state_fingerprint", "objetivos"})
"""Objects whose keys differ from machine to machine, or that may be empty."""

_JsonSchema = dict[str, Any]


def describe_api(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    content = get_openapi(title=api.title, version=api.version, routes=api.routes, description=_api_description())
    error = {"status": "error", "error": "…", "help": "…", "code": "invalid"}
    content["components"] = {
        "schemas": {"Error": _schema_like(error)},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    }
    content["security"] = [{"token": []}]
    return content


def _api_description() -> str:
    return _(
        "OMEGA 21 aprende de lotes de vectores de 1600 números. Los clientes que quieren que cada lote se aplique una "
        "sola vez abren un entrenamiento con POST /run y numeran sus peticiones con las cabeceras Sheily-Run, "
        "Sheily-Seq, Sheily-Owner, Sheily-Time, Sheily-Digest y Sheily-Chain, todas o ninguna. "
        "Quien no las envía es atendido sin esa promesa."
    )


def describe_operations() -> dict[str, dict[str, Any]]:
    """What OpenAPI says of each endpoint, by the name of its function."""
    batch = _two_forms(_batch_schema(), {"samples": [{"input_data": [0.0] * VECTOR, "anomaly_label": 0}], "epochs": 1})
    feedback = _two_forms(_feedback_schema(), {"ajustes_aplicados": [0.0] * DENDRITES, "validacion": True})
    attachment = _one_form(JSON_FORM, _attachment_schema(), {"run": "principal", "seed": 0, "owner": 0})
    state = {"type": "string", "format": "binary"}
    named, of_run = (
        [_header_parameter(RUN_HEADER, RUN_SCHEMA, required=False)],
        _header_parameter(RUN_HEADER, RUN_SCHEMA),
    )
    by_owner = [
        of_run,
        _header_parameter(OWNER_HEADER, {"type": "integer", "minimum": 0, "maximum": MAX_OWNER}),
        _header_parameter(DIGEST_HEADER, SHA256_SCHEMA),
        _header_parameter(REBASE_HEADER, SHA256_SCHEMA, required=False),
    ]
    answers = {
        name: _one_form(JSON_FORM, _schema_like(example), example) for name, example in _sample_answers().items()
    }
    state_file = _one_form(BINARY_FORM, state)
    by_name, by_model, by_history = (409,), (409, 503), (409, 422, 503)
    return {
        "train": _operation(_("Aprende de un lote"), answers["train"], body=batch, refusals=by_history),
        "feedback": _operation(
            _("Aprende de lo que dieron los ajustes dendríticos de un lote"),
            answers["feedback"],
            body=feedback,
            refusals=by_history,
        ),
        "predict": _operation(
            _("Juzga vectores sin aprender de ellos"), answers["predict"], body=batch, headers=named, refusals=by_model
        ),
        "status": _operation(_("Lo aprendido hasta ahora"), answers["status"], headers=named, refusals=by_name),
        "health": {**_operation(_("Si el trabajador vive"), answers["health"]), "security": []},
        "info": _operation(_("Cómo es la red"), answers["info"], headers=named, refusals=by_model),
        "diagnose": _operation(
            _("Pasa un vector de prueba por la red"), answers["diagnose"], headers=named, refusals=by_model
        ),
        "metricas": _operation(
            _("Las últimas pérdidas y hacia dónde van"), answers["metricas"], headers=named, refusals=by_name
        ),
        "look": _operation(
            _("Dónde está un entrenamiento; ni lo toma ni cambia nada"),
            answers["look"],
            headers=[of_run],
            refusals=(422, 503),
        ),
        "attach": _operation(
            _("Toma o empieza un entrenamiento"), answers["attach"], body=attachment, refusals=by_history
        ),
        "download": _operation(
            _("El estado entero de un entrenamiento"), state_file, headers=[of_run], refusals=by_model
        ),
        "upload": _operation(
            _("Pone un estado descargado en el lugar del propio"),
            answers["upload"],
            body=state_file,
            headers=by_owner,
            refusals=by_history,
        ),
        "prometheus": _operation(_("Los contadores, para Prometheus"), _one_form("text/plain", {"type": "string"})),
    }


def _batch_schema() -> _JsonSchema:
    value = {"type": "number", "minimum": -MAX_MAGNITUDE, "maximum": MAX_MAGNITUDE}
    sample = {
        "type": "object",
        "properties": {
            "input_data": _list_schema(value, VECTOR, VECTOR),
            "anomaly_label": {"enum": [0, 1, NO_LABEL, None]},
        },
        "required": ["input_data"],
    }
    epochs = {"type": "integer", "minimum": 1, "maximum": MAX_EPOCHS}
    properties = {"samples": _list_schema(sample, 1, MAX_SAMPLES), "epochs": epochs}
    return {"type": "object", "properties": properties, "required": ["samples"]}


def _feedback_schema() -> _JsonSchema:
    adjustment = {"type": "number", "minimum": -1, "maximum": 1}
    properties = {
        "ajustes_aplicados": _list_schema(adjustment, DENDRITES, DENDRITES),
        "validacion": {"type": "boolean"},
        "timestamp": {},
    }
    return {"type": "object", "properties": properties, "required": ["ajustes_aplicados", "validacion"]}


def _attachment_schema() -> _JsonSchema:
    properties = {
        "run": {**RUN_SCHEMA, "not": {"const": ANONYMOUS_RUN}},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 0},
        "owner": {"type": "integer", "minimum": 0, "maximum": MAX_OWNER, "default": 0},
        "chain": {**SHA256_SCHEMA, "description": _("La cadena antes del primer evento, si es nuevo.")},
        "rebase": {**SHA256_SCHEMA, "description": _("La cadena del estado del trabajador que se aparta.")},
    }
    return {"type": "object", "properties": properties, "required": ["run"]}


def _list_schema(items: _JsonSchema, least: int, most: int) -> _JsonSchema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _sample_answers() -> dict[str, Any]:
    """An answer of each endpoint, by the name of its function; the schemas follow from them."""
    moment, chain = "2026-01-31T12:00:00+00:00", "0" * 64
    dendrites, coherence = [0.1] * DENDRITES, [0.1] * COHERENCE
    machine = {"tiempo_transcurrido_seg": 12.5, "dispositivo": "cuda", "gpu_memoria_mb": 420.5}
    shapes = {"anomaly": [1], "dendrites": [1, DENDRITES], "coherence": [1, COHERENCE]}
    place = {
        "status": "ok",
        "run": "principal",
        "seed": 0,
        "owner": 1,
        "last_seq": 0,
        "chain": chain,
        "fingerprint": {"device": "cuda"},
        "boot": "0" * 16,
        "protocol": PROTOCOL,
        "max_samples": MAX_SAMPLES,
        "queue": 8,
    }
    return {
        "train": {
            "status": "trained",
            "loss": 0.23,
            "anomaly_prob": 0.45,
            "dendrites": dendrites,
            "coherence": coherence,
            "batch_size": 64,
            "outputs": {"anomaly_prob": 0.45, "dendrite_adjustments": dendrites, "coherence_state": coherence},
            "capa_info": {"capa2_activations": 0.5, "capa3_activations": 0.5, "capa4_activations": 0.5},
            "timestamp": moment,
            "anomalias": 6,
            "objetivos": {},
        },
        "feedback": {
            "status": "feedback_recibido",
            "validacion": True,
            "timestamp": moment,
            "estadisticas": Statistics().summary(),
        },
        "predict": {"status": "ok", "anomaly_prob": [0.02], "threshold": 0.5},
        "status": {
            "status": "online",
            "modelo": MODEL_NAME,
            "estadisticas": {**Statistics().summary(), **machine},
            "torch_version": "2.10.0",
            "cuda_available": True,
        },
        "health": {"alive": True, "timestamp": moment, "uptime_seconds": 12.5},
        "info": describe_network(12_000_000, 12_000_000),
        "diagnose": {
            "status": "diagnostico_ok",
            "test_input_shape": [1, VECTOR],
            "outputs_shapes": shapes,
            "gpu_info": {"cuda": True, "device": "cuda"},
        },
        "metricas": {**Statistics().trend(), "ultimos_20_losses": [0.23]},
        "look": {**place, "known": True, "state_fingerprint": {"device": "cuda"}},
        "attach": place,
        "upload": {"status": "ok", "last_seq": 7, "chain": chain},
    }


def _schema_like(example: Any) -> _JsonSchema:
    """The schema of values like this one; objects may hold more."""
    if isinstance(example, dict):
        properties = {
            name: {"type": "object"} if name in _OPEN else _schema_like(value) for name, value in example.items()
        }
        return {"type": "object", "properties": properties, "required": list(properties)}
    if isinstance(example, list):
        return {"type": "array", "items": _schema_like(example[0])}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": kinds[type(example)]}


def _one_form(form: str, schema: _JsonSchema, example: Any = None) -> dict[str, Any]:
    """A body, or an answer, of one media type."""
    return {form: {"schema": schema} if example is None else {"schema": schema, "example": example}}


def _two_forms(schema: _JsonSchema, example: dict[str, Any]) -> dict[str, Any]:
    """A body that may come as JSON or as safetensors."""
    binary = {"type": "string", "format": "binary", "description": _("Los mismos datos como archivo safetensors.")}
    return {**_one_form(JSON_FORM, schema, example), **_one_form(BINARY_FORM, binary)}


def _header_parameter(name: str, schema: _JsonSchema, *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "schema": schema}


def _operation(
    summary: str,
    answer: dict[str, Any],
    *,
    body: dict[str, Any] | None = None,
    headers: list[dict[str, Any]] | None = None,
    refusals: tuple[int, ...] = (),
) -> dict[str, Any]:
    """What OpenAPI says of one endpoint; ``refusals`` are those that not every endpoint has."""
    error = _one_form(JSON_FORM, {"$ref": "#/components/schemas/Error"})
    refused = {
        status: {"description": meaning, "content": error}
        for status, meaning in _refusals().items()
        if status in refusals or status not in _SOME
    }
    content: dict[str, Any] = {
        "summary": summary,
        "responses": {200: {"description": _("Hecho."), "content": answer}, **refused},
    }
    if body:
        content["requestBody"] = {"content": body, "required": True}
    if headers:
        content["parameters"] = headers
    return content


def _refusals() -> dict[int, str]:
    """Every status of an error, and what it means; after a 4xx nothing has changed."""
    return {
        400: _("La petición no vale."),
        401: _("Falta el token, o es otro."),
        403: _("Una página de otro sitio, a un trabajador sin token."),
        408: _("El cuerpo no llegó a tiempo."),
        409: _("El trabajador no está donde el cliente cree: «code» dice por qué."),
        413: _("El cuerpo, o el lote, es demasiado grande."),
        415: _("El cuerpo viene comprimido, o es de otro tipo."),
        422: _("No es la historia, la semilla o la red de este entrenamiento."),
        429: _("Esperan demasiadas peticiones, o llegaron demasiados tokens equivocados."),
        500: _("El trabajador falló; su registro dice por qué."),
        503: _("El trabajador se para, vuelve a su última copia o no puede escribir: repite la petición."),
    }
