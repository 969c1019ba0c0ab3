"""The directory of a run, which is complete in itself.

`recipe.yaml` as given, `resolved.yaml` with every default, `seal` (that it was made here),
`run.json` (where it ran),
`status.json` (how it stands), `metrics.jsonl`, `figures.json` (what its figures are),
`events.jsonl`, `samples/`, `checkpoints/`, `attempts/` (what was replaced), `plugins/` (copies of
plugins that are one file).
Nothing in it is absolute: it may be copied, packed or deleted as a whole.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import RunDirectoryError
from e2ediff.figure import Figure
from e2ediff.host.suggestions import similar_paths
from e2ediff.limits import MAX_GRAPH
from e2ediff.store.attempts import ATTEMPTS, PICTURE, later_files, next_place, numbers
from e2ediff.store.earlier import earlier_figure
from e2ediff.store.entries import (
    RUN_KINDS,
    STATUS_KINDS,
    are_figures,
    are_until,
    check_position,
    check_texts,
    is_figure,
    is_until,
    parse_lines,
    with_specials,
    without_specials,
)
from e2ediff.store.lock import LOCK, acquire
from e2ediff.store.manifest import FOLDER
from e2ediff.store.provenance import SEAL, is_sealed, seal
from e2ediff.store.storage import JSON, Store, batches

State = Literal["running", "done", "interrupted", "preempted", "failed"]

RECIPE, RESOLVED, RUN, STATUS = "recipe.yaml", "resolved.yaml", "run.json", "status.json"
METRICS, EVENTS, FIGURES = "metrics.jsonl", "events.jsonl", "figures.json"

PLUGINS, STACKS = "plugins", "stacks"

# Files that exist before RUN, which makes the directory a run.
_BEFORE_RUN = {LOCK, RECIPE, RESOLVED, SEAL, ATTEMPTS, PLUGINS}
_RECORDS = (RECIPE, RESOLVED, RUN, STATUS, METRICS, EVENTS, FIGURES)
_WRITTEN = {
    *_RECORDS,
    SEAL,
    "bad_images.jsonl",
    "curves.png",
}  # only by the process that holds the lock

_FOLDERS = (FOLDER, "samples", ATTEMPTS, PLUGINS, STACKS, "post_hoc")  # that are written in


class RunDirectory:
    """A run's files. Make one with `create` or `open`; use it in `with`, or call `unlock`.

    Writing raises ResourceError when the disk or store refuses.
    Of several processes of a run the first one writes; the others open the directory `silent`, and
    their figures, events, pictures and status are discarded.
    """

    def __init__(self, store: Store, path: str, *, silent: bool = False) -> None:
        self.store = store
        self.path = path
        self.silent = silent
        self.kept = ""  # the attempt to which `create` moved the former content
        self._lock: Callable[[], None] | None = None
        self._declared: dict[str, Figure] | None = None

    @classmethod
    def create(
        cls,
        out: Address | None,
        name: str,
        recipe_text: str,
        resolved: str,
        environment: Mapping[str, JSON],
        plugins: Mapping[str, bytes] | None = None,
        *,
        restart: bool = False,
    ) -> RunDirectory:
        """Start a new run's directory, locked for this process.

        A directory in which a run was killed before it began is reused.

        Args:
            out: Where; None is `name`, `name-2`, ... in $E2EDIFF_RUNS, or in `runs`.
            name: The recipe's name.
            recipe_text: The recipe as given, comments and all.
            resolved: The recipe with every default spelled out.
            environment: What `describe_environment` of `e2ediff.store.environment` returned.
            plugins: Copies of plugins that are one file, by path in the directory.
            restart: Move a run that lies in `out` to its `attempts/`; `kept` says where.

        Raises:
            RunDirectoryError: `out` is not empty, or another process uses it.
        """
        if out is None:
            runs = Store(runs_folder())
            out = runs.where(runs.create_unique_dir(name, LOCK))
        directory = cls(Store(out), addresses.plain(out))
        texts = {RECIPE: recipe_text.encode(), RESOLVED: resolved.encode()}
        directory._refuse_if_taken(texts, restart=restart)  # the lock file is in it, too
        directory.lock()
        try:
            directory._refuse_if_taken(restart=restart)
            directory.kept = directory._move_aside(texts)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            for file, text in {**texts, **(plugins or {})}.items():
                directory.store.write(file, text)
            directory._seal(resolved.encode())
            # Last: it makes this a run directory.
            directory._write_json(RUN, {"name": name, "created": created, **environment})
            if directory.kept:
                directory.event("restarted", kept=directory.kept)
        except BaseException:
            directory.unlock()
            raise
        return directory

    @classmethod
    def never_began(cls, path: Address) -> bool:
        """Return whether a run was killed here before it began; `create` reuses the place."""
        store = Store(path)
        found = store.list()
        ours = any(name in _BEFORE_RUN or name.startswith(".tmp-") for name in found)
        return ours and RUN not in found and cls(store, addresses.plain(path))._is_vacant()

    @classmethod
    def is_begun(cls, path: Address) -> bool:
        """Return whether there is a run to continue, however far its beginning or restart came."""
        store = Store(path)
        return store.exists(RUN) or bool(numbers(store)) or cls.never_began(path)

    @classmethod
    def open(cls, path: Address, *, silent: bool = False) -> RunDirectory:
        """Open the directory of an existing run, for reading; `lock` it before training on.

        Raises:
            RunDirectoryError: there is no run in it.
        """
        path = addresses.plain(path)
        directory = cls(Store(path), path, silent=silent)
        found = directory.store.list()
        if RUN not in found:
            what = f"it has no {RUN}" if found else "no such directory, or it is empty"
            if os.path.isfile(directory.store.local_path() or ""):
                what = "it is a file"
            way_out = _run_meant(path)
            if numbers(directory.store):
                way_out = "If --restart was interrupted here, repeat it."
            raise RunDirectoryError(f"{path}: not a run directory: {what}. {way_out}")
        directory.environment()
        return directory

    # Locking

    def lock(self) -> None:
        """Keep other processes from training in this directory; the lock dies with the process.

        Also repairs log lines that a crash cut short, and removes temporary files that it left.
        Stores that are not local are locked by a lease, and hold figures and events back for some
        seconds from now on; `set_status` and `unlock` write them.

        Raises:
            RunDirectoryError: another process is training in it.
        """
        if self._lock is not None:
            return
        self.refuse_links(*_FOLDERS, f"post_hoc/{FOLDER}")
        self._lock = acquire(self.store, self.path)
        self.store.holds_back = True
        if self._lock is not None:
            try:
                self._repair()
            except BaseException:
                self.unlock()
                raise

    def _repair(self) -> None:
        self.store.sweep("", _WRITTEN.__contains__)
        self.store.sweep("samples", lambda name: PICTURE.fullmatch(name) is not None)
        for number in numbers(self.store):
            self.store.sweep(f"{ATTEMPTS}/{number}", _WRITTEN.__contains__)
        for folder in (FOLDER, f"post_hoc/{FOLDER}"):
            for name in self.store.list(folder):
                if name.startswith((".tmp-", ".trash-")):
                    self.store.remove_dir(f"{folder}/{name}")
        for log in (METRICS, EVENTS):
            self.store.truncate_lines(log)

    def refuse_links(self, *folders: str) -> None:
        """Refuse to write in a run of someone else that has a link where one of `folders` is.

        It might lead to the checkpoints of another run, which would be deleted as old ones, or to
        pictures of the user, which would be replaced by others of their names.

        Raises:
            RunDirectoryError: There is one.
        """
        for folder in folders:
            place = self.store.local_path(folder)
            if place and os.path.islink(place) and not self.is_made_here():
                raise RunDirectoryError(
                    f"{self.store.where(folder)}: is a link to {os.readlink(place)}, and this run "
                    "was not made here by you. Put the folder itself in its place, or remove it."
                )

    def unlock(self) -> None:
        """Release the lock; no-op if not held."""
        if self._lock is not None:
            unlock, self._lock = self._lock, None
            try:
                self.store.flush()
            finally:
                self.store.holds_back = False
                unlock()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.unlock()

    # Start and restart

    @classmethod
    def refuse_taken(cls, out: Address, *, restart: bool = False) -> None:
        """Refuse a directory in which `create` would not start a run, without creating it.

        Raises:
            RunDirectoryError: It is not empty; with `restart` it may hold a run.
        """
        cls(Store(out), addresses.plain(out))._refuse_if_taken(restart=restart)

    def _is_vacant(self) -> bool:
        ours = all(name.isdecimal() for name in self.store.list(ATTEMPTS))
        return ours and self.store.is_vacant(_BEFORE_RUN)

    def _refuse_if_taken(
        self, texts: Mapping[str, bytes] | None = None, *, restart: bool = False
    ) -> None:
        """Refuse a directory that is not empty; with `restart` a run is accepted.

        Before this process has locked it, `texts` serve to recognise a recipe of the user.
        """
        local = self.store.local_path()
        is_file = local is not None and os.path.exists(local) and not os.path.isdir(local)
        found = [] if is_file else self.store.list()
        halfway = RUN not in found and bool(numbers(self.store))
        if not is_file and restart and (RUN in found or halfway):
            return
        if not is_file and self._is_vacant() and not (texts and self._is_others(found, texts)):
            return
        way_out = "Choose another --out."
        if RUN in found:
            again = f"e2ediff run --resume {shlex.quote(self.path)}"
            way_out = f"Choose another --out, or continue the run in it: {again}"
        elif halfway:
            way_out = "If --restart was interrupted here, repeat it; else choose another --out."
        raise RunDirectoryError(f"{self.path}: exists and is not empty. {way_out}")

    def _is_others(self, found: Sequence[str], texts: Mapping[str, bytes]) -> bool:
        """Return whether the folder holds another recipe, and no run has ever locked it."""
        if LOCK in found or not self.store.local:
            return False
        return any(self._read(file) != text for file, text in texts.items() if file in found)

    def _move_aside(self, texts: Mapping[str, bytes]) -> str:
        """Move to an attempt what must not be overwritten; return its path, "" for nothing."""
        found = [name for name in self.store.list() if name not in (LOCK, ATTEMPTS)]
        place = next_place(self.store)
        if RUN in found:
            # RUN first, so that after a kill the rest is not a run that could be resumed.
            first = [file for file in (RUN, RECIPE, RESOLVED, SEAL) if file in found]
            names = [*first, *(name for name in found if name not in first)]
        elif not self._is_vacant():
            names, last = found, f"{ATTEMPTS}/{numbers(self.store)[-1]}"
            there = self.store.list(last)
            if RUN in there and not {*names} & {*there}:
                place = last
        else:
            other = [file for file, text in texts.items() if file in found]
            names = other if any(self._read(file) != texts[file] for file in other) else []
        self._move(names, place)
        return place if names else ""

    def set_aside(self, images: int, step: int) -> str:
        """Keep what a rollback to a checkpoint of these counts drops or recomputes.

        The records are copied to a new attempt; later pictures and snapshots are moved there.

        Returns:
            The attempt, "" if nothing came later.
        """
        if self.silent:
            return ""
        later = later_files(self.store, images, step)
        there = self.store.lines(METRICS) if self.store.exists(METRICS) else ()
        if not later and all(is_until(images, line) for _, line in there):
            return ""
        place = next_place(self.store)
        for file in _RECORDS:
            if self.store.exists(file):
                self.store.copy(file, f"{place}/{file}")
        self._move(later, place)
        return place

    def _move(self, names: Iterable[str], place: str) -> None:
        for name in names:
            self.store.move(name, f"{place}/{name}")

    # Descriptions of the run

    def recipe(self) -> str:
        """Read the recipe as given."""
        return self._read_text(RECIPE)

    def resolved(self) -> str:
        """Read the recipe with every default spelled out."""
        return self._read_text(RESOLVED)

    def replace_resolved(self, text: str) -> None:
        """Replace the recipe with every default, by the one with which the run goes on."""
        if not self.silent:
            # Before it, so that after a kill in between the former text is still sealed.
            former = [self._read(RESOLVED)] if self.is_made_here() else []
            self._seal(text.encode(), *former)
            self.store.write(RESOLVED, text.encode())

    def is_made_here(self) -> bool:
        """Return whether this user made the run, or changed how it continues."""
        return is_sealed(self.store, RESOLVED)

    def _seal(self, *texts: bytes) -> None:
        """Replace the seals by those of these resolved recipes; none where there is no key."""
        if seals := [one for one in map(seal, texts) if one]:
            self.store.write(SEAL, "".join(f"{one}\n" for one in seals).encode())

    def environment(self) -> dict[str, Any]:
        """Read the environment that `create` was given, with `name` and `created`.

        Raises:
            RunDirectoryError: It is damaged, or an entry is of another kind than `create` writes.
        """
        return self._typed(RUN, RUN_KINDS)

    def class_names(self) -> tuple[str, ...]:
        """Read the names of the classes, by label, that the training images had at the start.

        Empty if they had none, and for runs from before they were recorded.

        Raises:
            RunDirectoryError: The recorded names are damaged.
        """
        found = self.environment().get("class_names", [])
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise RunDirectoryError(
                f"{self.store.where(RUN)}: class_names is not a list of names. Remove it to "
                "refer to classes by their indices."
            )
        return tuple(found)

    def empty_classes(self) -> tuple[int, ...]:
        """Read the classes of which the training images had none at the start.

        Empty if all had some, and for runs from before they were recorded.

        Raises:
            RunDirectoryError: The record is damaged.
        """
        found = self.environment().get("empty_classes", [])
        if not isinstance(found, list) or not all(type(label) is int for label in found):
            raise RunDirectoryError(
                f"{self.store.where(RUN)}: empty_classes is not a list of class numbers. Remove "
                "it; then sampling does not warn of them."
            )
        return tuple(found)

    def status(self) -> dict[str, Any]:
        """Read the last status; empty before the first.

        Raises:
            RunDirectoryError: It is damaged, or an entry is of another kind than is written.
        """
        return self._typed(STATUS, STATUS_KINDS) if self.store.exists(STATUS) else {}

    def former_status(self) -> dict[str, Any]:
        """Read the last status; empty if there is none, or it cannot be read."""
        try:
            return self.status()
        except RunDirectoryError:
            return {}

    def set_status(
        self, state: State, exit_code: int | None = None, reason: str = "", **position: JSON
    ) -> None:
        """Replace `status.json` atomically.

        `position` has `images`, `step`, `last_checkpoint` and `collapsed`; without it those of
        the last status stay.
        """
        position = position or self.former_status()
        self.store.flush()
        self._write_json(
            STATUS,
            {
                "state": state,
                "images": position.get("images", 0),
                "step": position.get("step", 0),
                "exit_code": exit_code,
                "reason": reason,
                "last_checkpoint": position.get("last_checkpoint"),
                "collapsed": position.get("collapsed", ""),
                "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    # Logs and pictures

    def log_metrics(self, values: Mapping[str, JSON]) -> None:
        """Add one line of figures; `images` among them is the position in training."""
        if self.silent:
            return
        self.store.append(METRICS, json.dumps(without_specials(values), allow_nan=False))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read all figures logged so far, without an unfinished last line.

        What is no number is left out, since someone else may have written it.

        Raises:
            RunDirectoryError: a line in the middle is damaged, or its position is none.
        """
        return list(self.stream_metrics())

    def stream_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the same line by line, for runs that logged millions of them.

        Raises:
            RunDirectoryError: a line in the middle is damaged, or its position is none.
        """
        for first, lines in self._read_batches(METRICS):
            yield from lines if are_figures(lines) else self._figures_in(lines, first)

    def _figures_in(
        self, lines: Iterable[Mapping[str, Any]], first: int
    ) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, first):
            try:
                check_position(line)
            except ValueError as error:
                where = f"{self.store.where(METRICS)}:{number}"
                raise RunDirectoryError(f"{where}: {error}. Delete that line.") from error
            yield {name: value for name, value in line.items() if is_figure(value)}

    def declare(self, figures: Iterable[Figure]) -> None:
        """Record declarations of figures; those of other names recorded before stay."""
        if self.silent:
            return
        before = self._declared
        if before is None:
            before = {figure.name: figure for figure in self.figures()}
        declared = {**before, **{figure.name: figure for figure in figures}}
        if declared != self._declared:
            self._write_json(FIGURES, {name: attrs.asdict(f) for name, f in declared.items()})
            self._declared = declared

    def figures(self) -> list[Figure]:
        """Read the declared figures; for older runs they are derived from the figures' names.

        Raises:
            RunDirectoryError: It is damaged.
        """
        if not self.store.exists(FIGURES):
            names = dict.fromkeys(name for line in self.stream_metrics() for name in line)
            return [figure for name in names if (figure := earlier_figure(name))]
        known = {field.name for field in attrs.fields(Figure)}
        way_out = "Remove it to judge figures by their names."
        try:
            rows = [{k: v for k, v in r.items() if k in known}
                    for r in self._read_json(FIGURES, way_out).values()]  # fmt: skip
            for row in rows:
                check_texts(row)
            return [Figure(**{**row, "shown_on": tuple(row["shown_on"])}) for row in rows]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            where = self.store.where(FIGURES)
            raise RunDirectoryError(f"{where}: is damaged ({error}). {way_out}") from error

    def event(self, kind: str, **fields: JSON) -> None:
        """Add one event: a save, a rollback, an alarm, a signal."""
        if self.silent:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = without_specials({"time": now, "kind": kind, **fields})
        self.store.append(EVENTS, json.dumps(entry, allow_nan=False))

    def read_events(self) -> list[dict[str, Any]]:
        """Read all events so far, in order.

        Raises:
            RunDirectoryError: a line in the middle is damaged.
        """
        return [line for _, lines in self._read_batches(EVENTS) for line in lines]

    def rewind(self, images: int) -> int:
        """Drop figures after this many images, and damaged lines; return how many were dropped."""
        if self.silent:
            return 0
        keep, all_of = partial(is_until, images), partial(are_until, images)
        return self.store.truncate_lines(METRICS, keep, all_of)

    def write_picture(self, relative_path: str, png_bytes: bytes) -> str:
        """Save a picture below `samples/`; return its path inside the run directory."""
        path = f"samples/{relative_path}"
        if not self.silent:
            self.store.write(path, png_bytes)
        return path

    def _read_batches(self, file: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield the objects of some hundred lines, and the number of the first one."""
        first = 1
        for lines in batches(self._lines(file), len):
            found = parse_lines(lines)
            if found is not None:
                yield first, found
            else:
                for number, line in enumerate(lines, first):
                    yield number, [self._parsed(file, number, line)]
            first += len(lines)

    def _parsed(self, file: str, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise TypeError("no JSON object")
            return with_specials(values, line)
        except (ValueError, TypeError, RecursionError) as error:
            raise RunDirectoryError(
                f"{self.store.where(file)}:{number}: not a line of JSON. Delete that line."
            ) from error

    def _lines(self, file: str) -> Iterator[bytes]:
        try:
            if self.store.exists(file):
                for _, line in self.store.lines(file):
                    yield line
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _write_json(self, file: str, value: Mapping[str, JSON]) -> None:
        if self.silent:
            return
        self.store.write(file, json.dumps(value, indent=1).encode() + b"\n")

    def _read_text(self, file: str) -> str:
        try:
            return self._read(file).decode()
        except UnicodeDecodeError as error:
            where = self.store.where(file)
            what = f"is damaged: it is not UTF-8 text ({error.reason} at byte {error.start})"
            raise RunDirectoryError(f"{where}: {what}. Restore it from a copy.") from error

    def _read_json(self, file: str, way_out: str = "Restore it from a copy.") -> dict[str, Any]:
        try:
            value = json.loads(self._read(file))
            if isinstance(value, dict):
                return value
            problem = "holds no JSON object"
        except (ValueError, RecursionError) as error:
            problem = f"is damaged: {error}"
        where = self.store.where(file)
        raise RunDirectoryError(f"{where}: {problem}. {way_out}")

    def _typed(
        self, file: str, kinds: Mapping[str, Callable[[Any, str], object]]
    ) -> dict[str, Any]:
        found = self._read_json(file)
        try:
            for name, check in kinds.items():
                if found.get(name) is not None:
                    check(found[name], name)
        except (ValueError, TypeError) as error:
            where = self.store.where(file)
            raise RunDirectoryError(
                f"{where}: {error}. Restore it from a copy, or remove that entry."
            ) from error
        return found

    def _read(self, file: str) -> bytes:
        try:
            return self.store.read(file, MAX_GRAPH)
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: str, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(f"{self.store.where(file)}: cannot be read: {error.strerror}.")


def is_run(place: Address) -> bool:
    """Return whether there is a run at this address."""
    place = addresses.plain(place)
    return not place.endswith(".npz") and Store(place).exists("run.json")


def _run_meant(path: str) -> str:
    """Suggest what to give in place of a path that is no run."""
    way_out = "Give the directory that e2ediff printed when the run began."
    if path.endswith((".yaml", ".yml")):
        return f"A recipe is trained first: e2ediff run {shlex.quote(path)}. {way_out}"
    inside = similar_paths(os.path.join(runs_folder(), os.path.basename(path.rstrip("/"))))
    above = os.path.dirname(path.rstrip("/"))
    near = [place for place in (above, *inside, *similar_paths(path)) if place and is_run(place)]
    return f"Did you mean {' or '.join(dict.fromkeys(near))}? {way_out}" if near else way_out


def runs_folder() -> str:
    """Return where runs are put that are given no place: $E2EDIFF_RUNS, or `runs`."""
    return os.environ.get("E2EDIFF_RUNS") or "runs"
