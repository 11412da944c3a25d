from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sheily_train.core.branches.catalog import PROOFS_FILE, find_branch
from sheily_train.scripts.testing import programs, proofs


def faults(folder: Path, answer: str, *made: dict[str, Any], question: str = "¿Cuál?", given: str = "") -> list[str]:
    """What is wrong with a branch of one row, put and proved like this."""
    data = folder / "maths" / "training" / "data"
    data.mkdir(parents=True, exist_ok=True)
    row = {"instruction": question, "input": given, "output": answer}
    (data / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    lines = [json.dumps({"row": question} | proof) for proof in made]
    (folder / "maths" / PROOFS_FILE).write_text("\n".join(lines), encoding="utf-8")
    return proofs.check(find_branch(folder, "maths"))


@pytest.mark.parametrize(
    ("text", "number", "half"),
    [
        ("unos 0,55 s", 0.55, 0.005),
        ("10 000 euros", 10_000, 0.5),
        ("1\u202f048\u202f576", 1_048_576, 0.5),
        ("6,63 × 10⁻³⁴ J·s", 6.63e-34, 5e-37),
        ("−4,5 °C", -4.5, 0.05),
        ("3/8", 0.375, 0),
        ("0.30000000000000004", 0.30000000000000004, 5e-18),
        ("en 1990 y 1991", 1990, 0.5),
    ],
)
def test_a_number_is_read_as_it_is_written(text: str, number: float, half: float) -> None:
    """Decimal commas, thousands, powers of ten, minus signs, fractions; and half a unit of the last digit."""
    assert proofs.stated(text) == pytest.approx((number, half), rel=1e-12)


def test_a_number_that_its_proof_does_not_give_is_a_fault(tmp_path: Path) -> None:
    """Rounded to its last digit it may stand, one unit beside it may not; a tolerance widens that."""
    assert faults(tmp_path, "Tarda 0,55 s.", {"says": "0,55 s", "value": "sqrt(3 / 9.8)"}) == []
    [wrong] = faults(tmp_path, "Tarda 0,56 s.", {"says": "0,56 s", "value": "sqrt(3 / 9.8)"})
    assert "0.5532833" in wrong
    assert faults(tmp_path, "Unos 0,56 s.", {"says": "0,56 s", "value": "sqrt(3 / 9.8)", "within": 0.02}) == []


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        ({"says": "7 s", "value": "7"}, "does not say"),
        ({"says": "Unos", "value": "7"}, "no number"),
        ({"says": "5 s", "value": "1 / 0"}, "division by zero"),
        ({"says": "5 s", "value": "open('x')"}, "open"),
        ({"code": "print(5)", "prints": "5"}, "does not hold this code"),
        ({"none": ""}, "why"),
        ({"row": "¿Otra?", "none": "it is another"}, "0 rows"),
    ],
)
def test_a_proof_that_proves_nothing_is_a_fault(tmp_path: Path, proof: dict[str, Any], said: str) -> None:
    """A fragment that is not there, an expression that fails or reaches out, code or a row that does not exist."""
    [wrong] = faults(tmp_path, "Unos 5 s.", proof)
    assert said in wrong


@pytest.mark.parametrize(
    ("language", "code", "prints"),
    [("python", "print(2 ** 10)", "1024"), ("sql", "SELECT 2 * 3, 'a'", "6\ta"), ("bash", "echo $((6 * 7))", "42")],
)
def test_programs_are_run(tmp_path: Path, language: str, code: str, prints: str) -> None:
    """In three languages, what a program prints is compared, and another output is a fault."""
    proof = {"code": code, "language": language, "prints": prints}
    assert faults(tmp_path, "Esto.", proof, given=code) == []
    [wrong] = faults(tmp_path, "Esto.", proof | {"prints": "43"}, given=code)
    assert "the program printed" in wrong


def test_a_program_may_have_lines_around_it_and_end_in_an_error(tmp_path: Path) -> None:
    """Lines before and after make a fragment run; the last line of a traceback counts as printed."""
    proof = {"code": "x / 0", "before": "x = 1\nprint('a')", "prints": "a\nZeroDivisionError: division by zero"}
    assert faults(tmp_path, "Falla.", proof, given="x / 0") == []


def test_a_program_is_alone() -> None:
    """What one program leaves behind, in its modules or its folder, the next does not find; nor our own imports."""
    leave = "import builtins, pandas\nbuiltins.left = pandas.left = 1\nopen('left', 'w').close()"
    look = (
        "import builtins, os, pandas\n"
        "def f(x: int): ...\n"
        "print(hasattr(builtins, 'left'), hasattr(pandas, 'left'), os.listdir(), __name__, f.__annotations__['x'])"
    )
    programs.run(leave)
    assert programs.run(look) == "False False [] __main__ <class 'int'>\n"


def test_a_program_that_does_not_end_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, and said so."""
    monkeypatch.setattr(programs, "_SECONDS", 0.5)
    code = "while True: pass"
    [wrong] = faults(tmp_path, "Nunca acaba.", {"code": code, "prints": ""}, given=code)
    assert "has not ended" in wrong


@pytest.mark.parametrize(
    ("question", "given", "answer"),
    [
        ("¿Cuál?", "", "El área es 3 × 4."),
        ("¿Cuál?", "", "Queda x = 5."),
        ("Calcula el área de 3 por 4.", "", "Son 12."),
        ("¿Qué imprime?", "for i in range(3):\n    print(i)", "Tres líneas."),
    ],
)
def test_a_calculation_or_program_without_proof_is_a_fault(
    tmp_path: Path, question: str, given: str, answer: str
) -> None:
    """What looks as if it could be recomputed needs a proof, or a reason why not."""
    [wrong] = faults(tmp_path, answer, question=question, given=given)
    assert "no proof" in wrong
    assert faults(tmp_path, answer, {"none": "a relay"}, question=question, given=given) == []


def test_a_power_of_ten_alone_is_no_calculation(tmp_path: Path) -> None:
    """A constant in scientific notation needs no proof."""
    assert faults(tmp_path, "Vale 6,63 × 10⁻³⁴ J·s.") == []


def test_the_command_ends_with_1_when_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault is a line, and the exit code tells."""
    monkeypatch.setenv("SHEILY_BRANCHES_DIR", str(tmp_path))
    faults(tmp_path, "Queda x = 5.")
    told = CliRunner().invoke(proofs.command, ["maths"])
    assert told.exit_code == 1
    assert told.output.splitlines()[-1] == "1 branches, 1 faults"
    faults(tmp_path, "Queda quieto.")
    assert CliRunner().invoke(proofs.command, []).exit_code == 0
