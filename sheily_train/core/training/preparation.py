"""Everything that is known before a run touches a weight: rows, tokens, place, memory, disk, identity."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheily_train import paths
from sheily_train.core.branches import catalog, examples
from sheily_train.core.branches.examples import Example
from sheily_train.core.training import adapters, bases, budget, data, hardware, initial_adapter
from sheily_train.core.training.budget import Shape, Workload
from sheily_train.core.training.data import TokenRow
from sheily_train.core.training.forward import PACKED_MODELS, choose_forward
from sheily_train.core.training.hardware import Machine
from sheily_train.core.training.identity import Identity, identify
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.run import Run
from sheily_train.core.training.shared_base import SharedBase
from sheily_train.core.training.training_router import Placement, available_devices, route, short_of_memory
from sheily_train.errors import DataError, ResourceError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """A request made concrete on this machine.

    Attributes:
        request: the request with every ``auto`` resolved.
        key: a name for the run, equal for requests that lead to the same weights.
        branch, data_hash: what it learns from.
        row_format: the format of its rows, after which questions are put later.
        rows, heldout: training and held-out rows as tokens.
        base: what the base model is.
        initial: the sha256 of the adapter's weights that it begins with; empty for a blank one.
        placement: where and how it runs.
        shape, work: the sizes behind the estimates.
        takes_several: whether the model takes adapters of several branches at once.
        memory, memory_free, disk, disk_free: bytes.
    """

    request: TrainRequest
    key: str
    branch: catalog.Branch
    data_hash: str
    row_format: examples.RowFormat
    rows: Sequence[TokenRow]
    heldout: Sequence[TokenRow]
    tokenizer: PreTrainedTokenizerBase
    base: str
    initial: str
    placement: Placement
    shape: Shape
    work: Workload
    takes_several: bool
    memory: int
    memory_free: int
    disk: int
    disk_free: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass."""
        return budget.steps_per_epoch(len(self.rows), self.request.examples_per_step)

    def step_rows(self, step: int) -> list[TokenRow]:
        """The rows of optimizer step ``step`` (from 0)."""
        return _step_rows(self.rows, self.request, step)

    def facts(self) -> dict[str, Any]:
        """What the first lines of a run tell, ready for JSON."""
        return {
            "branch": self.branch.name,
            "model": self.request.model,
            "init_adapter": self.request.init_adapter,
            "early_stopping": self.request.early_stopping,
            "placement": self.placement.to_json(),
            "format": self.row_format.value,
            "examples": self.work.examples,
            "heldout_examples": self.work.heldout,
            "tokens": self.work.tokens,
            "answer_tokens": self.work.answer_tokens,
            "longest_row": self.work.longest,
            "steps": self.work.steps,
            "parameters": self.shape.parameters,
            "trainable_parameters": self.work.trainable,
            "memory_bytes": self.memory,
            "memory_free_bytes": self.memory_free,
            "disk_bytes": self.disk,
            "disk_free_bytes": self.disk_free,
            "output": str(self.request.model_folder),
        }


def load_training_data(branch: str, branches_dir: Path) -> tuple[list[Example], list[Example]]:
    """A branch's training and held-out examples; any bad row raises :class:`DataError` with its file and line."""
    found = catalog.find_branch(branches_dir, branch)
    return examples.read_examples(found.training_files), examples.read_examples(found.evaluation_files)


def prepare(request: TrainRequest, identity: Identity | None = None, shared: SharedBase | None = None) -> Job:
    """Read, count and place a request. A run that was cut off keeps its placement, for the sake of the same bits.

    Args:
        request: what to train and how.
        identity: of the request, when it is known already.
        shared: a base that may stand in memory; it takes no room from this request.

    Raises:
        RequestError, DataError, BaseModelError: the request, its rows or its base cannot be used.
        ResourceError: memory or disk will not do.
    """
    identity = identity or identify(request)
    branch = identity.branch
    training = examples.read_examples(branch.training_files)
    heldout = examples.read_examples(branch.evaluation_files)
    if not training:
        raise DataError(
            _("La rama «{branch}» no tiene ninguna fila de entrenamiento.").format(branch=branch.name),
            mend=_("Ponlas en {folder}.").format(folder=branch.folder / paths.TRAINING_DATA),
        )
    config = bases.load_config(request.model)
    tokenizer = bases.load_tokenizer(request.model)
    most = bases.most_tokens(config)
    request = replace(request, max_length=min(request.max_length, most or request.max_length))
    rows, judged = (
        data.tokenize(part, tokenizer, template=request.template, max_length=request.max_length, most=most)
        for part in (training, heldout)
    )
    steps = budget.total_steps(len(rows), request.examples_per_step, request.epochs, request.max_steps)
    model, shape, trainable = _measure(request, identity.base)
    if request.init_adapter:
        initial_adapter.check(request, identity.base, model)
    work = budget.workload(
        rows,
        judged,
        steps=steps,
        trainable=trainable,
        keeps_best=request.early_stopping > 0,
        adapted_features=trainable // request.lora_r if request.uses_adapter else 0,
    )
    machine = hardware.inspect_machine()
    machine = shared.free_in(machine) if shared else machine
    placement = _earlier_placement(request, identity.key, machine) or route(request, machine, shape, work)
    request = replace(request, device=placement.device, precision=placement.precision, attention=placement.attention)
    return Job(
        request=request,
        key=identity.key,
        branch=branch,
        data_hash=identity.data_hash,
        row_format=training[0].format,
        rows=rows,
        heldout=judged,
        tokenizer=tokenizer,
        base=identity.base,
        initial=identity.initial,
        placement=placement,
        shape=shape,
        work=work,
        takes_several=placement.method == "lora" and choose_forward(model, placement).takes_several,
        memory=_expected_memory(model, shape, work, rows, request, placement),
        memory_free=machine.cuda_free if placement.device == "cuda" else machine.memory_free,
        disk=budget.disk_needed(shape, work, placement.method),
        disk_free=hardware.free_disk(request.model_folder),
    )


def check_resources(job: Job) -> None:
    """Stop before any work when memory or disk will not hold the run."""
    if job.memory > job.memory_free:
        raise short_of_memory(job.memory, job.memory_free)
    if job.disk > job.disk_free:
        raise ResourceError(
            _("Hacen falta unos {needed:.0f} MB de disco en {folder} y hay {free:.0f} MB libres.").format(
                needed=job.disk / 1e6, folder=job.request.model_folder, free=job.disk_free / 1e6
            ),
            mend=_("Libera espacio o elige otra carpeta con --output."),
        )


def _earlier_placement(request: TrainRequest, key: str, machine: Machine) -> Placement | None:
    record = Run(request.model_folder, key).record
    if record is None or request.micro_tokens:
        return None
    placement = Placement(**record["placement"])
    return placement if placement.device in available_devices(machine) else None


def _measure(request: TrainRequest, base: str, count: int = 1) -> tuple[PreTrainedModel, Shape, int]:
    """The model without weights, with ``count`` adapters; the base's shape; the number of parameters to train."""
    return _measured(replace(request, branch="", output=None), base, count)


@functools.lru_cache(maxsize=2)
def _measured(request: TrainRequest, _base: str, count: int) -> tuple[PreTrainedModel, Shape, int]:
    model = budget.meta_model(bases.load_config(request.model))
    shape = budget.model_shape(model)
    if not request.uses_adapter:
        return model, shape, shape.parameters
    adapted: Any = adapters.create_lora_model(model, request, count).to("meta")  # PEFT leaves all but the first out
    return adapted, shape, sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _expected_memory(
    model: PreTrainedModel,
    shape: Shape,
    work: Workload,
    rows: Sequence[TokenRow],
    request: TrainRequest,
    placement: Placement,
) -> int:
    """Bytes: counted where the packed way is taken with an adapter, by the rule of thumb elsewhere."""
    if placement.method != "lora" or model.config.model_type not in PACKED_MODELS:
        return budget.memory_needed(
            shape,
            work,
            method=placement.method,
            precision=placement.precision,
            attention=placement.attention,
            micro_tokens=placement.micro_tokens,
        )
    per_epoch = budget.steps_per_epoch(len(rows), request.examples_per_step)
    return _counted(model, [[_step_rows(rows, request, step)] for step in range(min(work.steps, per_epoch))], placement)


def memory_together(jobs: Sequence[Job]) -> int:
    """Expected peak bytes of jobs that take their steps together over one base."""
    model, _shape, _trainable = _measure(jobs[0].request, jobs[0].base, len(jobs))
    last = max(min(job.work.steps, job.steps_per_epoch) for job in jobs)
    steps = [[job.step_rows(step) for job in jobs if step < job.work.steps] for step in range(last)]
    return _counted(model, steps, jobs[0].placement)


def _counted(model: PreTrainedModel, steps: Sequence[Sequence[Sequence[TokenRow]]], placement: Placement) -> int:
    """Expected peak bytes of steps, each of which takes a batch of every branch."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(placement.base_dtype)
    passes = [whole for batches in steps for whole in data.split_into_passes(batches, placement.micro_tokens)]
    return budget.counted_memory(model.train(), max(passes, key=data.pass_size), placement)


def _step_rows(rows: Sequence[TokenRow], request: TrainRequest, step: int) -> list[TokenRow]:
    """The rows of optimizer step ``step`` (from 0)."""
    size = request.examples_per_step
    epoch, within = divmod(step, budget.steps_per_epoch(len(rows), size))
    order = data.epoch_order(len(rows), request.seed, epoch)
    return [rows[index] for index in order[within * size : (within + 1) * size]]
