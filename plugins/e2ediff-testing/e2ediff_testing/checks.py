"""Checks for authors of parts: each raises AssertionError with what to change.

They are imported from the package: `from e2ediff_testing import check_interpolant`.
`e2ediff_testing.kit.check_plugin` runs all that apply, and trains with every part, as
`e2ediff plugins check` does.
"""

from e2ediff_testing.claims import own_randomness
from e2ediff_testing.networks import check_backbone, check_objective, check_regularizer
from e2ediff_testing.paths import check_interpolant, check_times
from e2ediff_testing.sampling import check_guidance, check_sampler
from e2ediff_testing.surroundings import (
    check_averaging,
    check_diagnostic,
    check_features,
    check_metric,
    check_optimizer,
    check_source,
    check_tracker,
)
from e2ediff_testing.tiny import (
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
