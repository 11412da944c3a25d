"""Training that begins with another specialist's adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sheily_train import durable, paths
from sheily_train.core.training import fleet, hardware
from sheily_train.core.training.evaluation import compare_with_base
from sheily_train.core.training.identity import identify
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.trainer import train_model
from sheily_train.errors import Interrupted, RequestError
from sheily_train.runlog import Record
from tests.conftest import make_home
from tests.tiny import tiny_model

SETTINGS: dict[str, Any] = {"lora": True, "epochs": 3, "lr": 1e-2, "precision": "fp32"}


@pytest.fixture
def settings(home: Path, tiny_llama: Path) -> dict[str, Any]:
    """Those that all requests of a test share."""
    return {"model": str(tiny_llama)} | SETTINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The folder of an adapter that has learned from the rows of two branches."""
    root = make_home(tmp_path_factory.mktemp("common"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SHEILY_HOME", str(root))
        return train_model(TrainRequest(branch="common", model=str(tiny_llama), **SETTINGS)).folder


@pytest.fixture
def common(home: Path, trained: Path) -> Path:
    """Its copy among the test's own models."""
    return Path(shutil.copytree(trained, paths.models_dir() / "common"))


def physics(settings: dict[str, Any], **others: Any) -> TrainRequest:
    """A request for the specialist that begins with the common adapter."""
    return TrainRequest(**{"branch": "physics", "init_adapter": "common"} | settings | others)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / paths.ADAPTER_WEIGHTS)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / paths.ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_it_begins_where_the_other_ended(
    common: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of nearly no length leaves the common adapter's weights and loss; what is told as before is the base's."""
    monkeypatch.setattr(hardware, "cpu_has_fast_bf16", lambda: False)  # losses to six digits are those of fp32
    result = train_model(physics(settings, max_steps=1, lr=1e-12))
    begun, found = weights(common), weights(result.folder)
    assert found.keys() == begun.keys()
    for name, tensor in begun.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-11)
    judged = compare_with_base("physics", paths.branches_dir(), common)
    assert result.metrics["heldout_before"]["loss"] == pytest.approx(judged["base"]["loss"], rel=1e-6)
    assert result.metrics["heldout_after"]["loss"] == pytest.approx(judged["specialist"]["loss"], rel=1e-6)
    written = json.loads((result.folder / paths.TRAINING_CONFIG).read_text())
    assert written["initial_adapter"] == durable.sha256_file(common / paths.ADAPTER_WEIGHTS)
    assert "| Parte de | `common` |" in (result.folder / paths.MODEL_CARD).read_text()


def test_a_folder_serves_as_well_as_a_name(common: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The same adapter in a folder elsewhere leads to the same run, whose result is there already."""
    train_model(physics(settings))
    elsewhere = shutil.copytree(common, tmp_path / "elsewhere")
    assert train_model(physics(settings, init_adapter=str(elsewhere))).skipped


def test_another_adapter_is_another_run(common: Path, settings: dict[str, Any]) -> None:
    """The run is known by the adapter's weights: when they change it is done again, and not before."""
    first = weights(train_model(physics(settings)).folder)
    assert train_model(physics(settings)).skipped
    save_file({name: 2 * tensor for name, tensor in weights(common).items()}, common / paths.ADAPTER_WEIGHTS)
    again = train_model(physics(settings))
    assert not again.skipped
    assert any(not torch.equal(first[name], tensor) for name, tensor in weights(again.folder).items())


def test_it_is_read_once_for_all_branches(
    common: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What many branches begin with is hashed for the first, and anew when it has changed."""
    read: list[Path] = []
    sha256_file = durable.sha256_file
    monkeypatch.setattr(durable, "sha256_file", lambda file: read.append(file) or sha256_file(file))
    requests = [physics(settings, branch=branch) for branch in ("music", "physics")]
    first = [identify(request).initial for request in requests * 2]
    assert first == [sha256_file(common / paths.ADAPTER_WEIGHTS)] * 4
    save_file({name: 2 * tensor for name, tensor in weights(common).items()}, common / paths.ADAPTER_WEIGHTS)
    assert identify(requests[0]).initial == sha256_file(common / paths.ADAPTER_WEIGHTS) != first[0]
    assert read.count(common / paths.ADAPTER_WEIGHTS) == 2


def test_cut_off_it_goes_on_to_the_same_bits(common: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """What goes on from a checkpoint does not begin with the common adapter a second time."""
    undisturbed = train_model(physics(settings, output=tmp_path / "undisturbed"))

    def stop(record: Record) -> None:
        if record["event"] == "step" and record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_model(physics(settings), listeners=(stop,))
    went_on = train_model(physics(settings))
    assert (went_on.folder / paths.ADAPTER_WEIGHTS).read_bytes() == (
        undisturbed.folder / paths.ADAPTER_WEIGHTS
    ).read_bytes()


def test_side_by_side_each_begins_with_it(common: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Two branches that take their steps together end as they do alone."""
    requests = [physics(settings, branch=branch, together=2) for branch in ("music", "physics")]
    for outcome in fleet.train_branches(requests):
        assert outcome.result is not None
        alone = train_model(physics(settings, branch=outcome.branch, output=tmp_path / outcome.branch))
        for name, tensor in weights(alone.folder).items():
            torch.testing.assert_close(weights(outcome.result.folder)[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "told", "mend"),
    [
        ({"init_adapter": "music"}, "no hay ningún adaptador", "sheily train --branch music --lora"),
        ({"init_adapter": "/nowhere"}, "no hay ningún adaptador", "Da la carpeta"),
        ({"branch": "common"}, "la misma carpeta", "--output"),
        ({"lora_r": 4}, "sus tensores no son los pedidos", "--lora-r 8 --lora-alpha 16"),
        ({"lora_targets": ("q_proj",)}, "sus tensores no son los pedidos", "down_proj,gate_proj,k_proj,o_proj"),
        ({"lora_alpha": 8.0}, "su escala no es la pedida", "--lora-alpha 16"),
    ],
)
def test_one_that_does_not_fit_is_told(
    common: Path, settings: dict[str, Any], asked: dict[str, Any], told: str, mend: str
) -> None:
    """Before anything is trained: what does not fit, and what to ask for instead."""
    with pytest.raises(RequestError, match=told) as caught:
        train_model(physics(settings, **asked))
    assert mend in (caught.value.mend or "")


def test_one_of_another_base_is_told(common: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Another base with layers of the same shapes is another base."""
    other = tiny_model(tmp_path / "other", "mistral")
    with pytest.raises(RequestError, match="es de la base"):
        train_model(physics(settings, model=str(other)))


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"r": 0}, {"r": "8"}])
def test_another_scale_than_ours_is_told(common: Path, settings: dict[str, Any], change: dict[str, Any]) -> None:
    """Adapters of other tools may multiply in another way; they are not taken for ours."""
    change_config(common, **change)
    with pytest.raises(RequestError, match="su escala"):
        train_model(physics(settings))


@pytest.mark.parametrize("file", [paths.ADAPTER_WEIGHTS, paths.ADAPTER_CONFIG])
def test_a_damaged_one_is_told(common: Path, settings: dict[str, Any], file: str) -> None:
    """Half a file is named, and nothing is begun."""
    content = (common / file).read_bytes()
    (common / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(RequestError, match="no se puede leer"):
        train_model(physics(settings))
    assert not (paths.models_dir() / "physics").exists()


def test_a_configuration_that_is_none_is_told(common: Path, settings: dict[str, Any]) -> None:
    """JSON of another kind is not taken for one."""
    (common / paths.ADAPTER_CONFIG).write_text("8")
    with pytest.raises(RequestError, match="no se puede leer"):
        train_model(physics(settings))


def test_one_that_changes_meanwhile_is_told(common: Path, settings: dict[str, Any]) -> None:
    """A run never begins with other weights than those it is known by."""

    def change(record: Record) -> None:
        if record["event"] == "eval":
            (common / paths.ADAPTER_WEIGHTS).write_bytes(b"others")

    with pytest.raises(RequestError, match="ha cambiado"):
        train_model(physics(settings), listeners=(change,))


def test_it_needs_an_adapter_to_train(settings: dict[str, Any]) -> None:
    """Training every weight cannot begin with an adapter."""
    with pytest.raises(RequestError, match="--init-adapter sin --lora"):
        replace(physics(settings), lora=False)
