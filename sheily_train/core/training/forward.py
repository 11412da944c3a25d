"""From rows to the summed loss of their answers, by the way that suits the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from sheily_train.core.training.answer_loss import answer_loss
from sheily_train.core.training.data import IGNORED, TokenRow, collate
from sheily_train.core.training.fused_layers import fused, fused_layers
from sheily_train.core.training.lora_product import lora_layers, written_out
from sheily_train.core.training.packed_attention import packed_attention
from sheily_train.core.training.packing import pack

if TYPE_CHECKING:
    from sheily_train.core.training.training_router import Placement

PACKED_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3"})
"""transformers' names of the decoders whose rows are packed; each one is tested against its padded form."""


class Forward(Protocol):
    """A model's way from rows to losses."""

    @property
    def takes_several(self) -> bool:
        """Whether groups can pass through adapters of their own and each still get what it would get alone."""

    def losses(self, groups: Sequence[Sequence[TokenRow]], names: Sequence[str] = ("default",)) -> torch.Tensor:
        """Summed cross entropy (nats) of each group's answer tokens, float32 [G], with gradient.

        Args:
            groups: rows.
            names: the adapter that each group passes through.
        """


def choose_forward(model: Any, placement: Placement) -> Forward:
    """Packed rows for the decoders that are known to take them, else padded ones."""
    if model.config.model_type in PACKED_MODELS:
        return PackedForward(model, placement)
    return PaddedForward(model, placement)


class PaddedForward:
    """The plain path, for any causal LM: rows padded to their longest, transformers' and PEFT's own layers."""

    takes_several = False

    def __init__(self, model: Any, placement: Placement) -> None:
        self._model, self._placement = model, placement

    def losses(self, groups: Sequence[Sequence[TokenRow]], names: Sequence[str] = ("default",)) -> torch.Tensor:
        """As :meth:`Forward.losses`, for one group."""
        (rows,), _names = groups, names
        batch = collate(rows, self._placement.device)
        with self._placement.autocast():
            output = self._model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
        targets_BT = batch.labels_BT[:, 1:]
        learned_BT = targets_BT != IGNORED
        logits_AV = output.logits[:, :-1][learned_BT].float()
        return functional.cross_entropy(logits_AV, targets_BT[learned_BT], reduction="sum").view(1)


class PackedForward:
    """Rows without padding, equal beginnings once, logits of answer tokens only, layers by their written-out forms."""

    def __init__(self, model: Any, placement: Placement) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config, self._placement = causal.config, placement
        self._decoder, self._head = causal.get_decoder(), causal.get_output_embeddings()
        self._device = next(causal.parameters()).device
        self._layers = lora_layers(model)
        on_cpu = placement.device == "cpu"
        self._fused = fused_layers(self._decoder, placement.dtype, placement.attention) if on_cpu else []
        self._softcap = getattr(causal.config, "final_logit_softcapping", None)
        self._draws = any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in model.modules())
        self._draws |= getattr(causal.config, "attention_dropout", 0.0) > 0

    @property
    def takes_several(self) -> bool:
        """As :attr:`Forward.takes_several`: every adapter is plain LoRA, and nothing is drawn at random."""
        adapted = sum(hasattr(layer, "lora_A") for layer in self._decoder.modules())
        return 0 < adapted == len(self._layers) and not self._draws

    def losses(self, groups: Sequence[Sequence[TokenRow]], names: Sequence[str] = ("default",)) -> torch.Tensor:
        """As :meth:`Forward.losses`."""
        packed = pack(groups, self._device, share=not (self._draws and self._decoder.training))
        with (
            self._placement.autocast(),
            packed_attention(self._config, self._placement.attention),
            written_out(self._layers, names, packed.node_bounds),
            fused(self._fused),
        ):
            hidden_1ND = self._decoder(
                input_ids=packed.ids_N[None], position_ids=packed.positions_N[None], use_cache=False, pack=packed
            ).last_hidden_state
            hidden_AD = functional.embedding(packed.sources_A, hidden_1ND[0])
            return answer_loss(hidden_AD, self._head, packed.targets_A, packed.answers, self._softcap)
