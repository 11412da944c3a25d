"""``sheily train`` as a person types it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sheily_train import cli, paths
from tests.full_disk import full_disk_after

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(home: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``sheily`` in this process on the tiny model; gives exit code, stdout, stderr."""
    monkeypatch.setenv("SHEILY_MODEL", str(tiny_llama))

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.run(cli.sheily, words)
        out, error = capsys.readouterr()
        return int(end.value.code or 0), out, error

    return run


def test_training_tells_the_plan_the_losses_and_where_everything_lies(run: Run, home: Path) -> None:
    """First lines: rows, place, work, parameters, memory, disk; last lines: loss before and after, model, log."""
    code, out, error = run("train", "--branch", "physics", "--lora", "--lr", "1e-2")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Rama physics: 12 ejemplos (instruction/input/output), 4 reservados; base ")
    assert lines[1].startswith("Dónde: CPU con ")
    for word in ("Trabajo: 9 pasos", "Parámetros: ", "Memoria: unos ", "Disco: unos ", "Paso 0: pérdida reservada "):
        assert any(line.startswith(word) for line in lines), word
    assert lines[-4].startswith("Pérdida reservada: ")
    assert "(-" in lines[-4]
    folder = home / "var" / "central_models" / "physics"
    assert lines[-3].endswith(str(folder))
    assert Path(lines[-2].split()[-1]).is_file()
    assert run("train", "--branch", "physics", "--lora", "--lr", "1e-2")[1].startswith("physics ya estaba entrenada")


def test_quiet_prints_nothing_and_json_only_json(run: Run) -> None:
    """--quiet is silent on success; --json gives one JSON document with metrics and folders."""
    assert run("train", "--branch", "physics", "--lora", "--quiet") == (0, "", "")
    code, out, error = run("train", "--branch", "music", "--lora", "--json")
    assert (code, error) == (0, "")
    [row] = json.loads(out)
    assert row["branch"] == "music"
    assert row["metrics"]["heldout_examples"] == 4
    assert Path(row["log"]).is_file()


def test_a_dry_run_tells_and_writes_nothing(run: Run, home: Path) -> None:
    """--dry-run gives the plan of each branch and leaves no trace."""
    code, out, _error = run("train", "--all", "--dry-run")
    assert code == 0
    assert out.count("Trabajo: ") == 2
    assert not (home / "var").exists()
    [first, _second] = json.loads(run("train", "--all", "--dry-run", "--json")[1])
    assert first["memory_bytes"] > 0
    assert first["steps"] == 9


def test_a_dry_run_tells_every_branch_and_every_problem(run: Run, home: Path) -> None:
    """A branch that cannot be trained keeps none after it from being told, and ends as training it would."""
    (home / "all-Branches" / "music" / "training" / "data" / "train.jsonl").write_text("{roto\n")
    code, out, error = run("train", "--all", "--dry-run")
    assert (code, out.count("Trabajo: ")) == (1, 1)
    assert error.startswith("music: ")
    assert "train.jsonl:1" in error
    music, physics = json.loads(run("train", "--all", "--dry-run", "--json")[1])
    assert "train.jsonl:1" in music["error"]
    assert (music["branch"], physics["steps"]) == ("music", 9)
    assert run("train", "--branch", "music", "--dry-run")[0] == 3


def test_the_ecosystems_flag_names_are_taken(run: Run) -> None:
    """--num_train_epochs and its kin mean what they mean elsewhere, with either dash."""
    words = ["--num_train_epochs", "2", "--per_device_train_batch_size", "3", "--learning_rate", "1e-3"]
    code, out, error = run("train", "--branch", "physics", "--lora", *words, "--output_dir", "salida/x", "--dry-run")
    assert code == 0, error
    assert "Trabajo: 8 pasos" in out
    assert run("train", "--branch", "physics", "--lora_r", "4", "--lora-alpha", "8", "--lora", "--dry-run")[0] == 0


def test_output_is_the_models_folder_or_the_folder_of_models(run: Run, tmp_path: Path) -> None:
    """--output is the model's own folder for one branch, and holds one folder per branch for several."""
    one, several = tmp_path / "uno", tmp_path / "varios"
    common = ("--lora", "--max-steps", "1", "--quiet")
    assert run("train", "--branch", "physics", "--output", str(one), *common)[0] == 0
    assert (one / paths.ADAPTER_WEIGHTS).is_file()
    assert run("train", "--branch", "physics", "--branch", "music", "--output", str(several), *common)[0] == 0
    assert (several / "music" / paths.ADAPTER_WEIGHTS).is_file()
    assert (several / "physics" / paths.ADAPTER_WEIGHTS).is_file()


def test_one_failing_branch_does_not_stop_the_others(run: Run, home: Path) -> None:
    """--all trains what can be trained, shows the error of the rest, and exits with 1."""
    rows = home / "all-Branches" / "music" / "training" / "data" / "train.jsonl"
    rows.write_text("{roto\n")
    code, out, error = run("train", "--all", "--lora", "--max-steps", "1")
    assert code == 1
    assert "train.jsonl:1" in error
    assert "1 de 2 ramas listas." in out
    table = out[out.index("Rama  ") :]
    assert "falló" in table
    assert "entrenada" in table


def test_tensorboard_gets_the_numbers(run: Run, home: Path) -> None:
    """--report-to tensorboard writes one run per branch below the logs."""
    assert run("train", "--branch", "physics", "--lora", "--max-steps", "2", "--report-to", "tensorboard")[0] == 0
    assert list((home / "var" / "central_logs" / "tensorboard" / "physics").glob("events.*"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("train",), 2, "--branch NOMBRE"),
        (("train", "--branch", "fisics"), 2, "physics"),
        (("train", "--branch", "physics", "--all"), 2, "--branch y --all"),
        (("train", "--branch", "physics", "--epochs", "0"), 2, "--epochs vale 0"),
        (("train", "--branch", "physics", "--epochs", "dos"), 2, "un número"),
        (("train", "--branch", "physics", "--device", "cuda"), 2, "hay: cpu"),
        (("train", "--branch", "physics", "--qlora"), 2, "CUDA"),
        (("train", "--branch", "physics", "--config", "no.yaml"), 2, "no.yaml"),
        (("train", "--branch", "physics", "--model", "smolm2-135m"), 2, "smollm2-135m"),
        (("train", "--branch", "physics", "--report-to", "excel"), 2, "tensorboard"),
        (("ask", "physics", "¿Qué?"), 2, "sheily train --branch physics"),
        (("evaluate", "music"), 2, "sheily train --branch music"),
        (("export", "music", "--merge"), 2, "sheily train --branch music"),
        (("export", "music"), 2, "sheily train --branch music"),
    ],
)
def test_mistakes_get_one_clear_line(run: Run, words: tuple[str, ...], code: int, said: str) -> None:
    """What a person mistypes is answered in Spanish with what was expected, and without a traceback."""
    if words[-1] == "cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA card")
    found, _out, error = run(*words)
    assert found == code, error
    assert said in error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("Error: ")


def test_debug_shows_the_traceback(run: Run) -> None:
    """Before the error's line, with the same exit code."""
    code, _out, error = run("train", "--branch", "fisics", "--debug")
    assert (code, error.startswith("Traceback")) == (2, True)
    assert error.splitlines()[-1].startswith("Error: ")


def test_ask_evaluate_and_export_work_on_what_was_trained(run: Run, tmp_path: Path) -> None:
    """The commands after training: an answer, both answers side by side, a table, JSON, a merged folder."""
    run("train", "--branch", "music", "--epochs", "60", "--lr", "3e-3", "--precision", "fp32")
    assert run("ask", "music", "¿Cuántas cuerdas tiene un violín?") == (0, "Cuatro.\n", "")
    assert "Cuatro." in run("ask", "music", "¿Cuántas cuerdas tiene un violín?", "--compare")[1]

    run("train", "--branch", "physics", "--lora", "--epochs", "3", "--lr", "1e-2")
    code, out, _error = run("ask", "physics", "¿Qué mide un termómetro?", "--compare", "--max-tokens", "5")
    assert code == 0
    for word in ("Base", "Especialista", "Pérdida reservada: ", "Modelo: ", "Registro: "):
        assert word in out
    code, out, _error = run("evaluate", "physics")
    assert code == 0
    assert out.splitlines()[1].startswith("physics ")
    [row] = json.loads(run("evaluate", "physics", "--json")[1])
    assert row["specialist"]["loss"] < row["base"]["loss"]
    code, out, _error = run("evaluate", "--matrix")
    assert code == 0
    ranks = json.loads(run("evaluate", "--matrix", "--json")[1])["rank"].values()
    best = list(ranks).count(1)
    assert out.splitlines()[-3] == f"El especialista propio es el mejor en {best} de 2 ramas."
    assert (paths.logs_dir() / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split(",")[0] for line in (paths.logs_dir() / "matrix.csv").read_text().splitlines()] == [
        *("rama", "music", "physics")
    ]
    assert json.loads(run("evaluate", "--matrix", "--json", "physics")[1])["rank"] == {"physics": 1}
    assert run("export", "physics")[0] == 2
    code, out, _error = run("export", "physics", "--merge", "--output", str(tmp_path / "entero"))
    assert code == 0
    assert (tmp_path / "entero" / paths.MODEL_WEIGHTS).is_file()
    assert run("export", "physics", "--merge", "--output", str(tmp_path / "entero"))[0] == 2


def test_a_full_disk_is_told_and_leaves_nothing_half_written(run: Run, home: Path, tmp_path: Path) -> None:
    """`export` and `evaluate --matrix` say where there is no room and leave with 5; with room they do all of it."""
    assert run("train", "--branch", "physics", "--lora", "--max-steps", "1", "--quiet")[0] == 0
    whole = tmp_path / "entero"
    export, matrix = ("export", "physics", "--merge", "--output", str(whole)), ("evaluate", "--matrix")
    for size, words in ((300, export), (50_000, export), (100, matrix), (1000, matrix)):
        with full_disk_after(size):
            code, _out, error = run(*words)
        assert code == 5, error
        assert error.splitlines()[-1].startswith("Error: El disco está lleno (")
        assert ("entero" if words is export else "matrix.") in error
        assert list(tmp_path.iterdir()) == [home]
        assert not list(paths.logs_dir().glob(".*"))
    for words in (export, matrix):
        assert run(*words)[0] == 0


def test_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """An answer about lists, side by side, and an install line in the fleet's table lose no word to rich's markup."""
    from sheily_train.cli.ask import _show_both
    from sheily_train.cli.summary import print_fleet
    from sheily_train.core.training.fleet import Outcome
    from sheily_train.errors import MissingExtraError

    _show_both("¿Qué es x[i]?", "El elemento x[i].", "Cierra con [/i].")
    print_fleet([Outcome("physics", None, MissingExtraError("wandb", "trackers", "--report-to"))], None)
    out = capsys.readouterr().out
    for text in ("¿Qué es x[i]?", "El elemento x[i].", "Cierra con [/i].", "'sheily-train[trackers]'"):
        assert text in out


def test_a_pipe_that_knows_no_arrow_gets_a_question_mark(home: Path, tiny_llama: Path) -> None:
    """A stream in Windows' own encoding does not make a failure of a run whose summary it cannot write whole."""
    environment = os.environ | {"SHEILY_MODEL": str(tiny_llama), "PYTHONIOENCODING": "cp1252"}
    words = ["train", "--branch", "physics", "--lora", "--max-steps", "1"]
    done = subprocess.run([sys.executable, "-m", "sheily_train", *words], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Pérdida reservada: " in done.stdout.decode("cp1252")


def test_a_terminal_sees_a_live_bar(home: Path, tiny_llama: Path) -> None:
    """On a real pseudo-terminal the run shows rate, time left and memory, and ends with the summary."""
    environment = os.environ | {"SHEILY_MODEL": str(tiny_llama), "TERM": "xterm-256color", "COLUMNS": "120"}
    leader, follower = pty.openpty()
    words = ["train", "--branch", "physics", "--lora", "--epochs", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sheily_train", *words], env=environment, stdout=follower, stderr=follower
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(leader)
    assert process.wait() == 0
    text = seen.decode()
    assert "tokens/s" in text
    assert "pérdida " in text
    assert "/120" in text
    assert "Pérdida reservada: " in text


def test_a_misspelt_branch_leaves_nothing_behind(run: Run, home: Path) -> None:
    """No folder, lock or log is made for a branch that does not exist."""
    assert run("train", "--branch", "../fisica")[0] == 2
    assert not (home / "var").exists()


def test_a_defect_is_one_line_and_exit_code_70(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with --debug after its traceback, and 70: where one branch, several or another command met it."""
    from sheily_train.core.training import shared_base

    def broken(*_words: object, **_more: object) -> None:
        raise ZeroDivisionError("prueba\nlarga")

    monkeypatch.setattr(shared_base, "create_lora_model", broken)
    code, _out, error = run("train", "--all", "--lora")
    assert code == 70
    assert error.count("Fallo inesperado: ZeroDivisionError: prueba larga") == 2
    code, _out, error = run("train", "--all", "--lora", "--debug")
    assert (code, error.count("in broken")) == (70, 2)
    assert run("train", "--branch", "physics", "--lora")[0] == 70
    monkeypatch.setattr("sheily_train.core.branches.catalog.find_branches", broken)
    code, _out, error = run("branches", "list")
    assert code == 70
    assert error.count("\n") == 1
