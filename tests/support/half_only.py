"""A kernel for half types alone, as flash and cuDNN attention are, where a CPU has none."""

from __future__ import annotations

import warnings

import pytest
import torch

from e2ediff.nn import attention
from e2ediff.nn.attention import candidates, sdpa

HALF = (torch.bfloat16, torch.float16)
REFUSAL = "No available kernel. Aborting execution."
IN_FLOAT32 = f"{REFUSAL}; expected Half or BFloat16, got torch.float32"
"""What the choice says of the kernel: torch's error, and the warning that has the reason."""


class HalfOnly:
    """Torch's attention for half types; keeps which types it answered in."""

    def __init__(self) -> None:
        self.answered: list[torch.dtype] = []

    def __call__(self, q, k, v):
        if not q.dtype == k.dtype == v.dtype or q.dtype not in HALF:
            warnings.warn(f"expected Half or BFloat16, got {q.dtype}", stacklevel=1)
            raise RuntimeError(REFUSAL)
        if not torch.compiler.is_compiling():
            self.answered.append(q.dtype)
        return sdpa(q, k, v)


def offer_half_only(monkeypatch: pytest.MonkeyPatch) -> HalfOnly:
    """Have `auto` find such a kernel on a CPU, and `sdpa_flash` too."""
    kernel = HalfOnly()
    table = {**candidates(), "sdpa": lambda: kernel, "sdpa_flash": lambda: kernel}
    monkeypatch.setattr(attention, "candidates", lambda: table)
    return kernel
