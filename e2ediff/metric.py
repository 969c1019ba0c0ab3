"""Metrics: scores of a set of images, read off features of it and of a reference.

Shapes: n images, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.figure import Better, Figure


@attrs.frozen(eq=False)
class Moments:
    """Mean (F,) and covariance (F, F), float64, of `count` rows; `count` 0 is not known."""

    count: int
    mean: Tensor
    covariance: Tensor


class Accumulator:
    """Mean and covariance of rows that pass by; float64, and exact for any cut into batches.

    Source: Chan, Golub & LeVeque 1979, the pairwise update of mean and scatter.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take rows (B, F) of any float type in."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        content = rows - mean
        self._join(len(rows), mean, content.T @ content)

    def merge(self, other: Accumulator) -> None:
        """Take all rows of another accumulator in."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean.to(self.mean.device) - self.mean
        self.mean = self.mean + delta * (count / total)
        joint = torch.outer(delta, delta) * (self.count * count / total)
        self.scatter = self.scatter + scatter.to(self.scatter.device) + joint
        self.count = total

    def moments(self) -> Moments:
        """Return the moments of all rows so far; the covariance divides by n - 1.

        Raises:
            ValueError: There are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} rows have no covariance")
        return Moments(self.count, self.mean.cpu(), (self.scatter / (self.count - 1)).cpu())


def moments_of(rows: Tensor) -> Moments:
    """Return the mean and covariance of rows (n, F)."""
    whole = Accumulator()
    whole.add(rows)
    return whole.moments()


@attrs.frozen(eq=False)
class FeatureSet:
    """Features of `count` images, by the network's taps.

    `moments` are there for taps whose mean and covariance were asked for, `rows` (n, F), in the
    images' order, for taps of which every image's features were.
    """

    count: int
    moments: Mapping[str, Moments] = attrs.field(factory=dict)
    rows: Mapping[str, Tensor] = attrs.field(factory=dict)


@attrs.frozen
class MetricValue:
    """A score with optional standard error, warnings and 95 % interval.

    `better` is needed only for a figure that is not better the way its metric's others are.
    """

    value: float
    error: float | None = None
    warnings: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None
    better: Better | None = attrs.field(
        default=None, validator=validators.optional(validators.in_(("low", "high")))
    )


class Metric(ABC):
    """Scores a set of images by its features, most of them against a reference set.

    `better` says whether low or high figures are the better ones: scores are ranked, charted and
    compared by it. A class attribute is enough: `better: ClassVar[Better] = "low"`.
    `moments` and `rows` name the taps of the feature network that it reads, by mean and
    covariance or image by image; every network has the tap `pool`.
    `compares` is False for a score that needs no reference.
    `features` restricts it to networks of that family (`FeatureNetwork.family`).
    `published_names` has the names of figures in the published Inception features, as
    `{"FD": "FID"}`; in those of any other network a figure is named after the network,
    `FD-EfficientNetLite0`.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[bool] = True
    features: ClassVar[str] = ""
    published_names: ClassVar[Mapping[str, str]] = {}

    @property
    @abstractmethod
    def better(self) -> Better:
        """Whether low or high figures are better; a `MetricValue` may override it."""

    @abstractmethod
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        """Return figures by name.

        Args:
            made: Features of the images that are judged.
            real: Those of the reference; those of `made` itself if `compares` is False.
        """

    def min_images(self) -> int:
        """Return the fewest images, of either set, of which the figures can be computed at all."""
        return 2


def names_of(metric: Metric, figure: str, title: str, *, published: bool) -> str:
    """Return a figure's name in the features of a network called `title`."""
    return metric.published_names.get(figure, figure) if published else f"{figure}-{title}"


def prefixed(kind: str, name: str, better: Better | None) -> str:
    """Name a score of reconstructions (kind `r`) or of samples (`g`) beside the other.

    `gFD-...` where low is better, as papers write rFID and gFID, and `g_recall-...` elsewhere.
    """
    return f"{kind}{name}" if better == "low" else f"{kind}_{name}"


def score_figure(kind: str, score: str, better: Better) -> Figure:
    """Return the figure of one of a recipe's `scores`, of reconstructions (`r`) or samples (`g`).

    Both are curves of one panel; that of samples stands in a report's first table.
    """
    name = prefixed(kind, score, better)
    if kind == "g":
        return Figure(name, better=better, shown_on=("table", "charts"), panel=score, of="samples")
    return Figure(name, better=better, shown_on=("charts",), panel=score, of="reconstructions")


def taps_of(metrics: Sequence[Metric]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the taps that some metrics read by their moments, and by their rows."""
    moments = frozenset(tap for m in metrics for tap in m.moments)
    return moments, frozenset(tap for m in metrics for tap in m.rows)
