"""A client's machine in the simulation: the product's client, and a person who gives the same command again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from sheily_train.colab.async_client import ClienteColabAsincrono
from sheily_train.colab.batches import Feedback
from sheily_train.colab.journal import Journal
from sheily_train.errors import SheilyError
from sheily_train.scripts.testing.forgetful_disk import Crash, ForgetfulDisk

if TYPE_CHECKING:
    from sheily_train.scripts.testing.simulated_world import World

RUN = "simulated"
SEED = 7
TOKEN = "a-token-of-the-simulation"  # noqa: S105
ADDRESS = "https://worker.simulated"

_MOST_SITTINGS = 200
_MOST_QUIET_ERRORS = 100
_HISTORIES_DIFFER = ("historias distintas", "El trabajador ya aplicó", "las dos historias difieren")


class Broken(Exception):
    """The promise is."""


class Desk:
    """A client's machine.

    Args:
        world: the network, the events and the other desks.
        disk: where the journal lies; another one after each crash.

    Attributes:
        done: every event has its answer, and all was right.
        gone: another desk has the run for good.
        waiting: another desk took the run over, and is left to work.
        errors: what the command ended with, each time.
    """

    def __init__(self, world: World, name: str, disk: ForgetfulDisk) -> None:
        self.name, self.disk = name, disk
        self.done = self.gone = self.waiting = False
        self.errors: list[str] = []
        self._world = world
        self._rebase = False
        self._shown: dict[int, float] = {}
        self._sitting: asyncio.Task[None] | None = None

    async def work(self) -> None:
        """Give the command until it has done everything, or another desk has the run for good."""
        for _number in range(_MOST_SITTINGS):
            if self.disk.dead:
                self.disk = self.disk.restore(self._world.new_folder(self.name))
            disk = self.disk
            disk.on_crash = self._stop
            self._sitting = asyncio.create_task(self._sit())
            try:
                await self._sitting
            except (Crash, asyncio.CancelledError):
                if not disk.dead:
                    raise
            except (SheilyError, OSError) as error:
                await self._react(error)
            if self.done or self.gone:
                return
            await asyncio.sleep(self._world.chance.uniform(0.1, 2.0))
        raise Broken(f"{self.name} does not end: {self.errors[-3:]}")

    async def _sit(self) -> None:
        """The command: go on from the journal until every event is answered, then look at the outcome."""
        world = self._world
        async with ClienteColabAsincrono(
            ADDRESS,
            TOKEN,
            world.network,
            run=RUN,
            seed=SEED,
            folder=self.disk.root / RUN,
            record=self._record,
            settings=world.client_settings,
        ) as client:
            self._check_shown(client.journal)
            await client.conectar(rebase=self._rebase)
            self._rebase = False
            while (done := client.journal.last_seq) < len(world.events):
                event = world.events[done]
                if isinstance(event, Feedback):
                    await client.enviar_feedback(event.adjustments.tolist(), event.validated)
                else:
                    vectors = [batch.input_data for batch in world.batches_from(done)]
                    await client.entrenar_multiples_lotes(np.concatenate(vectors), 1)
            await client.conectar()
            world.check_outcome(self.name, client.journal, await client.descargar_estado())
            self.done = True

    async def _react(self, error: SheilyError | OSError) -> None:
        """Do what a person would, who reads the error: give the command again, or leave the run to the other desk."""
        self.errors.append(f"{type(error).__name__}: {error}")
        if self._world.quiet and len(self.errors) > _MOST_QUIET_ERRORS:
            raise Broken(f"{self.name} fails again and again: {self.errors[-1]}")
        self._rebase = "--rebase" in self.errors[-1]
        rival = next((desk for desk in self._world.desks if desk is not self and not desk.gone), None)
        if rival is None:
            return
        self.gone = any(words in self.errors[-1] for words in _HISTORIES_DIFFER)
        if getattr(error, "code", "") == "fenced":
            self.waiting = True
            while not (rival.done or rival.gone or rival.waiting):
                await asyncio.sleep(1.0)
            self.waiting, self.gone = False, rival.done

    def _stop(self) -> None:
        if self._sitting is not None:
            self._sitting.cancel()

    def _record(self, event: str, **fields: Any) -> None:
        if event == "step" and self._shown.setdefault(fields["seq"], fields["loss"]) != fields["loss"]:
            raise Broken(f"two answers were shown for event {fields['seq']}")

    def _check_shown(self, journal: Journal) -> None:
        """What was shown was written down before, unless the run went back since."""
        latest = max(self._shown, default=0)
        if latest > journal.answered_seq and not journal.breaks.made:
            raise Broken(f"answer {latest} was shown, and the journal has only {journal.answered_seq}")
