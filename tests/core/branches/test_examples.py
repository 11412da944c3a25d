from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheily_train.core.branches.examples import (
    Code,
    Example,
    Problem,
    RowFormat,
    Turn,
    excerpt,
    file_format,
    read_examples,
    read_file,
)
from sheily_train.errors import DataError

GOOD = b'{"instruction": "P", "output": "R"}'


def write(tmp_path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    file = tmp_path / "physics" / "training" / "data" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(line + end for line in lines))
    return file


def write_rows(tmp_path: Path, *rows: Any) -> Path:
    return write(tmp_path, *(json.dumps(row).encode() for row in rows))


def problems_of(file: Path) -> list[Problem]:
    return [item for _line, item in read_file(file) if isinstance(item, Problem)]


def turns_of(file: Path) -> list[tuple[tuple[str, str], ...]]:
    return [tuple((turn.role, turn.content) for turn in example.turns) for example in read_examples([file])]


CONVERSATION = (("system", "S"), ("user", "P"), ("assistant", "R"), ("user", "Q"), ("assistant", "T"))


@pytest.mark.parametrize(
    ("row", "row_format", "turns"),
    [
        (
            {"instruction": "P", "input": "E", "output": "R"},
            RowFormat.INSTRUCTION,
            (("user", "P\n\nE"), ("assistant", "R")),
        ),
        ({"instruction": "P", "input": "", "output": "R"}, RowFormat.INSTRUCTION, (("user", "P"), ("assistant", "R"))),
        (
            {"instruction": "P", "input": None, "output": "R"},
            RowFormat.INSTRUCTION,
            (("user", "P"), ("assistant", "R")),
        ),
        ({"instruction": "P", "output": "R"}, RowFormat.INSTRUCTION, (("user", "P"), ("assistant", "R"))),
        (
            {"instruction": "P", "output": "R", "text": "P R", "level": 3},
            RowFormat.INSTRUCTION,
            (("user", "P"), ("assistant", "R")),
        ),
        ({"prompt": "P", "completion": "R"}, RowFormat.PROMPT, (("user", "P"), ("assistant", "R"))),
        ({"text": " T\n"}, RowFormat.TEXT, (("assistant", " T\n"),)),
        (
            {"messages": [{"role": role, "content": content} for role, content in CONVERSATION]},
            RowFormat.MESSAGES,
            CONVERSATION,
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    *({"role": r, "content": c} for r, c in CONVERSATION[1:]),
                ]
            },
            RowFormat.MESSAGES,
            CONVERSATION[1:],
        ),
        (
            {
                "conversations": [
                    {"from": name, "value": content}
                    for name, (_role, content) in zip(
                        ("system", "human", "gpt", "user", "model"), CONVERSATION, strict=True
                    )
                ]
            },
            RowFormat.CONVERSATIONS,
            CONVERSATION,
        ),
    ],
)
def test_every_format_becomes_turns(
    tmp_path: Path, row: dict[str, Any], row_format: RowFormat, turns: tuple[tuple[str, str], ...]
) -> None:
    """A row of each format, with its optional fields or without, is read as the conversation it stands for."""
    file = write_rows(tmp_path, row)
    assert file_format(file) == row_format
    assert read_examples([file])[0].format == row_format
    assert turns_of(file) == [turns]


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({}, Code.FIELDS),
        ({"question": "P", "answer": "R"}, Code.FIELDS),
        ({"instruction": "P"}, Code.FIELDS),
        ({"prompt": "P", "completion": "R"}, Code.FIELDS),
        ({"instruction": "P", "output": ""}, Code.EMPTY),
        ({"instruction": " \n", "output": "R"}, Code.EMPTY),
        ({"instruction": "P", "output": None}, Code.NOT_TEXT),
        ({"instruction": 3, "output": "R"}, Code.NOT_TEXT),
        ({"instruction": "P", "input": [], "output": "R"}, Code.NOT_TEXT),
        ({"instruction": "P", "output": ["R"]}, Code.NOT_TEXT),
        ({"instruction": "P", "output": "\ud800"}, Code.ENCODING),
    ],
)
def test_every_row_is_held_to_the_file_s_format(tmp_path: Path, row: dict[str, Any], code: Code) -> None:
    """After a good first row, a row of other, missing, empty or non-text fields is a problem of its line."""
    problems = problems_of(write_rows(tmp_path, {"instruction": "P", "output": "R"}, row))
    assert [(problem.code, problem.line) for problem in problems] == [(code, 2)]
    assert problems[0].is_error


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (chat(), Code.TURNS),
        (chat("user"), Code.TURNS),
        (chat("system"), Code.TURNS),
        (chat("assistant"), Code.TURNS),
        (chat("assistant", "user"), Code.TURNS),
        (chat("user", "user", "assistant"), Code.TURNS),
        (chat("user", "assistant", "assistant"), Code.TURNS),
        (chat("user", "system", "assistant"), Code.TURNS),
        (chat("user", "tool"), Code.TURNS),
        ({"messages": "hola"}, Code.TURNS),
        ({"messages": {"role": "user", "content": "x"}}, Code.TURNS),
        ({"messages": ["hola"]}, Code.TURNS),
        ({"messages": [{"role": "user"}]}, Code.FIELDS),
        ({"messages": [{"role": "user", "content": ""}]}, Code.EMPTY),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, Code.NOT_TEXT),
        ({"messages": [{"role": None, "content": "x"}]}, Code.NOT_TEXT),
    ],
)
def test_conversations_that_no_model_can_follow_are_problems(tmp_path: Path, row: dict[str, Any], code: Code) -> None:
    """Turns alternate, begin with the user (after a system prompt, if any) and end with the assistant."""
    problems = problems_of(write_rows(tmp_path, chat("user", "assistant"), row))
    assert [(problem.code, problem.line) for problem in problems] == [(code, 2)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"instruction": "P", "output": "R', Code.INVALID_JSON),
        (b'{"instruction": "P", "output": "R"} {}', Code.INVALID_JSON),
        (b"{'instruction': 'P', 'output': 'R'}", Code.INVALID_JSON),
        (b'{"instruction": "P", "instruction": "Q", "output": "R"}', Code.INVALID_JSON),
        (b'{"instruction": "P", "output": "R", "score": NaN}', Code.INVALID_JSON),
        (b'{"instruction": "P", "output": "R", "score": -Infinity}', Code.INVALID_JSON),
        (b'{"instruction": "P", "output": "R", "id": ' + b"9" * 5000 + b"}", Code.INVALID_JSON),
        (b'["P", "R"]', Code.INVALID_JSON),
        (b"[", Code.INVALID_JSON),
        (b"3", Code.INVALID_JSON),
        (b"null", Code.INVALID_JSON),
        (b'"hola"', Code.INVALID_JSON),
        (b"hola", Code.INVALID_JSON),
        (b"\x00", Code.INVALID_JSON),
        (b"[" * 200_000, Code.INVALID_JSON),
        (b'{"instruction": "P", "output": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", Code.NOT_TEXT),
        (b'{"instruction": "\xff", "output": "R"}', Code.ENCODING),
        (b'{"instruction": "\xc3", "output": "R"}', Code.ENCODING),
        ('{"instruction": "ñ", "output": "R"}'.encode("latin-1"), Code.ENCODING),
        ('{"instruction": "ñ", "output": "R"}'.encode("utf-16"), Code.ENCODING),
    ],
)
def test_hostile_lines_are_problems_of_their_line(tmp_path: Path, line: bytes, code: Code) -> None:
    """Whatever stands in a line, it is reported as that line's problem and its neighbours are still read."""
    items = list(read_file(write(tmp_path, GOOD, line, GOOD)))
    assert [number for number, _item in items] == [1, 2, 3]
    assert [isinstance(item, Problem) for _number, item in items] == [False, True, False]
    problem = items[1][1]
    assert isinstance(problem, Problem)
    assert problem.code == code
    assert len(str(problem)) < 400
    assert str(problem).isprintable()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.lists(st.sampled_from([GOOD, b"\n", b"\r\n", b"{", b"\xef\xbb\xbf"])).map(b"".join)
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    """No file makes the reader raise: each row is an example or a problem, and training refuses exactly the errors."""
    file = write(tmp_path, content, end=b"")
    items = list(read_file(file))
    lines = content.count(b"\n") + 1
    assert all(isinstance(item, Example | Problem) and 1 <= line <= lines for line, item in items)
    errors = [item for _line, item in items if isinstance(item, Problem) and item.is_error]
    if errors:
        with pytest.raises(DataError, match=f": {len(errors)}\\."):
            read_examples([file])
    else:
        assert read_examples([file]) == [item for _line, item in items if isinstance(item, Example)]


some_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50).filter(str.strip)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=some_text, answer=some_text, ascii_only=st.booleans())
def test_texts_are_read_as_they_are(tmp_path: Path, question: str, answer: str, ascii_only: bool) -> None:
    """Whatever characters a text has, it arrives unchanged, written out or escaped."""
    line = json.dumps({"prompt": question, "completion": answer}, ensure_ascii=ascii_only)
    file = write(tmp_path, line.encode())
    assert turns_of(file) == [(("user", question), ("assistant", answer))]


def test_blank_lines_and_other_line_ends_are_passed_over(tmp_path: Path) -> None:
    """CRLF, blank lines and a missing last line end change nothing but the line numbers."""
    file = write(tmp_path, GOOD + b"\r\n\r\n   \n" + GOOD, end=b"")
    examples = read_examples([file])
    assert [example.source.rpartition(":")[2] for example in examples] == ["1", "4"]
    assert examples[0].turns == (Turn("user", "P"), Turn("assistant", "R"))


def test_an_empty_file_has_no_examples(tmp_path: Path) -> None:
    """No row, no example, no error: whether there is enough to train on is not the reader's to say."""
    file = write(tmp_path)
    assert read_examples([file]) == []
    assert file_format(file) is None


@pytest.mark.parametrize("lines", [(b"\xef\xbb\xbf" + GOOD, GOOD), (GOOD, b"\xef\xbb\xbf" + GOOD)])
def test_a_byte_order_mark_is_a_warning(tmp_path: Path, lines: tuple[bytes, bytes]) -> None:
    """At the file's start, or where two files were joined: training reads on, ``check`` tells."""
    file = write(tmp_path, *lines)
    assert len(read_examples([file])) == 2
    (problem,) = problems_of(file)
    assert (problem.code, problem.is_error) == (Code.BOM, False)
    assert problem.line == lines.index(b"\xef\xbb\xbf" + GOOD) + 1


def test_a_lone_byte_order_mark_is_no_row(tmp_path: Path) -> None:
    """An empty file as some editors save it is still empty."""
    file = write(tmp_path, b"\xef\xbb\xbf", end=b"")
    assert [problem.code for problem in problems_of(file)] == [Code.BOM]
    assert read_examples([file]) == []


def test_the_format_is_that_of_the_first_usable_row(tmp_path: Path) -> None:
    """Broken and half rows at the start do not decide the format; they are held to it as the others are."""
    file = write(tmp_path, b"{", b'{"instruction": "P", "output": null}', b'{"prompt": "P", "completion": "R"}')
    assert file_format(file) == RowFormat.PROMPT
    assert [(problem.line, problem.code) for problem in problems_of(file)] == [(1, Code.INVALID_JSON), (2, Code.FIELDS)]


def test_rows_of_no_format_say_what_formats_there_are(tmp_path: Path) -> None:
    """The problem shows the fields that were found and the formats that would do."""
    (problem,) = problems_of(write_rows(tmp_path, {"question": "P", "answer": "R"}))
    assert "question, answer" in problem.found
    assert all(row_format in problem.expected for row_format in RowFormat)
    assert "--map" in problem.mend


def test_strict_reading_lists_the_first_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names file:line of the first five, how many more there are, and the command that shows all."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, GOOD, *[b"{"] * 8)
    with pytest.raises(DataError) as caught:
        read_examples([file])
    place = Path("physics") / "training" / "data" / "train.jsonl"
    assert [f"{place}:{line}:" in caught.value.message for line in range(1, 10)] == [
        *(False, True, True, True, True, True, False, False, False)
    ]
    assert "3 más" in caught.value.message
    assert "sheily branches check physics" in caught.value.mend
    assert caught.value.exit_code == 3


def test_files_outside_a_branch_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad file that lies in no branch folder still gets a whole message."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:1:") as caught:
        read_examples([Path("a.jsonl")])
    assert caught.value.mend.endswith("sheily branches check NOMBRE")


def test_several_files_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may differ in format; examples follow the order given and name their source."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "T"}')
    examples = read_examples([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])
    assert [(example.source, example.format) for example in examples] == [
        ("b.jsonl:1", RowFormat.TEXT),
        ("a.jsonl:1", RowFormat.INSTRUCTION),
    ]


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    """What the system refuses becomes one line that names the file."""
    with pytest.raises(DataError, match="No se puede leer"):
        read_examples([tmp_path])


def test_excerpts_are_short_and_safe_for_the_terminal() -> None:
    """Escape sequences and line ends never reach the terminal, and nothing is longer than asked."""
    assert excerpt("\x1b[31mrojo\x1b[0m\r\nfin") == "[31mrojo [0m fin"
    assert excerpt("x" * 1000, 10) == "xxxxxxxxx…"
    assert excerpt(None) == "null"
    assert len(excerpt([["x" * 100] * 100] * 100)) <= 60
    deep: list[Any] = []
    for _level in range(100_000):
        deep = [deep]
    assert len(excerpt(deep)) <= 60
