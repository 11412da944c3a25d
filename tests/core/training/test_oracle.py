"""Our trainer against transformers' Trainer and PEFT, on the same batches, in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sheily_train import paths, runlog
from sheily_train.core.training import bases, data
from sheily_train.core.training.adapters import create_lora_model, quiet_peft
from sheily_train.core.training.engine import Engine, take_step
from sheily_train.core.training.preparation import Job, prepare
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.specialist import TrainingResult
from sheily_train.core.training.trainer import train_model

RELATIVE = 1e-5


@pytest.fixture
def request_(home: Path, tiny_llama: Path) -> TrainRequest:
    return TrainRequest(
        branch="physics",
        model=str(tiny_llama),
        lora=True,
        epochs=2,
        batch_size=4,
        lr=5e-3,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        seed=7,
        precision="fp32",
        device="cpu",
        lora_targets=("q_proj", "v_proj", "down_proj"),
    )


def reference(job: Job, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses per step and final adapter weights of transformers' own Trainer on our batches in our order."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [row for step in range(job.work.steps) for row in job.step_rows(step)]
    dataset = [
        {"input_ids": list(row.ids), "labels": list(row.labels), "attention_mask": [1] * len(row.ids)} for row in rows
    ]
    request = job.request
    base = bases.load_model(request.model, dtype=torch.float32, device="cpu", attention="eager")
    model = create_lora_model(base, request)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=request.batch_size,
        num_train_epochs=1,
        learning_rate=request.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=request.seed,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=transformers.DataCollatorForSeq2Seq(job.tokenizer, padding=True),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return losses, weights


@pytest.fixture
def result(request_: TrainRequest) -> TrainingResult:
    return train_model(request_)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_losses_and_final_weights_equal_those_of_transformers_and_peft(
    request_: TrainRequest, result: TrainingResult, tmp_path: Path
) -> None:
    """Every step's loss and every final LoRA weight agree with transformers' Trainer to 1e-5 relative."""
    job = prepare(request_)
    losses, weights = reference(job, tmp_path)

    ours = [record["loss"] for record in runlog.read(result.log, "step")]
    assert len(ours) == job.work.steps == 6
    assert ours == pytest.approx(losses, rel=RELATIVE)
    saved = load_file(result.folder / paths.ADAPTER_WEIGHTS)
    assert len(saved) == len(weights) == 12
    for name, expected in weights.items():
        actual = saved[name.replace(".default", "")]
        assert torch.linalg.norm(actual - expected) <= RELATIVE * torch.linalg.norm(expected), name


def test_the_adapter_loads_with_peft_and_gives_the_same_logits(request_: TrainRequest, result: TrainingResult) -> None:
    """PeftModel.from_pretrained on our folder computes what the model we trained computed."""
    from peft import PeftModel

    job = prepare(request_)
    batch = data.collate(job.heldout)
    plain = bases.load_model(request_.model, dtype=torch.float32, device="cpu", attention="eager")
    before = plain(batch.ids_BT, attention_mask=batch.mask_BT).logits.detach()
    ours = create_lora_model(plain, request_)
    engine = Engine(ours, job.request, job.placement, job.work.steps)
    for step in range(job.work.steps):
        take_step([engine], step, [[(0, job.step_rows(step))]])
    ours.eval()
    base = bases.load_model(request_.model, dtype=torch.float32, device="cpu", attention="eager")
    with quiet_peft():
        theirs = PeftModel.from_pretrained(base, str(result.folder))
    with torch.no_grad():
        expected = ours(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
        actual = theirs(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual - before).abs().max() > 1e-2, "the adapter has no effect"


@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_accumulated_gradients_equal_those_of_the_large_batch(request_: TrainRequest, micro_tokens: int) -> None:
    """However a batch is cut into micro-batches, and however many batches a step adds up, the step is the same."""
    job = prepare(replace(request_, batch_size=6))
    rows = job.step_rows(0)

    def step(groups: list[list[data.TokenRow]]) -> tuple[float, dict[str, torch.Tensor]]:
        base = bases.load_model(request_.model, dtype=torch.float32, device="cpu", attention="eager")
        engine = Engine(create_lora_model(base, request_), replace(job.request, warmup_steps=0), job.placement, 10)
        [outcome] = take_step([engine], 0, [[(0, rows)] for rows in groups])
        return outcome.loss, engine.parameters

    whole_loss, whole = step([rows])
    cut_loss, cut = step(data.split_by_tokens(rows, micro_tokens))
    assert cut_loss == pytest.approx(whole_loss, rel=RELATIVE)
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-7)


def test_accumulation_of_small_batches_is_the_large_batch(request_: TrainRequest) -> None:
    """--batch-size 2 with --gradient-accumulation 2 takes the very steps of --batch-size 4."""
    large, small = (
        train_model(request, fresh=True)
        for request in (request_, replace(request_, batch_size=2, gradient_accumulation=2))
    )
    assert runlog.deterministic_lines(small.log) == runlog.deterministic_lines(large.log)
