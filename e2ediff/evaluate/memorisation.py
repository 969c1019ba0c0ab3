"""Test whether samples copy training images, by comparison with held-out images.

Shapes: n generated, m held-out, k training images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from e2ediff.distances import nearest
from e2ediff.metric import MetricValue


def memorisation(made: Tensor, held_out: Tensor, train: Tensor) -> Mapping[str, MetricValue]:
    """Compare the distances of generated (n, F) and held-out images (m, F) to training (k, F).

    `copied` is the share of generated images nearer to their nearest training image than all but
    1 % of held-out images are; a model that copies nothing has about 0.01.
    `nearness` is the median distance of generated images to their nearest training image divided
    by that of held-out ones; about 1 without copies, 0 for copies.
    """
    own, usual = nearest(made, train)[0], nearest(held_out, train)[0]
    share = float((own < usual.quantile(0.01)).double().mean())
    error = (share * (1 - share) / len(own)) ** 0.5
    ratio = float(own.median() / usual.median().clamp_min(torch.finfo(torch.float64).tiny))
    return {
        "copied": MetricValue(share, error, better="low"),
        "nearness": MetricValue(ratio, better="high"),
    }


def closest_pairs(made: Tensor, train: Tensor, count: int = 10) -> list[dict[str, float]]:
    """Return the generated images nearest to a training image: both numbers and the distance."""
    distance, who = nearest(made, train)
    order = distance.argsort()[:count].tolist()
    return [
        {"image": i, "training_image": int(who[i]), "distance": float(distance[i])} for i in order
    ]
