"""One request to a worker, and what is done when it fails: the only place where anything is tried again.

Nothing here knows of runs or journals; :mod:`sheily_train.colab.verdicts` knows what a reply means.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
import stamina

from sheily_train import __version__
from sheily_train.colab.amounts import size_text
from sheily_train.colab.batches import BINARY_FORM, JSON_FORM
from sheily_train.colab.loopback import is_loopback
from sheily_train.colab.verdicts import Answer, Hiccup, foreign, raise_refusal, read_reply
from sheily_train.errors import RequestError, WorkerError
from sheily_train.i18n import _, ngettext

Record = Callable[..., None]

FORMS = {"binary": BINARY_FORM, "json": JSON_FORM}
PIECE = 1024 * 1024
REPLY_LIMIT = 16 * PIECE
"""Bytes of an answer that are read; a worker's own have some thousands."""
_Result = TypeVar("_Result")

logging.getLogger("stamina").addHandler(logging.NullHandler())  # its warnings are our records


@dataclass(frozen=True)
class ClientSettings:
    """How a client behaves. Raises :class:`RequestError` for a value that cannot be used."""

    form: str = "binary"
    """How batches travel: binary or json."""
    depth: int = 4
    """Events on their way at once, never more than the worker's queue holds."""
    timeout: float = 60.0
    """Seconds for one request, from its first byte to the last of its answer."""
    transfer_timeout: float = 900.0
    """Seconds for a whole state, up or down."""
    retries: int = 3
    """How often a failed request is sent again before the client gives up."""
    wait_initial: float = 1.0
    """Seconds before the first retry; three times as many before each further one."""
    wait_max: float = 30.0
    """The most seconds between two attempts, whatever a worker asks for."""
    wait_jitter: float = 1.0
    """The most seconds of chance that are added to a pause."""
    resyncs: int = 20
    """How often in a row a worker may lose its state without one new answer."""
    pull_after: int = 500
    """Events after which the worker's state is fetched."""
    keep_bytes: int = 4 * 1024**3
    """Bytes of batches that the journal keeps though fetched states stand for them: a tunnel may refuse a state."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RequestError(_("La forma es «{found}»; se esperaba binary o json.").format(found=self.form))
        if min(self.depth, self.pull_after, self.resyncs) < 1 or self.retries < 0 or self.timeout <= 0:
            raise RequestError(_("Los ajustes del cliente llevan un número que no vale: {found}.").format(found=self))


class Wire:
    """The connections to one worker.

    Args:
        transport: in place of the network; it is not closed before the client is.
        record: is told of every retry.
        mend: says, when no attempt helped, how to go on.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        transport: httpx2.AsyncBaseTransport | None,
        settings: ClientSettings,
        record: Record,
        mend: Callable[[], str],
    ) -> None:
        self.host = httpx2.URL(url).host
        self._url, self._token, self._transport = url, token, transport
        self._settings, self._record, self._mend = settings, record, mend
        self._http: httpx2.AsyncClient | None = None
        self._users: Counter[httpx2.AsyncClient] = Counter()

    async def retried(self, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """What ``work`` returns, begun anew after each :class:`Hiccup`, as often as the settings say."""
        settings = self._settings
        attempts = stamina.retry_context(
            on=self._patience,
            attempts=settings.retries + 1,
            timeout=None,  # each attempt has its own; their number is bounded
            wait_initial=settings.wait_initial,
            wait_max=settings.wait_max,
            wait_jitter=settings.wait_jitter,
            wait_exp_base=3,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    try:
                        return await work()
                    except Hiccup as hiccup:
                        if attempt.num <= settings.retries:
                            pause = attempt.next_wait if hiccup.wait is None else min(hiccup.wait, settings.wait_max)
                            await self.note(hiccup, attempt.num, pause)
                        raise
        except Hiccup as hiccup:
            raise self._given_up(hiccup) from hiccup
        raise AssertionError("the attempts ended without a result")

    async def note(self, hiccup: Hiccup, attempt: int, pause: float) -> None:
        """Record a retry, and make every connection anew: what is left in an old one may be another's answer."""
        self._record("retry", reason=hiccup.reason, attempt=attempt, wait=round(pause, 3))
        await self.close_connections()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        content: bytes | AsyncIterator[bytes] = b"",
        form: str = JSON_FORM,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """One attempt of a request that is answered with a JSON object."""
        async with self._exchange(timeout or self._settings.timeout) as exchange:
            response = await exchange.begin(method, path, content, {"Content-Type": form, **(headers or {})})
            body = await exchange.read()
        return read_reply(path, response, body)

    async def download(
        self, path: str, file: Path, headers: Mapping[str, str], limit: int
    ) -> tuple[Mapping[str, str], str]:
        """One attempt to fetch something long into a file; returns the answer's headers and the content's sha256.

        Raises :class:`WorkerError` for one of more than ``limit`` bytes, which are all that is written.
        """
        digest, size = hashlib.sha256(), 0
        async with self._exchange(self._settings.transfer_timeout) as exchange:
            response = await exchange.begin("GET", path, b"", headers)
            if response.status_code != 200:
                raise_refusal(response, await exchange.read())
            with file.open("wb") as target:
                async for piece in response.aiter_bytes(PIECE):
                    size += len(piece)
                    if size > limit:
                        raise WorkerError(
                            _("{host} envía a {path} más de {limit}; ningún trabajador lo hace.").format(
                                host=self.host, path=path, limit=size_text(limit)
                            ),
                            mend=_("Comprueba la dirección: quizá contesta otro programa."),
                        )
                    digest.update(piece)
                    await asyncio.to_thread(target.write, piece)
        return response.headers, digest.hexdigest()

    async def close_connections(self) -> None:
        """Give up the open connections, each once nobody uses it; the next request connects again."""
        http, self._http = self._http, None
        if http is not None:
            await self._close_unused(http)

    @asynccontextmanager
    async def _exchange(self, seconds: float) -> AsyncIterator[_Exchange]:
        """A request within its time; every way in which the network fails comes out as a :class:`Hiccup`."""
        http = self._http = self._http or self._new_client()
        self._users[http] += 1
        exchange = _Exchange(http)
        try:
            async with asyncio.timeout(seconds):
                try:
                    yield exchange
                finally:
                    await exchange.close()
        except (TimeoutError, httpx2.TimeoutException) as error:
            text = _("{host} no contestó en {seconds:g} s.").format(host=self.host, seconds=seconds)
            raise Hiccup("timeout", text) from error
        except httpx2.HTTPError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if exchange.response is None:
                text = _("No hay conexión con {host} ({reason}).").format(host=self.host, reason=reason)
                raise Hiccup("connection", text) from error
            text = _("La respuesta de {host} llegó cortada ({reason}).").format(host=self.host, reason=reason)
            raise Hiccup("cut", text) from error
        finally:
            self._users[http] -= 1
            if http is not self._http:
                await self._close_unused(http)

    async def _close_unused(self, http: httpx2.AsyncClient) -> None:
        if not self._users[http]:
            del self._users[http]
            if self._transport is None:
                await http.aclose()

    def _new_client(self) -> httpx2.AsyncClient:
        headers = {
            "ngrok-skip-browser-warning": "1",
            "User-Agent": f"sheily-train/{__version__}",
            "Accept-Encoding": "identity",
        }
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return httpx2.AsyncClient(
            base_url=self._url,
            headers=headers,
            transport=self._transport,
            timeout=None,
            limits=httpx2.Limits(keepalive_expiry=30),
            trust_env=not is_loopback(self.host),
        )

    def _patience(self, error: Exception) -> bool | float:
        """Whether to try again, and after how long when the other side said so."""
        if not isinstance(error, Hiccup) or error.wait is None:
            return isinstance(error, Hiccup)
        return min(error.wait, self._settings.wait_max) + random.uniform(0, self._settings.wait_jitter)  # noqa: S311

    def _given_up(self, hiccup: Hiccup) -> WorkerError:
        tries = self._settings.retries + 1
        message = ngettext(
            "{reason} Tras {tries} intento se deja de insistir.",
            "{reason} Tras {tries} intentos se deja de insistir.",
            tries,
        ).format(reason=hiccup.text, tries=tries)
        return hiccup.final(message, mend=self._mend())


class _Exchange:
    """One request and its answer, as it comes in."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self.response: httpx2.Response | None = None

    async def begin(
        self, method: str, path: str, content: bytes | AsyncIterator[bytes], headers: Mapping[str, str]
    ) -> httpx2.Response:
        """Send the request; returns with the answer's head."""
        request = self._http.build_request(method, path, content=content, headers=dict(headers))
        self.response = await self._http.send(request, stream=True)
        if "," in self.response.headers.get("Content-Encoding", ""):  # a few bytes could become more than the memory
            raise foreign(_("La respuesta viene comprimida varias veces, y se pidió sin comprimir."))
        return self.response

    async def read(self) -> bytes:
        """The answer's content; of one without an end, only so much as any worker's has."""
        body = bytearray()
        if self.response is not None:
            async with aclosing(self.response.aiter_bytes(PIECE)) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) > REPLY_LIMIT:
                        break
        return bytes(body)

    async def close(self) -> None:
        """Give the connection back."""
        if self.response is not None:
            await self.response.aclose()
