"""Recompute what the rows of a branch claim: its numbers, and what its programs print.

``proofs.jsonl``, beside the branch's ``branch.toml``, holds one proof a line. Every proof names its row by ``row``, the
instruction word for word (and ``input``, where several rows have one instruction), and is one of these::

    {"row": …, "says": "0,55 s", "value": "sqrt(2 * 1.5 / 9.8)"}     the answer says it, and the value rounds to it
    {"row": …, "says": "unos 500", "value": "487.3", "within": 0.03}  a relative tolerance, for round figures
    {"row": …, "code": "print(1)", "prints": "1\n"}                   the row holds the code, and running it prints this
    {"row": …, "none": "1 × 4 is a relay, not a product"}             why a row that looks like a calculation has none

A value is a Python expression over ``math``, ``statistics``, ``Fraction`` and ``date``. A program may have lines of its
own around the row's (``before``, ``after``) and a ``language``: ``python`` (the default), ``sql`` (SQLite) or ``bash``.
Both are run as they stand: run this on branches that you trust.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from sheily_train.core.branches.catalog import PROOFS_FILE, Branch, find_branch, find_branches
from sheily_train.paths import branches_dir
from sheily_train.scripts.testing import programs

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SPACE = "[ \u00a0\u202f]"
# 1234 or 1 234, a decimal comma (or point, as programs print it), and × 10ⁿ; or a fraction of whole numbers.
_NUMBER = re.compile(
    rf"(?P<sign>[-−]?)(?:(?P<over>\d+)/(?P<under>\d+)|"
    rf"(?P<whole>\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)|\d+)(?:[.,](?P<decimals>\d+))?"
    rf"(?:{_SPACE}?[×·]{_SPACE}?10(?P<power>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))?)"
)
_CALCULATION = re.compile(r"[=≈]\s*[-−]?\d|\d\s*[×·÷+−*]\s*(?!10[⁰¹²³⁴⁵⁶⁷⁸⁹⁻])\d")
_TASK = re.compile(r"^(?:Calcula|Halla|Convierte|Determina|Estima|¿Cuánt[oa]s?)\b.*", re.DOTALL)
_PROGRAM = re.compile(r"\bprint\(|^\s*def \w+\(|^\s*(?:import|from) \w+|\bSELECT\b|^\s*for \w+ in .*:", re.MULTILINE)

_NAMES: Mapping[str, Any] = {
    **{name: value for name, value in vars(math).items() if not name.startswith("_")},
    **{f.__name__: f for f in (abs, int, len, list, max, min, pow, range, round, sorted, sum, zip)},
    **{"statistics": statistics, "Fraction": Fraction, "date": date},
}


def check(branch: Branch) -> list[str]:
    """What is wrong with the branch's proofs, or lacks one; each as ``file: row: what``."""
    file = branch.folder / PROOFS_FILE
    rows = list(_rows(branch))
    proofs = _read(file) if file.is_file() else []
    with ThreadPoolExecutor() as pool:
        wrong = [line for lines in pool.map(lambda proof: _fault(proof, rows), proofs) for line in lines]
    proved = {id(row) for proof in proofs for row in _named(proof, rows)}
    wrong += [
        f"{row['instruction']!r}: looks as if it could be recomputed, and has no proof"
        for row in rows
        if id(row) not in proved and _calls_for_proof(row)
    ]
    return [f"{file}: {line}" for line in wrong]


def stated(text: str) -> tuple[float, float]:
    """The first number of a Spanish text, and half a unit of its last digit.

    Raises ValueError when there is none.
    """
    found = _NUMBER.search(text)
    if not found:
        raise ValueError(f"there is no number in {text!r}")
    sign = -1 if found["sign"] else 1
    if found["over"]:
        return sign * int(found["over"]) / int(found["under"]), 0.0
    decimals = found["decimals"] or ""
    scale = 10.0 ** (int((found["power"] or "0").translate(_SUPERSCRIPTS)) - len(decimals))
    return sign * int(re.sub(_SPACE, "", found["whole"]) + decimals) * scale, scale / 2


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _rows(branch: Branch) -> Iterator[dict[str, str]]:
    for file in (*branch.training_files, *branch.evaluation_files):
        for row in _read(file):
            yield {field: row.get(field, "") for field in ("instruction", "input", "output")}


def _named(proof: Mapping[str, Any], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        row
        for row in rows
        if row["instruction"] == proof["row"] and ("input" not in proof or row["input"] == proof["input"])
    ]


def _calls_for_proof(row: Mapping[str, str]) -> bool:
    question, answer = f"{row['instruction']}\n{row['input']}", row["output"]
    numbers = re.search(r"\d", question) and re.search(r"\d", answer)
    return bool(
        _CALCULATION.search(answer)
        or (_TASK.match(row["instruction"]) and numbers)
        or _PROGRAM.search(f"{row['input']}\n{answer}")
    )


def _fault(proof: Mapping[str, Any], rows: list[dict[str, str]]) -> list[str]:
    """What is wrong with the proof: one line, or none."""
    named = _named(proof, rows)
    if len(named) != 1:
        return [f"{proof['row']!r}: {len(named)} rows have this instruction; a proof names one"]
    try:
        if "value" in proof:
            _check_value(proof, named[0])
        elif "code" in proof:
            _check_program(proof, named[0])
        elif not proof["none"]:
            raise ValueError("why it has no proof is not said")
    except Exception as error:  # whatever an expression raises is what is wrong with it
        return [f"{proof['row']!r}: {error or type(error).__name__}"]
    return []


def _check_value(proof: Mapping[str, Any], row: Mapping[str, str]) -> None:
    if proof["says"] not in row["output"] and proof["says"] not in row["input"]:
        raise ValueError(f"the row does not say {proof['says']!r}")
    said, tolerance = stated(proof["says"])
    value = float(eval(proof["value"], {"__builtins__": {}}, dict(_NAMES)))  # noqa: S307 - the docstring warns
    if "within" in proof:
        tolerance = proof["within"] * abs(value)
    if not abs(value - said) <= tolerance * (1 + 1e-6) + 1e-12 * abs(value):
        raise ValueError(f"it says {proof['says']!r}, and {proof['value']} is {value:.10g}")


def _check_program(proof: Mapping[str, Any], row: Mapping[str, str]) -> None:
    if proof["code"] not in row["input"] and proof["code"] not in row["output"]:
        raise ValueError("the row does not hold this code")
    program = "\n".join((proof.get("before", ""), proof["code"], proof.get("after", "")))
    printed = programs.run(program, proof.get("language", "python"))
    if printed.split() != proof["prints"].split():
        raise ValueError(f"the program printed {printed!r}, not {proof['prints']!r}")


@click.command()
@click.argument("names", nargs=-1)
def command(names: tuple[str, ...]) -> None:
    """Recompute the numbers and run the programs of the branches (all, when none is named)."""
    folder = branches_dir()
    branches = [find_branch(folder, name) for name in names] or find_branches(folder)
    wrong = [line for branch in branches for line in check(branch)]
    for line in wrong:
        click.echo(line)
    click.echo(f"{len(branches)} branches, {len(wrong)} faults")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    command()
