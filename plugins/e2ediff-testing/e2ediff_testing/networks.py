"""Checks of backbones, objectives and regularisers.

Shapes: B batch, N latent tokens, D latent channels, W width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone, BackboneConfig, Decode, Denoise, Encode, Output, Pass
from e2ediff.condition import ClassLabels
from e2ediff.data import Batch, ImageSpec
from e2ediff.objective import Draw, Nets, Objective
from e2ediff.parts.time_samplers import Uniform
from e2ediff.regularizer import Regularizer
from e2ediff_testing.claims import is_float32, near, own_randomness
from e2ediff_testing.tiny import IMAGE, TinyBackbone, make_batch, make_draw, make_nets


def check_objective(objective: Objective, backbone: BackboneConfig | None = None) -> None:
    """Check for finite scalar losses, fixed by nets, batch, draw; gradients only where allowed."""
    name, nets, batch = type(objective).__name__, make_nets(backbone, objective), make_batch()
    unfit = objective.problems(make_nets(backbone, objective, device="meta"))
    assert not unfit, f"{name} does not fit {backbone or 'TinyBackbone'}: {list(unfit)}; give one"
    fixed = {**nets.target.state_dict(), **nets.frozen.state_dict(), "x": batch.x}
    before = {k: v.clone() for k, v in {**fixed, **nets.online.state_dict(prefix="on.")}.items()}
    learned = {**dict(nets.online.named_parameters()), **dict(nets.heads.named_parameters())}
    shaken = shake(make_nets(backbone, objective))
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
            is_float32(loss, (), f"{name}: loss {key!r}")
            assert torch.equal(loss, again.losses[key]), f"{name}: loss {key!r} is not repeatable"
        size = (len(batch.x), nets.online.latent.tokens, nets.online.latent.dim)
        is_float32(terms.z, size, f"{name}: Terms.z")
        _stopped(objective, phase, shaken, batch)
        assert terms.total.requires_grad, f"{name}: no gradient in phase {phase!r}; detach less"
        found = torch.autograd.grad(terms.total, list(learned.values()), allow_unused=True)
        for key, grad in zip(learned, found, strict=True):
            assert grad is None or grad.isfinite().all(), f"{name}: gradient of {key} not finite"
        if objective.declares_static_graph:
            _same_parameters(objective, phase, nets, batch, learned)
    _wide_images(objective, backbone or TinyBackbone())


def _same_parameters(
    objective: Objective, phase: str, nets: Nets, batch: Batch, learned: Mapping[str, Tensor]
) -> None:
    """Check that steps with other draws, early and late, give gradients to the same parameters."""
    used = list[set[str]]()
    for seed in range(4):
        draw = attrs.evolve(make_draw(batch, seed=seed), progress=torch.tensor(seed / 4))
        total = objective.terms(nets, batch, draw, phase).total
        grads = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
        used.append({key for key, g in zip(learned, grads, strict=True) if g is not None})
    odd = sorted(used[0].union(*used) - used[0].intersection(*used))
    assert not odd, (
        f"{type(objective).__name__}: {odd[0]} gets a gradient in some steps of phase {phase!r} "
        "and in others none, but DDP does not look for such parameters where the class declares "
        "`static_graph = True`; take that out, or use it in every step"
    )


def _wide_images(objective: Objective, backbone: BackboneConfig) -> None:
    """Check losses of images twice as wide as high, unless `problems` refuses them."""
    wide = attrs.evolve(IMAGE, width=2 * IMAGE.width)
    if backbone.problems(wide):
        return
    if objective.problems(make_nets(backbone, objective, image=wide, device="meta")):
        return
    nets, batch = make_nets(backbone, objective, image=wide), make_batch(wide)
    what = f"{type(objective).__name__}: images of {wide.height} x {wide.width} (height x width)"
    for phase in objective.phases:
        try:
            losses = objective.terms(nets, batch, make_draw(batch), phase).losses
        except Exception as error:
            advice = "use the shapes of batch.x and net.latent, or refuse it in problems()"
            raise AssertionError(f"{what} raise {error!r}; {advice}") from error
        for key, loss in losses.items():
            is_float32(loss, (), f"{what}: loss {key!r}")


def shake(nets: Nets) -> Nets:
    """Move weights from their initial values, whose zeros stop gradients that flow later."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in [*nets.online.parameters(), *nets.heads.parameters()]:
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return nets


def _stopped(objective: Objective, phase: str, nets: Nets, batch: Batch) -> None:
    """Check that losses declared to stop before the encoder do so."""
    name, stops = type(objective).__name__, objective.stops(phase)
    with _encodings(nets.online) as encoded:
        terms = objective.terms(nets, batch, make_draw(batch), phase)
    foreign = sorted(set(stops) - set(terms.losses))
    assert not foreign, f"{name}: stops() names {foreign}, the losses are {sorted(terms.losses)}"
    watched = [("the latents", z) for z in [terms.z, *encoded] if z.requires_grad]
    watched += _encoder(nets.online)
    for key in stops:
        if not (terms.losses[key].requires_grad and watched):
            continue
        values = [value for _, value in watched]
        grads = torch.autograd.grad(
            terms.losses[key], values, retain_graph=True, allow_unused=True
        )
        pairs = zip(watched, grads, strict=True)
        reached = [what for (what, _), g in pairs if g is not None and g.any()]
        assert not reached, (
            f"{name}: loss {key!r} reaches {reached[0]}, yet stops() declares that it does not; "
            "wrap its latent in sg(...), or take it out of stops()"
        )


@contextlib.contextmanager
def _encodings(net: Backbone) -> Iterator[list[Tensor]]:
    """Collect latents and features of all encode passes meanwhile."""
    found: list[Tensor] = []
    outputs, encode = net.outputs, net.encode

    def all_outputs(*passes: Pass) -> list[Output]:
        outs = outputs(*passes)
        for p, out in zip(passes, outs, strict=True):
            if isinstance(p, Encode):
                found.extend([out.value, *out.features.values()])
        return outs

    def one(x: Tensor) -> Tensor:
        found.append(encode(x))
        return found[-1]

    vars(net).update(outputs=all_outputs, encode=one)
    try:
        yield found
    finally:
        del vars(net)["outputs"], vars(net)["encode"]


def _encoder(net: Backbone) -> list[tuple[str, Tensor]]:
    """Return the weights that only encoding uses, where passes share none or few."""
    if not (net.denoiser_apart and net.latent.learned):
        return []
    own = {k: p for k, p in net.named_parameters() if p.requires_grad}
    z = net.encode(make_batch(net.image).x)
    losses = [z.square().sum(), net.decode(torch.zeros_like(z)).square().sum()]
    found, others = (
        torch.autograd.grad(loss, list(own.values()), allow_unused=True) for loss in losses
    )
    return [
        (k, p)
        for (k, p), g, o in zip(own.items(), found, others, strict=True)
        if g is not None and o is None
    ]


def check_regularizer(r: Regularizer) -> None:
    """Check for a repeatable scalar, finite with its gradient, also for constant latents."""
    name, batch = type(r).__name__, make_batch()
    assert getattr(r, "weight", -1) >= 0, f"{name}: give it a field `weight`, at least 0"
    g = torch.Generator().manual_seed(8)
    for std in (1.0, 1e-4, 0.0):
        z = (torch.randn(6, 4, 6, generator=g) * std).requires_grad_()
        kept = z.detach().clone()
        with own_randomness(r):
            loss, again = r.loss(z, make_draw(batch)), r.loss(z, make_draw(batch))
        is_float32(loss, (), f"{name}: the loss of latents of std {std}")
        assert torch.equal(loss, again), f"{name}: the loss is not repeatable"
        assert torch.equal(z, kept), f"{name}: z was written to; return a new tensor"
        assert loss.requires_grad, f"{name}: no gradient reaches the latents; detach less"
        (grad,) = torch.autograd.grad(loss, z)
        assert grad.isfinite().all(), f"{name}: the gradient at latents of std {std} is not finite"
    meta = make_nets(device="meta")
    unfit = [] if len(batch.x) < r.fewest else r.problems(meta, len(batch.x))
    assert not unfit, f"{name} does not fit TinyBackbone: {list(unfit)}; give options that do"
    z, t = torch.zeros(6, 4, 6, device="meta"), torch.zeros(6, device="meta")
    condition = ClassLabels(4).null(6, "meta")
    draw = Draw(t=t, condition=condition, generator=None, times=Uniform())
    r.loss(z, draw)  # `check` counts there


def _same_latents(name: str, net: Backbone) -> None:
    """Check that `latent` and `latent_norm` describe the same latents."""
    spec, norm = net.latent, net.latent_norm
    assert spec.norm == norm.kind, (
        f"{name}: latent.norm is {spec.norm!r}, yet latent_norm is of kind {norm.kind!r}"
    )
    if norm.has_statistics:
        shape = (spec.tokens, spec.dim) if norm.kind == "position" else (spec.dim,)
        assert norm.mean.shape == shape, (
            f"{name}: latent_norm has statistics {tuple(norm.mean.shape)}; make them {shape}, "
            "as in `latent`"
        )
    if spec.grid:
        assert spec.grid[0] * spec.grid[1] == spec.tokens, (
            f"{name}: a grid of {spec.grid} does not have {spec.tokens} tokens; give "
            "None for tokens without a position"
        )


def _same_in_float32(
    name: str, net: Backbone, passes: Sequence[Pass], expected: Sequence[Output]
) -> None:
    """Check that a network prepared for bfloat16 gives the same values in float32."""
    advice = "choose kernels for both types, as `use_attention` does"
    net.prepare(torch.device("cpu"), torch.bfloat16)
    for p, before in zip(passes, expected, strict=True):
        what = f"{name}: prepared for bfloat16 and asked in float32, {type(p).__name__}"
        try:
            (after,) = net.outputs(p)
        except Exception as error:
            raise AssertionError(f"{what} raises {error!r}; {advice}") from error
        assert near(before.value, after.value), f"{what} has another value; {advice}"


def _other_times(name: str, net: Backbone, z: Tensor, t: Tensor, batch: Batch) -> None:
    """Check that times of tokens and a second time are taken, or refused, as declared."""
    tokens = t[:, None].expand(-1, z.shape[1])
    for kind, offered, p in (
        ("token_times", net.token_times, Denoise(z_t=z, t=tokens, condition=batch.condition)),
        ("second_time", net.second_time, Denoise(z_t=z, t=t, r=t, condition=batch.condition)),
    ):
        if offered:
            (whole,) = net.outputs(Denoise(z_t=z, t=t, condition=batch.condition))
            (out,) = net.outputs(p)
            assert near(out.value, whole.value), (
                f"{name}: equal times give another answer ({kind})"
            )
            continue
        try:
            net.outputs(p)
        except ValueError:
            continue
        raise AssertionError(
            f"{name}: {kind} is False, and such a pass is not refused; call self.accept_times(p) "
            "for every denoise pass"
        )


def _noised_images(name: str, net: Backbone, z: Tensor, x: Tensor, t: Tensor) -> None:
    """Check that noised images are denoised, or refused, as declared."""
    if net.denoises_pixels:
        given = [
            Decode(z=z, x_t=x_t, t=at) for x_t, at in ((x, t), (x.flip(0), t), (x, t.flip(0)))
        ]
        out, *others = net.outputs(*given)
        is_float32(out.value, tuple(x.shape), f"{name}: Decode's clean estimate")
        assert near(net.outputs(given[0])[0].value, out.value), (
            f"{name}: the clean estimate is another when passes are fused"
        )
        heard = [not torch.equal(out.value, other.value) for other in others]
        assert all(heard), f"{name}: denoises_pixels is True, yet x_t or t changes nothing"
    for kind, p in (
        ("denoises_pixels is False, and x_t", Decode(z=z, x_t=x, t=t)),
        ("x_t without t", Decode(z=z, x_t=x)),
    ):
        if net.denoises_pixels and p.t is not None:
            continue
        try:
            net.outputs(p)
        except ValueError:
            continue
        raise AssertionError(
            f"{name}: {kind} is not refused; call self.accept_image(p) for every decode pass"
        )


def _image_on_the_way(name: str, net: Backbone, p: Denoise, image: ImageSpec) -> None:
    """Check that denoise passes have their image, and rows that teach, or refuse, as declared."""
    b = len(p.t)
    (plain,) = net.outputs(p)
    if not net.decodes_while_denoising:
        assert plain.image is None, (
            f"{name}: a denoise pass has an image; set decodes_while_denoising = True"
        )
        try:
            net.outputs(attrs.evolve(p, encoder_learns=p.t >= 0.5))
        except ValueError:
            return
        raise AssertionError(
            f"{name}: decodes_while_denoising is False, and encoder_learns is not refused; call "
            "self.accept_times(p) for every denoise pass"
        )
    assert plain.image is not None, (
        f"{name}: decodes_while_denoising is True, and a denoise pass has no image; fill "
        "Output.image"
    )
    size = (b, image.channels, image.height, image.width)
    is_float32(plain.image, size, f"{name}: Output.image of a denoise pass")
    trained = {k: w for k, w in net.named_parameters() if w.requires_grad}
    encoded = net.encode(torch.zeros(size)).sum()
    grads = torch.autograd.grad(encoded, list(trained.values()), allow_unused=True)
    own = [(k, w) for (k, w), g in zip(trained.items(), grads, strict=True) if g is not None]
    weights = [p.z_t, *(w for _, w in own)]
    found = []
    for learns in (None, torch.ones(b), torch.zeros(b)):
        given = None if learns is None else learns.bool()
        (out,) = net.outputs(attrs.evolve(p, encoder_learns=given))
        assert near(out.value, plain.value), f"{name}: encoder_learns changes the answer"
        found.append(torch.autograd.grad(out.value.square().sum(), weights, allow_unused=True))
    for (key, _), g in zip(own, found[2][1:], strict=True):
        assert g is None or not g.any(), (
            f"{name}: {key} gets a gradient from rows outside encoder_learns; detach the weights "
            "that encode uses for them"
        )
    for what, one in (("all", found[1]), ("no", found[2])):
        same = one[0] is not None and near(one[0], found[0][0])
        assert same, f"{name}: z_t gets another gradient where {what} rows are in encoder_learns"


def _other_shape(
    name: str, config: BackboneConfig, image: ImageSpec, scale: tuple[int, int]
) -> None:
    """Check that larger images of another shape keep it, or are refused by `problems`."""
    other = attrs.evolve(image, height=scale[0] * image.height, width=scale[1] * image.width)
    if config.problems(other):
        return
    what = f"{name}: images of {other.height} x {other.width} (height x width)"
    advice = "use image.height and image.width, or refuse such images in problems()"
    batch = make_batch(other, 2)
    try:
        net = make_nets(config, image=other).online
        net.prepare(torch.device("cpu"), torch.float32)
        z = net.encode(batch.x)
        x, answer = net.decode(z), net.denoise(z, make_draw(batch).t, batch.condition)
    except Exception as error:
        raise AssertionError(f"{what} raise {error!r}; {advice}") from error
    size = (2, net.latent.tokens, net.latent.dim)
    assert z.shape == answer.shape == size, f"{what} have latents {tuple(z.shape)}, not {size}"
    assert x.shape == batch.x.shape, f"{what} are decoded to {tuple(x.shape)}; {advice}"
    _same_latents(name, net)


def check_backbone(config: BackboneConfig, image: ImageSpec | None = None) -> None:
    """Check shapes, repeatable and independent passes, fused as single, finite gradients."""
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
    _same_latents(name, online)
    z = torch.randn(b, n, d, generator=torch.Generator().manual_seed(4)).requires_grad_()
    x = batch.x.clone().requires_grad_()
    taps = tuple(range(1, online.depth + 1))
    t = make_draw(batch).t
    passes: list[Encode | Decode | Denoise] = [
        Encode(x=x, taps=taps),
        Decode(z=z, taps=taps),
        Denoise(z_t=z, t=t, condition=batch.condition, taps=taps),
        Denoise(z_t=z, t=t, condition=batch.condition.null()),
    ]
    with own_randomness(config):
        fused, again = online.outputs(*passes), online.outputs(*passes)
    lacks = online.latent_norm.has_statistics and fused[0].raw is None
    assert not lacks, f"{name}: fill Output.raw, from which the latent norm takes its statistics"
    trained, reached = dict(online.named_parameters()), []
    for p, out, repeat in zip(passes, fused, again, strict=True):
        what = f"{name}: {type(p).__name__}'s value"
        is_float32(out.value, tuple(x.shape) if isinstance(p, Decode) else (b, n, d), what)
        assert torch.equal(out.value, repeat.value), f"{what} is not repeatable; draw no numbers"
        for tap, f in out.features.items():
            assert f.shape == (b, n, online.width), f"{name}: tap {tap} is {tuple(f.shape)}"
        (alone,) = online.outputs(p)
        assert near(alone.value, out.value), f"{what} is another when passes are fused"
        loss, inputs = alone.value.square().mean(), [x, z, *trained.values()]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads), f"{name}: gradient not finite"
        reached.append({k for k, g in zip(trained, grads[2:], strict=True) if g is not None})
    both = sorted((reached[0] | reached[1]) & (reached[2] | reached[3]))
    apart = not (online.denoiser_apart and both)
    assert apart, f"{name}: denoiser_apart is True, yet denoise shares {', '.join(both)}"
    both = sorted(reached[1] & (reached[0] | reached[2] | reached[3]))
    apart = not (online.decoder_apart and both)
    assert apart, f"{name}: decoder_apart is True, yet decode shares {', '.join(both)}"
    _noised_images(name, shake(make_nets(config, image=image)).online, z, x, t)
    _other_times(name, online, z, t, batch)
    shaken = shake(make_nets(config, image=image)).online
    _image_on_the_way(name, shaken, Denoise(z_t=z, t=t, condition=batch.condition), image)
    _same_in_float32(name, twin.online, passes, fused)
    wrote = [k for k, v in online.state_dict().items() if not torch.equal(v, before[k])]
    assert not wrote, f"{name}: a pass changed {', '.join(wrote)}"
    online.eval()
    for p, row in ((passes[0], Encode(x=x[:1])), (passes[1], Decode(z=z[:1]))):
        (whole,), (alone,) = online.outputs(p), online.outputs(row)
        same = near(whole.value[:1], alone.value)
        assert same, f"{name}: in eval mode {type(p).__name__} of an image depends on others"
    for scale in ((1, 2), (2, 1)):
        _other_shape(name, config, image, scale)
