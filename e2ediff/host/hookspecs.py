"""Every hook that a plugin may define.

A plugin is a module (or any object) with functions marked `@e2ediff.hookimpl`: named by an entry
point of the group `e2ediff`, or one file given with `--plugin`.
Every installed plugin is loaded, each in a guard, so that a failing one does not affect others.
Import slow modules where they are used, or give `register` the text `module:Class`: then a plugin
costs a millisecond until a recipe names a part of it.
Observers are called in the runs whose recipe requires the plugin or names one of its parts, and
in all runs where the environment variable E2EDIFF_LOAD lists it.
A hook may leave out any of its arguments.
Hooks register or observe; none alters a run: whatever changes training is part of the recipe.

    from e2ediff import hookimpl

    @hookimpl
    def register(add):
        add("objectives", "variance_floor", "my_package.objective:VarianceFloor")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from e2ediff.condition import Condition

hookspec = pluggy.HookspecMarker("e2ediff")


class Add(Protocol):
    """Registers a part or a command of the calling plugin."""

    def __call__(self, kind: str, name: str, target: type | str) -> None:
        """Register `target` as `name`, in snake_case.

        Args:
            kind: The plural of the kind, as `objectives`, or `commands`.
            name: What a recipe calls it, or the word after `e2ediff`; of a subcommand of the
                built-in group `plugins`, both words: `plugins check`.
            target: An attrs class that keeps the kind's contract, or the text `module:Class`,
                which is imported when a recipe names the part; of a command the text
                `module:function` or the click command.
        """


@hookspec
def register(add: Add) -> None:
    """Add parts and commands: `add("objectives", "variance_floor", VarianceFloor)`.

    Called once, when the plugin is loaded.
    A class keeps the contract of its kind:

    - `backbones`: `e2ediff.backbone.BackboneConfig`
    - `interpolants`: `e2ediff.interpolant.Interpolant`
    - `time_samplers`: `e2ediff.times.TimeSampler`
    - `objectives`: `e2ediff.objective.Objective`
    - `regularizers`: `e2ediff.regularizer.Regularizer`
    - `guidance`: `e2ediff.guidance.Guidance`
    - `samplers`: `e2ediff.sampler.Sampler`
    - `sources`: `e2ediff.data.SourceConfig`
    - `optimizers`: `e2ediff.optimizer.OptimizerConfig`
    - `diagnostics`: `e2ediff.diagnostic.Diagnostic`
    - `trackers`: `e2ediff.tracker.TrackerConfig`
    - `features`: `e2ediff.features.FeatureConfig`
    - `metrics`: `e2ediff.metric.Metric`
    - `averages`: `e2ediff.averaging.Averaging`
    - `commands`: `click.Command`
    """


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
    """A checkpoint is complete at `path`.

    It was written beside training: `run.images_seen` may be beyond it by then.
    """


@hookspec
def sampled(run: object, images: Tensor, condition: Condition) -> None:
    """A preview was sampled: images (P, C, H, W) in [-1, 1] and a condition for each."""


@hookspec
def run_ended(run: object, error: BaseException | None) -> None:
    """The run is over; `error` is what stopped it, `None` at its regular end."""
