"""Who may speak to a worker, and how much: the token, the limits and the headers, before the app sees a request.

The worker's address is public, so every rule holds before a byte of the body is read, or while it streams:

    no token, a wrong one          401; only ``/health`` and the empty page ``/docs`` answer without it
    wrong tokens, many             429 with Retry-After; the right token is never locked out by them
    two Authorization headers      400
    a compressed body              415
    a body that is too long        413, by what it says and by what it is
    a body that is too slow        408
    a web page in a browser        403 where there is no token: another site could speak through the browser of a
                                   person who runs a worker with ``--no-auth``
"""

from __future__ import annotations

import asyncio
import hmac
import math
import re
import secrets
import time

import orjson
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sheily_train.colab.loopback import is_loopback
from sheily_train.colab.protocol import STATE_LIMIT
from sheily_train.errors import RefusedError, RequestError
from sheily_train.i18n import _

BODY_LIMIT = 192 * 1024 * 1024
"""Bytes of a body: the largest batch as JSON fits."""
BODY_SECONDS = 90.0
"""Seconds for a whole body; tunnels cut a request at 100."""

WRONG_TOKENS_A_MINUTE = 20
_PUBLIC_PATHS = frozenset({"/health", "/docs"})
_UPLOAD = ("PUT", "/state")
_LINGER_BYTES = 4 * 1024 * 1024
_LINGER_SECONDS = 2.0
_TOKEN_SHAPE = re.compile(r"[A-Za-z0-9._~-]{20,512}")
_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_DOCS_POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    b"style-src 'unsafe-inline' https://cdn.jsdelivr.net; font-src https://cdn.jsdelivr.net; "
    b"img-src 'self' data: https://cdn.jsdelivr.net; connect-src 'self'; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def new_token() -> str:
    """A token of 256 random bits, in letters that an address can carry."""
    return secrets.token_urlsafe(32)


def check_token(token: str, mend: str = "") -> str:
    """The token itself, when an HTTP header can carry it and it cannot be guessed; else :class:`RequestError`."""
    if not _TOKEN_SHAPE.fullmatch(token):
        raise RequestError(
            _("El token no vale: se esperaban de 20 a 512 letras sin acento, cifras o los signos . _ ~ -"),
            mend=mend or _("Quita --token y SHEILY_WORKER_TOKEN, y el trabajador hará uno."),
        )
    return token


class Guard:
    """ASGI middleware that lets through only requests that are allowed and bodies that are bounded.

    Args:
        app: what answers the requests that pass. It never sees the Authorization header.
        token: what ``Authorization: Bearer`` must carry; ``None`` asks for none, and then only programs of this
            machine are answered.
        body_limit: the most bytes of a request's body.
        body_seconds: the most seconds from the first read of a body to its last byte.
        upload_limit: the most bytes of ``PUT /state``, for which the seconds grow in proportion.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        *,
        body_limit: int = BODY_LIMIT,
        body_seconds: float = BODY_SECONDS,
        upload_limit: int = STATE_LIMIT,
    ) -> None:
        if token is not None and not token.strip():
            raise RequestError(_("El token está vacío."))
        self._app = app
        self._token = None if token is None else token.encode()
        self._body_limit = body_limit
        self._body_seconds = body_seconds
        self._upload_limit = upload_limit
        self._failures = MovingWindowRateLimiter(MemoryStorage())
        self._failure_rate = RateLimitItemPerMinute(WRONG_TOKENS_A_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection: HTTP is checked, lifespan passes, anything else is closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, seconds = self._body_limit, self._body_seconds
        if (scope["method"], scope["path"]) == _UPLOAD:
            limit, seconds = self._upload_limit, seconds * max(1.0, self._upload_limit / self._body_limit)
        exchange = _GuardedExchange(scope, receive, send, limit, seconds)
        try:
            self._check_caller(scope)
            _check_body_headers(scope, limit)
        except RefusedError as refusal:
            await exchange.refuse(refusal)
            return
        headers = [header for header in scope["headers"] if header[0] != b"authorization"]
        try:
            await self._app({**scope, "headers": headers}, exchange.receive, exchange.send)
        except Exception:
            if not exchange.refused:  # the app's way to say that the client left; it has been answered
                raise

    def _check_caller(self, scope: Scope) -> None:
        """Refuse whoever may not speak to this worker."""
        if self._token is None:
            _check_this_machine(scope)
            return
        if scope["path"] in _PUBLIC_PATHS and scope["method"] in ("GET", "HEAD"):
            return
        given = _header_values(scope, b"authorization")
        if len(given) > 1:
            raise RefusedError(
                _("La petición trae {count} cabeceras Authorization.").format(count=len(given)), code="auth"
            )
        if not given:
            raise _token_refusal(_("Falta el token de este trabajador."))
        scheme, _space, token = given[0].partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token):
            return
        if not self._failures.hit(self._failure_rate):
            raise self._too_many_failures()
        raise _token_refusal(_("El token no es el de este trabajador."))

    def _too_many_failures(self) -> RefusedError:
        reset = self._failures.get_window_stats(self._failure_rate).reset_time
        return RefusedError(
            _("Demasiados tokens equivocados."),
            mend=_("Espera, y copia de nuevo la dirección entera que muestra el trabajador."),
            status=429,
            code="auth",
            retry_after=max(1, math.ceil(reset - time.time())),
        )


def refusal_messages(error: RefusedError) -> tuple[Message, Message]:
    """A refusal as the two ASGI messages of an answer: JSON with status, error, help, code and the error's facts."""
    content = orjson.dumps(
        {"status": "error", "error": error.message, "help": error.mend, "code": error.code, **error.facts}
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="sheily"'))
    if "retry_after" in error.facts:
        headers.append((b"retry-after", str(error.facts["retry_after"]).encode()))
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    return start, {"type": "http.response.body", "body": content}


class _GuardedExchange:
    """One request and its answer: counts and times what comes in, and adds the headers to what goes out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int, seconds: float) -> None:
        self.refused = False
        self._receive = receive
        self._send = send
        self._limit = limit
        self._seconds = seconds
        self._deadline: float | None = None
        self._size = 0
        self._body_is_due = _announces_body(scope)
        self._expects_continue = bool(_header_values(scope, b"expect"))
        self._policy = _DOCS_POLICY if scope["path"] == "/docs" else _DATA_POLICY
        self._answer_began = False

    async def receive(self) -> Message:
        """The next piece of the body; once the request was refused, the news that the client has left."""
        if self.refused:
            return {"type": "http.disconnect"}
        try:
            message = await self._within_time()
        except TimeoutError:
            return await self._cut_off(_slow_refusal(self._seconds))
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            return await self._cut_off(_size_refusal(self._limit))
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the app's answer, unless the request was refused meanwhile."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self._answer_began = True
            message = {**message, "headers": self._safe_headers(list(message.get("headers", ())))}
        await self._send(message)

    async def refuse(self, error: RefusedError) -> None:
        """Answer in the app's place, and end the connection."""
        self.refused = True
        start, body = refusal_messages(error)
        await self._send({**start, "headers": self._safe_headers(start["headers"])})
        await self._send({**body, "more_body": True})
        await self._linger()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _within_time(self) -> Message:
        if not self._body_is_due:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._seconds
        async with asyncio.timeout_at(self._deadline):
            message = await self._receive()
        self._body_is_due = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def _cut_off(self, refusal: RefusedError) -> Message:
        if self._answer_began:
            self.refused = True
        else:
            await self.refuse(refusal)
        return {"type": "http.disconnect"}

    async def _linger(self) -> None:
        """Throw away a little of a body that is still arriving.

        A connection closed over unread bytes is reset, and a sender in mid-body would see that in place of the answer.
        """
        left = _LINGER_BYTES
        if self._expects_continue:
            return
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while self._body_is_due and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._body_is_due = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            return

    def _safe_headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers and those of safety that the app did not set itself."""
        present = {name.lower() for name, _value in headers}
        wanted = (*_SAFE_HEADERS, (b"content-security-policy", self._policy))
        headers += [header for header in wanted if header[0] not in present]
        if self._body_is_due:  # what is left of the body is never read: the connection cannot be used again
            headers.append((b"connection", b"close"))
        return headers


def _header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _announces_body(scope: Scope) -> bool:
    lengths = _header_values(scope, b"content-length")
    return bool(_header_values(scope, b"transfer-encoding")) or any(length != b"0" for length in lengths)


def _check_this_machine(scope: Scope) -> None:
    """Refuse what a web page of another site sends through a browser, under any name that leads to this machine."""
    hosts = _header_values(scope, b"host")
    origins = [value.partition(b"://")[2] for value in _header_values(scope, b"origin")]
    if not hosts or not all(_names_loopback(value.decode("latin-1")) for value in hosts + origins):
        raise RefusedError(
            _("Un trabajador con --no-auth solo atiende a programas de su propia máquina."),
            mend=_("Llámalo por http://127.0.0.1 o arráncalo sin --no-auth."),
            status=403,
            code="auth",
        )


def _names_loopback(host_and_port: str) -> bool:
    return is_loopback(re.sub(r":\d+$", "", host_and_port))


def _check_body_headers(scope: Scope, limit: int) -> None:
    """Refuse a body that its headers already show to be compressed, too long or of no length."""
    encodings = _header_values(scope, b"content-encoding")
    if any(encoding.strip().lower() != b"identity" for encoding in encodings):
        raise RefusedError(
            _("El cuerpo viene comprimido; se esperaba sin Content-Encoding."), status=415, code="encoding"
        )
    for length in _header_values(scope, b"content-length"):
        if not length.isdigit():
            raise RefusedError(_("La cabecera Content-Length no es un número."))
        if len(length) > 18 or int(length) > limit:
            raise _size_refusal(limit)


def _token_refusal(message: str) -> RefusedError:
    return RefusedError(
        message,
        mend=_("Copia la dirección entera que muestra el trabajador, con lo que sigue a «#»."),
        status=401,
        code="auth",
    )


def _size_refusal(limit: int) -> RefusedError:
    return RefusedError(
        _("El cuerpo pasa de {limit} bytes.").format(limit=limit),
        mend=_("Divide el lote."),
        status=413,
        code="too_large",
        limit=limit,
    )


def _slow_refusal(seconds: float) -> RefusedError:
    return RefusedError(
        _("El cuerpo no llegó entero en {seconds:g} s.").format(seconds=seconds),
        mend=_("Envía lotes más pequeños, o en forma binaria."),
        status=408,
        code="slow",
    )
