"""What an evaluation costs beside sampling: the metric network, its statistics, the distance.

    python benchmarks/speed/evaluate.py
    python benchmarks/speed/evaluate.py --device cuda --batch 64 --size 256 --json

The metric network is that of FID with random weights, and beside it torch-fidelity's where that
is installed, on the same images and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from measuring import Report, benchmark, contest

from e2ediff.distances import frechet
from e2ediff.metric import Accumulator, Moments
from e2ediff.parts.features.inception import Inception2015


def torch_fidelity(network: Inception2015) -> torch.nn.Module | None:
    """Return torch-fidelity's network with these weights, where it is installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    with TemporaryDirectory() as place:
        path = Path(place, "weights.pth")
        torch.save(network.state_dict(), path)
        return FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))


def moments(count: int, features: int) -> Moments:
    """Return the moments of random features."""
    seen = Accumulator()
    seen.add(torch.randn(count, features))
    return seen.moments()


@benchmark(rounds=5)
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1))
@click.option("--size", default=256, show_default=True, type=click.IntRange(32))
@click.option("--features", default=2048, show_default=True, type=click.IntRange(1),
              help="Numbers of a vector whose statistics are timed.")  # fmt: skip
def main(report: Report, rounds: int, batch: int, size: int, features: int) -> None:
    """Measure each part on its own."""
    network = Inception2015().to(report.device)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=report.device)
    works: dict[str, Callable[[], object]] = {"e2ediff": lambda: network.vectors(pixels.float())}
    if (theirs := torch_fidelity(network)) is not None:
        theirs = theirs.to(report.device)
        works["torch-fidelity"] = lambda: theirs(pixels)
    with torch.no_grad():
        times = contest(works, report.device, rounds, warm=1)
    for name in works:
        beside = "" if name == "e2ediff" else f"; e2ediff {times.against('e2ediff', name)}"
        each = 1000 * times.median(name) / batch
        report.row(f"metric network, {name}: {each:.1f} ms an image{beside}",
                   what="network", name=name, milliseconds_an_image=each,
                   ratio=times.ratio("e2ediff", name))  # fmt: skip
    rows = {count: torch.randn(count, features, device=report.device) for count in (50, 500)}
    for count, part in rows.items():
        _row(report, rounds, f"accumulate a batch of {count}", partial(Accumulator().add, part))
    a, b = moments(4000, features), moments(4000, features)
    _row(report, min(rounds, 3), "Fréchet distance", partial(frechet, a, b))


def _row(report: Report, rounds: int, what: str, work: Callable[[], object]) -> None:
    seconds = contest({what: work}, report.device, rounds, warm=1).median(what)
    report.row(f"{what}: {1000 * seconds:.0f} ms", what=what, seconds=seconds)


if __name__ == "__main__":
    main()
