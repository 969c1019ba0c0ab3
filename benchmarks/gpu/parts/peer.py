"""Another implementation's step beside ours.

`peer:FILE` names a Python file whose `make(device, rows)` returns a step as a function without
arguments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from look import Look
from measuring import forget_peak, gib, peak, seconds_of
from steps import random_batch, read_recipe, stepper


def run(look: Look, file: str = "", ours: str = "unite_in256") -> None:
    """Note both steps' images a second and peaks, at the same number of images."""
    device = torch.device(look.device)
    ours = "unite_quickstart" if look.tiny else ours
    whole = read_recipe(look, ours)
    rows = 4 if look.tiny else whole.batch // whole.microshards
    if file:
        with look.attempt(step=file):
            _note(look, _theirs(Path(file), device, rows), device, rows, step=file)
    for kind in ("off",) if look.tiny else ("off", "blocks"):
        with look.attempt(step=ours, compile=kind) as row:
            own = [f"batch={rows}", "microshards=1", f"compile={kind}"]
            recipe = read_recipe(look, ours, *own)
            step, _ = stepper(recipe, device, look.tiny)
            batch = random_batch(recipe, device)
            _note(look, lambda step=step, batch=batch: step(batch, 0), device, rows, **row)  # type: ignore[misc]


def _theirs(file: Path, device: torch.device, rows: int) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location("peer", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[[], object] = module.make(device, rows)
    return made


def _note(
    look: Look, work: Callable[[], object], device: torch.device, rows: int, **row: object
) -> None:
    forget_peak(device)
    seconds = seconds_of(work, device, 5, 3)
    look.note(**row, rows=rows, images_per_second=rows / seconds, peak_gib=gib(peak(device)))
