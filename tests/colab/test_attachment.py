"""Taking a run: looking before taking, and going on with the numbers of another machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sheily_train.colab.batches import batch_from_binary, feedback_from_binary
from sheily_train.colab.client import ClienteColabAsincrono
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import Kind
from sheily_train.colab.worker import WorkerApp
from sheily_train.errors import RefusedError, WorkerError
from tests.colab.test_client import (
    SAMPLES,
    Asgi,
    OtherMachine,
    Records,
    Served,
    answering,
    between,
    copy_of,
    desk,
    expected,
    new_worker,
    run,
    weights,
)
from tests.colab.tiny_learner import TinyLearner


class Turned(OtherMachine):
    """A learner of another kind of machine, whose numbers are others too."""

    def train(self, batch: Any, step: int) -> Any:
        self.weight *= 1.25
        return super().train(batch, step)


async def teach(client: ClienteColabAsincrono) -> None:
    """Four events, of which the third is feedback."""
    await client.entrenar_multiples_lotes(SAMPLES[:20], 10)
    await client.enviar_feedback([0.1] * 16, True)
    await client.entrenar_lote(SAMPLES[20:30])


def rebased(client: ClienteColabAsincrono) -> Any:
    return client.conectar(rebase=True)


def trained(tmp_path: Path, *, pulled_after: int | None) -> None:
    """A run with eight events of the first machine, and its state after some of them or none."""
    app = new_worker(tmp_path / "old")

    async def work(client: ClienteColabAsincrono) -> None:
        await teach(client)
        if pulled_after == 4:
            await client.descargar_estado()
        await teach(client)
        if pulled_after == 8:
            await client.descargar_estado()

    run(desk(tmp_path, app), work)
    app.close()


def moved_on(tmp_path: Path, common: int) -> bytes:
    """The weights of the first machine's learner after ``common`` events, and of the other's after the rest."""
    learner: TinyLearner = TinyLearner(7)
    with Journal(tmp_path / "desk", "principal") as journal:
        for entry in journal.entries():
            event = entry.event
            if event.seq == common + 1:
                state, learner = learner.state(), Turned(7)
                if common:
                    learner.load(state)
            if event.kind is Kind.FEEDBACK:
                learner.feedback(feedback_from_binary(event.body), event.seq)
            else:
                learner.train(batch_from_binary(event.body), event.seq)
    return learner.weight.numpy().tobytes()


def state_of(tmp_path: Path, app: Any) -> bytes:
    """The weights at the worker; the desk's own states stay as they are."""
    folder = copy_of(tmp_path)
    return weights(run(desk(tmp_path, app, folder=folder), lambda client: client.descargar_estado()))


def journal_of(tmp_path: Path) -> bytes:
    """All that a journal holds, as text."""
    with Journal(tmp_path / "desk", "principal") as journal:
        return "\n".join(journal._connection.iterdump()).encode()


def runs_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").iterdir()}


# Looking before taking


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A worker on a real socket."""
    with closing(Served(tmp_path / "worker")) as served:
        yield f"http://127.0.0.1:{served.port}"


def test_a_desk_that_does_not_fit_leaves_the_first_one_alone(tmp_path: Path, url: str) -> None:
    """Desks with an empty, an older and another journal are refused; the first goes on, and was never fenced off."""
    records: Records = []
    other = new_worker(tmp_path / "elsewhere")
    run(desk(tmp_path, other, folder=tmp_path / "another"), teach)
    other.close()

    async def work(client: ClienteColabAsincrono) -> None:
        await client.entrenar_lote(SAMPLES)
        older = copy_of(tmp_path)
        await teach(client)
        for folder in (tmp_path / "empty", older, tmp_path / "another"):
            for rebase in (False, True):
                async with desk(tmp_path, url, folder=folder) as second:
                    with pytest.raises(WorkerError, match=r"aplicó 5 eventos|historias distintas"):
                        await second.conectar(rebase=rebase)
        await teach(client)
        assert client._parts()[2].worker is not None
        assert client._parts()[2].worker["owner"] == 1

    run(desk(tmp_path, url, records), work)
    assert not [event for event, _fields in records if event in ("retry", "resync", "rebase")]
    assert state_of(tmp_path, url) == expected(tmp_path / "desk")
    assert runs_of(tmp_path / "worker") == {"principal"}


def test_a_worker_that_moved_between_look_and_take_is_compared_again(tmp_path: Path) -> None:
    """What the look saw is not relied on: a run that another desk trained meanwhile is refused after it was taken."""
    app = new_worker(tmp_path / "worker")
    empty = new_worker(tmp_path / "empty")
    run(desk(tmp_path, app, folder=tmp_path / "first"), teach)
    moved = between(app, lambda scope: empty if (scope["method"], scope["path"]) == ("GET", "/run") else None)
    with pytest.raises(WorkerError, match="aplicó 4 eventos"):
        run(desk(tmp_path, moved), lambda client: client.conectar())
    for each in (app, empty):
        each.close()


def test_an_answer_to_another_question_takes_nothing(tmp_path: Path) -> None:
    """Where look and take get each other's answers, neither is believed."""
    app = new_worker(tmp_path / "worker")
    run(desk(tmp_path, app), teach)
    swapped = between(app, lambda scope: turned(app) if scope["path"] == "/run" else None)
    with pytest.raises(WorkerError, match="otra petición"):
        run(desk(tmp_path, swapped, settings={"retries": 1}), lambda client: client.conectar())
    assert state_of(tmp_path, app) == expected(tmp_path / "desk")
    app.close()


def turned(app: Asgi) -> Asgi:
    """The app, asked with the other method."""

    async def front(scope: Any, receive: Any, send: Any) -> None:
        method = {"GET": "POST", "POST": "GET"}[scope["method"]]
        body = b'{"run":"principal","seed":7,"owner":0}'

        async def given() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [*scope["headers"], (b"sheily-run", b"principal")]
        await app({**scope, "method": method, "headers": headers}, given, send)

    return front


# Another machine


def test_a_refusal_offers_the_rebase_and_changes_nothing(tmp_path: Path) -> None:
    """The refusal names the event to which --rebase would go back; journal and worker are as they were."""
    trained(tmp_path, pulled_after=4)
    before = journal_of(tmp_path)
    app = new_worker(tmp_path / "new", Turned)
    with pytest.raises(WorkerError, match="otra clase de máquina: device cpu → cuda") as raised:
        run(desk(tmp_path, app), nothing_but_connect)
    assert "--rebase (en Python, conectar(rebase=True)): vuelve al evento 4" in raised.value.mend
    assert journal_of(tmp_path) == before
    assert not (tmp_path / "new" / "runs").exists()
    app.close()


def nothing_but_connect(client: ClienteColabAsincrono) -> Any:
    return client.conectar()


@pytest.mark.parametrize("common", [4, 0])
def test_a_run_goes_on_with_another_machines_numbers(tmp_path: Path, common: int) -> None:
    """It ends with the weights of a learner that was given the common state there, and trained on the rest."""
    trained(tmp_path, pulled_after=common or None)
    records: Records = []
    app = new_worker(tmp_path / "new", Turned)
    run(desk(tmp_path, app, records), rebased)
    [told] = [fields for event, fields in records if event == "rebase"]
    assert told == {"seq": common, "from": TinyLearner.fingerprint, "to": Turned.fingerprint}
    assert [fields["seq"] for event, fields in records if event in ("step", "feedback")] == list(range(common + 1, 9))
    run(desk(tmp_path, app), teach)
    assert state_of(tmp_path, app) == moved_on(tmp_path, common)
    app.close()
    app = new_worker(tmp_path / "newer", Turned)
    assert state_of(tmp_path, app) == moved_on(tmp_path, common), "and a brand-new worker is brought to the same"
    app.close()


def test_a_break_is_passed_with_a_state_however_little_there_is_to_replay(tmp_path: Path) -> None:
    """Events alone do not bring a worker past a break, also where they are fewer bytes than the state."""
    old, app = new_worker(tmp_path / "old"), new_worker(tmp_path / "new", Turned)

    async def two_feedbacks(client: ClienteColabAsincrono) -> Path:
        for validated in (True, False):
            await client.enviar_feedback([0.1] * 16, validated)
        return await client.descargar_estado()

    state = run(desk(tmp_path, old), two_feedbacks)
    with Journal(tmp_path / "desk", "principal") as journal:
        assert journal.body_bytes(0, 2) < state.stat().st_size
    run(desk(tmp_path, app), rebased)
    with Journal(tmp_path / "desk", "principal") as journal:
        assert [made.seq for made in journal.breaks.made] == [2]
    assert state_of(tmp_path, app) == moved_on(tmp_path, 2)
    for each in (old, app):
        each.close()


def test_a_rebase_of_nothing_is_an_ordinary_connection(tmp_path: Path) -> None:
    """On the machine of the run, or with a run that has no answers, --rebase changes nothing."""
    records: Records = []
    app, other = new_worker(tmp_path / "a"), new_worker(tmp_path / "b", Turned)
    run(desk(tmp_path, app, records), rebased)
    run(desk(tmp_path, other, records), rebased)
    run(desk(tmp_path, other, records), teach)
    run(desk(tmp_path, other, records), rebased)
    assert not [event for event, _fields in records if event == "rebase"]
    with Journal(tmp_path / "desk", "principal") as journal:
        assert not journal.breaks.made
    for each in (app, other):
        each.close()


@pytest.mark.parametrize("common", [4, 0])
def test_workers_of_the_history_that_was_left_are_refused(tmp_path: Path, common: int) -> None:
    """So is the old machine, and one of the new kind that has the old history; --rebase sets its state aside."""
    trained(tmp_path, pulled_after=common or None)
    old_journal = copy_of(tmp_path).rename(tmp_path / "kept")
    app = new_worker(tmp_path / "new", Turned)
    run(desk(tmp_path, app), rebased)
    final = state_of(tmp_path, app)
    app.close()
    old = new_worker(tmp_path / "old")
    with pytest.raises(WorkerError, match="otra clase de máquina: device cuda → cpu"):
        run(desk(tmp_path, old), nothing_but_connect)
    run(desk(tmp_path, old, folder=old_journal), teach)
    old.close()
    alike = new_worker(tmp_path / "old", Disguised)
    with pytest.raises(WorkerError, match="aplicó 12 eventos"):
        run(desk(tmp_path, alike), rebased)
    alike.close()
    shutil.rmtree(tmp_path / "old")
    kept = new_worker(tmp_path / "old", Turned)
    past(tmp_path, kept)
    with pytest.raises(WorkerError, match="un --rebase dejó atrás") as raised:
        run(desk(tmp_path, kept), nothing_but_connect)
    assert "repite la orden con --rebase" in raised.value.mend
    assert runs_of(tmp_path / "old") == {"principal"}
    run(desk(tmp_path, kept), rebased)
    assert runs_of(tmp_path / "old") == {"principal", "principal.aside"}
    assert state_of(tmp_path, kept) == final
    kept.close()
    again = new_worker(tmp_path / "old", Turned)
    assert state_of(tmp_path, again) == final
    again.close()


class Disguised(TinyLearner):
    """The first machine's numbers under the other's fingerprint."""

    fingerprint = OtherMachine.fingerprint


def past(tmp_path: Path, app: WorkerApp) -> None:
    """Bring a worker to the run's history as it was before its first break, as far as event 8."""
    folder = copy_of(tmp_path)
    shutil.rmtree(folder / "snapshots", ignore_errors=True)
    with Journal(folder, "principal") as journal:
        bodies = [entry.event for entry in journal.entries()]
        journal._connection.execute("DELETE FROM facts WHERE name IN ('breaks', 'fingerprint')")
        journal._connection.execute("UPDATE events SET answer = NULL, answer_sha256 = NULL")
        plain = type(journal.breaks)()
        for number, chain in enumerate(plain.walk(*first_and_digests(journal))):
            journal._connection.execute("UPDATE events SET chain = ? WHERE seq = ?", (chain, number))
    assert len(bodies) == 8
    run(desk(tmp_path, app, folder=folder), nothing_but_connect)


def first_and_digests(journal: Journal) -> tuple[str, list[str]]:
    from sheily_train.colab.protocol import first_chain

    return first_chain(journal.run, journal.seed), journal._digests(journal.last_seq)


def test_a_worker_whose_own_state_is_another_machines_is_given_the_runs(tmp_path: Path) -> None:
    """A worker's machine changed under its folder: it refuses, and with --rebase sets its state aside and goes on."""
    trained(tmp_path, pulled_after=4)
    changed = new_worker(tmp_path / "old", Turned)
    with pytest.raises(WorkerError, match="otra clase de máquina"):
        run(desk(tmp_path, changed), nothing_but_connect)
    run(desk(tmp_path, changed), rebased)
    assert runs_of(tmp_path / "old") == {"principal", "principal.aside"}
    assert state_of(tmp_path, changed) == moved_on(tmp_path, 4)
    changed.close()


def test_a_run_may_go_to_and_fro(tmp_path: Path) -> None:
    """Back to the first machine, and to the other again: twice at one event, then further back than before."""
    trained(tmp_path, pulled_after=8)
    for name, factory in (("b", Turned), ("c", TinyLearner), ("d", Turned)):
        app = new_worker(tmp_path / name, factory)
        run(desk(tmp_path, app), rebased)
        app.close()
    with Journal(tmp_path / "desk", "principal") as journal:
        assert [made.seq for made in journal.breaks.made] == [8, 8, 8]
        assert len(set(journal.chains(8))) == 4
    app = new_worker(tmp_path / "d", Turned)
    run(desk(tmp_path, app), teach)
    assert state_of(tmp_path, app) == moved_on(tmp_path, 8)
    app.close()
    shutil.rmtree(tmp_path / "desk" / "snapshots")
    app = new_worker(tmp_path / "e", TinyLearner)
    run(desk(tmp_path, app), rebased)
    with Journal(tmp_path / "desk", "principal") as journal:
        assert (journal.breaks.last_seq, len(journal.breaks.made)) == (0, 4)
    assert state_of(tmp_path, app) == expected(tmp_path / "desk")
    app.close()


def test_a_tunnel_that_refuses_the_state_leaves_the_beginning(tmp_path: Path) -> None:
    """Without --rebase the client says so; with it, everything is trained anew from the journal."""
    trained(tmp_path, pulled_after=4)
    app = new_worker(tmp_path / "new", Turned)
    refusing = between(app, lambda scope: answering(413, b"<html>") if scope["method"] == "PUT" else None)
    records: Records = []
    run(desk(tmp_path, refusing, records), rebased)
    assert [fields["seq"] for event, fields in records if event == "rebase"] == [4, 0]
    assert state_of(tmp_path, app) == moved_on(tmp_path, 0)
    app.close()
    app = new_worker(tmp_path / "newer", Turned)
    assert state_of(tmp_path, app) == moved_on(tmp_path, 0), "the state of the history that was left is given to nobody"
    app.close()


def test_a_machine_that_changes_in_mid_replay_is_gone_on_with(tmp_path: Path) -> None:
    """Events that were read before the run went back are not sent with the chain of before."""
    trained(tmp_path, pulled_after=None)
    apps = [new_worker(tmp_path / "new")]
    asked: list[str] = []

    def answer(scope: Any) -> Asgi | None:
        asked.append(scope["path"])
        if asked.count("/train_layer2") == 3 and len(apps) == 1:
            apps.append(new_worker(tmp_path / "newer", Turned))
        return None if len(apps) == 1 else apps[-1]

    run(desk(tmp_path, between(apps[0], answer)), rebased)
    assert state_of(tmp_path, apps[-1]) == moved_on(tmp_path, 0)
    for app in apps:
        app.close()


def test_a_break_whose_state_is_gone_is_told(tmp_path: Path) -> None:
    """A brand-new worker cannot be brought past a break by events alone; --rebase goes back to the beginning."""
    trained(tmp_path, pulled_after=4)
    app = new_worker(tmp_path / "new", Turned)
    run(desk(tmp_path, app), rebased)
    app.close()
    shutil.rmtree(tmp_path / "desk" / "snapshots")
    app = new_worker(tmp_path / "newer", Turned)
    with pytest.raises(WorkerError, match="el estado del evento 4") as raised:
        run(desk(tmp_path, app), nothing_but_connect)
    assert "--rebase: vuelve al principio" in raised.value.mend
    run(desk(tmp_path, app), rebased)
    assert state_of(tmp_path, app) == moved_on(tmp_path, 0)
    app.close()


def test_what_was_dropped_cannot_be_gone_back_to(tmp_path: Path) -> None:
    """Without a state, and without the first events' bodies, --rebase is not offered, and changes nothing."""
    trained(tmp_path, pulled_after=None)
    with Journal(tmp_path / "desk", "principal") as journal:
        journal.prune(2)
    before = journal_of(tmp_path)
    app = new_worker(tmp_path / "new", Turned)
    with pytest.raises(WorkerError, match="otra clase de máquina") as raised:
        run(desk(tmp_path, app), nothing_but_connect)
    assert "--rebase" not in raised.value.mend
    with pytest.raises(WorkerError, match="ni el diario ni las copias"):
        run(desk(tmp_path, app), rebased)
    assert journal_of(tmp_path) == before
    app.close()


def test_a_state_is_set_aside_only_where_it_was_seen(tmp_path: Path) -> None:
    """A request to set aside that comes late, when the run has moved on, is refused and changes nothing."""
    trained(tmp_path, pulled_after=4)
    asked: list[bytes] = []

    def note(inner: Asgi) -> Asgi:
        async def front(scope: Any, receive: Any, send: Any) -> None:
            async def noted() -> Any:
                message = await receive()
                asked.append(message.get("body", b""))
                return message

            await inner(scope, noted, send)

        return front

    app = new_worker(tmp_path / "old", Turned)
    noted = between(app, lambda scope: note(app) if (scope["method"], scope["path"]) == ("POST", "/run") else None)
    run(desk(tmp_path, noted), rebased)
    before = state_of(tmp_path, app)

    async def late(client: ClienteColabAsincrono) -> None:
        with pytest.raises(RefusedError, match="ya no está donde estaba") as raised:
            await client._wire.ask("POST", "/run", content=b"".join(asked))
        assert raised.value.code == "conflict"

    run(desk(tmp_path, app), late)
    assert b'"rebase"' in b"".join(asked)
    assert state_of(tmp_path, app) == before
    app.close()


# Kills

KILLED = """if True:
    import asyncio, os, signal, sys
    from pathlib import Path
    import httpx2
    from sheily_train.colab import attachment, journal, pulled
    from sheily_train.colab.runs import Runs
    from sheily_train.colab.snapshots import Snapshots
    from tests.colab.test_attachment import Turned
    from tests.colab.test_client import desk, new_worker
    def around(owner, method):
        inner = getattr(owner, method)
        def outer(self, *args, **kwargs):
            reach("before_" + method)
            result = inner(self, *args, **kwargs)
            reach("after_" + method)
            return result
        setattr(owner, method, outer)
    def reach(name):
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)
    point = ""
    around(journal.Journal, "rebase")
    around(journal.Journal, "_digests")
    around(pulled.PulledStates, "go_back")
    around(attachment.Attachment, "_note")
    around(Runs, "_set_aside")
    around(Runs, "_load")
    around(Runs, "attach")
    around(Runs, "replace")
    around(Snapshots, "save")
    async def work(root):
        app = new_worker(root / "old", Turned, snapshot_seconds=0.0)
        record = []
        client = desk(root, app, record)
        client._listener = lambda event, **fields: reach(event)
        async with client:
            await client.conectar(rebase=True)
        app.close()
    for line in sys.stdin:
        root, point = line.split()
        child = os.fork()
        if not child:
            asyncio.run(work(Path(root)))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[[Path, str], int]]:
    """Both ends in a process of their own, which dies at a point; its exit code. What each loads is loaded once."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=pipe, stdout=pipe, text=True) as process:

        def kill(root: Path, point: str) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            print(root, point, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield kill
        process.communicate()


@pytest.mark.parametrize(
    "point",
    [
        *("after__digests", "after_rebase", "rebase", "after__set_aside", "after_attach", "after__note"),
        *("after_replace", "after_save", "step"),
    ],
)
def test_a_kill_between_the_steps_leaves_a_rebase_that_goes_on(
    killed: Callable[[Path, str], int], tmp_path: Path, point: str
) -> None:
    """Both ends are killed at once, at each step; the same command again ends where it would have without."""
    trained(tmp_path, pulled_after=4)
    assert killed(tmp_path, point) == -9
    with Journal(tmp_path / "desk", "principal") as journal:
        assert (len(journal.breaks.made), journal.last_seq) in ((0, 8), (1, 8))
        assert journal.answered_seq in ((8,) if not journal.breaks.made else range(4, 9))
    app = new_worker(tmp_path / "old", Turned)
    run(desk(tmp_path, app), rebased)
    assert state_of(tmp_path, app) == moved_on(tmp_path, 4)
    with Journal(tmp_path / "desk", "principal") as journal:
        assert [made.seq for made in journal.breaks.made] == [4]
        assert journal.answered_seq == 8
    assert runs_of(tmp_path / "old") == {"principal", "principal.aside"}
    app.close()
