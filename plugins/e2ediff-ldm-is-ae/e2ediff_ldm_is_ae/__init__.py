"""LDM-is-AE for e2ediff: a latent denoiser whose first part decodes and whose last part encodes.

Source: "Latent Diffusion Model is an Auto-Encoder" (arXiv 2609.37080), the algorithm and tables
in the README of PolyU-VCLab/LDMisAE, and the code and the training script released there (commit
e249bc1), which differ in places; each option says which of them has its default.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("backbones", "ldm_is_ae", "e2ediff_ldm_is_ae.backbone:LDMIsAEConfig")
    add("objectives", "ldm_is_ae", "e2ediff_ldm_is_ae.objective:LDMIsAE")
    add("optimizers", "stepped", "e2ediff_ldm_is_ae.optimizer:Stepped")
