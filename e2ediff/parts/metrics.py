"""Metrics on sets of features: Fréchet, kernel, Inception Score, precision and coverage.

Shapes: n made rows, m real rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs
import numpy as np
import torch
from attrs import validators
from torch import Tensor
from typing_extensions import override

from e2ediff.distances import (
    density_coverage,
    frechet,
    gaussian_mmd,
    inception_score,
    polynomial_error,
    polynomial_mmd,
    precision_recall,
)
from e2ediff.figure import Better
from e2ediff.metric import FeatureSet, Metric, MetricValue, Moments

_POSITIVE = validators.ge(1)


def _too_few(made: Moments, real: Moments) -> tuple[str, ...]:
    """What to say of a Fréchet distance from so few images."""
    said = []
    for whose, moments in (("", made), (" of the reference", real)):
        n, width = moments.count, len(moments.mean)
        if n and n <= width:
            said.append(
                f"{n} images{whose} do not determine the covariance of {width} features: the "
                "distance is far too large and comparable only at equal n; use kid, or more images"
            )
        elif n and n < 5 * width:
            said.append(
                f"{n} images{whose} for {width} features: the distance is too large by a bias "
                "that shrinks as 1/n; comparable only at equal n"
            )
    return tuple(said)


@attrs.frozen(kw_only=True)
class FID(Metric):
    """Fréchet distance of the features: FID in the published Inception's, FD elsewhere.

    Source: Heusel et al. 2017 (arXiv 1706.08500); `e2ediff.distances.frechet` for the numerics.
    """

    better: ClassVar[Better] = "low"
    moments: ClassVar[tuple[str, ...]] = ("pool",)
    published_names: ClassVar[Mapping[str, str]] = {"FD": "FID"}

    @override
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        (tap,), (name,) = self.moments, self.published_names
        a, b = made.moments[tap], real.moments[tap]
        return {name: MetricValue(frechet(a, b), None, _too_few(a, b))}


@attrs.frozen(kw_only=True)
class SpatialFID(FID):
    """Fréchet distance of spatial features, which sees layout: sFID.

    Source: Nash et al. 2021 (arXiv 2103.03841), with the features of ADM's evaluator.
    """

    moments: ClassVar[tuple[str, ...]] = ("spatial",)
    published_names: ClassVar[Mapping[str, str]] = {"sFD": "sFID"}


@attrs.frozen(kw_only=True)
class KID(Metric):
    """Kernel distance of the features, unbiased for any number of images.

    The mean over `subsets` random subsets of `size` images each (of all, if there are fewer), as
    torch-fidelity computes and draws it with `seed`. Its standard error is the subsets' standard
    deviation over the root of the number of subsets that are disjoint; where no two are, it is
    the jackknife's, `e2ediff.distances.polynomial_error`.
    The figure is times 1000 in many papers, and is not here.

    Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """

    better: ClassVar[Better] = "low"
    rows: ClassVar[tuple[str, ...]] = ("pool",)
    published_names: ClassVar[Mapping[str, str]] = {"KD": "KID"}

    subsets: int = attrs.field(default=100, validator=_POSITIVE)
    size: int = attrs.field(default=1000, validator=validators.ge(2))
    seed: int = attrs.field(default=2020, validator=validators.ge(0))

    @override
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        x, y = made.rows["pool"], real.rows["pool"]
        size = min(self.size, len(x), len(y))
        apart = min(self.subsets, min(len(x), len(y)) // size)
        if size == len(x) == len(y):  # every subset is the whole set
            error = polynomial_error(x, y) if size > 2 else None
            return {"KD": MetricValue(polynomial_mmd(x, y), error)}
        chance, found = np.random.RandomState(self.seed), []
        for _ in range(self.subsets):
            a = _pick(x, chance.choice(len(x), size, replace=False))
            b = _pick(y, chance.choice(len(y), size, replace=False))
            found.append(polynomial_mmd(a, b))
        error = None
        if apart > 1:
            error = float(np.std(found, ddof=1) / apart**0.5)
        elif size > 2:
            used = size * self.subsets
            error = polynomial_error(a, b, min(len(x), used), min(len(y), used))
        return {"KD": MetricValue(float(np.mean(found)), error)}


def _pick(rows: Tensor, indices: np.ndarray) -> Tensor:
    return rows[torch.from_numpy(indices).to(rows.device)]


@attrs.frozen(kw_only=True)
class InceptionScore(Metric):
    """How sure the classifier is of each image, and how varied its answers are.

    The mean over `splits` parts; `shuffle` brings the images into a random order first, which
    torch-fidelity does and ADM does not (samples in order of class give other figures); `seed`
    decides that order.
    `classes` keeps the first so many logits; 0 keeps all.

    Source: Salimans et al. 2016 (arXiv 1606.03498).
    """

    better: ClassVar[Better] = "high"
    rows: ClassVar[tuple[str, ...]] = ("logits",)
    compares: ClassVar[bool] = False

    splits: int = attrs.field(default=10, validator=_POSITIVE)
    shuffle: bool = True
    classes: int = attrs.field(default=0, validator=validators.ge(0))
    seed: int = attrs.field(default=2020, validator=validators.ge(0))

    @override
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        logits = made.rows["logits"]
        if self.shuffle:
            logits = _pick(logits, np.random.RandomState(self.seed).permutation(len(logits)))
        mean, std = inception_score(logits[:, : self.classes or None], self.splits)
        said: tuple[str, ...] = ()
        if len(logits) < 1000 * self.splits:
            each = len(logits) // self.splits
            said = (f"parts of {each} images: too small by a bias, comparable only at equal n",)
        return {"IS": MetricValue(mean, std / max(1, self.splits - 1) ** 0.5, said)}

    @override
    def min_images(self) -> int:
        return self.splits


@attrs.frozen(kw_only=True)
class PrecisionRecall(Metric):
    """Precision and recall by balls around the features, to the `k`-th neighbour.

    `count` is the number of images of each set that are used, the first ones; 0 uses all.
    Distances are float64; ADM's evaluator takes half precision where that is finite.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), who use VGG16; ADM uses Inception.
    """

    better: ClassVar[Better] = "high"
    rows: ClassVar[tuple[str, ...]] = ("pool",)

    k: int = attrs.field(default=3, validator=_POSITIVE)
    count: int = attrs.field(default=0, validator=validators.ge(0))

    @override
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        x, y = (f.rows["pool"][: self.count or None] for f in (made, real))
        precision, recall = precision_recall(x, y, self.k)
        said: tuple[str, ...] = ()
        if len(x) != len(y):
            said = (f"{len(x)} images against {len(y)}: the larger set has smaller balls",)
        return {
            "precision": MetricValue(
                precision, (precision * (1 - precision) / len(x)) ** 0.5, said
            ),
            "recall": MetricValue(recall, (recall * (1 - recall) / len(y)) ** 0.5, said),
        }

    @override
    def min_images(self) -> int:
        return self.k + 1


@attrs.frozen(kw_only=True)
class DensityCoverage(Metric):
    """Density and coverage by balls around the real features, to the `k`-th neighbour.

    `count` is the number of images of each set that are used, the first ones; 0 uses all.

    Source: Naeem et al. 2020 (arXiv 2002.09797).
    """

    better: ClassVar[Better] = "high"
    rows: ClassVar[tuple[str, ...]] = ("pool",)

    k: int = attrs.field(default=5, validator=_POSITIVE)
    count: int = attrs.field(default=0, validator=validators.ge(0))

    @override
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        x, y = (f.rows["pool"][: self.count or None] for f in (made, real))
        density, coverage = density_coverage(x, y, self.k)
        return {"density": MetricValue(density), "coverage": MetricValue(coverage)}

    @override
    def min_images(self) -> int:
        return self.k + 1


@attrs.frozen(kw_only=True)
class CMMD(Metric):
    """Gaussian kernel distance of unit-length CLIP embeddings, times 1000.

    `sigma` is the kernel's width.

    Source: Jayasumana et al. 2024 (arXiv 2401.09603), with ViT-L/14 at 336 pixels.
    """

    better: ClassVar[Better] = "low"
    rows: ClassVar[tuple[str, ...]] = ("pool",)
    features: ClassVar[str] = "clip"

    sigma: float = attrs.field(default=10.0, validator=validators.gt(0))

    @override
    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        return {
            "CMMD": MetricValue(gaussian_mmd(made.rows["pool"], real.rows["pool"], self.sigma))
        }
