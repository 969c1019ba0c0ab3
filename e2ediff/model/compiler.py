"""What can be said of torch's compiler: whether it is there, and how it failed."""

from __future__ import annotations

import torch

from e2ediff.errors import ResourceError


class NotOneGraphError(ResourceError):
    """A step cannot be one graph."""


def missing_compiler(device: torch.device) -> str:
    """Say which compiler torch.compile would need on this device and does not find; "" if none."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not installed, or does not know this GPU"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler is found; install one, or name it by CXX"
    return ""


def is_compiler_error(error: BaseException) -> bool:
    """Return whether the compiler failed, or found a step that it cannot compile."""
    if isinstance(error, NotOneGraphError):
        return True
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def said_by(error: BaseException) -> str:
    """Return the first lines of a compiler's error as one."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = " ".join([line for line in lines if line][:2]) or type(error).__name__
    return said[:400]
