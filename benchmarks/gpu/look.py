"""What a part is given, and how it writes down what it finds."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import attrs


@attrs.frozen
class Look:
    """Where a part works and what it may take.

    `root` is the project's checkout, `kit` the folder of what was carried to this machine, `out`
    what goes back, `work` is scratch. `device` is `cuda` or `cpu`; `tiny` asks for sizes of which
    a CPU computes all parts in minutes. `limit` is in seconds. Findings go to the file `notes`.
    """

    root: Path = attrs.field(converter=Path)
    kit: Path = attrs.field(converter=Path)
    out: Path = attrs.field(converter=Path)
    work: Path = attrs.field(converter=Path)
    notes: Path = attrs.field(converter=Path)
    device: str
    tiny: bool
    limit: float

    def note(self, **row: object) -> None:
        """Write down a finding at once, so that neither a crash nor the time limit loses it."""
        with open(self.notes, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print("  " + "  ".join(f"{k}={short(v)}" for k, v in row.items()), flush=True)

    @contextlib.contextmanager
    def attempt(self, **row: object) -> Iterator[dict[str, object]]:
        """Note an error inside the block as a finding, after which the part goes on."""
        began = time.perf_counter()
        try:
            yield row
        except Exception as error:  # whatever it is, it is what the look is for
            traceback.print_exc()
            taken = time.perf_counter() - began
            self.note(**row, ok=False, error=reason(error), seconds=taken)

    def recipe(self, name: str) -> Path:
        """Return the path of a recipe of the project."""
        return self.root / "recipes" / f"{name}.yaml"


def cores() -> int:
    """Return the number of this machine's cores."""
    return os.cpu_count() or 1


def short(value: object) -> str:
    """Return a value as a table shows it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def reason(error: BaseException) -> str:
    """Return an error in one line, with the last line of the project that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "e2ediff" in frame.filename]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    text = next((line for line in str(error).splitlines() if line.strip()), "")[:220]
    return f"{type(error).__name__}: {text}{place}"
