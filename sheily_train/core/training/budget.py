"""What a run will need, before it starts: memory, disk, steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sheily_train.core.training import kernels
from sheily_train.core.training.adapters import adapter_names
from sheily_train.core.training.answer_loss import LOGITS_AT_ONCE
from sheily_train.core.training.data import Pass, TokenRow
from sheily_train.core.training.forward import choose_forward

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sheily_train.core.training.training_router import Placement

_PROCESS_BYTES = 600e6
"""Resident size of a process that has imported torch, transformers and peft."""

_BACKWARD_SHARE = 0.1
"""What the backward pass makes for itself, and the allocator loses, as a part of what was kept for it."""

_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model that decide its memory."""

    parameters: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class Workload:
    """What a run has to do.

    Attributes:
        examples, heldout: rows trained on, rows judged on.
        tokens, answer_tokens: of the training rows, once through.
        longest: tokens of the longest row, held-out ones included.
        steps: optimizer steps.
        trainable: parameters that are trained.
        keeps_best: whether a copy of the best trained weights is kept (early stopping).
        adapted_features: inputs and outputs of all layers with an adapter, summed.
    """

    examples: int
    heldout: int
    tokens: int
    answer_tokens: int
    longest: int
    steps: int
    trainable: int
    keeps_best: bool = False
    adapted_features: int = 0


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM without weights: nothing is loaded, only shapes are known."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def model_shape(model: PreTrainedModel) -> Shape:
    """The sizes of a causal LM."""
    text = model.config.get_text_config()
    hidden = text.hidden_size
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
    )


def steps_per_epoch(examples: int, examples_per_step: int) -> int:
    """Optimizer steps of one pass; the last one may be smaller."""
    return math.ceil(examples / examples_per_step)


def total_steps(examples: int, examples_per_step: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of the whole run."""
    steps = max(1, math.ceil(epochs * steps_per_epoch(examples, examples_per_step)))
    return min(steps, max_steps) if max_steps else steps


def workload(
    rows: Sequence[TokenRow],
    heldout: Sequence[TokenRow],
    *,
    steps: int,
    trainable: int,
    keeps_best: bool = False,
    adapted_features: int = 0,
) -> Workload:
    """Count what the rows hold."""
    return Workload(
        examples=len(rows),
        heldout=len(heldout),
        tokens=sum(len(row.ids) for row in rows),
        answer_tokens=sum(row.answer_tokens for row in rows),
        longest=max(len(row.ids) for row in (*rows, *heldout)),
        steps=steps,
        trainable=trainable,
        keeps_best=keeps_best,
        adapted_features=adapted_features,
    )


def memory_needed(
    shape: Shape, work: Workload, *, method: str, precision: str, attention: str, micro_tokens: int
) -> int:
    """Expected peak bytes of the process (CPU) or card (CUDA).

    Weights, gradients and Adam's two moments; per token what each layer keeps for its backward, and each adapter in
    float32; logits of the answer tokens with their float32 copy, probabilities and gradient.
    """
    width = _WIDTH[precision]
    base_width = {"qlora": 0.55, "lora": width, "full": 4}[method]
    weights = shape.parameters * base_width + work.trainable * (12 if method == "full" else 16)
    weights += work.trainable * 4 * work.keeps_best
    tokens = max(micro_tokens, work.longest)
    per_layer = (12 * shape.hidden + 5 * shape.intermediate) * width
    if attention == "eager":
        per_layer += shape.heads * min(work.longest, tokens) * (2 * width + 4)
    logits = shape.vocabulary * (2 * width + 12)
    answer_share = work.answer_tokens / work.tokens
    adapters = 4 * work.adapted_features
    return int(_PROCESS_BYTES + weights + tokens * (shape.layers * per_layer + adapters + answer_share * logits))


def counted_memory(adapted: PreTrainedModel, pieces: Pass, placement: Placement) -> int:
    """Expected peak bytes of training adapters on packed rows, counted on the model itself without weights.

    Args:
        adapted: base and adapters on PyTorch's meta device, their parameters of the types they will have.
        pieces: the largest pass; its numbers are those of the adapters.
        placement: how it runs.
    """
    frozen = sum(parameter.nbytes for parameter in adapted.parameters() if not parameter.requires_grad)
    trained = sum(parameter.nbytes for parameter in adapted.parameters() if parameter.requires_grad)
    vocabulary = adapted.config.get_text_config().vocab_size
    logits = min(LOGITS_AT_ONCE, vocabulary * sum(row.answer_tokens for _number, rows in pieces for row in rows))
    kept = _kept_for_backward(adapted, pieces, placement) * (1 + _BACKWARD_SHARE)
    width = _WIDTH[placement.precision]
    per_logit = width if placement.device == "cpu" and kernels.available(placement.dtype) else 4 + 2 * width
    return int(_PROCESS_BYTES + frozen + 4 * trained + kept + logits * per_logit)


def _kept_for_backward(model: PreTrainedModel, pieces: Pass, placement: Placement) -> int:
    """Bytes that a pass keeps for its backward pass, beside the parameters."""
    import torch

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    numbers, groups = zip(*pieces, strict=True)
    names = adapter_names(1 + max(numbers))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # the loss holds what was kept until it is counted
        loss = choose_forward(model, placement).losses(groups, [names[number] for number in numbers])
    total = sum(kept.values())
    del loss
    return total


def disk_needed(shape: Shape, work: Workload, method: str) -> int:
    """Expected peak bytes on disk: the checkpoints (one more while it is written) and the result."""
    state = work.trainable * (16 if work.keeps_best else 12)
    result = shape.parameters * 4 if method == "full" else work.trainable * 4
    return int((_KEPT_CHECKPOINTS + 1) * state + result + 20e6)
