"""Trackers: a CSV file, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs
from torch import Tensor
from typing_extensions import override

from e2ediff.addresses import own_file
from e2ediff.tracker import Tracker, TrackerConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@attrs.frozen(kw_only=True)
class CSV(TrackerConfig):
    """Figures as rows of `figures.csv` in the run directory: images, name, value."""

    def open(self, directory: str) -> Tracker:
        """Append to the file, with a heading if it is new."""
        return _CSVFile(os.path.join(directory, "figures.csv"))


class _CSVFile(Tracker):
    def __init__(self, path: str) -> None:
        new = not os.path.exists(path)
        self.file = open(  # noqa: SIM115 - until close()
            path, "a", newline="", encoding="utf-8", opener=own_file
        )
        self.rows = csv.writer(self.file)
        if new:
            self.rows.writerow(["images", "name", "value"])

    @override
    def log(self, images: int, values: Mapping[str, float]) -> None:
        self.rows.writerows([images, name, value] for name, value in values.items())
        self.file.flush()

    def picture(self, images: int, name: str, x: Tensor) -> None:
        """A CSV file holds no pictures; the run directory has them."""

    @override
    def close(self) -> None:
        self.file.close()


@attrs.frozen(kw_only=True)
class TensorBoard(TrackerConfig):
    """Figures and pictures as TensorBoard events below `tensorboard/` in the run directory.

    Needs `pip install tensorboard`.
    """

    needs: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def open(self, directory: str) -> Tracker:
        """Start a writer."""
        from torch.utils.tensorboard import SummaryWriter

        return _Events(SummaryWriter(os.path.join(directory, "tensorboard")))


class _Events(Tracker):
    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Scalars at the number of images seen."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)

    @override
    def picture(self, images: int, name: str, x: Tensor) -> None:
        self.writer.add_images(name, (x.clamp(-1, 1) + 1) / 2, images)

    @override
    def close(self) -> None:
        self.writer.close()
