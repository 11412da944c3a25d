from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sheily_train import durable
from sheily_train.core.branches.catalog import find_branch
from sheily_train.core.branches.checks import check_branches
from sheily_train.core.branches.examples import read_examples
from sheily_train.core.branches.importer import Imported, ImportRequest, import_rows
from sheily_train.errors import DataError, MissingExtraError, RequestError, ResourceError

ROWS = [{"question": f"¿Qué es {number}?", "answer": f"El número {number}; «{number}»."} for number in range(20)]
MAP = {"instruction": "question", "output": "answer"}
CSV = "question,answer\n¿Qué?,Esto.\n"


def bring(
    tmp_path: Path, *sources: Path | str, mapping: dict[str, str] | None = None, **options: Any
) -> list[Imported]:
    request = ImportRequest(
        tmp_path / "branches", "physics", tuple(map(str, sources)), MAP if mapping is None else mapping, **options
    )
    return import_rows(request)


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def written(tmp_path: Path) -> list[str]:
    return sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "branches").rglob("*.jsonl"))


def rows_of(imported: Imported) -> list[dict[str, Any]]:
    return [json.loads(line) for line in imported.file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_any_dialect(tmp_path: Path, separator: str, encoding: str, end: str) -> None:
    """Separator, byte-order mark, line ends and quoted texts with all of these inside are understood by themselves."""
    lines = (
        separator.join(["question", " answer ", "id"]),
        separator.join(["¿Qué?", f'"Esto{separator} y «esto»."', "1"]),
        "",
        separator.join(["¿Y?", '"Dos ""líneas"":\nasí."', "2"]),
    )
    file = put(tmp_path, "rows.csv", (end.join(lines) + end).encode(encoding))
    (imported,) = bring(tmp_path, file)
    assert rows_of(imported) == [
        {"instruction": "¿Qué?", "output": f"Esto{separator} y «esto»."},
        {"instruction": "¿Y?", "output": 'Dos "líneas":\nasí.'},
    ]
    assert imported.unused_columns == ("id",)


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    """The same rows from another kind of file become the same file."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "columns.parquet", row_group_size=7)
    jsonl = put(tmp_path, "lines.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    one, other = bring(tmp_path, tmp_path / "columns.parquet", jsonl)
    assert rows_of(one) == rows_of(other)
    assert (one.rows, one.format, one.file.name) == (20, "instruction/input/output", "columns.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "P", "input": "E", "output": "R"},
        {"prompt": "P", "completion": "R"},
        {"messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "R"}]},
        {"conversations": [{"from": "human", "value": "P"}, {"from": "gpt", "value": "R"}]},
        {"text": "T"},
    ],
)
def test_rows_with_our_fields_need_no_map(tmp_path: Path, row: dict[str, Any]) -> None:
    """Every format keeps its turns through an import; other columns stay behind and are named."""
    file = put(tmp_path, "a.jsonl", json.dumps({**row, "score": 0.5}))
    (imported,) = bring(tmp_path, file, mapping={})
    assert [example.turns for example in read_examples([imported.file])] == [
        example.turns for example in read_examples([file])
    ]
    assert imported.unused_columns == ("score",)
    assert list(rows_of(imported)[0]) == list(row)


def test_an_empty_input_is_left_out(tmp_path: Path) -> None:
    """What has nothing to say is not written."""
    file = put(tmp_path, "a.csv", "instruction,input,output\n¿Qué?,,Esto.\n¿Y?,con esto,Otro.\n")
    (imported,) = bring(tmp_path, file, mapping={})
    assert [list(row) for row in rows_of(imported)] == [["instruction", "output"], ["instruction", "input", "output"]]


def test_rows_go_to_the_evaluation_when_asked(tmp_path: Path) -> None:
    """``evaluation`` writes to the evaluation folder only."""
    bring(tmp_path, put(tmp_path, "a.csv", CSV), evaluation=True)
    assert written(tmp_path) == ["branches/physics/evaluation/data/a.jsonl"]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ("question,answer\n¿Qué?,Esto.\n¿Y?,\n", 3, "«output» vacío"),
        ("question,answer\n¿Qué?,Esto, y esto.\n", 2, "3 valores"),
        ("question,answer\n¿Qué?,Esto.\n¿Y?\n", 3, "1 valor ("),
        ('question,answer\n"¿\nQué?",Esto.\n¿Y?,\n', 4, "«output» vacío"),
        ('question,answer\n¿Qué?,Esto.\n"¿Y?,nunca se cierra\n', 3, "end of data"),
        ('"question\n",answer\n¿Y?,\n', 3, "«output» vacío"),
        ('question,answer\n"¿Y"?,Esto.\n', 2, "expected after"),
        ("question,question\n¿Qué?,Esto.\n", 1, "question, question"),
        (b"question,answer\n\xbfQu\xe9?,Esto.\n", 2, "0xbf"),
    ],
)
def test_bad_csv_rows_are_named_and_nothing_is_written(
    tmp_path: Path, content: str | bytes, line: int, found: str
) -> None:
    """One bad row refuses the whole import, with its file:line, the first line of a row of several."""
    good, bad = put(tmp_path, "good.csv", CSV), put(tmp_path, "bad.csv", content)
    with pytest.raises(DataError) as caught:
        bring(tmp_path, good, bad)
    assert f"{bad}:{line}: " in caught.value.message
    assert found in caught.value.message
    assert not (tmp_path / "branches").exists()


def test_bad_rows_of_other_files_are_named_too(tmp_path: Path) -> None:
    """JSONL counts lines, Parquet rows."""
    jsonl = put(tmp_path, "a.jsonl", '{"question": "P", "answer": "R"}\n\n{"question": "P"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: JSON no válido"):
        bring(tmp_path, jsonl)
    table = pyarrow.Table.from_pylist([{"question": "P", "answer": 1}, {"question": "P", "answer": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:1: «output»: 1[^\0]*a\.parquet:2: «output»: null"):
        bring(tmp_path, tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.csv", "", DataError, "ninguna fila"),
        ("a.csv", "question,answer\n", DataError, "ninguna fila"),
        ("a.parquet", "PAR1", DataError, "Parquet"),
        ("a.xlsx", "PK", RequestError, "No sé leer"),
    ],
)
def test_files_without_rows_are_refused(
    tmp_path: Path, name: str, content: str, kind: type[Exception], message: str
) -> None:
    """Empty, damaged and unknown files each get their message."""
    with pytest.raises(kind, match=message):
        bring(tmp_path, put(tmp_path, name, content))
    assert not (tmp_path / "branches").exists()


def test_a_missing_file_is_not_sought_on_the_hub(tmp_path: Path) -> None:
    """A name with a suffix of ours is a file's."""
    with pytest.raises(RequestError, match="No existe"):
        bring(tmp_path, tmp_path / "a.csv")


def test_a_folder_with_a_file_s_name_is_refused(tmp_path: Path) -> None:
    """Only files are read as files."""
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(RequestError, match="No existe el archivo"):
        bring(tmp_path, tmp_path / "a.csv")


def test_unknown_columns_show_how_to_map_them(tmp_path: Path) -> None:
    """Without a map, the message lists the columns and gives one to copy."""
    with pytest.raises(RequestError, match="question, answer") as caught:
        bring(tmp_path, put(tmp_path, "a.csv", CSV), mapping={})
    assert "--map 'instruction=question,output=answer'" in caught.value.mend


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"instruction": "question", "output": "reply"}, "no tiene la columna «reply»"),
        ({"question": "instruction", "answer": "output"}, "«question» no es un campo"),
        ({"instruction": "question"}, "no se completa ningún formato"),
    ],
)
def test_maps_that_cannot_be_are_refused(tmp_path: Path, mapping: dict[str, str], message: str) -> None:
    """A column that is not there, a map turned round, half a format: each is told before anything is written."""
    with pytest.raises(RequestError, match=message):
        bring(tmp_path, put(tmp_path, "a.csv", CSV), mapping=mapping)
    assert not (tmp_path / "branches").exists()


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    """An existing file stays as it is until ``force`` replaces it."""
    (first,) = bring(tmp_path, put(tmp_path, "a.csv", CSV))
    before = first.file.read_bytes()
    put(tmp_path, "a.csv", CSV.replace("Esto", "Otro"))
    with pytest.raises(RequestError, match="Ya existe") as caught:
        bring(tmp_path, tmp_path / "a.csv")
    assert "--force" in caught.value.mend
    assert first.file.read_bytes() == before
    bring(tmp_path, tmp_path / "a.csv", force=True)
    assert rows_of(first) == [{"instruction": "¿Qué?", "output": "Otro."}]


def test_rows_are_not_replaced_without_those_held_out_of_them(tmp_path: Path) -> None:
    """An evaluation file of the rows before never judges the new ones: it is replaced too, or nothing is."""
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    training, held_out = bring(tmp_path, put(tmp_path, "a.jsonl", rows), held_out=20)
    before = training.file.read_bytes()
    put(tmp_path, "a.jsonl", rows.replace("¿Qué", "¿Cómo"))
    with pytest.raises(RequestError, match=r"evaluation.*a\.jsonl juzga") as caught:
        bring(tmp_path, tmp_path / "a.jsonl", force=True)
    assert "--held-out" in caught.value.mend
    assert training.file.read_bytes() == before
    bring(tmp_path, tmp_path / "a.jsonl", force=True, held_out=20)
    assert "¿Cómo es" in held_out.file.read_text(encoding="utf-8")
    bring(tmp_path, tmp_path / "a.jsonl", force=True, evaluation=True)
    held_out.file.unlink()
    bring(tmp_path, tmp_path / "a.jsonl", force=True)
    assert "¿Cómo es" in training.file.read_text(encoding="utf-8")


def test_two_sources_never_share_a_file(tmp_path: Path) -> None:
    """Two files of one name would overwrite each other."""
    (tmp_path / "b").mkdir()
    with pytest.raises(RequestError, match="se llamarían"):
        bring(tmp_path, put(tmp_path, "a.csv", CSV), put(tmp_path / "b", "a.csv", CSV), force=True)


@pytest.mark.parametrize("name", ["../physics", "", ".git"])
def test_branch_names_are_checked(tmp_path: Path, name: str) -> None:
    """No import writes outside the folder of branches."""
    source = str(put(tmp_path, "a.csv", CSV))
    with pytest.raises(RequestError, match="nombre de una rama"):
        import_rows(ImportRequest(tmp_path / "branches", name, (source,), MAP))


def test_file_names_are_made_safe(tmp_path: Path) -> None:
    """Spaces and signs of the source's name become hyphens; one of signs alone gives no hidden file."""
    (imported,) = bring(tmp_path, put(tmp_path, ".mis datos (1).csv", CSV))
    assert imported.file.name == "mis-datos-1.jsonl"
    (imported,) = bring(tmp_path, put(tmp_path, "¿?.csv", CSV))
    assert imported.file.name == "rows.jsonl"


def test_held_out_rows_are_the_same_at_every_import(tmp_path: Path) -> None:
    """The split has the size asked for, does not depend on the order, and keeps copies on one side."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    copies = [line.replace("¿Qué es", "¿qué ES") for line in lines]
    one = bring(tmp_path / "1", put(tmp_path, "a.jsonl", "".join(lines)), held_out=25)
    other = bring(tmp_path / "2", put(tmp_path, "a.jsonl", "".join(reversed(lines))), held_out=25)
    assert [imported.rows for imported in one] == [15, 5]
    assert [sorted(map(str, rows_of(part))) for part in one] == [sorted(map(str, rows_of(part))) for part in other]
    assert [part.file.parent.parent.name for part in one] == ["training", "evaluation"]
    bring(tmp_path / "3", put(tmp_path, "a.jsonl", "".join(lines + copies)), held_out=25)
    problems = check_branches([find_branch(tmp_path / "3" / "branches", "physics")])
    assert {problem.code for problem in problems} == {"duplicate"}


def test_held_out_leaves_rows_to_train_on(tmp_path: Path) -> None:
    """A single row cannot be split."""
    with pytest.raises(RequestError, match="no queda ninguna fila para entrenar"):
        bring(tmp_path, put(tmp_path, "a.csv", CSV), held_out=10)
    assert not (tmp_path / "branches").exists()


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write is one clear line, and no half file is left."""

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", refuse)
    with pytest.raises(ResourceError, match="No se puede escribir"):
        bring(tmp_path, put(tmp_path, "a.csv", CSV))
    assert not [path for path in (tmp_path / "branches").rglob("*") if path.is_file()]


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset id without the package tells what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        bring(tmp_path, "somos-nlp/datos")
    assert "sheily-train[hub]" in caught.value.mend
