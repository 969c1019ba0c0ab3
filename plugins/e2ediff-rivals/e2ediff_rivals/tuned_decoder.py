"""A last phase in which the decoder alone learns, from latents that the denoiser made.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from typing_extensions import override

from e2ediff.backbone import Backbone, Denoise
from e2ediff.condition import Condition
from e2ediff.data import Batch
from e2ediff.interpolant import Interpolant, spread
from e2ediff.losses import AutoencoderObjective
from e2ediff.objective import Draw, Nets, Objective, Terms
from e2ediff_rivals.wrapping import Around, inner_problems

_DECODER = "decoder"
_OWN = "decoder_"  # before the names of the last phase's fixed networks
_LAST = 1 - 2**-24  # the largest float32 below 1, as progress is below 1


@attrs.frozen(kw_only=True)
class TunedDecoder(Around, AutoencoderObjective):
    """Another objective, and then its decoder alone, on latents that the denoiser generated.

        z_t = alpha z + sigma eps,  t ~ U[`t_min`, 1]
        z'  = z_t followed from t to 1 by the denoiser, in `steps` steps
        loss = reconstruction(decode(z'), x)

    A decoder learns from encoded latents and is used on sampled ones, which are off by what the
    denoiser cannot know. Followed from a late time, a sampled latent still belongs to its image,
    so that the decoder has an image to learn it from. Encoder and denoiser are trained no more;
    their averages still approach them, which is most of the way if the phase is as long as the
    average's memory. The decoder learns from the trained ones' latents.

    The other objective's phases, schedules and `progress` end where the last phase begins; what it
    draws and loses there is what it draws and loses alone. The last phase is called `decoder`. It
    has an optimizer of its own, whose schedule begins anew: the recipe's, unless there is another
    in `optimizers: {decoder: ...}`. A recipe's warm-up is counted in images, so give the phase one
    without where it is as long as the phase.

    Options:
        of: The objective.
        share: The share of training that is the last phase.
        t_min: The earliest time from which latents are generated anew; the earlier, the more
            they differ from the image's own.
        steps: Network calls for each of them, at even times from t on, without gradient.
        reconstruction: Compares decoded images with the originals.

    Needs a decoder with weights of its own; one that denoises pixels is trained through all of
    its steps.

    Source: SAD (torpedo2003/SAD), whose idea alone is taken, as neither its code nor its text
    could be read: to tune only the decoder, on generated latents. Ours: everything else, the way
    in which latents are generated, their times, no guidance, the loss and all defaults.
    Compared with the objective alone in docs/results/rivals.md.
    """

    trial: ClassVar[tuple[str, ...]] = ("objective.of=detached", "backbone.trunks=decoder_apart")

    of: Objective
    share: float = attrs.field(default=0.1, validator=[validators.gt(0), validators.lt(1)])
    t_min: float = attrs.field(default=0.5, validator=[validators.ge(0), validators.lt(1)])
    steps: int = attrs.field(default=4, validator=validators.ge(1))

    @property
    def phases(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the phases of the other objective, and the decoder's after them."""
        return (*self.of.phases, _DECODER)

    @property
    def own_optimizers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the other objective's."""
        return self.of.own_optimizers

    def span(self, phase: str) -> tuple[float, float]:
        """Return the other objective's span in what is left to it, and then the decoder's."""
        rest = 1 - self.share
        if phase == _DECODER:
            return (rest, 1.0)
        start, end = self.of.span(phase)
        return (start * rest, end * rest)

    def trains(self, phase: str, name: str) -> bool:
        """Train in the last phase the network, of which only the decoder gets gradients."""
        return name.startswith("online.") if phase == _DECODER else self.of.trains(phase, name)

    def stops(self, phase: str) -> Collection[str]:
        """Return what the other objective stops; the last phase leaves the encoder alone."""
        return ("reconstruction",) if phase == _DECODER else self.of.stops(phase)

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the other objective's losses, or the reconstruction from generated latents."""
        if phase != _DECODER:
            own = (draw.progress / (1 - self.share)).clamp(max=_LAST)
            return self.of.terms(nets, batch, attrs.evolve(draw, progress=own), phase)
        with torch.no_grad():  # no graph of an encoder and a denoiser that stay as they are
            z = nets.online.encode(batch.x)  # (B, N, D)
            t = self.t_min + (1 - self.t_min) * draw.uniform(len(z))
            z_t = nets.path.mix(z, draw.noise(z), t)
            generated = follow(
                nets, z_t, t, batch.condition, self.steps, averages=self.of.trains_averages,
                until=self.of.trained_until(nets.path),
            )  # fmt: skip
        x_hat = nets.online.decode(generated)
        fixed = {k.removeprefix(_OWN): net for k, net in nets.frozen.items() if k.startswith(_OWN)}
        loss = self.reconstruction(x_hat, batch.x, nn.ModuleDict(fixed))
        info = {"generated_error": (generated - z).square().mean()}
        return Terms({"reconstruction": loss}, {"reconstruction": 1.0}, z, info, x_hat)

    @override
    def frozen(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the other objective's, and the perceptual network of the last phase."""
        own = {f"{_OWN}{name}": net for name, net in self.reconstruction.frozen().items()}
        return nn.ModuleDict({**super().frozen(backbone), **own})

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """List what the other objective finds, and a decoder that shares weights."""
        found = inner_problems(self.of, nets)
        if not nets.online.latent.learned:
            what = "tuned_decoder tunes a decoder, and this backbone has none to train"
            found.insert(0, ("objective", f"{what}; choose another backbone, such as vit"))
        elif not nets.online.decoder_apart:
            what = (
                "tuned_decoder needs a decoder with weights of its own, or its last phase would "
                "change the denoiser: choose a backbone that has one, such as vit, which needs "
                "`--set backbone.trunks=decoder_apart` (or three)"
            )
            found.insert(0, ("objective", what))
        alpha = float(nets.path.alpha(torch.tensor([self.t_min])))
        if nets.predicts in ("eps", "score") and alpha < 0.005:
            what = (
                f"at t = {self.t_min:g} a noised latent holds almost nothing of the image, so "
                f"predicts: {nets.predicts} cannot determine the latent that is followed; set it "
                "to 0.01 or more, or predicts: x0 or v"
            )
            found.append(("objective.t_min", what))
        if _DECODER in self.of.phases:
            what = f"the objective inside has a phase `{_DECODER}` already; leave one out"
            found.insert(0, ("objective.of", what))
        return found


def follow(
    nets: Nets,
    z_t: Tensor,
    t: Tensor,
    condition: Condition,
    steps: int,
    *,
    averages: bool = False,
    until: float = 1.0,
) -> Tensor:
    """Follow the network's ODE from z_t (B, N, D) at times (B,) to t = 1, and return the end.

    Each step mixes the clean estimate with the noise that it leaves, at the step's end, which on
    the straight path is Euler's; the last one is the clean estimate itself. With `averages` the
    network is asked for average velocities of the steps. A network that is trained up to the time
    `until` alone is asked there for the clean estimate of later latents.

    Source: DDIM (Song et al. 2020, arXiv 2010.02502), eq. 12 with sigma = 0.
    """
    first = t
    for i in range(1, steps + 1):
        end = first + (1 - first) * (i / steps)
        r = end if averages else None
        asked, at = (z_t, t) if until == 1 else _held(nets.path, z_t, t, until)
        (out,) = nets.online.run(Denoise(z_t=asked, t=at, condition=condition, r=r))
        guess = nets.path.estimate(out, asked, at, nets.predicts)
        if until < 1:
            guess = nets.path.estimate(guess.x0, z_t, t, "x0")
        if i == steps:
            break
        z_t, t = nets.path.mix(guess.x0, guess.eps, end), end
    return guess.x0


def _held(path: Interpolant, z_t: Tensor, t: Tensor, until: float) -> tuple[Tensor, Tensor]:
    """Return latents and times (B,), of which those after `until` are scaled to it."""
    at = t.clamp(max=until)
    scale = torch.where(t > until, path.alpha(at) / path.alpha(t), torch.ones_like(t))
    return spread(scale, z_t) * z_t, at
