from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from sheily_train.cli import run, sheily

ENGLISH = re.compile(
    r"\b(usage|options?|commands?|try|missing|such|did|mean|got|unexpected|extra|arguments?|requires?|takes?|does|not|is"
    r"|valid|invalid|value|range|integer|float|text|default|required|show|exit|directory|exists?|args)\b",
    re.IGNORECASE,
)


def english_in(text: str) -> list[str]:
    """Words that only an untranslated sentence has; flags, quoted values and names of commands are no sentences."""
    return ENGLISH.findall(re.sub(r"--?[\w-]+|'[^']*'|^(Uso:)? +sheily.*|^  [a-z]+ ", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --brnach x", "No existe la opción '--brnach'. (¿Quizá"),
        ("train --epoch 1", "No existe la opción '--epoch'. ¿Quizá '--epochs'?"),
        ("train --zzzzzz", "No existe la opción '--zzzzzz'."),
        ("ask physics", "Falta el argumento 'PREGUNTA'."),
        ("evaluate", "Falta el argumento 'RAMA…'."),
        ("train --report-to excel", "'excel' no es uno de 'tensorboard', 'wandb', 'mlflow'."),
        ("ask physics q --device tpu", "Valor no válido para '--device': 'tpu' no es uno de"),
        ("ask physics q --max-tokens 0", "Valor no válido para '--max-tokens': "),
        ("ask physics q --max-tokens x", "'x' no es un número válido"),
        ("train physics", "Sobra un argumento (physics)"),
        ("train physics music", "Sobran argumentos (physics music)"),
        ("trian", "No existe la orden 'trian'. ¿Quizá 'train'?"),
        ("xyz", "No existe la orden 'xyz'."),
        ("train --branch", "A la opción '--branch' le falta su valor."),
        ("train --quiet=1", "La opción '--quiet' no lleva valor."),
        ("models get x --wheel /absent.whl", "No existe '/absent.whl'."),
        ("models get x --wheel /", "'/' es una carpeta."),
    ],
)
def test_a_slip_on_the_command_line_is_told_in_spanish(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2, nothing on stdout, and not one English word."""
    with pytest.raises(SystemExit) as caught:
        run(sheily, line.split())
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert english_in(err) == []


@pytest.mark.parametrize("line", ["", "branches", "models"])
def test_a_group_alone_shows_its_help_once(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the help that was asked for, not as an error's text; with exit code 2, for nothing was done."""
    with pytest.raises(SystemExit) as caught:
        run(sheily, line.split())
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (2, "")
    with pytest.raises(SystemExit):
        run(sheily, [*line.split(), "--help"])
    assert shown.err == capsys.readouterr().out


def commands(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, *words, name)


@pytest.mark.parametrize("words", list(commands(sheily)), ids=" ".join)
def test_every_help_page_is_spanish(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headings, placeholders and click's own options too; no sentence is cut, no default is empty."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        run(sheily, [*words, "--help"])
    page = capsys.readouterr().out
    assert caught.value.code == 0
    assert page.startswith("Uso: sheily")
    assert english_in(page) == []
    assert "[por defecto: ]" not in page
    assert "..." not in page  # a command's first sentence stands in the list of commands
