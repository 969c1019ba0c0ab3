"""`e2ediff data prepare`, `data check` and `data stats`."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import click

from e2ediff.distributed.signals import keeping
from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from e2ediff.data import Size

_WORKERS = click.option(
    "--workers", type=click.IntRange(0), default=1024, help="Processes. Default: one per core."
)


_OVERRIDES = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="As for `run`."
)


@click.group("data")
def command() -> None:
    """Prepare, check and describe images.

    The data are named by a recipe, by a YAML file of a data block, or by their path or URL: a
    folder, prepared shards, or what a source of an installed plugin reads.
    """


@command.command("prepare")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--size",
    "side",
    metavar="N|H,W",
    required=True,
    help="Pixels of the crop: the side of a square, or height and width.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["png", "jpeg", "raw"]),
    default="png",
    show_default=True,
    help="png and raw keep every pixel, jpeg is the smallest and raw the largest.",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), default=95, help="JPEG quality. Default: 95."
)
@click.option("--each", type=click.IntRange(1), default=1024, help="Images per shard.")
@click.option("--held-out", is_flag=True, help="The held-out images instead of the training ones.")
@_WORKERS
@_OVERRIDES
@keeping("the finished shards are kept, and the same command makes the others")
def prepare_command(
    src: str,
    dst: str,
    side: str,
    format_: str,
    quality: int,
    each: int,
    held_out: bool,
    workers: int,
    overrides: tuple[str, ...],
) -> None:
    """Crop all images of SRC once, into indexed shards with hashes in DST.

    SRC is a recipe, a YAML file of a data block, or the data's path or URL.
    The crop is ADM's, the one that training applies.
    After an interruption, the same command makes what is missing.
    Prints DST; `data={name: shards, path: DST, ...}` reads it.
    """
    from typing import cast

    from e2ediff.condition import ClassLabels
    from e2ediff.data import SourceConfig, size_text
    from e2ediff.errors import DataError
    from e2ediff.host.plugins import load
    from e2ediff.host.structure import unstructure
    from e2ediff.train.progress import Progress
    from e2ediff_data.address import source_config
    from e2ediff_data.write import Format, Settings, prepare

    size = _size(side)
    host = load()
    config = source_config(host, src, overrides, size)
    image = config.image
    if not isinstance(image.conditioning, ClassLabels):
        raise DataError(
            f"{src}: the images are conditioned on {image.conditioning.title}, and shards hold "
            "classes alone; train on them as they are"
        )
    source = config.open(held_out=held_out)
    block = unstructure(host, config, SourceConfig)
    assert isinstance(block, dict)
    block = {key: value for key, value in block.items() if key != "workers"}
    settings = Settings(
        source=f"{block}{' held out' if held_out else ''}",
        images=len(source),
        size=size,
        channels=image.channels,
        classes=image.classes,
        format=cast(Format, format_),
        quality=quality,
        each=each,
        skip=config.on_bad_image == "skip",
    )
    with Progress() as progress:
        done = prepare(
            source,
            settings,
            dst,
            workers=workers,
            progress=progress.update,
            class_names=image.class_names,
        )
        for place, what in done.left_out:
            progress.say(f"left out {place}: {what}")
    kept = f", {done.kept} of them made before" if done.kept else ""
    block = (
        f"data={{name: shards, path: {json.dumps(dst)}, size: {size_text(size)}, "
        f"classes: {image.classes}, "
        f"channels: {image.channels}}}"
    )
    left_out = f"{len(done.left_out)} left out"
    echo(f"{done.images:,} images in {done.shards} shards{kept}; {left_out}", err=True)
    echo(f"read them with: --set {shlex.quote(block)}", err=True)
    echo_path(dst)


def _size(text: str) -> Size:
    """Parse the option `--size`.

    Raises:
        click.UsageError: It is neither a side nor height and width.
    """
    from e2ediff.data import as_size

    sides = text.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise click.UsageError(f"--size {text}: expected a side in pixels, or height,width")
    return as_size([int(sides[0]), int(sides[-1])])


@command.command("check")
@click.argument("address", metavar="RECIPE|PATH")
@click.option("--quick", is_flag=True, help="Read headers, decode no pixels.")
@_WORKERS
@_OVERRIDES
def check_command(address: str, quick: bool, workers: int, overrides: tuple[str, ...]) -> None:
    """Read every image, held-out ones too, and print those that cannot be used.

    Prints one line `path: fault` for each; exits with 5 if there are any.
    Warns of classes without an image.
    The hashes of prepared shards are compared too.
    """
    from e2ediff.data import left_out_text
    from e2ediff.errors import DataError
    from e2ediff.host.plugins import load
    from e2ediff.loading.classes import check_same_classes
    from e2ediff.train.progress import Progress
    from e2ediff_data.address import source_config
    from e2ediff_data.examine import compare_hashes, examine
    from e2ediff_data.figures import without_images

    config = source_config(load(), address, overrides)
    sources = [config.open()]
    if not quick:
        compare_hashes(config)
    if config.has_held_out:
        sources.append(config.open(held_out=True))
        check_same_classes(*sources)
    bad: list[tuple[str, str]] = []
    with Progress() as progress:
        for source, kind in zip(sources, ("training", "held-out"), strict=False):
            if empty := without_images(source, config):
                progress.say(f"warning: {address}: {kind} images: {empty}")
            seen = examine(
                source,
                range(len(source)),
                quick=quick,
                workers=workers,
                progress=progress.update,
            )
            bad += seen.bad
    for place, what in bad:
        echo(f"{place}: {what}")
    for source in sources:
        if left_out := left_out_text(source.left_out):
            echo(left_out, err=True)
    count = sum(map(len, sources))
    if bad:
        raise DataError(
            f"{address}: {len(bad)} of {count:,} images cannot be used; remove or replace them, "
            "or set `data.on_bad_image: skip`"
        )
    done = "have sound headers" if quick else "can be read"
    echo(f"{address}: all {count:,} images {done}", err=True)


@command.command("stats")
@click.argument("address", metavar="RECIPE|PATH")
@click.option(
    "--images", type=click.IntRange(1), help="Images to examine. Default: 2000, as for `run`."
)
@click.option("--classes", is_flag=True, help="Print a line for each class, empty ones too.")
@click.option("--json", "as_text", is_flag=True, help="Print JSON, with every class.")
@_WORKERS
@_OVERRIDES
def stats_command(
    address: str,
    images: int | None,
    classes: bool,
    as_text: bool,
    workers: int,
    overrides: tuple[str, ...],
) -> None:
    """Count classes, measure sizes and channels, and propose a data block.

    Classes are counted over all images; sizes, means and standard deviations are those of a
    fixed random choice of them.
    """
    import json

    from e2ediff.host.data_block import LOOKED_AT, choice_of
    from e2ediff.host.plugins import load
    from e2ediff.train.progress import Progress
    from e2ediff_data.address import source_config
    from e2ediff_data.examine import examine
    from e2ediff_data.figures import as_json, every_class, lines, proposal

    host = load()
    config = source_config(host, address, overrides)
    source = config.open()
    with Progress() as progress:
        seen = examine(
            source,
            choice_of(len(source), images or LOOKED_AT),
            quick=False,
            workers=workers,
            progress=progress.update,
        )
    if as_text:
        echo(json.dumps(as_json(host, source, config, seen), indent=1), lines=True)
        return
    for line in lines(source, config, seen):
        echo(line)
    for place, what in seen.bad:
        echo(f"            {place}: {what}")
    if classes and config.image.classes:
        echo()
        echo("# images, label and name of every class")
        for label, name, count in every_class(source, config):
            echo(f"{count:>11,} {label:>7} {name}")
    echo("\n# proposed\n" + proposal(host, source, config, seen), lines=True, end="")
