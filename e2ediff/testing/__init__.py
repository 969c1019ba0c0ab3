"""Checks for authors of parts: each raises AssertionError with what to change.

    from e2ediff.testing import check_interpolant
    def test_it_keeps_the_contract(): check_interpolant(MyPath())

`e2ediff.testing.kit.check_plugin` runs all that apply, and trains with every part, as
`e2ediff plugins check` does.
"""

from e2ediff.testing.claims import own_randomness
from e2ediff.testing.networks import check_backbone, check_objective, check_regularizer
from e2ediff.testing.paths import check_interpolant, check_times
from e2ediff.testing.sampling import check_guidance, check_sampler
from e2ediff.testing.surroundings import (
    check_averaging,
    check_diagnostic,
    check_features,
    check_metric,
    check_optimizer,
    check_source,
    check_tracker,
)
from e2ediff.testing.tiny import (
    IMAGE,
    GaussianDenoiser,
    TinyBackbone,
    make_batch,
    make_draw,
    make_nets,
)

__all__ = [
    "IMAGE",
    "GaussianDenoiser",
    "TinyBackbone",
    "check_averaging",
    "check_backbone",
    "check_diagnostic",
    "check_features",
    "check_guidance",
    "check_interpolant",
    "check_metric",
    "check_objective",
    "check_optimizer",
    "check_regularizer",
    "check_sampler",
    "check_source",
    "check_times",
    "check_tracker",
    "make_batch",
    "make_draw",
    "make_nets",
    "own_randomness",
]
