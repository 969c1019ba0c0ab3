"""The fixed probe and the preview sheet: what is looked at while a run goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone, Encode
from e2ediff.data import Batch, DataSource
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.errors import DivergedError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Nets
from e2ediff.run.ema import in_use
from e2ediff.run.generate import Model
from e2ediff.run.loader import fixed_images
from e2ediff.run.seeds import generator

_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class Observer:
    """Fixed images, noise and labels on which a run is looked at."""

    recipe: Recipe
    diagnostics: Sequence[Diagnostic]
    probe: Batch
    calibration: Tensor

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        diagnostics: Sequence[Diagnostic],
        training: DataSource,
        held_out: DataSource,
        device: torch.device,
    ) -> Observer:
        """Read the probe from the held-out images, the calibration from the training ones."""
        count, seed = recipe.probe.images, recipe.seed
        probe = fixed_images(held_out, count, seed, "probe", device)
        count = recipe.probe.calibration
        calibration = fixed_images(training, count, seed, "calibration", device)
        return cls(recipe, diagnostics, probe, calibration.x)

    @torch.no_grad()
    def measure(self, nets: Nets) -> dict[str, float]:
        """All diagnostics, on the target network's weights.

        Raises:
            DivergedError: What the networks make of the probe is not finite.
        """
        x, label = self.probe.x, self.probe.label
        with in_use(nets.online, self.calibration) as online:
            z_online = online.encode(x)
        with in_use(nets.target, self.calibration) as net:
            (out,) = net.outputs(Encode(x=x))
            z = out.value
            probe = Probe(
                x=x,
                label=label,
                x_hat=net.decode(z),
                z=z,
                raw=z if out.raw is None else out.raw,
                z_online=z_online,
                denoised={t: self._denoise(net, z, label, t) for t in self.recipe.probe.times},
                predicts=self.recipe.predicts,
            )
        seen = {"x_hat": probe.x_hat, "z": probe.z, "raw": probe.raw, "z_online": probe.z_online}
        seen |= {f"denoised at t={time:g}": z for time, z in probe.denoised.items()}
        bad = [name for name, value in seen.items() if not torch.isfinite(value).all()]
        if bad:
            raise DivergedError(f"{', '.join(bad)} of the probe images: not finite.")
        figures: dict[str, float] = {}
        for diagnostic in self.diagnostics:
            figures.update(diagnostic.measure(probe))
        return figures

    def verdict(self, figures: Mapping[str, float]) -> list[str]:
        """What the diagnostics make of their figures; empty for healthy latents."""
        return [sign for d in self.diagnostics for sign in d.verdict(figures)]

    def _denoise(self, net: Backbone, z: Tensor, label: Tensor, t: float) -> Tensor:
        """The clean estimate (P, N, D) of the probe's latents, noised to time t."""
        r = self.recipe
        g = generator(_CPU, r.seed, "probe-noise", round(t * 1_000_000))
        eps = torch.randn(z.shape, generator=g).to(z.device)
        times = torch.full((len(z),), t, device=z.device)
        z_t = r.interpolant.mix(z, eps, times)
        out = net.denoise(z_t, times, label)
        return r.interpolant.estimate(out, z_t, times, r.predicts).x0

    def samples(self, net: Backbone) -> tuple[Tensor, Tensor]:
        """A sheet of samples, (rows * classes, C, H, W) in [-1, 1], with fixed noise; labels."""
        r = self.recipe
        classes = max(1, min(r.preview.classes, r.data.image.classes))
        label = torch.arange(classes).repeat(r.preview.rows)
        with in_use(net, self.calibration) as ready:
            return Model(r, ready).sample(label, seed=r.seed), label

    @torch.no_grad()
    def reconstructions(self, net: Backbone, count: int) -> Tensor:
        """Probe images, each followed by its reconstruction, (2 count, C, H, W)."""
        x = self.probe.x[:count]
        with in_use(net, self.calibration) as ready:
            x_hat = ready.decode(ready.encode(x))
        return torch.stack([x, x_hat], dim=1).flatten(0, 1)


def chosen_diagnostics(host: Host, recipe: Recipe) -> Sequence[Diagnostic]:
    """The recipe's diagnostics; without any, all that are registered, with their defaults."""
    if recipe.diagnostics is not None:
        return recipe.diagnostics
    found: list[Diagnostic] = []
    for part in host.registries["diagnostics"]:
        try:
            made = part.cls()
        except TypeError:
            continue  # it has options without defaults: a recipe must name it
        assert isinstance(made, Diagnostic)
        found.append(made)
    return found


def figures_line(figures: Mapping[str, float]) -> str:
    """The figures that belong on the progress line."""
    shown = {"rank": "rank {:.2f}", "latent_std": "std {:.2f}", "psnr": "psnr {:.1f}"}
    return "  ".join(text.format(figures[k]) for k, text in shown.items() if k in figures)
