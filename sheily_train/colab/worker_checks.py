"""Is the worker ready: reached, near, in time, willing, and of our protocol. Of it only what can be read is read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sheily_train.colab.findings import Check, Checks, State, hidden
from sheily_train.colab.html_page import page_title
from sheily_train.colab.loopback import is_loopback
from sheily_train.i18n import _, ngettext

if TYPE_CHECKING:
    import httpx2

    from sheily_train.colab.address import Address

_SLOW = 1.0
_SKEW = 5.0
_TIMEOUT = 10.0
_REPLY_LIMIT = 1 << 20
_PINGS = 5
_HEADERS = {"ngrok-skip-browser-warning": "1", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class _Reply:
    """What a worker answered, how long it took, and the time of day here in the middle of it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float
    at: float

    def json(self) -> dict[str, Any]:
        """The answer's JSON object; empty when it is none."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def worker(argument: str | None, token: str | None, environment: Mapping[str, str], folder: Path) -> Checks:
    """The worker that is configured, if one is."""
    from sheily_train.colab.address import find_address

    name = _("Trabajador")
    if not _is_configured(argument, environment, folder):
        yield Check(
            name,
            State.WARNING,
            _("sin dirección: no se ha mirado"),
            _("Pasa la que imprime la celda de Colab o «sheily worker»: sheily doctor URL"),
        )
        return
    address = find_address(argument, token, environment=environment, folder=folder)
    for warning in address.warnings:
        yield Check(name, State.WARNING, warning)
    import httpx2

    by_proxy = not is_loopback(urlsplit(address.url).hostname or "")  # as the client: nothing of it leaves this machine
    with httpx2.Client(base_url=address.url, headers=_HEADERS, timeout=_TIMEOUT, trust_env=by_proxy) as client:
        try:
            yield from hidden(_at_worker(client, address), {address.token or ""})
        except httpx2.HTTPError as error:
            yield Check(name, State.BAD, *_unreachable(error, address.url))


def _is_configured(argument: str | None, environment: Mapping[str, str], folder: Path) -> bool:
    """Whether an address was given at all, good or bad."""
    from sheily_train.colab.address import URL_VARIABLE

    file = folder / ".env"
    return bool(argument or environment.get(URL_VARIABLE)) or (
        file.is_file() and URL_VARIABLE in file.read_text(encoding="utf-8", errors="replace")
    )


def _at_worker(client: httpx2.Client, address: Address) -> Checks:
    name, health = _("Trabajador"), _get(client, "/health")
    if problem := _no_worker(health):
        yield Check(name, State.BAD, *problem)
        return
    uptime = health.json().get("uptime_seconds")
    since = _(", desde hace {minutes:.0f} min").format(minutes=uptime / 60) if isinstance(uptime, int | float) else ""
    yield Check(name, State.OK, _("responde en {url}").format(url=address.url) + since)
    pings = [_get(client, "/health") for _ping in range(_PINGS)]
    yield _latency(pings)
    yield _clock(min(pings, key=lambda reply: reply.seconds))
    yield (token := _token(client, address))
    if token.state is not State.BAD:
        yield _protocol(client, address)


def _get(client: httpx2.Client, path: str, token: str | None = None) -> _Reply:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    began, at = time.perf_counter(), time.time()
    body = b""
    with client.stream("GET", path.removeprefix("/"), headers=headers) as response:
        for piece in response.iter_raw():
            body += piece
            if len(body) > _REPLY_LIMIT or time.perf_counter() - began > _TIMEOUT:
                break
    seconds = time.perf_counter() - began
    return _Reply(response.status_code, response.headers, body, seconds, at + seconds / 2)


def _unreachable(error: Exception, url: str) -> tuple[str, str]:
    """Why nothing answered, and what to do."""
    import socket
    import ssl

    import httpx2

    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    host = urlsplit(url).hostname
    start = _("Arranca el trabajador (la celda de Colab, o «sheily worker») y copia la dirección que imprime.")
    if caused_by(socket.gaierror):
        return _("no existe ningún «{host}», o no hay red").format(host=host), _(
            "La dirección de un túnel cambia cada vez que se abre: copia la última, y mira si tienes conexión."
        )
    if caused_by(ConnectionRefusedError):
        return _("nadie escucha en {url}").format(url=url), start
    if caused_by(ssl.SSLError):
        return _("el certificado de «{host}» no vale: {reason}").format(host=host, reason=error), _(
            "Mira la fecha y la hora de este equipo; si está detrás de un proxy, instala el certificado del proxy."
        )
    if caused_by(httpx2.TimeoutException):
        return _("{url} no contestó en {seconds:.0f} s").format(url=url, seconds=_TIMEOUT), start
    return _("la conexión con {url} se cortó: {reason}").format(url=url, reason=error or type(error).__name__), start


def _no_worker(health: _Reply) -> tuple[str, str] | None:
    """What answered in the worker's place, and what to do; ``None`` when it is the worker."""
    if health.status == 200 and health.json().get("alive") is True:
        return None
    copy = _("Copia la dirección que imprimió el último arranque de la celda.")
    if health.status in {502, 503, 504, 530} or 520 <= health.status <= 527:
        return _("el túnel contesta {status}: detrás no hay trabajador").format(status=health.status), _(
            "Mira si la celda sigue en marcha; si se paró, arráncala y copia la dirección nueva."
        )
    if 300 <= health.status < 400:
        return _("redirige a otra dirección ({status})").format(status=health.status), copy
    if title := page_title(health.headers, health.body):
        return _("contestó una página web ({status}) «{title}», no el trabajador").format(
            status=health.status, title=title
        ), copy
    return _("contestó {status}, pero no como un trabajador OMEGA 21").format(status=health.status), copy


def _latency(pings: list[_Reply]) -> Check:
    seconds = median(reply.seconds for reply in pings)
    found = _("{seconds:.0f} ms de ida y vuelta (mediana de {count})").format(seconds=seconds * 1000, count=len(pings))
    if seconds < _SLOW:
        return Check(_("Latencia"), State.OK, found)
    mend = _("Se envían varios lotes a la vez, así que apenas frena; con --lote mayor se nota menos.")
    return Check(_("Latencia"), State.WARNING, found, mend)


def _clock(reply: _Reply) -> Check:
    """The worker's clock against ours; by the Date header when its answer does not tell its time zone."""
    name = _("Reloj")
    there, certain = _instant(reply.json().get("timestamp")), reply.seconds / 2
    if there is None:
        there, certain = _date_header(reply.headers.get("date")), certain + 1
    if there is None:
        return Check(name, State.WARNING, _("el trabajador no dice su hora"))
    skew = reply.at - there
    if abs(skew) <= max(_SKEW, certain):
        return Check(name, State.OK, _("los dos van a la par ({skew:+.1f} s)").format(skew=skew))
    words = _("adelanta {skew:.0f} s") if skew > 0 else _("atrasa {skew:.0f} s")
    return Check(
        name,
        State.WARNING,
        _("el de este equipo {words} respecto al del trabajador").format(words=words.format(skew=abs(skew))),
        _("Activa la hora automática; nada se pierde por ello, pero las fechas de los registros no casan."),
    )


def _instant(value: Any) -> float | None:
    """Seconds since 1970 of an ISO date with its time zone, or of such a number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment.timestamp() if moment.tzinfo else None


def _date_header(value: str | None) -> float | None:
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() + 0.5  # the header cuts the second off


def _token(client: httpx2.Client, address: Address) -> Check:
    name = _("Token")
    copy = _("Copia la línea entera que imprimió el trabajador al arrancar, con su #token=…")
    stranger = _get(client, "/status")
    reply = _get(client, "/status", address.token) if address.token else stranger
    if reply.status in {401, 403}:
        found = (
            _("el trabajador no lo acepta: cada carpeta de estado tiene el suyo")
            if address.token
            else _("el trabajador pide uno")
        )
        return Check(name, State.BAD, found, copy)
    if reply.status == 429:
        return Check(
            name,
            State.BAD,
            _("demasiados intentos con un token equivocado"),
            _("Espera {seconds} s. {copy}").format(seconds=reply.headers.get("retry-after", "60"), copy=copy),
        )
    if reply.status != 200 or reply.json().get("status") != "online":
        return Check(name, State.BAD, _("/status contestó {status}, y no su estado").format(status=reply.status), copy)
    if stranger.status == 200 and not is_loopback(urlsplit(address.url).hostname or ""):
        return Check(
            name,
            State.WARNING,
            _("el trabajador atiende a cualquiera, sin token"),
            _("Vale para una prueba; si no, usa «sheily worker» o la celda de este proyecto, que hacen uno."),
        )
    found = _("no hace falta: el trabajador solo atiende a este equipo") if stranger.status == 200 else _("vale")
    return Check(name, State.OK, f"{found}; {_standing(reply.json())}")


def _standing(status: dict[str, Any]) -> str:
    """The model, its device and how far it is, from an answer of ``/status``."""
    numbers = status.get("estadisticas")
    numbers = numbers if isinstance(numbers, dict) else {}
    batches = numbers.get("total_batches", "?")
    told = ngettext(
        "{model} en {device}, {batches} lote", "{model} en {device}, {batches} lotes", 1 if batches == 1 else 2
    )
    return told.format(
        model=str(status.get("modelo", "?"))[:60],
        device=str(numbers.get("dispositivo", "?"))[:60],
        batches=str(batches)[:20],
    )


def _protocol(client: httpx2.Client, address: Address) -> Check:
    """Whether the worker keeps the promise of applying each batch once: a worker that does knows the path ``/run``."""
    from sheily_train.colab.protocol import PROTOCOL

    name = _("Protocolo")
    spoken = _get(client, "/info", address.token).json().get("protocol")
    if spoken is None and _get(client, "/run", address.token).status in (400, 405):  # it asks for a header, or a body
        spoken = PROTOCOL
    if spoken == PROTOCOL:
        return Check(name, State.OK, _("versión {version}: cada lote se aplica una sola vez").format(version=spoken))
    if spoken is None:
        return Check(
            name,
            State.WARNING,
            _("OMEGA 21 v4.0 a secas: funciona, pero un lote reenviado puede aplicarse dos veces"),
            _("Pega en Colab la celda COLAB_SERVER_OMEGA21_V4_UNIFICADO.py de este proyecto."),
        )
    return Check(
        name,
        State.BAD,
        _("el trabajador habla la versión {there}, y este equipo la {here}").format(there=spoken, here=PROTOCOL),
        _("Actualiza el que esté atrasado: la celda de Colab y este proyecto han de ser de la misma versión."),
    )
