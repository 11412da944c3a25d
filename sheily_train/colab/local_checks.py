"""Is this machine ready: Python, packages, the project's files, room, card, journals. Nothing is changed.

Packages are imported where they are used, so that the rest can be looked at when some are missing.
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
from contextlib import closing, nullcontext
from importlib import metadata
from pathlib import Path

from sheily_train import paths
from sheily_train.colab.findings import Check, Checks, State
from sheily_train.i18n import _

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
_NVIDIA_SECONDS = 10.0


def python() -> Checks:
    """Which one runs, and where it comes from."""
    where = _("entorno propio") if sys.prefix != sys.base_prefix else _("del sistema")
    found = _("{version}, {where}: {program}").format(
        version=platform.python_version(), where=where, program=sys.executable
    )
    yield Check(_("Python"), State.OK, found)


def packages() -> Checks:
    """Whether all that are needed are there, in their versions."""
    name, wanted = _("Paquetes"), _requirements()
    found = [(text, _installed(text)) for text in wanted]
    missing = [text for text, version in found if version == ""]
    if missing:
        names = ", ".join(map(_distribution, missing))
        yield Check(name, State.BAD, _("faltan {names}").format(names=names), install_line(*missing))
    for text, version in found:
        if version:
            package = _distribution(text)
            limits = text.removeprefix(package)
            told = _("{package} {version}; hace falta {limits}").format(package=package, version=version, limits=limits)
            yield Check(name, State.BAD, told, install_line(text))
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


def files() -> Checks:
    """Whether the checkout is whole."""
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


def permissions() -> Checks:
    """Whether its scripts can be started."""
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


def disk() -> Checks:
    """Room for journals and states."""
    folder = _existing(paths.omega_dir())
    free = shutil.disk_usage(folder).free
    yield _measured(
        _("Disco"),
        free,
        _DISK,
        _("Libera espacio, o pon SHEILY_HOME en otro disco."),
        _("en {folder}").format(folder=folder),
    )


def memory() -> Checks:
    """Room for batches."""
    import psutil

    yield _measured(_("Memoria"), int(psutil.virtual_memory().available), _MEMORY, _("Cierra otros programas."))


def _measured(name: str, free: int, limits: tuple[int, int], mend: str, where: str = "") -> Check:
    state = State.BAD if free < limits[0] else State.WARNING if free < limits[1] else State.OK
    found = _("{size:.1f} GB libres {where}").format(size=free / _GB, where=where).rstrip()
    return Check(name, state, found, "" if state is State.OK else mend)


def gpu() -> Checks:
    """What NVIDIA's driver sees, without torch."""
    name, program = _("GPU"), shutil.which("nvidia-smi")
    if program is None:
        yield Check(name, State.OK, _("ninguna de NVIDIA aquí; no hace falta: la pone el trabajador"))
        return
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SECONDS)
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


def torch() -> Checks:
    """What torch sees; it takes seconds to load."""
    import torch

    if torch.cuda.is_available():
        found = _("{version}, con {device}").format(version=torch.__version__, device=torch.cuda.get_device_name())
    elif torch.backends.mps.is_available():
        found = _("{version}, con {device}").format(version=torch.__version__, device="MPS")
    else:
        found = _("{version}, sin GPU: usa la CPU").format(version=torch.__version__)
    yield Check(_("PyTorch"), State.OK, found)


def writable() -> Checks:
    """Whether a file can be written where journals are kept; it leaves none."""
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


def journals() -> Checks:
    """Runs that were left half way; journals are only read."""
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


def install_line(*requirements: str) -> str:
    """The command that brings what is missing."""
    if not _is_checkout():
        return _("Instálalo: pip install -U sheily-train")
    pip = " ".join(f"'{text}'" for text in requirements)
    return _("Instala lo que falta: make install") + (_(", o: pip install {pip}").format(pip=pip) if pip else "")


def _is_checkout() -> bool:
    return (CHECKOUT / "pyproject.toml").is_file()
