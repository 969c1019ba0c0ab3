"""JiT, Just image Transformers, for e2ediff: diffusion of pixels, the control without a latent.

Source: Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise" (arXiv
2511.13720); what is not from the paper is from a copy of the code released with it.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("backbones", "jit", "e2ediff_jit.backbone:JiTConfig")
    add("objectives", "pixel", "e2ediff_jit.objective:Pixel")
    add("interpolants", "linear_scaled", "e2ediff_jit.interpolant:LinearScaled")
