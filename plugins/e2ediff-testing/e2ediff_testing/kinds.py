"""A row for each kind of part: where a recipe holds it, and what checks its contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from e2ediff.host.recipe import Recipe
from e2ediff_testing import networks, paths, sampling, surroundings


@attrs.frozen
class Kind:
    """A kind of part.

    `plural` is its registry, `key` the recipe's key that holds it, as one part or, if `many`, in
    a list; `block` is the assignment, where it takes more than that key.
    `check` tries the contract on a part and the recipe around it.
    `trained` says that it takes part in a training step, whose gradients it can spoil.
    """

    plural: str
    key: str
    check: Callable[[Any, Recipe], None]
    many: bool = False
    trained: bool = False
    block: str = ""

    def assignment(self, name: str) -> str:
        """Return what `--set` would take to put this part into a recipe."""
        if self.block:
            return self.block.replace("NAME", name)
        return f"{self.key}=[{name}]" if self.many else f"{self.key}={name}"

    def value(self, recipe: Recipe) -> Any:
        """Return the part that a recipe holds there."""
        found: Any = recipe
        for word in self.key.split("."):
            found = getattr(found, word)
        return found[0] if self.many else found


def _alone(check: Callable[[Any], None]) -> Callable[[Any, Recipe], None]:
    return lambda part, recipe: check(part)


def _backbone(part: Any, recipe: Recipe) -> None:
    networks.check_backbone(part, recipe.data.image)


def _objective(part: Any, recipe: Recipe) -> None:
    networks.check_objective(part, recipe.backbone)


_PERCEPTUAL = "objective.reconstruction.perceptual"
_SCORES = "scores={every: 16, images: 16, features: random_projection, metrics: [NAME]}"
KINDS: tuple[Kind, ...] = (
    Kind("backbones", "backbone", _backbone, trained=True),
    Kind("interpolants", "interpolant", _alone(paths.check_interpolant), trained=True),
    Kind("time_samplers", "times", _alone(paths.check_times), trained=True),
    Kind("objectives", "objective", _objective, trained=True),
    Kind(
        "regularizers", "regularizers", _alone(networks.check_regularizer), many=True, trained=True
    ),
    Kind("guidance", "guidance", _alone(sampling.check_guidance)),
    Kind("samplers", "sampler", _alone(sampling.check_sampler)),
    Kind("sources", "data", _alone(surroundings.check_source)),
    Kind("optimizers", "optimizer", _alone(surroundings.check_optimizer)),
    Kind("diagnostics", "diagnostics", _alone(surroundings.check_diagnostic), many=True),
    Kind("trackers", "trackers", _alone(surroundings.check_tracker), many=True),
    Kind("features", _PERCEPTUAL, _alone(surroundings.check_features), trained=True),
    Kind("metrics", "scores.metrics", _alone(surroundings.check_metric), many=True, block=_SCORES),
    Kind("averages", "target", _alone(surroundings.check_averaging)),
)
"""To add a kind, add its registry to `e2ediff.host.registry.KINDS`, a row here, and a template."""


def kind_of(plural: str) -> Kind:
    """Return the row of a registry."""
    (row,) = [row for row in KINDS if row.plural == plural]
    return row
