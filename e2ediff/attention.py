"""Attention by xformers or by torch, chosen by running a small one.

Shapes: B batch, N tokens, H heads, K head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

Backend = Literal["auto", "sdpa", "xformers"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@attrs.frozen
class Attention:
    """The chosen kernel: its name, why it was chosen, and the function.

    `attend` maps q, k, v, each (B, N, H, K), to (B, N, H, K), with softmax scale 1/sqrt(K).
    """

    name: str
    reason: str
    attend: Attend


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's scaled_dot_product_attention on (B, N, H, K)."""
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return out.transpose(1, 2)


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


def choose_attention(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Attention:
    """The attention kernel for this device, compute type and head width.

    `auto` takes xformers on CUDA where a small forward and backward pass through it runs and
    agrees with torch's, and torch's everywhere else.
    An import that succeeds proves nothing: the kernels may be missing.

    Raises:
        RuntimeError: `xformers` was asked for by name and cannot run here.
    """
    if backend == "sdpa":
        return Attention("sdpa", "asked for", sdpa)
    if device.type != "cuda" and backend == "auto":
        return Attention("sdpa", f"xformers has no kernels for {device.type}", sdpa)
    try:
        attend = _load_xformers()
        _probe(attend, device, dtype, head_dim)
    except (ImportError, OSError, NotImplementedError, ValueError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if backend == "xformers":
            raise RuntimeError(
                f"attention 'xformers' does not run on {device.type} in {dtype} with head width "
                f"{head_dim}: {cause}"
            ) from error
        return Attention("sdpa", f"xformers does not run here: {cause}", sdpa)
    reason = "asked for" if backend == "xformers" else "its probe ran and agreed with sdpa"
    return Attention("xformers", reason, attend)


def use_attention(
    net: nn.Module, backend: Backend, device: torch.device, dtype: torch.dtype
) -> Mapping[str, str]:
    """Give every module of `net` that attends the kernel chosen for its head width.

    Such a module has attributes `attend`, which is replaced, and `head_dim`; `SelfAttention` of
    `e2ediff.layers` is one.

    Returns:
        What was chosen and why, as `Backbone.prepare` returns it.

    Raises:
        RuntimeError: `xformers` was asked for by name and cannot run here.
    """
    said: dict[str, str] = {}
    chosen: dict[int, Attention] = {}
    for module in net.modules():
        head_dim = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int) or not hasattr(module, "attend"):
            continue
        if head_dim not in chosen:
            kernel = chosen[head_dim] = choose_attention(backend, device, dtype, head_dim)
            topic = "attention" if len(chosen) == 1 else f"attention at head width {head_dim}"
            said[topic] = f"{kernel.name} ({kernel.reason})"
        module.attend = chosen[head_dim].attend  # type: ignore[assignment]
    return said


def _probe(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Run a small attention forward and backward; raise if it fails or disagrees with sdpa."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(2, 16, 2, head_dim, generator=generator, device=device)
        .to(dtype)
        .requires_grad_()
        for _ in range(3)
    )
    out = attend(q, k, v)
    torch.autograd.backward(out.sum())
    expected = sdpa(q.detach(), k.detach(), v.detach())
    # Outputs are averages of unit normals; two kernels in bf16 differ by rounding, 2^-8.
    bound = 0.03 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    gap = (out.detach() - expected).abs().max().item()
    if gap > bound:
        raise RuntimeError(f"its answer differs from sdpa's by {gap:.3g}, more than {bound:g}")
