"""Several branches, one after the other: a branch that fails does not stop the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.trainer import TrainingResult, train_model
from sheily_train.errors import Interrupted, SheilyError, internal_error_text
from sheily_train.runlog import Listener


@dataclass(frozen=True)
class Outcome:
    """How one branch ended: with a result or with an error."""

    branch: str
    result: TrainingResult | None
    error: SheilyError | None


def train_branches(
    requests: Sequence[TrainRequest], *, listeners: tuple[Listener, ...] = (), fresh: bool = False
) -> Iterator[Outcome]:
    """Train each request's branch and yield how it ended. Only an interruption ends the whole."""
    for request in requests:
        try:
            yield Outcome(request.branch, train_model(request, listeners=listeners, fresh=fresh), None)
        except Interrupted:
            raise
        except SheilyError as error:
            yield Outcome(request.branch, None, error)
        except Exception as error:
            unexpected = SheilyError(internal_error_text(error))
            unexpected.__cause__ = error
            yield Outcome(request.branch, None, unexpected)
