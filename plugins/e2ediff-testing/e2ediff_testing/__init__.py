"""Checks for authors of parts, in their tests and by `plugins check`; `plugins new` begins a part.

    from e2ediff_testing import check_interpolant
    def test_it_keeps_the_contract(): check_interpolant(MyPath())

`e2ediff_testing.checks` lists what can be imported from here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from e2ediff import hookimpl

if TYPE_CHECKING:
    from e2ediff_testing.checks import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Import the checks when one is asked for: a command that lists plugins needs no torch."""
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("e2ediff_testing.checks"), name)


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the commands; they are imported when they are called."""
    add("commands", "plugins new", "e2ediff_testing.cli:new")
    add("commands", "plugins check", "e2ediff_testing.cli:check")
