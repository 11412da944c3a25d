"""What decides a run's weights, found without reading a row and without torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from sheily_train.core.branches import catalog
from sheily_train.core.training import bases, initial_adapter
from sheily_train.core.training.request import TrainRequest

_STATE_VERSION = 3
"""Raised when a checkpoint of the code before can no longer be continued to the same bits."""


@dataclass(frozen=True)
class Identity:
    """What a request comes to.

    Attributes:
        branch, data_hash: what it learns from.
        base: what the base model is.
        initial: the sha256 of the adapter's weights that it begins with; empty for a blank one.
        key: a name for the run, equal for requests that lead to the same weights.
    """

    branch: catalog.Branch
    data_hash: str
    base: str
    initial: str
    key: str


def identify(request: TrainRequest) -> Identity:
    """What a request comes to, before anything of it is read. Raises RequestError, DataError, BaseModelError."""
    branch = catalog.find_branch(request.branches_dir, request.branch)
    data_hash, base = catalog.data_hash(branch), bases.identity(request.model)
    content = [_STATE_VERSION, request.identity(), data_hash, base]
    if initial := initial_adapter.weights_hash(request):
        content.append(initial)
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return Identity(branch, data_hash, base, initial, key)
