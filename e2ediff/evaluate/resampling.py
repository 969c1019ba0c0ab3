"""The bootstrap: errors and intervals of any metric, over the choice of the images.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.metric import Estimate, FeatureSet, Metric, moments_of, taps_of

_TAILS = (0.025, 0.975)


@attrs.frozen(kw_only=True)
class Resampling:
    """Measures metrics; with `sets` above 0 on so many resampled sets, too.

    `say` is told how far it is.

    Source: Efron & Tibshirani 1993, chapters 6 and 13.
    """

    sets: int = 0
    say: Callable[[str], None]

    def taps(self, metrics: Sequence[Metric]) -> frozenset[str]:
        """Taps of which it needs every image's features, beside those that the metrics read."""
        return taps_of([m for m in metrics if m.compares])[0] if self.sets else frozenset()

    def measure(
        self, metric: Metric, made: FeatureSet, real: FeatureSet, *, pairs: bool = False
    ) -> Mapping[str, Estimate]:
        """What the metric measures, with bootstrap errors and 95 % intervals if it compares.

        Made images are drawn anew with replacement. The reference is kept, as it is the same for
        all that is ranked with it; but with `pairs`, image i of both sets belongs together (a
        reconstruction with its original) and is drawn together.
        The error is the standard deviation over the drawn sets. The interval has their 2.5 and
        97.5 % quantiles, moved by the difference of the value and their mean: a drawn set has
        fewer different images, so that its distance has a larger bias.

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


def _spread(estimate: Estimate, drawn: Sequence[float]) -> Estimate:
    values = torch.tensor(drawn, dtype=torch.float64)
    tails = torch.quantile(values, torch.tensor(_TAILS, dtype=torch.float64))
    low, high = (tails + (estimate.value - values.mean())).tolist()
    return attrs.evolve(estimate, error=float(values.std()), interval=(low, high))
