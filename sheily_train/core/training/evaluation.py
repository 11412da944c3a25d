"""What a model is worth: held-out loss, perplexity, and an answer to a question."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from sheily_train import paths
from sheily_train.core.branches import catalog
from sheily_train.core.branches.examples import RowFormat, Turn, read_examples
from sheily_train.core.training import bases, specialist
from sheily_train.core.training.adapters import LONE_ADAPTER, quiet_peft
from sheily_train.core.training.data import TokenRow, pad_id, prompt_tokens, render_prompt, tokenize
from sheily_train.core.training.engine import mean_loss
from sheily_train.core.training.training_router import Placement, place_for_inference
from sheily_train.errors import BaseModelError, DataError, TrainingError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """Mean loss on the held-out answers, in nats per token, and its exponential."""

    loss: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))

    def to_json(self) -> dict[str, float]:
        """Both numbers."""
        return {"loss": self.loss, "perplexity": self.perplexity}


def evaluate_rows(
    model: torch.nn.Module, rows: Sequence[TokenRow], placement: Placement, adapter: str = LONE_ADAPTER
) -> HeldOut | None:
    """The loss on ``rows`` through an adapter, or ``None`` when there are none."""
    if not rows:
        return None
    loss = mean_loss(model, rows, placement, adapter)
    if not math.isfinite(loss):
        raise TrainingError(_("La pérdida sobre los ejemplos reservados no es un número ({loss}).").format(loss=loss))
    return HeldOut(loss)


@dataclass(frozen=True)
class Specialist:
    """A loaded model with its tokenizer and the ``training_config.json`` of the specialist it belongs to."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: dict[str, Any]
    placement: Placement

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter on a base."""
        return hasattr(self.model, "disable_adapter")

    @contextlib.contextmanager
    def base(self) -> Iterator[Specialist]:
        """The base it was trained from: the same model with its adapter switched off, or the base loaded beside it."""
        if self.has_adapter:
            with self.model.disable_adapter():
                yield self
        else:
            yield replace(self, model=_load(self.config["request"]["model"], self.placement).eval())


def open_specialist(folder: Path, branch: str, device: str = "auto", precision: str = "auto") -> Specialist:
    """The model of a branch from its folder, placed as the router says: base and adapter, or the whole model."""
    config = specialist.require_config(folder, branch)
    placement = place_for_inference(device, precision)
    has_adapter = (folder / paths.ADAPTER_CONFIG).is_file()
    base = config["request"]["model"] if has_adapter else str(folder)
    model = _load(base, placement)
    if has_adapter:
        model = _with_adapter(model, folder)
    return Specialist(model.eval(), bases.load_tokenizer(base), config, placement)


def _load(name: str, placement: Placement) -> Any:
    return bases.load_model(name, dtype=placement.base_dtype, device=placement.device, attention=placement.attention)


def _with_adapter(base: PreTrainedModel, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with quiet_peft():
            return PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            _("El adaptador de {folder} no se puede cargar: {error}.").format(folder=folder, error=error),
            mend=_("Entrena la rama de nuevo con --fresh."),
        ) from error


def compare_with_base(branch: str, branches_dir: Path, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Held-out loss and perplexity of a branch's specialist and of its base, measured now, ready for JSON."""
    found = catalog.find_branch(branches_dir, branch)
    loaded = open_specialist(folder, branch, device)
    rows = held_out_rows(found, loaded)
    after = held_out_loss(loaded, rows)
    with loaded.base() as base:
        before = held_out_loss(base, rows)
    return {
        "branch": branch,
        "heldout_examples": len(rows),
        "base": before.to_json(),
        "specialist": after.to_json(),
    }


def held_out_rows(branch: catalog.Branch, loaded: Specialist, max_length: int | None = None) -> list[TokenRow]:
    """A branch's held-out rows, put as the specialist's own were.

    Args:
        branch: whose rows.
        loaded: the specialist that they are for.
        max_length: tokens a row, where it is not that of the specialist's own training; the model's limit counts too.

    Raises:
        DataError: the branch has none, or one whose answer is too long.
    """
    examples = read_examples(branch.evaluation_files)
    if not examples:
        raise DataError(
            _("La rama «{branch}» no tiene ejemplos reservados.").format(branch=branch.name),
            mend=_("Ponlos en {folder}.").format(folder=branch.folder / paths.EVALUATION_DATA),
        )
    request = loaded.config["request"]
    length = min(max_length or request["max_length"], bases.most_tokens(loaded.model.config) or sys.maxsize)
    return tokenize(examples, loaded.tokenizer, template=request["template"], max_length=length, most=length)


def held_out_loss(loaded: Specialist, rows: Sequence[TokenRow]) -> HeldOut:
    """The loss of a loaded model on rows, measured now."""
    return HeldOut(mean_loss(loaded.model, rows, loaded.placement))


def ask_specialist(
    loaded: Specialist, question: str, *, max_new_tokens: int = 200, on_text: Callable[[str], None] | None = None
) -> str:
    """A specialist's answer to a question, put as its training rows were."""
    return answer(
        loaded.model,
        loaded.tokenizer,
        question,
        row_format=RowFormat(loaded.config["data"]["format"]),
        template=loaded.config["request"]["template"],
        max_new_tokens=max_new_tokens,
        on_text=on_text,
    )


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    row_format: RowFormat,
    template: str,
    max_new_tokens: int = 200,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's most likely answer to a question, put in the form it was trained on.

    Args:
        model: a causal LM, with or without adapter.
        tokenizer: its tokenizer.
        question: what the person asks.
        row_format: the format of the rows it was trained on.
        template: ``sheily`` or ``chat``.
        max_new_tokens: where an answer that does not end is cut.
        on_text: called with each piece of text as soon as it is known.
    """
    from transformers import GenerationConfig, TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            if on_text is not None:
                on_text(text)

    prompt = render_prompt([Turn("user", question)], row_format, template, tokenizer)
    ids_BT = torch.tensor([prompt_tokens(prompt, template, tokenizer)], dtype=torch.long, device=model.device)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id(tokenizer),
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=generation,
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(output[0, ids_BT.shape[1] :], skip_special_tokens=True)).strip()
