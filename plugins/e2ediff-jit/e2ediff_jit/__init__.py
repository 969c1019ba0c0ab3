"""JiT, Just image Transformers, for e2ediff: diffusion of pixels, the control without a latent.

Source: Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise" (arXiv
2511.13720); what the paper was not read for is from a copy of the code released with it.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register_backbones(add: Callable[[str, type], None]) -> None:
    """Register `jit`."""
    from e2ediff_jit.backbone import JiTConfig

    add("jit", JiTConfig)


@hookimpl
def register_objectives(add: Callable[[str, type], None]) -> None:
    """Register `pixel`."""
    from e2ediff_jit.objective import Pixel

    add("pixel", Pixel)


@hookimpl
def register_interpolants(add: Callable[[str, type], None]) -> None:
    """Register `linear_scaled`."""
    from e2ediff_jit.interpolant import LinearScaled

    add("linear_scaled", LinearScaled)
