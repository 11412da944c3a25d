"""Base models: named, loaded, identified, and refused for a reason that a person understands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training import bases, embedded
from sheily_train.errors import BaseModelError, RequestError, ResourceError


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny model's folder that the test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def load(folder: Path) -> Any:
    import torch

    return bases.load_model(str(folder), dtype=torch.float32, device="cpu")


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_importing_and_listing_loads_nothing_heavy(cache: Path) -> None:
    """`sheily models list` must be light: neither torch nor transformers are loaded."""
    code = "import sys; from sheily_train.core.training import bases; print(bases.list_bases()[0].state, *sys.modules)"
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert words[0] == "absent"
    assert not {"torch", "transformers", "gguf", "numpy", "huggingface_hub"} & set(words)


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm2"])
def test_a_misspelt_embedded_name_gets_a_suggestion(name: str) -> None:
    """A name close to the embedded one is answered with it."""
    with pytest.raises(RequestError, match=r"¿Quizá smollm2-135m\?"):
        bases.locate(name)


def test_a_name_that_can_be_nothing_is_refused() -> None:
    """A bare word is neither a folder nor a hub id."""
    with pytest.raises(RequestError, match="organización/modelo"):
        bases.locate("llama")


@pytest.mark.parametrize("name", ["./no-hay", "~/no-hay", "no/hay/tal", "/no/hay"])
def test_a_path_that_does_not_exist_is_called_so(name: str) -> None:
    """What looks like a path is not sent to the hub."""
    with pytest.raises(BaseModelError, match="No existe la carpeta"):
        bases.locate(name)


def test_a_file_is_not_a_base(tmp_path: Path) -> None:
    """A single file is refused with what was expected."""
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BaseModelError, match="se esperaba una carpeta"):
        bases.locate(str(tmp_path / "model.gguf"))


def test_folders_and_hub_ids_are_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder becomes its absolute path, a hub id stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert bases.locate("mine/model") == str(tmp_path.resolve() / "mine" / "model")
    assert bases.locate("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


def test_the_embedded_model_is_plain_and_quick(embedded_base: Path, tiny_llama: Path) -> None:
    """It comes in evaluation mode, unquantised, tied, in the asked precision, in under two seconds."""
    import torch

    load(tiny_llama)  # so that transformers' modules are imported
    for dtype in (torch.float32, torch.bfloat16):
        start = time.perf_counter()
        model: Any = bases.load_model(bases.EMBEDDED, dtype=dtype, device="cpu", attention="eager")
        assert time.perf_counter() - start < 2
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert model.config._attn_implementation == "eager"
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_loading_says_nothing(embedded_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No bar, no warning, no advice on either stream."""
    import torch

    bases.load_model(bases.EMBEDDED, dtype=torch.bfloat16, device="cpu")
    bases.load_tokenizer(bases.EMBEDDED)
    assert capfd.readouterr() == ("", "")


def test_a_folder_loads(folder: Path) -> None:
    """Model, tokenizer and configuration of a plain folder."""
    assert load(folder).name_or_path == str(folder)
    assert bases.load_tokenizer(str(folder)).pad_token == "<|im_end|>"
    assert bases.load_config(str(folder)).num_hidden_layers == 2
    assert bases.get(str(folder)) == folder


def test_the_identity_of_a_folder_is_its_content(folder: Path, tmp_path: Path) -> None:
    """The same files elsewhere are the same base; notes beside them do not count; another weight does."""
    first = bases.identity(str(folder))
    (folder / "README.md").write_text("notas")
    assert bases.identity(str(folder)) == bases.identity(str(shutil.copytree(folder, tmp_path / "b"))) == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert bases.identity(str(folder)) != first
    assert bases.identity(bases.EMBEDDED) == f"sha256:{embedded.WHEEL_SHA256}"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """No config.json; and if it is an adapter, the hint says so."""
    with pytest.raises(BaseModelError, match=r"no tiene config\.json"):
        bases.load_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="Es un adaptador LoRA"):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "t5", "architectures": None},
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
    ],
)
def test_a_model_that_does_not_generate_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Encoders, classifiers and translators are not causal language models."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="se esperaba un modelo de lenguaje causal"):
        bases.load_config(str(tmp_path))


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    """A model with code of its own is refused, without a question and without running it."""
    (folder / "mine.py").write_text("raise SystemExit('ejecutado')")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    with pytest.raises(BaseModelError, match="propio código no se admiten"):
        bases.load_config(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    """A folder that holds only .bin weights is told to convert them."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="no tiene pesos en formato safetensors"):
        load(folder)


def test_damaged_folders_say_so(folder: Path) -> None:
    """Weights cut short, weights of another shape, weights missing, a configuration or tokenizer that is no JSON."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        load(folder)
    weights.write_bytes(whole)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(BaseModelError, match=r"le faltan 9 pesos, como model\.layers\.2"):
        load(folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        bases.load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        bases.load_config(str(folder))


def test_a_model_larger_than_memory_is_a_resource_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own MemoryError becomes exit code 5 with what to do."""
    from transformers import AutoModelForCausalLM

    def too_large(*_arguments: Any, **_options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    with pytest.raises(ResourceError, match="no cabe en la memoria"):
        load(folder)


def test_a_wheel_is_for_the_embedded_base_alone(tmp_path: Path) -> None:
    """Any other base refuses it before anything is looked for."""
    with pytest.raises(RequestError, match="--wheel solo sirve"):
        bases.get("org/model", wheel=tmp_path / "no.whl")
