"""The directory of an ablation: `spec.json`, `recipe.yaml`, `runs/`, `logs/`, the report."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from e2ediff import addresses
from e2ediff.ablate.plan import AblationPlan, Job
from e2ediff.addresses import Address
from e2ediff.errors import Problem, RecipeError, RunDirectoryError
from e2ediff.host.leaves import leaves_of
from e2ediff.limits import MAX_GRAPH, json_object
from e2ediff.store.lock import LOCK, acquire
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

_MOST_RUNS = 100_000  # each is looked for, and a short list of cells and seeds means billions

SPEC, OUTCOMES, RECIPE = "spec.json", "outcomes.json", "recipe.yaml"


class Group:
    """An ablation's files, all below `path`; they contain no absolute paths.

    Make one with `create` or `open`; train inside `with`.
    """

    def __init__(self, path: Address, spec: Mapping[str, Any]) -> None:
        self.path = addresses.plain(path)
        self.store = Store(path)
        self.spec = spec
        self._lock: Callable[[], None] | None = None

    @classmethod
    def create(
        cls, out: Address | None, plan: AblationPlan, environment: Mapping[str, Any]
    ) -> Group:
        """Make the directory of a new ablation.

        Args:
            out: Where; None is `groups/NAME`, `groups/NAME-2`, ...
            plan: The ablation.
            environment: The result of `describe_environment`.

        Raises:
            RunDirectoryError: `out` exists and is not empty, or is not a local path.
            ResourceError: It cannot be written.
        """
        if out is None:
            groups = Store("groups")
            out = groups.where(groups.create_unique_dir(plan.name, LOCK))
        store = _local(out)
        local = store.local_path() or store.url
        taken = os.path.lexists(local) and not os.path.isdir(local)
        if taken or not _is_vacant(store) or _holds_other(store, plan.text):
            more = ", or continue the ablation in it with --resume" if store.exists(SPEC) else ""
            raise RunDirectoryError(f"{out}: exists and is not empty. Choose another --out{more}.")
        spec = {
            "version": 1,
            "name": plan.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": plan.command(),
            **plan.spec(),
            "environment": dict(environment),
        }
        store.write(RECIPE, plan.text.encode())
        # Last: it makes this a group.
        store.write(SPEC, json.dumps(spec, indent=1).encode() + b"\n")
        return cls(out, spec)

    @classmethod
    def never_began(cls, path: Address) -> bool:
        """Return whether an ablation was killed here before it began; `create` reuses it."""
        store = _local(path)
        return bool(store.list()) and _is_vacant(store)

    @classmethod
    def open(cls, path: Address) -> Group:
        """Open the directory of an ablation.

        Raises:
            RunDirectoryError: There is none, or its `spec.json` is damaged.
        """
        try:
            spec = json_object(_local(path).read(SPEC, MAX_GRAPH))
        except OSError as error:
            raise RunDirectoryError(
                f"{path}: not the directory of an ablation: it has no {SPEC}. Give the one that "
                "e2ediff ablate printed."
            ) from error
        except ValueError as error:
            raise RunDirectoryError(f"{path}/{SPEC}: is damaged: {error}.") from error
        if not _whole(spec):
            raise RunDirectoryError(f"{path}/{SPEC}: is damaged: it describes no ablation.")
        return cls(path, spec)

    @classmethod
    def latest(cls, plan: AblationPlan) -> str:
        """Find the newest group of a plan's name in `groups/`, even one killed at its start.

        Raises:
            RunDirectoryError: There is none.
        """
        pattern = re.compile(re.escape(plan.name) + r"(?:-(\d{1,9}))?")
        matches = [(pattern.fullmatch(found), found) for found in Store("groups").list()]
        for _, found in sorted(((int(m[1] or 1), f) for m, f in matches if m), reverse=True):
            path = f"groups/{found}"
            store = Store(path)
            # The second of `flow` and the first of a recipe called `flow-2` have the same path.
            if store.exists(SPEC):
                # Don't fall back on an older one if this is damaged: opening it reports that.
                with contextlib.suppress(RunDirectoryError):
                    if cls.open(path).spec["name"] != plan.name:
                        continue
                return path
            if cls.never_began(path) and not _holds_other(store, plan.text):
                return path
        raise RunDirectoryError(
            f"--resume: no ablation of '{plan.name}' in groups/ to continue; start one without "
            "--resume, or name its directory with --out"
        )

    def __enter__(self) -> Group:
        self._lock = acquire(self.store, self.path)
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock()
            self._lock = None

    def run(self, place: str) -> str:
        """Return the path of a run's directory."""
        return f"{self.path}/runs/{place}"

    def log(self, place: str) -> Path:
        """Return the path of a run's log; outside the run's directory, which must start empty."""
        return Path(self.store.local_path("logs") or "logs", f"{place}.log")

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Read how each run's process ended last, by the run's name."""
        try:
            found = json_object(self.store.read(OUTCOMES, MAX_GRAPH))
        except (OSError, ValueError):
            return {}
        return {name: entry for name, entry in found.items() if isinstance(entry, dict)}

    def record(self, place: str, exit_code: int, error: str) -> None:
        """Record how a run's process ended."""
        entry = {"exit_code": exit_code, "error": error}
        outcomes = {**self.outcomes(), place: entry}
        self.store.write(OUTCOMES, json.dumps(outcomes, indent=1).encode() + b"\n")

    def is_done(self, job: Job) -> bool:
        """Return whether a run took all of its steps."""
        try:
            return RunDirectory.open(self.run(job.place)).status().get("state") == "done"
        except RunDirectoryError:
            return False  # none yet, or damaged, which the run itself will report

    def refuse_other(self, plan: AblationPlan) -> None:
        """Refuse a plan other than the one started here; further seeds are allowed.

        Raises:
            RecipeError: The plan differs; lists former and present values.
        """
        before, now = _flat(self.spec), _flat(plan.spec())
        if set(self.spec["seeds"]) < set(plan.seeds):
            now["--seeds"] = before["--seeds"]
        found = [
            Problem(
                path,
                f"was {before.get(path, 'not given')} in {self.path}, "
                f"is {now.get(path, 'not given')} here.",
                hint="Give the same as before, or start another ablation.",
            )
            for path in {**before, **now}
            if before.get(path) != now.get(path)
        ]
        options = [p for p in found if not p.where.startswith("cells.")]
        if found:  # other options change the cells, which need no listing then
            raise RecipeError(f"{plan.recipe} (--resume)", options or found)

    def extend(self, plan: AblationPlan) -> None:
        """Add the plan's further seeds, and the command that names them; inside `with`.

        Raises:
            ResourceError: It cannot be written.
        """
        if list(plan.seeds) == self.spec["seeds"]:
            return
        self.spec = {**self.spec, "seeds": list(plan.seeds), "command": plan.command()}
        self.store.write(SPEC, json.dumps(self.spec, indent=1).encode() + b"\n")


def _flat(spec: Mapping[str, Any]) -> dict[str, str]:
    """Flatten the part of a specification that matters: options, and each cell's recipe."""
    options = {"vary": "--vary", "seeds": "--seeds", "set": "--set"}
    options |= {"baseline": "--baseline", "match": "--match"}
    found = {option: json.dumps(spec[key]) for key, option in options.items()}
    for name, cell in spec["cells"].items():
        for path, text in leaves_of(cell["resolved"], name).items():
            found[f"cells.{name}.{path}"] = text
    return found


def _is_vacant(store: Store) -> bool:
    return store.is_vacant({LOCK, RECIPE})


def _holds_other(store: Store, text: str) -> bool:
    return store.exists(RECIPE) and store.read(RECIPE) != text.encode()


def _whole(spec: Mapping[str, Any]) -> bool:
    cells = spec.get("cells")
    return (
        isinstance(cells, dict)
        and all(isinstance(c, dict) and isinstance(c.get("resolved"), str) for c in cells.values())
        and all(isinstance(c.get("overrides"), list) for c in cells.values())
        and all(re.fullmatch(r"[A-Za-z0-9._=-]+", name) for name in cells)
        and isinstance(spec.get("seeds"), list)
        and all(isinstance(seed, int) for seed in spec["seeds"])
        and len(cells) * len(spec["seeds"]) <= _MOST_RUNS
        and spec.get("baseline") in cells
        and {"vary", "set", "match", "command", "name", "created"} <= {*spec}
        and isinstance(spec.get("environment"), dict)
    )


def places(spec: Mapping[str, Any]) -> Iterator[Job]:
    """Yield the runs of a specification, cell by cell, without overrides."""
    for cell in spec["cells"]:
        for seed in spec["seeds"]:
            yield Job(cell, seed, ())


def _local(path: Address) -> Store:
    store = Store(path)
    if not store.local:
        raise RunDirectoryError(
            f"{path}: an ablation needs a local directory. Copy it elsewhere when it is done."
        )
    return store
