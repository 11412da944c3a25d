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
    import gc, json, os, resource, runpy, signal, sys
    import peft, torch._dynamo, transformers, uvicorn
    from sheily_train.cli import run, sheily
    from sheily_train.colab import serve
    from sheily_train.core.training import fleet
    gc.freeze()  # what is loaded is not gone through, and so not copied, by each child
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            for number, path in ((1, asked["out"]), (2, asked["error"])):
                os.dup2(os.open(path, os.O_WRONLY), number)
            sys.stdout.reconfigure(line_buffering=True)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a worker rightly lets an ignored one be
            os.environ.clear()
            os.environ.update(asked["environment"])
            os.chdir(asked["folder"])
            if asked["largest_file"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest_file"],) * 2)
            if asked["script"] is None:
                run(sheily, asked["arguments"])
            sys.argv = [asked["script"], *asked["arguments"]]
            runpy.run_path(asked["script"], run_name="__main__")
            sys.exit()
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

    def start(
        self,
        *arguments: str,
        folder: Path | None = None,
        script: str | None = None,
        largest_file: int | None = None,
        **environment: str,
    ) -> Process:
        """Begin ``sheily``, or a script, with these arguments.

        Args:
            folder: where it begins; here, when not given.
            largest_file: no file it writes grows beyond so many bytes.
            environment: what it has besides ours.
        """
        self._number += 1
        out, error = (self._folder / f"{self._number}.{name}" for name in ("out", "error"))
        for file in (out, error):
            file.touch()
        pid = self.ask(
            arguments=arguments,
            script=script,
            out=str(out),
            error=str(error),
            folder=str(folder or Path.cwd()),
            environment=os.environ | environment,
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


def wait_until(condition: Callable[[], bool], every: float = 0.0005) -> None:
    """Come back as soon as the condition holds; fail when it never does."""
    deadline = time.monotonic() + _MOST_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)
