"""What strikes a run, one function each; it returns by what name it is counted."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from sheily_train.colab.journal import JOURNAL_FILE, LOCK_FILE, Journal
from sheily_train.colab.pulled import STATES_FOLDER
from sheily_train.errors import DataError
from sheily_train.i18n import _
from sheily_train.scripts.testing.actors import RUN
from sheily_train.scripts.testing.drill import PAUSE, Actor, Drill, Failure
from sheily_train.scripts.testing.scenario import HOURS, Stage

Strike = Callable[[Drill, Stage], str | None]

_MOMENT = 0.12
_REACHED_WITHIN = 1.0
_ENDS_WITHIN = 10.0
_SHARED = f"{JOURNAL_FILE}-shm"
_AT_ATTACHMENT = {"owner", "attach", "upload"}


def strike(drill: Drill, stage: Stage) -> str:
    """Let the client go on, and strike; returns what it was."""
    return _STRIKES[stage.strike](drill, stage) or stage.strike


def _go(drill: Drill, stage: Stage) -> None:
    """Let the client go on, for a moment."""
    _both(drill)
    drill.allow(stage.upto)
    drill.pause(stage.wait * _MOMENT)


def _both(drill: Drill) -> tuple[Actor, Actor]:
    return drill.worker, drill.client


# Deaths


def _kill_worker(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    drill.lose_worker()
    drill.pause(_share(stage) * 0.2)


def _kill_client(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    drill.lose_client()


def _end_worker(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    drill.end_worker()


def _kill_worker_at(drill: Drill, stage: Stage) -> str:
    name = stage.point.partition(" ")[2]
    drill.client  # noqa: B018 - there must be one
    if name in _AT_ATTACHMENT:
        drill.lose_worker()
        if name == "upload":
            shutil.rmtree(drill.worker_folder, ignore_errors=True)
        worker = drill.start_worker(armed=(stage.point, stage.count))
    else:
        worker = drill.worker
        worker.arm(stage.point, _reachable(drill, stage))
    if _dies(drill, worker, stage):
        return f"kill worker {stage.point}"
    drill.lose_worker()
    return "kill worker"


def _kill_client_at(drill: Drill, stage: Stage) -> str:
    drill.worker  # noqa: B018
    if stage.point.partition(" ")[2] in _AT_ATTACHMENT:
        drill.lose_client()
        client = drill.start_client(armed=(stage.point, stage.count))
    else:
        client = drill.client
        client.arm(stage.point, _reachable(drill, stage))
    if _dies(drill, client, stage):
        return f"kill client {stage.point}"
    drill.lose_client()
    return "kill client"


def _reachable(drill: Drill, stage: Stage) -> int:
    """How often the point is reached before it strikes, in a stage of so few events."""
    return max(1, min(stage.count, stage.upto - drill.credit))


def _dies(drill: Drill, armed: Actor, stage: Stage) -> bool:
    """Whether it has died where it was armed."""
    drill.allow(stage.upto)
    for _look in range(int(_REACHED_WITHIN / 0.01)):
        if not armed.alive:
            return True
        if drill.is_at(stage.upto):
            drill.pause(0.05)  # what goes on beside: snapshots, pulled states
            return not armed.alive
        drill.pause(0.01)
    return not armed.alive


# Stops


def _stop_worker(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    _hold(drill, drill.worker)


def _stop_client(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    _hold(drill, drill.client)


def _hold(drill: Drill, actor: Actor) -> None:
    actor.send(signal.SIGSTOP)
    drill.pause(PAUSE)
    actor.send(signal.SIGCONT)


# The worker's folder


def _folder_lost(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    drill.lose_worker()
    shutil.rmtree(drill.worker_folder, ignore_errors=True)


def _stale_folder(drill: Drill, stage: Stage) -> None:
    """The worker is found again on the folder it had before this stage."""
    drill.lose_worker()
    old = _copy(drill.worker_folder, drill.folder / "stale")
    _go(drill, stage)
    drill.recover(stage.upto)
    drill.lose_worker()
    shutil.rmtree(drill.worker_folder, ignore_errors=True)
    old.rename(drill.worker_folder)


def _stale_worker(drill: Drill, stage: Stage) -> None:
    """A worker is taken for lost; another goes on with a copy of its folder; then the first one is back."""
    stale, folder, port = drill.worker, drill.worker_folder, drill.proxy.port
    stale.send(signal.SIGSTOP)
    drill.take_worker(stale, _copy(folder, drill.folder / f"worker-{stage.upto}"), port)
    fresh = drill.start_worker()
    _go(drill, stage)
    drill.recover(stage.upto)
    drill.lose_worker()
    del fresh
    drill.take_worker(stale, folder, port)
    stale.send(signal.SIGCONT)


def _bit_in_snapshot(drill: Drill, stage: Stage) -> str | None:
    _go(drill, stage)
    drill.lose_worker()
    snapshots = sorted((drill.worker_folder / "runs" / RUN).glob("snapshot-*"))
    if not snapshots:
        return "kill worker"
    chance = Random(stage.draw)  # noqa: S311
    _flip(chance.choice(sorted(snapshots[-1].iterdir())), chance)
    return None


# The desk's folder


def _bit_in_pulled_state(drill: Drill, stage: Stage) -> str | None:
    """The newest fetched state is damaged; one time in two a new worker would need it at once."""
    _go(drill, stage)
    states = sorted((drill.desk / STATES_FOLDER).glob("*.safetensors"))
    if not states:
        drill.lose_client()
        return "kill client"
    _flip(states[-1], Random(stage.draw))  # noqa: S311
    if stage.draw % 2:
        drill.lose_worker()
        shutil.rmtree(drill.worker_folder, ignore_errors=True)
    return None


def _bit_in_journal(drill: Drill, stage: Stage) -> str:
    """The client dies, and a bit of its journal flips. It goes on as if nothing were, or refuses and names the damage;
    then the person puts back the copy."""
    _go(drill, stage)
    drill.lose_client()
    copy, told = _copy(drill.desk, drill.folder / "backup"), len(drill.told)
    chance = Random(stage.draw)  # noqa: S311
    files = [path for path in drill.desk.glob(f"{JOURNAL_FILE}*") if path.stat().st_size and path.name != _SHARED]
    if not files:
        return "kill client"
    _flip(chance.choice(sorted(files)), chance)
    reader = drill.another_client(drill.desk, credit=0)
    outcome, text = _outcome(drill, reader)
    reader.kill()
    went_on = outcome in ("idle", "done")
    if went_on and _holds(_copy(drill.desk, drill.folder / "looked at"), max(drill.told, default=0)):
        shutil.rmtree(copy)
        return "bit in journal, of no effect"
    if not went_on and outcome not in ("DataError", "UnreachableError"):
        raise Failure(_("un bit cambiado en el diario: {outcome} {text}").format(outcome=outcome, text=text))
    del drill.told[told:]
    shutil.rmtree(drill.desk)
    copy.rename(drill.desk)
    return "bit in journal, named"


def _holds(folder: Path, told: int) -> bool:
    """Whether each event and answer of a journal checks, and the answers that were told are there.

    Raises :class:`Failure` when it has lost an event that was told: more than what was written last.
    """
    try:
        with Journal(folder, RUN) as journal:
            last, bodies = journal.last_seq, list(journal.entries(after=journal.pruned_seq))
            answers = list(journal.answers())
    except DataError:
        return False
    finally:
        shutil.rmtree(folder)
    if last < told:
        text = _("el diario perdió sin decirlo los eventos del {last} al {told}")
        raise Failure(text.format(last=last + 1, told=told))
    return len(bodies) >= 0 and len(answers) >= told


def _full_disk_at_worker(drill: Drill, stage: Stage) -> None:
    worker, _client = _both(drill)
    _without_room(drill, worker, stage, stage.draw % 8192)


def _full_disk_at_client(drill: Drill, stage: Stage) -> None:
    _worker, client = _both(drill)
    drill.tolerated.add("ResourceError")
    wal = drill.desk / f"{JOURNAL_FILE}-wal"
    _without_room(drill, client, stage, (wal.stat().st_size if wal.exists() else 0) + stage.draw % 100_000)


def _without_room(drill: Drill, actor: Actor, stage: Stage, size: int) -> None:
    """No file of that process grows beyond a size, for a while."""
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(actor.pid, resource.RLIMIT_FSIZE, (size, hard))
    drill.allow(stage.upto)
    drill.pause(0.05 + stage.wait * 0.3)
    if actor.alive:
        resource.prlimit(actor.pid, resource.RLIMIT_FSIZE, (hard, hard))


# Other desks and processes


def _second_desk(drill: Drill, stage: Stage) -> str | None:
    """Another desk goes on with a copy of the journal; the first one is then refused.

    Unless it once gave up a request for the run, and takes the other desk for that: with the same journal it may then
    have the run back, and it is the other one that is refused.
    """
    drill.calm()
    drill.lose_client()
    drill.recover(drill.credit)
    first, desk = drill.client, drill.desk
    if stage.draw % 2:
        drill.allow(drill.credit + 1)
        drill.pause(stage.wait * _MOMENT)
    first.send(signal.SIGSTOP)
    drill.listen()
    drill.start_client(_copy(drill.desk, drill.folder / f"desk-{stage.upto}"))
    drill.allow(stage.upto)
    drill.recover(stage.upto)
    first.tell("credit", drill.scenario.workload.events)
    first.send(signal.SIGCONT)
    told: list[int] = []
    outcome, text = _outcome(drill, first, told)
    while outcome == "UnreachableError" and drill.may_repeat(outcome):  # a busy machine: the command is given again
        first.kill()
        first = drill.another_client(desk, credit=drill.scenario.workload.events, told=max(told, default=0))
        outcome, text = _outcome(drill, first, told)
    first.kill()
    if outcome == "done":
        drill.lose_client()
        drill.told += [seq for seq in told if seq > max(drill.told)]
        drill.start_client(desk)
        return "second desk, run taken back"
    if outcome not in ("fenced", "WorkerError"):
        raise Failure(_("el primero de dos PC: {outcome} {text}").format(outcome=outcome, text=text))
    return None


def _second_process(drill: Drill, stage: Stage) -> None:
    """The same command is given twice on one desk."""
    _go(drill, stage)
    drill.recover(stage.upto)
    client = drill.client
    outcome, text = _outcome(drill, second := drill.another_client(drill.desk))
    second.kill()
    if client.alive and outcome != "BusyError":
        raise Failure(_("un segundo proceso en el mismo diario: {outcome} {text}").format(outcome=outcome, text=text))


def _empty_journal(drill: Drill, stage: Stage) -> None:
    """Another desk, which has nothing of the run, asks for it: it is refused, and the first one notices nothing."""
    drill.lose_client()
    drill.allow(1)
    drill.recover(drill.credit)  # it attached anew: the worker has whatever the journal has
    quiet, fenced = drill.calm(), drill.report.repeats["fenced"]
    outcome, text = _outcome(drill, stranger := drill.another_client(drill.folder / f"stranger-{stage.upto}"))
    stranger.kill()
    if outcome not in ("WorkerError", "UnreachableError"):
        raise Failure(_("un PC con el diario vacío: {outcome} {text}").format(outcome=outcome, text=text))
    _go(drill, stage)
    drill.recover(stage.upto)
    if quiet and drill.report.repeats["fenced"] > fenced:
        raise Failure(_("un PC con el diario vacío desplazó al primero"))


def _outcome(drill: Drill, client: Actor, told: list[int] | None = None) -> tuple[str, str]:
    """How another client ended and what it said; or ``idle``. Adds to ``told`` the events that it told of."""
    until = time.monotonic() + _ENDS_WITHIN
    while time.monotonic() < until and drill.worker.alive:
        drill.listen()
        for word, *values in client.heard(0.01):
            if word == "idle":
                return "idle", ""
            if word == "ended":
                return values[1] or "done", values[2]
            if word == "told" and told is not None:
                told.append(values[0])
    return "?", _("nada en {seconds:g} s").format(seconds=_ENDS_WITHIN)


# Clocks


def _clock_at_worker(drill: Drill, stage: Stage) -> None:
    _go(drill, stage)
    drill.worker.tell("jump", _hours(stage))
    for snapshot in (drill.worker_folder / "runs").glob("*/snapshot-*"):
        os.utime(snapshot, (0, 1e9 + _hours(stage)))


def _clock_at_client(drill: Drill, stage: Stage) -> None:
    drill.jump = _hours(stage)
    drill.client.tell("jump", drill.jump)
    _go(drill, stage)


# Inside


def _hours(stage: Stage) -> float:
    return (_share(stage) - 0.5) * 48 * HOURS


def _share(stage: Stage) -> float:
    return stage.draw / 2**32


def _copy(folder: Path, copy: Path) -> Path:
    """A copy of a folder as a backup would have it: without locks, and what SQLite shares between processes."""
    shutil.rmtree(copy, ignore_errors=True)
    if not folder.exists():
        copy.mkdir()
        return copy
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(LOCK_FILE, ".lock", _SHARED, "*.tmp", ".unfinished"))
    return copy


def _flip(path: Path, chance: Random) -> None:
    """Flip one bit of a file; one time in three near its beginning."""
    size = path.stat().st_size
    place = chance.randrange(min(size, 16384) if chance.random() < 1 / 3 else size)
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


_STRIKES: dict[str, Strike] = {
    "kill worker": _kill_worker,
    "kill client": _kill_client,
    "kill worker at": _kill_worker_at,
    "kill client at": _kill_client_at,
    "end worker": _end_worker,
    "stop worker": _stop_worker,
    "stop client": _stop_client,
    "folder lost": _folder_lost,
    "stale folder": _stale_folder,
    "stale worker": _stale_worker,
    "disk full at worker": _full_disk_at_worker,
    "disk full at client": _full_disk_at_client,
    "bit in snapshot": _bit_in_snapshot,
    "bit in pulled state": _bit_in_pulled_state,
    "bit in journal": _bit_in_journal,
    "second desk": _second_desk,
    "second process": _second_process,
    "empty journal": _empty_journal,
    "clock at worker": _clock_at_worker,
    "clock at client": _clock_at_client,
}
