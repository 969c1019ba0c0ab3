"""Attention kernels agree, and the choice between them says why."""

from __future__ import annotations

import pytest
import torch

from e2ediff.attention import choose_attention, sdpa
from e2ediff.parts.vit import ViTConfig
from e2ediff.testing import make_nets

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
    with pytest.raises(RuntimeError, match="'xformers' does not run on cpu") as caught:
        choose_attention("xformers", CPU, torch.float32, 32)
    assert "\n" not in str(caught.value)


def test_the_choice_is_made_once_and_recorded() -> None:
    net = make_nets(ViTConfig(width=16, depth=1, heads=1, patch=8, latent_dim=4)).online
    choices = net.prepare(CPU, torch.float32)
    assert choices == {"attention": "sdpa (xformers has no kernels for cpu)"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("kernel", [pytest.param("xformers", marks=gpu)])
def test_xformers_equals_sdpa(kernel, head_dim, dtype) -> None:
    chosen = choose_attention("auto", torch.device("cuda"), dtype, head_dim)
    if chosen.name != kernel:
        pytest.skip(chosen.reason)
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
