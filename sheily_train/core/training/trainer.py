"""Train one branch: the loop, readable from top to bottom. Killed anywhere, the same call goes on to the same bits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from sheily_train import durable, paths
from sheily_train.core.branches import catalog
from sheily_train.core.training import bases, checkpoint, data, hardware, results, specialist
from sheily_train.core.training.adapters import create_lora_model, leave_types_to_autocast, quantization
from sheily_train.core.training.clock import Clock
from sheily_train.core.training.engine import Engine, StepResult
from sheily_train.core.training.evaluation import HeldOut, ask_specialist, evaluate_rows, open_specialist
from sheily_train.core.training.forward import PaddedForward
from sheily_train.core.training.narration import TextLog
from sheily_train.core.training.preparation import Job, check_resources, identify, load_training_data, prepare
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.run import Run, StopSignal, hold
from sheily_train.core.training.shared_base import SharedBase
from sheily_train.errors import Interrupted, ResourceError
from sheily_train.i18n import _
from sheily_train.runlog import Listener, RunLog, read

__all__ = ["TrainingResult", "create_lora_model", "load_training_data", "quick_test", "train_model"]


@dataclass(frozen=True)
class TrainingResult:
    """Where the specialist and its log lie, its metrics, and whether it had been trained before."""

    folder: Path
    log: Path
    metrics: dict[str, Any]
    skipped: bool = False


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


def train_model(
    request: TrainRequest,
    *,
    listeners: tuple[Listener, ...] = (),
    fresh: bool = False,
    shared: SharedBase | None = None,
) -> TrainingResult:
    """Train a branch's specialist, or go on where an earlier call with the same request was cut off.

    Args:
        request: what to train and how.
        listeners: called with every record of the run log.
        fresh: pass over checkpoints and an up-to-date result of the same request.
        shared: where an adapter's base is kept for the next call.

    Raises:
        SheilyError: see :mod:`sheily_train.errors`; :class:`Interrupted` after Ctrl-C or SIGTERM, all of it saved.
    """
    catalog.find_branch(request.branches_dir, request.branch)
    with _explained_shortage(request), hold(request.model_folder, request.branch):
        identity = identify(request)
        run = Run(request.model_folder, identity.key)
        if fresh:
            run.discard()
        elif (result := _finished(request.model_folder, run, identity.key)) is not None:
            return result
        job = prepare(request, identity, shared)
        check_resources(job)
        return _Training(job, run, listeners, shared or SharedBase()).result()


def quick_test(folder: Path, branch: str, question: str, *, max_new_tokens: int = 100) -> str:
    """The answer of the model in ``folder``, trained on ``branch``, to a question."""
    return ask_specialist(open_specialist(folder, branch), question, max_new_tokens=max_new_tokens)


def _finished(folder: Path, run: Run, key: str) -> TrainingResult | None:
    """The result of the same request when it is already there, after ending a move that a kill cut short."""
    if specialist.is_complete(run.result):
        specialist.publish(run.result, folder)
        run.discard()
    config = specialist.read_config(folder)
    if config is None or config["key"] != key:
        return None
    run.discard()
    metrics = durable.read_json(folder / paths.TRAINING_METRICS) or {}
    return TrainingResult(folder, Path(config["log"]), metrics, skipped=True)


class _Training:
    """One sitting of a run: from its newest checkpoint, or from nothing, to the published result."""

    def __init__(self, job: Job, run: Run, listeners: tuple[Listener, ...], shared: SharedBase) -> None:
        hardware.make_deterministic(job.placement.device)
        self.job, self.run, self.listeners, self.shared = job, run, listeners, shared
        self.fingerprint = hardware.fingerprint(job.placement.device)
        self.begun = run.begin(job.branch.name, job.placement.to_json(), self.fingerprint)
        self.log_path = Path(self.begun["log"])

    def result(self) -> TrainingResult:
        saved, damaged = self.run.newest_checkpoint()
        kept = min(saved.state["log_bytes"], self.log_path.stat().st_size) if saved and self.log_path.exists() else 0
        with (
            TextLog(self.log_path.with_suffix(".log")) as text,
            RunLog(self.log_path, keep=kept, listeners=(text, *self.listeners)) as self.log,
        ):
            self._tell_start(saved, damaged)
            self.engine = Engine(self._load_model(), self.job.request, self.job.placement, self.job.work.steps)
            if isinstance(self.engine.forward, PaddedForward):
                self._note(_("Este modelo no admite filas empaquetadas: se entrena por el camino común, más lento."))
            self.progress = self._restore(saved) if saved else self._first_look()
            self.clock = self._start_clock(saved)
            with StopSignal() as stop:
                self._run_steps(stop)
            metrics = self._finish()
        if self.job.placement.method == "lora":
            self.shared.give_back(self.engine.model)
        return TrainingResult(self.job.request.model_folder, self.log_path, metrics)

    def _tell_start(self, saved: checkpoint.Checkpoint | None, damaged: list[Path]) -> None:
        at = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        self.log.write("resume" if saved else "start", at=at, step=saved.step if saved else 0, **self.job.facts())
        for folder in damaged:
            self._note(_("El punto de control {folder} está dañado; se usa uno anterior.").format(folder=folder))
        for folder in self.run.others():
            self._note(
                _("Queda sin terminar un entrenamiento con otros ajustes o datos en {folder}.").format(folder=folder)
            )
        then = self.begun["fingerprint"]
        changed = [
            f"{name}: {then.get(name)} → {now}" for name, now in self.fingerprint.items() if then.get(name) != now
        ]
        if changed and saved:
            self._note(
                _(
                    "La máquina o las versiones han cambiado ({changed}): el resultado puede no ser igual bit a bit."
                ).format(changed="; ".join(changed))
            )

    def _note(self, text: str) -> None:
        self.log.write("note", text=text)

    def _load_model(self) -> Any:
        request, placement = self.job.request, self.job.placement

        def load() -> Any:
            return bases.load_model(
                request.model,
                dtype=placement.base_dtype,
                device=placement.device,
                attention=placement.attention,
                quantization=quantization(placement.method, placement.precision),
            )

        if not request.uses_adapter:
            return load()
        key = (self.job.base, placement.device, placement.method, placement.precision, placement.attention)
        adapted = create_lora_model(self.shared.take(key, load), request)
        leave_types_to_autocast(adapted)
        return adapted

    def _start_clock(self, saved: checkpoint.Checkpoint | None) -> Clock:
        return Clock(
            seconds_before=saved.state["seconds"] if saved else 0.0,
            step=self.progress.step,
            steps=self.job.work.steps,
            save_steps=self.job.request.save_steps,
            save_minutes=self.job.request.save_minutes,
        )

    def _run_steps(self, stop: StopSignal) -> None:
        """The loop: rows, step, record, and now and then a checkpoint."""
        job, progress = self.job, self.progress
        while progress.step < job.work.steps and not progress.stopped:
            rows = job.step_rows(progress.step)
            result = self._take_step(rows)
            progress.step += 1
            self.log.write("step", step=progress.step, examples=len(rows), **vars(result))
            self._tell_time(result.tokens, len(rows))
            if job.request.early_stopping and progress.step % job.steps_per_epoch == 0:
                self._judge_epoch()
            if stop.received is not None:
                self._save()
                raise self._interrupted(stop.received)
            if self.clock.checkpoint_due():
                self._save()

    def _take_step(self, rows: list[data.TokenRow]) -> StepResult:
        """One optimizer step; as often as memory runs out, the same one again in micro-batches of half the size."""
        while True:
            groups = data.split_by_tokens(rows, self.progress.micro_tokens)
            try:
                return self.engine.step(self.progress.step, groups)
            except (MemoryError, RuntimeError) as error:
                if not hardware.is_out_of_memory(error) or len(groups) == len(rows):
                    raise
            self.engine.drop_gradients()
            self.progress.micro_tokens = max(map(data.padded_size, groups)) // 2
            self._note(
                _("Se acabó la memoria en el paso {step}: se repite con {tokens} tokens a la vez.").format(
                    step=self.progress.step + 1, tokens=self.progress.micro_tokens
                )
            )
            self._save()  # whoever goes on from here takes the same pieces

    def _tell_time(self, tokens: int, examples: int) -> None:
        self.clock.count(tokens, examples)
        timing = self.clock.timing()
        if timing is not None:
            self.log.write("timing", **timing)

    def _first_look(self) -> Progress:
        """Nothing done yet, but the base judged."""
        return Progress(self.job.placement.micro_tokens, before=self._evaluate(step=0))

    def _evaluate(self, step: int) -> HeldOut | None:
        heldout = evaluate_rows(self.engine.model, self.job.heldout, self.job.placement)
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

    def _interrupted(self, number: int) -> Interrupted:
        error = Interrupted(
            _("Interrumpido en el paso {step} de {steps}; todo está guardado.").format(
                step=self.progress.step, steps=self.job.work.steps
            ),
            mend=_("Repite la misma orden para seguir."),
        )
        error.exit_code = 128 + number
        self._note(str(error))
        return error

    def _save(self) -> None:
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

    def _restore(self, saved: checkpoint.Checkpoint) -> Progress:
        self.engine.load_state(saved.tensors, saved.state["scaler"])
        return Progress(
            micro_tokens=min(saved.state["micro_tokens"], self.job.placement.micro_tokens),
            step=saved.step,
            before=HeldOut(saved.state["before"]) if saved.state["before"] is not None else None,
            best=saved.state["best"],
            epochs_without_gain=saved.state["epochs_without_gain"],
            stopped=saved.state["stopped"],
            best_weights={name: tensor for name, tensor in saved.tensors.items() if name.startswith("best/")},
        )

    def _finish(self) -> dict[str, Any]:
        """Judge the result, write it beside its place and move it there."""
        seconds = self.clock.seconds
        if self.progress.best_weights:
            self.engine.load_weights(self.progress.best_weights, "best")
        after = self._evaluate(self.progress.step)
        metrics = self._metrics(after, seconds)
        results.write(self.run.result, self.engine.model, self.job, metrics, self.fingerprint, self.log_path)
        specialist.publish(self.run.result, self.job.request.model_folder)
        self.log.write("done", at=f"{datetime.now():%Y-%m-%d %H:%M:%S}", **metrics.to_json())
        self.run.discard()
        return metrics.to_json()

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


@contextlib.contextmanager
def _explained_shortage(request: TrainRequest) -> Iterator[None]:
    """Turn what system and torch say about a full disk or memory into an error with what is safe and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise ResourceError(
            _("Se acabó la memoria al entrenar «{branch}»; los puntos de control siguen intactos.").format(
                branch=request.branch
            ),
            mend=_("Repite la orden con un --micro-tokens menor: sigue desde el último."),
        ) from error
    except OSError as error:
        if not durable.is_full_disk(error):
            raise
        raise ResourceError(
            _("El disco está lleno ({error}); los puntos de control anteriores de «{branch}» siguen intactos.").format(
                error=error, branch=request.branch
            ),
            mend=_("Libera espacio y repite la misma orden: sigue desde el último."),
        ) from error
