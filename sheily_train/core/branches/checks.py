"""What is wrong with branches: rows that cannot be read, are repeated or leak into the evaluation, and stray files.

Each kind of finding has a function below; :func:`check_branches` puts them together.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sheily_train.core.branches.catalog import (
    DESCRIPTION_FILE,
    PROOFS_FILE,
    Branch,
    count_rows,
    is_name,
    read_description,
    shown_path,
)
from sheily_train.core.branches.examples import Code, Example, Problem, read_file
from sheily_train.errors import DataError
from sheily_train.i18n import _
from sheily_train.paths import EVALUATION_DATA, ROWS_SUFFIX, TRAINING_DATA

# Where the default --max-length of 1,024 tokens begins to cut: with the embedded base's vocabulary a token is 2.7
# characters of our Spanish rows and 4.9 of WordNet's English ones.
MAX_CHARACTERS = 4_000

# The least similarity of near duplicates (see _near_duplicates). Over fifty branches made of four question templates
# and WordNet's definitions (34,192 rows), 0.90 finds 7 pairs, each about one and the same term and with answers that
# differ in a word or two; from 0.89 down come pairs about sisters (a military academy, a naval one). A copy with a word
# more or less, or with its question put otherwise, is found in 95 of 100 cases when its answer has eight words or more.
# A ratio of edited characters does not separate these: at 0.95 it reports 53 pairs, mostly first and second, left and
# right, and loses the questions put otherwise.
NEAR_DUPLICATE = 0.90

_ALLOWED_BESIDE_DATA = ("README*", "LICENSE*", DESCRIPTION_FILE, PROOFS_FILE)

Vector = Mapping[tuple[int, str], float]


@dataclass(frozen=True)
class _Row:
    """A readable row, as comparisons need it: folded texts of what is asked and what is answered."""

    branch: str
    held_out: bool
    file: Path
    line: int
    question: str
    answer: str


def check_branches(branches: Sequence[Branch], *, max_characters: int = MAX_CHARACTERS) -> list[Problem]:
    """Everything wrong within and among the branches, sorted by file and line.

    Rows of more than ``max_characters`` are reported; the trainer itself counts tokens.
    """
    rows: list[_Row] = []
    problems: list[Problem] = []
    for branch in branches:
        branch_rows, branch_problems = _read(branch, max_characters)
        rows += branch_rows
        problems += branch_problems
        problems += _emptiness(branch)
        problems += _stray_files(branch)
        problems += _bad_description(branch)
        problems += _near_duplicates(branch_rows)
    problems += _exact_duplicates(rows)
    return sorted(problems, key=lambda problem: (problem.file, problem.line))


def check_folder(branches_dir: Path) -> list[Problem]:
    """What lies beside the branches and is none: stray files, and folders by whose name no branch can be called."""
    expected = _("una carpeta por rama")
    problems = []
    for path in sorted(branches_dir.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and not is_name(path.name):
            found, mend = _("una carpeta con este nombre"), _("Usa letras, cifras, «-», «_», «.» y espacios.")
            problems.append(Problem(Code.STRAY, path, 0, found, expected, mend))
        elif path.is_file() and not _is_allowed(path):
            problems.append(Problem(Code.STRAY, path, 0, _("un archivo suelto"), expected, _mend_stray(path)))
    return problems


def fold(text: str) -> str:
    """The text without what copies differ by: case, accents, punctuation, spaces. Signs such as + and = stay."""
    return " ".join(unicodedata.normalize("NFKD", text.casefold()).translate(_FOLDING).split())


class _Folding(dict[int, str | None]):
    """A table for ``str.translate``, filled on demand: accents vanish, punctuation and controls become spaces."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        self[code] = None if category == "Mn" else " " if category[0] in "PZC" else chr(code)
        return self[code]


_FOLDING = _Folding()


def question_and_answer(example: Example) -> tuple[str, str]:
    """The folded texts of all that is asked (the system prompt with it) and of all that is answered."""
    asked = (turn.content for turn in example.turns if turn.role != "assistant")
    answered = (turn.content for turn in example.turns if turn.role == "assistant")
    return fold(" ".join(asked)), fold(" ".join(answered))


def _read(branch: Branch, max_characters: int) -> tuple[list[_Row], list[Problem]]:
    """The readable rows, those of the evaluation first, and what is wrong with single rows."""
    rows: list[_Row] = []
    problems: list[Problem] = []
    # The evaluation first, so that a leak is reported at the training row: the one to remove.
    for held_out, files in ((True, branch.evaluation_files), (False, branch.training_files)):
        for file in files:
            for line, item in read_file(file):
                if isinstance(item, Problem):
                    problems.append(item)
                    continue
                rows.append(_Row(branch.name, held_out, file, line, *question_and_answer(item)))
                length = sum(len(turn.content) for turn in item.turns)
                if length > max_characters:
                    problems.append(_too_long(file, line, length, max_characters))
    return rows, problems


def _too_long(file: Path, line: int, length: int, limit: int) -> Problem:
    found, expected = _("{length} caracteres").format(length=length), _("{limit} como mucho").format(limit=limit)
    mend = _("Acórtala o pártela: al entrenar solo se conserva lo que quepa en --max-length.")
    return Problem(Code.TOO_LONG, file, line, found, expected, mend)


def _emptiness(branch: Branch) -> Iterator[Problem]:
    """Files without rows, and a branch that has nothing to learn from."""
    for file in (*branch.training_files, *branch.evaluation_files):
        if not count_rows(file):
            yield Problem(Code.EMPTY_FILE, file, 0, _("ninguna fila"), _("una por línea"), _("Complétalo o bórralo."))
    if not any(count_rows(file) for file in branch.training_files):
        folder = branch.folder / TRAINING_DATA
        mend = _("Impórtalas con: sheily branches import {branch} ARCHIVO").format(branch=branch.name)
        yield Problem(Code.NO_ROWS, folder, 0, _("ninguna fila de entrenamiento"), _("una al menos"), mend)


def _stray_files(branch: Branch) -> Iterator[Problem]:
    expected = {*branch.training_files, *branch.evaluation_files}
    homes = {branch.folder, *(file.parents[2] for file in expected)}  # the branch of all rows has those of several
    for path in sorted(branch.folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(branch.folder).parts)
        allowed = path in expected or (path.parent in homes and _is_allowed(path))
        if path.is_file() and not hidden and not allowed:
            found = _("un archivo que no se usa")
            where = _("filas {suffix} en {training} o {evaluation}").format(
                suffix=ROWS_SUFFIX, training=TRAINING_DATA.as_posix(), evaluation=EVALUATION_DATA.as_posix()
            )
            yield Problem(Code.STRAY, path, 0, found, where, _mend_stray(path))


def _is_allowed(path: Path) -> bool:
    return path.name.startswith(".") or any(path.match(pattern) for pattern in _ALLOWED_BESIDE_DATA)


def _mend_stray(path: Path) -> str:
    if path.suffix == ROWS_SUFFIX:
        return _("Muévelo a la carpeta de datos que le toque.")
    return _("Sácalo de aquí; si contiene filas, usa «sheily branches import».")


def _bad_description(branch: Branch) -> Iterator[Problem]:
    try:
        read_description(branch)
    except DataError as error:
        found = str(error.__cause__)
        yield Problem(Code.DESCRIPTION, branch.folder / DESCRIPTION_FILE, 0, found, _("TOML válido"), error.mend)


def _exact_duplicates(rows: Sequence[_Row]) -> Iterator[Problem]:
    """Rows whose folded texts stood before: in the same part of the branch, in its other part, or in another branch."""
    first: dict[tuple[object, ...], _Row] = {}
    for row in rows:
        text = (row.question, row.answer)
        scopes = ((*text, row.branch, row.held_out), (*text, row.branch), text)
        earlier = next((first[scope] for scope in scopes if scope in first), None)
        if earlier:
            yield _repetition(row, earlier, _("igual"), Code.DUPLICATE)
        for scope in scopes:
            first.setdefault(scope, row)


def _near_duplicates(rows: Sequence[_Row]) -> Iterator[Problem]:
    """Rows of one branch that ask and answer almost the same as an earlier one.

    The similarity is the mean of two cosines, between the questions and between the answers, each a set of words
    weighted by how rare they are in the branch. So a template ("what does … mean in physics?") counts for little, the
    term asked about for much, and rows with different terms or answers stay apart however short they are.

    Only rows that share one of their rarest words are compared: what a row has beyond those cannot reach the threshold
    (prefix filtering: Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007).
    """
    unique = _first_of_each_text(rows)
    vectors = _word_vectors(unique)
    frequency = Counter(word for vector in vectors for word in vector)
    index: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for number, vector in enumerate(vectors):
        rarest = _prefix(vector, frequency)
        candidates = {earlier for word in rarest for earlier in index[word]}
        similarities = ((_dot(vector, vectors[earlier]), earlier) for earlier in candidates)
        similarity, nearest = max(similarities, default=(0.0, number))
        if similarity >= NEAR_DUPLICATE:
            likeness = _("casi igual ({percent} %)").format(percent=round(100 * similarity))
            yield _repetition(unique[number], unique[nearest], likeness, Code.NEAR_DUPLICATE)
            continue  # its like is in the index already: a thousand variants of one row are compared with one
        for word in rarest:
            index[word].append(number)


def _first_of_each_text(rows: Sequence[_Row]) -> list[_Row]:
    first: dict[tuple[str, str], _Row] = {}
    for row in rows:
        first.setdefault((row.question, row.answer), row)
    return list(first.values())


def _word_vectors(rows: Sequence[_Row]) -> list[Vector]:
    """A vector per row over (side, word), of length 1; question and answer hold half of its square each."""
    vectors: list[dict[tuple[int, str], float]] = [{} for _row in rows]
    for side, texts in enumerate(([row.question for row in rows], [row.answer for row in rows])):
        words = [set(text.split()) for text in texts]
        frequency = Counter(word for row_words in words for word in row_words)
        rarity = {word: math.log(1 + len(rows) / count) for word, count in frequency.items()}
        for row, vector, row_words in zip(rows, vectors, words, strict=True):
            sides = bool(row.question) + bool(row.answer)
            length = math.sqrt(sides * sum(rarity[word] ** 2 for word in row_words))
            vector.update({(side, word): rarity[word] / length for word in row_words})
    return list(vectors)


def _prefix(vector: Vector, frequency: Mapping[tuple[int, str], int]) -> list[tuple[int, str]]:
    """The rarest words of a row, as many as it takes that the others alone are too short for NEAR_DUPLICATE."""
    prefix, rest = [], 1.0
    for word in sorted(vector, key=lambda word: (frequency[word], word)):
        if rest < NEAR_DUPLICATE**2:
            break
        prefix.append(word)
        rest -= vector[word] ** 2
    return prefix


def _dot(one: Vector, other: Vector) -> float:
    return sum(weight * other[word] for word, weight in one.items() if word in other)


def _repetition(row: _Row, earlier: _Row, likeness: str, within_part: Code) -> Problem:
    """The finding that ``row`` repeats ``earlier``; its kind depends on where the two stand."""
    place = f"{shown_path(earlier.file)}:{earlier.line}"
    found = _("{likeness} que {place}").format(likeness=likeness, place=place)
    if row.branch != earlier.branch:
        code, expected = Code.SHARED, _("cada fila en una sola rama")
        mend = _("Déjala en la rama que le toque.")
    elif row.held_out != earlier.held_out:
        code, expected = Code.LEAK, _("filas de evaluación que no se entrenen")
        mend = _("Quítala del entrenamiento, o la evaluación no dirá nada.")
    else:
        code, expected = within_part, _("filas distintas")
        mend = _("Borra una de las dos.")
    return Problem(code, row.file, row.line, found, expected, mend)
