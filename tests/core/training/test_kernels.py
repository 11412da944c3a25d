"""The compiled kernels against PyTorch in float64, and the machine that cannot compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sheily_train.core.training import kernels
from sheily_train.core.training.answer_loss import AnswerLoss
from sheily_train.core.training.fused_layers import RmsNorm, SwiGlu
from sheily_train.core.training.lora_product import LoraProduct

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def numbers(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * spread).to(dtype)


def compare(
    ours: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor], *inputs: torch.Tensor, within: float
) -> None:
    """The output and the gradient at every floating input, relative to what float64 says."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    truths = [tensor.double().requires_grad_() for tensor in inputs]
    y, truth = ours(*leaves), exact(*truths)
    slope = torch.randn(truth.shape, dtype=torch.float64).to(y.dtype)
    y.backward(slope)
    truth.backward(slope.double())
    found = [y, *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, [truth, *(leaf.grad for leaf in truths)], strict=True):
        assert one is not None
        assert other is not None
        assert (one.double() - other).norm() <= within * other.norm()


def noise(dtype: torch.dtype) -> float:
    """What rounding to a type costs, as a part of the norm."""
    return {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@TYPES
def test_the_norm_is_that_of_its_formula(dtype: torch.dtype) -> None:
    """RMSNorm and its gradient for sizes that are no multiple of anything."""
    weight = numbers(37, dtype=dtype)

    def exact(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    compare(lambda x: RmsNorm.apply(x, weight, 1e-5), exact, numbers(3, 5, 37, dtype=dtype), within=noise(dtype))


@TYPES
def test_the_gate_is_that_of_its_formula(dtype: torch.dtype) -> None:
    """SiLU of the gate times up, far into both tails, and the gradients at both."""
    gate, up = numbers(7, 33, dtype=dtype, spread=40), numbers(7, 33, dtype=dtype)
    compare(SwiGlu.apply, lambda g, u: functional.silu(g) * u, gate, up, within=noise(dtype))


@TYPES
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_the_loss_is_cross_entropy(dtype: torch.dtype, spread: float) -> None:
    """Summed cross entropy of two groups and its gradient at the states, certain and uncertain logits."""
    states, weight = numbers(9, 16, dtype=dtype, spread=spread), numbers(50, 16, dtype=dtype)
    targets = torch.randint(0, 50, (9,))

    def exact(x: torch.Tensor) -> torch.Tensor:
        losses = functional.cross_entropy((x @ weight.double().T).to(dtype).double(), targets, reduction="none")
        return torch.stack([losses[:4].sum(), losses[4:].sum()])

    loss = AnswerLoss.apply(states, weight, None, targets, (4, 5), None)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), exact(states.double()), rtol=1e-5 if dtype == torch.float32 else 1e-3)
    if spread == 1.0:
        compare(
            lambda x: AnswerLoss.apply(x, weight, None, targets, (4, 5), None).to(dtype),
            lambda x: exact(x) if dtype != torch.float32 else exact_float(x, weight, targets),
            states,
            within=4 * noise(dtype),
        )


def exact_float(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(x @ weight.double().T, targets, reduction="none")
    return torch.stack([losses[:4].sum(), losses[4:].sum()])


@TYPES
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_narrow_products_are_those_of_lora(rank: int, threads: int, dtype: torch.dtype) -> None:
    """``x Wᵀ + 2 (x Aᵀ) Bᵀ`` and its gradients at x, A and B, over more columns than a block has."""
    x, weight = numbers(45, 288, dtype=dtype), numbers(528, 288, dtype=dtype, spread=0.05)
    a, b = numbers(rank, 288, dtype=torch.float32), numbers(528, rank, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(
            lambda x, a, b: LoraProduct.apply(x, weight, None, 2.0, (0, 45), a, b),
            lambda x, a, b: x @ weight.double().T + 2 * (x @ a.T) @ b.T,
            x,
            a,
            b,
            within=2 * noise(dtype),
        )
    finally:
        torch.set_num_threads(before)


def test_a_number_that_is_none_stays_one() -> None:
    """NaN among the logits is NaN in the loss, whatever the order of the comparisons."""
    states = torch.full((2, 16), float("nan"))
    loss = AnswerLoss.apply(states, torch.ones(5, 16), None, torch.tensor([0, 4]), (2,), None)
    assert loss.isnan().all()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "'cc"])
def test_without_a_compiler_pytorch_computes(compiler: str, tmp_path: Path) -> None:
    """Where nothing compiles there are no kernels, nothing is left in the cache, and nothing is raised."""
    code = (
        "import torch; from sheily_train.core.training import kernels as k;"
        "print(k.available(torch.float32), k.fingerprint())"
    )
    environment = os.environ | {"CC": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("SHEILY_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_was_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    """``$CC`` may be a command of several words; a second process takes the kernels from the cache, compiler or not."""
    code = "import torch; from sheily_train.core.training import kernels as k; print(k.fingerprint())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CC": "env cc"}
    words = [sys.executable, "-c", code]
    first = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    environment["CC"] = "false"
    assert subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip() == first
    assert len(first) == 12
    assert len(list(tmp_path.rglob("*.so"))) == 2


def test_other_types_have_no_kernels() -> None:
    """Half precision is PyTorch's alone."""
    assert kernels.available(torch.bfloat16)
    assert not kernels.available(torch.float16)
    with pytest.raises(LookupError):
        kernels.kernel("swiglu", torch.float16)
