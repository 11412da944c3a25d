"""The report of a run log: its three files, its page, and what it does with logs that are short, cut or damaged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sheily_train.colab.report import write_report
from sheily_train.colab.story import read_story
from sheily_train.errors import DataError, RequestError, ResourceError
from tests.colab.made_logs import session, step, wire, write_log
from tests.full_disk import full_disk_after


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "metrics.jsonl", *session())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The report of a session, to be read only."""
    folder = tmp_path_factory.mktemp("report")
    return write_report(write_log(folder / "metrics.jsonl", *session()), folder / "informe.html")


def summary(files: list[Path]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
    return dict(content["summary"])


@pytest.mark.parametrize("name", ["informe.html", "informe.json", "informe.md", "Informe.HTML"])
def test_any_of_the_three_names_writes_the_three(tmp_path: Path, name: str) -> None:
    """HTML, JSON and Markdown stand side by side, the named one spelt as it was asked for; nothing else is left."""
    log = write_log(tmp_path / "metrics.jsonl", *session()[:2])
    files = write_report(log, tmp_path / name)
    stem = name.partition(".")[0]
    assert [file.name.lower() for file in files] == [f"{stem}{suffix}".lower() for suffix in (".html", ".json", ".md")]
    assert tmp_path / name in files
    assert {*files, log} == set(tmp_path.iterdir())


def test_page_and_notes_tell_the_same_numbers(files: list[Path]) -> None:
    """What the JSON says stands in the HTML and in the Markdown, in Spanish."""
    page, _json, notes = (file.read_text(encoding="utf-8") for file in files)
    assert summary(files) == asdict(read_story(files[0].with_name("metrics.jsonl")).summary)
    for text in (page, notes):
        for words in ("8 lotes, 492 vectores", "baja", "0.6000", "13.0\u202f%", "350\u202fms", "755\u202fms", "246"):
            assert words in text
    assert "| Reintentos | 1 |" in notes
    assert "| 1 | 64 | 2.0000 | 12.5\u202f% | 100\u202fms |" in notes


class Page(HTMLParser):
    """What could make a page depend on others, and what makes it sound."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in {"src", "href", "xlink:href", "data", "action", "srcset"}:
                self.links.append(str(value))
            assert not name.startswith("on"), "no script"


def test_the_page_stands_alone(files: list[Path]) -> None:
    """Four inline plots with a text of their own; no script, nothing from outside, no id twice, no dangling one."""
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 4
    assert text.count('role="img" aria-label="') == 4
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "://" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))


def test_the_page_suits_the_screen(files: list[Path]) -> None:
    """Its plots have the page's colours, which are defined for light and for dark; a phone shows it at its width."""
    text = files[0].read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root {(.*?)}", text, re.DOTALL))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= light == dark
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id="|href="#|url\(#)[\w-]+', "", svgs))


def test_the_same_log_gives_the_same_bytes(files: list[Path], log: Path, tmp_path: Path) -> None:
    """No clock and no chance in it, so that reports can be compared."""
    again = write_report(log, tmp_path / "informe.html")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_an_empty_log_is_told_as_such(tmp_path: Path) -> None:
    """No plot, no number made up."""
    files = write_report(write_log(tmp_path / "vacio.jsonl"), tmp_path / "informe.html")
    assert {value for value in summary(files).values() if not isinstance(value, dict)} == {None, 0}
    text = files[0].read_text(encoding="utf-8")
    assert "no hay nada que medir" in text
    assert "<svg" not in text


def test_one_batch_is_no_trend(tmp_path: Path) -> None:
    """Its numbers stand there, but nothing is said of a tendency, and no curve of one point is drawn."""
    log = write_log(tmp_path / "uno.jsonl", step(1, 0.5), wire(1, 12.0), ("done", {"seconds": 4.0}))
    files = write_report(log, tmp_path / "informe.html")
    text = files[0].read_text(encoding="utf-8")
    assert "Un lote, 64 vectores. Son pocos lotes para hablar de tendencia." in text
    assert "Un solo dato, 0.5000" in text
    assert "12.0\u202fs" in text
    assert "<svg" not in text
    assert summary(files)["vectors_per_second"] == 16


def test_a_cut_session_says_so_and_claims_no_rate(tmp_path: Path) -> None:
    """Without its end nobody knows how long it took; a line cut in the middle is passed over."""
    log = write_log(tmp_path / "cortado.jsonl", *session()[:-1])
    with log.open("ab") as file:
        file.write(b'{"event": "step", "se')
    files = write_report(log, tmp_path / "informe.md")
    assert summary(files)["finished"] is False
    assert summary(files)["vectors_per_second"] is None
    assert "no llega al final de la sesión" in files[2].read_text(encoding="utf-8")


def test_several_sessions_have_a_table_of_their_own(tmp_path: Path) -> None:
    """One line each, from what they counted themselves when they ended."""
    counts = {"batches": 1, "vectors": 64, "loss": 0.5, "anomalies": 16, "seconds": 2.0}
    events = [
        each for n in (1, 2) for each in (("session", {"number": n}), step(n, 1.0), ("done", {"session": n, **counts}))
    ]
    page, _json, notes = write_report(write_log(tmp_path / "l.jsonl", *events), tmp_path / "i.html")
    assert "| 2 | 1 | 64 | 0.5000 | 25.0\u202f% | 32 |" in notes.read_text(encoding="utf-8")
    assert "2 sesiones" in page.read_text(encoding="utf-8")


def test_what_a_worker_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    """A loss that is no number, and a worker that counts no anomalies, leave a gap and a dash."""
    events = [step(seq, None if seq == 2 else 1.0, anomalies=None) for seq in range(1, 6)]
    files = write_report(write_log(tmp_path / "l.jsonl", *events), tmp_path / "i.html")
    found = summary(files)
    assert (found["batches"], found["anomalies"], found["anomaly_share"], found["tendency"]) == (5, None, None, "flat")
    text = files[0].read_text(encoding="utf-8")
    assert "no dice cuántas anomalías" in text
    assert text.count("<svg") == 1


def test_a_long_log_gives_a_page_that_a_phone_can_open(tmp_path: Path) -> None:
    """Four thousand batches are summed up in the plots: the page stays small, and says so."""
    events = [
        each for seq in range(1, 4001) for each in (step(seq, 4000 / seq), wire(seq, 9.0 if seq % 97 == 0 else 0.1))
    ]
    page, data, _notes = write_report(write_log(tmp_path / "l.jsonl", *events), tmp_path / "i.html")
    text = page.read_text(encoding="utf-8")
    assert len(text) < 250_000
    assert "Cada punto resume varios lotes." in text
    assert "Cada punto resume varios envíos. Escala logarítmica." in text
    assert len(json.loads(data.read_text())["steps"]) == 4000


def test_the_reasons_of_retries_are_words(tmp_path: Path) -> None:
    """In the tables; the JSON has the log's own."""
    log = write_log(tmp_path / "l.jsonl", ("retry", {"reason": "connection", "attempt": 1, "wait": 1.0}))
    page, data, notes = (file.read_text(encoding="utf-8") for file in write_report(log, tmp_path / "i.html"))
    assert "| no hay conexión | 1 |" in notes
    assert "no hay conexión" in page
    assert json.loads(data)["summary"]["retry_reasons"] == {"connection": 1}


def test_text_from_outside_cannot_break_out(tmp_path: Path) -> None:
    """A reason that is HTML is shown as text, and one with bars keeps the table whole."""
    reason = "<script>alert(1)</script> | a\nb"
    log = write_log(tmp_path / "l.jsonl", ("retry", {"reason": reason, "attempt": 1, "wait": 1.0}))
    page, _json, notes = (file.read_text(encoding="utf-8") for file in write_report(log, tmp_path / "i.html"))
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;" in page
    assert "| <script>alert(1)</script> \\| a b | 1 |" in notes


@pytest.mark.parametrize(
    ("target", "found"), [("informe.pdf", "no acaba en"), ("informe", "no acaba en"), ("no/informe.html", "No existe")]
)
def test_a_target_that_cannot_be_is_refused(log: Path, tmp_path: Path, target: str, found: str) -> None:
    """Another suffix, or a folder that is not there: what is wrong, and what to do."""
    with pytest.raises(RequestError, match=found) as caught:
        write_report(log, tmp_path / target)
    assert caught.value.mend
    assert list(tmp_path.iterdir()) == [log]


def test_a_folder_in_the_way_is_refused(log: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    (tmp_path / "informe.json").mkdir()
    with pytest.raises(RequestError, match="es una carpeta"):
        write_report(log, tmp_path / "informe.html")
    assert not (tmp_path / "informe.html").exists()


@pytest.mark.parametrize("name", ["informe.html", "informe.json", "informe.md"])
@pytest.mark.parametrize("content", ["# Mis notas\n", '{"format": 1}', "<html><title>Informe</title>"])
def test_only_a_report_is_replaced(tmp_path: Path, name: str, content: str) -> None:
    """A file of the person's own beside the one that was asked for, or in its place, is named and left as it is."""
    log, own = write_log(tmp_path / "metrics.jsonl", step(1, 1.0)), tmp_path / name
    own.write_text(content)
    with pytest.raises(RequestError, match=rf"{name} ya existe y no es un informe"):
        write_report(log, tmp_path / "informe.html")
    assert set(tmp_path.iterdir()) == {own, log}
    assert own.read_text() == content
    own.write_text("")
    assert write_report(log, tmp_path / "informe.html") == write_report(log, tmp_path / "informe.md")


def test_a_damaged_log_leaves_no_report(tmp_path: Path) -> None:
    """Its error comes before the first file is written."""
    log = write_log(tmp_path / "l.jsonl", step(1, 1.0))
    with log.open("ab") as file:
        file.write(b"{broken\n")
    with pytest.raises(DataError, match=r"l\.jsonl:2"):
        write_report(log, tmp_path / "informe.html")
    assert list(tmp_path.iterdir()) == [log]


def test_a_full_disk_leaves_the_earlier_report(log: Path, tmp_path: Path) -> None:
    """The old page is whole, no half file stands beside it, and the error says why."""
    page = write_report(log, tmp_path / "informe.html")[0]
    before = page.read_bytes()
    with log.open("ab") as file:
        file.write(b'{"event": "resync"}\n')
    with full_disk_after(1000), pytest.raises(ResourceError, match="No se pudo escribir el informe"):
        write_report(log, page)
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_the_module_is_light_and_leaves_no_global_figure(tmp_path: Path) -> None:
    """Its import loads no library; a report loads no pyplot."""
    code = """
import sys
from pathlib import Path
from sheily_train.colab.report import write_report
assert not {"matplotlib", "jinja2", "numpy", "torch"} & set(sys.modules)
folder = Path(sys.argv[1])
line = '{"event": "step", "seq": %d, "samples": 1, "loss": 1.0}'
(folder / "l.jsonl").write_text(line % 1 + "\\n" + line % 2 + "\\n")
write_report(folder / "l.jsonl", folder / "i.html")
assert "matplotlib.figure" in sys.modules and not {"matplotlib.pyplot", "torch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
