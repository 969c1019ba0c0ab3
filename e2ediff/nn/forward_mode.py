"""Derivatives along a direction, by forward-mode differentiation of a network.

Flash, efficient and cuDNN attention have no such derivatives, and compiled blocks drop them:
inside `forward_mode` a network computes its attention by the formula, and its blocks uncompiled.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.attention import SDPBackend, sdpa_kernel

from e2ediff.nn.attention import sdpa


def _by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's attention on (B, N, H, K) by its operators that have forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, k, v)


@contextlib.contextmanager
def forward_mode(net: nn.Module) -> Iterator[None]:
    """Let dual tensors (`torch.autograd.forward_ad`) pass through a network inside the block.

    Modules that attend, those with an attribute `attend`, take the formula in place of their
    kernel, which rounds differently.
    """
    attending = [module for module in net.modules() if hasattr(module, "attend")]
    before = [module.attend for module in attending]
    compiled = any(module._compiled_call_impl is not None for module in net.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    for module in attending:
        module.attend = _by_formula  # type: ignore[assignment]
    try:
        with eager, warnings.catch_warnings(), forward_ad.dual_level():
            # Torch's own, of rules that it compiles when it first meets a dual tensor.
            for kind in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=kind, module=r"torch\..*_script")
            yield
    finally:
        for module, attend in zip(attending, before, strict=True):
            module.attend = attend


def derivative_along(
    net: nn.Module, call: Callable[..., Tensor], at: Sequence[Tensor], along: Sequence[Tensor]
) -> Tensor:
    """Return the derivative of `call(*at)` where each argument moves along its direction.

    Exact to rounding. Nothing is recorded for a backward pass.

    Args:
        net: The network that `call` computes with.
        call: A function of tensors.
        at: Its arguments.
        along: A direction of the shape of each.
    """
    if any(_has_no_numbers(x) for x in at):
        with torch.no_grad():
            call(*at)  # the tangents, which cost what the values do
            return torch.zeros_like(call(*at))
    make, unpack = forward_ad.make_dual, forward_ad.unpack_dual
    with torch.no_grad(), forward_mode(net):
        duals = [make(x, d) for x, d in zip(at, along, strict=True)]  # type: ignore[no-untyped-call]
        tangent: Tensor | None = unpack(call(*duals)).tangent  # type: ignore[no-untyped-call]
        if tangent is None:
            raise ValueError("what was called does not depend on its arguments")
    return tangent


def _has_no_numbers(x: Tensor) -> bool:
    """Return whether only shapes and costs are wanted: dual tensors are not for such tensors."""
    return x.is_meta or (isinstance(x, FakeTensor) and get_proxy_mode() is None)
