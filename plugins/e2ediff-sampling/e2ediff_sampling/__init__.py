"""Further samplers, adaptive, multistep and stochastic, and further kinds of guidance."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the parts; a class is imported when a recipe names it."""
    add("samplers", "dopri5", "e2ediff_sampling.adaptive:Dopri5")
    add("samplers", "dpmpp_2m", "e2ediff_sampling.multistep:DPMSolverPP2M")
    add("samplers", "unipc", "e2ediff_sampling.multistep:UniPC")
    add("samplers", "sde", "e2ediff_sampling.sde:SDE")
    add("guidance", "cfg_plus_plus", "e2ediff_sampling.classifier_free:CFGPlusPlus")
    add("guidance", "cfg_zero_star", "e2ediff_sampling.classifier_free:CFGZeroStar")
    add("guidance", "apg", "e2ediff_sampling.classifier_free:APG")
    add("guidance", "autoguidance", "e2ediff_sampling.combined:Autoguidance")
    add("guidance", "interval", "e2ediff_sampling.combined:Interval")
    add("guidance", "chain", "e2ediff_sampling.combined:Chain")
