"""Prepare data for training: crop images once, find damaged ones, count classes."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the command; it is imported when it is called."""
    add("commands", "data", "e2ediff_data.cli:command")
