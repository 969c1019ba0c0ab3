"""`e2ediff reconstruct`."""

from __future__ import annotations

import click


@click.command("reconstruct")
@click.argument("run")
@click.option(
    "--count", type=click.IntRange(1), default=64, show_default=True, help="Held-out images."
)
@click.option("--weights", help="online, target, or an average's name. Default: for sampling.")
@click.option("--checkpoint", help="Name of a checkpoint. Default: the newest.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--out", metavar="DIR", help="Where to write. Default: RUN/samples.")
def command(
    run: str,
    count: int,
    weights: str | None,
    checkpoint: str | None,
    device: str,
    out: str | None,
) -> None:
    """Pass held-out images of RUN's data set through its encoder and decoder.

    Writes `reconstructions.png`, each image followed by its reconstruction, and prints the mean
    PSNR in decibels and the file.
    """
    import torch

    from e2ediff.run.bad_images import open_source
    from e2ediff.run.load import load_model
    from e2ediff.run.loader import fixed_images
    from e2ediff.run.pictures import grid_png
    from e2ediff.run.progress import Progress
    from e2ediff.run.storage import Store

    with Progress() as progress:
        model = load_model(
            run, weights=weights, checkpoint=checkpoint, device=device, warn=progress.say
        )
        source = open_source(model.recipe.data, held_out=True)
        cpu = torch.device("cpu")
        x = fixed_images(source, count, model.recipe.seed, "reconstruct", cpu).x
        x_hat = model.reconstruct(x)
    error = ((x_hat - x) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    store = Store(out or f"{run}/samples")
    pairs = torch.stack([x, x_hat], dim=1).flatten(0, 1)
    store.write("reconstructions.png", grid_png(pairs, 16))
    click.echo(f"psnr {float((-10 * error.log10()).mean()):.2f} dB over {len(x)} images")
    click.echo(store.where("reconstructions.png"))
