"""LoRA adapters on a base model, in PEFT's own format."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sheily_train.core.training.request import TrainRequest
from sheily_train.errors import RequestError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


LONE_ADAPTER = "default"
"""What PEFT calls an adapter that is the only one."""


def adapter_names(count: int) -> list[str]:
    """What adapters that share a base are called; the first one like a lone one."""
    return [LONE_ADAPTER, *(f"{LONE_ADAPTER}{number}" for number in range(1, count))]


def create_lora_model(model: PreTrainedModel, request: TrainRequest, count: int = 1) -> PeftModel:
    """Freeze ``model`` and put ``count`` equal LoRA adapters on it, each drawn from the request's seed.

    The adapter's weights are float32 whatever the base's type. Raises :class:`RequestError` when the model has no layer
    of the names in ``--lora-targets``.
    """
    import peft

    config = lora_config(model, request)
    if getattr(model, "is_quantized", False):  # pragma: no cover - needs CUDA
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with quiet_peft():
            torch.manual_seed(request.seed)
            adapted = peft.get_peft_model(model, config)
            for name in adapter_names(count)[1:]:
                torch.manual_seed(request.seed)
                adapted.add_adapter(name, config)
    except ValueError as error:
        raise RequestError(
            _("--lora-targets {targets}: el modelo no tiene capas con esos nombres.").format(
                targets=",".join(request.lora_targets)
            ),
            mend=_("Sus capas lineales son: {names}.").format(names=", ".join(_linear_names(model))),
        ) from error
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # PEFT trains the first one only
            parameter.requires_grad_(True)
    return adapted


def without_adapter(model: PeftModel) -> PreTrainedModel:
    """The base under an adapter as it was before: its own layers in their places, every parameter frozen."""
    base: PreTrainedModel = model.unload()
    base.train(False)
    return base


def leave_types_to_autocast(model: PeftModel) -> None:
    """Stop PEFT from copying every adapted layer's input to float32, which costs memory and time under autocast."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the notice that PEFT asks transformers for an attribute by its former name: nobody here can mend it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def lora_config(model: PreTrainedModel, request: TrainRequest) -> LoraConfig:
    """PEFT's configuration of the asked adapter.

    ``all-linear`` targets every linear layer but the head.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    targets: Any = list(request.lora_targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    return peft.LoraConfig(
        r=request.lora_r,
        lora_alpha=request.effective_alpha,
        lora_dropout=request.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        task_type="CAUSAL_LM",
    )


def _linear_names(model: torch.nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if _is_linear(layer)})


def _is_linear(layer: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, torch.nn.Linear | Conv1D)


def quantization(method: str, precision: str) -> Any:
    """transformers' 4-bit configuration for QLoRA; ``None`` for the other methods."""
    if method != "qlora":
        return None
    from sheily_train.errors import MissingExtraError

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError("bitsandbytes", "gpu", "--qlora") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision],
    )
