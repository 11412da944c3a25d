"""The worker's address, as a person gives it: an argument, ``COLAB_SERVER_URL``, or the ``.env`` of the current folder.

The line that a worker prints, ``https://….trycloudflare.com/#token=…``, is all that has to be copied: the token stands
in its fragment, which no program sends along. It may also come apart, in ``SHEILY_TOKEN`` or ``COLAB_TOKEN``.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from sheily_train.colab.loopback import is_loopback
from sheily_train.errors import RequestError
from sheily_train.i18n import _

URL_VARIABLE = "COLAB_SERVER_URL"
TOKEN_VARIABLES = ("SHEILY_TOKEN", "COLAB_TOKEN")

_WRAPPING = "\"'`´«»“”‘’<>(){}, \t\r\n\ufeff\u200b\u00a0"
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"(?i)\b(tu-url|tu_url|your-url|example\.(com|org|net))\b|…|\.\.\.|^url$|^https?://(url)?/*$")
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}")
_PAGE_OF_A_WORKER = re.compile(
    r"docs|openapi\.json|health|status|info|metrics|metricas|diagnostico|predict|run|state|train_layer2|feedback_dendritas"
)
_NO_WORKERS = {
    "colab.research.google.com": _("el cuaderno de Colab"),
    "dashboard.ngrok.com": _("el panel de ngrok"),
    "www.kaggle.com": _("la página de Kaggle"),
}


@dataclass(frozen=True)
class Address:
    """Where a worker listens, and what lets one in.

    Attributes:
        url: scheme, host, port and, behind a proxy, the path; no slash at the end, nothing secret.
        token: what goes into the Authorization header; ``None`` for a worker without one. It is never shown.
        warnings: what the person should know, in Spanish.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()


def find_address(
    argument: str | None = None,
    token: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Address:
    """The first address that is given: the argument, then the environment, then the folder's ``.env``.

    The token: ``token``, then the address's fragment, then the environment, then ``.env``.

    Args:
        environment: the process's own unless given.
        folder: where ``.env`` is looked for; the current folder unless given.

    Raises:
        RequestError: there is no address, or it cannot be a worker's; the message says which.
    """
    given = {**_dotenv(folder or Path.cwd()), **(os.environ if environment is None else environment)}
    text = _unwrapped(argument) or _unwrapped(given.get(URL_VARIABLE))
    if not text:
        raise RequestError(
            _("Falta la dirección del trabajador."),
            mend=_(
                "Dala tras la orden, en COLAB_SERVER_URL o en el .env de esta carpeta: es la línea que imprime la "
                "celda de Colab, o «sheily worker»."
            ),
        )
    apart = next((value for name in TOKEN_VARIABLES if (value := _unquoted(given.get(name)))), "")
    return parse_address(text, _unquoted(token), apart)


def parse_address(text: str, token: str = "", fallback_token: str = "") -> Address:
    """Check an address.

    Args:
        text: the address, maybe with ``#token=…``.
        token: comes before the address's own.
        fallback_token: used when neither is given.

    Raises:
        RequestError: what is wrong with it, and how it should look.
    """
    text = _unwrapped(text)
    _check_is_address(text)
    parts = _split(text)
    secret = _check_token(token or _fragment_token(parts.fragment) or fallback_token)
    host, warnings = str(parts.hostname), []
    path, page = _trimmed_path(parts.path)
    if page:
        warnings.append(_("Se ha quitado «/{page}» de la dirección.").format(page=page))
    if parts.scheme == "http" and (warning := _check_plain_http(host, has_token=bool(secret))):
        warnings.append(warning)
    shown = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    return Address(f"{parts.scheme}://{shown}{port}{path}", secret or None, tuple(warnings))


def _dotenv(folder: Path) -> dict[str, str]:
    """The variables of the folder's ``.env``; none when there is no such file."""
    from dotenv import dotenv_values

    file = folder / ".env"
    if not file.is_file():
        return {}
    try:
        values = dotenv_values(file, encoding="utf-8-sig", interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            _("No se puede leer {file}: {reason}.").format(file=file, reason=error),
            mend=_("Guárdalo como texto UTF-8."),
        ) from error
    return {name: value for name, value in values.items() if value}


def _unwrapped(text: str | None) -> str:
    """An address without the spaces, quotes and brackets that come along when it is copied."""
    return (text or "").strip(_WRAPPING)


def _unquoted(text: str | None) -> str:
    """A token without spaces and quotes around it."""
    return (text or "").strip("\"'` \t\r\n")


def _check_is_address(text: str) -> None:
    shown = text.partition("#")[0]
    if _PLACEHOLDER.search(shown):
        raise RequestError(
            _("«{text}» es la dirección del ejemplo.").format(text=shown),
            mend=_("Pon en su lugar la que imprime tu celda de Colab, o «sheily worker»."),
        )
    if re.search(r"\s", text):
        raise RequestError(
            _("La dirección «{text}» lleva espacios.").format(text=shown),
            mend=_("Copia la línea entera, entre comillas si hace falta."),
        )
    if "://" not in shown:
        host = re.split(r"[/:]", shown, maxsplit=1)[0]
        scheme = "http" if _nearness(host) == "here" else "https"
        raise RequestError(
            _("A la dirección «{text}» le falta el principio, https://.").format(text=shown),
            mend=_("Prueba con {scheme}://{text}").format(scheme=scheme, text=shown),
        )


def _split(text: str) -> SplitResult:
    shown = text.partition("#")[0]
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise _malformed(shown) from error
    if parts.scheme not in {"http", "https"}:
        raise RequestError(
            _("La dirección «{text}» empieza por {scheme}://; se esperaba https://.").format(
                text=shown, scheme=parts.scheme
            )
        )
    if parts.username is not None or parts.password is not None:
        raise RequestError(
            _("La dirección lleva usuario o contraseña."), mend=_("El trabajador solo entiende #token=… al final.")
        )
    if not host or port == 0 or not (_HOST.fullmatch(host) or _ip(host)):
        raise _malformed(shown)
    if host in _NO_WORKERS:
        raise RequestError(
            _("Esa es la dirección de {place}, no la del trabajador.").format(place=_NO_WORKERS[host]),
            mend=_("Copia la que imprime la celda al terminar de arrancar."),
        )
    if parts.query:
        raise RequestError(
            _("La dirección lleva «?…», que el trabajador no usa."),
            mend=_("Copia la línea entera que imprime: el token va tras «#token=»."),
        )
    return parts


def _malformed(shown: str) -> RequestError:
    return RequestError(
        _("«{text}» no es una dirección que se pueda usar.").format(text=shown),
        mend=_("Se esperaba algo como https://nombre.ngrok-free.app o http://127.0.0.1:8000"),
    )


def _trimmed_path(path: str) -> tuple[str, str]:
    """The path without the slash at its end, and without a page of the worker, which is given beside it."""
    path = path.rstrip("/")
    before, _slash, last = path.rpartition("/")
    return (before.rstrip("/"), last) if _PAGE_OF_A_WORKER.fullmatch(last) else (path, "")


def _fragment_token(fragment: str) -> str:
    for part in fragment.split("&"):
        name, _equals, value = part.partition("=")
        if name == "token":
            return _unquoted(unquote(value))
    if fragment:
        raise RequestError(
            _("Tras «#» se esperaba token=…"), mend=_("Copia la línea entera que imprime el trabajador.")
        )
    return ""


def _check_token(token: str) -> str:
    if token and not _TOKEN.fullmatch(token):
        raise RequestError(
            _("El token lleva espacios, acentos o más de 512 letras."),
            mend=_("Copia el que imprime el trabajador, sin nada más."),
        )
    return token


def _check_plain_http(host: str, *, has_token: bool) -> str | None:
    """A warning when nobody on the way should read along; refused when a token would cross the internet in clear."""
    nearness = _nearness(host)
    if nearness == "here":
        return None
    if has_token and nearness == "far":
        raise RequestError(
            _("Con http:// el token viajaría a la vista de cualquiera hasta «{host}».").format(host=host),
            mend=_("Usa https://, o un túnel: ssh -L 8000:127.0.0.1:8000 {host} y http://127.0.0.1:8000").format(
                host=host
            ),
        )
    return _("Con http:// todo viaja sin cifrar hasta «{host}»: solo en una red de confianza.").format(host=host)


def _nearness(host: str) -> str:
    """``here`` for this machine, ``near`` for a local network, ``far`` for the rest."""
    host = host.rstrip(".").lower()
    if is_loopback(host) or host.endswith(".localhost"):
        return "here"
    if address := _ip(host):
        return "here" if address.is_unspecified else "near" if address.is_private else "far"
    return "near" if "." not in host or host.endswith((".local", ".lan", ".internal")) else "far"


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
