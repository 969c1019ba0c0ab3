"""Checks of what surrounds the networks: data, optimizers, averages, diagnostics, scores."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile

import attrs
import torch
from torch import Tensor, nn

from e2ediff.averaging import Averaging
from e2ediff.condition import Condition, Labels
from e2ediff.data import ImageSpec, SourceConfig
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.errors import DataError
from e2ediff.features import FeatureConfig
from e2ediff.figure import Figure, find
from e2ediff.metric import FeatureSet, Metric, MetricValue, moments_of
from e2ediff.optimizer import OptimizerConfig
from e2ediff.parts.interpolants import Linear
from e2ediff.tracker import Tracker, TrackerConfig
from e2ediff_testing.claims import own_randomness
from e2ediff_testing.tiny import make_batch


def check_optimizer(o: OptimizerConfig) -> None:
    """Check every parameter once, factors in [0, 1], a step downhill, state that is taken back."""
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


def check_averaging(a: Averaging) -> None:
    """Check for decays in [0, 1], not all 1, that depend on the update's number alone."""
    name, updates = type(a).__name__, [*range(1, 200), 10**4, 10**7]
    with own_randomness(a):
        decays = [a.decay_at(update) for update in updates]
        again = [a.decay_at(update) for update in reversed(updates)]
    for update, decay in zip(updates, decays, strict=True):
        fine = isinstance(decay, int | float) and 0 <= decay <= 1
        assert fine, f"{name}: decay_at({update}) is {decay!r}; return a number in [0, 1]"
    assert min(decays) < 1, f"{name}: every decay is 1, so that the average never moves"
    assert again[::-1] == decays, f"{name}: decay_at() must depend on `update` alone"


def check_source(s: SourceConfig) -> None:
    """Check bytes and conditions of the promised shape, the same in any order and process."""
    name, image = type(s).__name__, s.image
    declared = {*s.movable, *s.harmless} - {*SourceConfig.harmless}
    known = {field.alias for field in attrs.fields(type(s))}  # type: ignore[arg-type]
    unknown = sorted(declared - known)
    assert not unknown, f"{name}: movable and harmless name options; {unknown[0]!r} is none"
    both = sorted({*s.movable} & {*s.harmless})
    assert not both, f"{name}: {both[0]!r} is movable and harmless; leave it in one of them"
    with own_randomness(s):
        sources = (s.open(), s.open(held_out=True))
        for data in sources:
            rows = list(range(min(4, len(data))))
            assert rows, f"{name}: no images; raise DataError instead"
            x, given = data.read(rows)
            shape = (len(rows), image.channels, image.height, image.width)
            assert x.shape == shape, f"{name}: images {tuple(x.shape)}, `image` says {shape}"
            assert x.dtype == torch.uint8, f"{name}: images are {x.dtype}; return uint8"
            condition = _condition(name, image, given, len(rows))
            for same in (data, pickle.loads(pickle.dumps(data))):  # noqa: S301 - our own bytes
                y, other = same.read(rows[::-1])
                again = _condition(name, image, other, len(rows)).tensors()
                equal = torch.equal(y.flip(0), x) and all(
                    torch.equal(again[key].flip(0), value)
                    for key, value in condition.tensors().items()
                )
                assert equal, f"{name}: an index gave two images; read by index alone"


def _condition(name: str, image: ImageSpec, given: Tensor | Condition, rows: int) -> Condition:
    """Return what a source gives, checked to be of the kind, shape and type of `image`."""
    try:
        known = image.conditioning.accept(given, name)
    except DataError as error:
        raise AssertionError(f"{error}; `image` and read() must agree") from error
    assert len(known) == rows, f"{name}: {len(known)} conditions of {rows} images"
    for key, value in image.conditioning.null(1).tensors().items():
        found = known.tensors()[key].dtype
        assert found == value.dtype, f"{name}: {key} is {found}; make it {value.dtype}"
    if isinstance(known, Labels):
        label = known.label
        inside = ((label >= 0) & (label < max(1, image.classes))).all()
        assert inside, f"{name}: labels {label.tolist()} outside {image.classes} classes"
    return known


def check_diagnostic(d: Diagnostic) -> None:
    """Check for finite floats by name, for healthy and constant latents; the probe left alone.

    Every figure that is declared is measured.
    """
    name, g = type(d).__name__, torch.Generator().manual_seed(7)
    batch, names = make_batch(size=8), []
    for scale in (1.0, 0.0):
        z = torch.randn(8, 4, 6, generator=g) * scale
        # As in a run, only what it asks for is there, and that of the first images.
        there = {
            "x_hat": batch.x[:6] * 0.9,
            "denoised": {0.5: z[:6] / 2, 0.9: z[:6] * 0.9},
            "gradients": {"reconstruction": z[:4] * 0.1, "denoising": torch.zeros_like(z[:4])},
        }
        probe = Probe(
            batch.x,
            batch.condition,
            z,
            z * 2,
            "x0",
            Linear(),
            z_online=z[:6] + 0,
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
    wrong = [f for f in d.figures if not isinstance(f, Figure)]
    assert not wrong, f"{name}: figures holds {wrong[0]!r}; make it an e2ediff.figure.Figure"
    for figure in d.figures:
        measured = any(find(key, [figure]) for key in names[0])
        assert measured, f"{name}: figures declares {figure.name!r}, which measure() does not give"


def check_tracker(config: TrackerConfig) -> None:
    """Check that it takes figures and pictures, closes, and reopens on the same directory."""
    name = type(config).__name__
    with tempfile.TemporaryDirectory() as folder, own_randomness(config):
        for images in (8, 16):
            config.check()
            tracker = config.open(folder)
            assert isinstance(tracker, Tracker), f"{name}: open() must return a Tracker"
            x = torch.zeros(2, 1, 8, 8)
            tracker.log(images, {"loss/denoising": 0.5, "rank": 3.0})
            tracker.log(images, {"rank": 2.0})
            tracker.picture(images, "samples", x)
            tracker.close()
            assert not x.any(), f"{name}: picture() writes into the images; copy them"


def check_features(config: FeatureConfig) -> None:
    """Check for a fixed network in eval mode, finite maps, and gradients to the images."""
    name = type(config).__name__
    net = config.build()
    assert not net.training, f"{name}: build() must return the network in eval mode"
    trained = [key for key, p in net.named_parameters() if p.requires_grad]
    assert not trained, f"{name}: {trained[0]} requires a gradient; call requires_grad_(False)"
    for channels in (1, 3):
        x = (torch.rand(2, channels, 48, 40, generator=torch.Generator().manual_seed(9)) * 2) - 1
        x.requires_grad_()
        with own_randomness(config):
            maps, again = net(x), net(x)
        assert maps, f"{name}: forward() returned no feature maps"
        assert all(map(torch.equal, maps, again)), f"{name}: forward() is not repeatable"
        for y in maps:
            fits = y.ndim == 4 and len(y) == 2
            assert fits, f"{name}: a map is {tuple(y.shape)}; make it (B, K, h, w)"
        loss = torch.stack([y.square().mean() for y in maps]).sum()
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.isfinite().all(), f"{name}: the gradient at the images is not finite"
        assert grad.any(), f"{name}: no gradient reaches the images; detach less"


def check_metric(m: Metric) -> None:
    """Check for a direction; finite, repeatable figures of a set against itself and another."""
    name, g = type(m).__name__, torch.Generator().manual_seed(10)
    count = max(64, m.min_images())
    assert m.better in ("low", "high"), f"{name}: better is {m.better!r}; give 'low' or 'high'"
    taps = {*m.moments, *m.rows}
    assert taps, f"{name}: say in `moments` or `rows` which taps it reads"

    def features(shift: float) -> FeatureSet:
        rows = {tap: torch.randn(count, 8, generator=g) + shift for tap in sorted(taps)}
        return FeatureSet(
            count,
            {tap: moments_of(rows[tap]) for tap in m.moments},
            {tap: rows[tap] for tap in m.rows},
        )

    made, real = features(0.5), features(0.0)
    kept = copy.deepcopy(made)
    for against in (made, real):
        with own_randomness(m):
            found, again = m.measure(made, against), m.measure(made, against)
        assert found, f"{name}: measure() gave no figure"
        for key, figure in found.items():
            fine = isinstance(figure, MetricValue) and math.isfinite(figure.value)
            assert fine, f"{name}: {key!r} is {figure!r}; give a MetricValue with a finite value"
            same = figure.value == again[key].value
            assert same, f"{name}: {key!r} is not repeatable; seed what is drawn"
    wrote = [tap for tap in m.rows if not torch.equal(made.rows[tap], kept.rows[tap])]
    assert not wrote, f"{name}: the features of {wrote[0]} were written to"
