"""Is everything in place to train on a borrowed GPU: this machine, the project's files, the worker; if not, what to do.

Nothing here changes anything: of a worker only what can be read is read. Packages are imported where they are used, so
that the doctor can still speak when some are missing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sheily_train import paths
from sheily_train.errors import SheilyError
from sheily_train.i18n import _

if TYPE_CHECKING:
    import httpx2

    from sheily_train.colab.address import Address

CHECKOUT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("conectar_colab.sh", "verificar_setup_colab.sh", "sheily_train/train_all.sh")
PROJECT_FILES = (
    "COLAB_SERVER_OMEGA21_V4_UNIFICADO.py",
    "GUIA_RAPIDA_COLAB.md",
    "INSTALACION_RAPIDA.md",
    "sheily_train/train_branch.py",
    "sheily_train/colab/README.md",
    "sheily_train/colab/client.py",
    "sheily_train/colab/presets.py",
    "sheily_train/colab/ejemplo_integracion_completa.py",
    "sheily_train/core/omega/generator.py",
    *LAUNCHERS,
)

_GB = 10**9
_DISK = (1 * _GB, 3 * _GB)
_MEMORY = (_GB // 2, 2 * _GB)
"""Bytes below which nothing can work, and below which it may get tight: a journal, and two snapshots of 150 MB."""
_SLOW = 1.0
_SKEW = 5.0
_TIMEOUT = 10.0
_REPLY_LIMIT = 1 << 20
_PINGS = 5
_BROWSER_WARNING = {"ngrok-skip-browser-warning": "1"}


class State(StrEnum):
    """How a thing was found."""

    OK = "ok"
    WARNING = "aviso"
    BAD = "mal"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is, in a word or two.
        found: what was found, as a line for a person.
        mend: what to do about it; empty when there is nothing to do.
    """

    name: str
    state: State
    found: str
    mend: str = ""


Checks = Iterator[Check]


def examine(
    argument: str | None = None,
    token: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    with_torch: bool = False,
) -> Checks:
    """Look at everything, in order; each check comes as soon as it is known, and none of them shows the token.

    Args:
        argument: the worker's address; else the environment's or that of the ``.env`` of ``folder``, if any.
        token: its token, when the address does not carry it.
        environment: the process's own unless given.
        folder: the current folder unless given.
        with_torch: load torch, which takes seconds, and ask it for its devices.
    """
    environment = os.environ if environment is None else environment
    secrets = _tokens_in(argument, *environment.values()) | {token or ""}
    checks: list[tuple[str, Callable[[], Checks]]] = [
        (_("Python"), _python),
        (_("Paquetes"), _packages),
        (_("Archivos"), _files),
        (_("Permisos"), _permissions),
        (_("Disco"), _disk),
        (_("Memoria"), _memory),
        (_("GPU"), _gpu),
        *([(_("PyTorch"), _torch)] if with_torch else []),
        (_("Escritura"), _writable),
        (_("Diarios"), _journals),
        (_("Trabajador"), partial(_worker, argument, token, environment, folder or Path.cwd())),
    ]
    for name, check in checks:
        yield from _hidden(_guarded(name, check), secrets)


def _guarded(name: str, check: Callable[[], Checks]) -> Checks:
    """The check's findings; one that cannot be made is a finding itself, and the rest goes on."""
    try:
        yield from check()
    except SheilyError as error:
        yield Check(name, State.BAD, error.message, error.mend or _("Corrígelo y repite."))
    except ModuleNotFoundError as error:
        yield Check(name, State.BAD, _("Falta el paquete «{package}».").format(package=error.name), _install_line())
    except Exception as error:  # a doctor that falls ill is of no use
        kind, text = type(error).__name__, " ".join(str(error).split())
        found = _("No se pudo comprobar: {kind}: {text}").format(kind=kind, text=text)
        yield Check(name, State.BAD, found, _("Lo demás se ha comprobado; si se repite, avisa con esta línea."))


def _tokens_in(*texts: str | None) -> set[str]:
    """The tokens in addresses, as they are written and as they are meant."""
    written = [found for text in texts if text for found in re.findall(r"token=([^&\s\"']+)", text)]
    return {*written, *map(unquote, written)}


def _hidden(checks: Checks, secrets: set[str]) -> Checks:
    """The checks, with what is secret, or would steer a terminal, taken out of their lines."""
    ordered = sorted(filter(None, secrets), key=len, reverse=True)

    def hide(line: str) -> str:
        for secret in ordered:
            line = line.replace(secret, "…")
        return "".join(letter if letter.isprintable() else " " for letter in line)

    for check in checks:
        yield replace(check, found=hide(check.found), mend=hide(check.mend))


def _install_line(*requirements: str) -> str:
    if not _is_checkout():
        return _("Instálalo: pip install -U sheily-train")
    pip = " ".join(f"'{text}'" for text in requirements)
    return _("Instala lo que falta: make install") + (_(", o: pip install {pip}").format(pip=pip) if pip else "")


def _is_checkout() -> bool:
    return (CHECKOUT / "pyproject.toml").is_file()


# This machine


def _python() -> Checks:
    where = _("entorno propio") if sys.prefix != sys.base_prefix else _("del sistema")
    found = _("{version}, {where}: {program}").format(
        version=platform.python_version(), where=where, program=sys.executable
    )
    yield Check(_("Python"), State.OK, found)


def _packages() -> Checks:
    name, wanted = _("Paquetes"), _requirements()
    found = [(text, _installed(text)) for text in wanted]
    missing = [text for text, version in found if version == ""]
    if missing:
        names = ", ".join(map(_distribution, missing))
        yield Check(name, State.BAD, _("faltan {names}").format(names=names), _install_line(*missing))
    for text, version in found:
        if version:
            package = _distribution(text)
            limits = text.removeprefix(package)
            told = _("{package} {version}; hace falta {limits}").format(package=package, version=version, limits=limits)
            yield Check(name, State.BAD, told, _install_line(text))
    if all(version is None for _text, version in found):
        yield Check(name, State.OK, _("los {count} que hacen falta, con su versión").format(count=len(wanted)))


def _requirements() -> list[str]:
    """What pyproject.toml asks for; an installed package carries the same list."""
    if _is_checkout():
        import tomllib

        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return list(project["dependencies"])
    return [text for text in metadata.requires("sheily-train") or [] if "extra ==" not in text]


def _distribution(text: str) -> str:
    return re.split(r"[\s<>=!~;\[(]", text, maxsplit=1)[0]


def _installed(text: str) -> str | None:
    """``None`` when what is asked for is there; else the version that is there instead, empty for none."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then only whether it is there can be told
        requirement = None
    else:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            return None
    try:
        version = metadata.version(_distribution(text))
    except metadata.PackageNotFoundError:
        return ""
    good = requirement is None or requirement.specifier.contains(version, prereleases=True)
    return None if good else version


def _files() -> Checks:
    name = _("Archivos")
    if not _is_checkout():
        yield Check(name, State.OK, _("instalado como paquete: no hay carpeta de proyecto que revisar"))
        return
    missing = [file for file in PROJECT_FILES if not (CHECKOUT / file).is_file()]
    if not missing:
        yield Check(
            name, State.OK, _("los {count} del proyecto, en {folder}").format(count=len(PROJECT_FILES), folder=CHECKOUT)
        )
        return
    yield Check(
        name,
        State.BAD,
        _("faltan {files}").format(files=", ".join(missing)),
        _("Recupéralos: git -C {folder} checkout -- {files}").format(folder=CHECKOUT, files=" ".join(missing)),
    )


def _permissions() -> Checks:
    name = _("Permisos")
    there = [file for file in LAUNCHERS if (CHECKOUT / file).is_file()]
    closed = [file for file in there if not os.access(CHECKOUT / file, os.X_OK)]
    if closed and os.name != "nt":
        yield Check(
            name,
            State.BAD,
            _("no se pueden ejecutar: {files}").format(files=", ".join(closed)),
            "chmod +x " + " ".join(str(CHECKOUT / file) for file in closed),
        )
    elif there:
        yield Check(name, State.OK, _("los guiones se pueden ejecutar"))


def _disk() -> Checks:
    folder = _existing(paths.omega_dir())
    free = shutil.disk_usage(folder).free
    yield _measured(
        _("Disco"),
        free,
        _DISK,
        _("Libera espacio, o pon SHEILY_HOME en otro disco."),
        _("en {folder}").format(folder=folder),
    )


def _memory() -> Checks:
    import psutil

    yield _measured(_("Memoria"), int(psutil.virtual_memory().available), _MEMORY, _("Cierra otros programas."))


def _measured(name: str, free: int, limits: tuple[int, int], mend: str, where: str = "") -> Check:
    state = State.BAD if free < limits[0] else State.WARNING if free < limits[1] else State.OK
    found = _("{size:.1f} GB libres {where}").format(size=free / _GB, where=where).rstrip()
    return Check(name, state, found, "" if state is State.OK else mend)


def _gpu() -> Checks:
    name, program = _("GPU"), shutil.which("nvidia-smi")
    if program is None:
        yield Check(name, State.OK, _("ninguna de NVIDIA aquí; no hace falta: la pone el trabajador"))
        return
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        done = subprocess.CompletedProcess(query, 1, "", str(error))
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        yield Check(name, State.OK, "; ".join(lines))
        return
    said = " ".join((done.stderr or done.stdout).split())[:200]
    yield Check(
        name,
        State.WARNING,
        _("nvidia-smi está, pero no ve ninguna: {said}").format(said=said or done.returncode),
        _("Reinstala o recarga el controlador de NVIDIA; sin ella se usa la CPU."),
    )


def _torch() -> Checks:
    import torch

    if torch.cuda.is_available():
        found = _("{version}, con {device}").format(version=torch.__version__, device=torch.cuda.get_device_name())
    elif torch.backends.mps.is_available():
        found = _("{version}, con {device}").format(version=torch.__version__, device="MPS")
    else:
        found = _("{version}, sin GPU: usa la CPU").format(version=torch.__version__)
    yield Check(_("PyTorch"), State.OK, found)


def _writable() -> Checks:
    folder = _existing(paths.omega_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"sheily" * 1000)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Check(
            _("Escritura"),
            State.BAD,
            _("no se puede escribir en {folder}: {reason}").format(folder=folder, reason=error.strerror),
            _("Da permiso sobre esa carpeta, o pon SHEILY_HOME en otra."),
        )
        return
    yield Check(_("Escritura"), State.OK, _("se puede escribir en {folder}").format(folder=folder))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _journals() -> Checks:
    name = _("Diarios")
    journals = sorted(paths.omega_dir().glob("*/journal.sqlite"))
    findings = [finding for journal in journals if (finding := _journal(name, journal))]
    yield from findings
    if not findings:
        yield Check(name, State.OK, _("{count}, ninguno a medias").format(count=len(journals)))


def _journal(name: str, journal: Path) -> Check | None:
    """What there is to say of a run's journal; ``None`` when it has come to its end."""
    run = journal.parent.name
    try:
        pending, unfinished = _left_over(journal)
    except (sqlite3.Error, ValueError, AttributeError) as error:
        found = _("el de «{run}» no se puede leer: {reason}").format(run=run, reason=error)
        mend = _("Recupera {folder} de una copia, o apártala y empieza otro entrenamiento.")
        return Check(name, State.BAD, found, mend.format(folder=journal.parent))
    if not pending and not unfinished:
        return None
    if _in_use(journal.parent):
        return Check(name, State.OK, _("«{run}» está en marcha").format(run=run))
    found = _("«{run}» quedó a medias, con {count} sin respuesta").format(run=run, count=pending)
    order = "sheily connect URL --continuar" + ("" if run == "principal" else f" --run {run}")
    return Check(name, State.WARNING, found, _("No se ha perdido nada. Sigue con: {order}").format(order=order))


def _left_over(journal: Path) -> tuple[int, bool]:
    """How many events of a journal have no answer, and whether its last session goes on. It is only read."""
    closed = not journal.with_name(f"{journal.name}-wal").exists()  # then SQLite would leave such files behind
    mode = "immutable=1" if closed else "mode=ro"
    with closing(sqlite3.connect(f"{journal.as_uri()}?{mode}", uri=True, timeout=2)) as connection:
        [(pending,)] = connection.execute("SELECT count(*) FROM events WHERE answer IS NULL")
        facts = connection.execute("SELECT value FROM facts WHERE name = 'sessions'").fetchall()
    sessions = json.loads(facts[0][0]) if facts else []
    return int(pending), bool(sessions) and not sessions[-1].get("done")


def _in_use(folder: Path) -> bool:
    """Whether a process is at work on a run."""
    from filelock import FileLock, Timeout

    lock = folder / "journal.lock"
    try:
        with FileLock(lock, timeout=0) if lock.exists() else nullcontext():
            return False
    except Timeout:
        return True


# The worker


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


def _worker(argument: str | None, token: str | None, environment: Mapping[str, str], folder: Path) -> Checks:
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

    with httpx2.Client(base_url=address.url, headers=_BROWSER_WARNING, timeout=_TIMEOUT) as client:
        try:
            yield from _hidden(_at_worker(client, address), {address.token or ""})
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
        for piece in response.iter_bytes():
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
    if b"<html" in health.body[:2000].lower() or b"<!doctype html" in health.body[:2000].lower():
        title = re.search(rb"<title[^>]*>([^<]{1,80})", health.body, re.IGNORECASE)
        shown = " ".join(title[1].decode(errors="replace").split()) if title else ""
        return _("contestó una página web ({status}) «{title}», no el trabajador").format(
            status=health.status, title=shown
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
            _("el trabajador no lo acepta: cada arranque tiene el suyo")
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
    if stranger.status == 200 and not _is_loopback(address.url):
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
    return _("{model} en {device}, {batches} lotes").format(
        model=str(status.get("modelo", "?"))[:60],
        device=str(numbers.get("dispositivo", "?"))[:60],
        batches=str(numbers.get("total_batches", "?"))[:20],
    )


def _protocol(client: httpx2.Client, address: Address) -> Check:
    """Whether the worker keeps the promise of applying each batch once: a worker that does knows the path ``/run``."""
    from sheily_train.colab.protocol import PROTOCOL

    name = _("Protocolo")
    spoken = _get(client, "/info", address.token).json().get("protocol")
    if spoken is None and _get(client, "/run", address.token).status == 405:
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


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in {"127.0.0.1", "::1", "localhost"}
