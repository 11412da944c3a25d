"""The one family of errors.

    SheilyError              1   anything the program can explain
    ├── RequestError         2   a flag, setting or name that cannot be used
    ├── DataError            3   a branch's rows: file:line, found, expected, mend
    ├── BaseModelError       4   a base model that is absent, damaged or cannot be loaded
    ├── ResourceError        5   too little memory or disk
    ├── BusyError            6   another process holds the branch
    ├── TrainingError        7   the run itself went wrong (a loss that is not a number, …)
    ├── MissingExtraError    8   an optional package that is not installed
    ├── WorkerError          9   a worker's answer that cannot be used: an HTML page, a cut body, another history
    │   ├── UnreachableError 10  no answer after every retry; nothing is lost, the run waits
    │   ├── RefusedError     11  a request that a worker does not accept: token, samples, order, owner
    │   ├── OutOfStep        12  a worker that is not where the client thought, and stays so when attached to again
    │   └── NoRuns           13  a plain OMEGA 21 v4.0 worker, asked to go on with a run
    └── Interrupted        130   stopped by Ctrl-C or SIGTERM, with everything saved

The number is the exit code of the command line. Anything else that is raised is a defect of the program: it leaves with
70 and one line too, and shows its traceback with ``--debug``.

To add an error: is there a caller who would catch it apart from its parent? If not, raise the parent.
"""

from __future__ import annotations

from sheily_train.i18n import _

INTERNAL_ERROR = 70


def internal_error_text(error: Exception) -> str:
    """One line for an exception that the program did not expect."""
    return _("Fallo inesperado: {kind}: {error}. La traza se ve con --debug.").format(
        kind=type(error).__name__, error=" ".join(str(error).split())
    )


class SheilyError(Exception):
    """An explained failure: ``message`` says where and what was found, ``mend`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message} {self.mend}".rstrip()


class RequestError(SheilyError):
    """A flag, a setting or a name that cannot be used."""

    exit_code = 2


class DataError(SheilyError):
    """Rows that cannot be trained on."""

    exit_code = 3


class BaseModelError(SheilyError):
    """A base model that is absent, damaged or cannot be loaded."""

    exit_code = 4


class ResourceError(SheilyError):
    """Too little memory or disk for what was asked."""

    exit_code = 5


class BusyError(SheilyError):
    """Another process holds the branch."""

    exit_code = 6


class TrainingError(SheilyError):
    """The run itself went wrong."""

    exit_code = 7


class MissingExtraError(SheilyError):
    """An optional package that is not installed.

    Args:
        package: the distribution that is missing, as ``wandb``.
        extra: the extra of ``sheily-train`` that brings it.
        purpose: what it is needed for, as a Spanish noun phrase.
    """

    exit_code = 8

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            _("Falta el paquete «{package}», necesario para {purpose}.").format(package=package, purpose=purpose),
            mend=_("Instálalo con: pip install 'sheily-train[{extra}]'").format(extra=extra),
        )


class WorkerError(SheilyError):
    """A worker's answer that cannot be used."""

    exit_code = 9


class UnreachableError(WorkerError):
    """No answer from the worker after every retry."""

    exit_code = 10


class RefusedError(WorkerError):
    """A request that the worker does not accept; nothing was changed by it.

    Raised on the worker, sent as a 4xx with ``status``, ``error``, ``help`` and ``code``, raised again by the client.

    Args:
        message: what was found, and what was expected.
        mend: what to do about it; ``help`` on the wire.
        status: the HTTP status.
        code: one word for programs: ``invalid``, ``auth``, ``gap``, ``conflict``, ``fenced``, ``busy``, …
        facts: further fields of the answer, as ``{"expected": 7}``.
    """

    exit_code = 11

    def __init__(
        self, message: str, *, mend: str = "", status: int = 400, code: str = "invalid", **facts: int | str
    ) -> None:
        super().__init__(message, mend=mend)
        self.status = status
        self.code = code
        self.facts = facts


class OutOfStep(WorkerError):
    """The worker is not where the client thought: it is attached to again.

    Args:
        code: the worker's word for it: ``gap``, ``detached``, ``restarted``, or ``behind``.
        expected: the event it waits for, if it said so.
    """

    exit_code = 12

    def __init__(self, code: str, message: str, expected: int | None = None) -> None:
        super().__init__(message, mend=_("Repite la orden."))
        self.code, self.expected = code, expected


class NoRuns(WorkerError):
    """The worker has no ``POST /run``: a plain v4.0."""

    exit_code = 13


class Interrupted(SheilyError):
    """Stopped by Ctrl-C or SIGTERM; what was reached is saved."""

    exit_code = 130
