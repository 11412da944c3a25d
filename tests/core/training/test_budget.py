from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sheily_train.core.training import budget, checkpoint
from sheily_train.core.training.budget import Shape, Workload
from sheily_train.core.training.data import IGNORED, TokenRow
from sheily_train.core.training.engine import Engine, take_step
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.training_router import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE = Shape(parameters=135_000_000, hidden=576, intermediate=1536, layers=30, heads=9, vocabulary=49_152)
WORK = Workload(
    examples=64, heldout=16, tokens=6000, answer_tokens=3000, longest=300, steps=24, trainable=SHAPE.parameters
)
PLAN: dict[str, Any] = {"method": "full", "precision": "fp32", "attention": "sdpa", "micro_tokens": 1024}


def memory(shape: Shape = SHAPE, work: Workload = WORK, **changes: Any) -> int:
    return budget.memory_needed(shape, work, **PLAN | changes)


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.mark.parametrize(
    ("examples", "per_step", "epochs", "max_steps", "steps"),
    [
        (64, 8, 3.0, 0, 24),
        (65, 8, 3.0, 0, 27),
        (1, 8, 1.0, 0, 1),
        (64, 8, 0.5, 0, 4),
        (64, 8, 0.01, 0, 1),
        (64, 8, 3.0, 10, 10),
        (64, 8, 3.0, 100, 24),
    ],
)
def test_steps_follow_from_examples_and_passes(
    examples: int, per_step: int, epochs: float, max_steps: int, steps: int
) -> None:
    """A last smaller step counts; part of a pass rounds up; there is always one; the maximum is a maximum."""
    assert budget.total_steps(examples, per_step, epochs, max_steps) == steps


def test_a_model_without_weights_has_the_shape_of_the_real_one(model: PreTrainedModel) -> None:
    """Parameters and sizes are known before anything is loaded; tied weights count once."""
    ghost = budget.meta_model(model.config)
    assert all(parameter.is_meta for parameter in ghost.parameters())
    assert budget.model_shape(ghost) == budget.model_shape(model)
    assert budget.model_shape(ghost) == Shape(
        parameters=model.num_parameters(), hidden=32, intermediate=64, layers=2, heads=4, vocabulary=340
    )


def test_a_shape_without_intermediate_size_is_assumed_usual() -> None:
    """GPT-2 says it with null: four times its width."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=100)
    assert budget.model_shape(budget.meta_model(config)).intermediate == 128


def test_the_workload_counts_what_the_rows_hold() -> None:
    """The longest row may be a held-out one."""
    short, long = (TokenRow((0,) * size, (IGNORED,) * (size - 2) + (0, 0), "x:1") for size in (5, 9))
    assert budget.workload([short, short], [long], steps=3, trainable=7) == Workload(2, 1, 10, 4, 9, 3, 7)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"method": "lora"}, {"method": "full"}),
        ({"method": "qlora"}, {"method": "lora"}),
        ({"method": "lora", "precision": "bf16"}, {"method": "lora"}),
        ({"precision": "bf16"}, {}),
        ({}, {"micro_tokens": 2048}),
        ({}, {"attention": "eager"}),
        ({}, {"work": replace(WORK, longest=4000)}),
        ({}, {"work": replace(WORK, answer_tokens=6000)}),
        ({"method": "lora", "work": replace(WORK, trainable=1000)}, {"method": "lora"}),
        ({}, {"work": replace(WORK, keeps_best=True)}),
        ({}, {"work": replace(WORK, adapted_features=57_600)}),
    ],
)
def test_memory_grows_with_what_is_asked(less: dict[str, Any], more: dict[str, Any]) -> None:
    """Method, precision, tokens at once, attention, longest row, answers, adapter size."""
    lora = replace(WORK, trainable=460_800)
    base, grown = ({"work": lora if "lora" in plan.get("method", "") else WORK} | plan for plan in (less, more))
    assert memory(**base) < memory(**grown)


def test_a_single_row_needs_its_room_however_few_tokens_were_asked() -> None:
    """A row longer than the micro-batch still passes whole."""
    assert memory(micro_tokens=1) == memory(micro_tokens=WORK.longest)


def test_disk_holds_three_checkpoints_and_the_result(model: PreTrainedModel, tmp_path: Path) -> None:
    """The estimate covers what a real engine writes, and little more."""
    placement = Placement("cpu", "cpu", "fp32", "full", "eager", 1024, "")
    engine = Engine(model, TrainRequest(), placement, 1)
    take_step([engine], 0, [[(0, [TokenRow((5, 6, 7), (IGNORED, 6, 7), "x:1")])]])
    for step in (1, 2):
        checkpoint.save(tmp_path, step, engine.state_tensors(), {})
    two = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    shape = budget.model_shape(model)
    work = replace(WORK, trainable=shape.parameters)
    state, margin = two / 2, 20e6
    needed = budget.disk_needed(shape, work, "full") - margin
    assert needed == pytest.approx(3 * state + 4 * shape.parameters, rel=0.15)
    assert budget.disk_needed(shape, replace(work, trainable=100), "lora") < margin + 100 * 41
