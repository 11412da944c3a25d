from __future__ import annotations

import json
from pathlib import Path

import pytest

from sheily_train import paths, runlog
from sheily_train.core.branches import catalog
from sheily_train.core.training import matrix
from sheily_train.core.training.evaluation import compare_with_base, held_out_loss, held_out_rows, open_specialist
from sheily_train.core.training.matrix import Matrix, measure, trained_branches
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.trainer import train_model
from sheily_train.errors import DataError, RequestError


def place() -> tuple[Path, Path, Path]:
    """The home's branches, models, and the log of the matrix."""
    return paths.branches_dir(), paths.models_dir(), paths.logs_dir() / "matrix.jsonl"


@pytest.fixture
def trained(home: Path, tiny_llama: Path) -> Path:
    """A home with a specialist for each of its two branches."""
    for branch in ("physics", "music"):
        train_model(TrainRequest(branch=branch, model=str(tiny_llama), lora=True, epochs=3, lr=1e-2))
    return home


def test_the_matrix_holds_what_evaluating_each_branch_gives(trained: Path) -> None:
    """A branch's own cell and its base's are those of `evaluate`; a specialist does less well on the other's rows."""
    branches_dir, models_dir, log = place()
    names = trained_branches(branches_dir, models_dir)
    measured = measure(names, branches_dir, models_dir, log)
    assert measured.names == ("music", "physics")
    for name in names:
        alone = compare_with_base(name, branches_dir, models_dir / name)
        assert measured.loss[name][name] == alone["specialist"]["loss"]
        assert measured.base[name] == alone["base"]["loss"]
        assert measured.change(name, name) < 0
    assert [measured.best(name) for name in names] == ["music", "physics"]


def test_a_matrix_that_was_cut_off_goes_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known cells are not measured again, half a line is passed over, and new rows cost their own cells only."""
    branches_dir, models_dir, log = place()
    whole = measure(("physics", "music"), branches_dir, models_dir, log)
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    log.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    again = measure(("physics", "music"), branches_dir, models_dir, log)
    assert again == whole
    assert log.read_bytes().splitlines(keepends=True) == lines

    file = branches_dir / "music" / paths.EVALUATION_DATA / "test.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    measure(("physics", "music"), branches_dir, models_dir, log)
    assert [cell["branch"] for cell in list(runlog.read(log))[6:]] == ["music", "music", "music"]

    monkeypatch.setattr(matrix, "open_specialist", None)  # nothing is loaded when everything is known
    measure(("physics", "music"), branches_dir, models_dir, log)


def test_all_are_judged_on_the_same_rows_whatever_lengths_they_were_trained_on(home: Path, tiny_llama: Path) -> None:
    """A specialist of shorter rows gets another branch's as that one's own does, also those too long for its own."""
    branches_dir, models_dir, log = place()
    with (branches_dir / "physics" / paths.EVALUATION_DATA / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"instruction": "¿Y?", "output": "La energía es la capacidad de trabajo. " * 12}) + "\n")
    for branch, max_length in (("physics", 512), ("music", 100)):
        train_model(TrainRequest(branch, str(tiny_llama), lora=True, epochs=1, max_length=max_length))
    measured = measure(("music", "physics"), branches_dir, models_dir, log)
    physics = catalog.find_branch(branches_dir, "physics")
    own, other = (open_specialist(models_dir / name, name) for name in ("physics", "music"))
    rows = held_out_rows(physics, own)
    assert measured.loss["music"]["physics"] == held_out_loss(other, rows).loss
    with pytest.raises(DataError, match="no cabe en 100 tokens"):
        held_out_rows(physics, other)
    assert held_out_rows(physics, own, 10_000) == rows


def test_a_branch_without_specialist_ends_the_matrix_before_it_begins(home: Path) -> None:
    """The branch is named, with the command that trains it; nothing is measured."""
    branches_dir, models_dir, log = place()
    with pytest.raises(RequestError, match="sheily train --all"):
        trained_branches(branches_dir, models_dir)
    with pytest.raises(RequestError, match="sheily train --branch physics"):
        measure(("physics",), branches_dir, models_dir, log)
    assert not log.exists()


def test_rank_and_best() -> None:
    """Rank counts those that do better; a tie goes to the branch's own specialist."""
    loss = {"a": {"a": 1.0, "b": 2.0}, "b": {"a": 1.0, "b": 2.5}}
    made = Matrix(("a", "b"), {"a": 2.0, "b": 2.5}, loss)
    assert [made.best("a"), made.best("b")] == ["a", "a"]
    assert [made.rank("a"), made.rank("b")] == [1, 2]
    assert [made.change("a", "a"), made.change("b", "b")] == [-0.5, 0.0]
    assert json.loads(json.dumps(made.to_json()))["rank"] == {"a": 1, "b": 2}
