"""Attention kernels agree, and the choice between them says why."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from e2ediff_testing import make_nets

from e2ediff.errors import KernelError, ResourceError
from e2ediff.nn import attention
from e2ediff.nn.attention import (
    candidates,
    check_agreement,
    choose_attention,
    sdpa,
)
from e2ediff.nn.flash import in_place
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


def chosen_from(timer=None, kept="", **attends):
    """The choice of `auto` among these functions, on the CPU."""
    known = {name: lambda attend=attend: attend for name, attend in attends.items()}
    return choose_attention(
        "auto", CPU, torch.float32, 8, tokens=16, known=known, timer=timer, kept=kept
    )


def seconds(*taken):
    """A clock that runs what it times and says these seconds, one after another."""
    left = iter(taken)
    return lambda work, device: (work(), next(left))[1]


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

    def also(q, k, v):
        return sdpa(q, k, v)

    made = chosen_from(
        seconds(0.003, 0.002),
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


@pytest.mark.parametrize(
    ("other", "name", "reason"),
    [
        (0.00190, "other", "the fastest of 2 that agree with the formula"),
        (0.00191, "sdpa", "none of 2 that agree is over 5% faster"),
        (0.00300, "sdpa", "the fastest of 2 that agree with the formula"),
    ],
)
def test_auto_leaves_torchs_own_only_for_a_kernel_that_is_over_5_percent_faster(
    other, name, reason
) -> None:
    made = chosen_from(seconds(0.0020, other), sdpa=sdpa, other=lambda q, k, v: sdpa(q, k, v))
    assert (made.name, made.reason) == (name, reason)


def test_a_run_that_goes_on_keeps_its_kernel_without_timing_anything() -> None:
    """The clock has no time to tell: whatever asks it fails."""
    made = chosen_from(seconds(), kept="own", sdpa=sdpa, own=lambda q, k, v: sdpa(q, k, v))
    assert (made.name, made.reason, made.milliseconds) == ("own", "as the run had it", {})


@pytest.mark.parametrize("kept", ["broken", "wrong"])
def test_a_kernel_of_the_run_that_does_not_run_here_is_chosen_anew_and_said(kept) -> None:
    made = chosen_from(seconds(0.002), kept=kept, sdpa=sdpa, **{kept: {
        "broken": raises, "wrong": scaled}[kept]})  # fmt: skip
    assert made.name == "sdpa"
    assert made.refused[kept].endswith(", although the run had it")


def test_a_kernel_of_the_run_that_is_not_known_here_is_chosen_anew() -> None:
    made = chosen_from(seconds(0.002, 0.003), kept="gone", sdpa=sdpa, other=sdpa)
    assert (made.name, made.refused) == ("sdpa", {})


def test_a_kernel_asked_for_by_name_is_taken_whatever_the_run_had() -> None:
    known = {"sdpa": lambda: sdpa, "own": lambda: sdpa}
    made = choose_attention("sdpa", CPU, torch.float32, 8, known=known, kept="own")
    assert (made.name, made.reason) == ("sdpa", "asked for")


def test_what_torchs_own_attention_chose_in_turn_is_recorded() -> None:
    made = choose_attention("sdpa", CPU, torch.float32, 8, tokens=16)
    forward, backward = made.reached.split(", ")
    assert forward.startswith("aten._scaled_dot_product_")
    assert backward.startswith(f"{forward.removesuffix('_for_cpu')}")
    assert made.record()["attention reached"] == made.reached


def test_that_a_kernel_cannot_be_watched_ends_nothing(monkeypatch) -> None:
    def refuses(self, *args):
        raise NotImplementedError("cannot be watched")

    monkeypatch.setattr(attention._Operators, "__torch_dispatch__", refuses)
    made = choose_attention("sdpa", CPU, torch.float32, 8, tokens=16)
    assert made.attend is sdpa
    assert made.reached.startswith("unknown: NotImplementedError")


def test_a_shape_of_heads_without_a_record_has_the_kernel_of_the_first() -> None:
    record = {"attention": "one (as the run had it)", "attention in float32": "two (it runs)"}
    kept = [
        attention._kept(record, where, dtype)
        for where in ("", " of 1 heads of width 16")
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert kept == ["one", "two", "one", "one"]
    assert attention._kept({}, "", torch.float32) == ""


class Unsteady(torch.autograd.Function):
    """The right answer, and a gradient of k whose last bits are those of no other call."""

    calls = 0

    @staticmethod
    def forward(ctx, q, k, v):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = sdpa(*inputs)
        ctx.graph = (out, inputs)
        return out.detach()

    @staticmethod
    def backward(ctx, pull):
        out, inputs = ctx.graph
        found = list(torch.autograd.grad(out, inputs, pull))
        Unsteady.calls += 1
        found[1] = found[1] + 1e-6 * Unsteady.calls
        return tuple(found)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_with_deterministic_algorithms_a_kernel_whose_bits_differ_is_refused(
    deterministic,
) -> None:
    known = {"odd": lambda: Unsteady.apply}
    with pytest.raises(KernelError, match="its gradient differs between two equal calls"):
        choose_attention("odd", CPU, torch.float32, 8, known=known)
    made = chosen_from(seconds(), odd=Unsteady.apply, own=lambda q, k, v: sdpa(q, k, v))
    assert made.name == "own"
    assert made.refused == {"odd": "its gradient differs between two equal calls"}


def test_with_deterministic_algorithms_nothing_is_timed_and_torchs_own_is_first(
    deterministic,
) -> None:
    made = chosen_from(seconds(), other=lambda q, k, v: sdpa(q, k, v), sdpa=sdpa)
    assert made.name == "sdpa"
    assert made.reason == "the first whose bits repeat, as deterministic asks"


def test_without_them_bits_that_differ_refuse_no_kernel() -> None:
    known = {"odd": lambda: Unsteady.apply}
    assert choose_attention("odd", CPU, torch.float32, 8, known=known).name == "odd"


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"),
    reason="this torch cannot replace its flash attention",
)
def test_another_flash_attention_is_in_place_while_it_is_tried_and_timed_and_not_after(
    monkeypatch,
) -> None:
    current = torch.nn.attention.current_flash_attention_impl
    monkeypatch.setattr(
        torch.nn.attention._registry,
        "_FLASH_ATTENTION_IMPLS",
        {"FA3": lambda: SimpleNamespace(remove=lambda: None)},
    )
    seen: dict[str, set[str | None]] = {"sdpa": set(), "sdpa_fa3": set()}

    def watched(name):
        def attend(q, k, v):
            seen[name].add(current())
            return sdpa(q, k, v)

        return attend

    made = chosen_from(seconds(0.002, 0.001), **{name: watched(name) for name in seen})
    assert made.name == "sdpa_fa3"
    assert seen == {"sdpa": {None}, "sdpa_fa3": {"FA3"}}
    assert current() is None


@pytest.fixture
def flash(monkeypatch):
    """Both implementations, registered as if they were installed; torch's own afterwards."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        pytest.skip("this torch cannot replace its flash attention")
    made = {name: lambda: SimpleNamespace(remove=lambda: None) for name in ("FA3", "FA4")}
    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_IMPLS", made)
    yield torch.nn.attention
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def test_what_another_network_put_in_place_of_flash_attention_is_not_taken_for_torchs(
    flash,
) -> None:
    known = {name: lambda: sdpa for name in ("sdpa", "sdpa_flash", "sdpa_fa3", "sdpa_fa4")}
    known["mine"] = lambda: lambda q, k, v: sdpa(q, k, v)

    def choose(name, dtype=torch.bfloat16):
        return choose_attention(
            name, CPU, dtype, 8, tokens=16, known=known, timer=seconds(0.001, 0.002)
        )

    flash.activate_flash_attention_impl("FA3")
    made = choose("auto")
    assert (made.name, set(made.milliseconds)) == ("sdpa_fa3", {"sdpa_fa3", "mine"})
    taken = "FA3 is in the place of torch's flash attention in this process"
    assert made.refused == dict.fromkeys(("sdpa", "sdpa_flash", "sdpa_fa4"), taken)
    with pytest.raises(ResourceError, match=taken):
        choose("sdpa")
    assert choose("sdpa", torch.float32).name == "sdpa"  # flash attention has no float32


@pytest.mark.parametrize("kernel", ["sdpa_fa3", "sdpa_fa4"])
def test_flash_attention_that_is_not_installed_is_refused_with_the_missing_module(kernel) -> None:
    with pytest.raises(KernelError, match=r"there is no module flash_attn|cannot replace"):
        choose_attention(kernel, CPU, torch.bfloat16, 8)


def test_a_build_of_xformers_without_the_function_counts_as_absent(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ModuleType("xformers.ops"))
    with pytest.raises(KernelError, match="cannot import name 'memory_efficient_attention'"):
        choose_attention("xformers", CPU, torch.float32, 8)
    known = {"xformers": candidates()["xformers"], "sdpa": lambda: sdpa}
    made = choose_attention(
        "auto", CPU, torch.float32, 8, tokens=16, known=known, timer=seconds(0.001)
    )
    assert made.name == "sdpa"
    assert "memory_efficient_attention" in made.refused["xformers"]


def test_auto_measures_with_a_clock_of_its_own() -> None:
    def slow(q, k, v):
        time.sleep(0.02)
        return sdpa(q, k, v)

    made = chosen_from(slow=slow, quick=sdpa)
    assert made.name == "quick"
    assert made.milliseconds["slow"] > 20


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
    with in_place(kernel):
        ours = chosen.attend(*inputs)
        own = torch.autograd.grad(ours.square().sum(), inputs)
    theirs = sdpa(*inputs)
    # averages of unit normals, rounded to 2^-8 in bfloat16; TF32 products in float32
    near = {"rtol": 0.0, "atol": 0.03 if dtype == torch.bfloat16 else 2e-3}
    torch.testing.assert_close(ours, theirs, **near)
    for a, b in zip(own, torch.autograd.grad(theirs.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=3 * near["atol"])
