"""What the worker reads from a request: its media type, its body, its headers. What cannot be used is refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect

from sheily_train.colab.batches import (
    BINARY_FORM,
    JSON_FORM,
    Batch,
    Feedback,
    batch_from_binary,
    batch_from_json,
    feedback_from_binary,
    feedback_from_json,
    shown,
)
from sheily_train.colab.protocol import OWNER_HEADER, REBASE_HEADER, RUN_HEADER, Event, Kind, check_hash, check_run_id
from sheily_train.errors import RefusedError
from sheily_train.i18n import _

MAX_SEED = 2**63 - 1
MAX_OWNER = 10**14


@dataclass(frozen=True)
class RunRequest:
    """What ``POST /run`` asks for: a run, its seed, the highest owner known, and two chain values or nothing.

    Attributes:
        chain: that before the first event of a run that is new.
        rebase: that of the worker's own state, which is to be set aside.
    """

    run: str
    seed: int
    owner: int
    chain: str
    rebase: str


def body_form(request: Request) -> str:
    """The media type of the body: one of the two that are known; none at all means JSON."""
    form = request.headers.get("content-type", JSON_FORM).partition(";")[0].strip().lower()
    if form not in (JSON_FORM, BINARY_FORM):
        raise unknown_form(f"{JSON_FORM}, {BINARY_FORM}")
    return form


async def whole_body(request: Request) -> bytes:
    """Every byte of the body; one that was cut raises :class:`RefusedError`."""
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise damaged_body() from error


def read_event(event: Event, expected: str | None) -> tuple[str, Batch | Feedback]:
    """The event's digest, which must be the one expected, and what its body holds. Not for the event loop."""
    digest = event.digest()
    if expected is not None and digest != expected:
        raise damaged_body()
    return digest, read_content(event.kind, event.form, event.body)


def read_content(kind: Kind, form: str, body: bytes) -> Batch | Feedback:
    """What a body of that kind and media type holds."""
    if kind is Kind.TRAIN:
        return batch_from_json(body) if form == JSON_FORM else batch_from_binary(body)
    return feedback_from_json(body) if form == JSON_FORM else feedback_from_binary(body)


def read_run_request(form: str, body: bytes) -> RunRequest:
    """The body of ``POST /run``."""
    if form != JSON_FORM:
        raise unknown_form(JSON_FORM)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(_("El cuerpo no es JSON que se pueda leer.")) from error
    if not isinstance(content, dict) or not isinstance(content.get("run"), str):
        raise RefusedError(_("Falta «run», el nombre del entrenamiento."))
    seed, owner = content.get("seed", 0), content.get("owner", 0)
    for name, value, limit in (("seed", seed, MAX_SEED), ("owner", owner, MAX_OWNER)):
        if type(value) is not int or not 0 <= value <= limit:
            raise RefusedError(
                _("«{name}» es {found}; se esperaba un entero de 0 a {limit}.").format(
                    name=name, found=shown(value), limit=limit
                )
            )
    chain, rebase = (check_hash(content[name], name) if name in content else "" for name in ("chain", "rebase"))
    return RunRequest(check_run_id(content["run"]), seed, owner, chain, rebase)


def required_run(request: Request) -> str:
    """The run that the headers must name."""
    if RUN_HEADER not in request.headers:
        raise RefusedError(_("Falta la cabecera {name}.").format(name=RUN_HEADER))
    return check_run_id(request.headers[RUN_HEADER])


def required_owner(request: Request) -> int:
    """The owner that the headers must name."""
    text = request.headers.get(OWNER_HEADER, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise RefusedError(_("Falta la cabecera {name}, un número.").format(name=OWNER_HEADER))
    return int(text)


def rebase_chain(request: Request) -> str:
    """The chain value under which a state of another machine goes on; nothing for one of this kind."""
    return check_hash(request.headers[REBASE_HEADER], REBASE_HEADER) if REBASE_HEADER in request.headers else ""


def unknown_form(expected: str) -> RefusedError:
    """The refusal of a body of another media type."""
    return RefusedError(
        _("El tipo del cuerpo (Content-Type) no vale; se esperaba {expected}.").format(expected=expected),
        status=415,
        code="form",
    )


def damaged_body() -> RefusedError:
    """The refusal of a body that is not what its sender made; the client sends it again."""
    return RefusedError(
        _("El cuerpo no llegó entero: no es el que anuncia su sha256."), mend=_("Envíalo otra vez."), code="damaged"
    )


def sha256_of(content: bytes) -> str:
    """The sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
