"""Bootstrap the error and interval of any metric over the choice of images.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.metric import FeatureSet, Metric, MetricValue, moments_of, taps_of

_TAILS = (0.025, 0.975)


@attrs.frozen(kw_only=True)
class Resampling:
    """Measures metrics; with `sets` above 0 also on that many resampled sets.

    `say` is called with progress.

    Source: Efron & Tibshirani 1993, chapters 6 and 13.
    """

    sets: int = 0
    say: Callable[[str], None]

    def taps(self, metrics: Sequence[Metric]) -> frozenset[str]:
        """Return the taps of which resampling needs every image's features."""
        return taps_of([m for m in metrics if m.compares])[0] if self.sets else frozenset()

    def measure(
        self, metric: Metric, made: FeatureSet, real: FeatureSet, *, pairs: bool = False
    ) -> Mapping[str, MetricValue]:
        """Measure a metric, with bootstrap errors and 95 % intervals if it compares two sets.

        Generated images are resampled with replacement. The reference is kept, as it is the same
        for all scores ranked with it; but with `pairs`, image i of both sets belongs together (a
        reconstruction and its original) and is drawn together.
        The error is the standard deviation over the resampled sets. The interval has their 2.5
        and 97.5 % quantiles, shifted by the difference between the value and their mean: a
        resampled set has fewer distinct images, so that its distance has a larger bias.

        Randomness: a generator of its own, seeded with 0.
        """
        found = metric.measure(made, real)
        if not (self.sets and metric.compares):
            return found
        g = torch.Generator().manual_seed(0)
        taps = {*metric.moments, *metric.rows}
        drawn: dict[str, list[float]] = {name: [] for name in found}
        for i in range(self.sets):
            chosen = torch.randint(made.count, (made.count,), generator=g)
            other = _drawn(real, metric, taps, chosen) if pairs else real
            again = metric.measure(_drawn(made, metric, taps, chosen), other)
            for name, values in drawn.items():
                values.append(again[name].value)
            self.say(f"{type(metric).__name__}: {i + 1}/{self.sets} resampled sets")
        return {name: _spread(estimate, drawn[name]) for name, estimate in found.items()}


def _drawn(whole: FeatureSet, metric: Metric, taps: Collection[str], chosen: Tensor) -> FeatureSet:
    rows = {tap: whole.rows[tap][chosen.to(whole.rows[tap].device)] for tap in taps}
    moments = {tap: moments_of(rows[tap]) for tap in metric.moments}
    return FeatureSet(whole.count, moments, rows)


def _spread(estimate: MetricValue, drawn: Sequence[float]) -> MetricValue:
    values = torch.tensor(drawn, dtype=torch.float64)
    tails = torch.quantile(values, torch.tensor(_TAILS, dtype=torch.float64))
    low, high = (tails + (estimate.value - values.mean())).tolist()
    return attrs.evolve(estimate, error=float(values.std()), interval=(low, high))
