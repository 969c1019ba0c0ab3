"""The loss of each image averages to that of the batch."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

from e2ediff.features import FeatureConfig, FeatureNetwork
from e2ediff.losses import PixelLoss


class Edges(FeatureNetwork):
    """Differences of neighbours, at two sizes."""

    def forward(self, x):
        pairs = torch.cat([x.diff(dim=2)[..., 1:], x.diff(dim=3)[:, :, 1:]], dim=1)
        return [pairs, nn.functional.avg_pool2d(pairs, 2)]


@attrs.frozen
class EdgesConfig(FeatureConfig):
    def build(self) -> Edges:
        return Edges()


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("more", [{}, {"scales": 3}, {"perceptual": EdgesConfig()}])
def test_the_losses_of_single_images_average_to_that_of_all(kind, more) -> None:
    loss, g = PixelLoss(kind=kind, perceptual_weight=0.7, **more), torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 5, 3, 16, 24, generator=g) * 2 - 1
    frozen = loss.frozen()
    each = loss.each(a, b, frozen)
    torch.testing.assert_close(each.mean(), loss(a, b, frozen), rtol=1e-6, atol=0)
    for i, one in enumerate(each):
        alone = loss(a[i : i + 1], b[i : i + 1], frozen)
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=0)
    assert float(each.std()) > 0
