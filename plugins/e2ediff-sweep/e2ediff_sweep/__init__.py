"""Search the weights, guidance and sampler that suit a trained run, on a cheap score."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the command; it is imported when it is called."""
    add("commands", "sweep", "e2ediff_sweep.cli:command")
