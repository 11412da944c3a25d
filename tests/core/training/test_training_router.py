from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from sheily_train.core.training import training_router
from sheily_train.core.training.budget import Shape, Workload, memory_needed
from sheily_train.core.training.hardware import Machine
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.training_router import Placement, place_for_inference, route
from sheily_train.errors import RequestError, ResourceError

GB = 10**9
SHAPE = Shape(parameters=135_000_000, hidden=576, intermediate=1536, layers=30, heads=9, vocabulary=49_152)
WORK = Workload(examples=64, heldout=16, tokens=6000, answer_tokens=3000, longest=90, steps=24, trainable=460_800)

CPU = Machine(
    cuda=False,
    cuda_bf16=False,
    cuda_name="",
    cuda_free=0,
    mps=False,
    cpu_bf16=False,
    threads=4,
    memory_free=64 * GB,
)
CPU_BF16 = replace(CPU, cpu_bf16=True)
MAC = replace(CPU, mps=True)
T4 = replace(CPU, cuda=True, cuda_name="Tesla T4", cuda_free=16 * GB)
A100 = replace(T4, cuda_bf16=True, cuda_name="NVIDIA A100", cuda_free=40 * GB)


def place(machine: Machine, work: Workload = WORK, **settings: Any) -> Placement:
    return route(TrainRequest(**{"lora": True, **settings}), machine, SHAPE, work)


def needed(micro_tokens: int, work: Workload = WORK) -> int:
    """Bytes of a LoRA run on a CPU without bf16."""
    return memory_needed(SHAPE, work, method="lora", precision="fp32", attention="eager", micro_tokens=micro_tokens)


@pytest.mark.parametrize(
    ("machine", "device", "precision", "attention", "micro_tokens", "label"),
    [
        (CPU, "cpu", "fp32", "eager", 1024, "CPU con 4 hilos"),
        (replace(CPU, threads=1), "cpu", "fp32", "eager", 1024, "CPU con 1 hilo"),
        (CPU_BF16, "cpu", "bf16", "eager", 4096, "CPU con 4 hilos"),
        (MAC, "mps", "fp32", "sdpa", 2048, "Apple GPU"),
        (T4, "cuda", "fp16", "sdpa", 8192, "Tesla T4"),
        (A100, "cuda", "bf16", "sdpa", 8192, "NVIDIA A100"),
    ],
    ids=["cpu", "one thread", "cpu bf16", "mps", "cuda", "cuda bf16"],
)
def test_each_machine_is_used_at_its_best(
    machine: Machine, device: str, precision: str, attention: str, micro_tokens: int, label: str
) -> None:
    """Device, precision, attention and tokens at once follow from the machine, and one line says why."""
    placement = place(machine)
    assert (placement.target, placement.device, placement.precision) == (device, device, precision)
    assert (placement.attention, placement.micro_tokens) == (attention, micro_tokens)
    assert placement.reason == f"{label}, {precision}, LoRA; hasta {micro_tokens} tokens a la vez"


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"device": "cpu"}, "device", "cpu"),
        ({"precision": "fp32"}, "precision", "fp32"),
        ({"attention": "eager"}, "attention", "eager"),
        ({"micro_tokens": 333}, "micro_tokens", 333),
        ({"lora": False}, "method", "full"),
        ({"lora": True}, "method", "lora"),
        ({"qlora": True}, "method", "qlora"),
    ],
)
def test_what_was_asked_is_done(settings: dict[str, Any], field: str, value: object) -> None:
    """A setting that was given comes before what the table would choose."""
    assert getattr(place(A100, **settings), field) == value


def test_long_rows_leave_eager_attention() -> None:
    """On a CPU eager is the faster one up to a length."""
    assert place(CPU, replace(WORK, longest=384)).attention == "eager"
    assert place(CPU, replace(WORK, longest=385)).attention == "sdpa"


@pytest.mark.parametrize(
    ("machine", "device", "present"),
    [(CPU, "cuda", "hay: cpu"), (T4, "mps", "hay: cuda, cpu"), (MAC, "cuda", "mps, cpu")],
)
def test_an_absent_device_is_refused(machine: Machine, device: str, present: str) -> None:
    """The message says which there are."""
    with pytest.raises(RequestError, match=f"--device {device} no está.*{present}"):
        place(machine, device=device)


@pytest.mark.parametrize(("machine", "settings"), [(CPU, {}), (MAC, {}), (A100, {"device": "cpu"})])
def test_qlora_needs_cuda(machine: Machine, settings: dict[str, Any]) -> None:
    """Elsewhere it is refused, with what would run."""
    with pytest.raises(RequestError, match="--qlora necesita una GPU CUDA") as caught:
        place(machine, qlora=True, **settings)
    assert "--lora" in caught.value.mend


@pytest.mark.parametrize(("fits", "micro_tokens"), [(1024, 1024), (512, 512), (128, 128), (90, 64)])
def test_fewer_tokens_pass_at_once_when_memory_is_short(fits: int, micro_tokens: int) -> None:
    """Halved until it fits; a tenth of the free memory is left to others; the longest row is the end of it."""
    free = int(needed(fits) / 0.9) + 10
    assert place(replace(CPU, memory_free=free)).micro_tokens == micro_tokens


def test_too_little_memory_is_told_before_any_work() -> None:
    """When not even the longest row fits; what is needed and what is free are in the message."""
    free = int(needed(WORK.longest) / 0.9) - 1000
    with pytest.raises(ResourceError, match=r"unos 1\.\d GB de memoria y hay 1\.\d GB libres") as caught:
        place(replace(CPU, memory_free=free))
    assert "--max-length" in caught.value.mend


def test_the_cards_memory_counts_on_a_card() -> None:
    """However much the machine has."""
    with pytest.raises(ResourceError):
        place(replace(T4, cuda_free=GB // 2))
    assert place(replace(T4, memory_free=0)).device == "cuda"


@pytest.mark.parametrize(
    ("method", "precision", "weights", "lowered"),
    [
        ("lora", "bf16", torch.bfloat16, True),
        ("qlora", "fp16", torch.float16, True),
        ("lora", "fp32", torch.float32, False),
        ("full", "bf16", torch.float32, True),
        ("full", "fp32", torch.float32, False),
        ("inference", "bf16", torch.bfloat16, False),
    ],
)
def test_trained_weights_stay_float32(method: str, precision: str, weights: torch.dtype, lowered: bool) -> None:
    """A frozen base is loaded in low precision; weights that are trained are computed in it by autocast."""
    placement = Placement("cpu", "cpu", precision, method, "sdpa", 1024, "")
    assert placement.base_dtype == weights
    with placement.autocast() as context:
        assert (context is not None) == lowered
        assert torch.is_autocast_enabled("cpu") == lowered
    assert isinstance(placement.autocast(), contextlib.AbstractContextManager)


def test_a_placement_comes_back_from_json() -> None:
    """A resumed run goes on where it was."""
    placement = place(A100)
    assert Placement(**placement.to_json()) == placement


def test_a_finished_model_answers_on_the_best_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same table; device and precision may be asked."""
    monkeypatch.setattr(training_router, "inspect_machine", lambda: A100)
    assert (place_for_inference().device, place_for_inference().precision) == ("cuda", "bf16")
    asked = place_for_inference("cpu", "fp32")
    assert (asked.device, asked.precision, asked.method) == ("cpu", "fp32", "inference")
    with pytest.raises(RequestError):
        place_for_inference("mps")


def test_available_devices_come_best_first() -> None:
    """The CPU is always there, and last."""
    assert training_router.available_devices(replace(A100, mps=True)) == ["cuda", "mps", "cpu"]
    assert training_router.available_devices(CPU) == ["cpu"]
