"""Which branches are trained side by side: as many as fill one pass together, when that is measured to be faster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sheily_train.core.branches import catalog
from sheily_train.core.training import hardware, specialist
from sheily_train.core.training.adapters import adapter_names
from sheily_train.core.training.data import Pass, split_into_passes
from sheily_train.core.training.engine import Engine, add_gradients
from sheily_train.core.training.identity import identify
from sheily_train.core.training.preparation import Job, prepare
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.run import Run
from sheily_train.core.training.shared_base import SharedBase
from sheily_train.errors import SheilyError

_MOST_TOGETHER = 8
_ROUNDS = 2
_WORTH = 0.95
"""Side by side only when it takes at most this part of the time of one after the other."""
_MEASURING_SHARE = 0.1
"""At most this part of the whole work goes into measuring which is faster."""


def plan(requests: Sequence[TrainRequest], *, fresh: bool, shared: SharedBase) -> list[list[TrainRequest]]:
    """The requests in groups that take their steps together, in the order of their first ones.

    Groups that an earlier call has begun are kept. What is decided now is written down at once, so that a later call
    after a kill goes on the same way.

    Args:
        requests: one per branch. Their ``together`` is how many are wanted side by side; 0 measures.
        fresh: whether nothing of earlier calls counts.
        shared: where the base is kept that measuring loads.
    """
    alone: list[TrainRequest] = []
    begun: dict[tuple[str, ...], list[TrainRequest]] = {}
    open_: dict[TrainRequest, list[TrainRequest]] = {}
    for request in requests:
        run = _unfinished(request, fresh)
        group = tuple(run.group) if run and not fresh else ()
        if group and (not request.together or (run and run.record)):
            begun.setdefault(group, []).append(request)
        elif run is None or request.together == 1 or (run.record and not fresh):
            alone.append(request)
        else:
            open_.setdefault(replace(request, branch="", output=None), []).append(request)
    groups = [[request] for request in alone]
    for outputs, members in begun.items():  # in the order they were in: it decides how their rows are cut into passes
        names = [Path(output).name for output in outputs]  # by another path, or moved, they are the same folders
        groups.append(sorted(members, key=lambda member: names.index(member.model_folder.name)))
    for alike in open_.values():
        groups += _split(sorted(alike, key=_rows, reverse=True), shared)
    return sorted(groups, key=lambda group: min(map(requests.index, group)))


def _unfinished(request: TrainRequest, fresh: bool) -> Run | None:
    """The place of a request that is still to be trained with an adapter; ``None`` when it is not, or in error."""
    try:
        key = identify(request).key
    except SheilyError:
        return None
    run = Run(request.model_folder, key)
    if not fresh and (specialist.result_of(request.model_folder, key) or specialist.is_complete(run.result)):
        return None
    return run if request.uses_adapter else None


def _rows(request: TrainRequest) -> int:
    branch = catalog.find_branch(request.branches_dir, request.branch)
    return sum(path.read_bytes().count(b"\n") for path in branch.training_files)


def _split(requests: list[TrainRequest], shared: SharedBase) -> list[list[TrainRequest]]:
    """Requests that differ in their branch only, in groups of which each is written down."""
    size = requests[0].together or _best_size(requests, shared)
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    for group in groups:
        for request in group:
            run = Run(request.model_folder, identify(request).key)
            with contextlib.suppress(OSError):  # it is told when its turn comes
                run.remember_group([str(other.model_folder) for other in group])
    return groups


def _best_size(requests: list[TrainRequest], shared: SharedBase) -> int:
    """As many as fill one pass with their first steps, or 1 when that is not faster or not worth measuring."""
    jobs: list[Job] = []
    for request in requests[:_MOST_TOGETHER]:
        try:
            job = prepare(request, shared=shared)
        except SheilyError:
            continue  # it is told when its turn comes
        if jobs and job.placement.attention != jobs[0].placement.attention:
            continue
        batches = [one.step_rows(0) for one in (*jobs, job)]
        if not job.takes_several or len(split_into_passes(batches, job.placement.micro_tokens)) > 1:
            break
        jobs.append(job)
    if len(jobs) < 2:
        return 1
    steps = jobs[-1].work.steps * len(requests) / len(jobs)
    if _MEASURING_SHARE * steps < 2 * _ROUNDS:
        return 1
    try:
        return len(jobs) if _is_faster(jobs, shared) else 1
    except Exception:
        return 1  # whatever it was, memory or a defect: a branch that meets it alone tells it


def _is_faster(jobs: Sequence[Job], shared: SharedBase) -> bool:
    """Whether the gradients of all jobs' first steps take less time side by side than one after the other."""
    placement = jobs[0].placement
    hardware.make_deterministic(placement.device)
    model = shared.adapted(jobs[0], len(jobs))
    engines = [
        Engine(model, job.request, job.placement, job.work.steps, name)
        for job, name in zip(jobs, adapter_names(len(jobs)), strict=True)
    ]
    batches = [job.step_rows(0) for job in jobs]
    together = split_into_passes(batches, placement.micro_tokens)
    apart = [[piece] for whole in together for piece in whole]
    rounds = [(_seconds(engines, apart), _seconds(engines, together)) for _round in range(_ROUNDS)]
    shared.give_back(model)
    return min(both for _each, both in rounds) <= _WORTH * min(each for each, _both in rounds)


def _seconds(engines: Sequence[Engine], passes: Sequence[Pass]) -> float:
    started = time.monotonic()
    for engine in engines:
        engine.begin_step(0)
    for whole in passes:
        add_gradients(engines, whole, [1] * len(engines))
    if engines[0].parameters and next(iter(engines[0].parameters.values())).device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    for engine in engines:
        engine.drop_gradients()
    return seconds
