"""Random numbers as a function of what they are for, never of when or where they are drawn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """Derive a seed in [0, 2^63) for one purpose, e.g. ("draw", images seen, micro-shard).

    The same arguments give the same seed in every process, on every machine, at every resume.
    """
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device, seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Make a generator on `device`, seeded for one purpose."""
    import torch  # takes seconds, and a seed needs it not

    return torch.Generator(device).manual_seed(derive(seed, purpose, *numbers))
