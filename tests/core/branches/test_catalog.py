from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest

from sheily_train.core.branches import catalog
from sheily_train.errors import DataError, RequestError

ROW = '{"instruction": "¿Qué es?", "output": "Esto."}\n'


def make_branch(branches_dir: Path, name: str, *files: str) -> Path:
    folder = branches_dir / name
    (folder / "training" / "data").mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(ROW, encoding="utf-8")
    return folder


def test_find_branches_sorts_them_and_their_files(tmp_path: Path) -> None:
    """Branches and their files come sorted by name, whatever the order they were made in."""
    make_branch(tmp_path, "sports", "training/data/b.jsonl", "training/data/a.jsonl", "evaluation/data/test.jsonl")
    make_branch(tmp_path, "art")
    art, sports = catalog.find_branches(tmp_path)
    assert (art.name, art.training_files, art.evaluation_files) == ("art", (), ())
    assert [file.name for file in sports.training_files] == ["a.jsonl", "b.jsonl"]
    assert sports.evaluation_files == (tmp_path / "sports" / "evaluation" / "data" / "test.jsonl",)


def test_find_branches_passes_over_what_is_no_branch(tmp_path: Path) -> None:
    """Hidden folders, stray files and folders with impossible names are no branches."""
    make_branch(tmp_path, "physics")
    make_branch(tmp_path, ".git")
    make_branch(tmp_path, "¿qué?")
    (tmp_path / "README.md").write_text("hola")
    assert [branch.name for branch in catalog.find_branches(tmp_path)] == ["physics"]


def test_only_visible_jsonl_files_are_rows(tmp_path: Path) -> None:
    """Temporary and other hidden files, other suffixes and folders are not read."""
    names = (".train.jsonl", "notes.txt", "train.jsonl.bak", "train.jsonl")
    folder = make_branch(tmp_path, "physics", *(f"training/data/{name}" for name in names))
    (folder / "training" / "data" / "folder.jsonl").mkdir()
    assert [file.name for file in catalog.find_branch(tmp_path, "physics").training_files] == ["train.jsonl"]


def test_missing_folder_is_a_request_error(tmp_path: Path) -> None:
    """Without the folder of branches, the message says how to point to another."""
    with pytest.raises(RequestError, match="nada") as caught:
        catalog.find_branches(tmp_path / "nada")
    assert "--branches-dir" in caught.value.mend


def test_unknown_branch_suggests_near_names(tmp_path: Path) -> None:
    """A misspelt name gets the near ones and the command that lists all."""
    make_branch(tmp_path, "physics")
    make_branch(tmp_path, "music")
    with pytest.raises(RequestError) as caught:
        catalog.find_branch(tmp_path, "Phisics")
    assert "physics" in caught.value.mend
    assert "music" not in caught.value.mend
    assert "sheily branches list" in caught.value.mend


@pytest.mark.parametrize("name", ["física", "Fisica", "FÍSICA", "fisicas"])
def test_a_title_suggests_its_branch(tmp_path: Path, name: str) -> None:
    """Who gives a branch's title in place of its name is told the name, whatever the accents and the case."""
    for branch, title in (("physics", '{ es = "Física", en = "Physics" }'), ("music", '"Música"'), ("art", "no TOML")):
        (make_branch(tmp_path, branch) / "branch.toml").write_text(f"title = {title}\n", encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        catalog.find_branch(tmp_path, name)
    assert caught.value.mend.startswith("¿Quizá physics")
    assert "art" not in caught.value.mend


def test_case_of_the_name_counts(tmp_path: Path) -> None:
    """``Physics`` is not ``physics``, even on a disk that thinks so."""
    make_branch(tmp_path, "physics", "training/data/train.jsonl")
    with pytest.raises(RequestError):
        catalog.find_branch(tmp_path, "Physics")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../physics", "a/b", "a\\b", "/etc", ".git", "a\n", "a\0b", "a:b", "a.", " a", "x" * 65]
)
def test_names_that_could_be_paths_are_refused(tmp_path: Path, name: str) -> None:
    """No name reaches out of the folder, hides, or cannot be a folder on every system."""
    make_branch(tmp_path, "physics")
    with pytest.raises(RequestError, match="no puede ser el nombre"):
        catalog.find_branch(tmp_path, name)


@pytest.mark.parametrize("name", ["física", "C4", "mecánica cuántica", "a.b-c_d", "x", "x" * 64])
def test_names_of_people_are_accepted(tmp_path: Path, name: str) -> None:
    """Letters of any language, digits, spaces, dots, hyphens: a name that can be listed can also be asked for."""
    make_branch(tmp_path, name, "training/data/train.jsonl")
    assert catalog.find_branch(tmp_path, name).name == name


def test_branch_without_training_files_is_a_data_error(tmp_path: Path) -> None:
    """The message names the folder where the rows are expected."""
    make_branch(tmp_path, "physics", "evaluation/data/test.jsonl")
    with pytest.raises(DataError) as caught:
        catalog.find_branch(tmp_path, "physics")
    assert str(Path("physics") / "training" / "data") in caught.value.message


def test_the_common_branch_has_the_rows_of_all(tmp_path: Path) -> None:
    """It is no folder and not among the branches, and its hash changes with the rows of any of them."""
    files = ("training/data/train.jsonl", "evaluation/data/test.jsonl")
    music, physics = (make_branch(tmp_path, name, *files) for name in ("music", "physics"))
    common = catalog.find_branch(tmp_path, catalog.COMMON_BRANCH)
    assert common.training_files == (music / files[0], physics / files[0])
    assert common.evaluation_files == (music / files[1], physics / files[1])
    assert [branch.name for branch in catalog.find_branches(tmp_path)] == ["music", "physics"]
    before = catalog.data_hash(common)
    (physics / files[0]).write_text(2 * ROW, encoding="utf-8")
    assert catalog.data_hash(catalog.find_branch(tmp_path, catalog.COMMON_BRANCH)) != before


def test_a_folder_may_be_called_common(tmp_path: Path) -> None:
    """Then it is a branch like others, with its own rows alone."""
    folder = make_branch(tmp_path, "common", "training/data/train.jsonl")
    make_branch(tmp_path, "physics", "training/data/train.jsonl")
    assert catalog.find_branch(tmp_path, "common").folder == folder


def test_without_rows_there_is_no_common_branch(tmp_path: Path) -> None:
    """It is unknown like any other."""
    make_branch(tmp_path, "physics")
    with pytest.raises(RequestError, match="No hay ninguna rama «common»"):
        catalog.find_branch(tmp_path, "common")


def test_data_hash_knows_contents_names_and_parts(tmp_path: Path) -> None:
    """The hash is that of the data wherever they lie, and changes with a content, a name, or a file's part."""
    folder = make_branch(tmp_path / "one", "physics", "training/data/train.jsonl", "evaluation/data/test.jsonl")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def hash_of(root: str) -> str:
        return catalog.data_hash(catalog.find_branch(tmp_path / root, "physics"))

    hashes = [hash_of("one")]
    assert hash_of("two") == hashes[0]
    with (folder / "evaluation" / "data" / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(ROW)
    hashes.append(hash_of("one"))
    (folder / "evaluation" / "data" / "test.jsonl").rename(folder / "evaluation" / "data" / "zz.jsonl")
    hashes.append(hash_of("one"))
    (folder / "evaluation" / "data" / "zz.jsonl").rename(folder / "training" / "data" / "zz.jsonl")
    hashes.append(hash_of("one"))
    assert len(set(hashes)) == 4


def test_count_rows_passes_over_blank_lines(tmp_path: Path) -> None:
    """Blank lines are no rows; a last line without its end is one."""
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"{}\r\n\r\n  \n{}\n\n{}")
    assert catalog.count_rows(file) == 3
    file.write_bytes(b"")
    assert catalog.count_rows(file) == 0


def test_count_rows_of_an_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    """What the system refuses becomes one line that names the file."""
    with pytest.raises(DataError, match="No se puede leer"):
        catalog.count_rows(tmp_path)


def test_description_is_read_when_there_is_one(tmp_path: Path) -> None:
    """``branch.toml`` is optional; when it is there it is TOML."""
    folder = make_branch(tmp_path, "physics", "training/data/train.jsonl")
    branch = catalog.find_branch(tmp_path, "physics")
    assert catalog.read_description(branch) == {}
    (folder / "branch.toml").write_text('title = "Física"\nversion = "1"\n', encoding="utf-8")
    assert catalog.read_description(branch) == {"title": "Física", "version": "1"}
    (folder / "branch.toml").write_text("title = Física", encoding="utf-8")
    with pytest.raises(DataError, match=r"branch\.toml"):
        catalog.read_description(branch)


def test_paths_are_shown_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages show short paths below the current folder and whole paths elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert catalog.shown_path(tmp_path / "here" / "a" / "b") == str(Path("a") / "b")
    assert catalog.shown_path(tmp_path / "there") == str(tmp_path / "there")
    assert catalog.shown_path(Path("a")) == "a"


def test_names_that_a_mac_wrote_are_the_same(tmp_path: Path) -> None:
    """Accents apart from their letters, as in archives made on a Mac: found by the name a keyboard types, and back."""
    typed, written = (unicodedata.normalize(form, "música") for form in ("NFC", "NFD"))
    folder = make_branch(tmp_path, written, "training/data/train.jsonl")
    assert [branch.name for branch in catalog.find_branches(tmp_path)] == [typed]
    for name in (typed, written):
        assert catalog.find_branch(tmp_path, name).folder.samefile(folder)
        assert catalog.branch_folder(tmp_path, name).samefile(folder)


def test_a_byte_order_mark_alone_is_no_row(tmp_path: Path) -> None:
    """What Notepad saves as an empty file is counted as one; a row behind a mark is counted."""
    file = tmp_path / "train.jsonl"
    for content, rows in ((b"\xef\xbb\xbf", 0), (b"\xef\xbb\xbf\r\n{}\n", 1), (b"\xef\xbb\xbf{}", 1)):
        file.write_bytes(content)
        assert catalog.count_rows(file) == rows
