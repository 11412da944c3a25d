"""Run the small programs that stand in rows, each in a process and a folder of its own."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path

_PROCESSES = multiprocessing.get_context("forkserver") if os.name == "posix" else multiprocessing.get_context("spawn")
_PRELOADED = ["pandas", __name__]
"""Imported once, before any process is forked: loading pandas takes longer than what a short program does with it."""

_SECONDS = 60


def run(program: str, language: str = "python") -> str:
    """What a program prints, with the last line of an error: that is part of what it shows.

    Args:
        language: ``python``, ``sql`` (SQLite) or ``bash``.

    Raises:
        ValueError: it has not ended after a minute.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, error, inside = (Path(folder) / name for name in ("out", "error", "inside"))
        inside.mkdir()
        _PROCESSES.set_forkserver_preload(_PRELOADED)
        process = _PROCESSES.Process(target=_become, args=(_LANGUAGES[language], program, inside, out, error))
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise ValueError(f"the program has not ended after {_SECONDS} s")
        return out.read_text() + "".join(error.read_text().splitlines()[-1:])


def _become(execute: Callable[[str], None], program: str, folder: Path, *printed: Path) -> None:
    """Be the process of a program: in its folder, with what it prints going to files."""
    os.chdir(folder)
    for number, file in enumerate(printed, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    execute(program)


def _run_python(program: str) -> None:
    warnings.simplefilter("ignore")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(program, "<row>", "exec", dont_inherit=True), vars(module))  # noqa: S102 - proofs.py warns
    except Exception:
        sys.excepthook(*sys.exc_info())  # which a program may have set


def _run_sql(program: str) -> None:
    connection = sqlite3.connect(":memory:")
    for statement in filter(str.strip, program.split(";")):
        for row in connection.execute(statement):
            print(*row, sep="\t")


def _run_bash(program: str) -> None:
    subprocess.run(["bash", "-c", program], check=False)  # noqa: S607


_LANGUAGES: dict[str, Callable[[str], None]] = {"python": _run_python, "sql": _run_sql, "bash": _run_bash}
