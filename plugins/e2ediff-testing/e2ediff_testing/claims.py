"""What several checks claim."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def own_randomness(who: object) -> Iterator[None]:
    """Fail if torch's global generator is touched inside."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(state, torch.get_rng_state()), (
        f"{type(who).__name__} uses torch's global generator; draw from the one it is given"
    )


def is_float32(value: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Fail unless the tensor has this shape, is float32 and finite."""
    seen = f"{tuple(value.shape)} {value.dtype}"
    assert value.shape == shape, f"{what} is {seen}, make it of shape {shape}"
    assert value.dtype == torch.float32, f"{what} is {seen}, return float32"
    assert value.isfinite().all(), f"{what} is not finite; look for a division or a logarithm"


def near(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal but for the order of sums."""
    # float32 sums in another order differ by about 1e-6 of values of unit scale
    return bool(((a - b).abs() < 1e-4).all())
