"""Read images for `e2ediff data check` and `data stats`.

Shapes: M images examined, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import attrs
import torch
from torch import Tensor
from torch.utils.data import Dataset

from e2ediff.data import DataSource, SourceConfig
from e2ediff.errors import BadImageError, DataError
from e2ediff.files.location import Location
from e2ediff.loading.batches import read
from e2ediff.parts.sources import Shards
from e2ediff.parts.sources.shards import read_prepared, verify_hashes

_EACH = 64


class _Seen(NamedTuple):
    looked_at: int
    decoded: int
    bad: tuple[tuple[str, str], ...]
    sizes: Tensor
    total: Tensor
    square: Tensor
    colour: int


@attrs.frozen(eq=False)
class Examined:
    """Result of an examination: `bad` has path and fault of each unusable image.

    `sizes` (M, 2) are widths and heights as stored; `mean` and `std` (C,) are of the cropped
    pixels in [-1, 1], empty after a quick pass; `colour` is the number of images not grey.
    """

    count: int
    bad: tuple[tuple[str, str], ...]
    sizes: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    colour: int


class _Chunks(Dataset[_Seen | str]):
    def __init__(self, source: DataSource, indices: Sequence[int], *, quick: bool) -> None:
        self.source = source
        self.indices = indices
        self.quick = quick

    def __getitem__(self, k: int) -> _Seen | str:
        bad, sizes, decoded, colour = [], [], 0, 0
        total = square = torch.zeros(0, dtype=torch.float64)
        chunk = self.indices[k * _EACH : (k + 1) * _EACH]
        for i in chunk:
            try:
                size = self.source.original_size(i)
                sizes.append((size.width, size.height))
                if self.quick:
                    continue
                x = self.source.read([i])[0][0]
            except BadImageError as error:
                bad.append((error.place, error.what))
                continue
            except DataError as error:
                return str(error)
            decoded += 1
            pixels = x.double().flatten(1) / 127.5 - 1  # (C, H W)
            total = pixels.mean(dim=1) + (total if len(total) else 0)
            square = pixels.square().mean(dim=1) + (square if len(square) else 0)
            colour += int(len(x) > 1 and not bool((x == x[:1]).all()))
        rows = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
        return _Seen(len(chunk), decoded, tuple(bad), rows, total, square, colour)


def compare_hashes(config: SourceConfig) -> None:
    """Compare the hashes of prepared shards anew; do nothing for other sources.

    Raises:
        DataError: Some hashes differ.
    """
    if isinstance(config, Shards):
        for path in (config.path, config.held_out):
            if path:
                location = Location(path, "data.path")
                verify_hashes(location, read_prepared(location))


def examine(
    source: DataSource,
    indices: Sequence[int],
    *,
    quick: bool,
    workers: int,
    progress: Callable[[str], None],
) -> Examined:
    """Read these images; with `quick` only their headers.

    Raises:
        DataError: The storage cannot be read.
        ResourceError: The system killed a worker process.
    """
    chunks = -(-len(indices) // _EACH)
    seen: list[_Seen] = []
    count = broken = 0
    items = _Chunks(source, indices, quick=quick)
    for item in read(items, range(chunks), workers, option="--workers"):
        if isinstance(item, str):
            raise DataError(item)
        seen.append(item)
        count, broken = count + item.looked_at, broken + len(item.bad)
        progress(f"{count:,} of {len(indices):,} images, {broken:,} broken")
    mean, std = _moments([s for s in seen if s.decoded])
    return Examined(
        count,
        tuple(row for s in seen for row in s.bad),
        torch.cat([s.sizes for s in seen]) if seen else torch.zeros(0, 2),
        mean,
        std,
        sum(s.colour for s in seen),
    )


def _moments(seen: Sequence[_Seen]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not seen:
        return (), ()
    images = sum(s.decoded for s in seen)
    mean = torch.stack([s.total for s in seen]).sum(0) / images
    square = torch.stack([s.square for s in seen]).sum(0) / images
    std = (square - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
