"""Named moments in a process at which it can be made to die, set from outside: the product has no hooks for them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from sheily_train.colab import runs, snapshots
from sheily_train.colab.attachment import Attachment
from sheily_train.colab.delivery import Delivery
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import Ledger
from sheily_train.colab.pulled import PulledStates
from sheily_train.colab.runs import Run
from sheily_train.colab.worker import OmegaWorker


class KillPoints:
    """The points of this process; at most one of them is armed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed, self._left = "", 0

    def arm(self, point: str, count: int) -> None:
        """Die when ``point`` (as ``before apply``) is reached for the ``count``-th time; ``""`` disarms."""
        with self._lock:
            self._armed, self._left = point, count

    def reach(self, point: str) -> None:
        """Die here, if it was asked for."""
        with self._lock:
            self._left -= point == self._armed
            if self._armed == point and self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()

    def around(self, owner: Any, method: str, name: str, when: Callable[..., bool] | None = None) -> None:
        """Make points of the moments before and after a function, or only its calls for which ``when`` says so."""
        inner = getattr(owner, method)

        @wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            if when is not None and not when(*args):
                return inner(*args, **kwargs)
            self.reach(f"before {name}")
            result = inner(*args, **kwargs)
            self.reach(f"after {name}")
            return result

        setattr(owner, method, outer)

    def in_worker(self) -> None:
        """Set the worker's points."""
        self.around(Run, "apply", "apply")
        self.around(Ledger, "record", "record")
        self.around(snapshots, "save_tensors", "tensors")
        self.around(snapshots, "write_json", "manifest")
        self.around(Path, "rename", "rename", lambda _path, target: Path(target).name.startswith("snapshot-"))
        self.around(runs, "write_json", "owner")
        self.around(OmegaWorker, "_attach_now", "attach")
        self.around(OmegaWorker, "_replace_now", "upload")
        self._around_the_answer()

    def in_client(self) -> None:
        """Set the client's points; ``tell`` is the caller's."""
        self.around(Journal, "append", "append")
        self.around(Journal, "answered", "answered")
        self.around(Journal, "prune", "prune")
        self.around(Delivery, "_read_or_write", "commit")
        self.around(Delivery, "_write_answers", "answers")
        self.around(Attachment, "_note", "owner")
        self.around(PulledStates, "_keep", "keep")
        self.around(Path, "replace", "rename", lambda _path, target: Path(target).suffix == ".safetensors")

    def _around_the_answer(self) -> None:
        inner = OmegaWorker._event

        async def outer(worker: OmegaWorker, *args: Any) -> Any:
            self.reach("before answer")
            answer = await inner(worker, *args)
            self.reach("after answer")
            return answer

        OmegaWorker._event = outer  # type: ignore[method-assign,assignment]
