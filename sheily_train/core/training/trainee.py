"""A branch while it is trained: its log, its engine, how far it is, its checkpoints, its result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sheily_train.core.training import checkpoint, hardware, initial_adapter, kernels, results, specialist
from sheily_train.core.training.adapters import LONE_ADAPTER
from sheily_train.core.training.clock import Clock
from sheily_train.core.training.data import TokenRow
from sheily_train.core.training.engine import Engine, StepResult
from sheily_train.core.training.evaluation import HeldOut, evaluate_rows
from sheily_train.core.training.forward import PaddedForward
from sheily_train.core.training.narration import TextLog
from sheily_train.core.training.preparation import Job
from sheily_train.core.training.run import Run, interrupted
from sheily_train.core.training.specialist import TrainingResult
from sheily_train.errors import Interrupted
from sheily_train.i18n import _
from sheily_train.runlog import Listener, Record, RunLog, read


@dataclass
class Progress:
    """What a run has reached; with the engine's tensors it is all that a checkpoint holds."""

    micro_tokens: int
    step: int = 0
    before: HeldOut | None = None
    best: float | None = None
    epochs_without_gain: int = 0
    stopped: bool = False
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Trainee:
    """One sitting of a run, driven from outside: begin, take steps, save, finish.

    Args:
        job: what is to be done.
        run: its place on disk.
        listeners: called with every record of the run log, with the name of the branch in it.
        go_on_from: the step of the checkpoint to go on from; ``None`` for the newest.
    """

    log: RunLog
    engine: Engine
    progress: Progress
    clock: Clock

    def __init__(self, job: Job, run: Run, listeners: tuple[Listener, ...], go_on_from: int | None = None) -> None:
        self.job, self.run = job, run
        self._listeners = tuple(partial(_with_branch, job.branch.name, listener) for listener in listeners)
        self._fingerprint = hardware.fingerprint(job.placement.device)
        self._begun = run.begin(job.branch.name, job.placement.to_json(), self._fingerprint)
        self.log_path = Path(self._begun["log"])
        if go_on_from is not None:
            checkpoint.drop_after(run.checkpoints, go_on_from)
        self._saved, self._damaged = run.newest_checkpoint()

    @contextmanager
    def open(self) -> Iterator[None]:
        """With the log open, and its first lines told."""
        saved, kept = self._saved, 0
        if saved and self.log_path.exists():
            kept = min(saved.state["log_bytes"], self.log_path.stat().st_size)
        with ExitStack() as stack:
            text = stack.enter_context(TextLog(self.log_path.with_suffix(".log")))
            self.log = stack.enter_context(RunLog(self.log_path, keep=kept, listeners=(text, *self._listeners)))
            self._tell_start()
            yield

    def _tell_start(self) -> None:
        saved = self._saved
        at = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        self.log.write("resume" if saved else "start", at=at, step=saved.step if saved else 0, **self.job.facts())
        for folder in self._damaged:
            self.note(_("El punto de control {folder} está dañado; se usa uno anterior.").format(folder=folder))
        for folder in self.run.others():
            self.note(
                _("Queda sin terminar un entrenamiento con otros ajustes o datos en {folder}.").format(folder=folder)
            )
        then = self._begun["fingerprint"]
        changed = [
            f"{name}: {then.get(name)} → {now}" for name, now in self._fingerprint.items() if then.get(name) != now
        ]
        if changed and saved:
            self.note(
                _(
                    "La máquina o las versiones han cambiado ({changed}): el resultado puede no ser igual bit a bit."
                ).format(changed="; ".join(changed))
            )

    def note(self, text: str) -> None:
        """Tell something in the log."""
        self.log.write("note", text=text)

    def begin(self, model: Any, adapter: str = LONE_ADAPTER) -> None:
        """Take the model, and be where the checkpoint left off, or at the beginning with the base judged."""
        job, saved = self.job, self._saved
        self.engine = Engine(model, job.request, job.placement, job.work.steps, adapter)
        if isinstance(self.engine.forward, PaddedForward):
            self.note(_("Este modelo no admite filas empaquetadas: se entrena por el camino común, más lento."))
        elif job.placement.device == "cpu" and not kernels.available(torch.float32):
            self.note(_("No hay un compilador de C (cc) que sirva: calcula solo PyTorch, más lento."))
        if saved:
            self.engine.load_state(saved.tensors, saved.state["scaler"])
            self.progress = _progress(saved, job.placement.micro_tokens)
        else:
            self.progress = Progress(job.placement.micro_tokens, before=self._evaluate(step=0))
            if job.initial:
                initial_adapter.load(job.request, job.initial, model, adapter)
        self._saved = None  # its tensors are the engine's now
        self.clock = Clock(
            seconds_before=saved.state["seconds"] if saved else 0.0,
            step=self.progress.step,
            steps=job.work.steps,
            save_steps=job.request.save_steps,
            save_minutes=job.request.save_minutes,
        )

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        return self.progress.stopped or self.progress.step >= self.job.work.steps

    def rows(self) -> list[TokenRow]:
        """Those of the next step."""
        return self.job.step_rows(self.progress.step)

    def stepped(self, result: StepResult, examples: int, share: float) -> None:
        """Record a step that was taken; ``share`` of its time was this branch's."""
        progress = self.progress
        progress.step += 1
        self.log.write("step", step=progress.step, examples=examples, **vars(result))
        self.clock.count(result.tokens, examples, share)
        if timing := self.clock.timing():
            self.log.write("timing", **timing)
        if self.job.request.early_stopping and progress.step % self.job.steps_per_epoch == 0:
            self._judge_epoch()

    def _evaluate(self, step: int) -> HeldOut | None:
        heldout = evaluate_rows(self.engine.model, self.job.heldout, self.job.placement, self.engine.adapter)
        if heldout is not None:
            self.log.write("eval", step=step, **heldout.to_json())
        return heldout

    def _judge_epoch(self) -> None:
        """Keep the weights that are best on the held-out rows; stop after too many epochs without gain."""
        progress, heldout = self.progress, self._evaluate(self.progress.step)
        if heldout is None:
            return
        if progress.best is None or heldout.loss < progress.best:
            progress.best, progress.epochs_without_gain = heldout.loss, 0
            progress.best_weights = {f"best/{name}": p.detach().clone() for name, p in self.engine.parameters.items()}
        else:
            progress.epochs_without_gain += 1
            progress.stopped = progress.epochs_without_gain >= self.job.request.early_stopping

    def interrupted(self, number: int) -> Interrupted:
        """The error that ends the run at the signal ``number``, told in the log."""
        text = _("Interrumpido en el paso {step} de {steps}; todo está guardado.")
        error = interrupted(number, text.format(step=self.progress.step, steps=self.job.work.steps))
        self.note(str(error))
        return error

    def save(self) -> None:
        """Write a checkpoint."""
        started, progress = time.monotonic(), self.progress
        state = {
            "micro_tokens": progress.micro_tokens,
            "before": progress.before.loss if progress.before else None,
            "best": progress.best,
            "epochs_without_gain": progress.epochs_without_gain,
            "stopped": progress.stopped,
            "seconds": self.clock.seconds,
            "scaler": self.engine.scaler.state_dict(),
            "log_bytes": self.log.sync(),
        }
        tensors = self.engine.state_tensors() | progress.best_weights
        checkpoint.save(self.run.checkpoints, progress.step, tensors, state)
        took = time.monotonic() - started
        self.clock.checkpoint_written(took)
        self.log.write("checkpoint", step=progress.step, seconds=round(took, 3))

    def finish(self) -> TrainingResult:
        """Judge the result, write it beside its place and move it there."""
        seconds = self.clock.seconds
        if self.progress.best_weights:
            self.engine.load_weights(self.progress.best_weights, "best")
        after = self._evaluate(self.progress.step)
        metrics = self._metrics(after, seconds)
        results.write(
            self.run.result,
            self.engine.model,
            self.engine.adapter,
            self.job,
            metrics,
            self._fingerprint,
            self.log_path,
        )
        specialist.publish(self.run.result, self.job.request.model_folder)
        self.log.write("done", at=f"{datetime.now():%Y-%m-%d %H:%M:%S}", **metrics.to_json())
        self.run.discard()
        return TrainingResult(self.job.request.model_folder, self.log_path, metrics.to_json())

    def _metrics(self, after: HeldOut | None, seconds: float) -> results.Metrics:
        job, steps = self.job, list(read(self.log_path, "step"))
        last = steps[-job.steps_per_epoch :]
        answer_tokens = sum(step["answer_tokens"] for step in last)
        return results.Metrics(
            branch=job.branch.name,
            heldout_before=self.progress.before,
            heldout_after=after,
            training_loss=sum(step["loss"] * step["answer_tokens"] for step in last) / max(1, answer_tokens),
            examples=job.work.examples,
            heldout_examples=job.work.heldout,
            tokens=sum(step["tokens"] for step in steps),
            answer_tokens=sum(step["answer_tokens"] for step in steps),
            steps=self.progress.step,
            epochs=self.progress.step / job.steps_per_epoch,
            stopped_early=self.progress.stopped,
            device=job.placement.device,
            precision=job.placement.precision,
            timing=results.Timing(
                seconds=round(seconds, 2),
                tokens_per_second=round(sum(step["tokens"] for step in steps) / seconds, 1),
                examples_per_second=round(sum(step["examples"] for step in steps) / seconds, 2),
                peak_memory_mb=hardware.peak_memory() // 2**20,
            ),
        )


def _progress(saved: checkpoint.Checkpoint, micro_tokens: int) -> Progress:
    state = saved.state
    return Progress(
        micro_tokens=min(state["micro_tokens"], micro_tokens),
        step=saved.step,
        before=HeldOut(state["before"]) if state["before"] is not None else None,
        best=state["best"],
        epochs_without_gain=state["epochs_without_gain"],
        stopped=state["stopped"],
        best_weights={name: tensor for name, tensor in saved.tensors.items() if name.startswith("best/")},
    )


def _with_branch(branch: str, listener: Listener, record: Record) -> None:
    listener({"branch": branch} | record)
