"""Every attention kernel by type and number of tokens: error, time, memory, repeatability."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from look import Look
from measuring import forget_peak, gib, peak

from e2ediff.nn.attention import (
    Attend,
    both_ways,
    candidates,
    check_agreement,
    random_inputs,
    seconds_of,
)
from e2ediff.nn.flash import in_place

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(look: Look) -> None:
    """Note what each kernel does, then whether it repeats its bits, and what compiles it."""
    device = torch.device(look.device)
    kernels: dict[str, Attend] = {}
    for name, load in candidates().items():
        with look.attempt(kernel=name):
            kernels[name] = load()
    heads, head_dim, work = (2, 32, 512) if look.tiny else (12, 64, 32768)
    for dtype in _TYPES:
        for tokens in (16, 64) if look.tiny else (64, 256, 1024):
            shape = (max(1, work // tokens), tokens, heads, head_dim)
            for name, attend in kernels.items():
                row = {"kernel": name, "dtype": str(dtype)[6:], "tokens": tokens}
                with in_place(name), look.attempt(**row) as row:
                    check_agreement(attend, device, dtype, head_dim, tokens)
                    look.note(**row, **_speed(attend, shape, device, dtype))
    for name, attend in kernels.items():
        with in_place(name):
            _repeats(look, name, attend, (8, 64 if look.tiny else 1024, heads, head_dim), device)
        with in_place(name), look.attempt(kernel=name, asked="float32"):
            inputs = random_inputs(2, 64, heads, head_dim, device, torch.float32)
            finite = bool(torch.isfinite(attend(*inputs)).all())
            look.note(kernel=name, asked="float32", ok=finite)
    for name, attend in kernels.items():  # last, as compiling takes seconds
        with in_place(name), look.attempt(kernel=name, asked="compiled whole"):
            inputs = random_inputs(2, 64, heads, head_dim, device, torch.bfloat16)
            torch._dynamo.reset()
            backend = "aot_eager" if look.tiny else "inductor"
            compiled: Callable[..., torch.Tensor] = torch.compile(
                attend, fullgraph=True, backend=backend
            )
            gap = float((compiled(*inputs) - attend(*inputs)).abs().max())
            look.note(kernel=name, asked="compiled whole", ok=True, gap=gap)


def _speed(
    attend: Attend, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, float | None]:
    batch, tokens, heads, head_dim = shape
    inputs = random_inputs(*shape, device, dtype)
    flops = 4 * batch * heads * tokens**2 * head_dim
    forget_peak(device)
    with torch.no_grad():
        forward = seconds_of(partial(attend, *inputs), device)
    both = seconds_of(partial(both_ways, attend, *inputs), device)
    return {
        "forward_ms": 1e3 * forward,
        "both_ms": 1e3 * both,
        "forward_tflops": flops / forward / 1e12,
        "both_tflops": 3.5 * flops / both / 1e12,  # scores are computed again on the way back
        "peak_gib": gib(peak(device)),
    }


def _repeats(
    look: Look, name: str, attend: Attend, shape: tuple[int, int, int, int], device: torch.device
) -> None:
    """Note whether four equal calls give equal gradients."""
    for strict in (False, True):
        with look.attempt(kernel=name, deterministic_mode=strict) as row:
            torch.use_deterministic_algorithms(strict)
            inputs = random_inputs(*shape, device, torch.bfloat16)
            pull = torch.randn_like(inputs[0])
            found = [torch.autograd.grad(attend(*inputs), inputs, pull) for _ in range(4)]
            same = all(
                torch.equal(a, b)
                for one in found[1:]
                for a, b in zip(one, found[0], strict=True)
            )  # fmt: skip
            look.note(**row, gradients_repeat=same)
    torch.use_deterministic_algorithms(False)
