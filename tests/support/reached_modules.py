"""Which groups of a ViT's parameters a loss reaches."""

from __future__ import annotations

import torch
from e2ediff_testing import make_nets

from e2ediff.parts.backbones import ViTConfig

# What belongs to one mode alone where trunks are `three`.
GROUPS = {
    "encode": ("embed_pixels", "trunks.encode", "head_latent"),
    "decode": ("embed_decode", "trunks.decode", "head_pixels"),
    "denoise": ("embed_denoise", "trunks.denoise", "head_denoise"),
    "heads": ("heads.",),
}
VIT = ViTConfig(
    width=16, depth=2, heads=2, patch=8, latent_dim=4, latent_norm="batch", trunks="three"
)


def shaken_nets(objective, vit=VIT, **options):
    """Networks without the zeros of a fresh start, which would stop gradients by themselves."""
    nets = make_nets(vit, objective, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*nets.online.parameters(), *nets.heads.parameters()]:
            p += 0.1 * torch.randn(p.shape, generator=g)
    return nets


def reached(nets, loss) -> set[str]:
    """Groups in which some parameter has a gradient other than zero."""
    named = dict(nets.online.named_parameters())
    named |= {f"heads.{k}": p for k, p in nets.heads.named_parameters()}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    moved = [k for k, g in zip(named, grads, strict=True) if g is not None and g.abs().sum() > 0]
    return {group for group, own in GROUPS.items() if any(k.startswith(own) for k in moved)}
