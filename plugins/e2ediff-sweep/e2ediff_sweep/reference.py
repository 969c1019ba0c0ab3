"""The real images that candidates are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import DataSource
from e2ediff.errors import DataError
from e2ediff.evaluate.images import SourceImages
from e2ediff.evaluate.reference import ReferenceSet, open_reference
from e2ediff.loading.bad_images import open_source
from e2ediff.seeds import generator
from e2ediff_sweep.candidates import SweptRun


class SomeImages(SourceImages):
    """Random images of a data source, chosen by (seed, "reference") alone."""

    def __init__(self, source: DataSource, place: str, count: int, seed: int) -> None:
        super().__init__(source, place)
        g = generator(torch.device("cpu"), seed, "reference")
        self.chosen: list[int] = torch.randperm(len(source), generator=g)[:count].tolist()
        self.count = len(self.chosen)

    @override
    def read(self, numbers: range) -> Tensor:
        return self.source.read([self.chosen[i] for i in numbers])[0]


def open_subset(run: SweptRun, place: Address, count: int, seed: int) -> ReferenceSet:
    """Open the reference: a random subset of a run's data, or all images of another set.

    Raises:
        DataError: There is no such reference, or it has fewer than two images.
    """
    place = addresses.plain(place)
    if place in ("data", "held-out"):
        source = open_source(run.recipe.data, held_out=place == "held-out")
        images = SomeImages(source, place, count, seed)
        found = ReferenceSet(f"{images.count} of {place}", images.sha256(), images=images)
    else:
        found = open_reference(place, run.host, run.recipe.data)
    if found.images is None or found.images.count < 2:
        raise DataError(
            f"{place}: a kernel distance needs two images or more as a reference, and statistics "
            "alone are none; give a folder, an npz with arr_0, or a data source"
        )
    image, there = run.recipe.data.image, found.images.shape
    if there != (image.channels, image.height, image.width):
        raise DataError(
            f"{place}: its images have {there[2]} x {there[1]} x {there[0]} values, those of the "
            f"run {image.width} x {image.height} x {image.channels}; a score needs one resolution"
        )
    return found
