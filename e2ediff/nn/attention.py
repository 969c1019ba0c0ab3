"""Attention by xformers or by torch, chosen by running and timing a small one.

A network computes in more than one type: training steps and previews use the recipe's precision,
diagnosis and calibration float32, and sampling either. Some kernels support half precision only,
so a kernel is chosen for each type.

Shapes: B batch, N tokens, H heads, K head width.
"""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from e2ediff.errors import KernelError, ResourceError
from e2ediff.nn.flash import FLASH, check_installed, in_place, in_use, put_in_place

Backend = Literal[
    "auto",
    "sdpa",
    "xformers",
    "sdpa_flash",
    "sdpa_cudnn",
    "sdpa_efficient",
    "sdpa_fa3",
    "sdpa_fa4",
]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

Timer = Callable[[Callable[[], object], torch.device], float]
"""Seconds that a call takes on a device."""

GAIN = 1.05
"""How many times as fast as `sdpa` a kernel must be for `auto` to take it.

Two kernels round differently. Where their times are close, noise would decide at each start which
bits a run has.
"""


@attrs.frozen
class Attention:
    """The chosen kernel: its name, why it was chosen, and the function.

    `attend` maps q, k, v, each (B, N, H, K), to (B, N, H, K), with softmax scale 1/sqrt(K).
    `milliseconds` has the time of every candidate that was measured, forward and backward, and
    `refused` why each of the others was not used.
    `reached` names the operators that `sdpa` or xformers chose in turn; "" for any other kernel.
    """

    name: str
    reason: str
    attend: Attend
    milliseconds: Mapping[str, float] = attrs.field(factory=dict)
    refused: Mapping[str, str] = attrs.field(factory=dict)
    reached: str = ""

    def record(self) -> dict[str, str]:
        """The choice in words, by topic, as a run records it."""
        found = {"attention": f"{self.name} ({self.reason})"}
        if self.reached:
            found["attention reached"] = self.reached
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


def _load_flash(implementation: str) -> Attend:
    """Torch's flash attention, while `in_place` has FlashAttention 3 or 4 in its place.

    Raises:
        ImportError: As `check_installed`.
    """
    check_installed(implementation)
    flash = _pinned(SDPBackend.FLASH_ATTENTION)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and in_use() != implementation:
            raise RuntimeError(f"{implementation} is not in the place of torch's flash attention")
        return flash(q, k, v)

    return attend


def candidates() -> dict[str, Callable[[], Attend]]:
    """What `auto` chooses from: a loader of each kernel, by name."""
    return {
        "xformers": _load_xformers,
        "sdpa": lambda: sdpa,
        "sdpa_flash": lambda: _pinned(SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": lambda: _pinned(SDPBackend.CUDNN_ATTENTION),
        "sdpa_efficient": lambda: _pinned(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa_fa3": lambda: _load_flash("FA3"),
        "sdpa_fa4": lambda: _load_flash("FA4"),
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
    kept: str = "",
) -> Attention:
    """The attention kernel for this device, compute type and shape.

    A kernel must run, forward and backward, and agree with the formula computed in float64; that
    it can be imported is not enough.
    On CUDA, `auto` takes the fastest kernel that does, and `sdpa` unless that is `GAIN` times as
    fast; on a CPU, torch's.
    Under `torch.use_deterministic_algorithms` a kernel must also give the same bits twice, and
    nothing is timed: `auto` takes `sdpa` if it can.

    Args:
        backend: A kernel's name, or `auto`.
        device: Where.
        dtype: What q, k and v will be.
        head_dim: K.
        tokens: N.
        heads: H.
        known: Loaders by name; by default `candidates()`.
        timer: What measures; by default events on CUDA and the clock elsewhere.
        kept: The kernel that `auto` chose before, for a run that goes on or a model of it: it is
            taken again where it runs, as another one would round differently.

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
    deterministic = torch.are_deterministic_algorithms_enabled()
    refused: dict[str, str] = {}
    if (other := in_use()) and dtype != torch.float32:
        # What another network of this process has put there, these would compute by.
        taken = f"{other} is in the place of torch's flash attention in this process"
        gone = {"sdpa", "sdpa_flash", *(name for name, flash in FLASH.items() if flash != other)}
        refused |= dict.fromkeys(gone & known.keys(), taken)
        known = {name: load for name, load in known.items() if name not in refused}
    if not asked and kept in known and len(known) > 1:
        found = _tried(kept, known[kept], device, dtype, head_dim, tokens, heads)
        if not isinstance(found, str):
            reached = _reached_by(kept, found, device, dtype, head_dim, tokens, heads)
            return Attention(kept, "as the run had it", found, reached=reached)
        refused[kept] = f"{found}, although the run had it"
    names = [name for name in ([backend] if asked else known) if name not in refused]
    if deterministic and "sdpa" in names:
        # Not timed, as another start would find other times. Torch's own is fast and repeats.
        names = ["sdpa", *(name for name in names if name != "sdpa")]
    attends: dict[str, Attend] = {}
    for name in names:
        found = _tried(name, known[name], device, dtype, head_dim, tokens, heads)
        if isinstance(found, str):
            refused[name] = found
            continue
        attends[name] = found
        if deterministic:
            break
    if not attends and not asked:
        # `auto` must not end a run for which torch's own kernel works.
        found = _tried("sdpa", lambda: sdpa, device, dtype, head_dim, tokens, heads)
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

    def chosen(name: str, reason: str, times: Mapping[str, float] | None = None) -> Attention:
        attend = attends[name]
        reached = _reached_by(name, attend, device, dtype, head_dim, tokens, heads)
        return Attention(name, reason, attend, times or {}, {} if asked else refused, reached)

    if asked:
        return chosen(backend, "asked for")
    if len(known) == 1 and not refused:
        (name,) = known
        return Attention(name, f"xformers has no kernels for {device.type}", attends[name])
    if deterministic:
        (name,) = attends
        return chosen(name, "the first whose bits repeat, as deterministic asks")
    timer = timer or seconds_of
    inputs = random_inputs(max(1, 16384 // tokens), tokens, heads, head_dim, device, dtype)
    times = {}
    for name, attend in attends.items():
        with in_place(name):
            times[name] = 1e3 * timer(lambda attend=attend: both_ways(attend, *inputs), device)  # type: ignore[misc]
    best = min(times, key=times.__getitem__)
    reason = f"the fastest of {len(times)} that agree with the formula"
    if best != "sdpa" and times.get("sdpa", math.inf) <= GAIN * times[best]:
        reason = f"none of {len(times)} that agree is over {GAIN - 1:.0%} faster"
        best = "sdpa"
    return chosen(best, reason, times)


def use_attention(
    net: nn.Module, backend: Backend, device: torch.device, dtype: torch.dtype, tokens: int
) -> Mapping[str, str]:
    """Give every module of `net` that attends the kernels chosen for its shape.

    Such a module has attributes `attend`, which is replaced, `head_dim` and `heads`;
    `SelfAttention` of `e2ediff.nn.layers` is one.
    `tokens` is the number of tokens that it usually attends to.

    The new `attend` depends on the type of q: for `dtype` it is the kernel that
    `choose_attention` finds; for float32, which much work outside the training step uses, the same
    kernel if it runs and agrees there too, and otherwise `sdpa`; for any other type, and on
    another kind of device, `sdpa`, which supports them all.
    Only `dtype` is timed, because speed matters in the training step alone.
    Where `net.kernels_before` has what this function returned for the run before, `auto` takes the
    same kernels, if they run.
    FlashAttention 3 and 4 replace torch's own in the whole process: `auto` takes one of them only
    for all shapes of heads, and no other network of the process then uses torch's.

    Returns:
        What was chosen and why, for each type, as `Backbone.prepare` returns it.

    Raises:
        ResourceError: As `choose_attention`; the modules are as they were.
    """
    said, found, names = _chosen(net, backend, device, dtype, tokens, candidates())
    if len(names) > 1 and names & FLASH.keys():  # one of them cannot serve two shapes of heads
        known = {name: load for name, load in candidates().items() if name not in FLASH}
        said, found, names = _chosen(net, backend, device, dtype, tokens, known)
    flash = next(iter(names & FLASH.keys()), "")
    for module, attend in found:
        module.attend = attend  # type: ignore[assignment]
    if flash:  # for good, as another network may be using it
        put_in_place(flash)
    return said


def _chosen(
    net: nn.Module,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    known: Mapping[str, Callable[[], Attend]],
) -> tuple[dict[str, str], list[tuple[nn.Module, Attend]], set[str]]:
    """Choose a kernel for each shape of heads in a network.

    Returns:
        What was chosen and why, each module with its `attend`, and the names of the kernels.
    """
    said: dict[str, str] = {}
    chosen: dict[tuple[int, int], Attend] = {}
    found: list[tuple[nn.Module, Attend]] = []
    names: set[str] = set()
    earlier: Mapping[str, str] = getattr(net, "kernels_before", {})
    if backend == "auto" and device.type != "cuda":
        known = {"sdpa": known["sdpa"]}
    for module in net.modules():
        head_dim, heads = getattr(module, "head_dim", None), getattr(module, "heads", None)
        if not (
            isinstance(head_dim, int) and isinstance(heads, int) and hasattr(module, "attend")
        ):
            continue
        if (head_dim, heads) not in chosen:
            where = f" of {heads} heads of width {head_dim}" if chosen else ""
            kernel = choose_attention(
                backend, device, dtype, head_dim, tokens=tokens, heads=heads,
                known=known, kept=_kept(earlier, where, dtype),
            )  # fmt: skip
            names.add(kernel.name)
            said |= {f"{topic}{where}": text for topic, text in kernel.record().items()}
            kernels = {dtype: kernel.attend}
            if dtype != torch.float32 and _computes(device):
                other = _in_float32(kernel, dtype, device, head_dim, tokens, heads)
                said[f"attention in float32{where}"] = f"{other.name} ({other.reason})"
                kernels[torch.float32] = other.attend
            chosen[head_dim, heads] = _by_type(kernels, device.type)
        found.append((module, chosen[head_dim, heads]))
    return said, found, names


def _kept(record: Mapping[str, str], where: str, dtype: torch.dtype) -> str:
    """The kernel that an earlier record of `use_attention` names for a type; "" if it has none.

    For a type in which the run did not compute it is that of the other type, and for a shape that
    has no record that of the first, so that nothing is timed for a trained network.
    """
    steps = record.get(f"attention{where}") or record.get("attention")
    text = (dtype == torch.float32 and record.get(f"attention in float32{where}")) or steps or ""
    return text.partition(" (")[0]


def _in_float32(
    chosen: Attention,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    tokens: int,
    heads: int,
) -> Attention:
    """The kernel chosen for another type if it serves float32 too, or else `sdpa`.

    Raises:
        ResourceError: Not even that one does.
    """
    shape = (device, torch.float32, head_dim, tokens, heads)
    why = _tried(chosen.name, lambda: chosen.attend, *shape)
    if not isinstance(why, str):
        return Attention(chosen.name, f"as in {_name(dtype)}", chosen.attend)
    refused = _tried("sdpa", lambda: sdpa, *shape)
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
    name: str,
    load: Callable[[], Attend],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int,
    heads: int,
) -> Attend | str:
    """A kernel that runs and agrees, or why it cannot be used.

    Torch says in warnings why one of its kernels does not run, and in the error only that none
    does; both are in the answer, and nothing is shown.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            attend = load()
            with in_place(name):
                check_agreement(attend, device, dtype, head_dim, tokens)
                if torch.are_deterministic_algorithms_enabled():
                    _check_repeats(attend, device, dtype, head_dim, tokens, heads)
        except Exception as error:  # kernels fail with all kinds of exceptions
            said = str(error).strip().partition("\n")[0] or repr(error)
            reasons = (_NOISE.sub("", str(one.message)).strip() for one in warned)
            return "; ".join(dict.fromkeys([said, *filter(None, reasons)]))
    return attend


_NOISE = re.compile(r"\(Triggered internally at .*", re.DOTALL)


@torch.enable_grad()
def _check_repeats(
    attend: Attend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int,
    heads: int,
) -> None:
    """Refuse a kernel whose answer or gradients differ in two equal calls.

    Raises:
        ValueError: A bit differs.
    """
    inputs = random_inputs(max(1, 16384 // tokens), tokens, heads, head_dim, device, dtype)

    def answer() -> list[Tensor]:
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    first, again = answer(), answer()
    for what, a, b in zip(("answer", *3 * ("gradient",)), first, again, strict=True):
        if not torch.equal(a, b):
            raise ValueError(f"its {what} differs between two equal calls")


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of the operators called inside the block that compute attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = str(func).removesuffix(".default")
        if re.search("attention|flash|fmha|cutlass", name):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _reached_by(
    name: str,
    attend: Attend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int,
    heads: int,
) -> str:
    """The operators through which a kernel computes attention, forward and backward.

    Empty for a kernel that does not choose among several itself, as `sdpa` and xformers do.
    """
    if name not in ("sdpa", "xformers"):
        return ""
    inputs = random_inputs(2, tokens, heads, head_dim, device, dtype)
    seen = _Operators()
    try:
        with in_place(name), warnings.catch_warnings(), seen:
            warnings.simplefilter("ignore")
            both_ways(attend, *inputs)
    except Exception as error:  # the kernel runs; that it cannot be watched must not end a run
        return f"unknown: {error!r}"[:200]
    return ", ".join(dict.fromkeys(seen.names))


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
