"""Compute features of images with a feature network, and collect their moments.

Shapes: M images, C H W image, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from e2ediff.errors import DataError
from e2ediff.features import FeatureNetwork
from e2ediff.metric import Accumulator, FeatureSet


def network_title(network: FeatureNetwork) -> str:
    """Return the name of the network in scores: its `title`, or its class."""
    return network.title or type(network).__name__


def weights_sha256(network: nn.Module) -> str:
    """Hash all weights and buffers with their names, independently of the file format."""
    content = hashlib.sha256(type(network).__qualname__.encode())
    for name, value in sorted(network.state_dict().items()):
        content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


class Collector:
    """Collects features of a stream of images: moments of some taps, rows of others."""

    def __init__(
        self, network: FeatureNetwork, moments: Collection[str], rows: Collection[str]
    ) -> None:
        lacking = sorted({*moments, *rows} - {*network.taps})
        if lacking:
            raise DataError(
                f"feature network {network_title(network)} has no features called "
                f"{', '.join(map(repr, lacking))}; it has {', '.join(network.taps)}. Leave out "
                "the metrics that need them, or choose another network."
            )
        self.network: FeatureNetwork | None = network
        self.taps = tuple(sorted({*moments, *rows}))
        self.count = 0
        self.moments = {tap: Accumulator() for tap in moments}
        self.rows: dict[str, list[Tensor]] = {tap: [] for tap in rows}

    @torch.no_grad()
    def add(self, pixels: Tensor) -> None:
        """Add images (B, C, H, W) with values from 0 to 255, on the network's device."""
        assert self.network is not None
        # TensorFloat-32, cuDNN's default, would change scores in the third digit.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            found = self.network.vectors(pixels.float(), self.taps) if self.taps else {}
        self.count += len(pixels)
        for tap, accumulator in self.moments.items():
            accumulator.add(found[tap])
        for tap, kept in self.rows.items():
            kept.append(found[tap].float().cpu())

    def __getstate__(self) -> dict[str, object]:
        return {
            **self.__dict__,
            "network": None,
        }  # workers return statistics, not the network

    def merge(self, other: Collector) -> None:
        """Merge the features of later images from another collector."""
        self.count += other.count
        for tap, accumulator in self.moments.items():
            accumulator.merge(other.moments[tap])
        for tap, kept in self.rows.items():
            kept += other.rows[tap]

    def features(self) -> FeatureSet:
        """Return the collected features."""
        return FeatureSet(
            self.count,
            {tap: accumulator.moments() for tap, accumulator in self.moments.items()},
            {tap: torch.cat(kept) for tap, kept in self.rows.items()},
        )


def features_of(
    batches: Iterable[Tensor],
    network: FeatureNetwork,
    moments: Collection[str],
    rows: Collection[str],
    progress: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Compute features of all images of some batches (B, C, H, W), with values from 0 to 255.

    Raises:
        DataError: The network does not offer one of the taps.
    """
    collector = Collector(network, moments, rows)
    for batch in batches:
        collector.add(batch)
        if progress is not None:
            progress(collector.count)
    return collector.features()
