from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.branches.catalog import COMMON_BRANCH, find_branch, find_branches
from sheily_train.core.branches.checks import check_branches, check_folder, fold
from sheily_train.core.branches.examples import Code, Problem

TRAINING, EVALUATION = "training/data/train.jsonl", "evaluation/data/test.jsonl"
TERMS = ("inercia", "entropía", "masa", "fuerza", "campo", "onda", "fotón", "calor", "trabajo", "potencia", "torque")


def pair(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def write(tmp_path: Path, branch: str, file: str, rows: Iterable[dict[str, Any]]) -> Path:
    path = tmp_path / branch / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def check(tmp_path: Path, **options: Any) -> list[Problem]:
    return check_branches(find_branches(tmp_path), **options)


def summary(problems: Sequence[Problem]) -> list[tuple[Code, str, int]]:
    return [(problem.code, problem.file.name, problem.line) for problem in problems]


# Rows of a real branch: one template or another, short answers, every one its own fact.
FILLER = [
    pair("¿Qué es la inercia?", "La resistencia a cambiar de movimiento."),
    pair("¿Qué es la entropía?", "Una medida del desorden."),
    pair("Define masa.", "La cantidad de materia de un cuerpo."),
    pair("Explica qué es un campo eléctrico.", "La región donde una carga siente una fuerza."),
    pair("¿Qué significa «fotón» en física?", "El cuanto de la luz."),
    pair("¿Qué significa «neutrón» en física?", "La partícula sin carga del núcleo."),
]


def test_good_branches_have_no_problems(tmp_path: Path) -> None:
    """Rows of different facts, in training and evaluation, are clean."""
    write(tmp_path, "physics", TRAINING, FILLER[:4])
    write(tmp_path, "physics", EVALUATION, FILLER[4:])
    assert check(tmp_path) == []


def test_unreadable_rows_are_reported_beside_the_rest(tmp_path: Path) -> None:
    """What strict reading would refuse is listed with its line, and the readable rows are still compared."""
    file = write(tmp_path, "physics", TRAINING, [*FILLER, FILLER[0]])
    file.write_bytes(b"\xef\xbb\xbf{\n" + file.read_bytes())
    assert summary(check(tmp_path)) == [
        (Code.BOM, "train.jsonl", 1),
        (Code.INVALID_JSON, "train.jsonl", 1),
        (Code.DUPLICATE, "train.jsonl", 8),
    ]


def test_long_rows_are_reported_by_the_limit(tmp_path: Path) -> None:
    """The limit counts the characters of all turns; exactly the limit is still allowed."""
    write(tmp_path, "physics", TRAINING, [*FILLER, pair("P" * 10, "R" * 90), pair("P" * 10, "R" * 91)])
    assert summary(check(tmp_path, max_characters=100)) == [(Code.TOO_LONG, "train.jsonl", 8)]
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    "copy",
    [
        FILLER[0],
        pair("¿QUÉ ES LA INERCIA?", "la resistencia a cambiar de movimiento"),
        pair("Que es la inercia", "La  resistencia\na cambiar de movimiento…"),
        {"instruction": "¿Qué es", "input": "la inercia?", "output": "La resistencia a cambiar de movimiento."},
    ],
)
def test_copies_are_duplicates_whatever_their_typing(tmp_path: Path, copy: dict[str, str]) -> None:
    """Case, accents, punctuation and spaces do not hide a copy; the later row is reported and names the earlier."""
    file = write(tmp_path, "physics", TRAINING, [*FILLER, copy])
    (problem,) = check(tmp_path)
    assert summary([problem]) == [(Code.DUPLICATE, "train.jsonl", 7)]
    assert f"{file}:1" in problem.found
    assert not problem.is_error


def test_signs_that_carry_meaning_are_kept() -> None:
    """Folding unites what people type differently, not 2+2 with 2=2."""
    assert fold("¿Cuánto es  «Él»?\n") == "cuanto es el"
    assert fold("2+2") != fold("2=2")
    assert fold("ﬁn Ⅳ ß") == "fin iv ss"


def templated() -> list[dict[str, str]]:
    """Many rows of four templates, as the comparison needs them to learn what a template is."""
    shapes = ("¿Qué es {}?", "Define: {}", "Explica {}.", "¿Qué significa «{}»?")
    return [
        pair(shapes[number % 4].format(f"el concepto {term} {number}"), f"Se mide con el aparato {number} de {term}.")
        for number, term in enumerate(TERMS * 10)
    ]


DOPPLER = "El cambio de frecuencia de una onda cuando la fuente se mueve respecto a quien la oye."


@pytest.mark.parametrize(
    "variant",
    [
        pair("¿Qué es el efecto Doppler?", DOPPLER),
        pair("¿Qué significa «efecto Doppler»?", DOPPLER.replace("cuando", "que aparece cuando")),
        pair("Define: efecto Doppler", f"Es {DOPPLER}".replace("frecuencia", "la frecuencia")),
    ],
)
def test_the_same_fact_in_almost_the_same_words_is_a_near_duplicate(tmp_path: Path, variant: dict[str, str]) -> None:
    """Another question template, or a word more or less in the answer, does not hide that a row says the same."""
    original = pair("¿Qué significa «efecto Doppler»?", DOPPLER)
    file = write(tmp_path, "physics", TRAINING, [original, *templated(), variant])
    (problem,) = check(tmp_path)
    assert problem.code == Code.NEAR_DUPLICATE
    assert f"{file}:1" in problem.found


@pytest.mark.parametrize(
    "rows",
    [
        [pair(f'What does "{term}" mean in physics?', f"answer {number}") for number, term in enumerate(TERMS)],
        [
            pair(f'What does "{term}" mean in physics?', "a particle of physics")
            for term in ("quark", "gluon", "muon", "boson")
        ],
        [pair(f"¿Cuánto es {a} + {b}?", str(a + b)) for a in range(5) for b in range(a, 5)],
        [pair(f"¿Es {term} una magnitud?", "Sí." if number % 2 else "No.") for number, term in enumerate(TERMS)],
        [pair(f"¿Qué opinas de esto? {term}", "positivo") for term in TERMS],
        [
            pair("¿Qué es la primera base?", "La base que el corredor pisa en primer lugar al dar la vuelta al campo."),
            pair("¿Qué es la tercera base?", "La base que el corredor pisa en tercer lugar al dar la vuelta al campo."),
        ],
        [
            pair(
                f"¿Qué es la academia {name} de los Estados Unidos?",
                f"Una escuela de futuros oficiales {where} del país.",
            )
            for name, where in (("militar", "del ejército"), ("naval", "de la marina"))
        ],
        [
            pair("¿Qué son las moiras?", "Las tres diosas griegas del destino, iguales a las parcas romanas."),
            pair("¿Qué son las parcas?", "Las tres diosas romanas del destino, iguales a las moiras griegas."),
        ],
    ],
)
def test_templates_about_different_things_are_no_duplicates(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    """Short rows that share their template, or even their answer, are different facts when their terms differ."""
    write(tmp_path, "physics", TRAINING, [*FILLER, *templated(), *rows])
    assert check(tmp_path) == []


def test_many_variants_of_one_row_are_compared_with_one(tmp_path: Path) -> None:
    """Each variant is reported once, against the first: the work does not grow with the square of the copies."""
    words = DOPPLER.split()
    answers = [DOPPLER, *(" ".join(words[:number] + words[number + 1 :]) for number in range(5, 12))]
    rows = [pair("¿Qué es el efecto Doppler?", answer) for answer in answers]
    file = write(tmp_path, "physics", TRAINING, [*rows, *templated()])
    problems = check(tmp_path)
    assert summary(problems) == [(Code.NEAR_DUPLICATE, "train.jsonl", line) for line in range(2, 9)]
    assert all(f"{file}:1" in problem.found for problem in problems)


@pytest.mark.parametrize(
    "leaked", [FILLER[0], pair("¿Qué es la inercia?", "Es la resistencia a cambiar de movimiento.")]
)
def test_training_rows_that_stand_in_the_evaluation_are_leaks(tmp_path: Path, leaked: dict[str, str]) -> None:
    """A leak, exact or almost, is reported at the training row, the one to remove."""
    write(tmp_path, "physics", TRAINING, [*FILLER[1:], leaked])
    evaluation = write(tmp_path, "physics", EVALUATION, [FILLER[0]])
    (problem,) = check(tmp_path)
    assert summary([problem]) == [(Code.LEAK, "train.jsonl", 6)]
    assert f"{evaluation}:1" in problem.found


def test_a_row_of_several_branches_is_reported_in_the_later_ones(tmp_path: Path) -> None:
    """Each further branch that has the row is told where it stood first; a copy at home is a duplicate as ever."""
    first = write(tmp_path, "art", TRAINING, FILLER[:2])
    write(tmp_path, "music", TRAINING, [FILLER[2], FILLER[1]])
    write(tmp_path, "physics", EVALUATION, [FILLER[1], FILLER[3]])
    write(tmp_path, "physics", TRAINING, [FILLER[4], FILLER[1], FILLER[1]])
    problems = check(tmp_path)
    assert summary(problems) == [
        (Code.SHARED, "train.jsonl", 2),
        (Code.SHARED, "test.jsonl", 1),
        (Code.LEAK, "train.jsonl", 2),
        (Code.DUPLICATE, "train.jsonl", 3),
    ]
    assert f"{first}:2" in problems[0].found


def test_branches_without_rows_are_errors(tmp_path: Path) -> None:
    """Nothing to learn from stops training; an empty file beside a full one does not."""
    write(tmp_path, "art", EVALUATION, FILLER[:1])
    write(tmp_path, "music", TRAINING, [])
    write(tmp_path, "physics", TRAINING, FILLER[1:])
    write(tmp_path, "physics", "training/data/more.jsonl", [])
    problems = check(tmp_path)
    assert summary(problems) == [
        (Code.NO_ROWS, "data", 0),
        (Code.NO_ROWS, "data", 0),
        (Code.EMPTY_FILE, "train.jsonl", 0),
        (Code.EMPTY_FILE, "more.jsonl", 0),
    ]
    assert [problem.is_error for problem in problems] == [True, True, False, False]


def test_stray_files_are_reported(tmp_path: Path) -> None:
    """What lies where no one reads it is told; what belongs to a branch, and hidden files, are not."""
    write(tmp_path, "physics", TRAINING, FILLER)
    allowed = ("README.md", "LICENSE", "LICENSE.txt", "branch.toml", ".DS_Store", "training/data/.gitkeep")
    strays = (
        *("evaluation/test.jsonl", "rows.csv", "train.jsonl", "training/data/README.md", "training/data/old/a.jsonl"),
        *("training/data/train.csv", "training/train.jsonl"),
    )
    for name in (*allowed, *strays):
        path = tmp_path / "physics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    problems = check(tmp_path)
    assert {problem.code for problem in problems} == {Code.STRAY}
    assert [problem.file.relative_to(tmp_path / "physics").as_posix() for problem in problems] == list(strays)
    assert ["Muévelo" in problem.mend for problem in problems] == [name.endswith(".jsonl") for name in strays]


def test_the_branch_of_all_rows_has_the_files_of_each(tmp_path: Path) -> None:
    """``check common`` takes no branch's own description for a stray, and still finds what is one."""
    write(tmp_path, "physics", TRAINING, FILLER)
    for name in ("README.md", "branch.toml", "notes.txt"):
        (tmp_path / "physics" / name).write_text("")
    problems = check_branches([find_branch(tmp_path, COMMON_BRANCH)])
    assert summary(problems) == [(Code.STRAY, "notes.txt", 0)]


def test_what_lies_beside_the_branches_is_reported(tmp_path: Path) -> None:
    """Rows put beside the branch folders, and folders no branch can be called by, would go unseen."""
    write(tmp_path, "physics", TRAINING, FILLER)
    (tmp_path / "a+b").mkdir()
    for name in (".git", "LICENSE", "README.md", "train.jsonl"):
        (tmp_path / name).write_text("")
    assert summary(check_folder(tmp_path)) == [(Code.STRAY, "a+b", 0), (Code.STRAY, "train.jsonl", 0)]


def test_a_description_that_is_not_toml_is_reported(tmp_path: Path) -> None:
    """A broken ``branch.toml`` is a warning with the place TOML's reader gives."""
    write(tmp_path, "physics", TRAINING, FILLER)
    (tmp_path / "physics" / "branch.toml").write_text("title = Física", encoding="utf-8")
    (problem,) = check(tmp_path)
    assert summary([problem]) == [(Code.DESCRIPTION, "branch.toml", 0)]
    assert "line 1" in problem.found
