from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training.request import TrainRequest, flag, resolve, settings
from sheily_train.errors import RequestError


def write(folder: Path, content: str, name: str = "run.yaml") -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def from_file(folder: Path, content: str) -> dict[str, Any]:
    return resolve({}, {}, write(folder, content))


def test_flag_comes_before_environment_before_file_before_default(tmp_path: Path) -> None:
    """Each source fills what the stronger ones left open; a flag that was not given is None."""
    file = write(tmp_path, "epochs: 1\nlr: 0.1\nseed: 1")
    given = resolve({"epochs": "3", "lr": None}, {"SHEILY_EPOCHS": "2", "SHEILY_LR": "0.2", "SHEILY_MODEL": ""}, file)
    assert given == {"epochs": 3.0, "lr": 0.2, "seed": 1}
    assert TrainRequest(**given).model == TrainRequest().model


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("num_train_epochs: 2", "epochs", 2.0),
        ("per_device_train_batch_size: 4", "batch_size", 4),
        ("gradient-accumulation-steps: 2", "gradient_accumulation", 2),
        ("learning_rate: 2e-4", "lr", 2e-4),
        ("lr-scheduler-type: linear", "schedule", "linear"),
        ("model_name_or_path: gpt2", "model", "gpt2"),
        ("output_dir: out", "output", Path("out")),
        ("lora-r: 4", "lora_r", 4),
    ],
)
def test_a_file_may_use_the_names_of_the_ecosystem(line: str, name: str, value: object, tmp_path: Path) -> None:
    """transformers' names, and hyphens for underscores; ``2e-4``, a text in YAML 1.1, is a number."""
    assert from_file(tmp_path, line) == {name: value}


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("epochs", "1.5", 1.5),
        ("epochs", 2, 2.0),
        ("batch_size", "16", 16),
        ("batch_size", 16.0, 16),
        ("lora", True, True),
        ("lora", "Sí", True),
        ("lora", " on ", True),
        ("lora", "0", False),
        ("lora", "no", False),
        ("lr", None, None),
        ("lora_targets", "q_proj, v_proj,", ("q_proj", "v_proj")),
        ("lora_targets", ["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ("output", "~/out", Path("~/out").expanduser()),
        ("model", 7, "7"),
    ],
)
def test_a_value_becomes_the_type_of_its_setting(name: str, value: object, result: object, tmp_path: Path) -> None:
    """From the text of a flag or a variable as from a file's value."""
    given = from_file(tmp_path, json.dumps({name: value}))
    assert given == {name: result}
    assert type(given[name]) is type(result)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "tres", "un número"),
        ("epochs", True, "un número"),
        ("epochs", None, "un número"),
        ("batch_size", "2.5", "un número entero"),
        ("batch_size", 2.5, "un número entero"),
        ("lora", "quizá", "true o false"),
        ("model", ["a"], "un texto"),
        ("output", 3, "una ruta"),
        ("lora_targets", [1], "una lista de nombres"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object, expected: str, tmp_path: Path) -> None:
    """The message names where it stood, the setting, its value and what was expected."""
    with pytest.raises(RequestError, match=expected) as caught:
        from_file(tmp_path, json.dumps({name: value}))
    assert f"run.yaml: {name} vale «{value}»" in caught.value.message


def test_a_bad_variable_is_named() -> None:
    """The message says which variable, or which flag, holds what, once."""
    with pytest.raises(RequestError, match=r"^SHEILY_EPOCHS vale «muchas»; se esperaba un número"):
        resolve({}, {"SHEILY_EPOCHS": "muchas"}, None)
    with pytest.raises(RequestError, match=r"^--lr vale «1,5»; se esperaba un número"):
        resolve({"lr": "1,5"}, {}, None)


@pytest.mark.parametrize(
    ("key", "near"), [("epoch", "«epochs»"), ("learning_rat", "«learning_rate»"), ("zzz", "Los ajustes son: branch,")]
)
def test_an_unknown_setting_suggests_the_near_one(key: str, near: str, tmp_path: Path) -> None:
    """Of our own names and of the ecosystem's; without a near one, all are listed."""
    with pytest.raises(RequestError, match=f"ajuste desconocido «{key}»") as caught:
        from_file(tmp_path, f"{key}: 1")
    assert near in caught.value.mend


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b", "contiene list"),
        ("", "contiene NoneType"),
        ("request: physics", "contiene str"),
        ("a: [1", "no se puede leer"),
        (None, "No existe"),
    ],
)
def test_a_file_without_settings_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    """Another value than pairs, broken YAML, no file."""
    file = tmp_path / "run.yaml" if content is None else write(tmp_path, content)
    with pytest.raises(RequestError, match=message):
        resolve({}, {}, file)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0.0, "más de 0"),
        ("epochs", math.inf, "finito"),
        ("lr", math.nan, "finito"),
        ("lr", 0.0, "más de 0"),
        ("batch_size", 0, "1 o más"),
        ("max_length", 7, "8 o más"),
        ("seed", 2**32, "4294967295 como mucho"),
        ("lora_dropout", 1.0, "0.99 como mucho"),
        ("precision", "int8", "uno de: auto, bf16, fp16, fp32"),
        ("lora_targets", (), "vacío"),
    ],
)
def test_a_value_out_of_bounds_is_refused(name: str, value: object, expected: str) -> None:
    """With the flag and what was expected; the bound itself is checked by the next test."""
    with pytest.raises(RequestError, match=expected) as caught:
        TrainRequest(**{name: value})  # type: ignore[arg-type]
    assert flag(name) in str(caught.value)


def test_the_bounds_themselves_are_allowed() -> None:
    """Inclusive ones at least, and the defaults."""
    TrainRequest(batch_size=1, max_length=8, seed=2**32 - 1, lora_dropout=0.99, max_grad_norm=0.0, weight_decay=0.0)


def test_an_earlier_runs_config_repeats_its_request(tmp_path: Path) -> None:
    """``training_config.json`` as ``--config`` gives back every setting, those left to their default included."""
    request = TrainRequest(branch="physics", lora=True, lr=2e-4, lora_targets=("q_proj",), output=tmp_path / "out")
    file = write(tmp_path, json.dumps({"request": request.to_json(), "key": "0", "files": {}}), "training_config.json")
    assert TrainRequest(**resolve({}, {}, file)) == request


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"output": Path("elsewhere"), "branches_dir": Path("there")}, True),
        ({"save_steps": 5, "save_minutes": 9.0, "micro_tokens": 64}, True),
        ({"seed": 1}, False),
        ({"branch": "music"}, False),
        ({"lora_targets": ("q_proj",)}, False),
        ({"lr": 5e-5, "lora_alpha": 16.0}, True),
        ({"lr": 6e-5}, False),
    ],
)
def test_identity_is_what_decides_the_weights(change: dict[str, Any], same: bool) -> None:
    """Where things are put, how often they are saved, and a default that is spelled out make no other run."""
    request = TrainRequest(branch="physics")
    assert (replace(request, **change).identity() == request.identity()) is same
    assert json.loads(json.dumps(request.identity())) == request.identity()


@pytest.mark.parametrize(
    ("fields", "uses_adapter", "rate", "alpha"),
    [
        ({}, False, 5e-5, 16.0),
        ({"lora": True}, True, 1e-3, 16.0),
        ({"qlora": True, "lora_r": 4}, True, 1e-3, 8.0),
        ({"lora": True, "lora_targets": ("q_proj", "v_proj")}, True, 3.5e-3, 16.0),
        ({"lora": True, "lora_targets": ("v_proj",)}, True, 4e-3, 16.0),
        ({"lora": True, "lora_targets": tuple("abcdefgh")}, True, 1e-3, 16.0),
        ({"lora": True, "lr": 0.5, "lora_alpha": 3.0}, True, 0.5, 3.0),
    ],
)
def test_what_was_left_open_follows_from_the_method(
    fields: dict[str, Any], uses_adapter: bool, rate: float, alpha: float
) -> None:
    """Learning rate by method and adapted layers, adapter scale by rank; what was asked stays."""
    request = TrainRequest(**fields)
    assert (request.uses_adapter, request.learning_rate, request.effective_alpha) == (uses_adapter, rate, alpha)


def test_the_model_goes_to_its_branchs_folder_unless_told(home: Path) -> None:
    """Below the project's models, or where ``--output`` says; branches are the project's own."""
    assert TrainRequest(branch="physics").model_folder == home / "var" / "central_models" / "physics"
    assert TrainRequest(branch="physics", output=Path("x")).model_folder == Path("x")
    assert TrainRequest().branches_dir == home / "all-Branches"
    assert TrainRequest(batch_size=4, gradient_accumulation=3).examples_per_step == 12


def test_no_two_settings_share_a_name() -> None:
    """Flags and the ecosystem's names are all different, and each has its sentence."""
    names = [name for item in settings() for name in (flag(item.name), *item.metadata["aliases"])]
    assert len(names) == len({name.replace("_", "-") for name in names})
    assert all(item.metadata["help"].endswith(".") or ";" in item.metadata["help"] for item in settings())
