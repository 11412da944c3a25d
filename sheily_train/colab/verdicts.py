"""What a worker's reply means, and that of a tunnel, or of another program, in its place.

Answer         a worker's JSON object, with all that it must hold
Hiccup         no answer, or one that a tunnel made: the request is worth another attempt
OutOfStep      the worker is not where the client thought: it is attached to again
RefusedError   the worker does not accept the request: it is never sent again
WorkerError    something else answered
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx2
import orjson

from sheily_train.colab.answers import misfit
from sheily_train.colab.html_page import page_title
from sheily_train.colab.screen import printable
from sheily_train.errors import OutOfStep, RefusedError, UnreachableError, WorkerError
from sheily_train.i18n import _

_AWAY = {408, 429, 502, 503, 504, *range(520, 531)}
_OUT_OF_STEP = {"gap", "detached", "restarted"}


class Hiccup(Exception):
    """A request that is worth another attempt.

    Args:
        reason: one word for the records.
        text: what happened, for a person.
        wait: how many seconds the other side asked for.
        final: what it becomes when no attempt helped.
    """

    def __init__(
        self, reason: str, text: str, *, wait: float | None = None, final: type[WorkerError] = UnreachableError
    ) -> None:
        super().__init__(text)
        self.reason, self.text, self.wait, self.final = reason, text, wait, final


_REASONS = {
    "connection": _("no hay conexión"),
    "timeout": _("no contestó a tiempo"),
    "cut": _("la respuesta llegó cortada"),
    "html": _("contestó una página HTML"),
    "damaged": _("el envío llegó dañado"),
    "foreign": _("contestó otro trabajador"),
    "busy": _("el trabajador está ocupado"),
    "slow": _("el envío tardó demasiado"),
    "storage": _("el disco del trabajador no lo admite"),
    "gap": _("al trabajador le faltan eventos"),
    "detached": _("el trabajador ha arrancado de nuevo"),
    "restarted": _("el trabajador volvió a su última copia"),
    "ghost": _("una petición anterior llegó tarde"),
}


def reason_text(reason: str) -> str:
    """A :class:`Hiccup`'s one word for a person; what is not known stays as it is."""
    if reason.startswith("http-"):
        return _("contestó {status}").format(status=reason.removeprefix("http-"))
    return _REASONS.get(reason, reason)


@dataclass(frozen=True)
class Answer:
    """A worker's answer: its exact bytes, and the JSON object in them."""

    body: bytes
    content: dict[str, Any]


def read_reply(path: str, response: httpx2.Response, body: bytes) -> Answer:
    """The worker's answer in a reply; anything else is raised."""
    if response.status_code != 200:
        raise_refusal(response, body)
    answer = Answer(body, _json_object(response, body))
    if text := misfit(path, answer.content):
        raise foreign(text)
    return answer


def foreign(text: str) -> Hiccup:
    """What another worker answered, or this one to another question (a tunnel gave an answer twice): asked at once."""
    return Hiccup("foreign", text, wait=0.0, final=WorkerError)


def raise_refusal(response: httpx2.Response, body: bytes) -> NoReturn:
    """What a status other than 200 means."""
    status, content = response.status_code, _object(body) or {}
    code, wait = _words(content, "code"), response.headers.get("Retry-After", "")
    if code in _OUT_OF_STEP:
        expected = content.get("expected")
        raise OutOfStep(code, _text(content), expected if isinstance(expected, int) else None)
    if code == "damaged":
        raise Hiccup("damaged", _("El envío llegó dañado al trabajador."))
    if status in _AWAY and code != "auth":
        text = _text(content) if content else _away(status, page_title(response.headers, body))
        raise Hiccup(code or f"http-{status}", text, wait=float(wait) if wait.isascii() and wait.isdigit() else None)
    if status == 413 and not code:
        raise RefusedError(
            _("El túnel no deja pasar un envío tan grande."),
            mend=_("Divide el lote, o envíalo en forma binaria."),
            status=413,
            code="too_large",
        )
    if not content and (page := page_title(response.headers, body)):
        raise _html(page, status)
    if 300 <= status < 400:
        raise WorkerError(
            _("La dirección reenvía a otra: {place}.").format(
                place=printable(response.headers.get("Location", "?")[:200])
            ),
            mend=_("Usa esa dirección, si es la del trabajador."),
        )
    message, mend = (
        _text(content) or _("Contestó {status} sin explicación.").format(status=status),
        _words(content, "help"),
    )
    if not 400 <= status < 500:
        raise WorkerError(message, mend=mend or _("La causa está en el registro del trabajador."))
    known = ("self", "status", "error", "help", "code", "detail", "message", "mend")
    facts = {name: value for name, value in content.items() if name not in known and isinstance(value, int | str)}
    raise RefusedError(message, mend=mend, status=status, code=code or "http", **facts)


def _json_object(response: httpx2.Response, body: bytes) -> dict[str, Any]:
    """The JSON object of a reply with 200; anything else says what it was."""
    if page := page_title(response.headers, body):
        raise _html(page, response.status_code)
    content = _object(body)
    if content is None:
        raise Hiccup(
            "cut",
            _("La respuesta llegó cortada o dañada: {count} bytes que no son JSON entero.").format(count=len(body)),
        )
    if content.get("status") == "error":  # some v4.0 workers refuse with 200
        raise RefusedError(_text(content), mend=_words(content, "help"))
    return content


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _text(content: Mapping[str, Any]) -> str:
    return _words(content, "error", "detail")


def _words(content: Mapping[str, Any], *names: str) -> str:
    """What a reply says under the first of these names that it has."""
    return printable(str(next((content[name] for name in names if content.get(name)), ""))[:500])


def _html(page: str, status: int) -> Hiccup:
    return Hiccup(
        "html",
        _("En lugar del trabajador contestó una página HTML ({status}, «{title}»): el túnel o un portal.").format(
            status=status, title=page
        ),
    )


def _away(status: int, page: str | None) -> str:
    if page:
        return _("El túnel contestó {status} con una página HTML («{title}»).").format(status=status, title=page)
    return _("El túnel o el trabajador contestó {status}.").format(status=status)
