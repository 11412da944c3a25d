"""Bring rows from elsewhere into a branch: JSONL, CSV, Parquet or a Hugging Face dataset.

Everything is read and validated before anything is written; of a row only the fields of its format are kept.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sheily_train import durable
from sheily_train.core.branches.catalog import branch_folder, check_name, shown_path, unreadable
from sheily_train.core.branches.checks import question_and_answer
from sheily_train.core.branches.examples import (
    BadRow,
    Code,
    Example,
    Problem,
    Row,
    RowFormat,
    excerpt,
    first_format,
    parse_row,
    read_rows,
    refuse_errors,
)
from sheily_train.errors import DataError, MissingExtraError, RequestError, ResourceError
from sheily_train.i18n import _, ngettext
from sheily_train.paths import EVALUATION_DATA, ROWS_SUFFIX, TRAINING_DATA

FIELDS = tuple(field for row_format in RowFormat for field in row_format.split("/"))

NumberedRows = Iterator[tuple[int, Row | Problem]]


@dataclass(frozen=True)
class ImportRequest:
    """What to import, and where to.

    ``sources`` are files or dataset ids; ``mapping`` gives, for each field of a row, the source's column (empty: the
    columns already have the fields' names). Rows go to training, or with ``evaluation`` to the evaluation; ``held_out``
    percent of them (0 to 100) go to the evaluation and the rest to training. ``split`` and ``subset`` are a dataset's.
    """

    branches_dir: Path
    branch: str
    sources: tuple[str, ...]
    mapping: Mapping[str, str]
    evaluation: bool = False
    held_out: float = 0.0
    split: str = "train"
    subset: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Imported:
    """A file that was written, and what it holds."""

    file: Path
    rows: int
    format: RowFormat
    unused_columns: tuple[str, ...]


def import_rows(request: ImportRequest) -> list[Imported]:
    """Write one file of rows per source (two with ``held_out``), all or, when anything is wrong with any, none.

    Raises RequestError for names, mappings and existing files, DataError with file:line for bad rows, MissingExtraError
    for a dataset without the ``datasets`` package.
    """
    check_name(request.branch)
    _check_mapping(request.mapping)
    _check_targets(request)
    contents: list[tuple[Imported, bytes]] = []
    for source in request.sources:
        contents += _convert(request, source)
    for imported, content in contents:
        try:
            durable.write_bytes(imported.file, content)
        except OSError as error:
            raise ResourceError(
                _("No se puede escribir {file}: {error}.").format(file=shown_path(imported.file), error=error.strerror),
                mend=_("Comprueba el espacio y los permisos; lo que había antes sigue intacto."),
            ) from error
    return [imported for imported, _content in contents]


def _check_mapping(mapping: Mapping[str, str]) -> None:
    unknown = [field for field in mapping if field not in FIELDS]
    if unknown:
        raise RequestError(
            _("«{field}» no es un campo de ningún formato.").format(field=unknown[0]),
            mend=_("Los campos son: {fields}. En --map van a la izquierda del «=».").format(fields=", ".join(FIELDS)),
        )
    if mapping and first_format([mapping]) is None:
        raise RequestError(
            _("Con {fields} no se completa ningún formato.").format(fields=", ".join(mapping)),
            mend=_("Formatos: {formats}.").format(formats=", ".join(RowFormat)),
        )


def _check_targets(request: ImportRequest) -> None:
    """Refuse two sources that would be written to the same file, and to write over files without ``force``.

    Nor are training rows replaced without the held-out ones of the same name, which would judge others.
    """
    targets = [target for source in request.sources for target in _targets(request, source)]
    for target in targets:
        if targets.count(target) > 1:
            raise RequestError(
                _("Dos de los archivos se llamarían {file}.").format(file=shown_path(target)),
                mend=_("Cambia el nombre de uno, o impórtalos por separado."),
            )
        if target.exists() and not request.force:
            raise RequestError(
                _("Ya existe {file}.").format(file=shown_path(target)), mend=_("Usa --force para reemplazarlo.")
            )
        judging = target.parents[2] / EVALUATION_DATA / target.name
        if target.exists() and judging.exists() and judging not in targets:
            raise RequestError(
                _("{file} juzga a las filas que se reemplazan, y juzgaría a las nuevas.").format(
                    file=shown_path(judging)
                ),
                mend=_("Repite con --held-out para reemplazarlo también, o bórralo antes."),
            )


def _targets(request: ImportRequest, source: str) -> list[Path]:
    """The files a source is written to: the one for its rows, and with ``held_out`` the one for the evaluation."""
    path = Path(source)
    stem = path.resolve().stem if path.exists() else source
    name = (re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "rows") + ROWS_SUFFIX
    folder = branch_folder(request.branches_dir, request.branch)
    training, evaluation = folder / TRAINING_DATA / name, folder / EVALUATION_DATA / name
    if request.held_out:
        return [training, evaluation]
    return [evaluation if request.evaluation else training]


def _convert(request: ImportRequest, source: str) -> list[tuple[Imported, bytes]]:
    """A source's rows, validated, as the content of each of its targets."""
    rows, problems, columns = _read_source(request, source)
    row_format = first_format(row for _number, row in rows)
    examples: list[tuple[Row, Example]] = []
    if rows and row_format is None:
        raise _unknown_columns(source, columns)
    for number, row in rows:
        try:
            examples.append((row, parse_row(row, row_format, f"{source}:{number}")))
        except BadRow as bad:
            problems.append(bad.at(Path(source), number))
    refuse_errors(problems, _("No se ha importado nada: corrige el origen y repite."))
    if row_format is None:
        raise DataError(_("{source} no tiene ninguna fila.").format(source=source))

    parts = _divide(examples, request.held_out) if request.held_out else [examples]
    used = request.mapping.values() or row_format.split("/")
    unused = tuple(column for column in columns if column not in used)
    return [
        (Imported(target, len(part), row_format, unused), b"".join(_json_line(*pair) for pair in part))
        for target, part in zip(_targets(request, source), parts, strict=True)
    ]


def _read_source(request: ImportRequest, source: str) -> tuple[list[tuple[int, Row]], list[Problem], list[str]]:
    """The source's rows with their fields named as asked, the problems met in reading, and the names of its columns."""
    rows: list[tuple[int, Row]] = []
    problems: list[Problem] = []
    columns: dict[str, None] = {}
    try:
        for number, row in _open(request, source):
            if isinstance(row, Problem):
                problems.append(row)
                continue
            columns.update(dict.fromkeys(row))
            rows.append((number, {field: row.get(column) for field, column in request.mapping.items()} or row))
    except OSError as error:
        raise unreadable(Path(source), error) from error
    missing = [column for column in request.mapping.values() if rows and column not in columns]
    if missing:
        raise RequestError(
            _("{source} no tiene la columna «{column}».").format(source=source, column=missing[0]),
            mend=_("Sus columnas: {columns}.").format(columns=_list(columns)),
        )
    return rows, problems, list(columns)


def _open(request: ImportRequest, source: str) -> NumberedRows:
    path = Path(source)
    if path.suffix.lower() in _READERS:
        if not path.is_file():
            raise RequestError(_("No existe el archivo {file}.").format(file=source))
        return _READERS[path.suffix.lower()](path)
    if path.is_file():
        raise RequestError(
            _("No sé leer {file}.").format(file=source),
            mend=_("Formatos: {suffixes}, o un conjunto de Hugging Face.").format(suffixes=_list(_READERS)),
        )
    return _dataset_rows(source, request.subset, request.split)


def _csv_rows(path: Path) -> NumberedRows:
    """Rows of a CSV whose separator is the one its first line has most of: comma, semicolon, tab or bar."""
    text, problem = _decode(path)
    if problem:
        yield problem.line, problem
        return
    separator = max(",;\t|", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        columns = [column.strip() for column in next(reader, [])]
        if len(set(columns)) < len(columns):
            found = _("columnas: {columns}").format(columns=_list(columns))
            yield 1, Problem(Code.FIELDS, path, 1, found, _("nombres distintos"), _("Renombra las repetidas."))
            return
        line = reader.line_num + 1
        for values in reader:
            if len(values) == len(columns):
                yield line, dict(zip(columns, values, strict=True))
            elif values:
                found = ngettext("{count} valor", "{count} valores", len(values)).format(count=len(values))
                expected = _("{count}, como columnas").format(count=len(columns))
                mend = _("Pon entre comillas los textos que llevan «{separator}».").format(separator=separator)
                yield line, Problem(Code.FIELDS, path, line, found, expected, mend)
            line = reader.line_num + 1
    except csv.Error as error:
        mend = _('Revisa las comillas de la fila: dentro de un texto se escriben dobles («""»).')
        yield line, Problem(Code.FIELDS, path, line, str(error), _("CSV bien formado"), mend)


def _decode(path: Path) -> tuple[str, Problem | None]:
    """The text of a file in UTF-8, or in UTF-16 if it starts so (spreadsheets call that "Unicode text")."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding), None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = _("el byte 0x{byte:02x}").format(byte=error.object[error.start])
        return "", Problem(Code.ENCODING, path, line, found, _("texto UTF-8"), _("Guarda el archivo como «CSV UTF-8»."))


def _parquet_rows(path: Path) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise DataError(
            _("{file} no es un archivo Parquet sano ({error}).").format(file=path, error=excerpt(str(error), 200)),
            mend=_("Vuelve a descargarlo o a exportarlo."),
        ) from error


def _dataset_rows(name: str, subset: str | None, split: str) -> NumberedRows:
    """Rows of a dataset of the hub, or of a folder laid out as one."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("datasets", "hub", _("importar conjuntos de Hugging Face")) from None
    try:
        dataset = load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises OSError, ValueError, RuntimeError and families of its own
        raise RequestError(
            _("No se puede cargar «{name}» ({error}).").format(name=name, error=excerpt(str(error), 300)),
            mend=_("Si es un archivo, revisa su ruta; si es un conjunto, su nombre, --subset, --split y la conexión."),
        ) from error
    yield from enumerate(dataset, 1)


_READERS: Mapping[str, Callable[[Path], NumberedRows]] = {
    ROWS_SUFFIX: read_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _unknown_columns(source: str, columns: Sequence[str]) -> RequestError:
    question, answer = columns[:2] if len(columns) > 1 else (_("pregunta"), _("respuesta"))
    return RequestError(
        _("Las columnas de {source} no son las de ningún formato: {columns}.").format(
            source=source, columns=_list(columns)
        ),
        mend=_("Di cuáles son, por ejemplo: --map 'instruction={question},output={answer}'").format(
            question=excerpt(question), answer=excerpt(answer)
        ),
    )


def _divide(examples: list[tuple[Row, Example]], percent: float) -> list[list[tuple[Row, Example]]]:
    """Training rows and held-out ones, chosen by the hash of their text: the same at every import, copies together."""
    hashes = [hashlib.sha256("\n".join(question_and_answer(example)).encode()).digest() for _row, example in examples]
    last = sorted(hashes)[max(1, round(len(hashes) * percent / 100)) - 1]
    training, held_out = (
        [pair for pair, digest in zip(examples, hashes, strict=True) if (digest <= last) is chosen]
        for chosen in (False, True)
    )
    if not training:
        raise RequestError(
            _("Con {percent:g} % reservado no queda ninguna fila para entrenar.").format(percent=percent),
            mend=_("Baja --held-out o importa más filas."),
        )
    return [training, held_out]


def _json_line(row: Row, example: Example) -> bytes:
    kept: Row
    match example.format:
        case RowFormat.MESSAGES:
            kept = {"messages": [{"role": turn.role, "content": turn.content} for turn in example.turns]}
        case RowFormat.CONVERSATIONS:
            kept = {"conversations": [{"from": turn.role, "value": turn.content} for turn in example.turns]}
        case _:
            kept = {field: row[field] for field in example.format.split("/") if row.get(field)}
    return (json.dumps(kept, ensure_ascii=False) + "\n").encode()


def _list(names: Iterable[str]) -> str:
    return excerpt(", ".join(names), 300)
