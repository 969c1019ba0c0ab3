"""Axes of a sweep: as for `ablate`, but of weights, sampler and guidance only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from e2ediff.ablate.grid import Axis, GridError, parse_axis
from e2ediff.condition import ClassLabels
from e2ediff.errors import E2EDiffError, Problem, RecipeError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.host.structure import unstructure
from e2ediff.sample.post_hoc import stored_weights
from e2ediff.sampler import Sampler
from e2ediff_sweep.candidates import Candidate, SweptRun

ROOTS = ("weights", "sampler", "guidance")
_WIDTHS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
_INTERVALS = ((0.0, 1.0), (0.2, 1.0), (0.0, 0.8), (0.2, 0.8))


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Parse the axes of `--vary`.

    Raises:
        GridError: One is malformed, repeated, or of an option fixed by training.
    """
    axes = [parse_axis(text) for text in texts]
    for axis in axes:
        for value in axis.values:
            for one in value.assignments:
                root = one.path.partition(".")[0]
                if root not in ROOTS or (root == "weights") != (one.path == "weights"):
                    raise GridError(
                        f"--vary {axis.path}: {one.path} belongs to training; a sweep varies "
                        "weights, and what is below sampler and guidance."
                    )
        if [a.path for a in axes].count(axis.path) > 1:
            raise GridError(f"--vary {axis.path} is given twice; give all its values at once.")
    return axes


def default_axes(run: SweptRun) -> list[Axis]:
    """Return axes of width or weights, guidance scale and interval, sampler, and spacing."""
    return [parse_axis(text) for text in _defaults(run)]


def _defaults(run: SweptRun) -> Iterator[str]:
    sets, recipe = run.ref.overrides, run.recipe_of(Candidate("", run.ref.overrides))
    reach = run.basis.widths() if run.basis else []
    widths = [f"ema:{w:g}" for w in _WIDTHS if reach and reach[0] <= w <= reach[-1]]
    stored = [w for w in stored_weights(run.checkpoint) if not (widths and "." in w)]
    names = [*widths, *stored]
    if len(names) > 1 and run.ref.weights is None:
        yield f"weights={','.join(names)}"
    if not any(s.startswith("guidance") for s in sets):
        yield from _guidances(recipe)
    if not any(s.startswith("sampler") for s in sets):
        yield from _samplers(run.host, recipe)


def _guidances(recipe: Recipe) -> Iterator[str]:
    if recipe.guidance is None:
        if recipe.data.image.conditioning != ClassLabels(0) and recipe.label_drop > 0:
            blocks = [
                f"{{name: classifier_free, scale: {scale:g}, t_min: {low:g}, t_max: {high:g}}}"
                for scale in _SCALES[1:]
                for low, high in (_INTERVALS[0], _INTERVALS[-1])
            ]
            yield f"guidance=[null, {', '.join(blocks)}]"
        return
    guidance: Any = recipe.guidance
    known = {field.alias for field in attrs.fields(type(guidance))}
    if "scale" in known:
        yield f"guidance.scale={','.join(f'{s:g}' for s in _SCALES)}"
    if {"t_min", "t_max"} <= known:
        pairs = [f"{low:g}+guidance.t_max={high:g}" for low, high in _INTERVALS]
        yield f"guidance.t_min={','.join(pairs)}"


def _samplers(host: Host, recipe: Recipe) -> Iterator[str]:
    """Yield the recipe's sampler, `heun` and `dpmpp_2m` at full and half steps; then spacing.

    `heun` calls the network twice a step, and so gets half as many. Samplers that do not suit the
    recipe's guidance, or whose plugin is not installed, are left out.
    """
    own = unstructure(host, recipe.sampler, Sampler)
    if not isinstance(own, dict) or "steps" not in own:
        return
    blocks = []
    for steps in dict.fromkeys((recipe.sampler.steps, max(2, recipe.sampler.steps // 2))):
        blocks.append(_block({**own, "steps": steps}))
        for name, count in (("heun", (steps + 1) // 2), ("dpmpp_2m", steps)):
            cls = host.registries["samplers"].find(name)
            if cls is None or own["name"] == name:
                continue
            if not (recipe.guidance and recipe.guidance.problems(cls(steps=count))):
                blocks.append(_block({"name": name, "steps": count}))
    yield f"sampler=[{', '.join(blocks)}]"
    if own.get("spacing") in ("uniform", "karras") and recipe.sampler.shift == 1:
        yield "sampler.spacing=uniform,karras"


def _block(options: Mapping[str, object]) -> str:
    """Format a block as YAML on one line; text needs no quotes here."""
    words = (f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items())
    return f"{{{', '.join(words)}}}"


def check(run: SweptRun, axes: Sequence[Axis]) -> None:
    """Refuse axes of which some combination cannot be sampled.

    Weights are checked apart from sampler and guidance, to which they do not matter.

    Raises:
        RecipeError: Some combination is wrong; has every problem.
    """
    problems: dict[Problem, None] = {}
    for group in _groups(axes):
        for values in itertools.product(*(axis.values for axis in group)):
            origins = [a.origin for value in values for a in value.assignments]
            line = "; ".join(dict.fromkeys(origins))
            candidate = run.candidate(values)
            for found in _problems(run, candidate):
                problems[attrs.evolve(found, line=line or found.line)] = None
    if problems:
        raise RecipeError("sweep", list(problems))


def _problems(run: SweptRun, candidate: Candidate) -> Iterator[Problem]:
    def tried(act: Callable[[], object]) -> Iterator[Problem]:
        try:
            act()
        except RecipeError as error:
            yield from error.problems
        except E2EDiffError as error:
            yield Problem("weights", str(error))

    yield from tried(lambda: run.recipe_of(candidate))
    yield from tried(lambda: run.check_weights(candidate.weights))


def _groups(axes: Sequence[Axis]) -> list[Sequence[Axis]]:
    """Group axes that must suit each other, after a group of none for what is set for all.

    Those of weights are one group, those of sampler and guidance another; a value that sets both
    makes them one.
    """
    weights, others = list[Axis](), list[Axis]()
    for axis in axes:
        paths = {a.path for value in axis.values for a in value.assignments}
        if "weights" in paths and len(paths) > 1:
            return [(), axes]
        (weights if "weights" in paths else others).append(axis)
    return [(), weights, others]
