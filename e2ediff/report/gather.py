"""Collect runs for a report: their state, final figures, curves, events and costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from e2ediff import addresses
from e2ediff.ablate.cost import TrainingCost, cost_of
from e2ediff.ablate.group import SPEC, Group, places
from e2ediff.ablate.train import STOPPED
from e2ediff.addresses import Address
from e2ediff.errors import E2EDiffError, RunDirectoryError
from e2ediff.evaluate.passport import Score
from e2ediff.evaluate.ranking import cards_of, figures_of
from e2ediff.figure import Figure, find
from e2ediff.host.leaves import leaves_of
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import parse_recipe
from e2ediff.store.curves import Curve, Figures
from e2ediff.store.known_runs import name_of_run
from e2ediff.store.run_directory import RESOLVED, RunDirectory
from e2ediff.store.storage import Store

_DIFFERENCES = 3  # of recipes, in a name
_NO_FIGURE = ("step", "images", "lr", "grad_norm")
_PICTURE = re.compile(r"(reconstructions-)?step-(\d{1,12})\.png")


@attrs.frozen(eq=False)
class Run:
    """One run; `state` is that of its `status.json`, or `missing`, or `damaged`.

    `figures` are the final ones, `leaves` the resolved recipe by path, `error` why it failed, and
    `reason` why it ended.
    `described` has the known declarations of figures.
    `previews` maps `samples` and `reconstructions` to files by step.
    """

    cell: str
    seed: int
    path: str
    state: str
    error: str = ""
    reason: str = ""
    step: int = 0
    images: int = 0
    name: str = ""
    curves: Mapping[str, Curve] = attrs.field(factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, float] = attrs.field(factory=dict)
    described: Mapping[str, Figure] = attrs.field(factory=dict)
    leaves: Mapping[str, str] = attrs.field(factory=dict)
    environment: Mapping[str, Any] = attrs.field(factory=dict)
    previews: Mapping[str, Mapping[int, str]] = attrs.field(factory=dict)
    cost: TrainingCost | None = None
    uncounted: str = ""
    store: Store | None = None

    @property
    def is_done(self) -> bool:
        """Return whether all steps were taken."""
        return self.state == "done"

    @property
    def collapse(self) -> str:
        """Say when its latents collapsed, with the signs; "" if they did not, or recovered."""
        signs = ""
        for event in self.events:
            if event.get("kind") == "collapse":
                found = event.get("signs")
                signs = "; ".join(map(str, found if isinstance(found, list) else []))
                signs = f"since step {event.get('step', '?')}: {signs or 'no sign given'}"
            elif event.get("kind") in ("recovered", "rewound"):
                signs = ""
        return signs


@attrs.frozen(eq=False)
class Gathered:
    """The content of a report: cells of runs, in order, and their origin.

    `kind` is `group`, `run` or `compare`; `baseline` is the cell that others are compared with.
    `recipes` has the values of each cell's resolved recipe, by path.
    """

    kind: str
    name: str
    place: str
    cells: Mapping[str, Sequence[Run]]
    recipes: Mapping[str, Mapping[str, str]]
    baseline: str
    command: Sequence[str]
    created: str
    match: str = ""
    overrides: Mapping[str, Sequence[str]] = attrs.field(factory=dict)

    @property
    def runs(self) -> list[Run]:
        """Return the runs of all cells."""
        return [run for runs in self.cells.values() for run in runs]

    @property
    def described(self) -> dict[str, Figure]:
        """Return the declarations of figures; without direction where runs disagree."""
        found: dict[str, Figure] = {}
        for run in self.runs:
            for name, figure in run.described.items():
                before = found.setdefault(name, figure)
                if before.better != figure.better:
                    found[name] = attrs.evolve(before, better=None)
        return found


def gather(host: Host, path: Address) -> Gathered:
    """Read a run's or an ablation's directory.

    Raises:
        RunDirectoryError: The directory is neither, or damaged.
    """
    path = addresses.plain(path)
    store = Store(path)
    if not store.exists(SPEC):
        if not store.exists("run.json"):
            found = store.list()
            what = "it has neither run.json nor spec.json" if found else "no such directory"
            raise RunDirectoryError(
                f"{path}: neither a run nor an ablation: {what}. Give a directory that "
                "e2ediff run or e2ediff ablate printed."
            )
        return gather_runs(host, [path])
    group, costs = Group.open(path), dict[str, TrainingCost]()
    outcomes = group.outcomes()
    cells: dict[str, list[Run]] = {cell: [] for cell in group.spec["cells"]}
    for job in places(group.spec):
        place = group.run(job.place)
        outcome = outcomes.get(job.place, {})
        cells[job.cell].append(_read_of_group(host, place, job.cell, job.seed, outcome, costs))
    spec = group.spec
    return Gathered(
        kind="group",
        name=str(spec["name"]),
        place=path,
        cells=cells,
        recipes={n: leaves_of(c["resolved"], n) for n, c in spec["cells"].items()},
        baseline=spec["baseline"],
        command=[str(word) for word in spec["command"]],
        created=str(spec["created"]),
        match=str(spec["match"]),
        overrides={n: [str(o) for o in c["overrides"]] for n, c in spec["cells"].items()},
    )


def gather_runs(host: Host, paths: Sequence[Address]) -> Gathered:
    """Read runs; those whose recipes differ in nothing but the seed are seeds of one cell.

    Raises:
        RunDirectoryError: One of them is not a run, or damaged.
        RecipeError: A resolved recipe is no YAML.
    """
    texts, costs = [*map(addresses.plain, paths)], dict[str, TrainingCost]()
    runs = [read_run(host, place, "", costs) for place in texts]
    cells: dict[str, list[Run]] = {}
    keys: dict[str, object] = {}
    for run in runs:
        key = {p: v for p, v in run.leaves.items() if p not in ("seed", "name")}
        for name, known in keys.items():
            if known == key and run.seed not in [other.seed for other in cells[name]]:
                break
        else:
            name = name_of_run(run.path)
            if (short := name.removesuffix(f"-seed{run.seed}")) not in cells:
                name = short or name
            base = name
            number = 1
            while name in cells:
                number += 1
                name = f"{base} ({number})"
            cells[name], keys[name] = [], key
        cells[name].append(attrs.evolve(run, cell=name))
    cells = {
        name: [attrs.evolve(run, cell=name) for run in found]
        for name, found in zip(_told_apart(cells), cells.values(), strict=True)
    }
    argv = [str(word) for word in runs[0].environment.get("argv", [])]
    return Gathered(
        kind="run" if len(runs) == 1 else "compare",
        name=runs[0].name if len(runs) == 1 else "comparison of runs",
        place=texts[0],
        cells=cells,
        recipes={name: found[0].leaves for name, found in cells.items()},
        baseline=next(iter(cells)),
        command=["e2ediff", *(argv[1:] if len(runs) == 1 else ["compare", *texts])],
        created=str(runs[0].environment.get("created", "")) if len(runs) == 1 else "",
    )


def differing_values(recipes: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return the values that differ between recipes, by path and by the recipe's name.

    The seed and the name of a recipe do not count. An option that only one part has is not
    listed, as the parts' names differ already.
    """
    found: dict[str, dict[str, str]] = {}
    for path in {p: None for leaves in recipes.values() for p in leaves}:
        values = {name: leaves[path] for name, leaves in recipes.items() if path in leaves}
        lost = len(values) < len(recipes)
        other_part = any(p.endswith(".name") and path.startswith(p[:-4]) for p in found)
        differs = len(set(values.values())) > 1 or (lost and not other_part)
        if differs and path not in ("seed", "name"):
            found[path] = values
    return found


def _told_apart(cells: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return names of cells that tell what differs, where their directories' names do not.

    Names that differ in nothing but a number get the values of the recipe that differ between
    them; where there are none and the names are equal, the folders that they are in.
    """
    plain = {name: re.sub(r" \(\d+\)$", "", name) for name in cells}
    like: dict[str, list[str]] = {}
    for name, own in plain.items():
        like.setdefault(re.sub(r"-\d+$", "", own), []).append(name)
    found: list[str] = []
    for name, own in plain.items():
        alike = next(names for names in like.values() if name in names)
        differing = differing_values({other: cells[other][0].leaves for other in alike})
        words = [f"{p.removesuffix('.name')}={v[name]}" for p, v in differing.items() if name in v]
        text = ", ".join(words[:_DIFFERENCES]) + ", ..." * (len(words) > _DIFFERENCES)
        if not text and [plain[other] for other in alike].count(own) > 1:
            text = cells[name][0].path.rstrip("/").rpartition("/")[0]
        told = f"{own} ({text})" if text else own
        number = sum(other.startswith(told) for other in found)
        found.append(f"{told} ({number + 1})" if told in found else told)
    return found


def _read_of_group(
    host: Host,
    path: str,
    cell: str,
    seed: int,
    outcome: Mapping[str, Any],
    costs: dict[str, TrainingCost],
) -> Run:
    """Read a run of an ablation; its errors are recorded in the result."""
    code, said = outcome.get("exit_code", 0), str(outcome.get("error", ""))
    failed = code not in (0, *STOPPED)
    if not Store(path).exists("run.json"):
        return Run(cell, seed, path, "failed" if failed else "missing", error=said)
    try:
        run = read_run(host, path, cell, costs)
    except E2EDiffError as error:
        return Run(cell, seed, path, "damaged", error=str(error))
    if failed and not run.is_done:
        return attrs.evolve(run, state="failed", error=said or run.error)
    return run


def read_run(host: Host, path: Address, cell: str, costs: dict[str, TrainingCost]) -> Run:
    """Read a run's directory.

    Args:
        host: Knows the parts, to count costs; a recipe with unknown parts is not counted.
        path: The run's directory or URL.
        cell: The cell that it belongs to.
        costs: Costs counted so far, by recipe; extended here.

    Raises:
        RunDirectoryError: It is not a run, or damaged.
        RecipeError: Its resolved recipe is no YAML.
    """
    path = addresses.plain(path)
    directory = RunDirectory.open(path)
    resolved = directory.resolved()
    leaves = leaves_of(resolved, directory.store.where(RESOLVED))
    status, environment = directory.status(), directory.environment()
    logged = Figures(directory.stream_metrics())
    key = re.sub(r"(?m)^seed: .*$", "", resolved)
    uncounted = ""
    if key not in costs:
        try:
            costs[key] = cost_of(parse_recipe(host, resolved, directory.store.where(RESOLVED)))
        except E2EDiffError as error:  # a plugin is missing
            uncounted = str(error)
    scores, declared = figures_of(cards_of(path)), directory.figures()
    described = {name: find(name, declared) for name in logged.curves}
    described |= {name: _described(name, score) for name, score in scores.items()}
    seed = leaves.get("seed", "0")
    state = str(status.get("state", "running"))
    return Run(
        cell=cell,
        seed=int(seed) if seed.isdecimal() else 0,
        path=path,
        state=state,
        error=str(status.get("reason", "")) if state == "failed" else "",
        reason=str(status.get("reason", "")),
        step=logged.step,
        images=logged.images,
        name=str(environment.get("name", "")),
        curves=logged.curves,
        events=directory.read_events(),
        figures=final_figures(logged) | {name: s.value for name, s in scores.items()},
        described={name: figure for name, figure in described.items() if figure},
        leaves=leaves,
        environment=environment,
        previews=_previews(directory.store),
        cost=costs.get(key),
        uncounted=uncounted,
        store=directory.store,
    )


def final_figures(logged: Figures) -> dict[str, float]:
    """Return the last value of diagnostics and speed, and the mean of a loss's last tenth.

    One step's loss is that of one batch and its times; the mean is less noisy.
    Figures that are not finite are left out.
    """
    found = {}
    for name, last in logged.last.items():
        final = logged.tails[name].mean if name in logged.tails else last
        if name.partition("/")[0] not in _NO_FIGURE and math.isfinite(final):
            found[name] = final
    return found


def _described(name: str, score: Score) -> Figure:
    """Declare a score of `e2ediff eval`, as a figure without a curve."""
    section = score.metric.get("section")
    if section is None:
        return Figure(name, better=score.better, shown_on=("table",), of="samples")
    pairs = section in ("reconstruction", "pairs")
    return Figure(name, better=score.better, of="reconstructions" if pairs else "")


def _previews(store: Store) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {"samples": {}, "reconstructions": {}}
    for name in store.list("samples"):
        if match := _PICTURE.fullmatch(name):
            kind = "reconstructions" if match[1] else "samples"
            found[kind][int(match[2])] = f"samples/{name}"
    return found
