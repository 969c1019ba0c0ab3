"""UNITE for e2ediff: one encoder that also denoises, registers as latents, stopped gradients.

Source: arXiv 2603.22283, and the code released with it.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register_backbones(add: Callable[[str, type], None]) -> None:
    """Register `unite`."""
    from e2ediff_unite.backbone import UniteConfig

    add("unite", UniteConfig)


@hookimpl
def register_objectives(add: Callable[[str, type], None]) -> None:
    """Register `unite`."""
    from e2ediff_unite.objective import Unite

    add("unite", Unite)
