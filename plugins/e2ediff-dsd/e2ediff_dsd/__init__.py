"""DSD, Diffusion as Self-Distillation, as an objective for e2ediff.

Source: Wang & Zhang 2025, "Diffusion As Self-Distillation: End-to-End Latent Diffusion In One
Model" (arXiv 2511.14716). No official code is public; what the paper does not give is our
choice and marked so.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("objectives", "dsd", "e2ediff_dsd.objective:DSD")
