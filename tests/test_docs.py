"""The pages say what the program does: every option is described, every command line parses, the cheap ones run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np
import pytest

import sheily_train
from sheily_train import paths, runlog
from sheily_train.cli import run, sheily
from sheily_train.colab import presets, protocol
from sheily_train.colab.connect import seconds_of
from sheily_train.colab.story import Summary
from sheily_train.colab.wire import ClientSettings
from sheily_train.core.branches import examples
from sheily_train.core.branches.examples import REQUIRED_FIELDS, Code, Problem
from sheily_train.core.training.request import TrainRequest, flag, resolve, settings
from sheily_train.errors import INTERNAL_ERROR, Interrupted, SheilyError
from tests.colab.test_connect import TOKEN, Worker

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sheily_train.__file__).parent
TRAINING, BRANCHES, ARCHITECTURE, OMEGA = (
    f"docs/{name}.md" for name in ("training", "branches", "architecture", "omega")
)
COLAB = "sheily_train/colab/README.md"
PAGES = (
    *(
        "README.md",
        "README.es.md",
        "INSTALACION_RAPIDA.md",
        "GUIA_RAPIDA_COLAB.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "sheily_train/README.md",
        COLAB,
    ),
    *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))),
)
DESCRIBED_IN = dict.fromkeys(("train", "models", "ask", "evaluate", "export"), TRAINING) | dict.fromkeys(
    ("worker", "connect", "doctor"), OMEGA
)
"""Where each command's options stand; those of ``branches`` have a page of their own."""

LAUNCHERS = {
    ("python3", "sheily_train/train_branch.py"): ("train",),
    ("sheily_train/train_all.sh",): ("train", "--all"),
    ("./conectar_colab.sh",): ("connect",),
    ("./verificar_setup_colab.sh",): ("doctor",),
}
"""What stands for which command."""

OTHER_PROGRAMS = {"py", "python", "source", "export", "ruff", "mypy", "coverage", "pytest"}
OTHER_FLAGS = {
    "--constraint": "pip",
    "--editable": "pip",
    "--check": "ruff",
    "--no-loadscope-reorder": "pytest",
    "--cov": "pytest",
    "--cov-report": "pytest",
    "--dist": "pytest",
    "--numprocesses": "pytest",
    "--gpu": "colab new",
    "--proxy-mode": "colab ssh",
    "--requests": "testing.garbage",
    "--runs": "scripts.testing",
    "--jobs": "scripts.testing",
}

TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def blocks(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in these languages."""
    return [code for language, code in _FENCED.findall(TEXT[page]) if language in languages]


def prose(page: str) -> str:
    return _FENCED.sub("", TEXT[page])


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"^## ", TEXT[page].partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, their headings left out."""
    rows = re.sub(r"^\|.*\|\n\|[-|]+\|$", "", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\|(.*)\|$", rows, re.MULTILINE)]


def names(cell: str) -> list[str]:
    """What stands in backticks."""
    return _INLINE.findall(cell)


@dataclass(frozen=True)
class CommandLine:
    """A command line of a page, split as a shell would split it."""

    page: str
    words: tuple[str, ...]

    @property
    def sheily(self) -> tuple[str, ...] | None:
        """The words after ``sheily``, or those that a launcher stands for. None for other programs."""
        if Path(self.words[0]).name == "sheily":
            return self.words[1:]
        for start, meant in LAUNCHERS.items():
            if self.words[: len(start)] == start:
                return (*meant, *self.words[len(start) :])
        return None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def command_lines(page: str) -> Iterator[CommandLine]:
    for code in blocks(page, "bash", "powershell"):
        code = re.sub(r"\\\n\s*", "", code).replace("\\", "/")  # continued lines; PowerShell's folders
        for line in code.splitlines():
            if words := shlex.split(line, comments=True):
                yield CommandLine(page, tuple(words))


LINES = [line for page in PAGES for line in command_lines(page)]


def leaves(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with its path."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from leaves(below, *path, name)


COMMANDS = dict(leaves(sheily))
KNOWN_FLAGS = {"--help", "--version"} | {
    name
    for command in COMMANDS.values()
    for option in command.params
    for name in (*option.opts, *option.secondary_opts)
}


def find(words: tuple[str, ...]) -> tuple[click.Command, tuple[str, ...]]:
    """The command that the first words name, and the rest of them."""
    command: click.Command = sheily
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{words[0]} is no command"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("path", "command"), COMMANDS.items(), ids=map(" ".join, COMMANDS))
def test_every_option_is_described(path: tuple[str, ...], command: click.Command) -> None:
    """All names of a command's options stand in the sentences and tables of its page, and so does the command."""
    text = prose(DESCRIBED_IN.get(path[0], BRANCHES))
    wanted = {
        name
        for option in command.params
        if isinstance(option, click.Option)
        for name in option.opts + option.secondary_opts
    }
    assert wanted - set(_FLAG.findall(text)) == set()
    assert f"`{path[-1]}`" in text or " ".join(("sheily", *path)) in text


def test_the_table_of_settings_is_that_of_the_request() -> None:
    """docs/training.md shows every setting once, with its aliases and its default."""
    rows = {names(row[0])[0]: row for row in table(section(TRAINING, "Settings")) if len(row) == 3}
    known = {flag(item.name): item for item in settings()}
    assert rows.keys() == known.keys()
    for name, item in known.items():
        assert set(names(rows[name][0])) - {f"--no-{name[2:]}"} == {name, *item.metadata["aliases"]}
        default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
        if isinstance(default, str | int | float) and default != "":
            assert rows[name][1] == ("off" if default is False else f"`{default}`"), name


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_named_exists(page: str) -> None:
    """A flag on a page is one of ours, or one of another program that its line names."""
    for line in TEXT[page].splitlines():
        for name in _FLAG.findall(line):
            assert name.replace("_", "-") in KNOWN_FLAGS or OTHER_FLAGS.get(name, "no program") in line, (
                f"{name}: {line}"
            )


@pytest.mark.parametrize("line", LINES, ids=str)
def test_every_command_line_parses(line: CommandLine) -> None:
    """A command line in a code block is a make target, a known program's, or parses with settings that can be used."""
    if line.words[0] == "make":
        assert {word for word in line.words[1:] if "=" not in word} <= make_targets()
    elif line.sheily is None and line.words[0] == "python3":
        assert (ROOT / line.words[1]).is_file()
    elif line.sheily is None:
        assert Path(line.words[0]).name in OTHER_PROGRAMS
    else:
        command, rest = find(line.sheily)
        given = command.make_context(command.name, list(rest)).params
        if command.name == "train":
            flags = {item.name: given[item.name] for item in settings() if item.name in given}
            TrainRequest(**resolve(flags, {}, None))
        if command.name == "connect":
            session_settings(rest)
            assert given["cada"] is None or seconds_of(given["cada"])


def session_settings(words: tuple[str, ...]) -> presets.Settings:
    """The settings that options of ``sheily connect`` come to."""
    given = COMMANDS[("connect",)].make_context("connect", list(words)).params
    known = {item.name for item in fields(presets.Settings)}
    return presets.resolve(given["preset"], {name: value for name, value in given.items() if name in known})


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page: str) -> None:
    """What a sentence calls ``sheily …`` or ``make …`` is a command with such options, or a target."""
    for span in _INLINE.findall(prose(page)):
        words = tuple(shlex.split(span))
        if words[:1] == ("make",):
            assert {word for word in words[1:] if "=" not in word} <= make_targets(), span
        elif words[:1] == ("sheily",) and len(words) > 1:
            command, rest = find(words[1:])
            options = {name for option in command.params for name in option.opts} | {"--version", "--help"}
            assert {word for word in rest if word.startswith("--")} <= options, span


def test_both_readmes_show_the_same_commands() -> None:
    """The Spanish README is the English one in another language."""
    english, spanish = ([line.words for line in command_lines(page)] for page in ("README.md", "README.es.md"))
    assert english == spanish
    assert [words[1] for words in english[:2]] == ["demo", "test"]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    """A link between pages leads to a file that exists, and to a heading that stands in it."""
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize(("page", "title"), [("README.md", "Exit codes"), ("README.es.md", "Códigos de salida")])
def test_every_exit_code_is_listed(page: str, title: str) -> None:
    """The READMEs list success, each error of the family, a defect, and the two signals."""
    known = {0, INTERNAL_ERROR, 128 + signal.SIGINT, 128 + signal.SIGTERM}
    known |= {error.exit_code for error in family(SheilyError)}
    assert {int(row[0]) for row in table(section(page, title))} == known
    assert {int(row[0]) for row in table(section(OMEGA, "Exit codes"))} <= known


def family(error: type[SheilyError]) -> Iterator[type[SheilyError]]:
    """An error and all that are derived from it by ``errors.py``."""
    yield error
    for below in error.__subclasses__():
        if below.__module__ == SheilyError.__module__:
            yield from family(below)


def test_environment_variables_are_those_of_the_code() -> None:
    """The pages name no variable that the code does not read, and their two tables list all but the settings'."""
    source = "".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    of_settings = {f"SHEILY_{item.name.upper()}" for item in settings()}
    in_code = set(re.findall(r"SHEILY_[A-Z]\w*", source)) - (of_settings - {"SHEILY_BRANCHES_DIR"})
    assert {name for page in PAGES for name in re.findall(r"SHEILY_[A-Z]\w*", TEXT[page])} <= in_code | of_settings
    listed = {
        name for page in (TRAINING, OMEGA) for row in table(section(page, "Environment")) for name in names(row[0])
    }
    assert {name for name in listed if name.startswith("SHEILY_")} == in_code
    assert {name for name in listed if name.startswith(("COLAB_", "NGROK_"))} == set(
        re.findall(r"\"((?:COLAB|NGROK)_[A-Z]+(?:_URL)?)\"", source)
    )


def test_findings_are_those_of_check() -> None:
    """docs/branches.md lists every kind of finding with its severity."""
    listed = {Code(names(row[0])[0]): row[1] for row in table(section(BRANCHES, "What check finds"))}
    problems = (Problem(code, Path("x"), 0, "", "", "") for code in Code)
    assert listed == {problem.code: "error" if problem.is_error else "warning" for problem in problems}


def test_row_formats_are_those_that_are_read() -> None:
    """The rows shown in docs/branches.md, in the order of their precedence, are read as the format they stand for."""
    rows = table(section(BRANCHES, "Row formats"))
    assert [row[0].strip("`") for row in rows] == list(REQUIRED_FIELDS)
    for row in rows:
        shown = json.loads(row[1].partition("`")[2].partition("`")[0])
        found = examples.first_format([shown])
        assert found == row[0].strip("`")
        assert examples.parse_row(shown, found, "docs").turns[-1].role == "assistant"
    roles = names(section(BRANCHES, "Row formats").rpartition("Roles are")[2])
    assert set(roles) == examples._ROLES.keys()


def test_the_map_shows_every_module() -> None:
    """docs/architecture.md has each module of the package, and none that is not there."""
    [tree] = [code for code in blocks(ARCHITECTURE, "text") if "sheily_train/\n" in code]
    shown = set(re.findall(r"\b\w+\.(?:py|sh)\b", tree))
    there = {file.name for file in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.sh")) if file.name != "__init__.py"}
    beside = {file.name for file in (*ROOT.glob("*.py"), *ROOT.glob("*.sh"))}
    assert shown - beside == there
    assert beside <= set(re.findall(r"\b\w+\.(?:py|sh)\b", blocks(ARCHITECTURE, "text")[0]))
    for folder in {file.parent for file in PACKAGE.rglob("*.py")} - {PACKAGE, PACKAGE / "core", PACKAGE / "tools"}:
        assert f"{folder.relative_to(PACKAGE).as_posix()}/" in tree


def test_files_named_in_the_map_exist() -> None:
    """Paths that the contributors' pages name with a folder are there."""
    text = prose(ARCHITECTURE) + prose("CONTRIBUTING.md")
    for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|sh))`", text):
        assert (ROOT / path).is_file() or (PACKAGE / path).is_file(), path


@pytest.fixture
def project(home: Path, tiny_llama: Path, embedded_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root in which the pages' commands can be given: their branches, their files, the tiny model."""
    sports = shutil.copytree(home / "all-Branches" / "music", home / "all-Branches" / "sports")
    for file in sports.rglob("*.jsonl"):
        text = file.read_text(encoding="utf-8").replace('"prompt": "', '"prompt": "Deportes. ')
        file.write_text(text, encoding="utf-8")
    capitals = ("Francia,París", "Italia,Roma", "Perú,Lima", "Cuba,La Habana", "Japón,Tokio", "Kenia,Nairobi")
    (home / "capitals.csv").write_text("question,answer\n" + "\n".join(capitals) + "\n", encoding="utf-8")
    (home / "quiz.jsonl").write_text('{"prompt": "¿Y de Chile?", "completion": "Santiago."}\n', encoding="utf-8")
    [settings_file] = blocks(TRAINING, "yaml")
    (home / "physics.yaml").write_text(settings_file, encoding="utf-8")
    monkeypatch.setenv("SHEILY_MODEL", str(tiny_llama))
    monkeypatch.chdir(home)
    return home


def give(words: tuple[str, ...]) -> int:
    """Give a command as a person would, in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        run(sheily, words)
    return int(end.value.code or 0)


def is_cheap(words: tuple[str, ...]) -> bool:
    """Whether the command needs no network and ends: all but those with a hub's id, workers, and what repeats."""
    if words[0] == "worker" or "--cada" in words:
        return False
    return not any(re.fullmatch(r"[\w-]+/[\w.-]+", word) and word[:6] != "models" for word in words[2:])


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker on the loopback, with a learner of a few numbers."""
    worker = Worker(tmp_path / "worker")
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def desk(project: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> str:
    """A project with the worker's address in its environment, and the vectors that the pages name; the address."""
    address = f"{worker.address.url}/#token={TOKEN}"
    monkeypatch.setenv("COLAB_SERVER_URL", address)
    np.save(project / "medidas.npy", np.random.default_rng(0).random((70, 1600), np.float32))
    series = "".join(f"{number % 64},{int(number > 3000)}\n" for number in range(4000))
    for name in ("medidas.csv", "serie.csv"):
        (project / name).write_text("valor,fallo\n" + series, encoding="utf-8")
    return address


def brief(words: tuple[str, ...], address: str) -> tuple[str, ...]:
    """The command at this worker, with fewer vectors."""
    if words[0] not in ("connect", "doctor"):
        return words
    words = tuple(address if word.startswith("http") else word for word in words)
    made_up = words[0] == "connect" and not {"--datos", "--continuar"} & set(words)
    return (*words, "--muestras", "130") if made_up else words


@pytest.mark.no_cover  # whole commands: their lines are counted in the tests of their modules
@pytest.mark.parametrize(
    "page", ["README.md", "INSTALACION_RAPIDA.md", "GUIA_RAPIDA_COLAB.md", COLAB, TRAINING, BRANCHES, OMEGA]
)
def test_commands_run(page: str, desk: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of a page, given one after the other in a fresh project, all end well."""
    for line in command_lines(page):
        if line.sheily is not None and is_cheap(line.sheily):
            code = give(brief(line.sheily, desk))
            out, error = capsys.readouterr()
            assert code == 0, f"{line}\n{out}{error}"
            assert out


def test_the_command_that_training_shows_works(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The question that ends a training's lines can be asked as it is shown, wherever the model went."""
    for more in ((), ("--output", "models/special"), ("--output", "mis modelos/de física")):
        assert give(("train", "--branch", "physics", "--lora", "--max-steps", "1", *more)) == 0
        shown = capsys.readouterr().out.splitlines()[-1]
        assert shown.startswith("Pregunta: sheily ask ")
        assert give(tuple(shlex.split(shown.partition("sheily ")[2]))) == 0


@pytest.fixture
def records(home: Path, tiny_llama: Path) -> list[dict[str, Any]]:
    """The records of a run that is stopped by Ctrl-C, goes on and ends."""
    from sheily_train.core.training.trainer import train_model

    def listen(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    request = TrainRequest(branch="physics", model=str(tiny_llama), lora=True)
    with pytest.raises(Interrupted):
        train_model(request, listeners=(listen,))
    [log] = paths.logs_dir().glob("training_physics_*.jsonl")
    cut_off = list(runlog.read(log))
    train_model(request)
    return [*cut_off, *runlog.read(log)]


def test_records_and_files_are_as_described(records: list[dict[str, Any]], home: Path) -> None:
    """docs/training.md names each record of a run and each of its fields, each file of its folder and each key."""
    text = section(TRAINING, "Run log")
    described = {names(row[0])[0]: set(names(row[2])) for row in table(text)}
    described["resume"] = described["start"]
    assert described == {record["event"]: record.keys() - {"event"} for record in records}
    done, start = records[-1], records[0]
    for nested in (start["placement"], done["timing"], done["heldout_after"]):
        assert nested.keys() <= set(names(text))

    folder = home / "var" / "central_models" / "physics"
    files = {name: row[1] for row in table(section(TRAINING, "Outputs")) for name in names(row[0])}
    assert {path.name for path in folder.iterdir()} <= files.keys()
    assert {paths.MODEL_WEIGHTS, paths.MODEL_CONFIG} <= files.keys()
    config = json.loads((folder / paths.TRAINING_CONFIG).read_text(encoding="utf-8"))
    assert set(names(files[paths.TRAINING_CONFIG])) - {"auto"} == config.keys()
    metrics = json.loads((folder / paths.TRAINING_METRICS).read_text(encoding="utf-8"))
    assert metrics.keys() == described["done"] - {"at"}


def test_the_python_example_runs(project: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The library is used as docs/training.md shows it."""
    [code] = blocks(TRAINING, "python")
    exec(code.replace("lora=True", f"lora=True, model={str(tiny_llama)!r}"), {})
    assert "'loss'" in capsys.readouterr().out


# OMEGA 21


@pytest.fixture
def api(worker: Worker) -> dict[str, Any]:
    """The worker's own description of its endpoints."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    content: dict[str, Any] = httpx2.get(f"{worker.address.url}/openapi.json", headers=headers).json()
    return content["paths"]


def shape(value: Any) -> Any:
    """The keys of a JSON value, all the way down; what is open to more keys is left out."""
    if isinstance(value, dict):
        return {name: None if name in ("objetivos", "fingerprint") else shape(below) for name, below in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value) in (dict, list)


def test_endpoints_are_those_of_the_worker(api: dict[str, Any]) -> None:
    """docs/omega.md lists every endpoint, and gives each a section; the Spanish guide lists them too."""
    there = {f"{method.upper()} {path}" for path, methods in api.items() for method in methods}
    assert {name for row in table(section(OMEGA, "Endpoints")) for name in names(row[0]) if " " in name} == there
    assert set(re.findall(r"^### `(\w+ /\w+)`$", TEXT[OMEGA], re.MULTILINE)) == there
    assert {name for row in table(section(COLAB, "Endpoints")) for name in names(row[0])} == there


def test_endpoints_json_is_the_workers(api: dict[str, Any]) -> None:
    """The requests and answers shown in docs/omega.md have exactly the keys of the worker's."""
    form = "application/json"
    for path, methods in api.items():
        for method, about in methods.items():
            content = [about.get("requestBody", {}).get("content", {}), about["responses"]["200"]["content"]]
            expected = [part[form]["example"] for part in content if form in part]
            part = re.split(r"^##", TEXT[OMEGA].partition(f"\n### `{method.upper()} {path}`\n")[2], flags=re.MULTILINE)
            shown = [json.loads(code) for language, code in _FENCED.findall(part[0]) if language == "json"]
            assert [shape(value) for value in shown] == [shape(value) for value in expected], path


@pytest.mark.parametrize(
    ("command", "title"), [("worker", "The worker"), ("connect", "The client"), ("doctor", "The doctor")]
)
def test_tables_of_options_are_whole(command: str, title: str) -> None:
    """The table of each command in docs/omega.md has a row for every option, and for nothing else."""
    listed = {name for row in table(section(OMEGA, title)) for name in names(row[0]) if name.startswith("--")}
    options = (option for option in COMMANDS[(command,)].params if isinstance(option, click.Option))
    assert listed == {name for option in options for name in option.opts + option.secondary_opts}


def test_meters_are_those_of_the_worker(worker: Worker) -> None:
    """docs/omega.md lists the meters that Prometheus is told."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    told = httpx2.get(f"{worker.address.url}/metrics", headers=headers).text
    there = {name for name in re.findall(r"^# TYPE (\w+)", told, re.MULTILINE) if not name.endswith("_created")}
    assert {name for row in table(section(OMEGA, "Endpoints")) for name in names(row[0]) if name[0] == "s"} == there


def test_headers_are_those_of_the_protocol() -> None:
    """docs/omega.md lists the headers of an event."""
    there = {value for name, value in vars(protocol).items() if name.endswith("_HEADER")}
    assert {names(row[0])[0] for row in table(section(OMEGA, "Protocol")) if names(row[0])} == there


def calls(*functions: str) -> Iterator[ast.Call]:
    """Every call of functions or methods of these names in the package's ``colab``."""
    for file in sorted((PACKAGE / "colab").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in functions:
                    yield node


def test_error_codes_are_those_of_the_worker() -> None:
    """docs/omega.md lists every code of an error, with each status that it may have."""
    rows = table(section(OMEGA, "Errors"))
    listed = {name: {int(status) for status in row[1].split(",")} for row in rows for name in names(row[0])}
    used: dict[str, set[int]] = {}
    for call in calls("RefusedError"):
        given = {word.arg: word.value for word in call.keywords}
        code, status = (given.get(name, ast.Constant(usual)) for name, usual in (("code", "invalid"), ("status", 400)))
        if isinstance(code, ast.Constant):
            used.setdefault(code.value, set()).update([status.value] if isinstance(status, ast.Constant) else ())
    assert listed.keys() == used.keys()
    assert {code: statuses - listed[code] for code, statuses in used.items() if statuses - listed[code]} == {}


def test_client_settings_are_those_of_the_code() -> None:
    """docs/omega.md shows every setting of the client with its default."""
    rows = {names(row[0])[0]: row[1].strip("`") for row in table(section(OMEGA, "The client")) if len(row) == 3}
    known = {item.name: str(item.default) for item in fields(ClientSettings)}
    assert {name: default for name, default in rows.items() if name[0] != "-"} == known


def test_presets_are_those_of_the_code() -> None:
    """docs/omega.md writes every preset as the options that it stands for."""
    rows = [row for row in table(section(OMEGA, "The client")) if len(row) == 2]
    listed = {names(row[0])[0]: session_settings(tuple(shlex.split(names(row[1])[0]))) for row in rows}
    assert listed == presets.PRESETS


def test_what_a_session_writes_is_described(desk: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/omega.md names each record of OMEGA 21's run log with its fields, and the keys of both JSON outputs."""
    described = {names(row[0])[0]: row[2] for row in table(section(OMEGA, "Run log"))}
    in_code: dict[str, set[str]] = {"step": set(), "feedback": set()}
    for call in calls("_record", "record"):
        if call.args and isinstance(call.args[0], ast.Constant):
            in_code[call.args[0].value] = {str(word.arg) for word in call.keywords if word.arg}
    assert described.keys() == in_code.keys()
    assert all(words <= set(names(described[event])) for event, words in in_code.items())

    words = ("--muestras", "20", "--lote", "4", "--diagnostico", "--metricas", "--feedback")
    assert give(("connect", desk, *words, "--json", "--reporte", "informe.html")) == 0
    result = json.loads(capsys.readouterr().out)
    records = list(runlog.read(project / "var" / "central_logs" / "omega_principal.jsonl"))
    assert {"worker", "diagnosis", "session", "step", "feedback", "wire", "metrics", "done"} == {
        record["event"] for record in records
    }
    for record in records:
        told = {name for name in names(described[record["event"]]) if "/" not in name and name[0] != "-"}
        assert record.keys() - {"event"} == told, record["event"]
    assert result.keys() == (records[-1].keys() - {"event"}) | {"metrics", "log", "report"}

    report = json.loads((project / "informe.json").read_text(encoding="utf-8"))
    listed = set(names(section(OMEGA, "Report")))
    assert report.keys() | {item.name for item in fields(Summary)} <= listed


def test_the_doctors_json_is_described(desk: str, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/omega.md names the keys of what ``sheily doctor --json`` prints."""
    give(("doctor", desk, "--json"))
    told = json.loads(capsys.readouterr().out)
    assert told.keys() | told["checks"][0].keys() <= set(names(section(OMEGA, "The doctor")))


@pytest.mark.parametrize("page", [OMEGA, COLAB])
def test_the_clients_example_runs(page: str, desk: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The client is used as the page shows it."""
    [code] = blocks(page, "python")
    exec(code, {})
    assert "Lotes: 4 (256 vectores)" in capsys.readouterr().out
