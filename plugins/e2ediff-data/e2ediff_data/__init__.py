"""Prepare data for training: crop images once, find damaged ones, count classes."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the command and the source; each is imported when it is used."""
    add("commands", "data", "e2ediff_data.cli:command")
    add("sources", "shards", "e2ediff_data.shards:Shards")
