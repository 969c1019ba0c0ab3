"""FlashAttention 3 or 4 in the place of torch's own flash attention, in the whole process."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

FLASH = {"sdpa_fa3": "FA3", "sdpa_fa4": "FA4"}
"""Kernels that replace torch's own flash attention, and what torch calls the replacement."""

_MODULES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute.interface"}


def check_installed(implementation: str) -> None:
    """Refuse a replacement that is not there.

    Raises:
        ImportError: This torch cannot replace its flash attention, or the package is missing.
    """
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise ImportError(f"torch {torch.__version__} cannot replace its flash attention")
    module, found = _MODULES[implementation], None
    with contextlib.suppress(ImportError):  # where the package around it is missing
        found = importlib.util.find_spec(module)
    if found is None:
        raise ImportError(f"{implementation} is not installed: there is no module {module}")


def in_use() -> str | None:
    """Return which flash attention is in the place of torch's own; None if that is in use."""
    found: str | None = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return found


def put_in_place(name: str) -> None:
    """Put the flash attention that a kernel needs in place, or torch's own for any other kernel.

    The backward pass finds it through torch's dispatcher, where it has to stay.
    """
    wanted = FLASH.get(name)
    if in_use() == wanted:
        return
    if wanted is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(wanted)


@contextlib.contextmanager
def in_place(name: str) -> Iterator[None]:
    """Have the flash attention that a kernel needs in place inside the block, or torch's own."""
    before = in_use()
    try:
        put_in_place(name)
        yield
    finally:
        put_in_place(next((known for known, flash in FLASH.items() if flash == before), ""))
