"""Our networks and losses beside the released code of eight projects, with the same weights.

    python benchmarks/parity.py --peer ../JiT
    python benchmarks/parity.py --peer ../SiT --json

The projects are JiT, SiT, UNITE, LDMisAE, MeanFlow, the folder `meanflow` of py-meanflow, REPA-E,
and taming-transformers, whose critic of VQGAN `adversary` follows.
Builds both networks at a tiny width, gives theirs random weights, none of them zero, and ours the
same by `peer_weights.py`, and feeds both the same images, times, labels and noise. Prints how far
their answers, losses and gradients are apart, and how many parameters both have in a released
size. Ends with code 1 if a difference is above 1e-5, with 2 if the checkout or a package is
missing.

What is made equal: LPIPS is 0 and no label of UNITE's is dropped in training.
LDMisAE's autoencoder is given no class, as ours, and its images on the way are not rounded, which
would make jumps of differences in the last place. py-meanflow's network is a U-Net, so its loss
and its sampler are given ours; MeanFlow's loss is compared without its adaptive weight, which is
another one. REPA-E's two updates are made with its network's batch norm at rest and no label
dropped, on latents and features that are given. The norms of VQGAN's critic are ours, and its
adaptive weight is asked of losses 2^30 times as large, beside which its 1e-4 is nothing.

Shapes: B batch, C H W image, N tokens, D latent channels.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import click
import numpy as np
import peer_weights
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "speed"))
from peers import NoLPIPS, attend, imports_of, project_in  # noqa: E402 - of another folder

from e2ediff.backbone import Backbone, BackboneConfig, Decode, Denoise, Encode  # noqa: E402
from e2ediff.condition import Labels  # noqa: E402
from e2ediff.data import Batch, ImageSpec  # noqa: E402
from e2ediff.denoiser import Plain  # noqa: E402
from e2ediff.host.plugins import load  # noqa: E402
from e2ediff.host.recipe import load_recipe  # noqa: E402
from e2ediff.losses import PixelLoss, direct_loss  # noqa: E402
from e2ediff.nn.layers import patchify, unpatchify  # noqa: E402
from e2ediff.objective import Draw, Nets, Objective, Terms  # noqa: E402
from e2ediff.parts.backbones import ViTConfig  # noqa: E402
from e2ediff.parts.guidance import ClassifierFree  # noqa: E402
from e2ediff.parts.interpolants import Linear  # noqa: E402
from e2ediff.parts.objectives import Detached  # noqa: E402
from e2ediff.parts.samplers import AverageVelocity, Heun  # noqa: E402
from e2ediff.parts.time_samplers import Uniform  # noqa: E402
from e2ediff.times import TimeSampler  # noqa: E402

BAR = 1e-5
WIDTH, DEPTH, HEADS, CLASSES, BATCH = 96, 6, 2, 10, 4
T = torch.tensor([0.0, 0.3, 0.7, 0.98])  # the last is past the clamps
Y = torch.tensor([0, 7, CLASSES, 3])  # the third is no class


@attrs.frozen
class Check:
    """How far both sides are apart in one respect: the largest difference."""

    what: str
    difference: float
    relative: bool

    @property
    def holds(self) -> bool:
        """Whether it is within the bar; a difference that is no number is not."""
        return self.difference <= BAR


@attrs.frozen
class Size:
    """Trained parameters of a released size, and why they differ where they do."""

    what: str
    theirs: int
    ours: int
    why: str = ""


@attrs.frozen
class Found:
    """All about one project."""

    checks: Sequence[Check]
    sizes: Sequence[Size]


def apart(what: str, ours: Tensor, theirs: Tensor) -> Check:
    """Compare answers, by their largest difference."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: ours are {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    return Check(what, float((ours - theirs).detach().abs().max()), relative=False)


def losses_apart(what: str, ours: Tensor, theirs: Tensor) -> Check:
    """Compare two losses, relative to theirs."""
    ours, theirs = ours.detach(), theirs.detach()
    return Check(what, float((ours - theirs).abs() / theirs.abs()), relative=True)


def gradients_apart(net: nn.Module, wanted: Mapping[str, Tensor]) -> Check:
    """Compare gradients, each relative to its largest number; the worst counts."""
    mine, found = dict(net.named_parameters()), []
    for name, theirs in wanted.items():
        grad = mine[name].grad
        if grad is None:
            raise ValueError(f"gradients: ours of {name} is none")
        found.append((grad - theirs).abs().max() / theirs.abs().max())
    worst = float(torch.stack(found).max())  # Python's `max` would pass over a NaN
    return Check(f"gradients of {len(wanted)} tensors", worst, relative=True)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return theirs, by name; what their loss does not reach is left out."""
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def shake(net: nn.Module) -> None:
    """Make no weight of theirs zero."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=g)


def built(config: BackboneConfig, image: ImageSpec, state: Mapping[str, Tensor]) -> Backbone:
    """Return our network with weights of theirs, each of which has a place."""
    net = config.build(image).train()
    places = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    with torch.no_grad():
        for name, x in state.items():
            if places[name].shape != x.shape:
                shapes = f"{tuple(places[name].shape)}, not {tuple(x.shape)}"
                raise ValueError(f"weights: {name} is {shapes}")
            places[name].copy_(x)
    return net


def trained(net: nn.Module) -> int:
    """Count parameters that are trained."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def of_recipe(name: str) -> Backbone:
    """Return the network of a recipe of the repository, without numbers."""
    recipe = load_recipe(load(), HERE.parent / "recipes" / name, [])
    with torch.device("meta"):
        return recipe.backbone.build(recipe.data.image)


# Randomness of theirs, for ours to use


class Recorder:
    """Keeps what torch draws, by the function that drew it."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Record every `randn`, `randn_like` and `rand` inside `with`."""
        real = {name: getattr(torch, name) for name in ("randn", "randn_like", "rand")}

        def recording(name: str) -> Callable[..., Tensor]:
            def draw(*args: Any, **more: Any) -> Tensor:
                x: Tensor = real[name](*args, **more)
                self.drawn.setdefault(name, []).append(x.clone())
                return x

            return draw

        for name in real:
            setattr(torch, name, recording(name))
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(torch, name, function)


class Listed(TimeSampler):
    """Times that were drawn elsewhere, one batch after another."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = iter(batches)

    def quantile(self, u: Tensor) -> Tensor:
        """Return the next batch, whatever `u` is."""
        return next(self.batches)

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Return the next batch as it is, at the ends of [0, 1] too."""
        return next(self.batches)


@attrs.frozen(eq=False)
class Given(Draw):
    """A draw whose noise and uniform numbers were drawn elsewhere."""

    normals: Iterator[Tensor] = attrs.field(kw_only=True)
    uniforms: Iterator[Tensor] = attrs.field(kw_only=True, factory=lambda: iter(()))

    def noise(self, like: Tensor) -> Tensor:
        """Return the next normals."""
        found = next(self.normals)
        assert found.shape == like.shape
        return found

    def uniform(self, *shape: int) -> Tensor:
        """Return the next uniform numbers."""
        found = next(self.uniforms)
        assert found.shape == shape
        return found


def given(label: Tensor, times: Sequence[Tensor], normals: Sequence[Tensor],
          uniforms: Sequence[Tensor] = ()) -> Given:  # fmt: skip
    """A draw of these times (the first batch at once, others when asked), noise and numbers."""
    return Given(
        t=times[0], condition=Labels(label, CLASSES), generator=None, times=Listed(times[1:]),
        normals=iter(normals), uniforms=iter(uniforms),
    )  # fmt: skip


# JiT


def jit() -> Found:
    """Pixels: network, loss, gradients, and fifty guided steps."""
    import model_jit  # type: ignore[import-not-found]
    from denoiser import Denoiser  # type: ignore[import-not-found]
    from e2ediff_jit.backbone import JiTConfig
    from e2ediff_jit.interpolant import LinearScaled
    from e2ediff_jit.objective import Pixel

    model_jit.scaled_dot_product_attention = attend
    model_jit.JiT_models["tiny"] = lambda **options: model_jit.JiT(
        depth=DEPTH, hidden_size=WIDTH, num_heads=HEADS, bottleneck_dim=32, patch_size=16,
        in_context_len=4, in_context_start=2, **options,
    )  # fmt: skip
    scale, patch, image = 2.0, 16, ImageSpec(3, 64, 64, CLASSES)
    args = types.SimpleNamespace(
        model="tiny", img_size=64, class_num=CLASSES, attn_dropout=0.0, proj_dropout=0.0,
        label_drop_prob=0.0, P_mean=-0.8, P_std=0.8, t_eps=5e-2, noise_scale=scale,
        ema_decay1=0.9999, ema_decay2=0.9996, sampling_method="heun", num_sampling_steps=50,
        cfg=2.9, interval_min=0.1, interval_max=1.0,
    )  # fmt: skip
    theirs = Denoiser(args).train()
    shake(theirs)
    config = JiTConfig(
        width=WIDTH, depth=DEPTH, heads=HEADS, patch=patch, bottleneck=32, context=4,
        context_start=2, swiglu_width="truncated", attention="sdpa",
    )  # fmt: skip

    def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name.removeprefix("net."): x for name, x in state.items()}
        return peer_weights.jit(own, HEADS, patch)

    net = built(config, image, mapped(theirs.state_dict()))
    x = torch.rand(BATCH, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        ours = unpatchify(net.denoise(net.encode(x), T, Labels(Y, CLASSES)), patch, (4, 4))
        checks = [apart("answer", ours, theirs.net(x, T, Y))]

    theirs.sample_t = lambda n, device=None: T
    drawn = Recorder()
    with drawn.listening():
        their_loss = theirs(x, Y)
    their_loss.backward()
    path = LinearScaled(noise_scale=scale)
    nets = Nets(net, net, path, "x0")
    draw = given(Y, [T], [net.encode(drawn.drawn["randn_like"][0])])
    loss = Pixel().terms(nets, Batch(x=x, condition=draw.condition), draw, "joint").total
    loss.backward()
    checks += [
        losses_apart("loss", loss, their_loss),
        gradients_apart(net, mapped(gradients(theirs))),
    ]

    label = torch.arange(BATCH)
    with drawn.listening():
        their_images = theirs.eval().generate(label)
    guidance = ClassifierFree(scale=2.9, t_min=0.1, exclusive=True)
    denoiser = guidance.wrap(Plain(net.eval(), path, "x0"))
    start = net.encode(drawn.drawn["randn"][0])
    z = Heun(steps=50, t_eps=0.05).sample(
        denoiser, start, Labels(label, CLASSES), torch.randn_like
    )
    checks.append(apart("samples, 50 guided steps", net.decode(z), their_images))

    with torch.device("meta"):
        full = model_jit.JiT_models["JiT-B/16"](input_size=256, in_channels=3, num_classes=1000)
    size = Size(
        "JiT-B/16, recipes/jit_in256.yaml", trained(full), trained(of_recipe("jit_in256.yaml"))
    )
    return Found(checks, [size])


# SiT


def sit() -> Found:
    """Latents of 4 channels by the denoiser of `vit`: network, loss and gradients."""
    from models import SiT, SiT_models  # type: ignore[import-not-found]
    from transport import create_transport  # type: ignore[import-not-found]

    side, patch, channels = 8, 2, 4
    theirs = SiT(input_size=side, patch_size=patch, in_channels=channels, hidden_size=WIDTH,
                 depth=DEPTH, num_heads=HEADS, num_classes=CLASSES).eval()  # fmt: skip
    shake(theirs)

    def config(width: int, depth: int, heads: int) -> ViTConfig:
        return ViTConfig(
            width=width, depth=depth, heads=heads, patch=8, latent_dim=channels * patch**2,
            latent_norm="none", trunks="denoiser_apart", mlp="gelu", qk_norm=False,
            time_frequencies=128, time_scale=1.0, attention="sdpa",
        )  # fmt: skip

    # The latent has a grid of its own; that of the images is the same with patches of 8.
    image = ImageSpec(3, 8 * side // patch, 8 * side // patch, CLASSES)
    state = {k: v for k, v in theirs.state_dict().items() if k != "pos_embed"}
    net = built(config(WIDTH, DEPTH, HEADS), image, peer_weights.sit(state))
    x, label = torch.randn(BATCH, channels, side, side), Labels(Y, CLASSES)
    grid = (side // patch, side // patch)
    with torch.no_grad():
        ours = unpatchify(net.denoise(patchify(x, patch), T, label), patch, grid)
        checks = [apart("answer", ours, theirs(x, T, Y))]

    seen: list[Tensor] = []

    def noting(z_t: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        seen.append(t)
        return theirs(z_t, t, **more)

    drawn = Recorder()
    with drawn.listening():
        their_loss = create_transport().training_losses(noting, x, {"y": Y})["loss"].mean()
    their_loss.backward()
    path, z, (t,) = Linear(), patchify(x, patch), seen
    eps = patchify(drawn.drawn["randn_like"][0], patch)
    z_t = path.mix(z, eps, t)
    guess = path.estimate(net.denoise(z_t, t, label), z_t, t, "v")
    loss = direct_loss(guess, z, eps, path, t, "v", clamp=math.inf)
    loss.backward()
    wanted = peer_weights.sit(gradients(theirs))
    del wanted["embed_mode.denoise"]  # not of theirs
    checks += [losses_apart("loss of velocities", loss, their_loss), gradients_apart(net, wanted)]

    with torch.device("meta"):
        full = SiT_models["SiT-B/2"](input_size=32, num_classes=1000)
        whole = config(768, 12, 12).build(ImageSpec(3, 128, 128, 1000))
    places = peer_weights.sit({k: v for k, v in full.state_dict().items() if k != "pos_embed"})
    mine = sum(dict(whole.named_parameters())[name].numel() for name in places)
    why = (
        "a sigma that SiT predicts and does not use, 16 rows of its last layer; ours has an "
        "embedding of the mode"
    )
    return Found(checks, [Size("SiT-B/2, the denoiser of `vit`", trained(full), mine, why)])


# UNITE


def unite() -> Found:
    """Registers: denoising, encoding, decoding, and a training step of three draws."""
    import yaml
    from e2ediff_unite.backbone import UniteConfig
    from e2ediff_unite.decoder import DecoderConfig
    from e2ediff_unite.objective import Unite
    from models import unite as released  # type: ignore[import-not-found]

    released.LPIPS = NoLPIPS
    root = Path(released.__file__).parent.parent
    text = (root / "configs" / "imagenet.yaml").read_text(encoding="utf-8")
    options = {**yaml.safe_load(text)["gen_tok"], "flow_steps_per_recon": 3}
    why = "theirs has an embedding of a special time and a row of classes that nothing uses"
    recipe, sizes = load_recipe(load(), str(HERE.parent / "recipes/unite_in256.yaml")), []
    for size, (depth, width, heads) in released.ENCODER_CONFIGS.items():
        config = attrs.evolve(
            recipe.backbone, width=width, depth=depth, heads=heads, swiglu_width="truncated",
            decoder=DecoderConfig(width=768, depth=12, heads=12, embed_width=768),
        )  # fmt: skip
        with torch.device("meta"):
            full = trained(released.UNITE({**options, "encoder_model_size": size}))
            ours_full = trained(config.build(recipe.data.image))
        sizes.append(Size(f"UNITE, encoder {size}, decoder Base", full, ours_full, why))
    released.ENCODER_CONFIGS["Base"] = (DEPTH, WIDTH, HEADS)
    released.DECODER_CONFIGS["Base"] = (DEPTH, WIDTH, HEADS, 4 * WIDTH)
    theirs, patch = released.UNITE(options, num_classes=CLASSES).train(), 16
    theirs.encoder.y_embedder.dropout_prob = 0.0
    shake(theirs)
    config = UniteConfig(
        width=WIDTH, depth=DEPTH, heads=HEADS, patch=patch, registers=256, latent_dim=32,
        context=32, context_start=4, attention="sdpa", decoder=DecoderConfig(embed_width=768),
    )  # fmt: skip
    image = ImageSpec(3, 256, 256, CLASSES)

    def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return peer_weights.unite(state, HEADS, CLASSES, patch)

    net = built(config, image, mapped(theirs.state_dict()))
    x, z, label = torch.rand(BATCH, 3, 256, 256) * 2 - 1, torch.randn(BATCH, 256, 32), Y
    drawn = Recorder()
    with torch.no_grad():
        place = theirs.latent_tokens.expand(BATCH, -1, -1)
        answer = theirs.encoder_layer_norm(theirs.encoder(z, t=T, y=label, pos_embed=place))
        with drawn.listening():
            encoded = theirs.encoder_layer_norm(theirs.encode(x))
        start, share = drawn.drawn["randn"][0], drawn.drawn["rand"][0]
        t = share * theirs.modulation_recon_timestep_max
        ours = net.run(
            Denoise(z_t=z, t=T, condition=Labels(label, CLASSES)), Encode(x=x, z_t=start, t=t),
            Decode(z=z),
        )  # fmt: skip
        checks = [
            apart(what, mine, other) for what, mine, other in zip(
                ("denoising, after the norm", "encoding, after the norm", "decoding"), ours,
                (answer, encoded, theirs.decode(z)), strict=True,
            )
        ]  # fmt: skip

    seen: list[Tensor] = []
    losses = theirs.transport.training_losses

    def noting(model: nn.Module, x1: Tensor, t: Tensor, **more: Any) -> Any:
        seen.extend(t.split(BATCH))
        return losses(model, x1, t, **more)

    theirs.transport.training_losses = noting
    drawn = Recorder()
    with drawn.listening():
        their_total, parts = theirs(x, label % CLASSES)
    their_total.backward()
    # Of the noise drawn with each time only the chunk's is used.
    decoding, *_, levels = drawn.drawn["randn_like"]
    share, chosen, place_in_time = drawn.drawn["rand"]
    draw = given(
        label % CLASSES, seen, [drawn.drawn["randn"][0], *levels.split(BATCH), decoding],
        [share, torch.stack([chosen, place_in_time])],
    )  # fmt: skip
    objective = Unite(draws=3, encode_time=theirs.modulation_recon_timestep_max)
    nets = Nets(net, net, Linear(), "x0")
    found = objective.terms(nets, Batch(x=x, condition=draw.condition), draw, "joint")
    found.total.backward()
    checks += [
        losses_apart("loss: reconstruction", found.losses["reconstruction"], parts["rec_loss"]),
        losses_apart("loss: 3 draws", found.losses["denoising"], parts["flow/flow_loss"]),
        gradients_apart(net, mapped(gradients(theirs))),
    ]
    return Found(checks, sizes)


# LDM-is-AE


def ldm_is_ae() -> Found:
    """Latents through an image: network, loss, gradients, and fifty guided steps."""
    from e2ediff_ldm_is_ae.backbone import LDMIsAEConfig
    from e2ediff_ldm_is_ae.objective import LDMIsAE
    from ldm_is_ae.backbone import dit  # type: ignore[import-not-found]
    from ldm_is_ae.denoiser import Denoiser  # type: ignore[import-not-found]

    dit.scaled_dot_product_attention = attend
    dit.JiT_models["tiny/half"] = lambda **options: dit.JiT_half(
        hidden_size=WIDTH, num_heads=HEADS, bottleneck_dim=32, in_context_len=4,
        in_context_start=2, **options,
    )  # fmt: skip
    patch, dim, side, image = 16, 24, 4, ImageSpec(3, 64, 64, CLASSES)
    args = types.SimpleNamespace(
        model="tiny/half", img_size=64, pixel_patch_size=patch, zc=dim, class_num=CLASSES,
        depth_enc=2, depth_dec=DEPTH - 2, z_norm="rms", enc_bp=1, placeholder_k=3.0, xp_ste=False,
        attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0, P_mean=-0.8, P_std=0.8,
        t_eps=5e-2, noise_scale=1.0, lpips_weight=0.0, v_mse_weight=10.0, ema_decay1=0.9999,
        ema_decay2=0.9996, sampling_method="heun", num_sampling_steps=50, cfg=2.2,
        interval_min=0.1, interval_max=1.0,
    )  # fmt: skip
    theirs = Denoiser(args).train()
    shake(theirs)
    encoder, decoder = theirs.forward_encoder, theirs.forward_decoder

    def encoded(xs: Tensor, labels: Tensor, placeholder: Any = None, t: Any = None) -> Any:
        return encoder(xs, nobody(labels) if placeholder is None else labels, placeholder, t)

    theirs.forward_encoder = encoded
    theirs.forward_decoder = lambda z, labels, t=None: decoder(z, nobody(labels), t)
    config = LDMIsAEConfig(
        width=WIDTH, depth=DEPTH, encoder_depth=2, heads=HEADS, patch=patch, latent_dim=dim,
        bottleneck=32, context=4, context_start=2, attention="sdpa",
    )  # fmt: skip

    def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return peer_weights.ldm_is_ae(state, HEADS)

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).mT

    net = built(config, image, mapped(theirs.state_dict()))
    x, z = torch.rand(BATCH, 3, 64, 64) * 2 - 1, torch.randn(BATCH, dim, side, side)
    grid = nn.functional.pixel_unshuffle(x, patch)
    with torch.no_grad():
        e, d, n = net.outputs(
            Encode(x=x), Decode(z=tokens(z)),
            Denoise(z_t=tokens(z), t=T, condition=Labels(Y, CLASSES)),
        )  # fmt: skip
        z_hat, way = theirs.forward_ldm(z, T, Y)
        shuffle = nn.functional.pixel_shuffle
        assert n.image is not None
        checks = [
            apart("encoding", e.value, tokens(theirs.forward_encoder(grid, Y))),
            apart("decoding", d.value, shuffle(theirs.forward_decoder(z, Y), patch)),
            apart("denoising: the image on the way", n.image, shuffle(way, patch)),
            apart("denoising: the latent", n.value, tokens(z_hat)),
        ]

    theirs.sample_t = lambda n, device=None: T
    drawn = Recorder()
    with drawn.listening():
        found = theirs(grid, Y)
    found["loss"].backward()
    nets, objective = Nets(net, net, Linear(), "x0"), LDMIsAE()
    draw = given(Y, [T], [tokens(drawn.drawn["randn"][0])])
    terms = objective.terms(nets, Batch(x=x, condition=draw.condition), draw, "joint")
    terms.total.backward()
    checks += [
        losses_apart("loss: reconstruction", terms.losses["reconstruction"], found["x_mse"]),
        losses_apart("loss: denoising", terms.losses["denoising"], found["v_mse"]),
        losses_apart("loss", terms.total, found["loss"]),
        gradients_apart(net, mapped(gradients(theirs))),
    ]

    label = torch.arange(BATCH)
    drawn = Recorder()
    with drawn.listening():
        their_images = theirs.eval().generate(label)
    guidance = ClassifierFree(scale=2.2, t_min=0.1, exclusive=True)
    denoiser = guidance.wrap(Plain(net.eval(), Linear(), "x0"))
    start = tokens(drawn.drawn["randn"][0])
    end = Heun(steps=50, t_eps=0.05).sample(
        denoiser, start, Labels(label, CLASSES), torch.randn_like
    )
    checks.append(apart("samples, 50 guided steps", net.decode(end), their_images))

    with torch.device("meta"):
        full = dit.JiT_models["JiT-H/half"](
            zc=128, depth_enc=2, depth_dec=30, input_size=256, patch_size=16, num_classes=1000
        )
    size = Size(
        "LDM-is-AE, recipes/ldm_is_ae_in256.yaml", trained(full),
        trained(of_recipe("ldm_is_ae_in256.yaml")),
    )  # fmt: skip
    return Found(checks, [size])


# MeanFlow


GAPS = torch.tensor([0.0, 0.5, 0.2, 0.0])  # from T to the second time; two are one time


class Turned(nn.Module):
    """A network of ours, called as MeanFlow's: time and velocity run from data to noise."""

    def __init__(self, net: Backbone, patch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.patch, self.grid = net, patch, grid

    def forward(self, x: Tensor, times: tuple[Tensor, Tensor], aug_cond: None) -> Tensor:
        """Return the velocity (B, C, H, W) between the time and a gap before it."""
        t, gap = times
        z_t, none = patchify(x, self.patch), Labels(torch.full((len(x),), CLASSES), CLASSES)
        (u,) = self.net.run(Denoise(z_t=z_t, t=1 - t, r=1 - t + gap, condition=none))
        return -unpatchify(u, self.patch, self.grid)


class Wrapped(nn.Module):
    """A network as it is within torch's DDP, by which MeanFlow's loss asks for its classes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Tensor, **more: Tensor) -> Tensor:
        """Return the network's answer."""
        answer: Tensor = self.module(*given, **more)
        return answer


def averaging(side: int, patch: int, channels: int) -> tuple[ViTConfig, ImageSpec]:
    """A `vit` whose denoiser has the weights of MeanFlow's SiT, on latents of that size."""
    config = ViTConfig(
        width=WIDTH, depth=DEPTH, heads=HEADS, patch=8, latent_dim=channels * patch**2,
        latent_norm="none", trunks="denoiser_apart", mlp="gelu", qk_norm=False,
        time_frequencies=128, time_scale=1.0, second_time=True, attention="sdpa",
    )  # fmt: skip
    return config, ImageSpec(3, 8 * side // patch, 8 * side // patch, CLASSES)


def average_velocity_loss(
    net: Backbone, objective: Objective, z: Tensor, eps: Tensor, label: Tensor
) -> Tensor:
    """Our loss between the times T and T + GAPS, of latents that are given."""
    net.encode = lambda x: z  # type: ignore[method-assign]
    draw = given(label, [T, T + GAPS], [eps], [(GAPS == 0).float()])
    images = torch.zeros(BATCH, 3, net.image.height, net.image.width)
    batch, nets = Batch(x=images, condition=draw.condition), Nets(net, net, Linear(), "v")
    return objective.terms(nets, batch, draw, "joint").losses["denoising"]


def mean_flow() -> Found:
    """Latents of 4 channels by the denoiser of `vit`: network, loss, guided loss, gradients."""
    from e2ediff_rivals.mean_flow import MeanFlow, TrainedGuidance
    from loss import SILoss  # type: ignore[import-not-found]
    from sit import SiT  # type: ignore[import-not-found]

    side, patch, channels = 8, 2, 4
    theirs = SiT(input_size=side, patch_size=patch, in_channels=channels, hidden_size=WIDTH,
                 decoder_hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES,
                 fused_attn=False, qk_norm=False).eval()  # fmt: skip
    shake(theirs)

    def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: x for name, x in state.items() if name != "pos_embed"}
        return peer_weights.mean_flow(kept, patch, channels)

    config, image = averaging(side, patch, channels)
    net = built(config, image, mapped(theirs.state_dict()))
    x, r = torch.randn(BATCH, channels, side, side), T + GAPS
    with torch.no_grad():
        (u,) = net.run(Denoise(z_t=patchify(x, patch), t=T, r=r, condition=Labels(Y, CLASSES)))
        ours = -unpatchify(u, patch, (side // patch, side // patch))
        checks = [apart("answer", ours, theirs(x, 1 - r, 1 - T, Y))]

    known = torch.where(Y == CLASSES, 0, Y)
    guidance = TrainedGuidance(scale=1.6, kappa=0.5, t_min=0.2)  # omega 0.8
    for title, objective, options in (
        ("", MeanFlow(apart=0.5, power=0), {"cfg_max_t": -1.0, "label_dropout_prob": 0.0}),
        (", guided", MeanFlow(apart=0.5, power=0, guidance=guidance),
         {"cfg_omega": 0.8, "cfg_kappa": 0.5, "cfg_max_t": 0.8, "label_dropout_prob": 0.3}),
    ):  # fmt: skip
        theirs.zero_grad()
        net.zero_grad()
        loss_of, drawn = SILoss(**options), Recorder()
        loss_of.sample_time_steps = lambda count, device: (1 - r, 1 - T)
        with drawn.listening():
            their_loss = loss_of(Wrapped(theirs), x, {"y": known})[0].mean()
        their_loss.backward()
        label, dropped = known, drawn.drawn.get("rand")
        if dropped:
            label = torch.where(dropped[0] < options["label_dropout_prob"], CLASSES, known)
        z, eps = patchify(x, patch), patchify(drawn.drawn["randn_like"][0], patch)
        loss = average_velocity_loss(net, objective, z, eps, label)
        loss.backward()
        wanted = mapped(gradients(theirs))
        del wanted["embed_mode.denoise"]  # not of theirs
        one = gradients_apart(net, wanted)
        checks += [
            losses_apart(f"loss of average velocities{title}", loss, their_loss),
            attrs.evolve(one, what=one.what + title),
        ]
    return Found(checks, [])


def py_meanflow() -> Found:
    """The adaptive loss, its gradients, and samples in one call, around a network of ours."""
    from e2ediff_rivals.mean_flow import MeanFlow
    from models import meanflow as released  # type: ignore[import-not-found]

    side, patch, channels = 8, 2, 4
    config, image = averaging(side, patch, channels)
    net = config.build(image).train()
    shake(net)
    args = types.SimpleNamespace(norm_eps=0.01, norm_p=1.0, ema_decay=0.99, ema_decays=[])
    theirs = released.MeanFlow(
        lambda: Turned(copy.deepcopy(net), patch, (side // patch, side // patch)), args, {}
    )
    x, r, drawn = torch.randn(BATCH, channels, side, side), T + GAPS, Recorder()
    released.sample_two_timesteps = lambda args, num_samples, device: (1 - T, 1 - r)
    with drawn.listening(), sdpa_kernel(SDPBackend.MATH):  # which has forward derivatives
        their_loss = theirs.forward_with_loss(x, None)
    their_loss.backward()
    wanted = gradients(theirs.net.net)
    z, eps = patchify(x, patch), patchify(drawn.drawn["randn_like"][0], patch)
    loss = average_velocity_loss(net, MeanFlow(apart=0.5), z, eps, nobody(Y))
    loss.backward()
    checks = [losses_apart("adaptive loss", loss, their_loss), gradients_apart(net, wanted)]

    with torch.no_grad(), drawn.listening():
        images = theirs.sample(x.shape, net=theirs.net)
    start = patchify(drawn.drawn["randn"][-1], patch)
    denoiser, none = Plain(net, Linear(), "v"), Labels(nobody(Y), CLASSES)
    z = AverageVelocity(steps=1).sample(denoiser, start, none, torch.randn_like)
    checks.append(apart("samples in one call", z, patchify(images, patch)))
    return Found(checks, [])


# REPA-E


class Constant(nn.Module):
    """A fixed network that answers with the same map (B, K, H, W)."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the map."""
        return [self.get_buffer("answer")]


def repa_e() -> Found:
    """Latents of 16 channels without patches: alignment, losses, and where they send gradients."""
    from e2ediff_rivals.repa_e import RepaE
    from models.sit import SiT  # type: ignore[import-not-found]

    side, channels, block, features, hidden = 4, 16, 2, 24, 64
    theirs = SiT(input_size=side, patch_size=1, in_channels=channels, hidden_size=WIDTH,
                 decoder_hidden_size=WIDTH, encoder_depth=block, depth=DEPTH, num_heads=HEADS,
                 num_classes=CLASSES, z_dims=[features], projector_dim=hidden,
                 fused_attn=False, qk_norm=False, path_type="linear").eval()  # fmt: skip
    shake(theirs)
    theirs.bn.running_var.fill_(1 - theirs.bn.eps)  # leaves latents as they are

    config = ViTConfig(
        width=WIDTH, depth=DEPTH, heads=HEADS, patch=8, latent_dim=channels, latent_norm="none",
        trunks="denoiser_apart", mlp="gelu", qk_norm=False, time_frequencies=128, time_scale=1.0,
        attention="sdpa",
    )  # fmt: skip
    objective = RepaE(
        feature_dim=features, projector_width=hidden, align_block=block, clamp=math.inf
    )
    projector = "projectors.0."

    def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {k: v for k, v in state.items() if k != "pos_embed" and not k.startswith("bn.")}
        return peer_weights.repa_e(kept, 1, channels)

    def projecting(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k.removeprefix(projector): v for k, v in state.items() if k.startswith(projector)}

    net = built(config, ImageSpec(3, 8 * side, 8 * side, CLASSES), mapped(theirs.state_dict()))
    heads = objective.heads(net)
    heads["align"].load_state_dict(projecting(theirs.state_dict()))

    x, eps = torch.randn(BATCH, channels, side, side), torch.randn(BATCH, channels, side, side)
    seen = [torch.randn(BATCH, side * side, features)]
    options = {"path_type": "linear", "prediction": "v", "weighting": "uniform"}
    same: dict[str, Any] = {"time_input": (1 - T).view(-1, 1, 1, 1), "noises": eps}
    # The encoder's update, and then the denoiser's, with the released script's two coefficients.
    x.requires_grad_()
    theirs.requires_grad_(False)
    first = theirs(x, Y, seen, {**options, "align_only": True}, **same)
    (1.5 * first["proj_loss"]).backward()
    theirs.requires_grad_(True)
    theirs.pos_embed.requires_grad_(False)
    second = theirs(x.detach(), Y, seen, {**options, "align_only": False}, **same)
    (second["denoising_loss"].mean() + 0.5 * second["proj_loss"]).backward()
    assert x.grad is not None

    z = patchify(x.detach(), 1).requires_grad_()
    net.encode = lambda images: z  # type: ignore[method-assign]
    answer = seen[0].mT.unflatten(2, (side, side))
    fixed = nn.ModuleDict({"features": Constant(answer)})
    draw = given(Y, [T], [patchify(eps, 1)])
    batch = Batch(x=torch.zeros(BATCH, 3, 8 * side, 8 * side), condition=draw.condition)
    terms = objective.terms(Nets(net, net, Linear(), "v", heads, fixed), batch, draw, "joint")
    align, denoising = terms.losses["align"], terms.losses["denoising"]
    (terms.weights["denoising"] * denoising + terms.weights["align"] * align).backward()
    assert z.grad is not None

    wanted = mapped(gradients(theirs))
    del wanted["embed_mode.denoise"]  # not of theirs
    into_z = patchify(x.grad, 1)
    worst = float((z.grad - into_z).abs().max() / into_z.abs().max())
    return Found([
        losses_apart("alignment, less the constant 1", align - 1, second["proj_loss"]),
        losses_apart("loss of velocities", denoising, second["denoising_loss"].mean()),
        Check("gradient of the latents, 1.5 times the alignment's alone", worst, relative=True),
        gradients_apart(net, wanted),
        attrs.evolve(
            gradients_apart(heads["align"], projecting(gradients(theirs))),
            what="gradients of the projector, 6 tensors",
        ),
    ], [])  # fmt: skip


def critic() -> Found:
    """VQGAN's critic: its answers, its hinge losses, and the weight that adapts to the decoder."""
    from e2ediff_rivals.adversary import Adversary
    from taming.modules.losses import vqperceptual  # type: ignore[import-not-found]

    vqperceptual.LPIPS = NoLPIPS
    layers, channels, weight = 2, 8, 0.8
    theirs = vqperceptual.VQLPIPSWithDiscriminator(
        0, disc_num_layers=layers, disc_ndf=channels, disc_weight=weight, perceptual_weight=0.0
    )
    main = theirs.discriminator.main
    for i, module in enumerate(main):
        if isinstance(module, nn.BatchNorm2d):
            main[i] = nn.GroupNorm(1, module.num_features)
    shake(theirs.discriminator)

    config = ViTConfig(width=WIDTH, depth=2, heads=HEADS, patch=8, latent_dim=8, attention="sdpa")
    net = config.build(ImageSpec(3, 32, 32, CLASSES)).train()
    shake(net)  # its last layer begins at zero
    objective = Adversary(
        of=Detached(reconstruction=PixelLoss(kind="l1")), weight=weight, critic_start=0.0,
        start=0.0, channels=channels, layers=layers,
    )  # fmt: skip
    heads = objective.heads(net)

    def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("main.", "layers."): w for name, w in state.items()}

    ours = heads["critic"]
    unset = ours.load_state_dict(mapped(theirs.discriminator.state_dict()), strict=False)
    if unset.unexpected_keys or any(not name.endswith(".bias") for name in unset.missing_keys):
        raise ValueError(f"the critics differ in {unset}")
    with torch.no_grad():
        for name in unset.missing_keys:  # before a norm theirs has none
            dict(ours.named_parameters())[name].zero_()

    x = torch.rand(BATCH, 3, 32, 32) * 2 - 1
    nets = Nets(net, net, Linear(), "x0", heads)

    def terms(phase: str) -> Terms:
        # The critic's phase decodes anew, from the same draws.
        draw = Draw(
            t=T, condition=Labels(Y, CLASSES), generator=torch.Generator().manual_seed(1),
            times=Uniform(),
        )  # fmt: skip
        return objective.terms(nets, Batch(x=x, condition=draw.condition), draw, phase)

    (phase,) = objective.of.phases
    found = terms(phase)
    decoded = found.decoded
    assert decoded is not None
    adversarial = -theirs.discriminator(decoded).mean()
    reconstruction = (x - decoded).abs().mean()
    factor = theirs.calculate_adaptive_weight(
        2.0**30 * reconstruction, 2.0**30 * adversarial, last_layer=decoded
    )
    total = reconstruction + factor * adversarial
    learns = {name: p for name, p in net.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(total, learns.values(), retain_graph=True, allow_unused=True)
    both = {k: g for k, g in zip(learns, wanted, strict=True) if g is not None and g.any()}
    (found.losses["reconstruction"]
     + found.weights["adversarial"] * found.losses["adversarial"]).backward()  # fmt: skip
    checks = [
        apart("answers", ours(x), theirs.discriminator(x)),
        losses_apart("the decoder's loss", found.losses["adversarial"], adversarial),
        losses_apart("adaptive weight", found.weights["adversarial"], factor),
        attrs.evolve(
            gradients_apart(net, both), what=f"gradients of {len(both)} tensors of the autoencoder"
        ),
    ]
    heads.zero_grad()
    theirs.zero_grad()
    judged = terms("critic")
    judged.total.backward()
    loss, _ = theirs(torch.zeros(1), x, decoded.detach(), 1, 1)
    (2 * loss).backward()
    checks += [
        losses_apart("the critic's loss, twice theirs", judged.total, 2 * loss),
        gradients_apart(ours, mapped(gradients(theirs.discriminator))),
    ]
    return Found(checks, [])


def nobody(labels: Tensor) -> Tensor:
    """Labels of no class."""
    return torch.full_like(labels, CLASSES)


COMPARED = {
    "JiT": jit, "SiT": sit, "UNITE": unite, "LDMisAE": ldm_is_ae, "MeanFlow": mean_flow,
    "py-meanflow": py_meanflow, "REPA-E": repa_e, "taming-transformers": critic,
}  # fmt: skip
PLUGINS = {
    "JiT": "e2ediff-jit", "UNITE": "e2ediff-unite", "LDMisAE": "e2ediff-ldm-is-ae",
    "MeanFlow": "e2ediff-rivals", "py-meanflow": "e2ediff-rivals",
    "REPA-E": "e2ediff-rivals", "taming-transformers": "e2ediff-rivals",
}  # fmt: skip


def has_plugin(name: str) -> None:
    """Look for our side of a project.

    Raises:
        click.UsageError: It is not installed.
    """
    plugin = PLUGINS.get(name, "e2ediff")
    if find_spec(plugin.replace("-", "_")) is None:
        raise click.UsageError(
            f"{name} is compared with the plugin {plugin}: "
            f"pip install -c constraints.txt . plugins/{plugin}"
        )


def commit_of(path: str) -> str:
    """Return the checkout's commit, with a word if files differ from it; "" without git."""
    words = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    done = [
        subprocess.run(["git", "-C", path, *more], capture_output=True, text=True, check=False)
        for more in words
    ]
    if any(one.returncode for one in done):
        return ""
    return done[0].stdout.strip() + (", with changes" if done[1].stdout.strip() else "")


def table(found: Found) -> str:
    """Write both tables of a project."""
    lines = ["| what | largest difference | within 1e-5 |", "|---|---|---|"]
    for one in found.checks:
        kind = ", relative" if one.relative else ""
        lines.append(
            f"| {one.what} | {one.difference:.1e}{kind} | {'yes' if one.holds else 'NO'} |"
        )
    if found.sizes:
        lines += ["", "| trained parameters of | theirs | ours | |", "|---|---|---|---|"]
    for size in found.sizes:
        difference = f"{size.ours - size.theirs:+,}: {size.why}" if size.why else "equal"
        if not size.why and size.ours != size.theirs:
            difference = f"{size.ours - size.theirs:+,}"
        lines.append(f"| {size.what} | {size.theirs:,} | {size.ours:,} | {difference} |")
    return "\n".join(lines)


@click.command()
@click.option("--peer", required=True, metavar="PATH", help="Checkout of one of the projects.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
def main(peer: str, *, as_json: bool) -> None:
    """Compare our networks and losses with the released code at PATH."""
    name = project_in(peer, tuple(COMPARED))
    has_plugin(name)
    torch.manual_seed(0)
    np.random.seed(0)
    with imports_of(peer, torch.device("cpu")):
        found = COMPARED[name]()
    where: dict[str, Any] = {
        "peer": name, "commit": commit_of(peer), "torch": torch.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip
    failed = [one.what for one in found.checks if not one.holds]
    if as_json:
        checks = [{**attrs.asdict(one), "holds": one.holds} for one in found.checks]
        sizes = [attrs.asdict(one) for one in found.sizes]
        said = {"benchmark": "parity", **where, "bar": BAR, "checks": checks, "sizes": sizes}
        click.echo(json.dumps(said))
    else:
        click.echo(", ".join(f"{key} {value}" for key, value in where.items() if value != ""))
        click.echo(f"\n{table(found)}")
    if failed:
        click.echo(f"above {BAR:g}: {'; '.join(failed)}", err=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
