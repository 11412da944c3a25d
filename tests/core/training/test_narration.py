from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training.narration import TextLog, describe, duration

START: dict[str, Any] = {
    "event": "start",
    "branch": "physics",
    "model": "smollm2-135m",
    "init_adapter": "",
    "early_stopping": 0,
    "placement": {"reason": "CPU con 2 hilos, bf16, LoRA"},
    "format": "prompt/completion",
    "examples": 64,
    "heldout_examples": 16,
    "tokens": 3000,
    "answer_tokens": 1200,
    "longest_row": 90,
    "steps": 24,
    "step": 0,
    "parameters": 134_515_008,
    "trainable_parameters": 460_800,
    "memory_bytes": 1_500_000_000,
    "memory_free_bytes": 21_000_000_000,
    "disk_bytes": 37_000_000,
    "disk_free_bytes": 5_000_000_000,
}
TIMING = {"event": "timing", "step": 3, "steps": 24, "tokens_per_second": 512.4, "eta_seconds": 75.2, "memory_mb": 900}


def test_the_first_lines_tell_what_will_be_done() -> None:
    """Branch, rows, base, place and its reason, steps and tokens, parameters, memory and disk against what is free."""
    assert [re.sub(r"(\d)[,.\s]?(?=\d{3}\b)", r"\1", line) for line in describe(START)] == [
        "Rama physics: 64 ejemplos (prompt/completion), 16 reservados; base smollm2-135m",
        "Dónde: CPU con 2 hilos, bf16, LoRA",
        "Trabajo: 24 pasos; por pasada 3000 tokens, 1200 de respuesta; fila más larga: 90",
        "Parámetros: 460800 entrenables de 134515008",
        "Memoria: unos 1.5 GB de 21.0 GB libres",
        "Disco: unos 37 MB de 5000 MB libres",
    ]


def test_one_of_a_thing_is_told_in_the_singular() -> None:
    """One example, one that is held out, one step."""
    lines = describe(START | {"examples": 1, "heldout_examples": 1, "steps": 1})
    assert lines[0] == "Rama physics: 1 ejemplo (prompt/completion), 1 reservado; base smollm2-135m"
    assert lines[2].startswith("Trabajo: 1 paso; ")


def test_an_adapter_that_it_begins_with_is_told() -> None:
    """After the branch."""
    assert describe(START | {"init_adapter": "common"})[1] == "Parte del adaptador common"


def test_early_stopping_that_cannot_stop_is_told() -> None:
    """Only where there is nothing to judge by."""
    stops = START | {"early_stopping": 2}
    assert describe(stops) == describe(START)
    assert describe(stops | {"heldout_examples": 0})[-1].startswith("Aviso: sin ejemplos reservados, --early-stopping")


def test_a_resumed_run_says_where_it_goes_on() -> None:
    """After the same lines."""
    assert describe(START | {"event": "resume", "step": 9}) == [*describe(START), "Sigue desde el paso 9 de 24"]


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        (
            {"event": "eval", "step": 8, "loss": 2.34567, "perplexity": 10.44},
            ["Paso 8: pérdida reservada 2.3457 (perplejidad 10.44)"],
        ),
        (TIMING, ["Paso 3/24: 512 tokens/s, quedan 1 min 15 s, 900 MB"]),
        ({"event": "done", "timing": {"seconds": 61.2}}, ["Terminado en 1 min 1 s"]),
        ({"event": "note", "text": "El {disco} está dañado."}, ["El {disco} está dañado."]),
        ({"event": "step", "step": 1, "loss": 3.0}, []),
        ({"event": "something new"}, []),
    ],
    ids=lambda value: value.get("event") if isinstance(value, dict) else "",
)
def test_each_record_has_its_words(record: dict[str, Any], lines: list[str]) -> None:
    """One line each; none for what only machines read."""
    assert describe(record) == lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (75, "1 min 15 s"), (3600, "1 h"), (3661, "1 h 1 min 1 s"), (90_000, "25 h")],
)
def test_durations_are_told_in_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    """Parts that are zero are left out."""
    assert duration(seconds) == text


def test_a_text_log_whose_folder_was_cleared_away_is_begun_anew(tmp_path: Path) -> None:
    """A run that goes on after a person has removed the logs is not kept from it."""
    with TextLog(tmp_path / "gone" / "run.log") as log:
        log({"event": "note", "text": "uno"})
    assert (tmp_path / "gone" / "run.log").read_text(encoding="utf-8").endswith(" uno\n")


def test_the_text_log_has_the_time_before_every_line(tmp_path: Path) -> None:
    """It is appended to, and readable while the run goes on."""
    path = tmp_path / "run.log"
    for text in ("uno", "dos"):
        with TextLog(path) as log:
            log({"event": "note", "text": text})
            log({"event": "step", "step": 1})
            written = path.read_text(encoding="utf-8").splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in written] == ["uno", "dos"]
    assert all(len(line) == 23 for line in written)
