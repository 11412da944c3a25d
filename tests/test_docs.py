"""The pages say what the program does: every option is described, every command line parses, the cheap ones run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import sheily_train
from sheily_train import paths
from sheily_train.cli import run, sheily
from sheily_train.core.branches import examples
from sheily_train.core.branches.examples import REQUIRED_FIELDS, Code, Problem
from sheily_train.core.training.request import TrainRequest, flag, resolve, settings
from sheily_train.errors import INTERNAL_ERROR, Interrupted, SheilyError

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sheily_train.__file__).parent
TRAINING, BRANCHES, ARCHITECTURE = (f"docs/{name}.md" for name in ("training", "branches", "architecture"))
PAGES = (
    *(
        "README.md",
        "README.es.md",
        "INSTALACION_RAPIDA.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "sheily_train/README.md",
    ),
    *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))),
)
DESCRIBED_IN = {"train": TRAINING, "models": TRAINING, "ask": TRAINING, "evaluate": TRAINING, "export": TRAINING}
"""Where each command's options stand; those of ``branches`` have a page of their own."""

OTHER_PROGRAMS = {"py", "python", "source", "ruff", "mypy", "coverage", "pytest"}
OTHER_FLAGS = {
    "--constraint": "pip",
    "--editable": "pip",
    "--check": "ruff",
    "--cov": "pytest",
    "--cov-report": "pytest",
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
        """The words after ``sheily``; the launchers' too, which are ``sheily train``. None for other programs."""
        program, rest = Path(self.words[0]).name, self.words[1:]
        if program == "sheily":
            return rest
        if self.words[:2] == ("python3", "sheily_train/train_branch.py"):
            return ("train", *self.words[2:])
        return ("train", "--all", *rest) if self.words[0] == "sheily_train/train_all.sh" else None

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
    elif line.sheily is None:
        assert Path(line.words[0]).name in OTHER_PROGRAMS
    else:
        command, rest = find(line.sheily)
        given = command.make_context(command.name, list(rest)).params
        if command.name == "train":
            flags = {item.name: given[item.name] for item in settings() if item.name in given}
            TrainRequest(**resolve(flags, {}, None))


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
    known = {0, SheilyError.exit_code, INTERNAL_ERROR, 128 + signal.SIGINT, 128 + signal.SIGTERM}
    known |= {error.exit_code for error in SheilyError.__subclasses__()}
    assert {int(row[0]) for row in table(section(page, title))} == known


def test_environment_variables_are_those_of_the_code() -> None:
    """The pages name no variable that the code does not read, and docs/training.md lists all but the settings'."""
    source = "".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    of_settings = {f"SHEILY_{item.name.upper()}" for item in settings()}
    in_code = set(re.findall(r"SHEILY_[A-Z]\w*", source)) - (of_settings - {"SHEILY_BRANCHES_DIR"})
    assert {name for page in PAGES for name in re.findall(r"SHEILY_[A-Z]\w*", TEXT[page])} <= in_code | of_settings
    listed = {name for row in table(section(TRAINING, "Environment")) for name in names(row[0])}
    assert {name for name in listed if name.startswith("SHEILY_")} == in_code


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
    assert shown == there
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
    """Whether the command needs no network: all but those with a hub's id."""
    return not any(re.fullmatch(r"[\w-]+/[\w.-]+", word) and word[:6] != "models" for word in words[2:])


@pytest.mark.parametrize("page", ["README.md", "INSTALACION_RAPIDA.md", TRAINING, BRANCHES])
def test_commands_run(page: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of a page, given one after the other in a fresh project, all end well."""
    for line in command_lines(page):
        if line.sheily is not None and is_cheap(line.sheily):
            code = give(line.sheily)
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

    found: list[dict[str, Any]] = []

    def listen(record: dict[str, Any]) -> None:
        found.append(record)
        if record["event"] == "step" and record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    request = TrainRequest(branch="physics", model=str(tiny_llama), lora=True)
    with pytest.raises(Interrupted):
        train_model(request, listeners=(listen,))
    train_model(request, listeners=(found.append,))
    return found


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
