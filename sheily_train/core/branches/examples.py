"""Rows and what they say: one JSON object a line, in any of five formats, read into the turns of a conversation.

Everything that can be wrong with a row is found here, once, as a :class:`Problem`: training refuses the branch
(:func:`read_examples`), ``check`` lists them (:func:`read_file`), ``import`` writes nothing (:func:`parse_row`).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from sheily_train.core.branches.catalog import BYTE_ORDER_MARK, shown_path, unreadable
from sheily_train.errors import DataError
from sheily_train.i18n import _

Row = Mapping[str, object]


class RowFormat(StrEnum):
    """The formats of a row, by the names of their fields."""

    INSTRUCTION = "instruction/input/output"
    PROMPT = "prompt/completion"
    MESSAGES = "messages"
    CONVERSATIONS = "conversations"
    TEXT = "text"


# A row is of the first format whose fields it has: Alpaca's rows, for one, repeat their instruction in a "text".
REQUIRED_FIELDS: Mapping[RowFormat, tuple[str, ...]] = {
    RowFormat.MESSAGES: ("messages",),
    RowFormat.CONVERSATIONS: ("conversations",),
    RowFormat.INSTRUCTION: ("instruction", "output"),
    RowFormat.PROMPT: ("prompt", "completion"),
    RowFormat.TEXT: ("text",),
}

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

_RENAME = _("Renombra sus campos; «sheily branches import --map» lo hace por ti.")
_REPAIR_LINE = _("Corrige o borra la línea.")


@dataclass(frozen=True)
class Turn:
    """What one side says; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A row that can be learned from: its turns end with the assistant's; ``source`` is "path:line"."""

    format: RowFormat
    turns: tuple[Turn, ...]
    source: str


class Code(StrEnum):
    """The kinds of problem, by names that scripts may rely on."""

    ENCODING = "encoding"
    INVALID_JSON = "invalid-json"
    FIELDS = "fields"
    NOT_TEXT = "not-text"
    EMPTY = "empty"
    TURNS = "turns"
    NO_ROWS = "no-rows"
    BOM = "bom"
    EMPTY_FILE = "empty-file"
    TOO_LONG = "too-long"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"
    LEAK = "leak"
    SHARED = "shared"
    STRAY = "stray"
    DESCRIPTION = "description"


_ERRORS = frozenset(
    {Code.ENCODING, Code.INVALID_JSON, Code.FIELDS, Code.NOT_TEXT, Code.EMPTY, Code.TURNS, Code.NO_ROWS}
)


@dataclass(frozen=True)
class Problem:
    """Something wrong with a branch: where, what was found, what was expected, how to mend it (whole sentence).

    ``line`` counts from 1; 0 means the file or folder as a whole.
    """

    code: Code
    file: Path
    line: int
    found: str
    expected: str
    mend: str

    @property
    def is_error(self) -> bool:
        """Whether it stops training; the others are warnings."""
        return self.code in _ERRORS

    @property
    def place(self) -> str:
        """``path:line``, or the path alone."""
        return f"{shown_path(self.file)}:{self.line}" if self.line else shown_path(self.file)

    def __str__(self) -> str:
        return _("{found} (se esperaba: {expected}). {mend}").format(
            found=self.found, expected=self.expected, mend=self.mend
        )


class BadRow(Exception):
    """A row that cannot be used: a problem that does not know its place yet."""

    def __init__(self, code: Code, found: str, expected: str, mend: str) -> None:
        super().__init__(found)
        self.code, self.found, self.expected, self.mend = code, found, expected, mend

    def at(self, file: Path, line: int) -> Problem:
        """The problem, placed."""
        return Problem(self.code, file, line, self.found, self.expected, self.mend)


def read_examples(files: Iterable[Path]) -> list[Example]:
    """All examples of the files, in order; an empty list when they hold no row.

    Raises DataError, with the first problems as file:line, when a single row is bad. Byte-order marks are passed over.
    """
    items = [item for file in files for _line, item in read_file(file)]
    problems = [item for item in items if isinstance(item, Problem)]
    if problems:
        data = problems[0].file.parent
        branch = (data.name == "data" and data.parent.parent.name) or _("NOMBRE")
        mend = _("Corrígelas o bórralas; para verlas todas: sheily branches check {branch}").format(branch=branch)
        refuse_errors(problems, mend)
    return [item for item in items if isinstance(item, Example)]


def refuse_errors(problems: Sequence[Problem], mend: str, shown: int = 5) -> None:
    """Raise DataError, listing the first few, when there are errors among the problems."""
    errors = [problem for problem in problems if problem.is_error]
    if not errors:
        return
    lines = [_("Filas que no se pueden usar: {count}.").format(count=len(errors))]
    lines += [f"  {error.place}: {error}" for error in errors[:shown]]
    if len(errors) > shown:
        lines.append("  " + _("… y {count} más.").format(count=len(errors) - shown))
    raise DataError("\n".join(lines) + "\n", mend=mend)


def read_file(file: Path) -> Iterator[tuple[int, Example | Problem]]:
    """Line number and example, or problem, of every row of a file; each row is held to the file's format."""
    row_format, shown = file_format(file), shown_path(file)
    for line, row in read_rows(file):
        if isinstance(row, Problem):
            yield line, row
            continue
        try:
            yield line, parse_row(row, row_format, f"{shown}:{line}")
        except BadRow as bad:
            yield line, bad.at(file, line)


def file_format(file: Path) -> RowFormat | None:
    """The format of a file's first usable row; None when it has none. Reads no further than that row."""
    rows = (row for _line, row in read_rows(file) if not isinstance(row, Problem))
    return first_format(rows)


def first_format(rows: Iterable[Row]) -> RowFormat | None:
    """The format of the first row that has all fields of one."""
    for row in rows:
        for row_format, fields in REQUIRED_FIELDS.items():
            if all(row.get(field) is not None for field in fields):
                return row_format
    return None


def read_rows(file: Path) -> Iterator[tuple[int, Row | Problem]]:
    """Line number and JSON object, or problem, of every line that is not blank.

    A byte-order mark at the start of a line (files joined with ``cat`` have one in their middle) is a problem of its
    own, followed by the row. Raises DataError when the file cannot be read.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.startswith(BYTE_ORDER_MARK):
                    line = line.removeprefix(BYTE_ORDER_MARK)
                    yield number, _byte_order_mark(file, number)
                if not line.strip():
                    continue
                try:
                    yield number, _parse_line(line)
                except BadRow as bad:
                    yield number, bad.at(file, number)
    except OSError as error:
        raise unreadable(file, error) from error


def parse_row(row: Row, row_format: RowFormat | None, source: str) -> Example:
    """The example a row holds; BadRow when it has none. Fields beyond the format's own are allowed and ignored."""
    if row_format is None:
        formats = ", ".join(RowFormat)
        raise BadRow(Code.FIELDS, _fields_of(row), _("uno de los formatos {formats}").format(formats=formats), _RENAME)
    return Example(row_format, _turns(row, row_format), source)


def excerpt(value: object, length: int = 60) -> str:
    """A value as messages show it: on one line, safe for the terminal, cut."""
    text = "null" if value is None else value if isinstance(value, str) else reprlib.repr(value)
    text = "".join(character if character.isprintable() else " " for character in text[: 4 * length])
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _byte_order_mark(file: Path, line: int) -> Problem:
    found, mend = _("una marca de orden de bytes (BOM)"), _("Guarda el archivo como «UTF-8 sin BOM».")
    return Problem(Code.BOM, file, line, found, _("UTF-8 sin BOM"), mend)


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _value in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(_("la clave «{key}» está repetida").format(key=excerpt(repeated)))
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(_("{name} no existe en JSON").format(name=name))


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of, parse_constant=_refuse_constant)


def _parse_line(line: bytes) -> Row:
    """The JSON object of a line; BadRow when it holds anything else."""
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        found = _("el byte 0x{byte:02x} en la posición {position}").format(
            byte=line[error.start], position=error.start + 1
        )
        raise BadRow(Code.ENCODING, found, _("texto UTF-8"), _("Guarda el archivo como UTF-8.")) from None
    except RecursionError:
        found = _("demasiados niveles anidados")
        raise BadRow(Code.INVALID_JSON, found, _("una fila de texto"), _REPAIR_LINE) from None
    except ValueError as error:
        found = _("JSON no válido ({error})").format(error=excerpt(str(error), 90))
        raise BadRow(Code.INVALID_JSON, found, _("un objeto JSON en una sola línea"), _REPAIR_LINE) from None
    if not isinstance(value, dict):
        found = _("el valor {value}").format(value=excerpt(value))
        raise BadRow(Code.INVALID_JSON, found, _("un objeto JSON ({…}) por línea"), _REPAIR_LINE)
    return value


def _turns(row: Row, row_format: RowFormat) -> tuple[Turn, ...]:
    match row_format:
        case RowFormat.INSTRUCTION:
            question = _text(row, "instruction")
            if not _is_blank(row.get("input")):
                question += "\n\n" + _text(row, "input")
            return Turn("user", question), Turn("assistant", _text(row, "output"))
        case RowFormat.PROMPT:
            return Turn("user", _text(row, "prompt")), Turn("assistant", _text(row, "completion"))
        case RowFormat.TEXT:
            return (Turn("assistant", _text(row, "text")),)
        case RowFormat.MESSAGES:
            return _conversation(row, "messages", "role", "content")
        case RowFormat.CONVERSATIONS:
            return _conversation(row, "conversations", "from", "value")


def _conversation(row: Row, field: str, role_field: str, content_field: str) -> tuple[Turn, ...]:
    items = row.get(field)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        found = _("«{field}»: {value}").format(field=field, value=excerpt(items))
        expected = _("una lista de objetos con «{role}» y «{content}»").format(role=role_field, content=content_field)
        raise BadRow(Code.TURNS, found, expected, _REPAIR_LINE)
    turns = tuple(turn for item in items if (turn := _turn(item, role_field, content_field)))
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow(
            Code.TURNS,
            _("turnos: {roles}").format(roles=excerpt(", ".join(roles)) or _("ninguno")),
            _("«system» si acaso, y luego «user» y «assistant» alternos hasta un último «assistant»"),
            _("Une, quita o reordena sus turnos."),
        )
    return turns


def _turn(item: Row, role_field: str, content_field: str) -> Turn | None:
    """One turn; None for an empty system prompt, which is as good as none."""
    name = _text(item, role_field)
    if name not in _ROLES:
        found = _("el papel «{role}»").format(role=excerpt(name))
        raise BadRow(Code.TURNS, found, _("uno de {roles}").format(roles=", ".join(_ROLES)), _REPAIR_LINE)
    role = _ROLES[name]
    if role == "system" and _is_blank(item.get(content_field)):
        return None
    return Turn(role, _text(item, content_field))


def _text(fields: Row, name: str) -> str:
    """A field's text; BadRow when it is absent, not a text, blank, or cannot be written as UTF-8."""
    if name not in fields:
        raise BadRow(Code.FIELDS, _fields_of(fields), _("el campo «{name}»").format(name=name), _RENAME)
    value = fields[name]
    if not isinstance(value, str):
        found = _("«{name}»: {value}").format(name=name, value=excerpt(value))
        raise BadRow(Code.NOT_TEXT, found, _("un texto entre comillas"), _REPAIR_LINE)
    if not value.strip():
        found = _("«{name}» vacío").format(name=name)
        raise BadRow(Code.EMPTY, found, _("un texto"), _("Complétalo o borra la línea."))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = _("«{name}»: medio carácter \\u{code:04x}").format(name=name, code=ord(value[error.start]))
        raise BadRow(Code.ENCODING, found, _("caracteres completos"), _REPAIR_LINE) from None
    return value


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _fields_of(row: Row) -> str:
    return _("campos: {fields}").format(fields=excerpt(", ".join(row)) or _("ninguno"))
