"""The record of a set of images: `set.json` has everything that determines them.

A set is continued only by a command that would make the same set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from e2ediff.data import ImageSpec, from_pixels
from e2ediff.errors import ResourceError, RunDirectoryError
from e2ediff.guidance import Guidance
from e2ediff.host.plugins import Host
from e2ediff.host.structure import unstructure
from e2ediff.limits import MAX_GRAPH, json_object
from e2ediff.model.inference import Model, Origin
from e2ediff.monitor.grids import by_class, grid_png, sampling_words
from e2ediff.sample.outputs import ImageOutput
from e2ediff.sample.request import SampleCost, SampleRequest
from e2ediff.sampler import Sampler
from e2ediff.store.environment import versions
from e2ediff.store.known_runs import folder_in, name_of_run
from e2ediff.store.storage import JSON, Store

SET, ENTRIES, GRID = "set.json", "samples.json", "grid.png"
FOLDERS = ("images", "shards", "parts")
"""What holds the images of a set, by format and until it is whole."""

# Label laws as sets begun by earlier versions of e2ediff spell them.
_FORMER_LAWS = {"repeated": "balanced", "random": "uniform"}

_GRID_COLUMNS = 16
_GRID_ROWS = 16


def describe(request: SampleRequest, model: Model, host: Host) -> dict[str, JSON]:
    """Return everything that determines the images of a set, as JSON."""
    recipe = model.recipe
    labels: JSON = {
        "law": request.law,
        "classes": len(set(request.labels)),
        "sha256": hashlib.sha256(json.dumps(request.labels).encode()).hexdigest(),
    }
    assert model.origin is not None
    spec: dict[str, Any] = {
        "format_version": 1,
        "images": len(request.labels),
        "labels": labels,
        "seed": request.seed,
        "weights": origin_entry(model.origin),
        "sampler": unstructure(host, recipe.sampler, Sampler),
        "guidance": recipe.guidance and unstructure(host, recipe.guidance, Guidance),
        "guided_by": [origin_entry(other.origin) for other in model.others],
        "rows": request.model.rows,
        "precision": request.model.precision,
        "device": model.device.type,
        "rounding": "nearest",
        "format": request.format,
        "versions": dict(versions()),
    }
    if request.model.compile:  # sets of earlier versions do not say so
        spec["compile"] = True
    found: dict[str, JSON] = json.loads(json.dumps(spec))  # as it is read back: lists for tuples
    return found


def origin_entry(origin: Origin) -> dict[str, JSON]:
    """Return an origin as JSON, without the run's address, since a run may be moved."""
    return {
        "checkpoint": origin.checkpoint,
        "weights": origin.weights,
        "sha256": origin.sha256,
        "recipe_sha256": origin.recipe_sha256,
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """List where two descriptions differ, one line for each entry."""
    found = []
    for key in sorted({*there, *here}):
        a, b, where = there.get(key), here.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}.")
        elif a != b:
            found.append(f"{where}: {json.dumps(a)} there, {json.dumps(b)} here")
    return found


def own_place(run: str, seed: int, spec: Mapping[str, JSON]) -> str:
    """Return `RUN/samples/seed-<seed>`, with a number appended if another set has that name.

    Raises:
        RunDirectoryError: The run is someone else's, and a link is there.
    """
    base, number = f"samples/seed-{seed}", 1
    while True:
        place = folder_in(run, base if number == 1 else f"{base}-{number}", *FOLDERS)
        store = Store(place)
        if store.is_vacant() or not differences(_read(store) or {}, spec):
            return place
        number += 1


def prepare(store: Store, spec: Mapping[str, JSON], *, overwrite: bool) -> None:
    """Begin a set, or continue the same one.

    Raises:
        RunDirectoryError: The directory holds something else, or a link where images go.
        ResourceError: The disk or store refused.
    """
    for folder in FOLDERS:  # who packed the set may have chosen where a link leads
        if (place := store.local_path(folder)) and os.path.islink(place):
            raise RunDirectoryError(
                f"{store.where(folder)}: is a link to {os.readlink(place)}. Put the folder itself "
                "in its place, or choose another --out."
            )
    present = not store.is_vacant()
    found = _read(store)
    wrong = [] if found is None else differences(found, spec)
    if present and (found is None or wrong):
        if not overwrite:
            what = "\n  ".join(["holds another set of images:", *wrong[:8]])
            what = what if wrong else "is not empty, and holds no set of images made by e2ediff."
            more = "" if found is None else ", or give --overwrite"
            raise RunDirectoryError(f"{store.where()}: {what}\nChoose another --out{more}.")
        if found is None:
            raise RunDirectoryError(
                f"{store.where()}: holds no {SET}, so --overwrite does not touch it; "
                "choose another --out."
            )
        _clear(store)
    if not present or wrong:
        store.write(SET, json.dumps(spec, indent=1).encode())


def _clear(store: Store) -> None:
    """Remove an old set, its description last, so that after a crash it is still a set."""
    for folder in FOLDERS:
        store.remove_dir(folder)
    for name in ("samples.npz", "samples.zip", ENTRIES, GRID):
        store.remove_file(name)


def _read(store: Store) -> dict[str, Any] | None:
    """Read the description of the stored set, without the results of making it."""
    try:
        found = json_object(store.read(SET, MAX_GRAPH))
    except (OSError, ValueError):
        return None
    found.pop("made", None)
    labels = found.get("labels")
    if isinstance(labels, dict) and isinstance(law := labels.get("law"), str):
        labels["law"] = _FORMER_LAWS.get(law, law)
    return found


def _caption(request: SampleRequest, spec: Mapping[str, Any], shown: int) -> str:
    """Describe a set for the caption of its grid."""
    n = len(request.labels)
    words = sampling_words(
        spec["weights"]["weights"], request.seed, spec["sampler"], spec["guidance"]
    )
    some = f", the first {shown} of {n:,} images" if shown < n else ""
    return f"{name_of_run(request.model.run)}, {spec['weights']['checkpoint']}{some}; {words}"


def check_space(store: Store, needed: int) -> None:
    """Refuse a set that does not fit on the disk.

    Raises:
        ResourceError: It needs more space than is free.
    """
    free = store.free_bytes()
    if free is not None and needed > free:
        raise ResourceError(
            f"{store.where()}: the set needs {needed:,} bytes and {free:,} are free. "
            "Free space there, or choose another --out; what is there already is intact."
        )


def finish(
    request: SampleRequest,
    output: ImageOutput,
    spec: Mapping[str, JSON],
    cost: SampleCost,
    seconds: float,
    threads: int | None,
    image: ImageSpec,
) -> str:
    """Assemble the set, write its grid and lists, and return its address.

    `image` has the names of the classes.

    Raises:
        ResourceError: The disk or store refused; no image is lost.
    """
    store, n = output.store, len(request.labels)
    shown = min(n, _GRID_COLUMNS * _GRID_ROWS)
    distinct = len(set(request.labels))
    columns = (
        distinct if distinct <= _GRID_COLUMNS and request.law == "balanced" else _GRID_COLUMNS
    )
    x = torch.from_numpy(output.first(min(shown, columns * _GRID_ROWS)).copy())
    groups = by_class(from_pixels(x.permute(0, 3, 1, 2)), request.labels[: len(x)], image)
    store.write(GRID, grid_png(groups, _caption(request, spec, len(x))))
    place = output.close()
    if output.file_of(0) is not None:
        known = "held_out_image" if request.law == "held_out" else "label"
        entries = [
            {"file": output.file_of(i), known: label, "number": i, "seed": request.seed}
            for i, label in enumerate(request.labels)
        ]
        store.write(ENTRIES, json.dumps(entries, indent=1).encode())
    if cost.images:
        made: JSON = {
            "calls_per_image": cost.calls / cost.images,
            "passes_per_image": cost.passes / cost.images,
            "counted_on": cost.images,
            "images_per_second": cost.images / max(seconds, 1e-9),
            "threads": threads,
        }
        store.write(SET, json.dumps({**spec, "made": made}, indent=1).encode())
    return place
