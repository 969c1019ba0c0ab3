"""e2ediff: encoder, decoder and diffusion network trained together, in one stage.

The vocabulary lies at the top of this package, one contract a file: `condition`, `data`,
`interpolant`, `times`, `latent`, `backbone`, `objective`, `regularizer`, `denoiser`, `sampler`,
`features`, `metric`, `distances`, `diagnostic`, `optimizer`, `averaging`, `tracker`, `addresses`,
`terminal`, `errors`.
This module itself imports nothing heavy, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from e2ediff.addresses import Address
    from e2ediff.model.inference import Model
    from e2ediff.sample.pipeline import Pipeline

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("e2ediff")
"""Marks a function of a plugin as one of the hooks of `e2ediff.host.hookspecs`."""


def load(run: Address, **options: Any) -> Model:
    """Load a trained model from a run directory: `e2ediff.load("runs/quickstart").sample([0, 9])`.

    The directory is text, a URL or a `pathlib.Path`.
    Options are the fields of `e2ediff.sample.load.ModelRef`, and `host` and `warn` of its `load`.
    """
    from e2ediff.sample.load import load_model

    return load_model(run, **options)


def pipeline(run: Address, **options: Any) -> Pipeline:
    """Load a trained model as a diffusers pipeline: `e2ediff.pipeline(run)(["cat", 3]).images`.

    Options are the fields of `e2ediff.sample.load.ModelRef`, and `host` and `warn` of its `load`.
    """
    from e2ediff.sample.pipeline import Pipeline

    return Pipeline.from_run(run, **options)
