"""What `e2ediff data stats` prints: counts, sizes, and a proposed data block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from e2ediff.data import DataSource, SourceConfig
from e2ediff.host.plugins import Host
from e2ediff.host.structure import unstructure
from e2ediff.host.yaml import dump_yaml
from e2ediff.prepare.examine import Examined

_SIZES = (32, 64, 128, 256, 512)
_IMBALANCE = 10.0  # from this ratio on balanced sampling is proposed


def counts(source: DataSource, classes: int) -> Tensor:
    """Images of each class, (classes,)."""
    return torch.bincount(source.labels(), minlength=classes)


def lines(source: DataSource, config: SourceConfig, seen: Examined) -> Iterator[str]:
    """Figures of a source, one a line."""
    yield f"images      {len(source):,}"
    if classes := config.image.classes:
        yield from _class_lines(source, config, counts(source, classes))
    else:
        yield "classes     0 (unconditional)"
    if len(seen.sizes):
        shorter = seen.sizes.min(dim=1).values.sort().values
        middle = int(shorter[len(shorter) // 2])
        yield (
            f"sizes       shorter side {int(shorter[0])} to {int(shorter[-1])} pixels, median "
            f"{middle}, of {len(shorter):,} images looked at"
        )
    for name, values in (("mean", seen.mean), ("std", seen.std)):
        if values:
            yield f"{name:<11} {', '.join(f'{v:.3f}' for v in values)} (channels, in [-1, 1])"
    yield f"broken      {len(seen.bad)} of {seen.count:,} images looked at"


def _class_lines(source: DataSource, config: SourceConfig, per: Tensor) -> Iterator[str]:
    names = source.class_names or config.image.class_names

    def word(label: Tensor) -> str:
        return names[int(label)] if names else str(int(label))

    low, high = int(per.min()), int(per.max())
    yield (
        f"classes     {len(per):,}, of {low:,} ({word(per.argmin())}) to {high:,} "
        f"({word(per.argmax())}) images, median {int(per.median()):,}"
    )
    if low == 0:
        yield f"            {int((per == 0).sum()):,} classes have no image"
    yield f"imbalance   {high / max(1, low):.1f} times as many in the largest as in the smallest"


def proposal(host: Host, source: DataSource, config: SourceConfig, seen: Examined) -> str:
    """A data block, and settings that follow from the number of images and classes, as YAML."""
    changes: dict[str, Any] = {}
    options = {field.name for field in attrs.fields(type(config))}  # type: ignore[arg-type]
    told = unstructure(host, config, SourceConfig)
    prepared = isinstance(told, dict) and told.get("name") == "shards"
    if "size" in options and len(seen.sizes) and not prepared:
        shorter = seen.sizes.min(dim=1).values.median()
        changes["size"] = max([s for s in _SIZES if s <= int(shorter)], default=_SIZES[0])
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
    return dump_yaml({"data": block, **rest})
