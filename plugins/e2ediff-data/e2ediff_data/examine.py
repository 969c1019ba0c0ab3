"""Read images for `e2ediff data check` and `data stats`.

Shapes: C H W image.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import attrs
from torch.utils.data import Dataset

from e2ediff.data import DataSource, SourceConfig, from_pixels
from e2ediff.errors import BadImageError, DataError
from e2ediff.files.location import Location
from e2ediff.host.data_block import has_colour
from e2ediff.loading.batches import read
from e2ediff.metric import Accumulator
from e2ediff_data.shards import Shards, read_prepared, verify_hashes

_EACH = 64


@attrs.define(eq=False)
class Examined:
    """Result of an examination: what was seen of `count` images.

    `bad` has path and fault of each unusable image, `shorter` the length of the shorter side of
    the others as stored; `pixels` holds mean and covariance of the cropped pixels in [-1, 1], none
    after a quick pass; `colour` is the number of images that are not grey.
    `turned`, `transparent` and `several` count images whose EXIF data ask to turn them, that have
    an alpha channel or a transparent colour, and that are the first of several in their file.
    """

    count: int = 0
    bad: list[tuple[str, str]] = attrs.field(factory=list)
    shorter: array[int] = attrs.field(factory=lambda: array("q"))
    pixels: Accumulator = attrs.field(factory=Accumulator)
    colour: int = 0
    turned: int = 0
    transparent: int = 0
    several: int = 0

    @property
    def mean(self) -> list[float]:
        """Means of the channels, (C,); empty after a quick pass."""
        found: list[float] = self.pixels.mean.tolist()
        return found

    @property
    def std(self) -> list[float]:
        """Standard deviations of the channels, (C,); empty after a quick pass."""
        variance = self.pixels.scatter.diagonal() / max(1, self.pixels.count)
        found: list[float] = variance.sqrt().tolist()
        return found

    def add(self, other: Examined) -> None:
        """Include what was seen of other images."""
        self.count += other.count
        self.bad += other.bad
        self.shorter += other.shorter
        self.pixels.merge(other.pixels)
        self.colour += other.colour
        self.turned += other.turned
        self.transparent += other.transparent
        self.several += other.several


class _Chunks(Dataset[Examined | str]):
    def __init__(self, source: DataSource, indices: Sequence[int], *, quick: bool) -> None:
        self.source = source
        self.indices = indices
        self.quick = quick

    def __getitem__(self, k: int) -> Examined | str:
        chunk = self.indices[k * _EACH : (k + 1) * _EACH]
        seen = Examined(count=len(chunk))
        for i in chunk:
            try:
                found = self.source.original(i)
                seen.shorter.append(min(found.width, found.height))
                seen.turned += int(found.turned)
                seen.transparent += int(found.transparent)
                seen.several += int(found.frames > 1)
                if self.quick:
                    continue
                x = self.source.read([i])[0][0]
            except BadImageError as error:
                seen.bad.append((error.place, error.what))
                continue
            except DataError as error:
                return str(error)
            seen.pixels.add(from_pixels(x.flatten(1).T))  # (H W, C)
            seen.colour += int(has_colour(x))
        return seen


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
    whole, items = Examined(), _Chunks(source, indices, quick=quick)
    for item in read(items, range(chunks), workers, option="--workers"):
        if isinstance(item, str):
            raise DataError(item)
        whole.add(item)
        progress(f"{whole.count:,} of {len(indices):,} images, {len(whole.bad):,} broken")
    return whole
