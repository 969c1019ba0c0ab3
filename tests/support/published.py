"""Published networks as plain formulas of weights that have the names of their released code.

SiT (Ma et al. 2024, arXiv 2401.08740) and JiT (Li & He 2025, arXiv 2511.13720), whose weights
`benchmarks/peer_weights.py` brings under our names. Written from the equations, for tiny shapes.

Shapes: B batch, C channels, S the side of an image in pixels, G of its grid, P of a patch,
N = G G tokens, W width, H heads, K = W / H.
"""

from __future__ import annotations

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

PLACE = Path(__file__).parents[2] / "benchmarks" / "peer_weights.py"


def peer_weights() -> ModuleType:
    """`benchmarks/peer_weights.py`, which is in no package."""
    spec = spec_from_file_location("peer_weights", PLACE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of these shapes, none of them zero; those of norms lie around 1."""
    g, found = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g)
        if len(shape) > 1:
            found[name] = x / math.sqrt(math.prod(shape[1:]))
        else:
            found[name] = (1.0 if "norm" in name else 0.0) + 0.2 * x
    return found


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def time_waves(t: Tensor, count: int = 128) -> Tensor:
    """cos and sin of t / 10000^(i / count), (B, 2 count)."""
    angles = torch.stack([t / 10000 ** (i / count) for i in range(count)], dim=1)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def conditioning(w: dict[str, Tensor], t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding of time and class, and that of the class alone, (B, W)."""
    hidden = functional.silu(linear(w, "t_embedder.mlp.0", time_waves(t)))
    label = w["y_embedder.embedding_table.weight"][y]
    return linear(w, "t_embedder.mlp.2", hidden) + label, label


def grid_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of the column, then of the row, (G G, W)."""
    found = torch.empty(side * side, width)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                for part, place in enumerate((column, row)):
                    angle = place / 10000 ** (i / quarter)
                    found[row * side + column, 2 * part * quarter + i] = math.sin(angle)
                    found[row * side + column, (2 * part + 1) * quarter + i] = math.cos(angle)
    return found


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, K) three times -> (B, N, W)."""
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def queries_keys_values(w: dict[str, Tensor], name: str, x: Tensor, heads: int):
    b, n, width = x.shape
    qkv = linear(w, name, x).reshape(b, n, 3, heads, width // heads)
    return qkv.permute(2, 0, 3, 1, 4)


def turned_in_place(x: Tensor, side: int, extra: int) -> Tensor:
    """Rotary positions of JiT: pairs (2 i, 2 i + 1) of x (B, H, N, K) turn in their own plane.

    Half of them by the row, half by the column; the first `extra` tokens have no position.
    """
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    quarter = pairs.shape[-1] // 2
    angles = torch.zeros(x.shape[2], 2 * quarter)
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                speed = 10000 ** (-i / quarter)
                angles[extra + row * side + column, i] = row * speed
                angles[extra + row * side + column, quarter + i] = column * speed
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def unpatched(tokens: Tensor, side: int, patch: int) -> Tensor:
    """Rows (P, P, C) of tokens as images (B, C, S, S)."""
    x = tokens.reshape(len(tokens), side, side, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, side * patch, side * patch)


def sit_shapes(
    width: int, depth: int, patch: int, channels: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of SiT's weights; it predicts a sigma besides, which nothing uses."""
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (2 * channels * patch**2, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def mean_flow_shapes(
    width: int, depth: int, patch: int, channels: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of MeanFlow's weights: SiT's, with a gap of times and without a sigma."""
    found = sit_shapes(width, depth, patch, channels, classes)
    for part in ("mlp.0", "mlp.2"):
        for kind in ("weight", "bias"):
            found[f"r_embedder.{part}.{kind}"] = found[f"t_embedder.{part}.{kind}"]
    last = channels * patch**2
    return found | {
        "final_layer.linear.weight": (last, width), "final_layer.linear.bias": (last,)
    }  # fmt: skip


def sit(
    w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, *, heads: int, patch: int, depth: int,
    r: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SiT's velocity of latents x (B, C, S, S); with r MeanFlow's, the average from r to t."""
    c, _ = conditioning(w, t, y)
    if r is not None:
        hidden = functional.silu(linear(w, "r_embedder.mlp.0", time_waves(t - r)))
        c = c + linear(w, "r_embedder.mlp.2", hidden)
    c, side = functional.silu(c), x.shape[-1] // patch
    first, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
    h = functional.conv2d(x, first, bias, stride=patch).flatten(2).mT
    h = h + grid_positions(side, h.shape[-1])
    for i in range(depth):
        vectors = linear(w, f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        inside = shifted(layer_norm(h), shift1, scale1)
        q, k, v = queries_keys_values(w, f"blocks.{i}.attn.qkv", inside, heads)
        h = h + gate1[:, None] * linear(w, f"blocks.{i}.attn.proj", attend(q, k, v))
        inside = linear(w, f"blocks.{i}.mlp.fc1", shifted(layer_norm(h), shift2, scale2))
        inside = functional.gelu(inside, approximate="tanh")
        h = h + gate2[:, None] * linear(w, f"blocks.{i}.mlp.fc2", inside)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear(w, "final_layer.linear", shifted(layer_norm(h), shift, scale))
    return unpatched(out, side, patch)[:, : x.shape[1]]


def jit_shapes(
    width: int, depth: int, heads: int, patch: int, bottleneck: int, context: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of JiT's weights, of images with three channels."""
    hidden, head = int(4 * width * 2 / 3), width // heads
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (3 * patch**2, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {
        "x_embedder.proj1.weight": (bottleneck, 3, patch, patch),
        "x_embedder.proj2.weight": (width, bottleneck, 1, 1),
        "x_embedder.proj2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "in_context_posemb": (1, context, width),
        "final_layer.norm_final.weight": (width,),
    }
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.w12": (2 * hidden, width), f"blocks.{i}.mlp.w3": (width, hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
        found |= {f"blocks.{i}.norm{j}.weight": (width,) for j in (1, 2)}
        found |= {f"blocks.{i}.attn.{j}_norm.weight": (head,) for j in "qk"}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def jit(
    w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor,
    *, heads: int, patch: int, depth: int, context_start: int,
) -> Tensor:  # fmt: skip
    """JiT's clean image of noised ones x (B, C, S, S)."""
    c, label = conditioning(w, t, y)
    c, side, extra = functional.silu(c), x.shape[-1] // patch, 0
    narrow = functional.conv2d(x, w["x_embedder.proj1.weight"], stride=patch)
    h = functional.conv2d(narrow, w["x_embedder.proj2.weight"], w["x_embedder.proj2.bias"])
    h = h.flatten(2).mT
    h = h + grid_positions(side, h.shape[-1])
    for i in range(depth):
        if i == context_start:
            tokens = label[:, None] + w["in_context_posemb"]
            h, extra = torch.cat([tokens, h], dim=1), tokens.shape[1]
        vectors = linear(w, f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        inside = shifted(rms_norm(h, w[f"blocks.{i}.norm1.weight"]), shift1, scale1)
        q, k, v = queries_keys_values(w, f"blocks.{i}.attn.qkv", inside, heads)
        q, k = (
            turned_in_place(rms_norm(part, w[f"blocks.{i}.attn.{name}_norm.weight"]), side, extra)
            for name, part in (("q", q), ("k", k))
        )
        h = h + gate1[:, None] * linear(w, f"blocks.{i}.attn.proj", attend(q, k, v))
        inside = shifted(rms_norm(h, w[f"blocks.{i}.norm2.weight"]), shift2, scale2)
        gate, inside = linear(w, f"blocks.{i}.mlp.w12", inside).chunk(2, dim=-1)
        inside = linear(w, f"blocks.{i}.mlp.w3", functional.silu(gate) * inside)
        h = h + gate2[:, None] * inside
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    h = rms_norm(h[:, extra:], w["final_layer.norm_final.weight"])
    return unpatched(linear(w, "final_layer.linear", shifted(h, shift, scale)), side, patch)
