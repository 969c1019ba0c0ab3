"""Attention kernels agree, and the choice between them says why."""

from __future__ import annotations

import time

import pytest
import torch
from e2ediff_testing import make_nets

from e2ediff.errors import ResourceError
from e2ediff.nn.attention import candidates, check_agreement, choose_attention, sdpa
from e2ediff.parts.backbones import ViTConfig

CPU = torch.device("cpu")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def queries(head_dim: int, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 9, 3, head_dim, generator=g).to(device, dtype).requires_grad_()
        for _ in range(3)
    ]


@pytest.mark.parametrize("head_dim", [8, 32])
def test_sdpa_is_the_softmax_formula(head_dim) -> None:
    q, k, v = queries(head_dim)
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / head_dim**0.5
    expected = torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v), expected)


def test_on_a_cpu_sdpa_is_chosen_with_a_reason_of_one_line() -> None:
    chosen = choose_attention("auto", CPU, torch.float32, 32)
    assert chosen.name == "sdpa"
    assert chosen.attend is sdpa
    assert chosen.reason == "xformers has no kernels for cpu"
    assert choose_attention("sdpa", CPU, torch.float32, 32).reason == "asked for"


def test_asking_a_cpu_for_xformers_is_refused_in_one_line() -> None:
    with pytest.raises(ResourceError, match=r"on cpu in float32 .* 'xformers' does") as caught:
        choose_attention("xformers", CPU, torch.float32, 32)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("Set backbone.attention: auto")


def chosen_from(timer=None, **attends):
    """The choice of `auto` among these functions, on the CPU."""
    known = {name: lambda attend=attend: attend for name, attend in attends.items()}
    return choose_attention("auto", CPU, torch.float32, 8, tokens=16, known=known, timer=timer)


def raises(*inputs):
    raise NotImplementedError("no kernel for this\nand a page of reasons")


def scaled(q, k, v):
    return 1.01 * sdpa(q, k, v)


class Blind(torch.autograd.Function):
    """The right answer with a wrong gradient."""

    @staticmethod
    def forward(ctx, q, k, v):
        return sdpa(q, k, v)

    @staticmethod
    def backward(ctx, pull):
        return pull, pull, pull


def test_auto_takes_the_fastest_of_those_that_run_and_agree() -> None:
    """`wrong` would be the fastest; the clock is the test's, for machines that stall."""
    seconds = iter([0.003, 0.002])

    def also(q, k, v):
        return sdpa(q, k, v)

    made = chosen_from(
        lambda work, device: (work(), next(seconds))[1],
        slow=sdpa,
        wrong=scaled,
        quick=also,
        broken=raises,
        blind=Blind.apply,
    )
    assert (made.name, made.attend) == ("quick", also)
    assert made.milliseconds == {"slow": 3.0, "quick": 2.0}
    assert made.refused.keys() == {"wrong", "broken", "blind"}
    assert made.record() == {
        "attention": "quick (the fastest of 2 that agree with the formula)",
        "attention times": "quick 2.000 ms, slow 3.000 ms",
        "attention refused": "; ".join(f"{k}: {v}" for k, v in made.refused.items()),
    }
    assert made.refused["broken"] == "no kernel for this"
    assert made.refused["wrong"].startswith("its answer differs from the formula by 0.0")
    assert made.refused["blind"].startswith("its gradient differs from the formula by ")


def test_auto_measures_with_a_clock_of_its_own() -> None:
    def slow(q, k, v):
        time.sleep(0.005)
        return sdpa(q, k, v)

    made = chosen_from(slow=slow, quick=sdpa)
    assert made.name == "quick"
    assert made.milliseconds["slow"] > 5


def test_a_kernel_asked_for_by_name_is_refused_where_it_disagrees() -> None:
    with pytest.raises(ResourceError, match="its answer differs from the formula by"):
        choose_attention("sdpa", CPU, torch.float32, 8, known={"sdpa": lambda: scaled})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_kernel_is_held_against_the_formula_in_every_precision(dtype) -> None:
    check_agreement(sdpa, CPU, dtype, 32)
    with pytest.raises(ValueError, match="differs from the formula"):
        check_agreement(lambda q, k, v: sdpa(q, v, k), CPU, dtype, 32)


def test_the_choice_is_made_once_and_recorded() -> None:
    net = make_nets(ViTConfig(width=16, depth=1, heads=1, patch=8, latent_dim=4)).online
    choices = net.prepare(CPU, torch.float32)
    assert choices == {"attention": "sdpa (xformers has no kernels for cpu)"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("kernel", [pytest.param(name, marks=gpu) for name in candidates()])
def test_a_kernel_equals_sdpa(kernel, head_dim, dtype) -> None:
    try:
        chosen = choose_attention(kernel, torch.device("cuda"), dtype, head_dim)
    except ResourceError as refused:
        pytest.skip(str(refused))
    inputs = queries(head_dim, dtype, "cuda")
    ours, theirs = chosen.attend(*inputs), sdpa(*inputs)
    # averages of unit normals, rounded to 2^-8 in bfloat16; TF32 products in float32
    near = {"rtol": 0.0, "atol": 0.03 if dtype == torch.bfloat16 else 2e-3}
    torch.testing.assert_close(ours, theirs, **near)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.0, atol=3 * near["atol"])
