"""Feature networks whose maps can be written by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import attrs
import torch
from torch import nn

from e2ediff.features import FeatureConfig, FeatureNetwork
from e2ediff.host.plugins import load


@attrs.frozen(kw_only=True)
class Pooled(FeatureConfig):
    """Averages of colours and of their squares: six channels at a quarter of the size."""

    def build(self) -> FeatureNetwork:
        return PooledNetwork()


class PooledNetwork(FeatureNetwork):
    """Returns the image and the averages, and counts its runs in `runs`."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        small = nn.functional.avg_pool2d(x, 4)
        return [x, torch.cat([small, small.square()], dim=1)]


@attrs.frozen(kw_only=True)
class Coarse(Pooled):
    """Averages over a quarter of the image each, or over all of it."""

    places: tuple[int, int] = (1, 1)

    def build(self) -> FeatureNetwork:
        return CoarseNetwork(self.places)


class CoarseNetwork(FeatureNetwork):
    def __init__(self, places: tuple[int, int]) -> None:
        super().__init__()
        self.places = places

    def forward(self, x):
        return [nn.functional.adaptive_avg_pool2d(x, self.places)]


def exported_pooled(file: Path, size: int) -> FeatureConfig:
    """Export `PooledNetwork` for images of this size, and name the file as a feature network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch
        program = torch.export.export(
            PooledNetwork(),
            (torch.zeros(2, 3, size, size),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        torch.export.save(program, file)
    half = (0.5, 0.5, 0.5)
    exported = load().registries["features"].get("exported")
    return exported(weights=str(file), size=size, mean=half, std=half, output="maps")
