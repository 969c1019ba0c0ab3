"""Images a second of the loader and of `data prepare`, against bare decoders of the same bytes.

    python benchmarks/speed/loader.py
    python benchmarks/speed/loader.py --only prepare --json

Photos are made: JPEGs of 500 x 375 in class folders, read as 256 x 256, also from prepared shards.
A bare decoder has the bytes in memory and makes pixels of one image at a time: Pillow with ADM's
crop for the folder, torchvision's for shards of JPEG and PNG; for raw ones it is the copy of an
image (H, W, C) to (C, H, W). `loaded` are batches of floats, mirrored, from one process or two.
"""

from __future__ import annotations

import io
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from measuring import Report, Times, benchmark, contest
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg, decode_png

from e2ediff.data import DataSource, SourceConfig
from e2ediff.loading.batches import batches
from e2ediff.parts.sources import ImageFolder

try:
    from e2ediff_data.shards import Shards
    from e2ediff_data.write import Settings, prepare
except ImportError:
    raise SystemExit("shards need e2ediff-data: pip install ./plugins/e2ediff-data") from None

BATCH, SIDE, CLASSES, STEPS = 32, 256, 2, 32
FORMATS = ("jpeg", "png", "raw")


def make_photos(root: Path, count: int) -> None:
    """Smooth colours with the noise of a sensor, about 1.4 bits for each pixel."""
    g = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(g.integers(256, size=(26, 34, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + g.normal(scale=g.uniform(4, 16), size=smooth.shape)
        folder = root / f"class_{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=90)


def with_pillow(data: bytes) -> np.ndarray:
    """Decode and crop as ADM's released code does."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as opened:
        opened.load()
        image = opened.convert("RGB")
    while min(*image.size) >= 2 * SIDE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIDE / min(*image.size)
    shape = round(image.width * scale), round(image.height * scale)
    array = np.array(image.resize(shape, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - SIDE) // 2, (array.shape[1] - SIDE) // 2
    return array[top : top + SIDE, left : left + SIDE]


def with_torchvision(decoder: Callable[[Tensor], Tensor], data: bytes) -> Tensor:
    """Decode bytes that are in memory."""
    return decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def copied(data: bytes) -> Tensor:
    """Copy the bytes of pixels (H, W, C)."""
    pixels = np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


BARE = {
    "folder": with_pillow,
    "jpeg": partial(with_torchvision, decode_jpeg),
    "png": partial(with_torchvision, decode_png),
    "raw": copied,
}


def prepared(source: DataSource, format_: str, folder: Path) -> None:
    """Prepare all images in this process."""
    settings = Settings(
        source="photos", images=len(source), size=SIDE, channels=3, classes=CLASSES,
        format=format_, quality=95, each=len(source), skip=False,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    prepare(source, settings, folder, workers=0, progress=lambda line: None)


def every_one(work: Callable[[bytes], object], files: Sequence[bytes]) -> Callable[[], None]:
    """Make a contestant that takes the bytes of all images, one after the other."""

    def run() -> None:
        for data in files:
            work(data)

    return run


def read(source: DataSource) -> None:
    """Read all images, a batch at a time."""
    for first in range(0, len(source), BATCH):
        source.read(range(first, min(first + BATCH, len(source))))


def loaded(config: SourceConfig, source: DataSource, workers: int) -> None:
    """Load batches as a run does."""
    found = batches(
        source, config.image, batch=BATCH, seed=0, first=0, last=STEPS, flip=True,
        workers=workers, device=torch.device("cpu"),
    )  # fmt: skip
    for _ in found:
        pass


def say(
    report: Report, times: Times, name: str, other: str, images: int, others: int | None = None
) -> None:
    """Report images for each second of CPU time, as a share of another contestant's.

    A round of the other one takes `others` images, by default as many.
    """
    rate = images / times.median(name)
    shares = [images / (others or images) * share for share in times.ratios(other, name)]
    share = statistics.median(shares)
    report.row(
        f"{name:<24} {rate:7.0f} images/CPU-s, {share:.3f} of {other} "
        f"({shares[0]:.3f} to {shares[-1]:.3f})",
        what=name, images_per_second=rate, against=other, share=share, shares=shares,
    )  # fmt: skip


@click.option("--only", type=click.Choice(["read", "loaded", "prepare"]))
@benchmark(rounds=7)
@click.option("--images", default=128, show_default=True, type=click.IntRange(CLASSES))
def main(report: Report, rounds: int, only: str | None, images: int) -> None:
    """Time each reader against a bare decoder, and preparing against reading."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_photos(root / "folder", images)
        shape = {"size": SIDE, "classes": CLASSES}
        configs: dict[str, SourceConfig] = {
            "folder": ImageFolder(root=str(root / "folder"), **shape)
        }
        photos = configs["folder"].open()
        for kind in FORMATS:
            prepared(photos, kind, root / kind)
            configs[kind] = Shards(path=str(root / kind), **shape)
        for kind, config in configs.items():
            report.probe()
            source = config.open()
            files = [source.listing.fetch(i) for i in range(images)]
            report.say(f"{kind}: {sum(map(len, files)) / images / 1000:.1f} kB an image")
            whole: dict[str, Callable[[], None]] = {f"read {kind}": partial(read, source)}
            if only in (None, "read"):
                bare = {f"bare {kind}": every_one(BARE[kind], files)}
                times = contest(bare | whole, report.device, rounds)
                say(report, times, f"bare {kind}", f"bare {kind}", images)
                say(report, times, f"read {kind}", f"bare {kind}", images)
            if only in (None, "loaded"):
                work = {
                    f"loaded {kind}, {n} workers": partial(loaded, config, source, n)
                    for n in (0, 2)
                }
                times = contest(whole | work, report.device, min(rounds, 3), warm=1)
                for one in work:
                    say(report, times, one, f"read {kind}", BATCH * STEPS, images)
        if only in (None, "prepare"):
            work = {f"prepare {k}": partial(prepared, photos, k, root / "again") for k in FORMATS}
            work["read folder"] = partial(read, photos)
            times = contest(work, report.device, rounds, warm=1)
            for one in work:
                say(report, times, one, "read folder", images)
        report.probe()


if __name__ == "__main__":
    main()
