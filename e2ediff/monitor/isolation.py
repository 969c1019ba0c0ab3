"""Call diagnostics and metrics so that one that raises is switched off and training goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
import torch

from e2ediff.diagnostic import Diagnostic
from e2ediff.figure import Figure
from e2ediff.host.guard import cause

T = TypeVar("T")


@attrs.frozen(eq=False)
class Isolated:
    """Calls parts; one that raises is not called again in this run.

    `failed` has the failures not yet reported, as (event, message) pairs; the event is
    `diagnostic_off` or `metric_off`.
    """

    failed: list[tuple[str, str]] = attrs.field(factory=list)
    _off: list[object] = attrs.field(factory=list)

    def call(self, kind: str, part: object, work: Callable[[], T], otherwise: T) -> T:
        """Return what `work` returns; `otherwise` if it fails, or if the part has failed before.

        Args:
            kind: What the part is, such as `diagnostic`.
            part: The part, or its class.
            work: Calls it.
            otherwise: The default result.

        Raises:
            torch.OutOfMemoryError: Not a fault of the part; the caller advises what to lower.
        """
        if any(part is other for other in self._off):
            return otherwise
        try:
            return work()
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as exc:  # the plugin boundary
            cls = part if isinstance(part, type) else type(part)
            frame = traceback.extract_tb(exc.__traceback__)[-1]
            self._off.append(part)
            text = (
                f"{kind} {cls.__module__}.{cls.__qualname__} failed, and the run goes on without "
                f"it: {cause(exc)} ({Path(frame.filename).name}:{frame.lineno})"
            )
            self.failed.append((f"{kind}_off", text))
            return otherwise

    def drain(self) -> list[tuple[str, str]]:
        """Return and clear the failures since the last call, as (event, message) pairs."""
        found = [*self.failed]
        self.failed.clear()
        return found


def declared(diagnostics: Sequence[Diagnostic], isolated: Isolated | None = None) -> list[Figure]:
    """Collect the figure declarations of diagnostics; one that fails is left out."""
    isolated = isolated or Isolated()
    found: list[Figure] = []
    for diagnostic in diagnostics:
        own = partial(_figures, diagnostic)
        found += isolated.call("diagnostic", diagnostic, own, ())
    return found


def _figures(diagnostic: Diagnostic) -> Sequence[Figure]:
    if wrong := [f for f in diagnostic.figures if not isinstance(f, Figure)]:
        raise TypeError(f"figures holds {wrong[0]!r}, which is no Figure")
    return diagnostic.figures


def numbers(figures: Mapping[str, float]) -> dict[str, float]:
    """Convert figures of third-party code to floats that can be written and plotted.

    Raises:
        TypeError, ValueError: They are not a mapping of names to numbers.
    """
    return {str(k): v if isinstance(v, int | float) else float(v) for k, v in figures.items()}
