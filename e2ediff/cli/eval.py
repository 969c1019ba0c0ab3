"""`e2ediff eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from e2ediff.cli import options
from e2ediff.distributed.signals import keeping
from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from e2ediff.evaluate.passport import Card
    from e2ediff.evaluate.reconstruction import Perceptual
    from e2ediff.evaluate.request import Request
    from e2ediff.host.plugins import Host
    from e2ediff.metric import Metric
    from e2ediff.sample.load import ModelRef


@click.command("eval")
@click.argument("run", metavar="RUN|FOLDER|NPZ")
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="[CONVENTION=]PLACE",
    help="An npz, a folder of images, a data source as '{name: ...}'; for a RUN also `data` "
    "(its training images, the default) or `held-out`.",
)
@click.option(
    "--metrics",
    metavar="LIST",
    help="Names or blocks, as in [fid, {name: kid, subsets: 10}], and for a RUN "
    "reconstruction, latents, memorisation. Default: every metric that the network allows.",
)
@click.option(
    "--features",
    metavar="NAME|BLOCK",
    help="Feature network. Default: inception2015 with --weights-file, else efficientnet_lite0.",
)
@click.option("--weights-file", metavar="PATH|URL", help="Weights of the feature network.")
@click.option("--sha256", metavar="HASH", help="Hash that --weights-file must have.")
@click.option(
    "--convention",
    "conventions",
    multiple=True,
    help="A paper's or tool's rules; may be repeated. Default: e2ediff.",
)
@click.option(
    "--count", type=click.IntRange(2), help="Number of images. Default: the convention's, or all."
)
@click.option(
    "--labels", type=click.Choice(["balanced", "uniform"]), help="Distribution of the labels."
)
@click.option(
    "--label",
    "names",
    multiple=True,
    metavar="CLASS",
    help="Samples of a RUN, and its data as reference, of this class alone, by index or name; "
    "may be repeated.",
)
@options.seed
@options.overrides("Another sampler or guidance of a RUN: --set guidance.scale=2.")
@click.option(
    "--bootstrap",
    type=click.IntRange(2),
    metavar="N",
    help="Errors and 95 % intervals of all that is compared with a reference, from N resampled "
    "sets; each costs as much as the scores themselves.",
)
@click.option("--lpips", metavar="PATH|URL", help="VGG16 weights (torchvision) for LPIPS.")
@click.option("--lpips-heads", metavar="PATH|URL", help="LPIPS's linear weights for VGG16.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@options.processes()
@options.model
@options.threads
@click.option("--cache", metavar="DIR", help="Features of references. Default: $E2EDIFF_CACHE.")
@click.option("--out", metavar="DIR", help="Default: RUN/scores, or TARGET.scores.")
@keeping("features of references in the cache are kept, and the same command starts again")
def command(ref: ModelRef, out: str | None, threads: int | None, **given: Any) -> None:
    """Score a RUN's samples, or the images of a FOLDER or NPZ, against a reference.

    Prints each score, with its standard error where there is one and its 95 % interval with
    --bootstrap, and writes one JSON file per convention, with everything that determines the
    scores. A Fréchet distance is called FID only in the published Inception features; without
    their weights it is named after its network.
    """
    from e2ediff.evaluate.evaluate import evaluate
    from e2ediff.evaluate.passport import write_card
    from e2ediff.host.plugins import load
    from e2ediff.store.known_runs import folder_in
    from e2ediff.store.run_directory import is_run
    from e2ediff.train.progress import Progress

    host, plain = load(), ref.run.rstrip("/")
    folder = out or (folder_in(plain, "scores") if is_run(ref.run) else f"{plain}.scores")
    with Progress() as progress:
        request = _request(host, ref, choose_threads=threads is None, **given)
        cards = evaluate(host, request, progress.update, progress.say)
    for card in cards:
        _show(card)
        echo_path(write_card(folder, card))


def _show(card: Card) -> None:
    protocol = card.passport.protocol
    echo(f"{protocol['convention']}: {protocol['images']} images, {protocol['network']}")
    width = max(map(len, card.scores), default=0)
    for name, score in card.scores.items():
        error = "" if score.error is None else f" +- {score.error:.2g}"
        if score.interval is not None:
            error += " [{:.6g}, {:.6g}]".format(*score.interval)
        echo(f"  {name:<{width}}  {score.value:.6g}{error}")
        for warning in score.warnings:
            echo(f"warning: {name}: {warning}", err=True)
    departs = card.notes["departs"]
    assert isinstance(departs, list)
    for text in departs:
        echo(f"note: not the convention {protocol['convention']}: {text}", err=True)


def _request(
    host: Host,
    ref: ModelRef,
    *,
    conventions: tuple[str, ...],
    references: tuple[str, ...],
    features: str | None,
    weights_file: str | None,
    sha256: str | None,
    metrics: str | None,
    lpips: str | None,
    lpips_heads: str | None,
    bootstrap: int | None,
    cache: str | None,
    names: tuple[str, ...],
    **given: Any,
) -> Request:
    """Build the request from the options; those in `given` are its fields."""
    from e2ediff.addresses import cache_folder
    from e2ediff.evaluate.conventions import CONVENTIONS, convention
    from e2ediff.evaluate.evaluate import default_metrics
    from e2ediff.evaluate.network import feature_network
    from e2ediff.evaluate.request import Request
    from e2ediff.evaluate.sections import SECTIONS

    chosen = [convention(name) for name in conventions or ("e2ediff",)]
    places = {}
    for text in references:
        name, equals, place = text.partition("=")
        named = bool(equals) and name in CONVENTIONS
        places[name if named else ""] = place if named else text
    if sha256 and not weights_file:
        raise click.UsageError("--sha256 is the hash of --weights-file; give both")
    network = feature_network(host, features, weights_file, sha256).build()
    sections, measured = _metrics(host, metrics, SECTIONS) if metrics else ((), [])
    if not measured and set(sections) <= {"reconstruction"}:
        # Reconstructions are compared by metrics, too.
        measured = default_metrics(host, network)
    return Request(
        target=ref,
        network=network,
        metrics=measured,
        conventions=chosen,
        sections=sections,
        references=places,
        perceptual=_perceptual(lpips, lpips_heads),
        bootstrap=bootstrap or 0,
        cache=cache or cache_folder(),
        classes=_classes(host, ref, names, sections),
        **given,
    )


def _classes(
    host: Host, ref: ModelRef, names: tuple[str, ...], sections: tuple[str, ...]
) -> tuple[int, ...]:
    """Return the classes that are asked for, in the order of their indices."""
    from e2ediff.errors import DataError
    from e2ediff.model.labels import label_of
    from e2ediff.sample.load import image_of, recipe_of
    from e2ediff.store.run_directory import RunDirectory, is_run

    if not names:
        return ()
    if not is_run(ref.run):
        raise DataError(f"--label: only a run has classes; {ref.run} is none")
    if whole := [section for section in sections if section != "memorisation"]:
        raise click.UsageError(f"--label chooses samples; {', '.join(whole)} are of all classes")
    directory = RunDirectory.open(ref.run)
    image = image_of(recipe_of(host, directory, ref.overrides), directory)
    return tuple(sorted({label_of(image, text) for text in names}))


def _metrics(
    host: Host, text: str, known: tuple[str, ...]
) -> tuple[tuple[str, ...], list[Metric]]:
    from e2ediff.errors import RecipeError
    from e2ediff.host.structure import Structurer
    from e2ediff.host.yaml import parse_yaml
    from e2ediff.metric import Metric

    root, problems = parse_yaml(text if text.startswith("[") else f"[{text}]", "--metrics")
    structurer, sections, metrics = Structurer(host), [], []
    for node in root.value if root is not None and isinstance(root.value, list) else []:
        if node.value in known:
            sections.append(str(node.value))
        else:
            metrics.append(cast("Metric", structurer.read(node, Metric)))
    if problems or structurer.problems:
        raise RecipeError("--metrics", [*problems, *structurer.problems])
    return tuple(dict.fromkeys(sections)), metrics


def _perceptual(place: str | None, heads: str | None) -> Perceptual | None:
    from e2ediff.evaluate.reconstruction import Perceptual, lpips_heads
    from e2ediff.features import read_weights
    from e2ediff.parts.features.networks import TorchvisionFeatures

    if not place:
        if heads:
            raise click.UsageError("--lpips-heads needs --lpips, the network's own weights")
        return None
    network = TorchvisionFeatures(weights=place).build()
    if not heads:
        return Perceptual(network)
    return Perceptual(network, lpips_heads(read_weights(heads)[0], heads))
