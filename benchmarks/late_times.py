"""How good a run's clean estimates are near t = 1, where few training times lie.

    python benchmarks/late_times.py RUN RUN ...

For each run, by time: the mean squared error of the denoiser's clean estimate of held-out
latents, without guidance, and the root mean square of its bias, which the mean over images has.
The last row is the error of doing nothing: of z_t / alpha, the noised latent itself.
"""

from __future__ import annotations

import click
import torch
from judge import load_images

from e2ediff.errors import E2EDiffError
from e2ediff.sample.load import load_model

TIMES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998)


@torch.no_grad()
def late_errors(run: str, count: int, seed: int) -> tuple[list[float], list[float], list[float]]:
    """Error, bias and the error of doing nothing at each time; latents have their own scale.

    Errors are divided by the latents' mean square, so that runs compare.
    """
    model = load_model(run)
    if model.guidance is not None:
        model = model.with_options("guidance", scale=1.0)
    path, held = model.recipe.interpolant, load_images(model.recipe.data, held_out=True)
    some, denoiser = held.first(count), model.denoiser()
    z = model.encode(some.x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    power, conditioning = z.square().mean(), model.image.conditioning
    errors, biases, nothing = [], [], []
    for t in TIMES:
        at = torch.tensor([t])
        z_t = path.alpha(at) * z + path.sigma(at) * noise
        wrong = denoiser(z_t, t, conditioning.accept(some.label, "the data")).x0 - z
        errors.append(float(wrong.square().mean() / power))
        biases.append(float((wrong.mean(dim=0).square().mean() / power).sqrt()))
        nothing.append(float((path.sigma(at) / path.alpha(at)) ** 2 / power))
    return errors, biases, nothing


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--count", default=640, type=click.IntRange(2), help="Held-out images.")
@click.option("--seed", default=0, help="Of the noise.")
def main(runs: tuple[str, ...], count: int, seed: int) -> None:
    """Print errors of clean estimates by time, and their bias in brackets."""
    click.echo("| run | " + " | ".join(f"t = {t:g}" for t in TIMES) + " |")
    click.echo("|---" * (len(TIMES) + 1) + "|")
    nothing: list[float] = []
    for run in runs:
        try:
            errors, biases, nothing = late_errors(run, count, seed)
        except E2EDiffError as error:
            raise click.ClickException(str(error)) from error
        cells = [f"{e:.4f} ({b:.3f})" for e, b in zip(errors, biases, strict=True)]
        click.echo(f"| {run} | " + " | ".join(cells) + " |")
    click.echo("| *nothing done* | " + " | ".join(f"{e:.2g}" for e in nothing) + " |")


if __name__ == "__main__":
    main()
