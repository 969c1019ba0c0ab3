"""CLIP's and DINOv2's encoders are the published networks, and load their files by name."""

from __future__ import annotations

import pytest
import torch
from e2ediff_features.foundation import CLIP, DINOv2
from random_weights import random_state
from safetensors.torch import save_file

from e2ediff.errors import DataError


def test_clip_is_torch_fidelitys(tmp_path) -> None:
    clip = pytest.importorskip(
        "torch_fidelity.feature_extractor_clip", reason="needs `pip install torch-fidelity`"
    )
    theirs = clip.VisionTransformer(56, 14, 128, 2, 2, 32).eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    torch.save({f"visual.{k}": v for k, v in state.items()}, tmp_path / "clip.pt")
    ours = CLIP(weights=str(tmp_path / "clip.pt")).build()
    pixels = 255 * torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(
        [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    )[:, :, None, None]
    known = theirs((pixels / 255 - mean) / std)
    torch.testing.assert_close(ours.vectors(pixels)["pool"], known, rtol=1e-4, atol=1e-5)
    assert ours.size == 56
    assert ours(torch.zeros(1, 3, 20, 20))[0].shape == (1, 128, 4, 4)


@pytest.mark.parametrize("size", [56, 70])
def test_dinov2_is_the_released_class(tmp_path, size) -> None:
    """At 70 pixels the position codes of 56 are resized."""
    models = pytest.importorskip(
        "dinov2.models.vision_transformer",
        reason="needs `pip install --no-deps dinov2==0.0.1.dev2`; it asks for an older torch",
    )
    theirs = models.DinoVisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1.0,
        block_chunks=0,
    ).eval()  # fmt: skip
    state = random_state(theirs)
    theirs.load_state_dict(state)
    torch.save(state, tmp_path / "dinov2.pth")
    ours = DINOv2(weights=str(tmp_path / "dinov2.pth"), size=size).build()
    pixels = 255 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    x = (pixels / 255 - mean) / std
    near = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(ours.vectors(pixels)["pool"], theirs(x), **near)
        known = theirs.forward_features(x)["x_norm_patchtokens"]
        patches = ours(pixels / 127.5 - 1)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches, known, **near)


def test_clip_weights_without_a_vision_part_are_refused(tmp_path) -> None:
    torch.save({"positional_embedding": torch.zeros(2)}, tmp_path / "text.pt")
    with pytest.raises(DataError, match=r"has no visual.class_embedding"):
        CLIP(weights=str(tmp_path / "text.pt")).build()


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("vit_s14", 22_056_576), ("vit_b14", 86_580_480), ("vit_l14", 304_368_640)],
)
def test_a_named_dinov2_has_the_released_shapes_without_its_file(model, parameters) -> None:
    with torch.device("meta"):
        network = DINOv2(weights="elsewhere.pth", model=model).blank()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(1, 3, 32, 32, device="meta"))[-1].shape[2:] == (16, 16)


def test_weights_of_another_dinov2_than_the_named_one_are_refused(tmp_path) -> None:
    config = DINOv2(weights=str(tmp_path / "small.safetensors"), model="vit_s14")
    other = {k: torch.zeros(1).expand(v.shape) for k, v in config.blank().state_dict().items()}
    other["patch_embed.proj.bias"] = torch.zeros(768)
    save_file({k: v.contiguous() for k, v in other.items()}, config.weights)
    with pytest.raises(DataError, match=r"patch_embed.proj.bias \(768,\) instead of \(384,\)"):
        config.build()
