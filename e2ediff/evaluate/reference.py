"""Reference sets: statistics in an npz, images, or both; features are cached.

Shapes: n images, F features.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import override

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.condition import Condition
from e2ediff.data import DataSource, SourceConfig
from e2ediff.errors import DataError
from e2ediff.evaluate.images import (
    ImageSet,
    NpzImages,
    SourceImages,
    file_sha256,
    readable,
    stored_images,
)
from e2ediff.evaluate.passes import Pass, View, feature_pass
from e2ediff.features import FeatureNetwork
from e2ediff.files.arrays import check_npy
from e2ediff.files.damage import DAMAGED_ARRAY
from e2ediff.host.plugins import Host
from e2ediff.host.structure import structured
from e2ediff.host.yaml import parse_yaml
from e2ediff.limits import check_size
from e2ediff.metric import FeatureSet, Moments
from e2ediff.model.image_features import network_title, weights_sha256
from e2ediff.store.storage import Store

_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_CACHED = 2  # version 1 read 16-bit grey as white, and took colour from the first image
_MOST = 1 << 31  # bytes: a covariance of 16,000 features
_STATISTICS = "numbers, a mean (F,) and a covariance (F, F)"


@attrs.frozen(eq=False)
class ReferenceSet:
    """Statistics by tap, images, or both; `sha256` is the hash of its content."""

    place: str
    sha256: str
    moments: Mapping[str, Moments] = attrs.field(factory=dict)
    images: ImageSet | None = None


class _OfClasses(DataSource):
    """The images of some classes of a source."""

    def __init__(self, source: DataSource, rows: Sequence[int]) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | Condition]:
        return self.source.read([self.rows[i] for i in indices])


def _of_classes(source: DataSource, classes: Sequence[int], place: str) -> DataSource:
    """Return the images of these classes."""
    labels = torch.tensor(classes, dtype=torch.int64)
    rows = torch.isin(source.labels(), labels).nonzero()[:, 0].tolist()
    if not rows:
        raise DataError(f"--reference {place}: holds no image of the classes of --label")
    return _OfClasses(source, rows)


def open_reference(
    place: Address, host: Host, data: SourceConfig | None, classes: Sequence[int] = ()
) -> ReferenceSet:
    """Open the reference that a user names.

    Args:
        place: An npz, a folder, a data source's block in YAML, or for a run `data` or `held-out`.
        host: Knows the data sources.
        data: The run's data source, if a run is evaluated.
        classes: Those to take of `data` and `held-out`; empty for all, as with "no class".

    Raises:
        DataError: There is no such file, or it holds neither statistics nor images.
        RecipeError: The block is wrong.
    """
    place = addresses.plain(place)
    if place in ("data", "held-out"):
        if data is None:
            raise DataError(f"--reference {place}: only a run has data; give images or an npz")
        source = data.open(held_out=place == "held-out")
        if classes and data.image.null_label not in classes:
            source = _of_classes(source, classes, place)
        return _of_images(SourceImages(source, place))
    if place.lstrip().startswith("{"):
        root, problems = parse_yaml(place, "--reference")
        assert root is not None
        config = structured(host, root, SourceConfig, "--reference", problems)
        return _of_images(SourceImages(config.open(), place))
    if place.endswith(".npz"):
        return _of_npz(place)
    return _of_images(stored_images(place))


def _of_images(images: ImageSet) -> ReferenceSet:
    return ReferenceSet(images.place, images.sha256(), images=images)


def npz_keys(place: Address) -> list[str]:
    """Return the names of the arrays in an npz.

    Raises:
        DataError: It is missing or not an npz.
    """
    try:
        with addresses.open_file(place, typed=True) as file, zipfile.ZipFile(file) as archive:
            return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    except (*DAMAGED_ARRAY, ImportError) as error:
        raise DataError(f"{place}: cannot be read as an npz: {error}") from error


def _of_npz(place: str) -> ReferenceSet:
    keys = npz_keys(place)
    moments = {}
    for tap, names in _KEYS.items():
        if set(names) <= set(keys):
            with readable(place, " or ".join(names), _STATISTICS):
                found = _arrays(place, names)
            moments[tap] = _moments(place, *found)
    images = NpzImages(place) if "arr_0" in keys else None
    if not moments and images is None:
        raise DataError(
            f"{place}: holds {', '.join(keys) or 'nothing'}; expected mu and sigma (and mu_s and "
            "sigma_s) of Inception features, or images in arr_0, or both"
        )
    return ReferenceSet(place, file_sha256(place), moments, images)


def _arrays(place: str, names: Sequence[str]) -> list[np.ndarray]:
    with (
        addresses.open_file(place, typed=True) as file,
        zipfile.ZipFile(file) as archive,
    ):
        found = []
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            check_size(member.file_size, name, _MOST)
            with archive.open(member) as one:
                check_npy(one, member.file_size, member.compress_size)
                one.seek(0)
                found.append(np.lib.format.read_array(one, allow_pickle=False))
        return found


def _moments(place: str, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind not in "fiu":
            raise DataError(
                f"{place}: {name} is {array.dtype}, expected {_STATISTICS}; write it again"
            )
    mu, sigma = (np.asarray(a, dtype=np.float64) for a in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DataError(
            f"{place}: mu {mu.shape} and sigma {sigma.shape}, expected (F,) and (F, F)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{place}: mu or sigma is not finite; the file is damaged")
    return Moments(0, torch.from_numpy(mu), torch.from_numpy(sigma))


def reference_features(
    reference: ReferenceSet,
    work: Pass,
    view: View,
    *,
    cache: str,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Return features of the reference: stored statistics where it has them, else from images.

    `progress` is called with the number of images of which features are computed.

    Raises:
        DataError: It has statistics of another network, or no images where they are needed.
    """
    # Statistics stored with images used the network's own resize; for others the user vouches.
    usable = view.resize == "network" or reference.images is None
    given = _given(reference, work.network) if usable else {}
    lacking = sorted(({*work.moments} - {*given}) | {*work.rows})
    if not lacking:
        return FeatureSet(0, {tap: given[tap] for tap in work.moments})
    if reference.images is None:
        raise DataError(
            f"{reference.place}: has only statistics, but the metrics need features of images "
            f"({', '.join(lacking)}); leave those metrics out, or give images"
        )
    need = attrs.evolve(work, moments=sorted({*work.moments} - {*given}))
    found = _cached(reference, need, view, cache, processes, progress)
    own = {tap: value for tap, value in given.items() if tap in work.moments}
    return FeatureSet(found.count, {**found.moments, **own}, found.rows)


def _given(reference: ReferenceSet, network: FeatureNetwork) -> Mapping[str, Moments]:
    """Return the npz's statistics, if they fit this network."""
    title = network_title(network)
    if not reference.moments or (reference.images is not None and title != "Inception2015"):
        return {}
    if title != "Inception2015":
        raise DataError(
            f"{reference.place}: its statistics are of Inception features, and the network is "
            f"{title}; give images as reference, or Inception weights (--weights-file)"
        )
    for tap, width in (("pool", 2048), ("spatial", 2023)):
        if tap in reference.moments and len(reference.moments[tap].mean) != width:
            raise DataError(
                f"{reference.place}: statistics of {len(reference.moments[tap].mean)} features, "
                f"Inception has {width} at {tap}"
            )
    return reference.moments


def _cached(
    reference: ReferenceSet,
    work: Pass,
    view: View,
    cache: str,
    processes: int,
    progress: Callable[[int], None] | None,
) -> FeatureSet:
    assert reference.images is not None
    what = [_CACHED, reference.sha256, weights_sha256(work.network), view.resize]
    what += [sorted(work.moments), sorted(work.rows)]
    name = f"features-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.safetensors"
    store = Store(cache)
    try:
        return _read(load(store.read(name)))
    except (OSError, SafetensorError, KeyError):
        pass  # missing, or cut short by a crash: compute it again
    images = reference.images
    found = feature_pass(
        work, images, [view], images.count, processes=processes, progress=progress
    )[view]
    store.write(name, save(_flat(found)))
    return found


def _flat(found: FeatureSet) -> dict[str, Tensor]:
    tensors = {"count": torch.tensor([found.count])}
    for tap, m in found.moments.items():
        tensors |= {f"mean/{tap}": m.mean, f"covariance/{tap}": m.covariance.contiguous()}
    return tensors | {f"rows/{tap}": rows for tap, rows in found.rows.items()}


def _read(tensors: Mapping[str, Tensor]) -> FeatureSet:
    count = int(tensors["count"])
    taps = [k.removeprefix("mean/") for k in tensors if k.startswith("mean/")]
    moments = {t: Moments(count, tensors[f"mean/{t}"], tensors[f"covariance/{t}"]) for t in taps}
    rows = {k.removeprefix("rows/"): v for k, v in tensors.items() if k.startswith("rows/")}
    return FeatureSet(count, moments, rows)
