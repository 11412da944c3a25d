from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sheily_train.cli.connect import connect
from sheily_train.colab import presets
from sheily_train.colab.presets import PRESETS, Settings, resolve
from sheily_train.core.omega.generator import TYPES
from sheily_train.errors import RequestError


def test_without_anything_five_hundred_vectors_go_in_batches_of_64() -> None:
    """The defaults are those of the guide."""
    settings = resolve(None, {})
    assert (settings.count, settings.lote, settings.tipo, settings.anomalias, settings.epocas) == (
        *(500, 64, "simple"),
        *(10.0, 1),
    )
    assert (settings.feedback, settings.diagnostico, settings.metricas) == (False, False, False)


def test_what_is_given_beats_the_preset() -> None:
    """Also an off beats an on; what is not given is the preset's."""
    settings = resolve("deteccion_anomalias", {"muestras": 7, "feedback": False, "lote": None})
    assert settings == replace(PRESETS["deteccion_anomalias"], muestras=7, feedback=False)
    assert resolve("prueba_rapida", {}).diagnostico


def test_a_file_is_read_whole_whatever_the_presets_count(tmp_path: Path) -> None:
    """A preset counts made-up vectors; of a file only an explicit count takes less."""
    assert resolve("prueba_rapida", {"datos": tmp_path / "x.npy"}).count is None
    assert resolve("prueba_rapida", {"datos": tmp_path / "x.npy", "muestras": 7}).count == 7
    assert resolve(None, {"datos": tmp_path / "x.npy"}).count is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"muestras": 0}, "--muestras vale 0"),
        ({"lote": 5000}, "--lote vale 5000; se esperaba un entero de 1 a 4096"),
        ({"epocas": 0}, "--epocas vale 0"),
        ({"epocas": True}, "--epocas vale True"),
        ({"semilla": -1}, "--semilla vale -1"),
        ({"paso": 0, "datos": Path("x.npy")}, "--paso vale 0"),
        ({"tipo": "lineal"}, "simple, temporal, neuronal"),
        ({"anomalias": 101.0}, "de 0 a 100"),
        ({"anomalias": float("nan")}, "de 0 a 100"),
        ({"paso": 100}, "--datos"),
        ({"etiquetas": "y"}, "--datos"),
    ],
)
def test_a_value_that_cannot_be_used_is_told(given: dict[str, Any], said: str) -> None:
    """With the flag's name and what was expected."""
    with pytest.raises(RequestError) as caught:
        resolve(None, given)
    assert said in str(caught.value)


def test_an_unknown_preset_is_told_with_the_known_ones() -> None:
    """All four of them."""
    with pytest.raises(RequestError, match="prueba_rapida, entrenamiento_estandar, deteccion_anomalias, entrenamiento"):
        resolve("rapida", {})


@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_survives_the_journal_and_gives_its_settings_back(name: str) -> None:
    """Through JSON; what does not decide the batches is no part of it."""
    settings = PRESETS[name]
    plan = json.loads(json.dumps(settings.plan()))
    assert plan == settings.plan()
    assert Settings.from_plan(plan) == replace(settings, diagnostico=False, metricas=False)


def test_a_plan_of_a_file_knows_the_file_wherever_it_is_read_from(tmp_path: Path, monkeypatch: Any) -> None:
    """The path is absolute; kind and share of made-up vectors say nothing."""
    monkeypatch.chdir(tmp_path)
    one = Settings(datos=Path("x.csv"), paso=10, etiquetas="y").plan()
    assert one == Settings(datos=tmp_path / "x.csv", paso=10, etiquetas="y", tipo="neuronal", anomalias=3.0).plan()
    assert Settings.from_plan(one).datos == tmp_path / "x.csv"
    assert Settings(paso=10, datos=Path("x.csv")).plan() != Settings(datos=Path("x.csv")).plan()


def test_every_setting_that_decides_the_batches_is_in_the_plan() -> None:
    """Another value of any of them is another plan."""
    base = Settings()
    for change in (
        *({"muestras": 9}, {"lote": 9}, {"tipo": "neuronal"}, {"anomalias": 9.0}),
        *({"semilla": 9}, {"epocas": 9}, {"feedback": True}, {"datos": Path("x.npy")}),
    ):
        assert replace(base, **change).plan() != base.plan(), change
    assert replace(base, metricas=True, diagnostico=True, muestras=500).plan() == base.plan()


def test_the_command_line_knows_the_same_kinds_and_presets() -> None:
    """The command's choices are written apart, so that --help loads nothing heavy."""
    choices = {option.name: getattr(option.type, "choices", ()) for option in connect.params}
    assert tuple(choices["preset"]) == tuple(PRESETS)
    assert tuple(choices["tipo"]) == presets.TYPES == TYPES
