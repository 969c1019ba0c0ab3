"""Attention by xformers or by torch, chosen by running and timing a small one.

A network computes in more than one type: training steps use the recipe's precision, while
diagnosis, calibration, scoring and sampling use float32. Some kernels support half precision
only, so a kernel is chosen for each type.

Shapes: B batch, N tokens, H heads, K head width.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from e2ediff.errors import KernelError, ResourceError

Backend = Literal["auto", "sdpa", "xformers", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

Timer = Callable[[Callable[[], object], torch.device], float]
"""Seconds that a call takes on a device."""


@attrs.frozen
class Attention:
    """The chosen kernel: its name, why it was chosen, and the function.

    `attend` maps q, k, v, each (B, N, H, K), to (B, N, H, K), with softmax scale 1/sqrt(K).
    `milliseconds` has the time of every candidate that was measured, forward and backward, and
    `refused` why each of the others was not used.
    """

    name: str
    reason: str
    attend: Attend
    milliseconds: Mapping[str, float] = attrs.field(factory=dict)
    refused: Mapping[str, str] = attrs.field(factory=dict)

    def record(self) -> dict[str, str]:
        """The choice in words, by topic, as a run records it."""
        found = {"attention": f"{self.name} ({self.reason})"}
        if self.milliseconds:
            times = sorted(self.milliseconds.items(), key=lambda pair: pair[1])
            found["attention times"] = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times)
        if self.refused:
            said = [f"{name}: {why}" for name, why in self.refused.items()]
            found["attention refused"] = "; ".join(said)
        return found


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's scaled_dot_product_attention on (B, N, H, K)."""
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return out.transpose(1, 2)


def _pinned(kernel: SDPBackend) -> Attend:
    """`sdpa` held to one of torch's kernels; it raises where that one does not run."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa(q, k, v)

    return attend


def _load_xformers() -> Attend:
    """Xformers' memory-efficient attention on (B, N, H, K).

    Imported here and not above: the import takes seconds and is wanted on CUDA only.
    Its logger warns at length about kernels that were built for another torch, although torch's
    own flash and cutlass kernels still serve it; the probe below decides, not that warning.
    """
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from xformers.ops import memory_efficient_attention
    finally:
        logger.setLevel(level)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = memory_efficient_attention(q, k, v)
        return out

    return attend


def candidates() -> dict[str, Callable[[], Attend]]:
    """What `auto` chooses from: a loader of each kernel, by name."""
    return {
        "xformers": _load_xformers,
        "sdpa": lambda: sdpa,
        "sdpa_flash": lambda: _pinned(SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": lambda: _pinned(SDPBackend.CUDNN_ATTENTION),
        "sdpa_efficient": lambda: _pinned(SDPBackend.EFFICIENT_ATTENTION),
    }


def choose_attention(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    tokens: int = 256,
    heads: int = 4,
    known: Mapping[str, Callable[[], Attend]] | None = None,
    timer: Timer | None = None,
) -> Attention:
    """The attention kernel for this device, compute type and shape.

    A kernel must run, forward and backward, and agree with the formula computed in float64; that
    it can be imported is not enough.
    On CUDA, `auto` takes the fastest kernel that does; on a CPU, torch's.

    Args:
        backend: A kernel's name, or `auto`.
        device: Where.
        dtype: What q, k and v will be.
        head_dim: K.
        tokens: N.
        heads: H.
        known: Loaders by name; by default `candidates()`.
        timer: What measures; by default events on CUDA and the clock elsewhere.

    Raises:
        KernelError: The kernel that was asked for by name does not run here, or disagrees.
        ResourceError: No kernel runs and agrees.
    """
    asked = backend != "auto"
    if not _computes(device):
        return Attention("sdpa", "nothing is computed here", sdpa)
    if known is None:
        known = candidates()
        if not asked and device.type != "cuda":
            known = {"sdpa": known["sdpa"]}
    names = [backend] if asked else list(known)
    attends: dict[str, Attend] = {}
    refused: dict[str, str] = {}
    for name in names:
        found = _tried(known[name], device, dtype, head_dim, tokens, explained=asked)
        if isinstance(found, str):
            refused[name] = found
        else:
            attends[name] = found
    if not attends and not asked:
        # `auto` must not end a run for which torch's own kernel works.
        found = _tried(lambda: sdpa, device, dtype, head_dim, tokens)
        if not isinstance(found, str):
            return Attention("sdpa", "no other kernel runs here", sdpa, refused=refused)
    if not attends:
        said = "; ".join(f"'{name}' does not run: {why}" for name, why in refused.items())
        what = f"attention on {device.type} in {_name(dtype)} with head width {head_dim}: {said}"
        if not asked:
            raise ResourceError(f"{what}. Set device: cpu, or another width of a head")
        if backend == "sdpa":
            raise ResourceError(f"{what}. Set backbone.attention: auto")
        raise KernelError(what)
    if asked:
        return Attention(backend, "asked for", attends[backend])
    if len(known) == 1:
        (name,) = known
        return Attention(name, f"xformers has no kernels for {device.type}", attends[name])
    timer = timer or seconds_of
    inputs = random_inputs(max(1, 16384 // tokens), tokens, heads, head_dim, device, dtype)
    times = {
        name: 1e3 * timer(lambda attend=attend: both_ways(attend, *inputs), device)  # type: ignore[misc]
        for name, attend in attends.items()
    }
    best = min(times, key=times.__getitem__)
    reason = f"the fastest of {len(times)} that agree with the formula"
    return Attention(best, reason, attends[best], times, refused)


def use_attention(
    net: nn.Module, backend: Backend, device: torch.device, dtype: torch.dtype, tokens: int
) -> Mapping[str, str]:
    """Give every module of `net` that attends the kernels chosen for its shape.

    Such a module has attributes `attend`, which is replaced, `head_dim` and `heads`;
    `SelfAttention` of `e2ediff.nn.layers` is one.
    `tokens` is the number of tokens that it usually attends to.

    The new `attend` depends on the type of q: for `dtype` it is the kernel that
    `choose_attention` finds; for float32, which all work outside the training step uses, the same
    kernel if it runs and agrees there too, and otherwise `sdpa`; for any other type, and on
    another kind of device, `sdpa`, which supports them all.
    Only `dtype` is timed, because speed matters in the training step alone.

    Returns:
        What was chosen and why, for each type, as `Backbone.prepare` returns it.

    Raises:
        ResourceError: As `choose_attention`; the modules are as they were.
    """
    said: dict[str, str] = {}
    chosen: dict[tuple[int, int], Attend] = {}
    found: list[tuple[nn.Module, Attend]] = []
    for module in net.modules():
        head_dim, heads = getattr(module, "head_dim", None), getattr(module, "heads", None)
        if not (
            isinstance(head_dim, int) and isinstance(heads, int) and hasattr(module, "attend")
        ):
            continue
        if (head_dim, heads) not in chosen:
            where = f" of {heads} heads of width {head_dim}" if chosen else ""
            kernel = choose_attention(backend, device, dtype, head_dim, tokens=tokens, heads=heads)
            said |= {f"{topic}{where}": text for topic, text in kernel.record().items()}
            kernels = {dtype: kernel.attend}
            if dtype != torch.float32 and _computes(device):
                other = _in_float32(kernel, dtype, device, head_dim, tokens)
                said[f"attention in float32{where}"] = f"{other.name} ({other.reason})"
                kernels[torch.float32] = other.attend
            chosen[head_dim, heads] = _by_type(kernels, device.type)
        found.append((module, chosen[head_dim, heads]))
    for module, attend in found:
        module.attend = attend  # type: ignore[assignment]
    return said


def _in_float32(
    chosen: Attention, dtype: torch.dtype, device: torch.device, head_dim: int, tokens: int
) -> Attention:
    """The kernel chosen for another type if it serves float32 too, or else `sdpa`.

    Raises:
        ResourceError: Not even that one does.
    """
    why = _tried(lambda: chosen.attend, device, torch.float32, head_dim, tokens)
    if not isinstance(why, str):
        return Attention(chosen.name, f"as in {_name(dtype)}", chosen.attend)
    refused = _tried(lambda: sdpa, device, torch.float32, head_dim, tokens)
    if isinstance(refused, str):
        raise ResourceError(
            f"attention on {device.type} in float32 with head width {head_dim}: 'sdpa' does not "
            f"run: {refused}"
        )
    return Attention("sdpa", f"'{chosen.name}' does not run: {why}", sdpa)


def _by_type(kernels: Mapping[torch.dtype, Attend], device: str) -> Attend:
    """Attention by the kernel that was chosen for the type of q on this kind of device."""
    if all(kernel is sdpa for kernel in kernels.values()):
        return sdpa

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel = kernels.get(q.dtype, sdpa) if q.device.type == device else sdpa
        return kernel(q, k, v)

    return attend


def _tried(
    load: Callable[[], Attend],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int,
    *,
    explained: bool = False,
) -> Attend | str:
    """A kernel that runs and agrees, or why it cannot be used.

    Torch warns of each reason why one of its kernels does not run; `explained` shows these.
    """
    with warnings.catch_warnings():
        if not explained:
            warnings.simplefilter("ignore")
        try:
            attend = load()
            check_agreement(attend, device, dtype, head_dim, tokens)
        except Exception as error:  # kernels fail with all kinds of exceptions
            return str(error).strip().partition("\n")[0] or repr(error)
    return attend


def _computes(device: torch.device) -> bool:
    """Whether the device computes numbers, and not shapes alone, as for a forecast."""
    return type(torch.empty(0, device=device)) is Tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """The median time of some calls, after three that are not counted."""
    taken = []
    for i in range(3 + rounds):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            work()
            ended.record()
            torch.cuda.synchronize(device)
            seconds = float(began.elapsed_time(ended)) / 1e3
        else:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        if i >= 3:
            taken.append(seconds)
    return statistics.median(taken)


@torch.enable_grad()
def check_agreement(
    attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int = 64
) -> None:
    """Compare a kernel's result and gradients with the formula, softmax(q k' / sqrt(K)) v.

    Raises:
        ValueError: They differ by more than rounding; other errors are the kernel's.
    """
    inputs = random_inputs(2, min(tokens, 256), 2, head_dim, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(head_dim)
    expected = torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)
    found = attend(*inputs)
    if found.shape != expected.shape:
        raise ValueError(f"its answer has shape {tuple(found.shape)}")
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = [expected, *torch.autograd.grad(expected, exact, pull.double())]
    got = [found, *torch.autograd.grad(found, inputs, pull.to(dtype))]
    # Averages of unit normals, rounded to 2^-8 in bfloat16; TF32 products in float32.
    bound = 0.03 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    for what, a, b in zip(("answer", *3 * ("gradient",)), got, wanted, strict=True):
        a, b = a.detach().double(), b.detach()
        gap, limit = float((a - b).abs().max()), bound * max(1.0, float(b.abs().max()))
        if not gap <= limit:
            raise ValueError(f"its {what} differs from the formula by {gap:.3g}, over {limit:.3g}")


def random_inputs(
    batch: int, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Random q, k and v, each (B, N, H, K)."""
    g, shape = torch.Generator().manual_seed(0), (batch, tokens, heads, head_dim)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for _ in range(3)]


@torch.enable_grad()
def both_ways(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    """A forward and a backward pass."""
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
