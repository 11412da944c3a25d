"""Real processes of ``sheily``, forked from one that has loaded what they need: each begins within milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_PROGRAM = """if True:
    import json, os, resource, sys
    import peft, transformers
    from sheily_train.cli import run, sheily
    from sheily_train.core.training import fleet
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            for number, path in ((1, asked["out"]), (2, asked["error"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(asked["environment"])
            if asked["largest_file"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"],) * 2)
            run(sheily, asked["arguments"])
        print(child, flush=True)
"""
_MOST_SECONDS = 240


@dataclass(frozen=True)
class Process:
    """One of them: its number, and the files with what it prints."""

    forks: Forks
    pid: int
    out: Path
    error: Path

    def wait(self) -> int:
        """Its exit code, or the number of the signal that ended it, negative."""
        return self.forks.ask(wait=self.pid)

    def finish(self) -> str:
        """What it printed, once it has ended well."""
        assert self.wait() == 0, self.error.read_text()
        return self.out.read_text()

    def kill(self) -> None:
        """End it at once; it must not have ended by itself."""
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, "it ended before it could be killed"

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


class Forks:
    """Starts ``sheily`` with one thread for torch.

    Args:
        folder: for what the processes print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0

    def start(self, *arguments: str, home: Path, largest_file: int | None = None) -> Process:
        """Begin ``sheily`` with these arguments, below ``home``; no file it writes grows beyond ``largest_file``."""
        self._number += 1
        out, error = (self._folder / f"{self._number}.{name}" for name in ("out", "error"))
        pid = self.ask(
            arguments=arguments,
            out=str(out),
            error=str(error),
            environment={"SHEILY_HOME": str(home)},
            largest_file=largest_file,
        )
        return Process(self, pid, out, error)

    def ask(self, **asked: Any) -> int:
        """Send a line; returns the number that comes back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    """Come back as soon as the condition holds; fail when it never does."""
    deadline = time.monotonic() + _MOST_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
