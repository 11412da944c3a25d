"""Where and how a request runs: one table of targets, asked in order of preference.

A target says whether it can take a request and, if so, places it. Another place to run is another entry of ``TARGETS``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sheily_train.core.training.budget import Shape, Workload, memory_needed
from sheily_train.core.training.hardware import Machine, inspect_machine
from sheily_train.core.training.request import TrainRequest
from sheily_train.errors import RequestError, ResourceError
from sheily_train.i18n import _, ngettext

_EAGER_UP_TO = 384
"""Longest row, in tokens, for which eager attention is the faster one on a CPU (SDPA's backward is slow there)."""

_MICRO_TOKENS = {"cpu": 1024, "cuda": 8192, "mps": 2048}
_CPU_BF16_MICRO_TOKENS = 4096
"""oneDNN's products like many rows: below 1,280 it gives those of 576 columns to a single thread."""

_USABLE_MEMORY = 0.9


@dataclass(frozen=True)
class Placement:
    """A decided place: device, numbers, method, how much passes at once, and why."""

    target: str
    device: str
    precision: str
    method: str
    attention: str
    micro_tokens: int
    reason: str

    @property
    def base_dtype(self) -> torch.dtype:
        """The type of the base's weights: low precision when they are frozen, float32 when they are trained."""
        return self.dtype if self.method != "full" else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The type that matrix products are computed in."""
        return _DTYPES[self.precision]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Low-precision arithmetic over the float32 weights that are trained; nothing for a finished model."""
        if self.method == "inference" or self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return asdict(self)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Target:
    """An entry of the routing table.

    Attributes:
        name: as in ``--device``.
        available: whether this machine has it.
        precisions: what it computes in, best first, on this machine.
        free: bytes of memory free there.
        label: how it is called in the reason.
    """

    name: str
    available: Callable[[Machine], bool]
    precisions: Callable[[Machine], tuple[str, ...]]
    free: Callable[[Machine], int]
    label: Callable[[Machine], str]


TARGETS = (
    Target(
        "cuda",
        lambda machine: machine.cuda,
        lambda machine: ("bf16", "fp16", "fp32") if machine.cuda_bf16 else ("fp16", "fp32"),
        lambda machine: machine.cuda_free,
        lambda machine: machine.cuda_name,
    ),
    Target(
        "mps",
        lambda machine: machine.mps,
        lambda _machine: ("fp32", "bf16", "fp16"),
        lambda machine: machine.memory_free,
        lambda _machine: "Apple GPU",
    ),
    Target(
        "cpu",
        lambda _machine: True,
        lambda machine: ("bf16", "fp32", "fp16") if machine.cpu_bf16 else ("fp32", "bf16", "fp16"),
        lambda machine: machine.memory_free,
        lambda machine: ngettext("CPU con {threads} hilo", "CPU con {threads} hilos", machine.threads).format(
            threads=machine.threads
        ),
    ),
)


def route(request: TrainRequest, machine: Machine, shape: Shape, work: Workload) -> Placement:
    """Decide where and how ``request`` runs on ``machine``.

    Raises:
        RequestError: the asked device is absent, or the method cannot run there.
        ResourceError: not even one row at a time fits into the free memory.
    """
    target = _choose_target(request.device, machine)
    method = "qlora" if request.qlora else "lora" if request.lora else "full"
    if method == "qlora" and target.name != "cuda":
        raise RequestError(
            _("--qlora necesita una GPU CUDA; aquí se usaría {label}.").format(label=target.label(machine)),
            mend=_("Usa --lora, o entrena en una máquina con CUDA."),
        )
    precision = request.precision if request.precision != "auto" else target.precisions(machine)[0]
    attention = request.attention
    if attention == "auto":
        attention = "eager" if target.name == "cpu" and work.longest <= _EAGER_UP_TO else "sdpa"
    micro_tokens = request.micro_tokens or _fitting_micro_tokens(
        target, machine, method, precision, attention, shape, work
    )
    reason = ngettext(
        "{label}, {precision}, {method}; {tokens} token a la vez",
        "{label}, {precision}, {method}; hasta {tokens} tokens a la vez",
        micro_tokens,
    ).format(label=target.label(machine), precision=precision, method=_METHOD_NAMES[method], tokens=micro_tokens)
    return Placement(target.name, target.name, precision, method, attention, micro_tokens, reason)


_METHOD_NAMES = {"lora": "LoRA", "qlora": "QLoRA", "full": _("todos los pesos")}


def place_for_inference(device: str = "auto", precision: str = "auto") -> Placement:
    """Where a finished model answers and is judged."""
    machine = inspect_machine()
    target = _choose_target(device, machine)
    chosen = target.precisions(machine)[0] if precision == "auto" else precision
    return Placement(
        target.name, target.name, chosen, "inference", "sdpa", _usual_tokens(target.name, chosen), target.label(machine)
    )


def available_devices(machine: Machine) -> list[str]:
    """The devices of the targets that this machine has, best first."""
    return [target.name for target in TARGETS if target.available(machine)]


def _choose_target(device: str, machine: Machine) -> Target:
    present = [target for target in TARGETS if target.available(machine)]
    if device == "auto":
        return present[0]
    for target in present:
        if target.name == device:
            return target
    raise RequestError(
        _("--device {device} no está en esta máquina; hay: {present}.").format(
            device=device, present=", ".join(available_devices(machine))
        )
    )


def _fitting_micro_tokens(
    target: Target, machine: Machine, method: str, precision: str, attention: str, shape: Shape, work: Workload
) -> int:
    """The usual size for the target, halved until it fits into the free memory."""
    free = int(target.free(machine) * _USABLE_MEMORY)
    micro_tokens = _usual_tokens(target.name, precision)
    while True:
        needed = memory_needed(
            shape, work, method=method, precision=precision, attention=attention, micro_tokens=micro_tokens
        )
        if needed <= free:
            return micro_tokens
        if micro_tokens <= work.longest:
            raise short_of_memory(needed, free)
        micro_tokens //= 2


def _usual_tokens(device: str, precision: str) -> int:
    return _CPU_BF16_MICRO_TOKENS if (device, precision) == ("cpu", "bf16") else _MICRO_TOKENS[device]


def short_of_memory(needed: int, free: int) -> ResourceError:
    """The error for a run that will not fit. Both in bytes."""
    return ResourceError(
        _("Hacen falta unos {needed:.1f} GB de memoria y hay {free:.1f} GB libres.").format(
            needed=needed / 1e9, free=free / 1e9
        ),
        mend=_("Prueba --lora, un modelo menor, o una --max-length o unos --micro-tokens menores."),
    )
