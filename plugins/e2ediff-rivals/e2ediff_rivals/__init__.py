"""Other end-to-end latent diffusion methods, as objectives for e2ediff.

`unified_latents` (arXiv 2602.17270), `tweedie` (SpeeDiff, CVPR 2026) and `repa_e` (arXiv
2504.10483). What their papers do not give, or what was not read, is our choice and marked so.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register_objectives(add: Callable[[str, type], None]) -> None:
    """Register the three."""
    from e2ediff_rivals.repa_e import RepaE
    from e2ediff_rivals.tweedie import Tweedie
    from e2ediff_rivals.unified_latents import UnifiedLatents

    add("unified_latents", UnifiedLatents)
    add("tweedie", Tweedie)
    add("repa_e", RepaE)
