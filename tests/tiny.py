"""Tiny models for tests: real architectures and a real tokenizer, made in a second, the same bits every time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|im_end|>"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", EOS)
_SENTENCES = (
    "La gravedad atrae los cuerpos hacia el centro de la Tierra.",
    "La velocidad es el espacio recorrido dividido por el tiempo.",
    "¿Qué es la energía? La energía es la capacidad de realizar un trabajo.",
    "El corazón bombea la sangre por todo el cuerpo.",
    "El agua hierve a cien grados al nivel del mar.",
    "Un átomo tiene un núcleo con protones y neutrones.",
    "### Instrucción:\n¿Cuál es la unidad de la fuerza?\n\n### Respuesta:\nEl newton.",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi")


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 340 tokens and save it. As in SmolLM2, pad is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    untyped: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = untyped(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token=EOS, pad_token=EOS, unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_model(folder: Path, architecture: str = "llama") -> Path:
    """Save a model of 2 layers, 32 wide, with its tokenizer; its weights are drawn from a fixed seed.

    Args:
        folder: created if absent.
        architecture: one of :data:`ARCHITECTURES`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer(folder)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=architecture in ("llama", "gemma"),
        **_SHAPE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untyped: Any = AutoModelForCausalLM
        model = untyped.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
