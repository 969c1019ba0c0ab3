"""Choose sheets of samples and reconstructions at equal steps or compute, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import attrs
from PIL import Image

from e2ediff.errors import DataError
from e2ediff.files.images import opened
from e2ediff.limits import MAX_BYTES
from e2ediff.report.gather import Run
from e2ediff.report.summary import number

_ALL_BYTES = 6_000_000
_ONE_MOST = 400_000
_WIDTHS = (2000, 1400, 1000, 700, 480, 320)


@attrs.frozen
class Sheet:
    """A picture of one run with its caption; `uri` is "" where `problem` says why."""

    cell: str
    caption: str
    alt: str
    uri: str
    problem: str = ""


@attrs.frozen
class SheetRow:
    """Pictures to show side by side."""

    title: str
    sheets: Sequence[Sheet]


def rows(cells: Mapping[str, Sequence[Run]]) -> list[SheetRow]:
    """Choose samples and reconstructions of each first seed, at equal steps and compute.

    The step is the last at which all cells have a preview, and so is the compute; where there is
    none, each cell shows the preview nearest to what all have reached, and the title says so. If
    both choose the same pictures, they are shown once.
    """
    shown = [run for runs in cells.values() if (run := _first(runs))]
    chosen: list[tuple[str, str, list[tuple[Run, int]]]] = []
    for kind in ("samples", "reconstructions"):
        runs = [run for run in shown if run.previews.get(kind)]
        by_step = _nearest(runs, kind, "step")
        by_flops = _nearest(runs, kind, "flops")
        if len(runs) == 1:
            chosen.append((kind, kind, by_step))
            continue
        steps = "equal steps" if _are_equal(by_step, "step") else "the nearest steps"
        flops = "equal compute" if _are_equal(by_flops, "flops") else "the nearest compute"
        if by_step == by_flops:
            chosen.append((f"{kind} at {steps} and {flops}", kind, by_step))
        else:
            chosen.append((f"{kind} at {steps}", kind, by_step))
            chosen.append((f"{kind} at {flops}", kind, by_flops))
    pictures = sum(len(choices) for _, _, choices in chosen)
    most = min(_ONE_MOST, _ALL_BYTES // max(1, pictures))
    return [
        SheetRow(title, [_sheet(run, step, kind, most) for run, step in choices])
        for title, kind, choices in chosen
        if choices
    ]


def _first(runs: Sequence[Run]) -> Run | None:
    with_pictures = [run for run in runs if any(run.previews.values())]
    ordered = sorted(with_pictures, key=lambda run: (not run.is_done, run.seed))
    return ordered[0] if ordered else None


def _nearest(runs: Sequence[Run], kind: str, by: str) -> list[tuple[Run, int]]:
    """Return the step of each run's preview nearest to the last, or FLOPs, that all reached."""
    places = [
        {
            step: place
            for step in run.previews[kind]
            if (place := _place(run, step, by)) is not None
        }
        for run in runs
    ]
    if not places or not all(places):
        return []
    goal = min(max(steps.values()) for steps in places)
    shared = set.intersection(*(set(steps.values()) for steps in places))
    if shared and max(shared) >= goal / 2:  # an earlier one would show less of what was learned
        goal = max(shared)
    found = []
    for run, steps in zip(runs, places, strict=True):
        step = min(steps, key=lambda s, steps=steps: (abs(steps[s] - goal), -s))  # type: ignore[misc]
        found.append((run, step))
    return found


def _are_equal(choices: Sequence[tuple[Run, int]], by: str) -> bool:
    """Return whether all pictures are of the same step, or of the same FLOPs within 2 %."""
    places = [place for run, step in choices if (place := _place(run, step, by)) is not None]
    most = 1.0 if by == "step" else 1.02
    return bool(places) and max(places) <= most * min(places)


def _place(run: Run, step: int, by: str) -> float | None:
    if by == "step":
        return step
    return run.cost.at(step * run.cost.batch) if run.cost else None


def _sheet(run: Run, step: int, kind: str, most: int) -> Sheet:
    words = [f"seed {run.seed}", f"step {step:,}"]
    if run.cost:
        images = step * run.cost.batch
        words += [f"{images:,} images", f"{number(run.cost.at(images), 'si')}FLOPs"]
    caption = ", ".join(words)
    what = "held-out images, each followed by its reconstruction" if kind != "samples" else kind
    alt = f"{what}: {run.cell}, {caption}"
    assert run.store is not None
    file, uri, problem = run.previews[kind][step], "", ""
    try:
        uri = data_uri(run.store.read(file, MAX_BYTES), most, f"{file} cannot be shown")
    except OSError as error:
        problem = f"{file} cannot be shown: {error}"
    except DataError as error:
        problem = str(error)
    return Sheet(run.cell, caption, alt, uri, problem)


def data_uri(data: bytes, most: int, place: str) -> str:
    """Encode a PNG as a data URI; one longer than `most` bytes is reduced to WebP.

    Raises:
        DataError: It is not a PNG, is damaged, or has too many pixels.
    """
    with opened(data, place, formats=("PNG",)) as image:
        image.load()
        if len(data) <= most:
            return _uri("png", data)
        plain = image.convert("RGB")
    best = b""
    for width in _WIDTHS:
        small = plain
        if width < plain.width:
            height = max(1, round(plain.height * width / plain.width))
            small = plain.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=88)
        best = buffer.getvalue()
        if len(best) <= most:
            break
    return _uri("webp", best)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
