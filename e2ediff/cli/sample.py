"""`e2ediff sample`."""

from __future__ import annotations

import json

import click


@click.command("sample")
@click.argument("run")
@click.option(
    "--label",
    "labels",
    multiple=True,
    help="Class by index or name, or 'none'; may be repeated. Default: every class.",
)
@click.option(
    "--count", type=click.IntRange(1), default=8, show_default=True, help="Images a class."
)
@click.option("--steps", type=click.IntRange(1), help="Sampler steps. Default: the recipe's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--weights", help="online, target, or an average's name. Default: for sampling.")
@click.option("--checkpoint", help="Name of a checkpoint. Default: the newest.")
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--out", metavar="DIR", help="Where to write. Default: RUN/samples/seed-SEED.")
def command(
    run: str,
    labels: tuple[str, ...],
    count: int,
    steps: int | None,
    seed: int,
    weights: str | None,
    checkpoint: str | None,
    batch: int,
    device: str,
    out: str | None,
) -> None:
    """Make images with RUN, the directory that `e2ediff run` printed.

    Writes one PNG an image, `grid.png` (a column a class) and `samples.json` with the label,
    number and seed of each; prints the directory.
    """
    import torch

    from e2ediff.run.load import load_model
    from e2ediff.run.pictures import grid_png, png
    from e2ediff.run.progress import Progress
    from e2ediff.run.storage import Store

    with Progress() as progress:
        model = load_model(
            run, weights=weights, checkpoint=checkpoint, device=device, warn=progress.say
        )
        if steps is not None:
            model = model.with_steps(steps)
        image = model.recipe.data.image
        chosen = [model.label_of(text) for text in labels] or list(range(max(1, image.classes)))
        numbers = torch.tensor(chosen).repeat(count)
        x = model.sample(
            numbers,
            seed=seed,
            batch=batch,
            progress=lambda done: progress.update(f"{done}/{len(numbers)} images"),
        )
        store = Store(out or f"{run}/samples/seed-{seed}")
        for i, one in enumerate(x):
            store.write(f"{i:06d}.png", png(one))
        store.write("grid.png", grid_png(x, len(chosen)))
        entries = [
            {"file": f"{i:06d}.png", "label": label, "number": i, "seed": seed}
            for i, label in enumerate(numbers.tolist())
        ]
        store.write("samples.json", json.dumps(entries, indent=1).encode())
    click.echo(store.where())
