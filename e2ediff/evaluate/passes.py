"""The feature pass: read or sample each image once, for all metrics and conventions.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

import attrs
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e2ediff.data import Rounding, to_pixels
from e2ediff.distributed.children import in_processes
from e2ediff.distributed.threads import quiet, threads_for
from e2ediff.evaluate.conventions import Resize
from e2ediff.evaluate.images import ImageSet, Samples, images_at_once
from e2ediff.features import FeatureNetwork
from e2ediff.metric import FeatureSet
from e2ediff.model.image_features import Collector
from e2ediff.model.inference import denoise_once

_ATTEMPT = 16  # images used for timing


@attrs.frozen
class View:
    """How images are resized and rounded for the network."""

    rounding: Rounding
    resize: Resize


@attrs.frozen(eq=False)
class Pass:
    """What to collect, with which network, and on which device.

    With `choose_threads` each process chooses its number of CPU threads by timing.
    """

    network: FeatureNetwork
    moments: Collection[str]
    rows: Collection[str]
    batch: int = 64
    device: str = "cpu"
    choose_threads: bool = False

    def attempt(self, images: ImageSet) -> Callable[[], object]:
        """Return a small piece of a pass over these images, to be timed."""
        if isinstance(images, Samples):
            return partial(denoise_once, images.model)
        rows = images_at_once(min(self.batch, _ATTEMPT), images.shape)
        pixels = torch.zeros(rows, *images.shape, dtype=torch.uint8)

        def attempt() -> None:
            Collector(self.network.to(self.device), self.moments, self.rows).add(
                pixels.to(self.device)
            )

        return attempt

    def shown(self, x: Tensor, view: View) -> Tensor:
        """Images (B, C, H, W), uint8 or in [-1, 1], transformed by a view, from 0 to 255."""
        pixels = to_pixels(x, view.rounding) if x.is_floating_point() else x
        if view.resize == "pil_bicubic" and self.network.size:
            pixels = pil_bicubic(pixels, self.network.size)
        return pixels.to(self.device)

    def collect(
        self,
        images: ImageSet,
        views: Sequence[View],
        span: tuple[int, int],
        progress: Callable[[int], None] | None = None,
    ) -> dict[View, Collector]:
        """Collect features of images `span[0]` to `span[1]` under each view, in one process."""
        network = self.network.to(self.device)
        found = {view: Collector(network, self.moments, self.rows) for view in views}
        done = 0
        for x in images.batches(*span, self.batch):
            for view, collector in found.items():
                collector.add(self.shown(x, view))
            done += len(x)
            if progress is not None:
                progress(done)
        return found


def feature_pass(
    work: Pass,
    images: ImageSet,
    views: Sequence[View],
    count: int,
    *,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Mapping[View, FeatureSet]:
    """Compute features of the first `count` images under each view.

    Several processes share the images, and take the GPUs in turn where there are any; moments
    are merged, so they differ from those of one process by rounding alone.
    """
    if processes == 1:
        found = work.collect(images, views, (0, count), progress)
        return {view: collector.features() for view, collector in found.items()}
    units = -(-count // images.unit)
    cuts = [min(count, i * units // processes * images.unit) for i in range(processes + 1)]
    threads = max(1, torch.get_num_threads() // processes)
    parts = [
        (attrs.evolve(work, device=_device(work.device, i)), images, views, (a, b), threads)
        for i, (a, b) in enumerate(pairwise(cuts))
        if a < b
    ]
    shares, done = dict[int, dict[View, Collector]](), 0
    with in_processes(
        _share, parts, makes="scored images", advice="Give fewer --processes or a smaller --batch."
    ) as found_shares:
        for k, share in found_shares:
            shares[k] = share
            first_image, end = parts[k][3]
            done += end - first_image
            if progress is not None:
                progress(done)
    first, *others = (share for _, share in sorted(shares.items()))
    for other in others:
        for view, collector in first.items():
            collector.merge(other[view])
    return {view: collector.features() for view, collector in first.items()}


def _share(
    work: Pass, images: ImageSet, views: Sequence[View], span: tuple[int, int], threads: int
) -> Iterator[dict[View, Collector]]:
    torch.set_num_threads(threads)
    if work.device.startswith("cuda"):
        torch.cuda.set_device(work.device)  # a model loaded in this process is moved there, too
    device, fixed = torch.device(work.device), not work.choose_threads
    with threads_for(work.attempt(images), quiet, device, fixed=fixed) as finished:
        yield work.collect(images, views, span, finished)


def _device(device: str, i: int) -> str:
    return f"cuda:{i % torch.cuda.device_count()}" if device.startswith("cuda") else device


def pil_bicubic(pixels: Tensor, size: int) -> Tensor:
    """Resize bytes (B, C, H, W) to float (B, C, size, size) by Pillow, channel by channel.

    Source: clean-fid (Parmar et al. 2022, arXiv 2104.11222), `make_resizer("PIL", False,
    "bicubic", ...)`; as there, values are not rounded and may leave 0..255.
    """
    side = (size, size)
    planes = [
        np.asarray(Image.fromarray(p.astype(np.float32)).resize(side, Image.Resampling.BICUBIC))
        for p in pixels.cpu().flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).reshape(*pixels.shape[:2], size, size)
