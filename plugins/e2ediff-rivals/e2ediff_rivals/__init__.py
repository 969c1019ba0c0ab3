"""Other end-to-end latent diffusion methods, as objectives for e2ediff.

`genfirst` (arXiv 2608.29335), `mean_flow` (arXiv 2505.13447), `unified_latents` (arXiv
2602.17270), `tweedie` (SpeeDiff, CVPR 2026), `repa_e` (arXiv 2504.10483) and `kl`, the variational
autoencoder of latent diffusion (arXiv 1312.6114, 2112.10752); `adversary` puts a critic (arXiv
2012.09841) around any of them, and `tuned_decoder` a last phase of the decoder alone behind it.
What their papers do not give, or what was not read, is our choice and marked so.
"""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("objectives", "kl", "e2ediff_rivals.kl:KL")
    add("objectives", "unified_latents", "e2ediff_rivals.unified_latents:UnifiedLatents")
    add("objectives", "tweedie", "e2ediff_rivals.tweedie:Tweedie")
    add("objectives", "repa_e", "e2ediff_rivals.repa_e:RepaE")
    add("objectives", "genfirst", "e2ediff_rivals.genfirst:GenFirst")
    add("objectives", "adversary", "e2ediff_rivals.adversary:Adversary")
    add("objectives", "tuned_decoder", "e2ediff_rivals.tuned_decoder:TunedDecoder")
    add("objectives", "mean_flow", "e2ediff_rivals.mean_flow:MeanFlow")
