"""What a finished run leaves: model files, ``training_config.json``, ``training_metrics.json``, model card."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheily_train import durable, paths
from sheily_train.core.training import bases
from sheily_train.core.training.evaluation import HeldOut
from sheily_train.core.training.preparation import Job
from sheily_train.i18n import _, ngettext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Timing:
    """What the clock said: seconds of training over all sittings, and rates. Differs from run to run."""

    seconds: float
    tokens_per_second: float
    examples_per_second: float
    peak_memory_mb: int


@dataclass(frozen=True)
class Metrics:
    """The content of ``training_metrics.json``; all but ``timing`` is the same each time a request is run."""

    branch: str
    heldout_before: HeldOut | None
    heldout_after: HeldOut | None
    training_loss: float
    examples: int
    heldout_examples: int
    tokens: int
    answer_tokens: int
    steps: int
    epochs: float
    stopped_early: bool
    device: str
    precision: str
    timing: Timing

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {
            "heldout_before": self.heldout_before.to_json() if self.heldout_before else None,
            "heldout_after": self.heldout_after.to_json() if self.heldout_after else None,
        }


def write(
    staging: Path,
    model: Any,
    adapter: str,
    job: Job,
    metrics: Metrics,
    fingerprint: dict[str, Any],
    log: Path,
) -> None:
    """Write everything into ``staging``, each file pushed to the disk, ``training_config.json`` last.

    Of a model with adapters only ``adapter`` is written.
    """
    shutil.rmtree(staging, ignore_errors=True)
    durable.make_folder(staging)
    with durable.naming(staging):
        _write_model(staging, model, adapter)
        job.tokenizer.save_pretrained(staging)
    durable.write_json(staging / paths.TRAINING_METRICS, metrics.to_json())
    durable.write_bytes(staging / paths.MODEL_CARD, _card(job, metrics).encode())
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        durable.sync_file(path)
    model = job.request.model if job.request.model == bases.EMBEDDED else bases.locate(job.request.model)
    config = {
        "request": job.request.to_json() | {"model": model, "micro_tokens": job.placement.micro_tokens},
        "key": job.key,
        "base": job.base,
        "initial_adapter": job.initial or None,
        "data": {
            "hash": job.data_hash,
            "format": job.row_format.value,
            "training": [str(path) for path in job.branch.training_files],
            "evaluation": [str(path) for path in job.branch.evaluation_files],
        },
        "placement": job.placement.to_json(),
        "fingerprint": fingerprint,
        "log": str(log),
        "files": {str(path.relative_to(staging)): durable.sha256_file(path) for path in files},
    }
    durable.write_json(staging / paths.TRAINING_CONFIG, config)


def _write_model(staging: Path, model: Any, adapter: str) -> None:
    if not hasattr(model, "peft_config"):
        write_whole_model(staging, model)
        return
    from peft import get_peft_model_state_dict

    config = model.peft_config[adapter]
    config.inference_mode = True
    config.save_pretrained(staging)
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    durable.save_tensors(staging / paths.ADAPTER_WEIGHTS, weights, {"format": "pt"})


def write_whole_model(folder: Path, model: Any) -> None:
    """Write a model's weights and configuration so that ``from_pretrained`` loads them; tied tensors once."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach()
    durable.save_tensors(folder / paths.MODEL_WEIGHTS, weights, {"format": "pt"})


def _card(job: Job, metrics: Metrics) -> str:
    """The model card, with the metadata block that model hubs read."""
    adapter = job.request.uses_adapter
    header = ["---", "language: es", f"base_model: {job.request.model}"]
    header += ["library_name: peft" if adapter else "library_name: transformers", "pipeline_tag: text-generation"]
    header += ["tags:", "- sheily-train", *(["- lora"] if adapter else []), "---"]
    rows = [
        (_("Base"), f"`{job.request.model}` ({job.base})"),
        (_("Método"), job.placement.reason),
        *([(_("Parte de"), f"`{job.request.init_adapter}`")] if job.request.init_adapter else []),
        (
            _("Ejemplos"),
            ngettext(
                "{n} de entrenamiento, {m} reservado", "{n} de entrenamiento, {m} reservados", metrics.heldout_examples
            ).format(n=metrics.examples, m=metrics.heldout_examples),
        ),
        (
            _("Pasos"),
            ngettext(
                "{steps} ({epochs:g} pasada)", "{steps} ({epochs:g} pasadas)", 1 if metrics.epochs == 1 else 2
            ).format(steps=metrics.steps, epochs=metrics.epochs),
        ),
        (_("Pérdida reservada antes"), _loss_text(metrics.heldout_before)),
        (_("Pérdida reservada después"), _loss_text(metrics.heldout_after)),
    ]
    table = [f"| {name} | {value} |" for name, value in rows]
    title = _("Especialista «{branch}»").format(branch=job.branch.name)
    usage = _(
        'Pregúntale con `sheily ask {branch} "…"`. Todos los ajustes están en `training_config.json`; el mismo modelo '
        "se repite con `sheily train --branch {branch} --config training_config.json`."
    ).format(branch=job.branch.name)
    return "\n".join([*header, "", f"# {title}", "", "| | |", "|---|---|", *table, "", usage, ""])


def _loss_text(heldout: HeldOut | None) -> str:
    if heldout is None:
        return _("sin datos reservados")
    return _("{loss:.4f} (perplejidad {perplexity:.2f})").format(loss=heldout.loss, perplexity=heldout.perplexity)
