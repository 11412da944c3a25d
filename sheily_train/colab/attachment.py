"""How a desk takes a run at a worker: it looks first, and takes only what its journal fits.

    look      GET /run changes nothing: a desk that does not fit leaves the run, and whoever has it, alone
    go back   when the machine is another one and that was asked for: to the newest state that both can have
    take      POST /run makes this desk the owner; what it answers is compared again
    push      the worker is given a state, when that is needed or shorter than the events

The journal decides: once it has gone back, all else follows from it, whoever is killed in between.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from sheily_train.colab.batches import BINARY_FORM
from sheily_train.colab.breaks import differences, whereto
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import DIGEST_HEADER, OWNER_HEADER, REBASE_HEADER, RUN_HEADER, another_seed
from sheily_train.colab.pulled import PulledState, PulledStates, another_history
from sheily_train.colab.threads import in_thread
from sheily_train.colab.verdicts import Hiccup, foreign
from sheily_train.colab.wire import ClientSettings, Record, Wire
from sheily_train.errors import NoRuns, RefusedError, WorkerError
from sheily_train.i18n import _, ngettext

Place = dict[str, Any]
"""What a worker says of a run and of itself."""


class Attachment:
    """The attaching of one run to one worker."""

    def __init__(
        self, wire: Wire, journal: Journal, states: PulledStates, settings: ClientSettings, record: Record
    ) -> None:
        self._wire, self._journal, self._states = wire, journal, states
        self._settings, self._record = settings, record
        self.ghosts = 0
        """Requests to take the run that were given up, and may still be applied later, under another number."""

    async def attach(self, *, rebase: bool = False) -> tuple[Place, int]:
        """Become the run's owner at the worker; returns what it said, and the last event that it has.

        Args:
            rebase: whether the run may go back, and on with the numbers of this worker's machine.

        Raises:
            WorkerError: worker and journal do not fit; neither was changed.
            RefusedError: the worker does not accept it.
            NoRuns: it knows no runs.
        """
        seen = await self._look()
        await in_thread(self._compare, seen, rebase)
        if rebase and self._is_other_machine(seen):
            state = await in_thread(self._states.newest, self._journal.last_seq)
            await self._go_back(state.seq if state else 0, seen)
        place = await self._take(await in_thread(self._to_set_aside, seen) if rebase else None)
        await in_thread(self._note, place)
        if rebase and (older := await in_thread(self._state_before_break, place["last_seq"])):
            await self._go_back(older.seq, place)
            return await self.attach(rebase=True)
        reached = await self._give_state(place)
        if reached < self._journal.breaks.last_seq:
            if not rebase or self._journal.pruned_seq:
                raise self._no_state_to_give()
            await self._go_back(0, place)
            return await self.attach(rebase=True)
        if min(reached, self._journal.answered_seq) < self._journal.pruned_seq:
            raise self._nothing_to_replay(self._journal.pruned_seq)
        return place, reached

    async def _look(self) -> Place:
        try:
            answer = await self._wire.ask("GET", "/run", headers={RUN_HEADER: self._journal.run})
        except RefusedError as refusal:
            if refusal.status in (404, 405):
                raise NoRuns(
                    _("Este trabajador es un OMEGA 21 v4.0 sin POST /run y no puede seguir «{run}».").format(
                        run=self._journal.run
                    ),
                    mend=_("Usa un trabajador de sheily-train, o empieza otro entrenamiento con --run."),
                ) from refusal
            raise
        if "known" not in answer.content:
            raise _of_another_question()
        return answer.content

    def _compare(self, seen: Place, rebase: bool) -> None:
        """Know that the run can go on at this worker, or can after going back."""
        journal, seq, chain = self._journal, seen["last_seq"], seen["chain"]
        was_left = False
        if seen["known"]:
            if seen["seed"] != journal.seed:
                raise another_seed(journal.run, seen["seed"], journal.seed)
            was_left = journal.has_left(seq, chain)
            if not was_left:
                self._check_history(seq, chain)
        if not rebase and self._is_other_machine(seen):
            raise self._another_machine(seen)
        if not rebase and was_left:
            raise WorkerError(
                _("Este trabajador está en el evento {seq} de la historia que un --rebase dejó atrás.").format(seq=seq),
                mend=_(
                    "Nada se ha cambiado. Para que aparte su estado y siga con este diario, repite la orden con "
                    "--rebase (en Python, conectar(rebase=True))."
                ),
            )

    def _is_other_machine(self, place: Place) -> bool:
        journal = self._journal
        return bool(journal.answered_seq) and journal.fingerprint not in (None, place["fingerprint"])

    def _check_history(self, seq: int, chain: str) -> None:
        """Know that the worker's events are this journal's first ones; :class:`DataError` for one it has lost."""
        if seq > self._journal.last_seq and not self._journal.lost_its_tail:
            raise WorkerError(
                ngettext(
                    "El trabajador ya aplicó {theirs} evento de «{run}» y este diario no tiene ninguno.",
                    "El trabajador ya aplicó {theirs} eventos de «{run}» y este diario solo tiene {ours}.",
                    seq,
                ).format(theirs=seq, run=self._journal.run, ours=self._journal.last_seq),
                mend=_("Sigue desde donde está el diario completo, o empieza otro entrenamiento con --run."),
            )
        if chain != self._journal.chain(seq):
            raise another_history(seq)

    # Going back

    async def _go_back(self, seq: int, place: Place) -> None:
        """Let the journal go back to ``seq``, and on with this machine's numbers."""
        if seq < self._journal.pruned_seq:
            raise self._nothing_to_replay(self._journal.pruned_seq)
        made = await in_thread(self._journal.rebase, seq, place["fingerprint"])
        self._states.go_back(seq)
        self._record("rebase", seq=seq, **{"from": made.left, "to": made.taken})

    def _state_before_break(self, reached: int) -> PulledState | None:
        """The state for a worker at ``reached`` when only those from before the last break are left."""
        last_break = self._journal.breaks.last_seq
        state = self._states.newest(self._journal.last_seq) if reached < last_break else None
        return state if state is not None and state.seq < last_break else None

    def _to_set_aside(self, seen: Place) -> str | None:
        """The chain value of a state that the worker has and this run cannot go on from."""
        if not seen["known"]:
            return None
        machine_fits = seen["state_fingerprint"] in ({}, seen["fingerprint"])
        fits = machine_fits and seen["chain"] == self._journal.chain(seen["last_seq"])
        return None if fits else str(seen["chain"])

    # Taking

    async def _take(self, aside: str | None) -> Place:
        journal = self._journal
        request = {"run": journal.run, "seed": journal.seed, "owner": journal.owner, "chain": journal.chain(0)}
        self.ghosts += 1
        content = orjson.dumps(request | ({"rebase": aside} if aside else {}))
        digest = hashlib.sha256(content).hexdigest()
        try:
            answer = await self._wire.ask("POST", "/run", content=content, headers={DIGEST_HEADER: digest})
        except RefusedError:
            self.ghosts -= 1
            raise
        if "known" in answer.content:
            raise _of_another_question()
        self.ghosts -= 1
        return answer.content

    def _note(self, place: Place) -> None:
        """Compare again, since the worker may have moved, and note the owner's number."""
        if self._is_other_machine(place):
            raise self._another_machine(place)
        self._check_history(place["last_seq"], place["chain"])
        with self._journal.group():
            self._journal.owner = place["owner"]
            self._journal.fingerprint = place["fingerprint"]

    # Giving a state

    async def _give_state(self, place: Place) -> int:
        """The event that the worker has when it was given a state, or needs none.

        A tunnel that refuses its size changes nothing.
        """
        reached: int = place["last_seq"]
        state = await in_thread(self._state_to_give, reached)
        if state is None:
            return reached
        try:
            return await self._push(state, place["owner"])
        except RefusedError as refusal:
            if refusal.code != "too_large":
                raise
            self._record("snapshot_failed", reason=refusal.message)
            return reached

    def _state_to_give(self, reached: int) -> PulledState | None:
        """The state for a worker at ``reached``: when events are no way to get there, or are more bytes than it."""
        journal = self._journal
        state = self._states.newest(journal.last_seq)
        if state is None or state.seq <= reached:
            return None
        must = journal.pruned_seq > min(reached, journal.answered_seq) or journal.breaks.last_seq > reached
        return state if must or journal.body_bytes(reached, state.seq) > state.size else None

    async def _push(self, state: PulledState, owner: int) -> int:
        headers = {
            RUN_HEADER: self._journal.run,
            OWNER_HEADER: str(owner),
            DIGEST_HEADER: state.sha256,
            "Content-Length": str(state.size),
        }
        chain = self._journal.chain(state.seq)
        if state.chain(self._journal.run) != chain:  # it is from before a break: the worker's own from now on
            headers[REBASE_HEADER] = chain
        answer = await self._wire.ask(
            "PUT",
            "/state",
            content=state.pieces(),
            form=BINARY_FORM,
            headers=headers,
            timeout=self._settings.transfer_timeout,
        )
        self._check_history(answer.content["last_seq"], answer.content["chain"])
        return int(answer.content["last_seq"])

    # What cannot be

    def _another_machine(self, place: Place) -> WorkerError:
        mend = _(
            "Nada se ha cambiado. Usa una máquina como la anterior, o empieza otro entrenamiento con --run. {rebase}"
        )
        state = self._states.newest(self._journal.last_seq)
        rebase = ""
        if state or not self._journal.pruned_seq:
            rebase = _(
                "O repite la orden con --rebase (en Python, conectar(rebase=True)): vuelve {whereto} y sigue con los "
                "números de esta máquina."
            ).format(whereto=whereto(state.seq if state else 0))
        return WorkerError(
            _("Este trabajador es de otra clase de máquina: {differences}.").format(
                differences=differences(self._journal.fingerprint or {}, place["fingerprint"])
            ),
            mend=mend.format(rebase=rebase).rstrip(),
        )

    def _no_state_to_give(self) -> WorkerError:
        mend = _("Usa el trabajador que lo tiene, o uno al que se llegue por SSH. {rebase}")
        rebase = ""
        if not self._journal.pruned_seq:
            rebase = _("O repite la orden con --rebase: vuelve al principio, y todo se entrena de nuevo.")
        return WorkerError(
            _("Al trabajador no se le puede dar el estado del evento {seq}, desde el que «{run}» sigue.").format(
                seq=self._journal.breaks.last_seq, run=self._journal.run
            ),
            mend=mend.format(rebase=rebase).rstrip(),
        )

    def _nothing_to_replay(self, last: int) -> WorkerError:
        return WorkerError(
            _("Al trabajador le faltan eventos hasta el {last}, y ni el diario ni las copias los tienen.").format(
                last=last
            ),
            mend=_("Usa el trabajador que los tiene, o recupera la carpeta {folder}.").format(
                folder=self._journal.folder
            ),
        )


def _of_another_question() -> Hiccup:
    return foreign(_("A /run llegó la respuesta a otra petición."))
