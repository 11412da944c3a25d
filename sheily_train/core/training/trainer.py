"""Train branches: one, or several side by side over one base. Killed anywhere, the call goes on to the same bits."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sheily_train import durable
from sheily_train.core.branches import catalog
from sheily_train.core.training import hardware, specialist
from sheily_train.core.training.adapters import adapter_names, create_lora_model
from sheily_train.core.training.data import TokenRow, pass_size, split_into_passes
from sheily_train.core.training.engine import StepResult, take_step
from sheily_train.core.training.evaluation import ask_specialist, open_specialist
from sheily_train.core.training.identity import identify
from sheily_train.core.training.preparation import (
    Job,
    check_resources,
    load_training_data,
    memory_together,
    prepare,
)
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.run import Run, StopSignal, hold, interrupted, newest_common_step
from sheily_train.core.training.shared_base import SharedBase
from sheily_train.core.training.specialist import TrainingResult
from sheily_train.core.training.trainee import Trainee
from sheily_train.errors import Interrupted, ResourceError, TrainingError
from sheily_train.i18n import _
from sheily_train.runlog import Listener

__all__ = ["TrainingResult", "create_lora_model", "load_training_data", "quick_test", "train_model", "train_together"]

Ended = tuple[TrainRequest, TrainingResult | Exception]
"""A request and how it ended."""


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
        listeners: called with every record of the run log, with the name of the branch in it.
        fresh: pass over checkpoints and an up-to-date result of the same request.
        shared: where an adapter's base is kept for the next call.

    Raises:
        SheilyError: see :mod:`sheily_train.errors`; :class:`Interrupted` after Ctrl-C or SIGTERM, all of it saved.
    """
    [(_request, ended)] = train_together([request], listeners=listeners, fresh=fresh, shared=shared)
    if isinstance(ended, Exception):
        raise ended
    return ended


def train_together(
    requests: Sequence[TrainRequest],
    *,
    listeners: tuple[Listener, ...] = (),
    fresh: bool = False,
    shared: SharedBase | None = None,
    stop: StopSignal | None = None,
) -> Iterator[Ended]:
    """Train several branches side by side, each with an adapter of its own on one base, and yield each as it ends.

    Each specialist is the one that is trained alone, but for the rounding of larger matrix products. A branch that
    fails leaves the others. What was cut off goes on from the newest step that all of them have saved, so that their
    batches are those of an undisturbed run; when there is none, they are trained one after the other.

    Args:
        requests: of different branches with the same settings; several must be ``Job.takes_several``.
        listeners, fresh, shared: as for :func:`train_model`.
        stop: what turns signals into a request to stop; one that came while the last branch ended stops the next call.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, all of it saved.
    """
    shared, stop = shared or SharedBase(), stop or StopSignal()
    with ExitStack() as stack:
        ready: list[_Ready] = []
        for request in requests:
            place = stack.enter_context(ExitStack())
            try:
                found = _get_ready(request, place, fresh, shared)
            except Exception as error:
                place.close()
                yield request, _explained(error, request)
            else:
                if isinstance(found, _Ready):
                    ready.append(found)
                else:
                    place.close()
                    yield request, found
        for group, step in _groups(ready):
            yield from _Group(group, step, listeners, shared, stop).train()


def quick_test(folder: Path, branch: str, question: str, *, max_new_tokens: int = 100) -> str:
    """The answer of the model in ``folder``, trained on ``branch``, to a question."""
    return ask_specialist(open_specialist(folder, branch), question, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class _Ready:
    """A branch that can begin; ``place`` holds it for this process until it is closed."""

    job: Job
    run: Run
    place: ExitStack


def _get_ready(request: TrainRequest, place: ExitStack, fresh: bool, shared: SharedBase) -> _Ready | TrainingResult:
    catalog.find_branch(request.branches_dir, request.branch)
    place.enter_context(hold(request.model_folder, request.branch))
    identity = identify(request)
    run = Run(request.model_folder, identity.key)
    if fresh:
        run.discard()
    elif (result := _finished(request.model_folder, run, identity.key)) is not None:
        return result
    job = prepare(request, identity, shared)
    check_resources(job)
    return _Ready(job, run, place)


def _finished(folder: Path, run: Run, key: str) -> TrainingResult | None:
    """The result of the same request when it is already there, after ending a move that a kill cut short."""
    if specialist.is_complete(run.result):
        specialist.publish(run.result, folder)
        run.discard()
    result = specialist.result_of(folder, key)
    if result is not None:
        run.discard()
    return result


def _groups(ready: list[_Ready]) -> Iterator[tuple[list[_Ready], int | None]]:
    """Who goes side by side, and from which step: all that are placed alike, unless they cannot."""
    alike: dict[tuple[str, ...], list[_Ready]] = {}
    for one in ready:
        placement = one.job.placement
        alike.setdefault((placement.device, placement.precision, placement.attention), []).append(one)
    for group in alike.values():
        step = newest_common_step([one.run for one in group])
        if len(group) == 1 or step is None or not all(one.job.takes_several for one in group):
            yield from (([one], None) for one in group)
            continue
        memory = memory_together([one.job for one in group])
        if memory > min(one.job.memory_free for one in group):
            yield from (([one], None) for one in group)
        else:
            yield [replace(one, job=replace(one.job, memory=memory)) for one in group], step


class _Group:
    """Branches that take their steps together; often just one."""

    def __init__(
        self,
        ready: Sequence[_Ready],
        step: int | None,
        listeners: tuple[Listener, ...],
        shared: SharedBase,
        stop: StopSignal,
    ) -> None:
        self._ready, self._step, self._listeners, self._shared, self._stop_signal = ready, step, listeners, shared, stop
        self._active: list[Trainee] = []
        self._places: dict[Trainee, ExitStack] = {}
        self._ended: deque[Ended] = deque()
        self._sound = True

    def train(self) -> Iterator[Ended]:
        """The loop: a step, and now and then a checkpoint."""
        if self._stop_signal.received is not None:
            raise interrupted(self._stop_signal.received, _("Interrumpido entre dos ramas; todo está guardado."))
        try:
            self._begin()
            yield from self._tell_ended()
            with self._stop_signal as stop:
                while self._active:
                    self._take_step()
                    if stop.received is not None:
                        self._stop(stop.received)
                    self._save_when_due()
                    self._finish_ended()
                    yield from self._tell_ended()
        except Interrupted:
            raise
        except Exception as error:
            self._each(self._active, partial(_raise, error))
            yield from self._tell_ended()
        if self._sound and self._ready[0].job.placement.method == "lora":
            self._shared.give_back(self._model)

    def _tell_ended(self) -> Iterator[Ended]:
        while self._ended:
            yield self._ended.popleft()

    def _begin(self) -> None:
        hardware.make_deterministic(self._ready[0].job.placement.device)
        for one in self._ready:
            try:
                trainee = Trainee(one.job, one.run, self._listeners, self._step)
                one.place.enter_context(trainee.open())
            except Exception as error:
                self._sound = False
                one.place.close()
                self._ended.append((one.job.request, _explained(error, one.job.request)))
            else:
                self._active.append(trainee)
                self._places[trainee] = one.place
        if self._active:
            self._remember()
            self._model = self._shared.adapted(self._active[0].job, len(self._active))
            names = dict(zip(self._active, adapter_names(len(self._active)), strict=True))
            self._each(self._active, lambda trainee: trainee.begin(self._model, names[trainee]))

    def _remember(self) -> None:
        """Write down who goes together, for a later call that goes on."""
        if self._step is not None:
            for trainee in self._active:
                trainee.run.remember_group([str(other.job.request.model_folder) for other in self._active])

    def _each(self, trainees: Sequence[Trainee], act: Callable[[Trainee], object]) -> None:
        """Do something with each branch; one that fails at it leaves the others."""
        for trainee in list(trainees):
            try:
                act(trainee)
            except Exception as error:
                self._sound = False
                self._leave(trainee, _explained(error, trainee.job.request))
                with contextlib.suppress(OSError):  # then the others go on alone, should they be cut off
                    trainee.run.forget_group()
                    self._remember()

    def _leave(self, trainee: Trainee, ended: TrainingResult | Exception) -> None:
        self._active.remove(trainee)
        self._places[trainee].close()
        self._ended.append((trainee.job.request, ended))

    def _take_step(self) -> None:
        rows = {trainee: trainee.rows() for trainee in self._active}
        results = self._results(self._active, rows)
        tokens = sum(result.tokens for result in results.values())

        def record(trainee: Trainee) -> None:
            trainee.stepped(results[trainee], len(rows[trainee]), results[trainee].tokens / tokens)

        self._each(self._active, record)

    def _results(self, trainees: Sequence[Trainee], rows: dict[Trainee, list[TokenRow]]) -> dict[Trainee, StepResult]:
        """One optimizer step; as often as memory runs out, the same one again in passes of half the size."""
        engines = [trainee.engine for trainee in trainees]
        while True:
            micro_tokens = min(trainee.progress.micro_tokens for trainee in trainees)
            passes = split_into_passes([rows[trainee] for trainee in trainees], micro_tokens)
            try:
                return dict(zip(trainees, take_step(engines, trainees[0].progress.step, passes), strict=True))
            except TrainingError:
                if len(trainees) == 1:
                    raise
                return self._results_one_by_one(trainees, rows)
            except (MemoryError, RuntimeError) as error:
                if not hardware.is_out_of_memory(error) or len(passes) == sum(map(len, rows.values())):
                    raise
            self._halve(trainees, max(map(pass_size, passes)) // 2)

    def _results_one_by_one(
        self, trainees: Sequence[Trainee], rows: dict[Trainee, list[TokenRow]]
    ) -> dict[Trainee, StepResult]:
        """The step of each branch by itself, so that the one whose numbers are none spoils no other's."""
        results: dict[Trainee, StepResult] = {}
        for trainee in trainees:
            trainee.engine.drop_gradients()
        self._each(trainees, lambda trainee: results.update(self._results([trainee], {trainee: rows[trainee]})))
        return results

    def _halve(self, trainees: Sequence[Trainee], micro_tokens: int) -> None:
        """Take smaller passes from now on, and have whoever goes on from here take them too."""
        for trainee in trainees:
            trainee.engine.drop_gradients()
            trainee.progress.micro_tokens = micro_tokens
            trainee.note(
                _("Se acabó la memoria en el paso {step}: se repite con {tokens} tokens a la vez.").format(
                    step=trainee.progress.step + 1, tokens=micro_tokens
                )
            )
            trainee.save()

    def _stop(self, number: int) -> None:
        self._each(self._active, Trainee.save)
        if self._active and not self._ended:  # who could not save is told first
            errors = [trainee.interrupted(number) for trainee in self._active]
            raise errors[0]

    def _save_when_due(self) -> None:
        """Save all when it is time for one, and those who go on before one ends: they keep a step in common."""
        going = [trainee for trainee in self._active if not trainee.ended]
        if any(trainee.clock.checkpoint_due() for trainee in self._active):
            self._each(self._active, Trainee.save)
        elif len(going) < len(self._active):
            self._each(going, Trainee.save)

    def _finish_ended(self) -> None:
        ended = [trainee for trainee in self._active if trainee.ended]
        self._each(ended, lambda trainee: self._leave(trainee, trainee.finish()))


def _raise(error: Exception, _trainee: Trainee) -> None:
    raise error


def _explained(error: Exception, request: TrainRequest) -> Exception:
    """What system and torch say about disk, files and memory, as an error with what is safe and what to do."""
    if isinstance(error, MemoryError | RuntimeError) and hardware.is_out_of_memory(error):
        explained = ResourceError(
            _("Se acabó la memoria al entrenar «{branch}»; los puntos de control siguen intactos.").format(
                branch=request.branch
            ),
            mend=_("Repite la orden con un --micro-tokens menor: sigue desde el último."),
        )
    elif isinstance(error, OSError) and durable.is_full_disk(error):
        explained = ResourceError(
            _("El disco está lleno ({error}); los puntos de control anteriores de «{branch}» siguen intactos.").format(
                error=error, branch=request.branch
            ),
            mend=_("Libera espacio y repite la misma orden: sigue desde el último."),
        )
    elif isinstance(error, OSError) and error.filename is not None:
        explained = ResourceError(
            _("El sistema no deja usar {file}: {error}.").format(file=error.filename, error=error.strerror),
            mend=_("Comprueba sus permisos y el disco, o elige otra carpeta con --output."),
        )
    else:
        return error
    explained.__cause__ = error
    return explained
