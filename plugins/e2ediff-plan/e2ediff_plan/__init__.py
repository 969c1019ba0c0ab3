"""Forecast what a recipe costs before it is run: arithmetic, memory, time and disk.

Passes are counted on the meta device, and memory is followed through a step on fake tensors. What
neither shows (a device's peak rate, the share of it that is reached) is an assumption that
`e2ediff plan` prints with its source.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the command; its module is imported when it is called."""
    add("commands", "plan", "e2ediff_plan.cli:command")
