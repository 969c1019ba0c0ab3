"""Plan an ablation, and check it as a whole before the first run starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import yaml

from e2ediff import addresses
from e2ediff.ablate.cost import TrainingCost, cost_of, matched_steps
from e2ediff.ablate.grid import (
    Assignment,
    Axis,
    Cell,
    GridError,
    cells,
    find_cell,
    parse_axis,
    parse_seeds,
)
from e2ediff.addresses import Address
from e2ediff.errors import Problem, RecipeError
from e2ediff.host.data_block import ShowsProgress
from e2ediff.host.leaves import leaves_of
from e2ediff.host.listing import aligned
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe, dump_recipe, load_recipe
from e2ediff.model.build import problems

Match = Literal["steps", "compute"]


@attrs.frozen
class Job:
    """One run of a grid: its changes of the recipe, and the name of its directory.

    `recipe` is the cell's recipe, if it has one of its own.
    """

    cell: str
    seed: int
    overrides: tuple[str, ...]
    recipe: Address | None = None

    @property
    def place(self) -> str:
        """Return its path below `runs/`."""
        return f"{self.cell}-seed{self.seed}"


@attrs.frozen
class AblationPlan:
    """An ablation: `jobs` are all cells of the first seed, then of the next.

    `costs` and `resolved` (YAML with seed 0) are by cell.
    `words` are the command that makes it, if that is not `e2ediff ablate`.
    """

    recipe: str
    text: str
    name: str
    sets: tuple[str, ...]
    vary: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    match: Match
    jobs: tuple[Job, ...]
    costs: Mapping[str, TrainingCost]
    resolved: Mapping[str, str]
    words: tuple[str, ...] = ()

    @property
    def cells(self) -> list[str]:
        """Return the names of the cells, in the order of the grid."""
        return list(self.costs)

    def command(self) -> list[str]:
        """Return the command that makes this group again."""
        if self.words:
            return list(self.words)
        words = ["e2ediff", "ablate", self.recipe]
        for text in self.vary:
            words += ["--vary", text]
        words += ["--seeds", ",".join(map(str, self.seeds))]
        for text in self.sets:
            words += ["--set", text]
        return [*words, "--baseline", self.baseline, "--match", self.match]

    def remarks(self) -> list[str]:
        """Return remarks on what limits the comparison of cells."""
        return [*self._unscored(), *self._reset()]

    def _unscored(self) -> list[str]:
        read = {name: yaml.safe_load(text) for name, text in self.resolved.items()}
        silent = [name for name, recipe in read.items() if recipe.get("scores") is None]
        if not silent:
            return []
        some = "the recipe has" if len(silent) == len(self.resolved) else f"{silent[0]} has"
        return [
            f"{some} no `scores`, so that cells are judged by their reconstructions and not by "
            "their samples; to measure both, add: --set 'scores={every: 100000, features: "
            "random_projection, metrics: [kid]}'"
        ]

    def _reset(self) -> list[str]:
        """List options that cells lost to defaults because naming a part resets its options."""
        leaves = {name: leaves_of(text, name) for name, text in self.resolved.items()}
        base, changes = leaves[self.baseline], {j.cell: j.overrides for j in self.jobs}
        lost: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for cell, own in leaves.items():
            texts = dict(change.split("=", 1) for change in changes[cell])
            given = {  # options that blocks set themselves, by path
                f"{path}.{key}" for path, text in texts.items() for key in leaves_of(text, path)
            } | set(texts)
            found = tuple(
                (path, value)
                for path, value in own.items()
                if base.get(path, value) != value
                and not path.endswith("name")
                and path not in given
                and any(path.startswith(f"{part}.") for part in texts)
            )
            if found:
                lost.setdefault(found, []).append(cell)
        return [
            f"{'cell' if len(cells) == 1 else 'cells'} {', '.join(cells)}: not as in "
            f"{self.baseline}, because a part that is named starts from its own defaults: "
            + ", ".join(f"{path} {value} (not {base[path]})" for path, value in found)
            + "; to keep these options, append to the value: "
            + "".join(f"+{path}={base[path]}" for path, _ in found)
            for found, cells in lost.items()
        ]

    def spec(self) -> dict[str, Any]:
        """Return what must not change when the ablation is resumed, and the cells."""
        overrides = {j.cell: j.overrides for j in self.jobs if j.seed == self.seeds[0]}
        return {
            "vary": list(self.vary),
            "seeds": list(self.seeds),
            "set": list(self.sets),
            "baseline": self.baseline,
            "match": self.match,
            "cells": {
                name: {
                    "overrides": [o for o in overrides[name] if not o.startswith("seed=")],
                    "parameters": cost.parameters,
                    "steps": cost.total_steps,
                    "flops": cost.total,
                    "resolved": self.resolved[name],
                }
                for name, cost in self.costs.items()
            },
        }


def plan_ablation(
    host: Host,
    recipe: Address,
    vary: Sequence[str],
    seeds: str,
    sets: Sequence[str] = (),
    baseline: str | None = None,
    match: Match = "steps",
    *,
    progress: ShowsProgress | None = None,
) -> AblationPlan:
    """Read the grid and check every cell with every seed.

    Args:
        host: What knows the parts.
        recipe: Path or URL of a recipe.
        vary: Axes, as given to `--vary`.
        seeds: As given to `--seeds`.
        sets: Assignments for all cells.
        baseline: Name of the cell that the others are compared with; by default the first.
        match: `steps` leaves each cell the recipe's length; `compute` gives it as many steps as
            the baseline's FLOPs pay for.
        progress: Where to report what is inferred from images; by default nowhere.

    Raises:
        GridError: The grid itself is wrong, or two of its cells are the same.
        RecipeError: Cells are no recipes; has the problems of all of them.
    """
    axes, numbers = [parse_axis(text) for text in vary], parse_seeds(seeds)
    grid = cells(axes)
    base = find_cell(baseline, grid)
    if match == "compute":
        _refuse_lengths(axes)
    plan = plan_cells(host, recipe, grid, numbers, sets, base.name, match, progress=progress)
    return attrs.evolve(plan, vary=tuple(vary))


def plan_cells(
    host: Host,
    recipe: Address,
    grid: Sequence[Cell],
    seeds: Sequence[int],
    sets: Sequence[str],
    baseline: str,
    match: Match,
    budget: TrainingCost | None = None,
    *,
    progress: ShowsProgress | None = None,
) -> AblationPlan:
    """Check every cell of a grid with every seed.

    Args:
        host: What knows the parts.
        recipe: Path or URL of the recipe of cells that have none of their own.
        grid: The cells.
        seeds: Each cell is trained with each.
        sets: Assignments for all cells, made before their own.
        baseline: Name of the cell that the others are compared with.
        match: As for `plan_ablation`.
        budget: Whose FLOPs pay for the steps where compute is matched; by default the baseline's.
        progress: As for `plan_ablation`.

    Raises:
        GridError: Two cells are the same.
        RecipeError: Cells are no recipes; has the problems of all of them.
    """
    recipe = addresses.plain(recipe)
    found = _check(host, recipe, grid, seeds, sets, progress)
    _refuse_same(found)
    costs = {cell.name: cost_of(found[cell.name]) for cell in grid}
    lengths: dict[str, tuple[str, ...]] = dict.fromkeys(costs, ())
    if match == "compute":
        budget = budget or costs[baseline]
        steps = {name: matched_steps(cost, budget) for name, cost in costs.items()}
        lengths = {name: (f"steps={number}",) for name, number in steps.items()}
        costs = {n: attrs.evolve(cost, total_steps=steps[n]) for n, cost in costs.items()}
    jobs = []
    for seed in seeds:
        for cell in grid:
            changes = (*map(str, _assignments(cell, sets, seed)), *lengths[cell.name])
            jobs.append(Job(cell.name, seed, changes, cell.recipe))
    resolved = {}
    for job in jobs[: len(grid)]:
        one = attrs.evolve(load_recipe(host, job.recipe or recipe, job.overrides), seed=0)
        resolved[job.cell] = dump_recipe(host, one)
    with addresses.open_file(recipe, typed=True) as file:
        text = file.read().decode("utf-8-sig")
    return AblationPlan(
        recipe, text, found[baseline].name, tuple(sets), (), tuple(seeds), baseline, match,
        tuple(jobs), costs, resolved,
    )  # fmt: skip


def _assignments(cell: Cell, sets: Sequence[str], seed: int) -> list[Assignment]:
    """List the changes of a cell with a seed, in the order in which they are made."""
    common = []
    for i, text in enumerate(sets, 1):
        path, sign, value = text.partition("=")
        if not sign:
            raise GridError(
                f"--set {text!r} is not path=value. Write for example objective.floor=0.5."
            )
        common.append(Assignment(path, value, f"--set {i}"))
    return [*common, *cell.assignments, Assignment("seed", str(seed), "--seeds")]


def _refuse_lengths(axes: Sequence[Axis]) -> None:
    for axis in axes:
        if {a.path for value in axis.values for a in value.assignments} & {"steps", "images"}:
            raise GridError(
                f"--vary {axis.path} sets the length of training, and so does --match compute. "
                "Leave one of them out."
            )


def _check(
    host: Host,
    recipe: str,
    grid: Sequence[Cell],
    seeds: Sequence[int],
    sets: Sequence[str],
    progress: ShowsProgress | None,
) -> dict[str, Recipe]:
    """The recipe of each cell, with the first seed.

    Raises:
        RecipeError: With each problem once, and the cells that have it.
        ResourceError: A tracker's package is not installed.
    """
    found: dict[str, Recipe] = {}
    wrong: dict[Problem, list[str]] = {}
    for cell in grid:
        for seed in seeds:
            changes = _assignments(cell, sets, seed)
            own: Sequence[Problem]
            try:
                words = [*map(str, changes)]
                read = load_recipe(host, cell.recipe or recipe, words, progress=progress)
                found.setdefault(cell.name, read)
                own = problems(read)
            except RecipeError as error:
                own = error.problems
            for problem in own:
                named = attrs.evolve(problem, line=_origin(problem.line, changes))
                names = wrong.setdefault(named, [])
                if cell.name not in names:
                    names.append(cell.name)
    if wrong:
        raise RecipeError(
            recipe,
            [
                attrs.evolve(
                    p,
                    line=f"{_who(names, grid)}{', ' if p.line else ''}{p.line}",
                    hint=f"{p.hint} {_alone(p)}".strip() if len(names) < len(grid) else p.hint,
                )
                for p, names in wrong.items()
            ],
        )
    for read in found.values():
        for tracker in read.trackers:
            tracker.check()
    return found


def _who(names: Sequence[str], grid: Sequence[Cell]) -> str:
    if len(names) == len(grid) > 1:
        return "every cell"
    return f"cell{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _alone(problem: Problem) -> str:
    """How one value of an axis gets what all would get by the `--set` that is advised."""
    advised = re.search(r"`--set ([^`\s]+)`", f"{problem.what} {problem.hint}")
    return f"(In --vary, append to the value: +{advised[1]}.)" if advised else ""


def _origin(line: str, changes: Sequence[Assignment]) -> str:
    """The option that a problem comes from; to the recipe all changes are `--set`."""
    number = re.fullmatch(r"--set (\d+)", line)
    return changes[int(number[1]) - 1].origin if number else line


def _refuse_same(found: Mapping[str, Recipe]) -> None:
    for (name, recipe), (other, same) in itertools.combinations(found.items(), 2):
        if recipe == same:
            raise GridError(f"cells {name} and {other} are the same recipe. Remove one.")


def plan_lines(plan: AblationPlan) -> list[str]:
    """The table of `--dry-run`: cells with parameters, FLOPs, length and changes."""
    rows = [("cell", "parameters", "MFLOP/image", "steps", "TFLOP in all", "changes")]
    for name, cell in plan.spec()["cells"].items():
        cost = plan.costs[name]
        changes = [o for o in cell["overrides"] if o not in plan.sets]
        rows.append(
            (
                f"{name} (baseline)" if name == plan.baseline else name,
                f"{cost.parameters:,}",
                f"{cost.per_image / 1e6:,.4g}",
                f"{cost.total_steps:,}",
                f"{cost.total / 1e12:,.4g}",
                " ".join(changes),
            )
        )
    lines = aligned(rows, right=range(1, 5))
    seeds = ", ".join(map(str, plan.seeds))
    total = sum(plan.costs[job.cell].total for job in plan.jobs)
    lines.append(
        f"{len(plan.jobs)} runs: {len(plan.costs)} cells, seeds {seeds}; {total / 1e12:,.4g} "
        f"TFLOP in all, matched by {plan.match}"
    )
    return lines
