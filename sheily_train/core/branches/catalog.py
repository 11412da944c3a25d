"""Where the branches lie: their folders, their files of rows, and the hash by which a trained model knows its data."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheily_train.durable import sha256_file
from sheily_train.errors import DataError, RequestError
from sheily_train.i18n import _
from sheily_train.paths import EVALUATION_DATA, ROWS_SUFFIX, TRAINING_DATA

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DESCRIPTION_FILE = "branch.toml"
PROOFS_FILE = "proofs.jsonl"
COMMON_BRANCH = "common"
"""The branch that has the rows of all branches, unless a folder is called so."""

# Letters of any language, digits, and inside the name also spaces, dots and hyphens: never a path, never hidden.
_NAME = re.compile(r"\w(?:[\w .-]{0,62}\w)?")


@dataclass(frozen=True)
class Branch:
    """A domain: its folder, the files it learns from and those it is judged on, each sorted by name."""

    name: str
    folder: Path
    training_files: tuple[Path, ...]
    evaluation_files: tuple[Path, ...]


def is_name(name: str) -> bool:
    """Whether a branch may be called ``name``."""
    return _NAME.fullmatch(composed(name)) is not None


def composed(name: str) -> str:
    """The name with every accent in its letter: Macs write file names with the two apart, keyboards together."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str) -> None:
    """Raise RequestError when a branch may not be called ``name``."""
    if not is_name(name):
        raise RequestError(
            _("«{name}» no puede ser el nombre de una rama.").format(name=name),
            mend=_("Usa letras, cifras, «-», «_», «.» y espacios (64 caracteres como mucho), sin barras."),
        )


def find_branches(branches_dir: Path) -> list[Branch]:
    """Every branch of the folder, sorted by name, those without rows included.

    Hidden folders, stray files and folders that no branch can be called by are passed over; ``check`` reports the last
    two. Raises RequestError when the folder does not exist.
    """
    if not branches_dir.is_dir():
        raise RequestError(
            _("No existe la carpeta de ramas {folder}.").format(folder=shown_path(branches_dir)),
            mend=_("Indica otra con --branches-dir, o crea una rama con: sheily branches import NOMBRE ARCHIVO"),
        )
    folders = [Path(entry.path) for entry in os.scandir(branches_dir) if entry.is_dir() and is_name(entry.name)]
    return [
        Branch(composed(folder.name), folder, _row_files(folder / TRAINING_DATA), _row_files(folder / EVALUATION_DATA))
        for folder in sorted(folders)
    ]


def branch_folder(branches_dir: Path, name: str) -> Path:
    """The folder of the branch called ``name``, as it is written on the disk or, if there is none, as it will be."""
    folders = [branches_dir / unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def find_branch(branches_dir: Path, name: str) -> Branch:
    """The branch called ``name``, or the one that has the rows of all, ready to be read.

    Raises RequestError for a name that cannot be or that no branch has, DataError when the branch has no training file.
    """
    check_name(name)
    name = composed(name)
    branches = {branch.name: branch for branch in find_branches(branches_dir)}
    if any(branch.training_files for branch in branches.values()):
        branches.setdefault(COMMON_BRANCH, _common(branches_dir, list(branches.values())))
    if name not in branches:
        near = _near(name, list(branches.values()))
        suggestion = _("¿Quizá {names}?").format(names=", ".join(near)) + " " if near else ""
        raise RequestError(
            _("No hay ninguna rama «{name}» en {folder}.").format(name=name, folder=shown_path(branches_dir)),
            mend=suggestion + _("La lista completa: sheily branches list"),
        )
    branch = branches[name]
    if not branch.training_files:
        raise DataError(
            _("La rama «{name}» no tiene archivos {suffix} en {folder}.").format(
                name=name, suffix=ROWS_SUFFIX, folder=shown_path(branch.folder / TRAINING_DATA)
            ),
            mend=_("Ponlos ahí, o impórtalos con: sheily branches import {name} ARCHIVO").format(name=name),
        )
    return branch


def _near(name: str, branches: list[Branch]) -> list[str]:
    """The branches whose name, or one of whose titles, is like ``name``: «física» finds physics."""
    called = {_folded(branch.name): branch.name for branch in branches}
    for branch in branches:
        with contextlib.suppress(DataError, OSError):
            title = read_description(branch).get("title", "")
            for text in title.values() if isinstance(title, dict) else [title]:
                called.setdefault(_folded(str(text)), branch.name)
    near = [_folded(name)] if _folded(name) in called else difflib.get_close_matches(_folded(name), called, n=3)
    return list(dict.fromkeys(called[text] for text in near))


def _folded(text: str) -> str:
    """The text without case and accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


def _common(branches_dir: Path, branches: list[Branch]) -> Branch:
    return Branch(
        COMMON_BRANCH,
        branches_dir,
        tuple(file for branch in branches for file in branch.training_files),
        tuple(file for branch in branches for file in branch.evaluation_files),
    )


def data_hash(branch: Branch) -> str:
    """The sha256 over names and contents of the branch's files, training and evaluation, in hexadecimal.

    Raises DataError when one cannot be read.
    """
    digest = hashlib.sha256()
    for file in (*branch.training_files, *branch.evaluation_files):
        name = os.fsencode(file.relative_to(branch.folder).as_posix())
        try:
            digest.update(name + b"\0" + sha256_file(file).encode() + b"\n")
        except OSError as error:
            raise unreadable(file, error) from error
    return digest.hexdigest()


def count_rows(file: Path) -> int:
    """How many lines of the file are not blank; nothing is parsed. Raises DataError when it cannot be read."""
    try:
        with file.open("rb") as lines:
            return sum(bool(line.removeprefix(BYTE_ORDER_MARK).strip()) for line in lines)
    except OSError as error:
        raise unreadable(file, error) from error


def read_description(branch: Branch) -> dict[str, Any]:
    """What the optional ``branch.toml`` says (title, description, author, licence…); DataError when it is not TOML."""
    import tomllib  # only `show` and `check` need it; `list` starts faster without

    file = branch.folder / DESCRIPTION_FILE
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            _("{file} no es TOML válido: {error}.").format(file=shown_path(file), error=error),
            mend=_("Corrígelo, o bórralo: es opcional."),
        ) from error


def shown_path(path: Path) -> str:
    """The path as messages show it: relative to the current folder when it lies below, else as it is."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def unreadable(file: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(
        _("No se puede leer {file}: {error}.").format(file=shown_path(file), error=error.strerror or error),
        mend=_("Comprueba sus permisos y el disco."),
    )


def _row_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in folder.glob(f"[!.]*{ROWS_SUFFIX}") if file.is_file()))
