"""A check for part authors fails on a part that breaks its contract, and says what to change."""

from __future__ import annotations

import attrs
import e2ediff_testing as testing
import pytest
import torch
from e2ediff_testing.tiny import _Tiny

from e2ediff.backbone import Decode, Denoise, Encode
from e2ediff.data import DataSource
from e2ediff.denoiser import Denoiser
from e2ediff.figure import Figure
from e2ediff.nn.attention import sdpa
from e2ediff.objective import Terms
from e2ediff.parts.backbones import ViT, ViTConfig
from e2ediff.parts.diagnostics.latent_health import LatentHealth
from e2ediff.parts.guidance import ClassifierFree
from e2ediff.parts.interpolants import Linear
from e2ediff.parts.metrics import FID
from e2ediff.parts.objectives import Coupled, Detached, TwoStage
from e2ediff.parts.optimizers.scheduled import SGD
from e2ediff.parts.regularizers import VarianceExpansion
from e2ediff.parts.samplers import Euler
from e2ediff.parts.sources import Synthetic
from e2ediff.parts.time_samplers import Uniform

WRONG = []


def wrong(check, message):
    def keep(cls):
        WRONG.append(pytest.param(check, cls, message, id=cls.__name__))
        return cls

    return keep


@wrong(testing.check_interpolant, "alpha_dot is off autograd's derivative")
class WrongSlope(Linear):
    def alpha_dot(self, t):
        return 2 * torch.ones_like(t)


@wrong(testing.check_interpolant, r"alpha, sigma at t = 1 are")
class NeverClean(Linear):
    def sigma(self, t):
        return 1.1 - t


@wrong(testing.check_interpolant, "return what t is")
class Single(Linear):
    def sigma_dot(self, t):
        return -torch.ones(t.shape)


@wrong(testing.check_times, "global generator")
class GlobalTimes(Uniform):
    def draw(self, n, generator, device):
        return torch.rand(n).clamp(1e-3, 1 - 1e-3)


@wrong(testing.check_times, "must not fall")
class Falling(Uniform):
    def quantile(self, u):
        return 1 - u


@wrong(testing.check_times, "keep MARGIN")
class ToTheEnds(Uniform):
    def draw(self, n, generator, device):
        return torch.rand(n, generator=generator).round()


@wrong(testing.check_objective, "global generator")
class GlobalNoise(Coupled):
    def terms(self, nets, batch, draw, phase):
        torch.rand(1)
        return super().terms(nets, batch, draw, phase)


@wrong(testing.check_objective, "not repeatable")
class Remembers(Coupled):
    seen = [0]  # noqa: RUF012 - the mistake under test

    def terms(self, nets, batch, draw, phase):
        self.seen[0] += 1
        terms = super().terms(nets, batch, draw, phase)
        losses = {k: v + self.seen[0] for k, v in terms.losses.items()}
        return attrs.evolve(terms, losses=losses)


@wrong(testing.check_objective, r"loss 'a' is \(6, 4, 6\)")
class NoMean(Coupled):
    def terms(self, nets, batch, draw, phase):
        z = nets.online.encode(batch.x)
        return Terms({"a": z}, {"a": 1.0}, z)


@wrong(testing.check_objective, "give every loss a weight")
class NoWeight(Coupled):
    def terms(self, nets, batch, draw, phase):
        return attrs.evolve(super().terms(nets, batch, draw, phase), weights={})


@wrong(testing.check_objective, "no gradient in phase 'joint'")
class AllStopped(Coupled):
    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        return attrs.evolve(terms, losses={k: v.detach() for k, v in terms.losses.items()})


@wrong(testing.check_objective, "changed x")
class WritesImages(Coupled):
    def terms(self, nets, batch, draw, phase):
        batch.x.zero_()
        return super().terms(nets, batch, draw, phase)


@wrong(testing.check_objective, "is no part of")
class Beyond(Coupled):
    def span(self, phase):
        return (0.5, 1.5)


@wrong(testing.check_objective, r"16 x 32 \(height x width\) raise .*use the shapes of batch\.x")
class Transposes(Coupled):
    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        losses = {**terms.losses, "symmetry": (batch.x - batch.x.mT).abs().mean()}
        return attrs.evolve(terms, losses=losses, weights={**terms.weights, "symmetry": 0.1})


def _with_one_trunk(objective):
    """All weights are shared, so that only latents tell what a loss reaches."""
    testing.check_objective(
        objective, ViTConfig(width=16, depth=1, heads=2, patch=8, latent_dim=4)
    )


@wrong(_with_one_trunk, r"loss 'denoising' reaches the latents, yet stops\(\) declares")
class EncodesAgain(Detached):
    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        losses = Coupled().terms(nets, batch, draw, phase).losses
        return Terms({**terms.losses, "denoising": losses["denoising"]}, terms.weights, terms.z)


@wrong(testing.check_regularizer, "std 0.0 is not finite")
class Logarithm(VarianceExpansion):
    def loss(self, z, draw):
        return -z.var(dim=0).log().mean()


@wrong(testing.check_regularizer, "not repeatable")
class OwnDirections(VarianceExpansion):
    def loss(self, z, draw):
        g = torch.Generator()
        g.seed()
        return (z @ torch.randn(z.shape[-1], generator=g)).square().mean()


@wrong(testing.check_regularizer, "no gradient reaches the latents")
class Stopped(VarianceExpansion):
    def loss(self, z, draw):
        return super().loss(z.detach(), draw)


@wrong(testing.check_sampler, "off by > 0.001")
class StopsEarly(Euler):
    def sample(self, f, start, condition, noise):
        return self.integrate(f, start, self.grid()[:-2], condition, noise)


@wrong(testing.check_sampler, "is sampled as")
class HalfSteps(Euler):
    def step(self, f, z, t, s, condition, noise):
        return z + (s - t) / 2 * f(z, t, condition).v


@wrong(testing.check_sampler, "global generator")
class GlobalKicks(Euler):
    def step(self, f, z, t, s, condition, noise):
        return z + (s - t) * f(z, t, condition).v + 1e-3 * torch.randn_like(z)


@wrong(testing.check_optimizer, "leaves")
class Growing(SGD):
    def factor(self, images, total):
        return 1 + images / total


@wrong(testing.check_optimizer, "exactly once")
class Forgets(SGD):
    def build(self, named):
        return super().build(named[:1])


@wrong(testing.check_optimizer, "downhill|did not lower")
class Uphill(SGD):
    def build(self, named):
        return torch.optim.SGD([p for _, p in named], lr=0.01, maximize=True)


@attrs.frozen(eq=False)
class _Mixed:
    x0: torch.Tensor
    eps: torch.Tensor
    v: torch.Tensor
    score: torch.Tensor


class _Inconsistent(Denoiser):
    def __init__(self, inner):
        self.inner = inner

    @property
    def path(self):
        return self.inner.path

    def __call__(self, z_t, t, condition):
        found = self.inner(z_t, t, condition)
        other = self.path.estimate(torch.zeros_like(z_t), z_t, t, "x0")
        return _Mixed(x0=other.x0, eps=found.eps, v=found.v, score=found.score)


@wrong(testing.check_guidance, "use path.estimate")
class OnlyX0(ClassifierFree):
    def wrap(self, inner):
        return _Inconsistent(inner)


@wrong(testing.check_guidance, "return True from `asks_null`")
class NullUnsaid(ClassifierFree):
    @property
    def asks_null(self):
        return False


class _Fickle(DataSource):
    def __len__(self):
        return 8

    def read(self, indices):
        n = len(indices)
        x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 32, 32)
        return x, torch.zeros(n, dtype=torch.long)


@wrong(testing.check_source, "read by index alone")
class Positional(Synthetic):
    def open(self, *, held_out=False):
        return _Fickle()


@wrong(testing.check_source, r"`image` says \(4, 1, 32, 32\)")
class Colourful(Synthetic):
    @property
    def image(self):
        return attrs.evolve(super().image, channels=1)


@wrong(testing.check_source, "movable and harmless name options; 'folder' is none")
class NoSuchOption(Synthetic):
    movable = ("folder", "count")


@wrong(testing.check_source, "'count' is movable and harmless; leave it in one of them")
class MovableAndHarmless(Synthetic):
    movable = harmless = ("count",)


@wrong(testing.check_metric, "better is 'less'; give 'low' or 'high'")
class Sideways(FID):
    better = "less"


@wrong(testing.check_diagnostic, "finite floats")
class LogVariance(LatentHealth):
    def measure(self, probe):
        return {"log_variance": float(probe.z.var().log())}


@wrong(testing.check_diagnostic, "written to")
class Centres(LatentHealth):
    def measure(self, probe):
        probe.z.sub_(probe.z.mean() - 1)
        return {}


@wrong(testing.check_diagnostic, "declares 'ranks', which measure\\(\\) does not give")
class Misspelt(LatentHealth):
    figures = (Figure("rank"), Figure("ranks"))


@wrong(testing.check_diagnostic, "figures holds 'rank'; make it an e2ediff.figure.Figure")
class OnlyNames(LatentHealth):
    figures = ("rank",)


@wrong(testing.check_backbone, "does not fit")
class Indivisible(ViTConfig):
    def __init__(self):
        super().__init__(width=16, depth=1, heads=3, patch=7, latent_dim=4)


class _Dropping(_Tiny):
    def denoise(self, z_t, t, condition):
        return super().denoise(z_t, t, condition)

    def outputs(self, *passes):
        found = super().outputs(*passes)
        return [attrs.evolve(o, value=torch.dropout(o.value, 0.5, train=True)) for o in found]


@wrong(testing.check_backbone, "global generator")
class Dropping(testing.TinyBackbone):
    def build(self, image):
        return _Dropping(self, image)


class _NoRaw(_Tiny):
    def outputs(self, *passes):
        return [attrs.evolve(o, raw=None) for o in super().outputs(*passes)]


@wrong(testing.check_backbone, r"fill Output\.raw")
class NoRaw(testing.TinyBackbone):
    def __init__(self):
        super().__init__(latent_norm="batch")

    def build(self, image):
        return _NoRaw(self, image)


class _Ignoring(_Tiny):
    def accept_image(self, p):
        pass


@wrong(testing.check_backbone, "denoises_pixels is False, and x_t is not refused; call self.acc")
class Ignoring(testing.TinyBackbone):
    def build(self, image):
        return _Ignoring(self, image)


class _Deaf(_Tiny):
    denoises_pixels = True


@wrong(testing.check_backbone, "denoises_pixels is True, yet x_t or t changes nothing")
class Deaf(testing.TinyBackbone):
    def build(self, image):
        return _Deaf(self, image)


class _NotApart(ViT):
    @property
    def decoder_apart(self):
        return True

    @decoder_apart.setter
    def decoder_apart(self, value):
        pass


@wrong(testing.check_backbone, "decoder_apart is True, yet decode shares .*trunks")
class NotApart(ViTConfig):
    def __init__(self):
        super().__init__(width=16, depth=1, heads=2, patch=4, latent_dim=4)

    def build(self, image):
        return _NotApart(self, image)


class _OneKernel(ViT):
    def prepare(self, device, dtype):
        def attend(q, k, v):
            if q.dtype != dtype:
                raise RuntimeError("no kernel")
            return sdpa(q, k, v)

        for block in self.blocks():
            block.attention.attend = attend
        return {}


@wrong(testing.check_backbone, "asked in float32, Encode raises .*no kernel.*both types")
class OneKernel(ViTConfig):
    def __init__(self):
        super().__init__(width=16, depth=1, heads=2, patch=4, latent_dim=4)

    def build(self, image):
        return _OneKernel(self, image)


@wrong(
    testing.check_backbone, r"16 x 32 \(height x width\) raise .*use image.height and image.wid"
)
class Square(ViTConfig):
    def __init__(self):
        super().__init__(width=16, depth=1, heads=2, patch=4, latent_dim=4)

    def grid(self, image):
        rows = image.height // self.patch
        return rows, rows


@wrong(testing.check_backbone, r"16 x 32 \(height x width\) are decoded to \(2, 3, 32, 16\)")
class Swapped(Square):
    def grid(self, image):
        return super(Square, self).grid(image)[::-1]


class _Cast(_Tiny):
    def prepare(self, device, dtype):
        for p in self.parameters():
            p.data = p.data.to(dtype).to(p.dtype)
        return {}


@wrong(testing.check_backbone, "asked in float32, Encode has another value")
class Cast(testing.TinyBackbone):
    def build(self, image):
        return _Cast(self, image)


class _Blind(_Tiny):
    def __init__(self, config, image):
        super().__init__(config, image)
        self.decodes_while_denoising = True


@wrong(testing.check_backbone, r"a denoise pass has no image; fill Output\.image")
class Blind(testing.TinyBackbone):
    def build(self, image):
        return _Blind(self, image)


class _Undeclared(_Tiny):
    def _one(self, p):
        out = super()._one(p)
        x = torch.zeros(len(out.value), 3, 16, 16)
        return attrs.evolve(out, image=x) if isinstance(p, Denoise) else out


@wrong(testing.check_backbone, "set decodes_while_denoising = True")
class Undeclared(testing.TinyBackbone):
    def build(self, image):
        return _Undeclared(self, image)


class _AllTeach(_Tiny):
    """Encodes the decoded image of the noised latent, in a pass that ignores `encoder_learns`."""

    def __init__(self, config, image):
        super().__init__(config, image)
        self.decodes_while_denoising = True
        self.denoiser_apart = self.decoder_apart = False

    def _one(self, p):
        if not isinstance(p, Denoise):
            return super()._one(p)
        self.accept_times(p)
        x = super()._one(Decode(z=p.z_t)).value
        return attrs.evolve(super()._one(Encode(x=x, taps=p.taps)), image=x, raw=None)


@wrong(testing.check_backbone, "gets a gradient from rows outside encoder_learns")
class AllTeach(testing.TinyBackbone):
    def build(self, image):
        return _AllTeach(self, image)


class _Unheeding(_Tiny):
    def accept_times(self, p):
        super().accept_times(attrs.evolve(p, encoder_learns=None))


@wrong(testing.check_backbone, "encoder_learns is not refused")
class Unheeding(testing.TinyBackbone):
    def build(self, image):
        return _Unheeding(self, image)


@pytest.mark.parametrize(("check", "part", "message"), WRONG)
def test_a_check_refuses_a_broken_part_and_says_why(check, part, message) -> None:
    with pytest.raises(AssertionError, match=message):
        check(part())


def test_an_objective_that_needs_another_backbone_says_so() -> None:
    @attrs.frozen(kw_only=True)
    class Shared(testing.TinyBackbone):
        def build(self, image):
            net = super().build(image)
            net.denoiser_apart = False
            return net

    with pytest.raises(AssertionError, match=r"does not fit .*Shared.*denoiser_apart"):
        testing.check_objective(TwoStage(), Shared())
