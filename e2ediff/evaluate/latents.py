"""Predict the class from a run's latents: nearest neighbours and a linear probe.

Shapes: n training images, m held-out images, N tokens, D channels, F = N D or D.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from e2ediff.condition import class_labels
from e2ediff.data import Batch, DataSource
from e2ediff.errors import DataError
from e2ediff.loading.batches import fixed_images
from e2ediff.metric import MetricValue
from e2ediff.model.inference import Model
from e2ediff.store.storage import JSON

_BATCH = 256
_CPU = torch.device("cpu")
_NEIGHBOURS, _TEMPERATURE = 20, 0.07
_OPTIONS: Mapping[str, Mapping[str, JSON]] = {
    "knn": {"k": _NEIGHBOURS, "temperature": _TEMPERATURE},
    "probe": {"weight_decay": "1/n"},
}


def knn_accuracy(
    train: Tensor, label: Tensor, rows: Tensor, truth: Tensor, k: int = _NEIGHBOURS
) -> tuple[float, int]:
    """Return the accuracy on rows (m, F) of the vote of the k nearest in train (n, F); and m.

    Nearness is the cosine after centring; a vote counts exp(cosine / 0.07).

    Source: the weighted vote of Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    centre = train.double().mean(0)
    known = functional.normalize(train.double() - centre, dim=1)
    right = 0
    for part, own in zip(torch.split(rows, _BATCH), torch.split(truth, _BATCH), strict=True):
        cosine = functional.normalize(part.double() - centre, dim=1) @ known.T
        near, who = cosine.topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(part), int(label.max()) + 1, dtype=near.dtype)
        votes.scatter_add_(1, label[who], (near / _TEMPERATURE).exp())
        right += int((votes.argmax(1) == own).sum())
    return right / len(rows), len(rows)


def probe_accuracy(train: Tensor, label: Tensor, rows: Tensor, truth: Tensor) -> tuple[float, int]:
    """Return the accuracy on rows (m, F) of a linear classifier of train (n, F); and m.

    Logistic regression on standardised features with weight decay 1/n, by L-BFGS from zero:
    convex, so the figure has neither a seed nor a learning rate.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    x, y = ((a - mean) / std for a in (train, rows))
    classes = int(label.max()) + 1
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x @ weight + bias, label)
        value = value + weight.square().sum() / (2 * len(x))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(((y @ weight + bias).argmax(1) == truth).double().mean()), len(rows)


def latent_figures(
    model: Model, training: DataSource, held_out: DataSource, count: int
) -> tuple[Mapping[str, MetricValue], Mapping[str, Mapping[str, JSON]]]:
    """Accuracy of `knn` and `probe` on whole latents, and `..._mean` on their means over tokens.

    Returns the figures and, by the same names, what determines them: numbers and hashes of the
    images with their labels, and the options of the classifier.

    Args:
        model: A run's model.
        training: Images to fit on; at most `count`, chosen by the recipe's seed.
        held_out: Images to test on; likewise.
        count: Largest number of images of each.

    Raises:
        DataError: The data have no labels.
    """
    if model.recipe.data.image.classes < 2:
        raise DataError("latents: the data have no classes; leave `latents` out of --metrics")
    sides, images, conditioning = [], dict[str, JSON](), model.recipe.data.image.conditioning
    for source, whose, purpose in (
        (training, "training", "latents"),
        (held_out, "held_out", "latents-held-out"),
    ):
        batch = fixed_images(source, conditioning, count, model.recipe.seed, purpose, _CPU)
        sides.append((_encoded(model, batch.x), class_labels(batch.condition)))
        images |= {f"{whose}_sha256": _sha256(batch), f"{whose}_images": len(batch.x)}
    (z, label), (other, truth) = sides
    found, of = {}, {}
    for end, pooled in (("", False), ("_mean", True)):
        a, b = (side.mean(1) if pooled else side.flatten(1) for side in (z, other))
        for name, judge in (("knn", knn_accuracy), ("probe", probe_accuracy)):
            share, m = judge(a, label, b, truth)
            error = (share * (1 - share) / m) ** 0.5
            found[name + end] = MetricValue(share, error, better="high")
            of[name + end] = {**images, **_OPTIONS[name]}
    return found, of


def _sha256(batch: Batch) -> str:
    """Hash pixels and labels."""
    content = hashlib.sha256(str(tuple(batch.x.shape)).encode())
    for part in (batch.x, class_labels(batch.condition)):
        content.update(part.contiguous().numpy().tobytes())
    return content.hexdigest()


@torch.no_grad()
def _encoded(model: Model, x: Tensor) -> Tensor:
    return torch.cat([model.net.encode(p.to(model.device)).cpu() for p in torch.split(x, _BATCH)])
