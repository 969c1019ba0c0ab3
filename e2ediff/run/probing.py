"""The fixed probe and the preview sheet: what is looked at while a run goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone, Encode
from e2ediff.data import Batch, DataSource
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.errors import DivergedError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.run.draws import draw_for
from e2ediff.run.ema import in_use
from e2ediff.run.generate import Model
from e2ediff.run.loader import fixed_images
from e2ediff.run.seeds import generator
from e2ediff.run.step import Step

_CPU = torch.device("cpu")
_GRADIENT_IMAGES = 16  # a forward and a backward pass for each term: more would cost percents


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
    def measure(self, step: Step, phases: Sequence[str]) -> dict[str, float]:
        """All diagnostics, on the target network's weights; no weight or gradient is touched.

        Args:
            step: The networks and how a training step computes with them.
            phases: Phases of the objective whose losses' gradients are looked at.

        Raises:
            DivergedError: What the networks make of the probe is not finite.
        """
        x, label, nets = self.probe.x, self.probe.label, step.nets
        asked = set(chain.from_iterable(d.asks for d in self.diagnostics))
        z_online = None
        if "z_online" in asked:
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
                path=self.recipe.interpolant,
                gradients=self.gradients(step, phases) if "gradients" in asked else {},
            )
        seen = {"x_hat": probe.x_hat, "z": probe.z, "raw": probe.raw}
        seen |= {} if z_online is None else {"z_online": z_online}
        seen |= {f"denoised at t={time:g}": z for time, z in probe.denoised.items()}
        seen |= {f"gradient of {name}": g for name, g in probe.gradients.items()}
        bad = [name for name, value in seen.items() if not torch.isfinite(value).all()]
        if bad:
            raise DivergedError(f"{', '.join(bad)} of the probe images: not finite.")
        figures: dict[str, float] = {}
        for diagnostic in self.diagnostics:
            figures.update(diagnostic.measure(probe))
        return figures

    def gradients(self, step: Step, phases: Sequence[str]) -> dict[str, Tensor]:
        """Gradient (G, N, D) of every weighted loss with respect to the online latents.

        As in a training step, on the first probe images, with a draw that never changes.
        """
        part = Batch(x=self.probe.x[:_GRADIENT_IMAGES], label=self.probe.label[:_GRADIENT_IMAGES])
        found: dict[str, Tensor] = {}
        for phase in phases:
            with torch.enable_grad():
                terms = step(part, draw_for(self.recipe, part.label, "probe-draw"), phase)
                for name, loss in terms.losses.items():
                    weighted = terms.weights[name] * loss
                    grad = None
                    if terms.z.requires_grad and weighted.requires_grad and terms.weights[name]:
                        (grad,) = torch.autograd.grad(
                            weighted, terms.z, retain_graph=True, allow_unused=True
                        )
                    found[name] = torch.zeros_like(terms.z) if grad is None else grad.detach()
        return found

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
    """The recipe's diagnostics; without any, all that are registered, with their defaults.

    Those of a plugin are when the recipe requires the plugin or names a part of it.
    """
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
