"""Format the output of `e2ediff data stats`: counts, sizes, and a proposed data block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from e2ediff.condition import ClassLabels
from e2ediff.data import DataSource, SourceConfig, left_out_text
from e2ediff.host.data_block import proposed_size
from e2ediff.host.plugins import Host
from e2ediff.host.structure import unstructure
from e2ediff.host.yaml import dump_yaml
from e2ediff_data.examine import Examined
from e2ediff_data.shards import Shards

_IMBALANCE = 10.0  # ratio from which balanced sampling is proposed


def counts(source: DataSource, classes: int) -> Tensor:
    """Count the images of each class, (classes,)."""
    return torch.bincount(source.labels(), minlength=classes)


def lines(source: DataSource, config: SourceConfig, seen: Examined) -> Iterator[str]:
    """Yield the figures of a source, one a line."""
    yield f"images      {len(source):,}"
    if classes := config.image.classes:
        yield from _class_lines(source, config, counts(source, classes))
    else:
        kind = config.image.conditioning
        words = "unconditional" if kind == ClassLabels(0) else f"conditioned on {kind.title}"
        yield f"classes     0 ({words})"
    if sides := _shorter_sides(seen):
        yield (
            f"sizes       shorter side {sides['min']} to {sides['max']} pixels, median "
            f"{sides['median']}, of {len(seen.shorter):,} images looked at"
        )
    for name, values in (("mean", seen.mean), ("std", seen.std)):
        if values:
            yield f"{name:<11} {', '.join(f'{v:.3f}' for v in values)} (channels, in [-1, 1])"
    yield from _kind_lines(config, seen)
    yield f"broken      {len(seen.bad)} of {seen.count:,} images looked at"
    if left_out := left_out_text(source.left_out):
        yield f"left out    {left_out}"


def _kind_lines(config: SourceConfig, seen: Examined) -> Iterator[str]:
    """Yield what of the images a reader may leave out, and what becomes of it."""
    upright = getattr(config, "upright", False)
    background = getattr(config, "background", None)
    became = {
        "turned": "turned upright" if upright else "read as stored (data.upright turns them)",
        "transparent": f"composed on {background}"
        if background
        else "read without it (data.background composes them)",
        "several": "the first frame is read",
    }
    kinds = (
        ("turned", seen.turned, "with an EXIF orientation"),
        ("transparent", seen.transparent, "with transparency"),
        ("several", seen.several, "with several frames"),
    )
    for name, count, what in kinds:
        if count:
            yield f"{name:<11} {count:,} of {seen.count:,} images {what}: {became[name]}"


def _class_lines(source: DataSource, config: SourceConfig, per: Tensor) -> Iterator[str]:
    word = partial(_word, _names(source, config))
    low, high = int(per.min()), int(per.max())
    yield (
        f"classes     {len(per):,}, of {low:,} ({word(int(per.argmin()))}) to {high:,} "
        f"({word(int(per.argmax()))}) images, median {int(per.median()):,}"
    )
    if empty := without_images(source, config):
        yield f"            {empty}"
    yield f"imbalance   {high / max(1, low):.1f} times as many in the largest as in the smallest"


def without_images(source: DataSource, config: SourceConfig) -> str:
    """Return how many classes no image shows, and which; "" if there is none such."""
    if config.image.classes == 0:
        return ""
    word = partial(_word, _names(source, config))
    empty = (counts(source, config.image.classes) == 0).nonzero()[:, 0].tolist()
    shown = ", ".join(map(word, empty[:5])) + (", ..." if len(empty) > 5 else "")
    count = f"{len(empty):,} of {config.image.classes:,}"
    return f"{count} classes without an image ({shown})" if empty else ""


def _shorter_sides(seen: Examined) -> dict[str, int]:
    """Return the range and the median of the shorter sides in pixels, nothing of no image."""
    sides = sorted(seen.shorter)
    if not sides:
        return {}
    return {"min": sides[0], "median": sides[len(sides) // 2], "max": sides[-1]}


def _names(source: DataSource, config: SourceConfig) -> Sequence[str]:
    return source.class_names or config.image.class_names


def _word(names: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number if it has none."""
    return names[label] if label < len(names) else str(label)


def every_class(source: DataSource, config: SourceConfig) -> Iterator[tuple[int, str, int]]:
    """Yield label, name (or the label again) and number of images of every class."""
    names = _names(source, config)
    per = counts(source, config.image.classes).tolist() if config.image.classes else []
    for label, count in enumerate(per):
        yield label, _word(names, label), count


def as_json(
    host: Host, source: DataSource, config: SourceConfig, seen: Examined
) -> dict[str, Any]:
    """Return the content of `lines` and `proposal`, with every class and broken image.

    Sizes are pixels of the shorter side of the examined images; `mean` and `std` are of channels
    in [-1, 1].
    """
    found: dict[str, Any] = {"images": len(source), "looked_at": seen.count}
    found["classes"] = [
        {"label": label, "name": name, "images": count}
        for label, name, count in every_class(source, config)
    ]
    if sides := _shorter_sides(seen):
        found["sizes"] = sides
    found |= {"mean": seen.mean, "std": seen.std}
    found |= {"turned": seen.turned, "transparent": seen.transparent, "several": seen.several}
    found["left_out"] = [attrs.asdict(one) for one in source.left_out]
    found["broken"] = [{"image": place, "what": what} for place, what in seen.bad]
    return {**found, "proposed": proposed(host, source, config, seen)}


def proposed(
    host: Host, source: DataSource, config: SourceConfig, seen: Examined
) -> dict[str, Any]:
    """Propose a data block, and settings that follow from the number of images and classes."""
    changes: dict[str, Any] = {}
    options = {field.name for field in attrs.fields(type(config))}  # type: ignore[arg-type]
    prepared = isinstance(config, Shards)
    square = config.image.height == config.image.width  # another shape was chosen on purpose
    if "size" in options and seen.shorter and square and not prepared:
        changes["size"] = proposed_size(seen.shorter)
    if "channels" in options and seen.mean and not prepared:
        changes["channels"] = 3 if seen.colour else 1
    if "sampling" in options and (classes := config.image.classes):
        per = counts(source, classes)
        uneven = int(per.max()) > _IMBALANCE * max(1, int(per.min()))
        changes["sampling"] = "class_balanced" if uneven else "natural"
    if "on_bad_image" in options and seen.bad:
        changes["on_bad_image"] = "skip"
    given = unstructure(host, attrs.evolve(config, **changes), SourceConfig)  # type: ignore[misc]
    assert isinstance(given, dict)
    plain = {f.name: f.default for f in attrs.fields(type(config))}  # type: ignore[arg-type]
    keep = {"size", "classes", "channels"}
    block = {k: v for k, v in given.items() if k in keep or plain.get(k) != v or k == "name"}
    batch = 8
    while batch < 256 and batch * 80 <= len(source):
        batch *= 2
    rest: dict[str, Any] = {"batch": batch}
    if config.image.classes:
        rest["preview"] = {"rows": 4, "classes": min(10, config.image.classes)}
    return {"data": block, **rest}


def proposal(host: Host, source: DataSource, config: SourceConfig, seen: Examined) -> str:
    """Return the proposal as YAML."""
    return dump_yaml(proposed(host, source, config, seen))
