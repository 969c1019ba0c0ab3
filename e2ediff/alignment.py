"""Alignment of a network's tokens with the features of a fixed one.

Shapes: B batch, C H W image, N latent tokens, W trunk width, K features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from e2ediff.backbone import Backbone
from e2ediff.data import ImageSpec
from e2ediff.errors import AbsentDataError, DataError, ShapeError
from e2ediff.features import FeatureConfig, FeatureNetwork, trial_maps
from e2ediff.objective import Nets, sg

FEATURES = "features"
"""The name of the fixed network among an objective's `frozen` ones."""
_COARSEST = 4  # tokens of a row or column that would share a place of the map


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over tokens (B, N, K); no gradient into the teacher."""
    return 1 - functional.cosine_similarity(student.float(), sg(teacher).float(), dim=-1).mean()


def features_at_tokens(nets: Nets, x: Tensor, width: int) -> Tensor:
    """Return the fixed network's features (B, N, K) of images at the places of latent tokens.

    Its last map is resized to the rows and columns of the latent grid, bilinearly. A network that
    stretches images to squares is stretched back by that.

    Args:
        nets: The networks, of which `frozen` has the fixed one under the name `FEATURES`.
        x: Images (B, C, H, W) in [-1, 1].
        width: K, for the zeros that are returned where only shapes count and no network is there.
    """
    grid = nets.online.latent.grid
    assert grid is not None
    if FEATURES not in nets.frozen and x.is_meta:
        return x.new_zeros(len(x), grid[0] * grid[1], width)
    with torch.no_grad():
        last: Tensor = nets.frozen[FEATURES](x)[-1].float()  # (B, K, h, w)
    placed = functional.interpolate(last, grid, mode="bilinear", align_corners=False)
    return placed.flatten(2).mT


def feature_width(features: FeatureConfig, image: ImageSpec) -> int:
    """Return K, the channels of a feature network's last map; its weights are not read.

    Raises:
        DataError: The network cannot be built here.
    """
    try:
        return _feature_shape(features, image)[0]
    except AbsentDataError as error:
        raise AbsentDataError(
            f"objective.features: {error}. Give the path or URL of its weights; for a forecast "
            "without them set objective.feature_dim to the channels of its last map"
        ) from error


def fixed_network(features: FeatureConfig, width: int | None, image: ImageSpec) -> FeatureNetwork:
    """Build a feature network, whose last map has `width` channels where that is given.

    Raises:
        DataError: The network cannot be built here.
        ShapeError: Its last map has another number of channels.
    """
    network = features.build()
    found = _shape(network, image)[0]
    if width not in (None, found):
        raise ShapeError(f"objective.feature_dim: {_misfit(found)}")
    return network


def alignment_problems(
    net: Backbone, features: FeatureConfig, width: int | None
) -> Sequence[tuple[str, str]]:
    """List what keeps a backbone's tokens from being aligned with a feature network's map.

    A network that is not on this machine is none if `width` says how many channels its last map
    has; one that is here and cannot be used is a problem.

    Args:
        net: The backbone, on the meta device.
        features: The recipe's `objective.features`.
        width: The recipe's `objective.feature_dim`.
    """
    found = []
    if net.latent.grid is None:
        what = "its latent tokens have no place on the image plane, which alignment with a fixed "
        found.append(("backbone", f"{what}network's map needs; choose another, such as vit"))
    try:
        own, *places = _feature_shape(features, net.image)
    except AbsentDataError:
        return found  # it may be on the machine that trains
    except DataError as error:
        return [*found, ("objective.features", str(error))]
    if width not in (None, own):
        found.append(("objective.feature_dim", _misfit(own)))
    grid = net.latent.grid
    if grid is not None and any(
        _COARSEST * n <= wanted for n, wanted in zip(places, grid, strict=True)
    ):
        what = (
            f"the last map has {places[0]} x {places[1]} places for {grid[0]} x {grid[1]} latent "
            "tokens, whose targets would hardly differ; choose an earlier block of the network, "
            "or larger images for it where it has an option for that"
        )
        found.append(("objective.features", what))
    return found


def _feature_shape(features: FeatureConfig, image: ImageSpec) -> tuple[int, int, int]:
    """Return channels, rows and columns of a network's last map; its weights are not read."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _shape(features.blank(), image)


def _shape(network: FeatureNetwork, image: ImageSpec) -> tuple[int, int, int]:
    """Return channels, rows and columns of a feature network's last map for these images.

    Raises:
        DataError: The network cannot compute on images of that size, or returns no maps.
    """
    maps = trial_maps(network, (image.channels, image.height, image.width))
    channels, rows, columns = maps[-1].shape[1:]
    return channels, rows, columns


def _misfit(width: int) -> str:
    return (
        f"the last map of `features` has {width} channels; set objective.feature_dim: {width}, "
        "or leave it out"
    )
