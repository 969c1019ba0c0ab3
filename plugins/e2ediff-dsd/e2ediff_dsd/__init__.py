"""DSD, Diffusion as Self-Distillation, as an objective for e2ediff.

Source: Wang & Zhang 2025, "Diffusion As Self-Distillation: End-to-End Latent Diffusion In One
Model" (arXiv 2511.14716). No official code is public; what the paper does not give is our
choice and marked so.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register_objectives(add: Callable[[str, type], None]) -> None:
    """Register `dsd`."""
    from e2ediff_dsd.objective import DSD

    add("dsd", DSD)
