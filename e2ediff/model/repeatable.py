"""Have torch compute the same bits in two equal calls, or say what cannot."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from e2ediff.errors import ResourceError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (":4096:8", ":16:8")
_UNSET = "because it uses CuBLAS"
_REFUSAL = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def repeatable(*, deterministic: bool, compiled: bool = False) -> Iterator[None]:
    """Have torch use deterministic algorithms inside the block, if `deterministic`.

    On CUDA the fastest algorithms of some operators add numbers in an order that differs from
    call to call; a CPU has none of those. The setting is torch's own, for the whole process.

    Args:
        deterministic: Whether to do anything.
        compiled: Whether the block compiles code, which must not be tuned by timing either.

    Raises:
        ResourceError: An operator inside has no deterministic form on its device, or cuBLAS was
            told to use a workspace in which its products differ from call to call.
    """
    if not deterministic:
        yield
        return
    workspace = os.environ.setdefault(_WORKSPACE, _FIXED[0])
    if workspace not in _FIXED:
        raise ResourceError(
            f"deterministic: true needs {_WORKSPACE} to be {' or '.join(_FIXED)}, and it is "
            f"{workspace!r} here; unset it, or set `deterministic: false`"
        )
    memory: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that was never written, so it need not be filled.
    memory.fill_uninitialized_memory = False
    try:
        with _untuned() if compiled else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if _UNSET in str(error):
            raise ResourceError(
                "deterministic: true: this process multiplied matrices on the GPU before "
                f"{_WORKSPACE} was set, which torch reads once; start it with "
                f"{_WORKSPACE}={_FIXED[0]}, as the command line does"
            ) from error
        if not (found := _REFUSAL.search(str(error))):
            raise
        raise ResourceError(
            f"deterministic: true: the operator {found[1]}{_place(error)} has no deterministic "
            "form on this device; replace the part that uses it, or set `deterministic: false`"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fills


def _untuned() -> contextlib.AbstractContextManager[object]:
    """Keep the compiler from choosing kernels by timing them, where it can be told so."""
    import torch._inductor.config as inductor  # takes seconds, and is loaded when compiling anyway

    if not hasattr(inductor, "deterministic"):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = inductor.patch(deterministic=True)
    return patched


def _place(error: BaseException) -> str:
    """Name the module and line outside torch that called an operator, or the backward pass."""
    torch_folder = os.path.join(os.path.dirname(torch.__file__), "")
    frames = [
        (frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(torch_folder)
    ]
    frame, number = frames[-1]
    module = str(frame.f_globals.get("__name__", frame.f_code.co_filename))
    if module.startswith("e2ediff.step."):  # no frame of a backward pass is that of the operator
        return " in a backward pass"
    return "" if module == __name__ else f", called in {module} (line {number}),"
