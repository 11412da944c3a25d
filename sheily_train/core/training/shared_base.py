"""One base for many branches: loaded once, lent to one adapter after another."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sheily_train.core.training import bases
from sheily_train.core.training.adapters import (
    create_lora_model,
    leave_types_to_autocast,
    quantization,
    without_adapter,
)
from sheily_train.core.training.hardware import Machine

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sheily_train.core.training.preparation import Job


class SharedBase:
    """At most one base, kept in memory between two runs as it was loaded: frozen weights, no adapter.

    A base that is lent is not kept: when its run fails nobody knows what was done to it, and the next one loads anew.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._model: PreTrainedModel | None = None

    def take(self, key: Hashable, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The kept base when it has this ``key`` (which says what it is and where), else a loaded one."""
        model, self._model = self._model, None
        if key != self._key:
            del model  # its memory is free before the other one is loaded
            model = None
        self._key = key
        return model or load()

    def adapted(self, job: Job, count: int = 1) -> Any:
        """The model that a job trains: the base with ``count`` adapters, or all of it."""
        request, placement = job.request, job.placement

        def load() -> PreTrainedModel:
            return bases.load_model(
                request.model,
                dtype=placement.base_dtype,
                device=placement.device,
                attention=placement.attention,
                quantization=quantization(placement.method, placement.precision),
            )

        if not request.uses_adapter:
            return load()
        key = (job.base, placement.device, placement.method, placement.precision, placement.attention)
        adapted = create_lora_model(self.take(key, load), request, count)
        leave_types_to_autocast(adapted)
        return adapted

    def give_back(self, adapted: PeftModel) -> None:
        """Keep the base under this adapter; the adapter is dropped."""
        self._model = without_adapter(adapted)

    def free_in(self, machine: Machine) -> Machine:
        """The machine with the kept base's memory counted as free: the next run takes it over, or it is given up."""
        if self._model is None:
            return machine
        kept = sum(tensor.nbytes for tensor in self._model.state_dict().values())
        if self._model.device.type == "cuda":
            return replace(machine, cuda_free=machine.cuda_free + kept)
        return replace(machine, memory_free=machine.memory_free + kept)
