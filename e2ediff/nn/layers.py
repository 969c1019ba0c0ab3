"""Layers that transformers share: patches, positions, conditioning, blocks, a trunk.

Shapes: B batch, C H W image, N tokens, W trunk width (image width is spelled out), P patch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from e2ediff.nn.attention import Attend, sdpa

Modulation = Literal["block", "shared", "lowrank"]
MLPKind = Literal["gelu", "relu2", "swiglu"]
TokenNorm = Literal["layer", "rms"]
SwiGLUWidth = Literal["multiple_of_8", "truncated"]


def patchify(x: Tensor, patch: int) -> Tensor:
    """Non-overlapping patches, (B, C, H, width) -> (B, N, C P P), row by row."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), -1)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`, (B, N, C P P) -> (B, C, H, width)."""
    b, (rows, columns) = len(tokens), grid
    x = tokens.reshape(b, rows, columns, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, rows * patch, columns * patch)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine and cosine positions, (N, W); W divisible by 4.

    Source: MAE (He et al. 2021, arXiv 2111.06377), released code.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))  # (W/4,)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]  # (N, W/4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def rotary_angles(grid: tuple[int, ...], head_dim: int, base: float = 100.0) -> Tensor:
    """Angles of rotary positions on a line, a plane or more, (N, K/2).

    Each axis of `grid` turns an equal share of them; K must be a multiple of twice the number of
    axes.
    The slowest angle turns about `base` times as slowly as the fastest, one radian a token.

    Source: Su et al. 2021 (arXiv 2104.09864), axial form.
    """
    share = head_dim // (2 * len(grid))
    frequencies = base ** (-torch.arange(share) / share)
    places = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return torch.cat([p.reshape(-1, 1) * frequencies for p in places], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + K/2) of x (B, N, heads, K) by angles whose cos, sin are (N, 1, K/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Rotary(nn.Module):
    """The cos and sin (N, 1, K/2) of rotary positions, which a trunk turns queries and keys by.

    `grid`, `head_dim` and `base` are those of `rotary_angles`; no checkpoint holds the figures.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, ...], head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        angles = rotary_angles(grid, head_dim, base)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return cos and sin for the first `tokens` positions, or for all."""
        return self.cos[:tokens], self.sin[:tokens]


def time_frequencies(count: int = 64, scale: float = 1000.0) -> Tensor:
    """Frequencies of time embeddings, (count,): from `scale` radians over [0, 1] down.

    They fall by the same factor from each to the next, and by 10,000 over all of them.

    Source: DiT's released code has 128 of t in [0, 1000], a `scale` of 1000, and SiT's the same
    128 of t in [0, 1], a `scale` of 1. Ours: 64, every second of DiT's.
    """
    return scale * torch.exp(-math.log(10000) * torch.arange(count) / count)


class TimeEmbedding(nn.Module):
    """Time (B,) in [0, 1] to conditioning (B, W): cosines and sines, then two linear layers.

    Times of tokens, (B, N), become (B, N, W).

    `frequencies` (F,), in radians over [0, 1], gives 2 F waves; by default those of
    `time_frequencies`.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: Tensor | None = None) -> None:
        super().__init__()
        if frequencies is None:
            frequencies = time_frequencies()
        size = 2 * len(frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    @override
    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[..., None] * self.frequencies
        first, *others = self.layers
        # Half precision cannot tell late times apart by the slow waves, which hardly move there.
        with uncast(angles.device):
            embedded: Tensor = first(torch.cat([angles.cos(), angles.sin()], dim=-1))
        for layer in others:
            embedded = layer(embedded)
        return embedded


def uncast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compute in the types of the tensors inside the block, also under autocast."""
    if device.type == "meta":  # which has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """Tokens or vectors that autocast made half precision, in float32; others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class MLP(nn.Module):
    """Two-layer perceptron of a block; `ratio` is hidden over W, cut by a third for swiglu.

    `relu2` (squared ReLU) is the cheapest on a CPU, where tanh and erf are slow.
    `swiglu_width` says how swiglu's two thirds become whole: the nearest `multiple_of_8`, which
    kernels like, or `truncated`, as in the released code of JiT and UNITE. Both are one number at
    widths of 768 and 1152 with a ratio of 4.
    """

    def __init__(
        self,
        width: int,
        ratio: float,
        kind: MLPKind,
        swiglu_width: SwiGLUWidth = "multiple_of_8",
    ) -> None:
        super().__init__()
        self.kind = kind
        hidden = int(width * ratio)
        if kind == "swiglu" and swiglu_width == "multiple_of_8":
            hidden = 8 * round(hidden * 2 / 3 / 8)
        elif kind == "swiglu":
            hidden = hidden * 2 // 3
        self.inner = nn.Linear(width, 2 * hidden if kind == "swiglu" else hidden)
        self.outer = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)."""
        h = self.inner(x)
        if self.kind == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = functional.silu(gate) * h
        elif self.kind == "relu2":
            h = functional.relu(h).square()
        else:
            h = functional.gelu(h, approximate="tanh")
        out: Tensor = self.outer(h)
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention with optional normalised queries and keys."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.attend: Attend = sdpa
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, N, W) -> (B, N, W); `turn` holds the cos and sin of rotary positions."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).unbind(dim=2)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())  # under autocast, too
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        # Kernels want one type for all three; norms and rotations may have left q, k in float32.
        attended = self.attend(q.to(v.dtype), k.to(v.dtype), v)
        out: Tensor = self.out(attended.reshape(b, n, width))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, W) scaled by 1 + scale and shifted, both (B, W), or (B, N, W) for each token.

    The sum is taken in float32 at least: in bfloat16, whose steps at 1 are 2^-7, a scale of 0.05
    would be a few per cent off.
    """
    return added(of_tokens(shift), x, 1 + of_tokens(widened(scale)))


def added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b; in one operation if all are of one type, which autocast's are not."""
    if x.dtype == a.dtype == b.dtype:
        return torch.addcmul(x, a, b)
    return x + a * b


def of_tokens(vectors: Tensor) -> Tensor:
    """Vectors of tokens (B, N, W) as they are; those of whole latents (B, W) as (B, 1, W)."""
    return vectors if vectors.ndim == 3 else vectors[:, None]


def token_norm(kind: TokenNorm, width: int) -> nn.Module:
    """The norm of tokens (B, N, W) before a modulation: `layer` has no weights, `rms` a scale."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """Pre-norm transformer block with adaLN-zero conditioning.

    `modulation` says where the six vectors of a block come from: its own linear layer, one
    shared by all blocks plus a learned offset, or the shared one plus a low-rank layer.
    `norm` is that of tokens before attention and perceptron.

    Source: DiT (Peebles & Xie 2022, arXiv 2212.09748), section 3.2; the shared form as PixArt's
    adaLN-single (arXiv 2310.00426), section 2.3.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: MLP,
        modulation: Modulation,
        rank: int = 128,
        *,
        qk_norm: bool = True,
        norm: TokenNorm = "layer",
    ) -> None:
        super().__init__()
        self.norm1 = token_norm(norm, width)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm)
        self.norm2 = token_norm(norm, width)
        self.mlp = mlp
        self.modulation: nn.Module | None = None
        if modulation == "block":
            self.modulation = nn.Linear(width, 6 * width)
        elif modulation == "lowrank":
            self.modulation = nn.Sequential(
                nn.Linear(width, rank, bias=False), nn.Linear(rank, 6 * width)
            )
        if modulation == "shared":
            self.offset = nn.Parameter(torch.zeros(6 * width))
        self.shared = modulation != "block"

    def forward(
        self, x: Tensor, c: Tensor, common: Tensor | None, turn: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Tokens (B, N, W) under conditioning c (B, W), with the shared vectors (B, 6 W).

        Both may be those of each token: c (B, N, W) and the shared vectors (B, N, 6 W).
        """
        vectors = self.modulation(c) if self.modulation is not None else self.offset
        if common is not None:
            vectors = common + vectors
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
        h = self.attention(modulate(self.norm1(x), shift1, scale1), turn)
        x = added(x, of_tokens(gate1), h)
        h = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return added(x, of_tokens(gate2), h)


@attrs.frozen(eq=False)
class Context:
    """Tokens (B, K, W) that a trunk puts before the others after its first `start` blocks.

    They have no position, so rotary positions leave them as they are.

    Source: in-context class tokens of JiT (Li & He 2025, arXiv 2511.13720), section 4.
    """

    tokens: Tensor
    start: int

    @classmethod
    def of(cls, condition: Tensor, places: Tensor, start: int) -> Context | None:
        """Tokens of a condition (B, W), one for each learned place (K, W); None for none."""
        return cls(condition[:, None] + places, start) if len(places) else None


def context_problems(context: int, start: int, depth: int) -> list[tuple[str, str]]:
    """What a backbone's `problems` says of `context_start`: its context would never join."""
    if context == 0 or start < depth:
        return []
    return [("context_start", f"{start} is past the last block; there are {depth}")]


class Trunk(nn.Module):
    """A stack of blocks, ended by a modulated norm; takes any number of tokens.

    The residual stream, to which every block adds, is float32, also under autocast.
    """

    def __init__(
        self, blocks: Sequence[Block], width: int, *, shared: bool, norm: TokenNorm = "layer"
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.common = nn.Linear(width, 6 * width) if shared else None
        self.norm = token_norm(norm, width)
        self.final = nn.Linear(width, 2 * width)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        taps: frozenset[int],
        turn: tuple[Tensor, Tensor] | None,
        context: Context | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Normalised tokens (B, N, W), and the tokens after the tapped blocks (1 is the first).

        Conditioning c is (B, W), or (B, N, W) where there is no context.
        Context tokens take part in attention, and are in neither of the two results.
        """
        x, c = widened(x), functional.silu(c)
        common = self.common(c) if self.common is not None else None
        features, extra = {}, 0
        for i, block in enumerate(self.blocks, start=1):
            if context is not None and i == context.start + 1:
                x = torch.cat([context.tokens.to(x.dtype), x], dim=1)
                extra = context.tokens.shape[1]
                turn = _unturned(turn, extra)
            x = block(x, c, common, turn)
            if i in taps:
                features[i] = x[:, extra:]
        x = x[:, extra:]
        shift, scale = self.final(c).chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale), features


def parted(
    x: Tensor,
    features: Mapping[int, Tensor],
    sizes: Sequence[int],
    taps: Sequence[tuple[int, ...]],
) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Split a trunk's tokens and features into batches of these sizes, each with its own taps."""
    split = {tap: torch.split(f, [*sizes]) for tap, f in features.items()}
    return [
        (own, {tap: split[tap][i] for tap in wanted})
        for i, (own, wanted) in enumerate(zip(torch.split(x, [*sizes]), taps, strict=True))
    ]


class Residual(nn.Module):
    """x + two 3x3 convolutions of it (B, C, H, W), a ReLU before each; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)  # type: ignore[arg-type]

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(functional.relu(self.inner(functional.relu(x))))
        return out


def initialise(net: nn.Module, small: Iterable[Tensor], zero: Iterable[nn.Linear] = ()) -> None:
    """Start a network as a DiT: every block leaves its tokens as they are.

    All linears are Xavier's without bias; `small` (embeddings, tokens) is normal with std 0.02;
    what modulates blocks and trunks is zero, and `zero` too.
    Randomness: torch's global generator, linears in the order of `net.modules()`, then `small`.

    Source: DiT (Peebles & Xie 2022, arXiv 2212.09748), section 3.2, and its released code. There
    the two layers of the time embedding are normal with std 0.02, which here they are only if a
    network puts them into `small`.
    """
    zeros = [*zero]
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Trunk):
            zeros += [module.final] + ([module.common] if module.common is not None else [])
        elif isinstance(module, Block) and isinstance(module.modulation, nn.Linear):
            zeros.append(module.modulation)
        elif isinstance(module, Block) and isinstance(module.modulation, nn.Sequential):
            zeros += [m for m in module.modulation[1:] if isinstance(m, nn.Linear)]
    for tensor in small:
        nn.init.normal_(tensor, std=0.02)
    for linear in zeros:
        nn.init.zeros_(linear.weight)


def _unturned(turn: tuple[Tensor, Tensor] | None, count: int) -> tuple[Tensor, Tensor] | None:
    """The cos and sin of rotary positions with `count` tokens before them that do not turn."""
    if turn is None:
        return None
    cos, sin = turn
    one, zero = cos.new_ones(count, *cos.shape[1:]), sin.new_zeros(count, *sin.shape[1:])
    return torch.cat([one, cos]), torch.cat([zero, sin])
