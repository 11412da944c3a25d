"""Vectors of a person's own: a .npy, .npz, CSV or Parquet file, as a batch.

A file holds vectors (one row = 1,600 numbers) or one long series (one column or one row), which is cut into windows.
"""

from __future__ import annotations

import csv
import itertools
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheily_train.colab.batches import MAX_MAGNITUDE, NO_LABEL, VECTOR, Batch
from sheily_train.core.branches.catalog import shown_path, unreadable
from sheily_train.core.branches.examples import excerpt
from sheily_train.errors import DataError, RequestError, ResourceError
from sheily_train.i18n import _, _n

DATA_NAMES = ("input_data", "X", "data", "arr_0")
LABEL_COLUMNS = ("anomaly_label", "label", "etiqueta", "anomaly")
LABEL_ARRAYS = ("anomaly_label", "y", "labels")

_CHECKED_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 4096
_LABEL_WORDS = {"": float(NO_LABEL), "true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class _Table:
    """What a file holds: numbers [R, C], labels [R] (floats, NaN or −1 where unknown) and the name of each row."""

    values: NDArray[Any]
    labels: NDArray[Any] | None
    place: Callable[[int], str]


def read_vectors(path: Path, *, stride: int = VECTOR, label_column: str | None = None) -> Batch:
    """The vectors of a file.

    ``.npy`` holds numbers [N, 1600], or a series [L], [L, 1] or [1, L]; it is mapped, not loaded: with float32 and
    whole windows nothing is copied, however large. ``.npz`` holds the same under ``input_data``, ``X``, ``data`` or
    ``arr_0`` (no pickles). CSV (commas, semicolons or tabs; a heading or none) and Parquet hold one vector a row, or
    a series in one column or one row. Labels, if any, stand in a column (an array of a ``.npz``) of their own: 1
    anomaly, 0 normal, −1 or nothing unknown.

    A series is cut into windows of 1,600; what is left at its end is not used. A window is anomalous if one of its
    points is, and unknown if none is but one is unknown. The label of a series in one row is that of all its windows.

    Args:
        path: the file.
        stride: samples from one window's beginning to the next; only for a series.
        label_column: where the labels stand, when it is not one of the usual (``LABEL_COLUMNS``, ``LABEL_ARRAYS``).

    Returns:
        float32 [N, 1600], labels int8 [N] (−1 where unknown); N may exceed what one request to a worker holds.

    Raises:
        DataError: the file, or what it holds, cannot be used; the message says where.
        RequestError: a stride below 1, a label column that the file does not have.
        ResourceError: it does not fit in memory.
    """
    if stride < 1:
        raise RequestError(_("El paso entre ventanas es {found}; se esperaba 1 o más.").format(found=stride))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            _("{file}: el tipo «{found}» no se sabe leer; se esperaba {known}.").format(
                file=shown_path(path), found=path.suffix, known=", ".join(_READERS)
            ),
            mend=_("Exporta los datos a uno de esos formatos."),
        )
    try:
        if path.stat().st_size == 0:
            raise _no_rows(path)
        return _batch(path, reader(path, label_column), stride)
    except OSError as error:
        raise unreadable(path, error) from error
    except MemoryError as error:
        raise ResourceError(
            _("{file} no cabe en la memoria.").format(file=shown_path(path)),
            mend=_("Guárdalo como .npy de float32, que se lee del disco por partes, o deja más paso entre ventanas."),
        ) from error


# What the table says


def _batch(path: Path, table: _Table, stride: int) -> Batch:
    if table.values.size == 0:
        raise _no_rows(path)
    rows, width = table.values.shape
    if width != VECTOR and rows > 1 and width > 1:
        raise DataError(
            _("{place}: se esperaban {expected} números, hay {found}.").format(
                place=table.place(0), expected=VECTOR, found=width
            ),
            mend=_(
                "Una fila es un vector de {expected} números, más la columna de etiquetas si la hay ({names}, o la que "
                "se indique); una serie larga va en una sola columna."
            ).format(expected=VECTOR, names=", ".join(LABEL_COLUMNS)),
        )
    values = np.ascontiguousarray(table.values)
    _check_numbers(values, table.place)
    labels = _labels(table)
    with np.errstate(over="ignore"):
        if width == VECTOR:
            return Batch(np.asarray(values, np.float32), labels)
        return _windows(path, values.reshape(-1), labels, stride)


def _windows(path: Path, series: NDArray[Any], labels: NDArray[np.int8], stride: int) -> Batch:
    """The series [L] cut, its labels [L], or [1] for all of it."""
    if len(series) < VECTOR:
        raise DataError(
            _n(
                "{file}: la serie tiene {found} número; se esperaban al menos {expected}.",
                "{file}: la serie tiene {found} números; se esperaban al menos {expected}.",
                len(series),
            ).format(file=shown_path(path), found=len(series), expected=VECTOR),
            mend=_("Una ventana son {expected} números seguidos: junta más datos.").format(expected=VECTOR),
        )
    starts = np.arange(0, len(series) - VECTOR + 1, stride)
    if stride == VECTOR:
        cut = series[: len(starts) * VECTOR].reshape(-1, VECTOR)
    else:
        cut = np.lib.stride_tricks.sliding_window_view(series, VECTOR)[::stride]
    if len(labels) == 1:
        window_labels = np.repeat(labels, len(starts))
    else:
        unknown = np.where(_any_within(labels == NO_LABEL, starts), NO_LABEL, 0)
        window_labels = np.where(_any_within(labels == 1, starts), 1, unknown).astype(np.int8)
    return Batch(np.ascontiguousarray(cut, np.float32), window_labels)


def _any_within(points: NDArray[np.bool_], starts: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether a point of each window is true."""
    before = np.concatenate([[0], np.cumsum(points)])
    within: NDArray[np.bool_] = before[starts + VECTOR] > before[starts]
    return within


def _check_numbers(values: NDArray[Any], place: Callable[[int], str]) -> None:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        with np.errstate(over="ignore", invalid="ignore"):
            part = flat[start : start + _CHECKED_AT_ONCE].astype(np.float32, copy=False)
            unusable = np.flatnonzero(~(np.abs(part) <= MAX_MAGNITUDE))
        if unusable.size:
            row, column = divmod(start + int(unusable[0]), values.shape[1])
            raise DataError(
                _("{place}, número {column}: hay {found}; se esperaba un número finito, de hasta {limit:g}.").format(
                    place=place(row), column=column + 1, found=values[row, column], limit=MAX_MAGNITUDE
                ),
                mend=_("Rellena o quita lo que falta, y revisa las unidades."),
            )


def _labels(table: _Table) -> NDArray[np.int8]:
    """Labels int8 [R], −1 where there are none."""
    if table.labels is None:
        return np.full(len(table.values), NO_LABEL, np.int8)
    labels = table.labels.astype(np.float64)
    labels[np.isnan(labels)] = NO_LABEL
    wrong = np.flatnonzero(~np.isin(labels, (0, 1, NO_LABEL)))
    if wrong.size:
        raise _bad_label(table.place(int(wrong[0])), f"{labels[wrong[0]]:g}")
    return labels.astype(np.int8)


# The formats


def _npy_table(path: Path, label_column: str | None) -> _Table:
    if label_column is not None:
        raise _no_label(path, label_column, ())
    try:
        values = np.asarray(np.lib.format.open_memmap(path, mode="c"))
    except ValueError as error:
        raise _damaged(path, "NumPy", error) from error
    return _array_table(path, values, None)


def _npz_table(path: Path, label_column: str | None) -> _Table:
    try:
        with zipfile.ZipFile(path):  # numpy would take anything else for a pickle, and say so
            pass
        with np.load(path, allow_pickle=False) as arrays:
            name = next((name for name in DATA_NAMES if name in arrays), None)
            if name is None:
                raise DataError(
                    _("{file}: hay {found}; se esperaba una matriz llamada {known}.").format(
                        file=shown_path(path), found=_listed(list(arrays)), known=", ".join(DATA_NAMES)
                    ),
                    mend=_("Guárdalo con numpy.savez(archivo, input_data=…, anomaly_label=…)."),
                )
            label_name = _label_name(path, list(arrays), label_column, LABEL_ARRAYS)
            return _array_table(path, arrays[name], None if label_name is None else arrays[label_name])
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, "NumPy", error) from error


def _array_table(path: Path, values: NDArray[Any], labels: NDArray[Any] | None) -> _Table:
    for found, kinds in ((values, "fiu"), (labels, "fiub")):
        if found is not None and found.dtype.kind not in kinds:
            raise _not_numbers(shown_path(path), str(found.dtype))
    table = values.reshape(-1, 1) if values.ndim == 1 and len(values) != VECTOR else np.atleast_2d(values)
    if table.ndim != 2:
        raise DataError(
            _("{file}: la forma es {found}; se esperaba [N, {expected}] o una serie [L].").format(
                file=shown_path(path), found=list(values.shape), expected=VECTOR
            ),
            mend=_("Conviértela con .reshape(-1, {expected}).").format(expected=VECTOR),
        )
    if labels is not None:
        if len(table) == 1 and labels.size == table.size:
            table = table.reshape(-1, 1)  # a series in a row, with a label for each of its points
        if labels.shape not in {(len(table),), (len(table), 1), (1, len(table))}:
            raise DataError(
                _("{file}: etiquetas: {found}; filas: {expected}.").format(
                    file=shown_path(path), found=labels.size, expected=len(table)
                ),
                mend=_("Pon una etiqueta por vector, o por punto de la serie."),
            )
        labels = labels.reshape(-1)
    return _Table(table, labels, _row_of(path))


def _parquet_table(path: Path, label_column: str | None) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            label_name = _label_name(path, names, label_column, LABEL_COLUMNS)
            columns = [index for index, name in enumerate(names) if name != label_name]
            _check_columns(path, file.schema_arrow, columns)
            values = np.empty((file.metadata.num_rows, len(columns)), np.float32)
            labels = None if label_name is None else np.empty(len(values))
            start = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                part = slice(start, start + batch.num_rows)
                with np.errstate(over="ignore"):
                    for position, index in enumerate(columns):
                        values[part, position] = batch.column(index).to_numpy(zero_copy_only=False)
                if labels is not None:
                    numbers = batch.column(names.index(label_name)).cast(pyarrow.float64(), safe=False)
                    labels[part] = numbers.to_numpy(zero_copy_only=False)
                start += batch.num_rows
    except pyarrow.ArrowException as error:
        raise _damaged(path, "Parquet", error) from error
    return _Table(values, labels, _row_of(path))


def _check_columns(path: Path, schema: Any, columns: Sequence[int]) -> None:
    from pyarrow import types

    kinds = schema.types  # a list made anew each time it is asked for
    for index in columns:
        if not types.is_integer(kinds[index]) and not types.is_floating(kinds[index]):
            place = _("{file}, columna «{name}»").format(file=shown_path(path), name=schema.names[index])
            raise _not_numbers(place, str(kinds[index]))


def _csv_table(path: Path, label_column: str | None) -> _Table:
    numbers, labels, lines = array("d"), array("d"), array("q")
    rows = _csv_rows(path)
    first_row = next(rows, (0, []))
    first = first_row[1]
    heading = first if _is_heading(first) else []
    label_name = _label_name(path, heading, label_column, LABEL_COLUMNS)
    label_index = None if label_name is None else heading.index(label_name)
    for line, row in rows if heading else itertools.chain([first_row], rows):
        if len(row) != len(first):
            raise DataError(
                _n(
                    "{file}:{line}: hay {found} columna; las filas anteriores tienen {expected}.",
                    "{file}:{line}: hay {found} columnas; las filas anteriores tienen {expected}.",
                    len(row),
                ).format(file=shown_path(path), line=line, found=len(row), expected=len(first)),
                mend=_("Completa o quita esa fila."),
            )
        if label_index is not None:
            labels.append(_csv_label(path, line, row.pop(label_index)))
        numbers.extend(_csv_numbers(path, line, row))
        lines.append(line)
    return _Table(
        np.array(numbers).reshape(len(lines), -1) if numbers else np.empty((0, 1)),
        None if label_index is None else np.array(labels),
        lambda row: f"{shown_path(path)}:{lines[row]}",
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, its cells stripped, with the number of its (last) line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            sample = file.readline()
            file.seek(0)
            separator = next((mark for mark in "\t;" if mark in sample), ",")
            reader = csv.reader(file, delimiter=separator)
            for row in reader:
                cells = [cell.strip().replace(",", ".") for cell in row]  # 1,5 can stand between semicolons or tabs
                if cells:
                    yield reader.line_num, cells
        except (UnicodeDecodeError, csv.Error) as error:
            raise _damaged(path, "CSV", error) from error


def _is_heading(cells: Sequence[str]) -> bool:
    """Whether a first row names the columns: by texts, or by numbers counted from 0 as pandas writes them."""
    counted = [str(index) for index in range(len(cells))]
    texts = [_number(cell) is None for cell in cells]
    named = all(text or cell == count for text, cell, count in zip(texts, cells, counted, strict=True))
    return named and (any(texts) or len(cells) > 1)


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _csv_numbers(path: Path, line: int, cells: Iterable[str]) -> list[float]:
    numbers = []
    for column, cell in enumerate(cells, 1):
        number = _number(cell)
        if number is None:
            place = _("{file}:{line}, número {column}").format(file=shown_path(path), line=line, column=column)
            raise _not_numbers(place, excerpt(cell) or _("una celda vacía"))
        numbers.append(number)
    return numbers


def _csv_label(path: Path, line: int, cell: str) -> float:
    label = _LABEL_WORDS.get(cell.lower(), _number(cell))
    if label is None:
        raise _bad_label(f"{shown_path(path)}:{line}", excerpt(cell))
    return label


def _label_name(path: Path, names: Sequence[str], asked: str | None, usual: Sequence[str]) -> str | None:
    """The name among ``names`` under which the labels stand, if they do."""
    if asked is not None and asked not in names:
        raise _no_label(path, asked, names)
    return asked or next((name for name in usual if name in names), None)


def _row_of(path: Path) -> Callable[[int], str]:
    return lambda row: _("{file}, fila {row}").format(file=shown_path(path), row=row + 1)


# The errors


def _no_rows(path: Path) -> DataError:
    return DataError(
        _("{file} está vacío: no trae ningún número.").format(file=shown_path(path)),
        mend=_("Vuelve a exportarlo."),
    )


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(
        _("{file} no es un archivo {kind} sano ({error}).").format(
            file=shown_path(path), kind=kind, error=excerpt(str(error), 200)
        ),
        mend=_("Vuelve a descargarlo o a exportarlo."),
    )


def _not_numbers(place: str, found: str) -> DataError:
    return DataError(
        _("{place}: hay «{found}»; se esperaban números.").format(place=place, found=found),
        mend=_("Deja solo columnas de números, más la de etiquetas si la hay."),
    )


def _bad_label(place: str, found: str) -> DataError:
    return DataError(
        _("{place}: la etiqueta es «{found}»; se esperaba 0 (normal), 1 (anomalía) o nada.").format(
            place=place, found=found
        ),
        mend=_("Corrígela, o déjala vacía si no se sabe."),
    )


def _no_label(path: Path, asked: str, names: Sequence[str]) -> RequestError:
    return RequestError(
        _("{file} no tiene etiquetas con el nombre «{asked}»; tiene {found}.").format(
            file=shown_path(path), asked=asked, found=_listed(names)
        )
    )


def _listed(names: Sequence[str]) -> str:
    """The first few names."""
    shown = ", ".join(f"«{name}»" for name in names[:8])
    return shown + (", …" if len(names) > 8 else "") if names else _("ningún nombre")


_READERS: dict[str, Callable[[Path, str | None], _Table]] = {
    ".npy": _npy_table,
    ".npz": _npz_table,
    ".csv": _csv_table,
    ".parquet": _parquet_table,
}
