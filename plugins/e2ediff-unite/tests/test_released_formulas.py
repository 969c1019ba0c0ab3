"""UNITE's network and training step are those of its released code, written out here by hand.

The formulas are in float64, on images in [0, 1] and weights in the layout of the code (commit
2389f2c), to which `released` maps ours: queries and keys turn in pairs (2i, 2i + 1), time features
are sines and then cosines, pixels of the decoder are (row, column, channel), and the maps from and
to pixels hold the change of range. So this also says how its checkpoints would be read.
"""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from e2ediff_testing import make_batch, make_draw, make_nets
from e2ediff_unite.backbone import UniteConfig, line_positions, normal_quantiles
from e2ediff_unite.decoder import DecoderConfig
from e2ediff_unite.objective import Unite
from published import peer_weights
from torch import Tensor, nn

from e2ediff.backbone import Encode
from e2ediff.data import ImageSpec
from e2ediff.latent import LatentNorm
from e2ediff.objective import Draw

PATCH, CHANNELS, REGISTERS, DIM = 8, 3, 4, 4
WIDTH, DEPTH, HEADS, CONTEXT, CONTEXT_START = 16, 3, 2, 2, 1
CONFIG = UniteConfig(
    width=WIDTH, depth=DEPTH, heads=HEADS, patch=PATCH, registers=REGISTERS, latent_dim=DIM,
    context=CONTEXT, context_start=CONTEXT_START,
    decoder=DecoderConfig(width=24, depth=2, heads=3, embed_width=20),
)  # fmt: skip
BATCH = make_batch()
COUNT = len(BATCH.x)
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def nets():
    """Networks without the zeros of a fresh start, and with norms that are not those of one."""
    found, g = make_nets(CONFIG, Unite()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in found.online.parameters():
            p += 0.15 * torch.randn(p.shape, generator=g)
    return found


# Our weights in the code's layout; gradients of the formulas reach ours through this.


def interleaved(rows: Tensor) -> Tensor:
    """Rows of all heads, first halves and second halves of each, in pairs."""
    heads = rows.reshape(-1, 2, WIDTH // HEADS // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def released(net, *, ranged: bool = True) -> dict[str, Tensor]:
    """Weights by our names, in float64 and the code's layout.

    With `ranged` for images in [0, 1], and else in [-1, 1].
    """
    w = {name: p.double() for name, p in net.named_parameters()}
    for name in [*w]:
        if ".attention.qkv." in name and name.startswith("trunk"):
            q, k, v = w[name].chunk(3)
            w[name] = torch.cat([interleaved(q), interleaved(k), v])
        elif "q_norm" in name or "k_norm" in name:
            w[name] = interleaved(w[name])
    cosines, sines = w["embed_time.layers.0.weight"].chunk(2, dim=1)
    w["embed_time.layers.0.weight"] = torch.cat([sines, cosines], dim=1)
    # W (2 x - 1) + b = 2 W x + (b - W 1), and (W' h + b' + 1) / 2 of the answer
    pixels, times = w["embed_pixels.weight"], 2 if ranged else 1
    if ranged:
        w["embed_pixels.bias"] = w["embed_pixels.bias"] - pixels.sum(dim=1)
    w["embed_pixels.weight"] = (times * pixels).reshape(WIDTH, CHANNELS, PATCH, PATCH)
    for name, shift in (("decoder.head.weight", 0), ("decoder.head.bias", 1)):
        rows = (w[name] + shift) / 2 if ranged else w[name]
        rows = rows.reshape(CHANNELS, PATCH, PATCH, *rows.shape[1:]).movedim(0, 2)
        w[name] = rows.reshape(w[name].shape)
    return w


# The formulas


def linear(w, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms(w, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def centred(w, name: str, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def turned(x: Tensor, unturned: int) -> Tensor:
    """Queries or keys (B, N, heads, K), turned by their place on the line of what has one."""
    size = x.shape[-1]
    place = torch.arange(x.shape[1] - unturned, dtype=torch.float64)
    place = torch.cat([torch.zeros(unturned, dtype=torch.float64), place])
    pair = torch.arange(size // 2, dtype=torch.float64)
    angle = place[:, None, None] * 10000 ** (-2 * pair / size)  # (N, 1, K / 2)
    a, b = x[..., 0::2], x[..., 1::2]
    both = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.stack(both, dim=-1).flatten(-2)


def attention(w, name: str, x: Tensor, heads: int, unturned: int | None) -> Tensor:
    """Self-attention; with a number of unturned tokens its queries and keys are normed first."""
    q, k, v = linear(w, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).unbind(2)
    if unturned is not None:
        q = turned(rms(w, f"{name}.q_norm", q), unturned)
        k = turned(rms(w, f"{name}.k_norm", k), unturned)
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)
    return linear(w, f"{name}.out", out.flatten(-2))


def encoder(w, z_t: Tensor, t: Tensor, label: Tensor, x: Tensor | None = None) -> Tensor:
    """The generative encoder's answer, normed: of registers alone, or next to an image's patches.

    Args:
        z_t: (B, N, D).
        t: (B,).
        label: (B,), the last row of the table being that of no class.
        x: Images in [0, 1].
    """
    h = linear(w, "embed_latent", z_t) + w["embed_register"]
    if x is not None:
        kernel = w["embed_pixels.weight"]
        patches = torch.nn.functional.conv2d(x, kernel, w["embed_pixels.bias"], stride=PATCH)
        h = torch.cat([h, patches.flatten(2).transpose(1, 2)], dim=1)
    angle = 2 * math.pi * t[:, None] * normal_quantiles(256).double()
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    named = w["embed_label.weight"][label]
    c = linear(w, "embed_time.layers.2", silu(linear(w, "embed_time.layers.0", waves))) + named
    extra = 0
    for i in range(DEPTH):
        if i == CONTEXT_START:
            h, extra = torch.cat([named[:, None] + w["embed_context"], h], dim=1), CONTEXT
        block = f"trunk.blocks.{i}"
        vectors = linear(w, f"{block}.modulation", silu(c))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = vectors
        inner = rms(w, f"{block}.norm1", h) * (1 + scale) + shift
        h = h + gate * attention(w, f"{block}.attention", inner, HEADS, extra)
        inner = rms(w, f"{block}.norm2", h) * (1 + scale2) + shift2
        a, b = linear(w, f"{block}.mlp.inner", inner).chunk(2, dim=-1)
        h = rms(w, f"{block}.after", h + gate2 * linear(w, f"{block}.mlp.outer", silu(a) * b))
    shift, scale = linear(w, "trunk.final", silu(c))[:, None].chunk(2, dim=-1)
    h = rms(w, "trunk.norm", h[:, extra : extra + REGISTERS]) * (1 + scale) + shift
    return centred(w, "latent_norm", linear(w, "head_latent", h), 1e-5)


def decoder(w, z: Tensor) -> Tensor:
    """Images in [0, 1] (B, C, H, W), of as many latents as patches, two rows of them."""
    width, side = 24, 2
    wave = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (torch.arange(side**2) // side)[:, None], (torch.arange(side**2) % side)[:, None]
    place = [f(axis * wave) for axis in (column, row) for f in (torch.sin, torch.cos)]
    h = linear(w, "decoder.embed.1", linear(w, "decoder.embed.0", z)) + torch.cat(place, dim=1)
    h = torch.cat([w["decoder.embed_extra"].expand(len(h), 1, -1), h], dim=1)
    for i in range(2):
        block = f"decoder.blocks.{i}"
        inner = centred(w, f"{block}.norm1", h, 1e-12)
        h = h + attention(w, f"{block}.attention", inner, 3, None)
        inner = linear(w, f"{block}.mlp.inner", centred(w, f"{block}.norm2", h, 1e-12))
        gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        h = h + linear(w, f"{block}.mlp.outer", gelu)
    out = linear(w, "decoder.head", centred(w, "decoder.norm", h[:, 1:], 1e-12))
    out = out.reshape(len(z), side, side, PATCH, PATCH, CHANNELS)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(z), CHANNELS, side * PATCH, side * PATCH)


def mixed(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return t[:, None, None] * x + (1 - t[:, None, None]) * noise


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def test_the_denoiser_is_the_released_one(nets) -> None:
    net, z, label = nets.online, normal(COUNT, REGISTERS, DIM), BATCH.condition.label
    t = torch.linspace(0.01, 0.99, COUNT)
    ours = net.denoise(z, t, BATCH.condition).double()
    torch.testing.assert_close(
        ours, encoder(released(net), z.double(), t.double(), label), **CLOSE
    )


def test_the_encoder_is_the_released_one(nets) -> None:
    net, z = nets.online, normal(COUNT, REGISTERS, DIM)
    t = torch.linspace(0.0, 0.01, COUNT)
    null = BATCH.condition.null().label
    (ours,) = net.run(Encode(x=BATCH.x, z_t=z, t=t))
    images = (BATCH.x.double() + 1) / 2
    theirs = encoder(released(net), z.double(), t.double(), null, images)
    torch.testing.assert_close(ours.double(), theirs, **CLOSE)


def test_the_decoder_is_the_released_one(nets) -> None:
    z = normal(COUNT, REGISTERS, DIM)
    ours = (nets.online.decode(z).double() + 1) / 2
    torch.testing.assert_close(ours, decoder(released(nets.online), z.double()), **CLOSE)


NAMES = [  # ours, and the released code's
    ("embed_latent.", "encoder.up_sample."),
    ("embed_time.layers.", "encoder.t_embedder.mlp."),
    ("embed_context", "encoder.in_context_posemb"),
    ("trunk.final.", "encoder.final_layer.adaLN_modulation.1."),
    ("trunk.norm.", "encoder.final_layer.norm_final."),
    ("head_latent.", "encoder.final_layer.linear."),
    ("trunk.blocks.", "encoder.blocks."),
    ("latent_norm.", "encoder_layer_norm."),
    ("embed_register", "latent_tokens"),
    ("embed_pixels.", "patch_embed.patch_embeddings.projection."),
    ("embed_label.weight", "encoder.y_embedder.embedding_table.weight"),
    ("decoder.embed.0.", "up_sample_decoder."),
    ("decoder.embed.1.", "decoder.decoder_embed."),
    ("decoder.embed_extra", "decoder.trainable_cls_token"),
    ("decoder.blocks.", "decoder.decoder_layers."),
    ("decoder.norm.", "decoder.decoder_norm."),
    ("decoder.head.", "decoder.decoder_pred."),
]
INSIDE = {
    "encoder.blocks.": [
        (".attention.qkv.", ".attn.qkv."), (".attention.q_norm.", ".attn.q_norm."),
        (".attention.k_norm.", ".attn.k_norm."), (".attention.out.", ".attn.proj."),
        (".mlp.inner.", ".mlp.w12."), (".mlp.outer.", ".mlp.w3."), (".after.", ".norm3."),
        (".modulation.", ".adaLN_modulation.1."),
    ],
    "decoder.decoder_layers.": [
        (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
        (".attention.qkv.", ".qkv."), (".attention.out.", ".attn_proj."),
        (".mlp.inner.", ".ffn_up."), (".mlp.outer.", ".ffn_down."),
    ],
}  # fmt: skip


def their_name(name: str) -> str:
    """The released code's name of a weight of ours."""
    ours, theirs = next(pair for pair in NAMES if name.startswith(pair[0]))
    found = theirs + name.removeprefix(ours)
    for mine, other in INSIDE.get(theirs, []):
        found = found.replace(mine, other)
    return found


def test_the_map_of_its_checkpoints_gives_every_weight_its_place(nets) -> None:
    """`unite` of `benchmarks/peer_weights.py`, with what the code has besides."""
    w = released(nets.online, ranged=False)
    state = {their_name(name): value.float() for name, value in w.items()}
    for name in ("latent_tokens", "encoder.in_context_posemb"):
        state[name] = state[name][None]
    table, classes = "encoder.y_embedder.embedding_table.weight", len(w["embed_label.weight"]) - 1
    state[table] = torch.cat([state[table], torch.zeros(1, WIDTH)])  # a row that nothing uses
    # of the buffers the code saves the frequencies
    own = {name: p.detach() for name, p in nets.online.named_parameters()}
    own["embed_time.frequencies"] = frequencies = nets.online.embed_time.frequencies
    state["encoder.t_embedder.W"] = frequencies / (2 * math.pi)

    mapped = peer_weights().unite(state, HEADS, classes, PATCH, CHANNELS)
    assert mapped.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(mapped[name].reshape(value.shape), value, msg=name)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "parameters"),
    [(768, 12, 12, 217_642_080), (1024, 12, 16, 318_819_408), (1024, 24, 16, 545_526_336),
     (1152, 28, 16, 762_774_048)],
    ids=["B", "M", "L", "XL"],
)  # fmt: skip
def test_all_released_sizes_have_the_released_parameters(width, depth, heads, parameters) -> None:
    """Less the code's two unused vectors of the encoder's width; all with the decoder of B."""
    decoder = DecoderConfig(width=768, depth=12, heads=12, embed_width=768)
    config = UniteConfig(
        width=width, depth=depth, heads=heads, patch=16, registers=256, latent_dim=32, context=32,
        context_start=4, decoder=decoder, swiglu_width="truncated",
    )  # fmt: skip
    with torch.device("meta"):
        net = config.build(ImageSpec(3, 256, 256, 1000))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == parameters


def test_registers_begin_at_the_released_positions() -> None:
    n, i = torch.arange(REGISTERS)[:, None], torch.arange(WIDTH // 2)
    angle = n / 10000.0 ** (2 * i / WIDTH)
    expected = torch.cat([angle.sin(), angle.cos()], dim=1)
    torch.testing.assert_close(line_positions(REGISTERS, WIDTH), expected, **CLOSE)
    torch.testing.assert_close(make_nets(CONFIG).online.embed_register.detach(), expected, **CLOSE)


@attrs.frozen(eq=False, kw_only=True)
class Heard(Draw):
    """A draw that keeps what it gave."""

    told: list[Tensor]

    def _tell(self, value: Tensor) -> Tensor:
        self.told.append(value.double())
        return value

    def noise(self, like: Tensor) -> Tensor:
        return self._tell(Draw.noise(self, like))

    def uniform(self, *shape: int) -> Tensor:
        return self._tell(Draw.uniform(self, *shape))

    def further_times(self) -> Tensor:
        return self._tell(Draw.further_times(self))


def released_losses(w, t: Tensor, label: Tensor, told: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The reconstruction and the sum over draws, of what was drawn for our step."""
    images, null = (BATCH.x.double() + 1) / 2, BATCH.condition.null().label
    start, early, noise, *further, decoding, decode_noise = told
    z = encoder(w, start, 0.01 * early, null, images)
    draws = [(t, label, noise)]
    for k in range(0, len(further), 3):
        times, u, noise = further[k : k + 3]
        draws.append((times, torch.where(u < 0.5, null, BATCH.condition.label), noise))
    flow = torch.zeros((), dtype=torch.float64)
    clean = z.detach()
    for times, labels, eps in draws:
        z_t = mixed(clean, eps, times)
        span = (1 - times).clamp_min(0.05)[:, None, None]
        answer = encoder(w, z_t, times, labels)
        flow = flow + ((clean - z_t) / span - (answer - z_t) / span).square().mean()
    chosen, late = decoding
    noised = mixed(z, decode_noise, 0.7 + 0.3 * late)
    noised = torch.where((chosen < 0.5)[:, None, None], noised, z)
    return (decoder(w, noised) - images).abs().mean(), flow


def test_a_training_step_has_the_released_losses_and_gradients(nets) -> None:
    """Twice its loss, with `denoising_weight: 2`; one time is past the clamp.

    Ours has its layers in float64, too: what a gradient loses in float32 depends on the CPU, and
    reaches the bound on some.
    """
    objective = Unite(draws=3, denoising_weight=2.0)
    nets.online.double()
    for layer in nets.online.modules():
        if isinstance(layer, nn.Linear | nn.RMSNorm | nn.LayerNorm | nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, given: given[0].double())
        elif isinstance(layer, LatentNorm):
            layer.float()
    batch = attrs.evolve(BATCH, x=BATCH.x.double())
    made, told = make_draw(BATCH), []
    t = made.t.clone()
    t[0] = 0.98
    draw = Heard(t=t.double(), condition=BATCH.condition, generator=made.generator,
                 times=made.times, label_drop=0.5, told=told)  # fmt: skip
    terms = objective.terms(nets, batch, draw, "joint")
    reconstruction, flow = released_losses(
        released(nets.online), t.double(), BATCH.condition.label, told
    )
    found = terms.losses
    torch.testing.assert_close(found["reconstruction"].double(), 2 * reconstruction, **CLOSE)
    torch.testing.assert_close(found["denoising"].double(), flow, rtol=1e-5, atol=0)

    named = dict(nets.online.named_parameters())
    ours = torch.autograd.grad(terms.total, named.values())
    theirs = torch.autograd.grad(2 * (reconstruction + flow), named.values())
    for name, a, b in zip(named, ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-6, name
