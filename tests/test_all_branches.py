"""The fifty branches that come with the project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sheily_train.core.branches.catalog import Branch, find_branches, read_description
from sheily_train.core.branches.checks import check_branches, check_folder, fold

ROOT = Path(__file__).parent.parent
BRANCHES = find_branches(ROOT / "all-Branches")


def rows(branch: Branch) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows and held-out rows."""
    training, held_out = (
        [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        for files in (branch.training_files, branch.evaluation_files)
    )
    return training, held_out


@pytest.mark.no_cover  # ten thousand rows against each other: counting lines takes as long again
def test_there_are_fifty_and_check_finds_nothing() -> None:
    """`sheily branches check` is clean over all fifty: no duplicates, near duplicates, leaks, stray files."""
    assert len(BRANCHES) == 50
    assert [str(problem) for problem in check_branches(BRANCHES) + check_folder(BRANCHES[0].folder.parent)] == []


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_a_branch_has_rows_enough_and_their_answers_the_right_length(branch: Branch) -> None:
    """64 rows to learn from, 16 to be judged on, answers of 25 to 120 words of plain prose, whole sentences."""
    training, held_out = rows(branch)
    assert len(training) >= 64
    assert len(held_out) >= 16
    for row in training + held_out:
        assert set(row) == {"instruction", "input", "output"}
        assert 25 <= len(row["output"].split()) <= 120, (len(row["output"].split()), row["instruction"])
        assert row["output"][-1] in ".?!)»", row["instruction"]
        assert not re.search(r"^\s*(?:[-*#•]|\d+[.)])\s|\*\*|```", row["output"], re.MULTILINE), row["instruction"]
        assert all(text == text.strip() for text in (row["instruction"], row["output"])), row["instruction"]


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_no_two_rows_of_a_branch_ask_the_same(branch: Branch) -> None:
    """Every row's question, with its input, stands once, whatever its case, accents and punctuation."""
    training, held_out = rows(branch)
    asked = [fold(f"{row['instruction']} {row['input']}") for row in training + held_out]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_a_branch_says_what_it_is(branch: Branch) -> None:
    """branch.toml gives a title in both languages, one line of description, author, licence and version."""
    description = read_description(branch)
    assert set(description) == {"title", "description", "author", "license", "version"}
    assert set(description["title"]) == {"es", "en"}
    assert "\n" not in description["description"]
    assert description["license"] == "CC BY 4.0"


@pytest.fixture(scope="module")
def faults() -> list[str]:
    """What recomputing all branches finds, by the command: its process has pandas ready for the programs of all."""
    command = [sys.executable, "-m", "sheily_train.scripts.testing.proofs"]
    environment = os.environ | {"SHEILY_BRANCHES_DIR": str(ROOT / "all-Branches")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *lines, last = done.stdout.splitlines() or [""]
    assert last.startswith("50 branches, "), done.stderr
    return lines


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_numbers_and_programs_of_a_branch_are_recomputed(branch: Branch, faults: list[str]) -> None:
    """Every number a row computes comes out of its proof, and every program prints what the row says."""
    assert [line for line in faults if line.startswith(f"{branch.folder}{os.sep}")] == []
