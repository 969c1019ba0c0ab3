"""Measure diagnostics on fixed probe images, and make the preview sheet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.condition import Condition, concatenate
from e2ediff.data import Batch, DataSource
from e2ediff.denoiser import Plain
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.errors import DivergedError
from e2ediff.figure import Figure, find
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.host.registry import options
from e2ediff.loading.batches import fixed_images
from e2ediff.model.calibration import at_rest, normalised, own_latents
from e2ediff.model.inference import Model
from e2ediff.monitor.isolation import Isolated, declared, numbers
from e2ediff.seeds import generator
from e2ediff.step.draws import draw_for
from e2ediff.step.step import Step

_CPU = torch.device("cpu")
GRADIENT_IMAGES = 16
"""Of the probe; a forward pass and a backward pass for each term: more would cost percents."""


@attrs.frozen(eq=False)
class Observer:
    """Fixed images, noise and conditions on which a run is diagnosed.

    A diagnostic that raises is switched off, and `isolated` keeps the reason.
    `figures` are the declarations of the diagnostics.
    """

    recipe: Recipe
    diagnostics: Sequence[Diagnostic]
    probe: Batch
    calibration: Tensor
    isolated: Isolated
    figures: Sequence[Figure]

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        diagnostics: Sequence[Diagnostic],
        training: DataSource,
        held_out: DataSource,
        device: torch.device,
        isolated: Isolated | None = None,
    ) -> Observer:
        """Read probe images from the held-out set, calibration images from the training set.

        Images that hold NaN or infinity, as a plugin's source may give, are left out.
        """
        kind, seed = recipe.data.image.conditioning, recipe.seed
        probe = fixed_images(held_out, kind, recipe.probe.images, seed, "probe", device)
        count = recipe.probe.calibration
        calibration = fixed_images(training, kind, count, seed, "calibration", device)
        isolated = isolated or Isolated()
        probe = _finite(probe, "probe", isolated)
        calibration = _finite(calibration, "calibration", isolated)
        figures = declared(diagnostics, isolated)
        return cls(recipe, diagnostics, probe, calibration.x, isolated, figures)

    @torch.no_grad()
    def measure(
        self, step: Step, phases: Sequence[str], *, survey: bool, progress: float = 0.0
    ) -> dict[str, float]:
        """Measure diagnostics on the target network; no weight or gradient changes.

        A few images also pass through the online network, as a slow average shows collapse late.
        Both compute in float32 in any run: the rounding of bfloat16 would look like modes of
        latents that have lost theirs.

        Args:
            step: The networks, and how a training step uses them.
            phases: Phases of the objective whose losses' gradients are measured.
            survey: Measure the costly diagnostics too.
            progress: Completed fraction of training.

        Raises:
            DivergedError: Outputs of the networks on the probe are not finite.
        """
        chosen = [d for d in self.diagnostics if survey or not d.asks]
        # Include disabled diagnostics, which other processes may still measure, so that all
        # processes take part in the same collectives.
        asked = set(chain.from_iterable(d.asks for d in chosen))
        first = self.recipe.probe.glance
        with at_rest(step.nets.target) as net:
            many = self._encoded(net, len(self.probe.x) if "many" in asked else first)
            few = _first(net, many, first)
            costly = self._costly(net, asked, few, step, phases, progress)
        trained = self._trained(step)
        seen = {"z": many.z, "raw": many.raw, "z_online": trained, "x_hat": costly.get("x_hat")}
        for title, key in (("denoised at t=", "denoised"), ("gradient of ", "gradients")):
            seen |= {f"{title}{name}": value for name, value in costly.get(key, {}).items()}
        bad = [k for k, v in seen.items() if v is not None and not torch.isfinite(v).all()]
        if bad:
            raise DivergedError(f"{', '.join(bad)} of the probe images: not finite.")
        figures: dict[str, float] = {}
        for diagnostic in chosen:
            own = {k: v for k, v in costly.items() if k in diagnostic.asks}
            probe = many if "many" in diagnostic.asks else few
            figures |= self._ask(diagnostic, attrs.evolve(probe, z_online=trained, **own))
        return figures

    def _ask(self, diagnostic: Diagnostic, probe: Probe) -> dict[str, float]:
        """Return the figures of one diagnostic; empty if it fails."""
        return self.isolated.call(
            "diagnostic", diagnostic, lambda: numbers(diagnostic.measure(probe)), {}
        )

    def _encoded(self, net: Backbone, count: int) -> Probe:
        """Encode the first `count` images."""
        part, r, learned = self.probe.rows(slice(count)), self.recipe, net.latent.learned
        z, raw = own_latents(net, part.x)
        path = r.interpolant
        return Probe(part.x, part.condition, z, raw, r.predicts, path, learned=learned)

    def _costly(
        self,
        net: Backbone,
        asked: Collection[str],
        few: Probe,
        step: Step,
        phases: Sequence[str],
        progress: float,
    ) -> dict[str, Any]:
        """Compute the requested fields of a probe, for the images of `few`."""
        found: dict[str, Any] = {}
        if "x_hat" in asked:
            found["x_hat"] = net.decode(few.z)
        if "denoised" in asked:
            times = self.recipe.probe.times
            found["denoised"] = {t: self._denoise(net, few.z, few.condition, t) for t in times}
        if "gradients" in asked:
            found["gradients"] = self.gradients(step, phases, progress)
        return found

    def _trained(self, step: Step) -> Tensor | None:
        """Return latents (O, N, D) of the first images by the online network; None if frozen."""
        if not step.nets.online.latent.learned:
            return None
        with at_rest(step.nets.online) as online:
            return own_latents(online, self.probe.x[: self.recipe.probe.trained])[0]

    def gradients(
        self, step: Step, phases: Sequence[str], progress: float = 0.0
    ) -> dict[str, Tensor]:
        """Return the gradient (K, N, D) of every weighted loss at the online latents.

        Computed as in a training step, on the first probe images, with fixed randomness.
        """
        part = self.probe.rows(slice(GRADIENT_IMAGES))
        found: dict[str, Tensor] = {}
        for phase in phases:
            with torch.enable_grad():
                draw = draw_for(self.recipe, part.condition, "probe-draw", progress=progress)
                terms = step.terms(part, draw, phase)
                for name, loss in terms.losses.items():
                    weighted = terms.weights[name] * loss
                    grad = None
                    if terms.z.requires_grad and weighted.requires_grad and terms.counts(name):
                        (grad,) = torch.autograd.grad(
                            weighted, terms.z, retain_graph=True, allow_unused=True
                        )
                    found[name] = torch.zeros_like(terms.z) if grad is None else grad.detach()
        return found

    def verdict(self, figures: Mapping[str, float]) -> list[str]:
        """Return the signs of collapse that the diagnostics find; empty for healthy latents."""
        signs: list[str] = []
        for d in self.diagnostics:
            said = partial(lambda d: [str(sign) for sign in d.verdict(figures)], d)
            signs += self.isolated.call("diagnostic", d, said, [])
        return signs

    def _denoise(self, net: Backbone, z: Tensor, condition: Condition, t: float) -> Tensor:
        """Return the clean estimate (P, N, D) of the probe's latents, noised to time t.

        As in sampling, a network is asked no later than it was trained.
        """
        r = self.recipe
        g = generator(_CPU, r.seed, "probe-noise", round(t * 1_000_000))
        eps = torch.randn(z.shape, generator=g).to(z.device)
        times = torch.full((len(z),), t, device=z.device)
        z_t = r.interpolant.mix(z, eps, times)
        until = r.objective.trained_until(r.interpolant)
        plain = Plain(net, r.interpolant, r.predicts, averages=False, until=until)
        return plain(z_t, t, condition).x0

    def samples(self, net: Backbone) -> tuple[Tensor, Condition]:
        """Sample a sheet (rows * columns, C, H, W) in [-1, 1] with fixed noise; also conditions.

        Each column has one condition: a class or, for other kinds, that of a probe image. The
        network, which is `in_use`, computes in the run's precision.
        """
        r, columns = self.recipe, preview_columns(self.recipe)
        each = r.data.image.conditioning.in_turn(columns, self.probe.condition)
        index = torch.arange(columns, device=each.device)
        condition = each.rows(index.repeat(r.preview.rows))
        # Guiding networks of other runs are for finished models, and may not exist yet.
        guidance = None if r.guidance is None or r.guidance.references else r.guidance
        model = Model(r, net, guidance, rows=len(condition), precision=r.precision)
        return model.sample(condition, seed=r.seed), condition

    @torch.no_grad()
    def reconstructions(self, net: Backbone, count: int) -> Tensor:
        """Return probe images, each followed by its reconstruction, (2 count, C, H, W).

        The network is `in_use`, and in the run's precision, as steps and samples are.
        """
        x = self.probe.x[:count]
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            x_hat = net.decode(net.encode(x))
        return torch.stack([x, x_hat], dim=1).flatten(0, 1)


def _first(net: Backbone, many: Probe, count: int) -> Probe:
    """Return the first images of a probe, normalised by their own statistics, which are kept."""
    raw = many.raw[:count]
    z = normalised(net, raw) if net.latent_norm.has_statistics else many.z[:count]
    first = many.condition.rows(slice(count))
    return attrs.evolve(many, x=many.x[:count], condition=first, z=z, raw=raw)


def preview_columns(recipe: Recipe) -> int:
    """Return the number of conditions of a preview: `preview.classes`, or fewer if need be."""
    kinds = recipe.data.image.conditioning.kinds
    return recipe.preview.classes if kinds is None else max(1, min(recipe.preview.classes, kinds))


def chosen_diagnostics(
    host: Host, recipe: Recipe, isolated: Isolated | None = None
) -> Sequence[Diagnostic]:
    """Return the recipe's diagnostics; by default all registered ones, with default options.

    A plugin counts if the recipe requires it or names a part of it.
    A diagnostic that refuses its own defaults is left out, and `isolated` keeps the reason.
    """
    isolated = isolated or Isolated()
    if recipe.diagnostics is not None:
        return recipe.diagnostics
    found: list[Diagnostic] = []
    for part in host.parts("diagnostics"):
        if any(option.required for option in options(part.cls).values()):
            continue  # it has required options, so a recipe must name it
        made = isolated.call("diagnostic", part.cls, part.cls, None)
        if made is not None:
            assert isinstance(made, Diagnostic)
            found.append(made)
    return found


def figures_line(figures: Mapping[str, float], declared: Sequence[Figure]) -> str:
    """Format the figures that are declared for the progress line."""
    shown = [(find(name, declared), value) for name, value in figures.items()]
    return "  ".join(
        f"{figure.short} {value:{figure.form}}"
        for figure, value in shown
        if figure is not None and "line" in figure.shown_on
    )


def _finite(images: Batch, name: str, isolated: Isolated) -> Batch:
    """Leave out images that are not finite, and report that; all stay if none is finite."""
    good = images.x.flatten(1).isfinite().all(dim=1).nonzero()[:, 0].tolist()
    if len(good) in (0, len(images.x)):
        return images
    left, rows = len(images.x) - len(good), [slice(i, i + 1) for i in good]
    text = f"{left} of {len(images.x)} {name} images hold values that are not finite; left out"
    isolated.failed.append(("images_left_out", text))
    return Batch(images.x[good], concatenate([images.condition.rows(row) for row in rows]))
