from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sheily_train.colab.batches import NO_LABEL, VECTOR, Batch
from sheily_train.core.omega.vectors import read_vectors
from sheily_train.errors import DataError, RequestError, SheilyError

VECTORS = np.random.default_rng(1).standard_normal((3, VECTOR)).astype(np.float32)
LABELS = np.array([0, 1, NO_LABEL], np.int8)
SERIES = np.arange(4000, dtype=np.float32) / 8
POINTS = np.zeros(4000, np.int8)
POINTS[1700] = 1
POINTS[3300] = NO_LABEL

Writer = Callable[[Path, NDArray[Any], NDArray[Any] | None], Path]


def npy(folder: Path, values: NDArray[Any], labels: NDArray[Any] | None) -> Path:
    assert labels is None
    np.save(folder / "data.npy", values)
    return folder / "data.npy"


def npz(folder: Path, values: NDArray[Any], labels: NDArray[Any] | None) -> Path:
    arrays = {"X": values} if labels is None else {"X": values, "y": labels}
    np.savez(folder / "data.npz", allow_pickle=True, **arrays)
    return folder / "data.npz"


def table(folder: Path, values: NDArray[Any], labels: NDArray[Any] | None, separator: str = ",") -> Path:
    """A CSV whose labels, if any, stand in the middle under «etiqueta», unknown ones empty."""
    values = values.reshape(-1, 1) if values.ndim == 1 else values
    middle = values.shape[1] // 2
    lines = []
    for number, row in enumerate(values):
        cells = [repr(float(value)) for value in row]
        if labels is not None:
            cells.insert(middle, "" if labels[number] == NO_LABEL else str(labels[number]))
        lines.append(separator.join(cells))
    if labels is not None:
        names = [f"x{column}" for column in range(values.shape[1])]
        lines.insert(0, separator.join([*names[:middle], "etiqueta", *names[middle:]]))
    return text(folder, "\n".join(lines) + "\n")


def parquet(folder: Path, values: NDArray[Any], labels: NDArray[Any] | None) -> Path:
    values = values.reshape(-1, 1) if values.ndim == 1 else values
    columns = {f"x{column}": pyarrow.array(values[:, column]) for column in range(values.shape[1])}
    if labels is not None:
        known = [None if label == NO_LABEL else bool(label) for label in labels]
        columns = {"anomaly_label": pyarrow.array(known, pyarrow.bool_()), **columns}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    return folder / "data.parquet"


def text(folder: Path, content: str | bytes, name: str = "data.csv") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def same(batch: Batch, values: NDArray[Any], labels: Sequence[int]) -> None:
    assert batch.input_data.dtype == np.float32
    assert batch.input_data.flags.c_contiguous
    assert np.array_equal(batch.input_data, values)
    assert batch.labels.dtype == np.int8
    assert batch.labels.tolist() == list(labels)


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
def test_vectors_of_each_format(tmp_path: Path, write: Writer) -> None:
    """One row is one vector, to the last bit; without labels each is unknown."""
    same(read_vectors(write(tmp_path, VECTORS, None)), VECTORS, [NO_LABEL] * 3)


@pytest.mark.parametrize("write", [npz, table, parquet])
def test_labels_beside_the_vectors(tmp_path: Path, write: Writer) -> None:
    """Labels are found by the usual names; nothing in their place means unknown."""
    same(read_vectors(write(tmp_path, VECTORS, LABELS)), VECTORS, [0, 1, NO_LABEL])


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
@pytest.mark.parametrize("stride", [VECTOR, 800, 2000])
def test_a_series_in_a_column_is_cut(tmp_path: Path, write: Writer, stride: int) -> None:
    """Windows begin ``stride`` apart; what is left at the end is not used."""
    starts = range(0, len(SERIES) - VECTOR + 1, stride)
    cut = np.stack([SERIES[start : start + VECTOR] for start in starts])
    same(read_vectors(write(tmp_path, SERIES, None), stride=stride), cut, [NO_LABEL] * len(starts))


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
def test_a_series_in_a_row_is_cut(tmp_path: Path, write: Writer) -> None:
    """One row longer than a vector is a series too."""
    batch = read_vectors(write(tmp_path, SERIES[None], None))
    same(batch, SERIES[:3200].reshape(2, VECTOR), [NO_LABEL] * 2)


@pytest.mark.parametrize("write", [npz, table, parquet])
def test_a_window_is_anomalous_if_a_point_is(tmp_path: Path, write: Writer) -> None:
    """Windows at 0, 800, 1600 and 2400: the anomaly at 1700 is in the 2nd and 3rd, the unknown at 3300 in the last."""
    batch = read_vectors(write(tmp_path, SERIES, POINTS), stride=800)
    assert batch.labels.tolist() == [0, 1, 1, NO_LABEL]


@pytest.mark.parametrize("write", [npz, table, parquet])
def test_the_label_of_a_row_is_that_of_its_windows(tmp_path: Path, write: Writer) -> None:
    """A series in one row has one label, for all its windows."""
    assert read_vectors(write(tmp_path, SERIES[None], np.array([1]))).labels.tolist() == [1, 1]


def test_a_row_with_a_label_for_each_point(tmp_path: Path) -> None:
    """In a .npz a series in a row may be labelled point by point."""
    assert read_vectors(npz(tmp_path, SERIES[None], POINTS), stride=800).labels.tolist() == [0, 1, 1, NO_LABEL]


@given(
    length=st.integers(VECTOR, 3 * VECTOR), stride=st.integers(1, 2000), points=st.sets(st.integers(0, 3 * VECTOR - 1))
)
def test_windows_agree_with_their_definition(
    tmp_path_factory: pytest.TempPathFactory, length: int, stride: int, points: set[int]
) -> None:
    """For any length, stride and anomalous points, window and label are those of the slice."""
    series = np.arange(length, dtype=np.float32)
    labels = np.isin(np.arange(length), list(points)).astype(np.int8)
    batch = read_vectors(npz(tmp_path_factory.mktemp("series"), series, labels), stride=stride)
    slices = [slice(start, start + VECTOR) for start in range(0, length - VECTOR + 1, stride)]
    assert batch.labels.tolist() == [labels[part].max() for part in slices]
    assert batch.input_data[:, 0].tolist() == [series[part][0] for part in slices]


def test_a_large_npy_is_mapped(tmp_path: Path) -> None:
    """float32 vectors stay on the disk; writing to the batch does not change the file."""
    file = npy(tmp_path, VECTORS, None)
    batch = read_vectors(file)
    assert not batch.input_data.flags.owndata
    batch.input_data[:] = 0
    assert np.array_equal(np.load(file), VECTORS)


@pytest.mark.parametrize("kind", ["<f8", ">f4", "<i4", "u1", "<f2"])
def test_numbers_of_any_kind(tmp_path: Path, kind: str) -> None:
    """Other widths, byte orders and whole numbers become float32; so does an array stored by columns."""
    values = np.asfortranarray(np.arange(2 * VECTOR).reshape(2, VECTOR) % 200).astype(kind, order="K")
    same(read_vectors(npy(tmp_path, values, None)), values.astype(np.float32), [NO_LABEL] * 2)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_any_dialect(tmp_path: Path, separator: str, mark: str, end: str) -> None:
    """Separators, byte-order mark, line ends and blank lines make no difference."""
    content = table(tmp_path, VECTORS, LABELS, separator).read_text(encoding="utf-8")
    file = text(tmp_path, mark + content.replace("\n", end) + end)
    same(read_vectors(file), VECTORS, LABELS.tolist())


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas(tmp_path: Path, separator: str) -> None:
    """Between semicolons or tabs a number may have a decimal comma, also after a byte-order mark."""
    content = table(tmp_path, VECTORS, None, separator).read_text(encoding="utf-8").replace(".", ",")
    same(read_vectors(text(tmp_path, "\ufeff" + content)), VECTORS, [NO_LABEL] * 3)


def test_headings_that_count(tmp_path: Path) -> None:
    """Columns named 0 to 1599, as pandas names them, are a heading, with or without a label beside them."""
    row = ",".join(["0.5"] * VECTOR)
    counted = ",".join(map(str, range(VECTOR)))
    assert len(read_vectors(text(tmp_path, f"{counted}\n{row}\n"))) == 1
    assert read_vectors(text(tmp_path, f"{counted},label\n{row},1\n")).labels.tolist() == [1]


def test_words_for_labels(tmp_path: Path) -> None:
    """In a CSV True and False, 1.0 and 0.0, −1 and nothing are labels."""
    words = {"True": 1, "false": 0, "1.0": 1, "0": 0, "-1": NO_LABEL, "": NO_LABEL}
    row = ",".join(["0.5"] * VECTOR)
    lines = [",".join([*(f"x{i}" for i in range(VECTOR)), "anomaly"]), *(f"{row},{word}" for word in words)]
    assert read_vectors(text(tmp_path, "\n".join(lines))).labels.tolist() == list(words.values())


def test_a_label_column_by_its_name(tmp_path: Path) -> None:
    """A column or array of another name is the labels when it is named."""
    np.savez(tmp_path / "data.npz", data=VECTORS, fallo=LABELS)
    same(read_vectors(tmp_path / "data.npz", label_column="fallo"), VECTORS, LABELS.tolist())
    content = table(tmp_path, VECTORS, LABELS).read_text(encoding="utf-8").replace("etiqueta", "fallo")
    same(read_vectors(text(tmp_path, content), label_column="fallo"), VECTORS, LABELS.tolist())


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
def test_a_label_column_that_is_not_there(tmp_path: Path, write: Writer) -> None:
    """A name that the file does not have is refused, naming it."""
    with pytest.raises(RequestError, match="«fallo»"):
        read_vectors(write(tmp_path, VECTORS, None), label_column="fallo")


def test_a_stride_below_one(tmp_path: Path) -> None:
    """A stride of 0 is refused."""
    with pytest.raises(RequestError, match="ventanas es 0"):
        read_vectors(npy(tmp_path, SERIES, None), stride=0)


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
@pytest.mark.parametrize("width", [2, 1599, 1601])
def test_rows_of_another_width(tmp_path: Path, write: Writer, width: int) -> None:
    """Rows that are no vectors and no series are refused, with both widths."""
    refused(write(tmp_path, np.ones((3, width), np.float32), None), r"data\.\w+(:1|, fila 1)", "1600", f" {width}")


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
def test_a_series_that_is_too_short(tmp_path: Path, write: Writer) -> None:
    """A series that fills no window is refused, with its length."""
    refused(write(tmp_path, SERIES[:1599], None), "data", "1599", "1600")


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 1.1e9])
def test_numbers_that_are_none(tmp_path: Path, write: Writer, value: float) -> None:
    """NaN, infinities and giants are refused, naming row (the line, in a CSV) and place."""
    values = VECTORS.astype(np.float64)
    values[1, 6] = value
    refused(write(tmp_path, values, None), r"data\.\w+(:2|, fila 2), número 7")


@pytest.mark.parametrize("write", [npy, npz, table, parquet])
def test_a_gap_in_a_series(tmp_path: Path, write: Writer) -> None:
    """In a series the row named is that of the point."""
    series = SERIES.copy()
    series[2500] = np.nan
    refused(write(tmp_path, series, None), r"data\.\w+(:2501|, fila 2501)")


def test_a_missing_value_of_a_parquet(tmp_path: Path) -> None:
    """A null is a gap, in columns of whole numbers too."""
    points = pyarrow.array([*range(2000), None])
    pyarrow.parquet.write_table(pyarrow.table({"x": points}), tmp_path / "data.parquet")
    refused(tmp_path / "data.parquet", "fila 2001")


@pytest.mark.parametrize("write", [npz, table])
def test_labels_that_are_none(tmp_path: Path, write: Writer) -> None:
    """A label that is not 0, 1 or unknown is refused, naming its row."""
    refused(write(tmp_path, VECTORS, np.array([0, 1, 2])), r"data\.\w+(:4|, fila 3)", "«2»", "etiqueta")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("0.5\nuno\n0.5\n", r"data\.csv:2, número 1.*«uno»"),
        ("x\n0.5\n\n1_0\n", r"data\.csv:4, número 1.*«1_0»"),
        ("1,2,3\n1,,3\n", r"data\.csv:2, número 2.*celda vacía"),
        ("1,2,tres\n1,2,3\n", r"data\.csv:1, número 3.*«tres»"),
        ("1,2,3\n1,2\n", r"data\.csv:2.*2 columnas.*3"),
        ("x,label\n1,sí\n", r"data\.csv:2.*«sí»"),
        ("x\n", "vacío"),
        ("\n\n", "vacío"),
        ("label\n1\n", "vacío"),
        (b"0.5\n\xff\n", "CSV sano"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, content: str | bytes, found: str) -> None:
    """Text cells, gaps, ragged rows, bare headings and other encodings are refused with file and line."""
    refused(text(tmp_path, content), found)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet"])
def test_files_that_are_not_what_they_say(tmp_path: Path, suffix: str) -> None:
    """Empty, absent, a folder or full of something else: refused with the file's name."""
    name = f"data{suffix}"
    refused(tmp_path / name, name)
    refused(text(tmp_path, "", name), f"{name} está vacío")
    refused(text(tmp_path, b"\x00\x01\xfe\xff" * 2000, name), name)
    (tmp_path / "sub" / name).mkdir(parents=True)
    refused(tmp_path / "sub" / name, name)


@pytest.mark.parametrize("write", [npy, npz, parquet])
def test_a_file_cut_short(tmp_path: Path, write: Writer) -> None:
    """Half a file is refused, never half read."""
    file = write(tmp_path, VECTORS, None)
    refused(text(tmp_path, file.read_bytes()[: file.stat().st_size // 2], file.name), file.name, "sano")


@pytest.mark.parametrize("write", [npy, npz])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([["a"] * VECTOR]), "U1"),
        (np.ones((2, VECTOR), bool), "bool"),
        (np.ones((2, VECTOR), complex), "complex128"),
        (np.ones((2, 25, 64)), r"\[2, 25, 64\]"),
        (np.float32(3), "fila|serie"),
        (np.empty((0, VECTOR), np.float32), "vacío"),
        (np.array([{"pickled": 1}], object), "sano"),
    ],
)
def test_arrays_that_are_no_vectors(tmp_path: Path, write: Writer, values: NDArray[Any], found: str) -> None:
    """Text, booleans, complex numbers, other shapes, nothing and pickles are refused."""
    refused(write(tmp_path, values, None), found)


def test_an_archive_without_the_names(tmp_path: Path) -> None:
    """The names found and the names expected are both said."""
    np.savez(tmp_path / "data.npz", otra=VECTORS)
    refused(tmp_path / "data.npz", "«otra».*input_data")


def test_labels_of_another_length(tmp_path: Path) -> None:
    """Two labels for three vectors are refused."""
    refused(npz(tmp_path, VECTORS, LABELS[:2]), "etiquetas: 2; filas: 3")


def test_a_parquet_with_texts(tmp_path: Path) -> None:
    """A column of text is refused by its name, and so are words for labels."""
    file = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.0], "sitio": ["norte"]}), file)
    refused(file, "columna «sitio».*string")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.0], "label": ["malo"]}), file)
    refused(file, "malo")


def test_a_kind_of_file_that_is_not_known(tmp_path: Path) -> None:
    """The suffix found and those that can be read are said."""
    refused(text(tmp_path, "1", "data.xlsx"), r"«\.xlsx».*\.npy, \.npz, \.csv, \.parquet")


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="permissions do not bind here")
def test_a_file_one_may_not_read(tmp_path: Path) -> None:
    """A file without permission is refused, with the system's reason."""
    file = npy(tmp_path, VECTORS, None)
    file.chmod(0)
    refused(file, "Permission denied")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_more_windows_than_memory(tmp_path: Path) -> None:
    """Millions of windows that do not fit are refused with a way out."""
    file = npy(tmp_path, np.zeros(2_000_000, np.float32), None)
    code = f"""
import resource
from pathlib import Path
from sheily_train.core.omega.vectors import read_vectors
from sheily_train.errors import ResourceError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    read_vectors(Path({str(file)!r}), stride=1)
except ResourceError as error:
    print(error.mend)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "paso" in done.stdout


def refused(file: Path, *found: str) -> None:
    """A DataError whose message has each pattern, and which says how to mend it."""
    with pytest.raises(SheilyError) as caught:
        read_vectors(file)
    assert type(caught.value) is DataError
    assert caught.value.mend
    for pattern in found:
        assert caught.match(pattern)
