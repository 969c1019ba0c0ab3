"""UNITE for e2ediff: one encoder that also denoises, registers as latents, stopped gradients.

Source: arXiv 2603.22283, and the code released with it.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("backbones", "unite", "e2ediff_unite.backbone:UniteConfig")
    add("objectives", "unite", "e2ediff_unite.objective:Unite")
