"""Checks for authors of parts: each raises AssertionError with what to change.

    from e2ediff.testing import check_interpolant
    def test_it_keeps_the_contract(): check_interpolant(MyPath())

Shapes: B batch, C H W image, N latent tokens, D latent channels, W width.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone, BackboneConfig, Decode, Denoise, Encode, LatentSpec, Output
from e2ediff.data import Batch, ImageSpec, SourceConfig
from e2ediff.denoiser import Denoiser, Guidance
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.interpolant import Estimate, Interpolant, Kind, spread
from e2ediff.latent import LatentNorm, NormKind
from e2ediff.objective import Draw, Nets, Objective
from e2ediff.optimizer import OptimizerConfig
from e2ediff.parts.interpolants import Linear
from e2ediff.parts.times import Uniform
from e2ediff.regularizer import Regularizer
from e2ediff.sampler import Sampler
from e2ediff.times import MARGIN, TimeSampler

IMAGE = ImageSpec(3, 16, 16, 4)


@attrs.frozen(kw_only=True)
class TinyBackbone(BackboneConfig):
    """Linear maps of single patches: the smallest network with masks, features and labels."""

    patch: int = 8
    latent_dim: int = 6
    latent_norm: NormKind = "layer"

    def build(self, image: ImageSpec) -> Backbone:
        """The network."""
        return _Tiny(self, image)


class _Tiny(Backbone):
    def __init__(self, config: TinyBackbone, image: ImageSpec) -> None:
        super().__init__()
        p, dim, width = config.patch, config.latent_dim, 12
        self.image, self.depth, self.width, self.denoiser_apart = image, 1, width, True
        self.masks = True
        grid = (image.height // p, image.width // p)
        tokens = grid[0] * grid[1]
        self.latent = LatentSpec(tokens=tokens, dim=dim, norm=config.latent_norm, grid=grid)
        self.latent_norm = LatentNorm(config.latent_norm, tokens, dim)
        self.patches = nn.Conv2d(image.channels, width, p, p)
        self.to_latent, self.from_latent = nn.Linear(width, dim), nn.Linear(dim, width)
        self.pixels = nn.ConvTranspose2d(width, image.channels, p, p)
        self.noised, self.label = nn.Linear(dim, width), nn.Embedding(image.classes + 1, width)
        self.answer = nn.Linear(width, dim)

    def outputs(self, *passes: Encode | Decode | Denoise) -> list[Output]:
        """One by one."""
        return [self._one(p) for p in passes]

    def _one(self, p: Encode | Decode | Denoise) -> Output:
        if isinstance(p, Encode):
            h = self.patches(p.x).flatten(2).mT  # (B, N, W)
            h = h if p.mask is None else h * ~p.mask[..., None]
            y = self.to_latent(h).float()
            return Output(self.latent_norm(y), dict.fromkeys(p.taps, h), y)
        if isinstance(p, Denoise):
            h = self.noised(p.z_t) * (1 + p.t[:, None, None]) + self.label(p.label)[:, None]
            return Output(self.answer(h).float(), dict.fromkeys(p.taps, h))
        h = self.from_latent(p.z)
        y = self.pixels(h.mT.unflatten(2, self.latent.grid)).float()
        return Output(y, dict.fromkeys(p.taps, h))

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.run(Encode(x=x))[0]

    def decode(self, z: Tensor) -> Tensor:
        """(B, N, D) -> (B, C, H, W)."""
        return self.run(Decode(z=z))[0]

    def denoise(self, z_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.run(Denoise(z_t=z_t, t=t, label=label))[0]


class GaussianDenoiser(Denoiser):
    """The exact denoiser of latents from N(mean, std^2), for any label, in z_t's own type."""

    def __init__(self, path: Interpolant, mean: float = 0.0, std: float = 1.0) -> None:
        self._path, self.mean, self.std = path, mean, std

    @property
    def path(self) -> Interpolant:
        """The interpolant."""
        return self._path

    def __call__(self, z_t: Tensor, t: float, label: Tensor) -> Estimate:
        """The posterior mean, mean + a std^2 / (a^2 std^2 + s^2) (z_t - a mean)."""
        times = torch.full((len(z_t),), t, dtype=z_t.dtype, device=z_t.device)
        a, s = spread(self._path.alpha(times), z_t), spread(self._path.sigma(times), z_t)
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        return self._path.estimate(self.mean + gain * (z_t - a * self.mean), z_t, times, "x0")


def make_nets(
    backbone: BackboneConfig | None = None,
    objective: Objective | None = None,
    *,
    path: Interpolant | None = None,
    predicts: Kind = "x0",
    image: ImageSpec = IMAGE,
    device: str = "cpu",
) -> Nets:
    """Networks, always the same for the same arguments; the target starts equal."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        online = (backbone or TinyBackbone()).build(image).train()
        heads = objective.heads(online) if objective else nn.ModuleDict()
        frozen = objective.frozen(online) if objective else nn.ModuleDict()
    target = copy.deepcopy(online).requires_grad_(requires_grad=False).eval()
    target.latent_norm.train()
    return Nets(online, target, path or Linear(), predicts, heads, frozen)


def make_batch(image: ImageSpec = IMAGE, size: int = 6) -> Batch:
    """Random images in [-1, 1] and labels, always the same."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(size, image.channels, image.height, image.width, generator=g) * 2 - 1
    return Batch(x=x, label=torch.arange(size) % max(1, image.classes))


def make_draw(batch: Batch, times: TimeSampler | None = None, seed: int = 2) -> Draw:
    """A step's randomness for this batch, the same for the same seed."""
    g, times = torch.Generator().manual_seed(seed), times or Uniform()
    t = times.draw(len(batch.label), g, torch.device("cpu"))
    return Draw(t=t, label=batch.label, generator=g, times=times)


@contextlib.contextmanager
def own_randomness(who: object) -> Iterator[None]:
    """Fail if torch's global generator is touched inside."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(state, torch.get_rng_state()), (
        f"{type(who).__name__} uses torch's global generator; draw from the one it is given"
    )


def _shape(value: Tensor, shape: tuple[int, ...], what: str) -> None:
    seen = f"{tuple(value.shape)} {value.dtype}"
    assert value.shape == shape, f"{what} is {seen}, make it of shape {shape}"
    assert value.dtype == torch.float32, f"{what} is {seen}, return float32"
    assert value.isfinite().all(), f"{what} is not finite; look for a division or a logarithm"


def check_interpolant(i: Interpolant) -> None:
    """Ends, derivatives, rising signal-to-noise ratio, shapes and types."""
    name = type(i).__name__
    one, u = torch.ones(1, dtype=torch.float64), torch.linspace(0.001, 0.999, 997).double()
    ends = float(i.alpha(one)), float(i.sigma(one))
    assert math.dist(ends, (1, 0)) < 1e-12, f"{name}: alpha, sigma at t = 1 are {ends}, not (1, 0)"
    for f, dot in ((i.alpha, i.alpha_dot), (i.sigma, i.sigma_dot)):
        t = u.clone().requires_grad_()
        with own_randomness(i):
            value = f(t)
        for x in (u.float(), u):
            for kind, y in (("value", f(x)), ("derivative", dot(x))):
                seen = f"{name}: a coefficient's {kind} is {tuple(y.shape)} {y.dtype}"
                assert (y.shape, y.dtype) == (x.shape, x.dtype), f"{seen}; return what t is"
        slope = torch.zeros_like(u)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), t)
        gap = ((slope - dot(u)).abs() / (1 + slope.abs())).max()
        assert gap < 1e-6, f"{name}: {dot.__name__} is off autograd's derivative by {gap:.2g}"
        assert torch.equal(t.detach(), u), f"{name}: {f.__name__} writes into t; leave it alone"
    assert (i.logsnr(u).diff() > 0).all(), f"{name}: alpha / sigma must rise strictly with t"


def check_times(t: TimeSampler) -> None:
    """A rising quantile in [0, 1], and draws from the given generator alone."""
    name, cpu, u = type(t).__name__, torch.device("cpu"), torch.linspace(1e-4, 1 - 1e-4, 999)
    q = t.quantile(u)
    _shape(q, (999,), f"{name}: quantile(u)")
    assert ((q >= 0) & (q <= 1)).all(), f"{name}: a quantile lies outside [0, 1]"
    assert (q.diff() >= 0).all(), f"{name}: quantile must not fall as u rises"
    g, counted = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    with own_randomness(t):
        drawn = t.draw(50, g, cpu)
    _shape(drawn, (50,), f"{name}: draw(50)")
    assert MARGIN <= drawn.min() <= drawn.max() <= 1 - MARGIN, f"{name}: keep MARGIN from the ends"
    torch.rand(50, generator=counted)
    assert torch.equal(g.get_state(), counted.get_state()), f"{name}: draw n uniform numbers for n"


def check_objective(objective: Objective, backbone: BackboneConfig | None = None) -> None:
    """Scalar finite losses, fixed by nets, batch and draw; gradients only where they may go."""
    name, nets, batch = type(objective).__name__, make_nets(backbone, objective), make_batch()
    unfit = objective.problems(make_nets(backbone, objective, device="meta"))
    assert not unfit, f"{name} does not fit {backbone or 'TinyBackbone'}: {list(unfit)}; give one"
    fixed = {**nets.target.state_dict(), **nets.frozen.state_dict(), "x": batch.x}
    before = {k: v.clone() for k, v in {**fixed, **nets.online.state_dict(prefix="on.")}.items()}
    learned = {**dict(nets.online.named_parameters()), **dict(nets.heads.named_parameters())}
    for phase in objective.phases:
        start, end = objective.span(phase)
        assert 0 <= start < end <= 1, f"{name}: span({phase!r}) is no part of [0, 1]"
        with own_randomness(objective):
            terms = objective.terms(nets, batch, make_draw(batch), phase)
            again = objective.terms(nets, batch, make_draw(batch), phase)
        now = {**fixed, **nets.online.state_dict(prefix="on.")}
        wrote = [k for k, v in now.items() if not torch.equal(v, before[k])]
        assert not wrote, (
            f"{name}: terms() changed {', '.join(wrote)}; leave weights and batch alone"
        )
        assert set(terms.losses) == set(terms.weights), f"{name}: give every loss a weight"
        for key, loss in terms.losses.items():
            _shape(loss, (), f"{name}: loss {key!r}")
            assert torch.equal(loss, again.losses[key]), f"{name}: loss {key!r} is not repeatable"
        size = (len(batch.x), nets.online.latent.tokens, nets.online.latent.dim)
        _shape(terms.z, size, f"{name}: Terms.z")
        assert terms.total.requires_grad, f"{name}: no gradient in phase {phase!r}; detach less"
        found = torch.autograd.grad(terms.total, list(learned.values()), allow_unused=True)
        for key, grad in zip(learned, found, strict=True):
            assert grad is None or grad.isfinite().all(), f"{name}: gradient of {key} not finite"


def check_regularizer(r: Regularizer) -> None:
    """A repeatable scalar, finite with its gradient for healthy and for constant latents."""
    name, batch = type(r).__name__, make_batch()
    assert getattr(r, "weight", -1) >= 0, f"{name}: give it a field `weight`, at least 0"
    g = torch.Generator().manual_seed(8)
    for std in (1.0, 1e-4, 0.0):
        z = (torch.randn(6, 4, 6, generator=g) * std).requires_grad_()
        kept = z.detach().clone()
        with own_randomness(r):
            loss, again = r.loss(z, make_draw(batch)), r.loss(z, make_draw(batch))
        _shape(loss, (), f"{name}: the loss of latents of std {std}")
        assert torch.equal(loss, again), f"{name}: the loss is not repeatable"
        assert torch.equal(z, kept), f"{name}: z was written to; return a new tensor"
        assert loss.requires_grad, f"{name}: no gradient reaches the latents; detach less"
        (grad,) = torch.autograd.grad(loss, z)
        assert grad.isfinite().all(), f"{name}: the gradient at latents of std {std} is not finite"
    meta = make_nets(device="meta")
    unfit = [] if len(batch.x) < r.fewest else r.problems(meta, len(batch.x))
    assert not unfit, f"{name} does not fit TinyBackbone: {list(unfit)}; give options that do"
    z, t = torch.zeros(6, 4, 6, device="meta"), torch.zeros(6, device="meta")
    r.loss(z, Draw(t=t, label=t.long(), generator=None, times=Uniform()))  # `check` counts there


def check_backbone(config: BackboneConfig, image: ImageSpec | None = None) -> None:
    """Shapes, repeatable and independent passes, fused as single, finite gradients."""
    image = image or IMAGE
    name, batch, unfit = type(config).__name__, make_batch(image), config.problems(image)
    assert not unfit, f"{name} does not fit {image}: {list(unfit)}; give images that fit"
    net, twin = make_nets(config, image=image), make_nets(config, image=image)
    make_nets(config, image=image, device="meta")  # `check` builds there
    online, (b, n, d) = net.online, (len(batch.x), net.online.latent.tokens, net.online.latent.dim)
    same = all(map(torch.equal, online.parameters(), twin.online.parameters()))
    assert same, f"{name}: build() gave other weights for the same torch.manual_seed"
    online.prepare(torch.device("cpu"), torch.float32)
    before = copy.deepcopy(online.state_dict())
    z = torch.randn(b, n, d, generator=torch.Generator().manual_seed(4)).requires_grad_()
    x = batch.x.clone().requires_grad_()
    taps = tuple(range(1, online.depth + 1))
    t = make_draw(batch).t
    passes: list[Encode | Decode | Denoise] = [
        Encode(x=x, taps=taps),
        Decode(z=z, taps=taps),
        Denoise(z_t=z, t=t, label=batch.label, taps=taps),
        Denoise(z_t=z, t=t, label=torch.full((b,), image.null_label)),
    ]
    with own_randomness(config):
        fused, again = online.outputs(*passes), online.outputs(*passes)
    lacks = online.latent_norm.has_statistics and fused[0].raw is None
    assert not lacks, f"{name}: fill Output.raw, from which the latent norm takes its statistics"
    trained, reached = dict(online.named_parameters()), []
    for p, out, repeat in zip(passes, fused, again, strict=True):
        what = f"{name}: {type(p).__name__}'s value"
        _shape(out.value, tuple(x.shape) if isinstance(p, Decode) else (b, n, d), what)
        assert torch.equal(out.value, repeat.value), f"{what} is not repeatable; draw no numbers"
        for tap, f in out.features.items():
            assert f.shape == (b, n, online.width), f"{name}: tap {tap} is {tuple(f.shape)}"
        (alone,) = online.outputs(p)
        assert _near(alone.value, out.value), f"{what} is another when passes are fused"
        loss, inputs = alone.value.square().mean(), [x, z, *trained.values()]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads), f"{name}: gradient not finite"
        reached.append({k for k, g in zip(trained, grads[2:], strict=True) if g is not None})
    both = sorted((reached[0] | reached[1]) & (reached[2] | reached[3]))
    apart = not (online.denoiser_apart and both)
    assert apart, f"{name}: denoiser_apart is True, yet denoise shares {', '.join(both)}"
    wrote = [k for k, v in online.state_dict().items() if not torch.equal(v, before[k])]
    assert not wrote, f"{name}: a pass changed {', '.join(wrote)}"
    online.eval()
    for p, row in ((passes[0], Encode(x=x[:1])), (passes[1], Decode(z=z[:1]))):
        (whole,), (alone,) = online.outputs(p), online.outputs(row)
        same = _near(whole.value[:1], alone.value)
        assert same, f"{name}: in eval mode {type(p).__name__} of an image depends on others"


def _near(a: Tensor, b: Tensor) -> bool:
    # float32 sums in another order differ by about 1e-6 of values of unit scale
    return bool(((a - b).abs() < 1e-4).all())


def check_sampler(s: Sampler) -> None:
    """A rising grid, exact for one point, near the closed form for a Gaussian, repeatable."""
    name, grid, g = type(s).__name__, s.grid(), torch.Generator().manual_seed(5)
    ends = (len(grid), grid[0], round(grid[-1], 9))
    assert ends == (s.steps + 1, 0, 1), f"{name}: grid() is {grid}; give steps + 1, from 0 to 1"
    assert all(a < b for a, b in itertools.pairwise(grid)), f"{name}: grid() must rise"
    start, label = torch.randn(4096, 1, 2, generator=g), torch.zeros(4096, dtype=torch.long)
    kept = start.clone()

    def sample(std: float) -> Tensor:
        fresh = torch.Generator().manual_seed(6)
        f = GaussianDenoiser(Linear(), 1.0, std)
        return s.sample(f, start, label, lambda like: torch.randn(like.shape, generator=fresh))

    with own_randomness(s):
        point = sample(0.0)
    _shape(point, tuple(start.shape), f"{name}: sample()")
    assert (point - 1).abs().max() < 1e-3, f"{name}: data at 1 alone give samples off by > 0.001"
    z = sample(0.5)
    assert torch.equal(z, sample(0.5)), f"{name}: use only the noise that is handed over"
    seen = (round(float(z.mean()), 3), round(float(z.std()), 3))
    # Euler's std is off by less than 1.2 / steps here; 0.03 is the error of 4096 samples.
    near = math.dist(seen, (1, 0.5)) < 0.03 + 1.2 / s.steps
    assert near, f"{name}: N(1, 0.5^2) is sampled as mean, std = {seen}"
    assert torch.equal(start, kept), f"{name}: step() writes into z; return a new tensor"


def check_optimizer(o: OptimizerConfig) -> None:
    """Every parameter once, factors in [0, 1], a step downhill, state that is taken back."""
    name, total = type(o).__name__, 1000
    factors = [o.factor(i, total) for i in range(0, total + 1, 50)]
    assert all(0 <= f <= 1 for f in factors), f"{name}: factor() leaves [0, 1]: {factors}"
    assert o.clip >= 0, f"{name}: clip is {o.clip}; 0 leaves gradients alone"
    shapes = {"w": (3, 2), "b": (3,), "unused": (1,)}
    named = [(k, nn.Parameter(torch.ones(shape))) for k, shape in shapes.items()]
    optimizer, values = o.build(named), [p for _, p in named]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, values)), f"{name}: take every parameter exactly once"
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward([p.square().sum() for p in values[:2]])
        optimizer.step()
    assert all((p < 1).all() for p in values[:2]), f"{name}: two steps did not lower a square"
    assert values[2].item() == 1, f"{name}: leave a parameter without gradient alone"
    other = o.build([(k, nn.Parameter(p.detach().clone())) for k, p in named])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mine, theirs = (x.param_groups[0]["params"][0] for x in (optimizer, other))
    theirs.grad = mine.grad
    optimizer.step()
    other.step()
    assert torch.equal(mine, theirs), f"{name}: state_dict() must hold all of the state"


def check_guidance(g: Guidance) -> None:
    """The same path, one consistent and repeatable estimate, inputs left alone."""
    name, inner = type(g).__name__, GaussianDenoiser(Linear(), 1.0, 0.5)
    others = {reference: GaussianDenoiser(Linear(), 0.8, 0.7) for reference in g.references}
    f, label = g.given(others).wrap(inner, 4), torch.tensor([0, 1, 4])
    assert f.path is inner.path, f"{name}: the guided denoiser must keep the inner path"
    f = f.between(0.0, 0.5)
    for t in (0.01, 0.5, 0.99):
        z_t = torch.linspace(-1, 2, 12).reshape(3, 2, 2)
        kept, times = z_t.clone(), torch.full((3,), t)
        with own_randomness(g):
            e, again = f(z_t, t, label), f(z_t, t, label)
        for key in ("x0", "eps", "v", "score"):
            _shape(getattr(e, key), (3, 2, 2), f"{name}: {key} at t = {t}")
        assert torch.equal(e.x0, again.x0), f"{name}: the same question had two answers"
        assert torch.equal(z_t, kept), f"{name}: z_t was written to; return new tensors"
        gap = max(
            float((f.path.mix(e.x0, e.eps, times) - z_t).abs().max()),
            float((f.path.velocity(e.x0, e.eps, times) - e.v).abs().max()),
        )
        assert gap < 1e-3, f"{name}: x0, eps and v disagree by {gap:.2g}; use path.estimate"


def check_source(s: SourceConfig) -> None:
    """Bytes and labels of the promised shape, the same in any order and any process."""
    name, image = type(s).__name__, s.image
    with own_randomness(s):
        sources = (s.open(), s.open(held_out=True))
        for data in sources:
            rows = list(range(min(4, len(data))))
            assert rows, f"{name}: no images; raise DataError instead"
            x, label = data.read(rows)
            shape = (len(rows), image.channels, image.height, image.width)
            assert x.shape == shape, f"{name}: images {tuple(x.shape)}, `image` says {shape}"
            assert x.dtype == torch.uint8, f"{name}: images are {x.dtype}; return uint8"
            assert (label.shape, label.dtype) == (shape[:1], torch.int64), f"{name}: labels int64"
            inside = ((label >= 0) & (label < max(1, image.classes))).all()
            assert inside, f"{name}: labels {label.tolist()} outside {image.classes} classes"
            for same in (data, pickle.loads(pickle.dumps(data))):  # noqa: S301 - our own bytes
                y, other = same.read(rows[::-1])
                equal = torch.equal(y.flip(0), x) and torch.equal(other.flip(0), label)
                assert equal, f"{name}: an index gave two images; read by index alone"


def check_diagnostic(d: Diagnostic) -> None:
    """Finite floats by name, for healthy and for constant latents; the probe left alone."""
    name, g = type(d).__name__, torch.Generator().manual_seed(7)
    batch, names = make_batch(size=8), []
    for scale in (1.0, 0.0):
        z = torch.randn(8, 4, 6, generator=g) * scale
        # As in a run, only what it asks for is there, and that of the first images.
        there = {
            "x_hat": batch.x[:6] * 0.9,
            "denoised": {0.5: z[:6] / 2, 0.9: z[:6] * 0.9},
            "z_online": z[:6] + 0,
            "gradients": {"reconstruction": z[:4] * 0.1, "denoising": torch.zeros_like(z[:4])},
        }
        probe = Probe(
            batch.x,
            batch.label,
            z,
            z * 2,
            "x0",
            Linear(),
            **{k: v for k, v in there.items() if k in d.asks},  # type: ignore[arg-type]
        )
        kept = copy.deepcopy(probe)
        with own_randomness(d):
            figures, again = d.measure(probe), d.measure(probe)
        assert dict(figures) == dict(again), f"{name}: the same probe had two sets of figures"
        for values in (figures, {}):
            said = d.verdict(values)
            words = not isinstance(said, str) and all(isinstance(s, str) for s in said)
            assert words, f"{name}: verdict() gave {said!r}; give a list of sentences"
        for key, value in figures.items():
            fine = type(value) is float and math.isfinite(value)
            assert fine, f"{name}: {key!r} is {value!r} for latents of std {scale}; finite floats"
        pairs = [(getattr(probe, k), getattr(kept, k)) for k in ("x", "x_hat", "z", "raw")]
        same = all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)
        assert same, f"{name}: the probe was written to"
        names.append(set(figures))
    assert names[0] == names[1], f"{name}: names of figures depend on the latents"
