"""UNITE as an objective for e2ediff: one encoder that also denoises, both gradients stopped.

Source: arXiv 2603.22283, and the code released with it.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register_objectives(add: Callable[[str, type], None]) -> None:
    """Register `unite`."""
    from e2ediff_unite.objective import Unite

    add("unite", Unite)
