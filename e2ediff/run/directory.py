"""The directory of a run, which explains itself to whoever finds it later.

`recipe.yaml` as given, `resolved.yaml` with every default, `run.json` (where it ran),
`status.json` (how it stands), `metrics.jsonl`, `events.jsonl`, `samples/`, `checkpoints/`.
Nothing in it is absolute: it may be copied, packed or deleted as a whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import RunDirectoryError
from e2ediff.run.lock import LOCK, acquire
from e2ediff.run.storage import JSON, Store

State = Literal["running", "done", "interrupted", "preempted", "failed"]

RECIPE, RESOLVED, RUN, STATUS = "recipe.yaml", "resolved.yaml", "run.json", "status.json"
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RunDirectory:
    """A run's files. Make one with `create` or `open`; use it in `with`, or `unlock` at the end.

    Writing raises ResourceError when the disk or store refuses.
    Of several processes of a run the first one writes; the others open it `silent`, and their
    figures, events, pictures and status go nowhere.
    """

    def __init__(self, store: Store, path: str, *, silent: bool = False) -> None:
        self.store = store
        self.path = path
        self.silent = silent
        self._lock: int | None = None

    @classmethod
    def create(
        cls,
        out: Address | None,
        name: str,
        recipe_text: str,
        resolved: str,
        environment: Mapping[str, JSON],
    ) -> RunDirectory:
        """Start a new run's directory, locked for this process.

        Args:
            out: Where; None is `name`, `name-2`, ... in $E2EDIFF_RUNS, or in `runs`.
            name: The recipe's name.
            recipe_text: The recipe as given, comments and all.
            resolved: The recipe with every default spelled out.
            environment: What `describe_environment` of `e2ediff.run.environment` returned.

        Raises:
            RunDirectoryError: `out` is not empty, or another process is at it.
        """
        if out is None:
            runs = Store(_runs())
            out = runs.where(runs.create_unique_dir(name))
        directory = cls(Store(out), addresses.plain(out))
        directory.lock()
        try:
            directory._refuse_if_taken()
            created = datetime.now(UTC).isoformat(timespec="seconds")
            directory.store.write(RECIPE, recipe_text.encode())
            directory.store.write(RESOLVED, resolved.encode())
            # Last: it makes this a run directory.
            directory._write_json(RUN, {"name": name, "created": created, **environment})
        except BaseException:
            directory.unlock()
            raise
        return directory

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
            raise RunDirectoryError(
                f"{path}: not a run directory: {what}. "
                "Give the directory that e2ediff printed when the run began."
            )
        directory.environment()
        return directory

    # Locking

    def lock(self) -> None:
        """Keep other processes from training in this directory; the lock dies with the process.

        Also repairs log lines that a crash cut short. Stores that are not local are not locked.

        Raises:
            RunDirectoryError: another process is training in it.
        """
        if self._lock is not None:
            return
        self._lock = acquire(self.store, self.path)
        if self._lock is None:
            return
        for log in (METRICS, EVENTS):
            self.store.truncate_lines(log, keep=lambda line: True)

    def unlock(self) -> None:
        """Let others at it; harmless if it was not locked."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unlock()

    def _refuse_if_taken(self) -> None:
        local = self.store.local_path()
        is_file = local is not None and os.path.exists(local) and not os.path.isdir(local)
        if is_file or set(self.store.list()) - {LOCK}:
            raise RunDirectoryError(
                f"{self.path}: exists and is not empty. "
                "Choose another --out, or continue the run in it with --resume."
            )

    # What it says about the run

    def recipe(self) -> str:
        """The recipe as given."""
        return self._read(RECIPE).decode()

    def resolved(self) -> str:
        """The recipe with every default spelled out."""
        return self._read(RESOLVED).decode()

    def environment(self) -> dict[str, Any]:
        """What `create` was told of the machine, with `name` and `created`."""
        return self._read_json(RUN)

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label, as the training images had them when the run began.

        Empty if they had none, and for runs from before this was kept.

        Raises:
            RunDirectoryError: They are no names.
        """
        found = self.environment().get("class_names", [])
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise RunDirectoryError(
                f"{self.store.where(RUN)}: class_names is no list of names. Remove it to go by "
                "the classes' numbers."
            )
        return tuple(found)

    def status(self) -> dict[str, Any]:
        """The last status; empty before the first."""
        return self._read_json(STATUS) if self.store.exists(STATUS) else {}

    def set_status(
        self,
        state: State,
        *,
        images: int,
        step: int,
        exit_code: int | None = None,
        reason: str = "",
        last_checkpoint: str | None = None,
    ) -> None:
        """Replace `status.json`; whoever reads it sees the old one or the new."""
        self._write_json(
            STATUS,
            {
                "state": state,
                "images": images,
                "step": step,
                "exit_code": exit_code,
                "reason": reason,
                "last_checkpoint": last_checkpoint,
                "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    # Logs and pictures

    def log_metrics(self, values: Mapping[str, JSON]) -> None:
        """Add one line of figures; `images` among them places it in training."""
        if self.silent:
            return
        self.store.append(METRICS, json.dumps(_without_specials(values), allow_nan=False))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All figures logged so far, without a last line that is still being written.

        Raises:
            RunDirectoryError: a line in the middle is damaged.
        """
        return self._read_lines(METRICS)

    def event(self, kind: str, **fields: JSON) -> None:
        """Add one line on something that happened: a save, a rewind, an alarm, a signal."""
        if self.silent:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = _without_specials({"time": now, "kind": kind, **fields})
        self.store.append(EVENTS, json.dumps(entry, allow_nan=False))

    def read_events(self) -> list[dict[str, Any]]:
        """All events so far, in order.

        Raises:
            RunDirectoryError: a line in the middle is damaged.
        """
        return self._read_lines(EVENTS)

    def rewind(self, images: int) -> int:
        """Drop figures of more images than this, and damaged lines; returns how many went."""

        def keep(line: str) -> bool:
            try:
                seen = json.loads(line).get("images", 0)
            except (ValueError, AttributeError, RecursionError):
                return False
            return not isinstance(seen, int | float) or seen <= images

        return 0 if self.silent else self.store.truncate_lines(METRICS, keep)

    def write_picture(self, relative_path: str, png_bytes: bytes) -> str:
        """Save a picture below `samples/`; returns its path inside the run directory."""
        path = f"samples/{relative_path}"
        if not self.silent:
            self.store.write(path, png_bytes)
        return path

    def _read_lines(self, file: str) -> list[dict[str, Any]]:
        if not self.store.exists(file):
            return []
        found = []
        for number, line in enumerate(self._read(file).split(b"\n")[:-1], 1):
            try:
                values = json.loads(line)
                found.append({k: _special(v) for k, v in values.items()})
            except (ValueError, AttributeError, RecursionError) as error:
                raise RunDirectoryError(
                    f"{self.store.where(file)}:{number}: not a line of JSON. Delete that line."
                ) from error
        return found

    def _write_json(self, file: str, value: Mapping[str, JSON]) -> None:
        if self.silent:
            return
        self.store.write(file, json.dumps(value, indent=1).encode() + b"\n")

    def _read_json(self, file: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(file))
            if isinstance(value, dict):
                return value
            problem = "holds no JSON object"
        except (ValueError, RecursionError) as error:
            problem = f"is damaged: {error}"
        raise RunDirectoryError(f"{self.store.where(file)}: {problem}.")

    def _read(self, file: str) -> bytes:
        try:
            return self.store.read(file)
        except OSError as error:
            where = self.store.where(file)
            raise RunDirectoryError(f"{where}: cannot be read: {error.strerror}.") from error


def latest_run(name: str) -> str | None:
    """The newest run of this name in $E2EDIFF_RUNS, or `runs`; None if there is none."""
    runs = Store(_runs())
    pattern = re.compile(re.escape(name) + r"(?:-(\d{1,9}))?")
    numbered = [(pattern.fullmatch(found), found) for found in runs.list()]
    for _, found in sorted(((int(m[1] or 1), n) for m, n in numbered if m), reverse=True):
        path = runs.where(found)
        # The second run of `flow` and the first of a recipe called `flow-2` look alike.
        with contextlib.suppress(RunDirectoryError):
            if RunDirectory.open(path).environment().get("name") == name:
                return path
    return None


def _runs() -> str:
    return os.environ.get("E2EDIFF_RUNS") or "runs"


def _without_specials(value: Any) -> Any:
    """JSON has no nan or inf: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _without_specials(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_specials(item) for item in value]
    return value


def _special(value: Any) -> Any:
    return _SPECIAL.get(value, value) if isinstance(value, str) else value
