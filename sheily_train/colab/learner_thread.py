"""The one thread in which models live, with a bounded queue before it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from sheily_train.errors import RefusedError
from sheily_train.i18n import _

_JobResult = TypeVar("_JobResult")


class LearnerThread:
    """The one thread in which models live, with a bounded queue before it."""

    def __init__(self, size: int) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, name="sheily-learner", daemon=True)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return self._jobs.qsize()

    def submit(self, work: Callable[[], _JobResult]) -> Future[_JobResult]:
        """Queue some work; raises :class:`RefusedError` (``busy``) when the queue is full."""
        result: Future[_JobResult] = Future()
        with self._lock:
            if self._closed:
                raise RefusedError(
                    _("El trabajador se está parando."), mend=_("Vuelve a arrancarlo."), status=503, code="restarted"
                )
            try:
                self._jobs.put_nowait(partial(_run_job, work, result))
            except queue.Full as error:
                raise RefusedError(
                    _("La cola está llena: esperan {waiting} peticiones.").format(waiting=self.waiting),
                    mend=_("Repite la petición dentro de {seconds} s.").format(seconds=1),
                    status=429,
                    code="busy",
                    retry_after=1,
                ) from error
            if self._thread.ident is None:
                self._thread.start()
        return result

    def close(self) -> None:
        """Finish what is queued, and end."""
        with self._lock:
            self._closed = True
        if self._thread.ident is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
            del job  # else the last one's work and result stay in memory until the next one


def _run_job(work: Callable[[], _JobResult], result: Future[_JobResult]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        value = work()
    except BaseException as error:
        result.set_exception(error)
        # The error knows this frame, and the result the error: what the work held (a whole learner, when a state does
        # not fit) would stay in memory until the next full collection of garbage.
        del work, result
    else:
        result.set_result(value)
