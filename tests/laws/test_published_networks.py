"""`vit` as SiT's and MeanFlow's networks: the released names and shapes fit, the answers agree."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from published import (
    mean_flow_shapes,
    peer_weights,
    random_state,
    sit,
    sit_shapes,
    time_waves,
)

from e2ediff.backbone import Denoise
from e2ediff.condition import Labels
from e2ediff.data import ImageSpec
from e2ediff.nn.layers import TimeEmbedding, patchify, time_frequencies, unpatchify
from e2ediff.parts.backbones import ViTConfig

WIDTH, DEPTH, HEADS, CLASSES, PATCH, CHANNELS, GRID = 24, 2, 3, 5, 2, 4, 3
SHAPES = sit_shapes(WIDTH, DEPTH, PATCH, CHANNELS, CLASSES)
# A token is 2 x 2 places of a latent with 4 channels; the images are only there for the grid.
IMAGE = ImageSpec(3, 8 * GRID, 8 * GRID, CLASSES)
CONFIG = ViTConfig(
    width=WIDTH, depth=DEPTH, heads=HEADS, patch=8, latent_dim=CHANNELS * PATCH**2,
    latent_norm="none", trunks="denoiser_apart", mlp="gelu", qk_norm=False,
    time_frequencies=128, time_scale=1.0,
)  # fmt: skip


def loaded(config: ViTConfig, state):
    """A network with these weights in its denoiser, and the names that it has elsewhere."""
    net = config.build(IMAGE).eval()
    mapped = peer_weights().sit(state, PATCH, CHANNELS)
    found = net.load_state_dict(mapped, strict=False)
    assert not found.unexpected_keys
    return net, found.missing_keys


def test_its_denoiser_answers_as_sit_does() -> None:
    g, state = torch.Generator().manual_seed(1), random_state(SHAPES)
    x, t, y = torch.randn(4, CHANNELS, 6, 6, generator=g), torch.rand(4, generator=g), [0, 4, 5, 2]
    y = torch.tensor(y)  # 5 is no class
    net, _ = loaded(CONFIG, state)
    with torch.no_grad():
        ours = net.denoise(patchify(x, PATCH), t, Labels(y, CLASSES))
        theirs = sit(state, x, t, y, heads=HEADS, patch=PATCH, depth=DEPTH)
    assert float(theirs.std()) > 0.3, "the answer hangs on the weights"
    ours = unpatchify(ours, PATCH, (GRID, GRID))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_its_denoiser_answers_as_meanflow_s_with_time_and_velocity_turned_round() -> None:
    g, shapes = (
        torch.Generator().manual_seed(1),
        mean_flow_shapes(WIDTH, DEPTH, PATCH, CHANNELS, 5),
    )
    state, x = random_state(shapes), torch.randn(4, CHANNELS, 6, 6, generator=g)
    y, t, r = torch.tensor([0, 4, 5, 2]), torch.tensor([0.0, 0.3, 0.7, 1.0]), torch.ones(4)
    net = attrs.evolve(CONFIG, second_time=True).build(IMAGE).eval()
    found = net.load_state_dict(peer_weights().mean_flow(state, PATCH, CHANNELS), strict=False)
    assert not found.unexpected_keys
    assert not [
        name for name in found.missing_keys if name.startswith(("embed_time", "embed_gap"))
    ]
    with torch.no_grad():
        (u,) = net.run(Denoise(z_t=patchify(x, PATCH), t=t, r=r, condition=Labels(y, CLASSES)))
        theirs = sit(state, x, 1 - t, y, heads=HEADS, patch=PATCH, depth=DEPTH, r=1 - r)
        same = sit(state, x, 1 - t, y, heads=HEADS, patch=PATCH, depth=DEPTH, r=1 - t)
    assert float((theirs - same)[:3].abs().max()) > 0.1, "the gap between the times counts"
    ours = -unpatchify(u, PATCH, (GRID, GRID))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_its_denoiser_answers_as_repa_e_s_without_patches_and_turned_round() -> None:
    """REPA-E's SiT has one token for each place of the latent, and predicts no sigma."""
    shapes = sit_shapes(WIDTH, DEPTH, 1, CHANNELS, CLASSES)
    shapes |= {
        "final_layer.linear.weight": (CHANNELS, WIDTH),
        "final_layer.linear.bias": (CHANNELS,),
    }
    state = random_state(shapes)
    x = torch.randn(3, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(1))
    y, t = torch.tensor([0, 4, 5]), torch.tensor([0.0, 0.3, 0.9])
    net = attrs.evolve(CONFIG, latent_dim=CHANNELS).build(IMAGE).eval()
    found = net.load_state_dict(peer_weights().repa_e(state, 1, CHANNELS), strict=False)
    assert not found.unexpected_keys
    with torch.no_grad():
        ours = -unpatchify(net.denoise(patchify(x, 1), t, Labels(y, CLASSES)), 1, (GRID, GRID))
        theirs = sit(state, x, 1 - t, y, heads=HEADS, patch=1, depth=DEPTH)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trunks", ["three", "denoiser_apart"])
def test_all_weights_of_the_denoiser_are_sit_s(trunks) -> None:
    net, missing = loaded(attrs.evolve(CONFIG, trunks=trunks), random_state(SHAPES))
    denoising = {"embed_denoise", "embed_time", "embed_label", "head_denoise"}
    mine = {
        name for name in dict(net.named_parameters())
        if name.split(".")[0] in denoising or name.startswith("trunks.denoise.")
    } | {"embed_mode.denoise"}  # fmt: skip
    assert not mine & {*missing}
    assert {name.split(".")[0] for name in missing} <= {
        "embed_pixels", "embed_decode", "mask_token", "embed_mode", "trunks", "head_latent",
        "head_pixels", "latent_norm",
    }  # fmt: skip


def test_with_its_own_number_of_frequencies_the_weights_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for embed_time"):
        loaded(attrs.evolve(CONFIG, time_frequencies=64), random_state(SHAPES))


@pytest.mark.parametrize(("scale", "atol"), [(1.0, 1e-6), (1000.0, 2e-4)], ids=["sit", "dit"])
def test_times_are_embedded_as_sit_and_dit_embed_them(scale, atol) -> None:
    """SiT counts times up to 1, DiT up to 1000, where angles lie 6e-5 apart and round twice."""
    embed, seen = TimeEmbedding(8, time_frequencies(128, scale)), []
    embed.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    t = torch.linspace(0, 1, 101)
    embed(t)
    torch.testing.assert_close(seen[0], time_waves(scale * t), rtol=0, atol=atol)


def test_by_default_times_have_every_second_frequency_of_dit_s() -> None:
    default, dit = TimeEmbedding(8).frequencies, time_frequencies(128, 1000.0)
    torch.testing.assert_close(default, dit[::2])
    assert torch.equal(default, 1000.0 * torch.exp(-math.log(10000) * torch.arange(64) / 64)), (
        "to the bit what runs have been trained with"
    )


def test_the_options_reach_both_embeddings_of_time() -> None:
    config = attrs.evolve(CONFIG, second_time=True, time_frequencies=10, time_scale=7.0)
    net = config.build(IMAGE)
    for embed in (net.embed_time, net.embed_gap):
        assert torch.equal(embed.frequencies, time_frequencies(10, 7.0))
        assert embed.layers[0].in_features == 20
