"""Every hook that a plugin may define.

A plugin is a module (or any object) with functions marked `@e2ediff.hookimpl`, named by an entry
point of the group `e2ediff`.
It is imported when a recipe requires its distribution or names one of its parts, and when the
environment variable E2EDIFF_LOAD lists it; an observer is called in such runs alone.
A hook may leave out any of its arguments.
Hooks register or observe; none alters a run: what changes training stands in the recipe.

    from e2ediff import hookimpl

    @hookimpl
    def register_objectives(add):
        add("variance_floor", VarianceFloor)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

hookspec = pluggy.HookspecMarker("e2ediff")


class Add(Protocol):
    """Registers a class under a name; the plugin that calls it is known."""

    def __call__(self, name: str, cls: type) -> None:
        """Register `cls`, an attrs class of the hook's contract, as `name`, in snake_case."""


# Registration. Called once, while plugins are loaded, one plugin at a time.


@hookspec
def register_backbones(add: Add) -> None:
    """Add subclasses of `e2ediff.backbone.BackboneConfig`."""


@hookspec
def register_interpolants(add: Add) -> None:
    """Add subclasses of `e2ediff.interpolant.Interpolant`."""


@hookspec
def register_time_samplers(add: Add) -> None:
    """Add subclasses of `e2ediff.times.TimeSampler`."""


@hookspec
def register_objectives(add: Add) -> None:
    """Add subclasses of `e2ediff.objective.Objective`."""


@hookspec
def register_regularizers(add: Add) -> None:
    """Add subclasses of `e2ediff.regularizer.Regularizer`."""


@hookspec
def register_guidance(add: Add) -> None:
    """Add subclasses of `e2ediff.guidance.Guidance`."""


@hookspec
def register_samplers(add: Add) -> None:
    """Add subclasses of `e2ediff.sampler.Sampler`."""


@hookspec
def register_sources(add: Add) -> None:
    """Add subclasses of `e2ediff.data.SourceConfig`."""


@hookspec
def register_optimizers(add: Add) -> None:
    """Add subclasses of `e2ediff.optimizer.OptimizerConfig`."""


@hookspec
def register_diagnostics(add: Add) -> None:
    """Add subclasses of `e2ediff.diagnostic.Diagnostic`."""


@hookspec
def register_trackers(add: Add) -> None:
    """Add subclasses of `e2ediff.tracker.TrackerConfig`."""


@hookspec
def register_features(add: Add) -> None:
    """Add subclasses of `e2ediff.features.FeatureConfig`."""


@hookspec
def register_metrics(add: Add) -> None:
    """Add subclasses of `e2ediff.metric.Metric`."""


@hookspec
def register_commands(group: object) -> None:
    """Add commands to `group`, the click group of the command line; called when it starts."""


# Observation. Called during a run; what they return is ignored.
# `run` is a frozen view of the run: recipe, directory, rank, images seen.


@hookspec
def run_started(run: object) -> None:
    """Networks are built and, on resume, loaded; no step has been taken."""


@hookspec
def step_ended(run: object, step: int) -> None:
    """An optimizer step has ended; `step` counts from 1.

    Carries no losses on purpose: reading them would wait for the device at every step.
    """


@hookspec
def losses_logged(run: object, step: int, losses: Mapping[str, float]) -> None:
    """Losses were read, every `cadence.log` steps; `losses` has each by its name."""


@hookspec
def diagnosed(run: object, step: int, values: Mapping[str, float]) -> None:
    """The diagnostics were measured, every `cadence.diagnose` steps."""


@hookspec
def checkpoint_saved(run: object, path: str) -> None:
    """A checkpoint is complete at `path`."""


@hookspec
def sampled(run: object, images: Tensor, labels: Tensor) -> None:
    """A preview was sampled: images (P, C, H, W) in [-1, 1] and their labels (P,)."""


@hookspec
def run_ended(run: object, error: BaseException | None) -> None:
    """The run is over; `error` is what stopped it, `None` at its regular end."""
