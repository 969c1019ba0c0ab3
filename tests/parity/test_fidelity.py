"""Scores equal those of torch-fidelity, and the Inception network's features equal its."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_weights import random_state

from e2ediff.errors import DataError
from e2ediff.metric import FeatureSet, moments_of
from e2ediff.parts.features.inception import Inception2015, resize_tf1
from e2ediff.parts.features.networks import Inception
from e2ediff.parts.metrics import FID, KID, InceptionScore, PrecisionRecall

pytest.importorskip("torch_fidelity", reason="needs `pip install torch-fidelity`")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with random weights under the published file's names."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_state(Inception2015()), path)
    return str(path)


def test_inception_loads_the_published_names_and_its_taps_are_torch_fidelitys(weights) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["64", "192", "768", "2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=weights)
    ours = Inception(weights=weights).build()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    g = torch.Generator().manual_seed(0)
    taps = ("64", "192", "768", "pool", "logits")
    for shape in ((1, 3, 32, 32), (1, 3, 40, 333)):
        pixels = torch.randint(256, shape, generator=g, dtype=torch.uint8)
        found = ours.vectors(pixels.float(), (*taps, "spatial"))
        for tap, known in zip(taps, theirs(pixels), strict=True):
            torch.testing.assert_close(found[tap], known, rtol=1e-5, atol=1e-5)
        assert found["spatial"].shape == (1, 17 * 17 * 7)
    assert not ours.published  # other weights are never called FID


def test_spatial_features_are_ordered_as_in_tensorflow(weights) -> None:
    """Row, column, channel: the order of the reference's `mu_s`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["768"], feature_extractor_weights_path=weights)
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, out: seen.append(out))
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (1, 3, 32, 32), generator=g, dtype=torch.uint8)
    theirs(pixels)
    known = seen[0][:, :7].numpy().transpose(0, 2, 3, 1).reshape(1, -1)
    ours = Inception(weights=weights).build()
    found = ours.vectors(pixels.float(), ("spatial",))["spatial"]
    torch.testing.assert_close(found, torch.from_numpy(known), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (299, 299), (310, 640)])
def test_the_resize_is_tensorflow_1s(shape) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as theirs,
    )

    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 255
    known = theirs(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(x), known, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def sets():
    """Features of two laws, float64, so that only formulas can differ."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=g, dtype=torch.float64)
    made = torch.randn(400, 12, generator=g, dtype=torch.float64) @ mix
    real = torch.randn(300, 12, generator=g, dtype=torch.float64) @ mix * 1.1 + 0.3
    return made, real


def features(rows, tap="pool"):
    return FeatureSet(len(rows), {tap: moments_of(rows)}, {tap: rows})


def test_fid_is_torch_fidelitys(sets) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    known = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)
    found = FID().measure(*map(features, sets))["FD"].value
    assert found == pytest.approx(known["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("size", [50, 300])
def test_kid_is_torch_fidelitys(sets, size) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    known = kid_features_to_metric(
        *sets, kid_subsets=20, kid_subset_size=size, verbose=False, rng_seed=2020,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1,
        kid_kernel_poly_gamma=None,
    )  # fmt: skip
    found = KID(subsets=20, size=size).measure(*map(features, sets))["KD"].value
    assert found == pytest.approx(known["kernel_inception_distance_mean"], rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys(sets) -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    known = calculate_precision_recall_full(*sets, neighborhood=3)
    found = PrecisionRecall().measure(*map(features, sets))
    assert 0 < known[0] < 1
    values = (found["precision"].value, found["recall"].value)
    assert values == pytest.approx(known, rel=1e-6)


def test_the_inception_score_is_torch_fidelitys(sets) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    known = isc_features_to_metric(sets[0], splits=10, shuffle=True, rng_seed=2020)
    made = features(sets[0], "logits")
    found = InceptionScore().measure(made, made)["IS"].value
    assert found == pytest.approx(known["inception_score_mean"], rel=1e-6)


def test_a_numpy_file_is_no_state_dict(tmp_path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(DataError, match="is not a file of tensors"):
        Inception(weights=str(tmp_path / "x.npy")).build()
