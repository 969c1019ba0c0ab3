"""The swept run, and candidates: ways to sample it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence

import attrs

from e2ediff.ablate.grid import Value
from e2ediff.errors import CheckpointError
from e2ediff.guidance import Guidance
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.host.structure import unstructure
from e2ediff.sample.load import ModelRef, recipe_of
from e2ediff.sample.post_hoc import Basis, stored_weights, width_of
from e2ediff.sampler import Sampler
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.manifest import Checkpoint
from e2ediff.store.run_directory import RunDirectory


@attrs.frozen
class Candidate:
    """One way to sample a run: weights, and assignments for `--set`; the recipe's if empty."""

    weights: str
    overrides: tuple[str, ...] = ()

    def of(self, ref: ModelRef) -> ModelRef:
        """Return the run's model with this candidate's choices."""
        return attrs.evolve(ref, weights=self.weights, overrides=self.overrides)

    @property
    def options(self) -> list[str]:
        """Return the options that `sample` and `eval` take for this candidate."""
        sets = [word for assignment in self.overrides for word in ("--set", assignment)]
        return ["--weights", self.weights, *sets]

    @property
    def words(self) -> str:
        """Format the options for a shell."""
        return shlex.join(self.options)


@attrs.frozen(eq=False)
class SweptRun:
    """The swept run, against which candidates are checked."""

    host: Host
    ref: ModelRef
    directory: RunDirectory
    checkpoint: Checkpoint
    recipe: Recipe
    basis: Basis | None

    def candidate(self, values: Sequence[Value]) -> Candidate:
        """Return the candidate with these values, one for each axis."""
        given = [a for value in values for a in value.assignments]
        weights = [a.text for a in given if a.path == "weights"]
        overrides = [*self.ref.overrides, *(str(a) for a in given if a.path != "weights")]
        # Set a block before its options, whichever was given first.
        overrides.sort(key=lambda text: text.partition("=")[0].count("."))
        default = self.ref.weights or self.recipe.default_weights
        return Candidate([default, *weights][-1], tuple(overrides))

    def recipe_of(self, candidate: Candidate) -> Recipe:
        """Return the run's recipe with a candidate's sampler and guidance; raises RecipeError."""
        return recipe_of(self.host, self.directory, candidate.overrides)

    def key(self, candidate: Candidate) -> str:
        """Return a key that is equal for equivalent candidates."""
        recipe = self.recipe_of(candidate)
        guidance = recipe.guidance and unstructure(self.host, recipe.guidance, Guidance)
        if isinstance(guidance, dict) and guidance.get("scale") == 1:
            guidance = None  # no guidance, so its other options do not matter
        sampler = unstructure(self.host, recipe.sampler, Sampler)
        return json.dumps([candidate.weights, sampler, guidance], sort_keys=True)

    def check_weights(self, name: str) -> None:
        """Refuse weights that cannot be loaded.

        Raises:
            CheckpointError: They are neither stored nor within reach.
        """
        width = width_of(name)
        if width is not None:
            basis = self.basis or Basis.open(
                self.directory.store, self.recipe, self.checkpoint, _quiet
            )
            basis.chosen(width)
        elif name not in (known := stored_weights(self.checkpoint)):
            raise CheckpointError(f"no weights '{name}'; it has {', '.join(known)}")


def _quiet(text: str) -> None:
    """Discard messages, which were shown when the run was opened."""


def open_run(host: Host, ref: ModelRef, warn: Callable[[str], None]) -> SweptRun:
    """Open the run, with its tracked averages; `ref` holds what all candidates share.

    Raises:
        RunDirectoryError, CheckpointError: It cannot be used.
    """
    directory = RunDirectory.open(ref.run)
    recipe = recipe_of(host, directory)
    opened = open_checkpoint(directory.store, ref.checkpoint, warn=warn)
    basis = Basis.open(directory.store, recipe, opened, warn) if recipe.post_hoc else None
    ref = attrs.evolve(ref, checkpoint=opened.name)
    return SweptRun(host, ref, directory, opened, recipe, basis)
