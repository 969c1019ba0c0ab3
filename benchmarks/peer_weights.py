"""Weights of JiT, SiT, DiT, UNITE, LDM-is-AE, MeanFlow and REPA-E under our names, in our order.

Every function takes a state of theirs, by name, and returns ours; what has no place here, such as
fixed positions, is left out. They only pick, cut and order numbers, so they serve gradients too.

Shapes: W width, K a head's width, P patch, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Change = Callable[[Tensor], Tensor]
# A pattern of their name, ours, and what is done to the tensor.
Rule = tuple[str, str, Change]


def as_it_is(x: Tensor) -> Tensor:
    """Return the tensor."""
    return x


def flat(x: Tensor) -> Tensor:
    """A convolution's weight (W, C, P, P) as that of a linear layer of patches (W, C P P)."""
    return x.flatten(1)


def without_batch(x: Tensor) -> Tensor:
    """Tokens (1, N, W) as (N, W)."""
    return x[0]


def pixel_rows(patch: int, channels: int) -> Change:
    """Rows of a layer that ends in patches, from (P, P, C) to (C, P, P).

    Of channels that are predicted besides `channels`, as SiT's sigma, nothing is taken.
    """

    def change(x: Tensor) -> Tensor:
        rows = x.unflatten(0, (patch, patch, -1))[:, :, :channels]
        return rows.movedim(2, 0).flatten(0, 2)

    return change


def turned(heads: int) -> Change:
    """Queries and keys of qkv, whose rotary pairs are (2 i, 2 i + 1), as pairs (i, i + K / 2)."""

    def change(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(0, (3, heads, -1))
        return torch.stack([halves(q, 1), halves(k, 1), v]).flatten(0, 2)

    return change


def halves(x: Tensor, dim: int = 0) -> Tensor:
    """Even places of `dim` before the odd ones."""
    even = torch.arange(0, x.shape[dim], 2)
    return x.index_select(dim, torch.cat([even, even + 1]))


def cosines_first(x: Tensor) -> Tensor:
    """Columns of a layer that reads (sin, cos), for one that reads (cos, sin)."""
    return x.roll(x.shape[1] // 2, 1)


def renamed(state: State, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return what the first fitting rule makes of each tensor; those that none fits are left."""
    found = {}
    for name, x in state.items():
        for pattern, ours, change in rules:
            if match := re.fullmatch(pattern, name):
                found[match.expand(ours)] = change(x)
                break
    return found


def jit(state: State, heads: int, patch: int, channels: int = 3) -> dict[str, Tensor]:
    """JiT's network, for the backbone `jit`."""
    rules = _jit("embed_pixels", "head_pixels", pixel_rows(patch, channels), heads)
    return renamed(state, rules)


def ldm_is_ae(state: State, heads: int) -> dict[str, Tensor]:
    """LDM-is-AE's network, two of JiT's on a grid of patches, for the backbone `ldm_is_ae`."""
    rules = _jit("embed_tokens", "head", as_it_is, heads)
    found = {}
    for theirs, ours in (("model_dec", "dit_d"), ("model_enc", "dit_e")):
        part = renamed(state, [(rf"net\.{theirs}\.(.+)", r"\1", as_it_is)])
        found |= {f"{ours}.{name}": x for name, x in renamed(part, rules).items()}
    return found


def sit(state: State, patch: int = 2, channels: int = 4) -> dict[str, Tensor]:
    """SiT's network or DiT's, for the denoiser of `vit` with a trunk of its own.

    That has an embedding of its mode besides, which must be zero. DiT's weights have the same
    names and shapes, and answer another question: its time runs the other way, over 1,000 steps,
    and it predicts the noise of a variance-preserving path, and a variance, which is left.
    """
    width = state["t_embedder.mlp.2.bias"].shape[0]
    zero = torch.zeros(width, dtype=state["t_embedder.mlp.2.bias"].dtype)
    return {"embed_mode.denoise": zero} | renamed(state, [
        (r"t_embedder\.mlp\.(\d)\.(\w+)", r"embed_time.layers.\1.\2", as_it_is),
        (r"y_embedder\.embedding_table\.weight", "embed_label.weight", as_it_is),
        (r"x_embedder\.proj\.weight", "embed_denoise.weight", flat),
        (r"x_embedder\.proj\.bias", "embed_denoise.bias", as_it_is),
        (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"trunks.denoise.blocks.\1.mlp.inner.\2", as_it_is),
        (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"trunks.denoise.blocks.\1.mlp.outer.\2", as_it_is),
        (r"final_layer\.linear\.(\w+)", r"head_denoise.\1", pixel_rows(patch, channels)),
        *_trunk("trunks.denoise", as_it_is),
    ])  # fmt: skip


def mean_flow(state: State, patch: int = 2, channels: int = 4) -> dict[str, Tensor]:
    """MeanFlow's network, a SiT with a second time, for the denoiser of `vit` with `second_time`.

    Its time runs the other way, from data to noise, and so does its velocity.
    """
    gap = [(r"r_embedder\.mlp\.(\d)\.(\w+)", r"embed_gap.layers.\1.\2", as_it_is)]
    return repa_e(state, patch, channels) | renamed(state, gap)


def repa_e(state: State, patch: int = 1, channels: int = 32) -> dict[str, Tensor]:
    """REPA-E's network, a SiT, for the denoiser of `vit`; its projectors are left.

    Its time runs the other way, from data to noise, and so does its velocity.
    """
    found = sit(state, patch, channels)
    found["embed_time.layers.0.weight"] = of_time_left(found["embed_time.layers.0.weight"])
    for name in ("head_denoise.weight", "head_denoise.bias"):
        found[name] = -found[name]
    return found


def of_time_left(x: Tensor) -> Tensor:
    """Columns of a layer that reads (cos, sin) of f (1 - t), for one that reads those of f t."""
    c, s = x.chunk(2, dim=1)
    f = torch.exp(-math.log(10000) * torch.arange(c.shape[1], device=x.device) / c.shape[1])
    return torch.cat([c * f.cos() + s * f.sin(), c * f.sin() - s * f.cos()], dim=1)


def unite(
    state: State, heads: int, classes: int, patch: int, channels: int = 3
) -> dict[str, Tensor]:
    """UNITE's network, for the backbone `unite`; its random frequencies are a buffer there."""
    pixels, layers = pixel_rows(patch, channels), r"decoder\.decoder_layers\.(\d+)\."
    encoder = renamed(state, [(r"encoder\.(.+)", r"\1", as_it_is)])
    rest = renamed(state, [
        (r"patch_embed\.patch_embeddings\.projection\.weight", "embed_pixels.weight", flat),
        (r"patch_embed\.patch_embeddings\.projection\.bias", "embed_pixels.bias", as_it_is),
        (r"latent_tokens", "embed_register", without_batch),
        (r"encoder_layer_norm\.(\w+)", r"latent_norm.\1", as_it_is),
        (r"up_sample_decoder\.(\w+)", r"decoder.embed.0.\1", as_it_is),
        (r"decoder\.decoder_embed\.(\w+)", r"decoder.embed.1.\1", as_it_is),
        (r"decoder\.trainable_cls_token", "decoder.embed_extra", as_it_is),
        (layers + r"layernorm_before\.(\w+)", r"decoder.blocks.\1.norm1.\2", as_it_is),
        (layers + r"qkv\.(\w+)", r"decoder.blocks.\1.attention.qkv.\2", as_it_is),
        (layers + r"attn_proj\.(\w+)", r"decoder.blocks.\1.attention.out.\2", as_it_is),
        (layers + r"layernorm_after\.(\w+)", r"decoder.blocks.\1.norm2.\2", as_it_is),
        (layers + r"ffn_up\.(\w+)", r"decoder.blocks.\1.mlp.inner.\2", as_it_is),
        (layers + r"ffn_down\.(\w+)", r"decoder.blocks.\1.mlp.outer.\2", as_it_is),
        (r"decoder\.decoder_norm\.(\w+)", r"decoder.norm.\1", as_it_is),
        (r"decoder\.decoder_pred\.(\w+)", r"decoder.head.\1", pixels),
    ])  # fmt: skip
    inner = renamed(encoder, [
        (r"up_sample\.(\w+)", r"embed_latent.\1", as_it_is),
        (r"t_embedder\.mlp\.0\.weight", "embed_time.layers.0.weight", cosines_first),
        (r"t_embedder\.mlp\.(\d)\.(\w+)", r"embed_time.layers.\1.\2", as_it_is),
        (r"t_embedder\.W", "embed_time.frequencies", lambda w: 2 * math.pi * w),
        (r"y_embedder\.embedding_table\.weight", "embed_label.weight",
         lambda table: table[: classes + 1]),
        (r"in_context_posemb", "embed_context", without_batch),
        (r"blocks\.(\d+)\.norm3\.weight", r"trunk.blocks.\1.after.weight", as_it_is),
        (r"final_layer\.linear\.(\w+)", r"head_latent.\1", as_it_is),
        *_gated_trunk("trunk", heads),
    ])  # fmt: skip
    return {**rest, **inner}


def _jit(embed: str, head: str, last: Change, heads: int) -> list[Rule]:
    """JiT's names, with ours of the layers that its tokens come in and go out by."""
    return [
        (r"t_embedder\.mlp\.(\d)\.(\w+)", r"embed_time.layers.\1.\2", as_it_is),
        (r"y_embedder\.embedding_table\.weight", "embed_label.weight", as_it_is),
        (r"x_embedder\.proj1\.weight", f"{embed}.0.weight", flat),
        (r"x_embedder\.proj2\.weight", f"{embed}.1.weight", flat),
        (r"x_embedder\.proj2\.bias", f"{embed}.1.bias", as_it_is),
        (r"in_context_posemb", "embed_context", without_batch),
        (r"final_layer\.linear\.(\w+)", rf"{head}.\1", last),
        *_gated_trunk("trunk", heads),
    ]


def _trunk(ours: str, qkv: Change) -> list[Rule]:
    """What all three call the same: attention, modulations, and norms that have weights."""
    block = rf"{ours}.blocks.\1."
    return [
        (r"blocks\.(\d+)\.(norm[12])\.weight", rf"{block}\2.weight", as_it_is),
        (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", rf"{block}attention.qkv.\2", qkv),
        (r"blocks\.(\d+)\.attn\.([qk]_norm)\.weight", rf"{block}attention.\2.weight", halves),
        (r"blocks\.(\d+)\.attn\.proj\.(\w+)", rf"{block}attention.out.\2", as_it_is),
        (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", rf"{block}modulation.\2", as_it_is),
        (r"final_layer\.norm_final\.weight", f"{ours}.norm.weight", as_it_is),
        (r"final_layer\.adaLN_modulation\.1\.(\w+)", rf"{ours}.final.\1", as_it_is),
    ]


def _gated_trunk(ours: str, heads: int) -> list[Rule]:
    """JiT's and UNITE's blocks: rotary positions and SwiGLU besides."""
    return [
        (r"blocks\.(\d+)\.mlp\.w12\.(\w+)", rf"{ours}.blocks.\1.mlp.inner.\2", as_it_is),
        (r"blocks\.(\d+)\.mlp\.w3\.(\w+)", rf"{ours}.blocks.\1.mlp.outer.\2", as_it_is),
        *_trunk(ours, turned(heads)),
    ]
