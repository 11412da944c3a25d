"""The packed way through a model against the padded one of transformers and PEFT: losses and gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sheily_train.core.training import kernels
from sheily_train.core.training.adapters import create_lora_model, leave_types_to_autocast, quiet_peft
from sheily_train.core.training.data import IGNORED, TokenRow
from sheily_train.core.training.forward import PACKED_MODELS, PackedForward, PaddedForward, choose_forward
from sheily_train.core.training.fused_layers import fused_layers
from sheily_train.core.training.lora_product import lora_layers
from sheily_train.core.training.request import TrainRequest
from sheily_train.core.training.training_router import Placement

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 6},
}


def placement(precision: str = "fp32", method: str = "lora", attention: str = "eager") -> Placement:
    return Placement("cpu", "cpu", precision, method, attention, 1024, "")


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | VARIANTS.get(kind, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # scores and logits that reach the caps
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def adapted(model: Any, names: Sequence[str] = ("default",), **settings: Any) -> Any:
    request = TrainRequest(lora=True, lora_r=4, **settings)
    lora = create_lora_model(model, request)
    leave_types_to_autocast(lora)
    with quiet_peft():
        for name in names:
            if name not in lora.peft_config:
                lora.add_adapter(name, lora.peft_config["default"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.requires_grad_("lora_" in name)
    return lora


def some_rows(count: int, seed: int = 0) -> list[TokenRow]:
    """Rows that begin with one of two prompts and go on, in two turns, to answers of several lengths."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(size)] for size in (4, 7)]
    rows = []
    for index in range(count):
        ids, labels = list(prompts[index % 2]), [IGNORED] * len(prompts[index % 2])
        for _turn in range(2):
            asked, told = ([chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(1, 9))] for _ in range(2))
            ids += asked + told
            labels += [IGNORED] * len(asked) + told
        rows.append(TokenRow(tuple(ids), tuple(labels), f"x:{index}"))
    return rows


@dataclass
class Pass:
    """A loss and the gradients that it leaves."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def distance(self, other: Pass) -> float:
        """The largest relative distance between two passes' gradients, parameter by parameter."""
        assert self.gradients.keys() == other.gradients.keys()
        norms = {
            name: (gradient - other.gradients[name]).norm() / other.gradients[name].norm()
            for name, gradient in self.gradients.items()
        }
        return max(float(value) for value in norms.values())


def through(forward: Any, model: Any, rows: Sequence[TokenRow]) -> Pass:
    model.zero_grad()
    loss = forward.losses([rows])[0]
    (loss / 50).backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return Pass(loss.item(), found)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", sorted(PACKED_MODELS))
def test_packed_gradients_equal_the_padded_ones(kind: str, attention: str) -> None:
    """Eight architectures in fp32: the loss and every gradient within 1e-5, with windows shorter than the rows."""
    model = adapted(tiny(kind)).train()
    packed = choose_forward(model, placement(attention=attention))
    assert isinstance(packed, PackedForward)
    ours = through(packed, model, some_rows(6))
    theirs = through(PaddedForward(model, placement()), model, some_rows(6))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert len(theirs.gradients) >= 24
    assert ours.distance(theirs) < 1e-5


@pytest.mark.parametrize("kind", sorted(PACKED_MODELS))
def test_packed_gradients_in_bf16_are_as_near_to_the_exact_ones_as_the_padded(kind: str) -> None:
    """Both ways err from fp32 by the noise of bf16: ours by no more than one and a half times the padded one's."""
    rows = some_rows(6)
    exact_model = adapted(tiny(kind, torch.bfloat16).float()).train()
    exact = through(PaddedForward(exact_model, placement()), exact_model, rows)
    model = adapted(tiny(kind, torch.bfloat16)).train()
    ours = through(choose_forward(model, placement("bf16")), model, rows)
    theirs = through(PaddedForward(model, placement("bf16")), model, rows)

    def error(found: Pass) -> float:
        off = sum(float((found.gradients[name] - exact.gradients[name]).square().sum()) for name in exact.gradients)
        return (off / sum(float(gradient.square().sum()) for gradient in exact.gradients.values())) ** 0.5

    assert 0 < error(ours) < max(1.5 * error(theirs), 0.02)
    assert ours.loss == pytest.approx(exact.loss, rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_all_weights_get_the_padded_gradients_too(kind: str) -> None:
    """Training every weight, head and embeddings included, takes the packed way as well."""
    model = tiny(kind).train()
    ours = through(choose_forward(model, placement(method="full")), model, some_rows(5))
    theirs = through(PaddedForward(model, placement(method="full")), model, some_rows(5))
    assert ours.distance(theirs) < 1e-5


def test_groups_through_their_own_adapters_equal_each_alone() -> None:
    """Three adapters in one pass, rows of several lengths: each loss and gradient is that of its adapter alone."""
    names = ("default", "second", "third")
    model = adapted(tiny("llama"), names).train()
    forward = PackedForward(model, placement())
    groups = [some_rows(4, seed=1), some_rows(1, seed=2), some_rows(3, seed=1)]
    model.zero_grad()
    losses = forward.losses(groups, names)
    (losses * torch.tensor([0.5, 2.0, 1.0])).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for group, name, weight, loss in zip(groups, names, (0.5, 2.0, 1.0), losses.tolist(), strict=True):
        model.zero_grad()
        alone = forward.losses([group], [name])[0]
        (alone * weight).backward()
        assert loss == pytest.approx(alone.item(), rel=1e-6)
        own = {key: p.grad for key, p in model.named_parameters() if f".{name}." in key}
        assert len(own) == 42
        for key, gradient in own.items():
            assert gradient is not None
            assert (together[key] - gradient).norm() <= 1e-6 * gradient.norm()


def test_a_switched_off_adapter_leaves_the_base() -> None:
    """Inside PEFT's disable_adapter the packed loss is the base's own."""
    model = adapted(tiny("qwen3"))
    forward, rows = PackedForward(model, placement()), some_rows(4)
    with torch.no_grad():
        tuned = forward.losses([rows]).item()
        with model.disable_adapter():
            base = forward.losses([rows]).item()
        plain = PaddedForward(tiny("qwen3"), placement()).losses([rows]).item()
    assert base == pytest.approx(plain, rel=1e-5)
    assert abs(tuned - base) > 0.1


@pytest.mark.parametrize(
    ("kind", "parts"), [("llama", 13), ("mistral", 13), ("qwen2", 13), ("qwen3", 19), ("gemma", 0)]
)
def test_the_kernels_stand_in_for_llama_like_layers(kind: str, parts: int, kernel_way: str) -> None:
    """Norms, MLPs and attentions of three layers and the last norm; nothing of a decoder whose formulas are others."""
    decoder = adapted(tiny(kind)).get_base_model().get_decoder()
    assert len(fused_layers(decoder, torch.float32, "eager")) == (parts if kernel_way == "compiled" else 0)
    assert len(fused_layers(decoder, torch.float32, "sdpa")) == (max(0, parts - 3) if kernel_way == "compiled" else 0)


def test_the_model_is_left_as_it_was() -> None:
    """After a pass its attention is transformers' own again and its layers compute as PEFT wrote them."""
    model = adapted(tiny("llama"))
    PackedForward(model, placement()).losses([some_rows(2)])
    assert model.config._attn_implementation == "eager"
    layers = lora_layers(model)
    assert len(layers) == 21
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.5}, {"lora_dropout": 0.5}])
def test_with_dropout_every_row_draws_its_own_numbers(changes: dict[str, float]) -> None:
    """Two equal rows differ under dropout, and stand once without it; a head of their losses shows it."""
    lora = {name: value for name, value in changes.items() if name == "lora_dropout"}
    model = adapted(tiny("llama", **{name: v for name, v in changes.items() if name not in lora}), **lora)
    forward, row = PackedForward(model, placement()), some_rows(1)[0]

    def ratio() -> float:
        torch.manual_seed(3)
        alone = forward.losses([[row]]).item()
        torch.manual_seed(3)
        return forward.losses([[row, row]]).item() / alone

    model.train()
    assert abs(ratio() - 2) > 1e-3
    model.eval()
    assert ratio() == pytest.approx(2, rel=1e-6)


def test_an_unknown_decoder_takes_the_padded_way() -> None:
    """A model that is not on the list is trained by transformers' own layers."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=97))
    assert isinstance(choose_forward(model, placement()), PaddedForward)


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def kernel_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds with the compiled kernels and without them."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "_library", lambda _dtype: None)
    assert kernels.available(torch.float32) == (request.param == "compiled")
    return str(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
