from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.branches.catalog import data_hash, find_branch
from sheily_train.core.branches.checks import MAX_CHARACTERS

RUN = "from sheily_train.cli import main; main()"


def sheily(*arguments: str | Path, code: int = 0, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``sheily`` as a process of its own, as a pipe would."""
    done = subprocess.run(
        [sys.executable, *options, "-c", RUN, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == code, done.stderr
    return done


def answer(*arguments: str | Path, code: int = 0) -> Any:
    return json.loads(sheily(*arguments, "--json", code=code).stdout)


def data(home: Path, branch: str, name: str = "training/data/train.jsonl") -> Path:
    return home / "all-Branches" / branch / name


def pretend_trained(home: Path, branch: str) -> None:
    """A model folder as a finished training of the present data leaves it, without its weights."""
    folder = home / "var" / "central_models" / branch
    folder.mkdir(parents=True)
    trained_on = data_hash(find_branch(home / "all-Branches", branch))
    config = {"files": {}, "data": {"hash": trained_on}, "request": {}}
    (folder / "training_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_list_is_aligned_in_a_pipe(home: Path) -> None:
    """Columns begin at one place, numbers end at one; a script can split on two spaces."""
    lines = sheily("branches", "list").stdout.splitlines()
    assert lines == [
        "RAMA     ARCHIVOS  EJEMPLOS  RESERVADOS  FORMATO                   MODELO",
        "music           2        12           4  prompt/completion         sin entrenar",
        "physics         2        12           4  instruction/input/output  sin entrenar",
    ]


def test_list_tells_whether_a_model_is_current(home: Path) -> None:
    """A model is current until a row of its branch changes."""
    pretend_trained(home, "music")
    pretend_trained(home, "physics")
    with data(home, "physics").open("a", encoding="utf-8") as file:
        file.write('{"instruction": "¿Qué es?", "output": "Esto."}\n')
    listing = answer("branches", "list")
    assert [(branch["name"], branch["state"]) for branch in listing] == [("music", "current"), ("physics", "stale")]
    assert listing[1] == {
        **{"name": "physics", "files": 2, "examples": 13, "held_out": 4},
        **{"formats": ["instruction/input/output"], "state": "stale"},
    }


def test_list_shows_unknown_and_mixed_formats(home: Path) -> None:
    """Rows that cannot be read do not stop the list: ``check`` is for them."""
    data(home, "music").write_text("{\n", encoding="utf-8")
    data(home, "physics", "training/data/more.jsonl").write_text('{"text": "Hola."}\n', encoding="utf-8")
    music, physics = sheily("branches", "list").stdout.splitlines()[1:]
    assert "?" in music
    assert "instruction/input/output, text" in physics


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_list_is_a_table_on_a_terminal(home: Path) -> None:
    """On a terminal the same words appear, laid out by rich."""
    import pty

    main_end, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", RUN, "branches", "list"], stdout=terminal, env=environment):
        os.close(terminal)
        shown = b""
        while chunk := read_terminal(main_end):
            shown += chunk
    os.close(main_end)
    assert b"\x1b[1m" in shown
    assert "instruction/input/output" in shown.decode()
    assert "sin entrenar" in shown.decode()


def read_terminal(descriptor: int) -> bytes:
    """What the terminal holds; nothing once the process has left it (Linux says so with an error)."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_train_lists_the_same_branches(home: Path) -> None:
    """``sheily train --list-branches`` and ``sheily branches list`` are one list."""
    assert sheily("train", "--list-branches").stdout == sheily("branches", "list").stdout


@pytest.mark.parametrize("command", [("--help",), ("branches", "list"), ("branches", "check")])
def test_quick_commands_load_nothing_heavy(home: Path, command: tuple[str, ...]) -> None:
    """Listing and checking load neither torch nor transformers, nor rich into a pipe."""
    done = sheily(*command, options=("-X", "importtime"))
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "datasets", "pyarrow", "numpy", "rich"}


def test_branches_dir_comes_from_flag_or_environment(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag goes before the variable, the variable before the default; a missing folder is said."""
    (tmp_path / "one" / "art").mkdir(parents=True)
    (tmp_path / "two" / "dance").mkdir(parents=True)
    monkeypatch.setenv("SHEILY_BRANCHES_DIR", str(tmp_path / "one"))
    assert [branch["name"] for branch in answer("branches", "list")] == ["art"]
    assert [branch["name"] for branch in answer("branches", "list", "--branches-dir", tmp_path / "two")] == ["dance"]
    assert "--branches-dir" in sheily("branches", "list", "--branches-dir", tmp_path / "none", code=2).stderr


def test_show_tells_all_about_a_branch(home: Path) -> None:
    """Files with rows and sizes, the description, the state and the first rows, safe for the terminal."""
    (data(home, "physics").parents[2] / "branch.toml").write_text(
        'title = { es = "Física", en = "Physics" }\nday = 2025-01-31\n', encoding="utf-8"
    )
    more = data(home, "physics", "training/data/a.jsonl")
    more.write_text('{\n{"text": "\\u001b[31mHola"}\n', encoding="utf-8")
    shown = sheily("branches", "show", "physics").stdout
    assert "title: Física / Physics" in shown
    assert "asistente: [31mHola" in shown
    assert "sin entrenar" in shown
    facts = answer("branches", "show", "physics")
    assert facts["description"] == {"title": {"es": "Física", "en": "Physics"}, "day": "2025-01-31"}
    assert facts["files"][0] == {
        **{"file": "training/data/a.jsonl", "rows": 2, "format": "text", "bytes": more.stat().st_size}
    }
    assert [[turn["role"] for turn in sample] for sample in facts["samples"]] == [["assistant"], ["user", "assistant"]]


def test_show_of_an_unknown_branch_suggests(home: Path) -> None:
    """A wrong name is one line and exit code 2."""
    assert "¿Quizá physics?" in sheily("branches", "show", "fisics", code=2).stderr


def test_check_is_silent_about_good_branches(home: Path) -> None:
    """Nothing found: a summary and exit code 0."""
    assert sheily("branches", "check").stdout == "Ramas: 2; filas: 32; errores: 0; avisos: 0.\n"


def test_check_reports_findings_and_exits_with_1(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors and warnings come as file:line with what was found, what was expected and the mend."""
    monkeypatch.chdir(home)
    train = data(home, "physics")
    train.write_text('{"instruction": "¿Qué?"\n' + train.read_text(encoding="utf-8"), encoding="utf-8")
    (home / "all-Branches" / "rows.csv").write_text("a,b\n", encoding="utf-8")
    stray, broken, total = sheily("branches", "check", code=1).stdout.splitlines()
    assert stray.startswith(f"{Path('all-Branches') / 'rows.csv'}: aviso [stray] ")
    assert broken.startswith(f"{train.relative_to(home)}:1: error [invalid-json] JSON no válido")
    assert broken.endswith("(se esperaba: un objeto JSON en una sola línea). Corrige o borra la línea.")
    assert total == "Ramas: 2; filas: 33; errores: 1; avisos: 1."


def test_check_can_be_of_named_branches(home: Path) -> None:
    """Named branches are checked alone, and only once each."""
    data(home, "physics").write_text("{\n" * 3, encoding="utf-8")
    assert "Ramas: 1; filas: 16;" in sheily("branches", "check", "music", "music").stdout
    report = answer("branches", "check", "physics", code=1)
    assert (report["branches"], report["rows"]) == (1, 7)
    assert [(problem["line"], problem["code"], problem["severity"]) for problem in report["problems"]] == [
        (line, "invalid-json", "error") for line in (1, 2, 3)
    ]
    assert "music" in sheily("branches", "check", "musics", code=2).stderr


def test_check_shows_as_many_findings_as_asked(home: Path) -> None:
    """``--limit`` cuts the screen's list, not the count; 0 shows all."""
    data(home, "physics").write_text("{\n" * 120, encoding="utf-8")
    lines = sheily("branches", "check", code=1).stdout.splitlines()
    assert (len(lines), lines[-2]) == (102, "… y 20 más; con --limit 0 se ven todos.")
    assert len(sheily("branches", "check", "--limit", "0", code=1).stdout.splitlines()) == 121


def test_check_takes_the_length_limit(home: Path) -> None:
    """The flag moves the limit whose default the help states."""
    assert "[too-long]" in sheily("branches", "check", "--max-characters", "60", code=1).stdout
    assert f"[por defecto: {MAX_CHARACTERS}]" in " ".join(sheily("branches", "check", "--help").stdout.split())


def test_import_makes_a_branch_that_can_be_listed_and_checked(home: Path, tmp_path: Path) -> None:
    """From a spreadsheet's CSV to a branch, in one command."""
    rows = "".join(f"¿Qué es {name}?;Es {name} de verdad;x\r\n" for name in ("uno", "dos", "tres", "cuatro"))
    source = tmp_path / "hoja.csv"
    source.write_bytes(b"\xef\xbb\xbf" + f"pregunta;respuesta;nota\r\n{rows}".encode())
    command = ("branches", "import", "números", source, "--map", "instruction=pregunta, output=respuesta")
    shown = sheily(*command, "--held-out", "25").stdout
    assert "filas: 3" in shown
    assert "columnas sin usar: nota" in shown
    assert "sheily branches check números" in shown
    sheily("branches", "check", "números")
    assert ("números", 3, 1) in [(row["name"], row["examples"], row["held_out"]) for row in answer("branches", "list")]
    assert "--force" in sheily(*command, "--held-out", "25", code=2).stderr
    assert [part["rows"] for part in answer(*command, "--held-out", "25", "--force")] == [3, 1]


def test_import_of_bad_rows_writes_nothing(home: Path, tmp_path: Path) -> None:
    """The message names file:line; the branch stays as it was."""
    source = tmp_path / "rows.csv"
    source.write_text("instruction,output\n¿Qué?,\n", encoding="utf-8")
    done = sheily("branches", "import", "physics", source, code=3)
    assert f"{source}:2: «output» vacío" in done.stderr
    assert "Traceback" not in done.stderr
    assert not data(home, "physics", "training/data/rows.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--map", "instruction"),
        ("--map", "=a"),
        ("--held-out", "0"),
        ("--held-out", "100"),
        ("--evaluation", "--held-out", "5"),
    ],
)
def test_import_refuses_options_that_make_no_sense(home: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """A half map, a split of nothing or all, two targets at once: usage errors."""
    source = tmp_path / "rows.csv"
    source.write_text("instruction,output\n¿Qué?,Esto.\n", encoding="utf-8")
    sheily("branches", "import", "physics", source, *options, code=2)


def test_import_reads_a_dataset(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset is read by its split; one that cannot be had is an error that names it, without a traceback."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "conjunto"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(f"instruction,output\n¿Qué es {split}?,Esto.\n", encoding="utf-8")
    (written,) = answer("branches", "import", "datos", folder, "--split", "test", "--evaluation")
    assert Path(written["file"]) == data(home, "datos", "evaluation/data/conjunto.jsonl")
    assert "¿Qué es test?" in Path(written["file"]).read_text(encoding="utf-8")
    refused = sheily("branches", "import", "datos", "nadie/nada", code=2).stderr
    assert "nadie/nada" in refused
    assert "Traceback" not in refused
