"""The parts keep the contract of a feature network, and recipes and commands know them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import e2ediff
from e2ediff_features.exported import Exported
from e2ediff_features.foundation import CLIP, CLIPNetwork, DINOv2, DINOv2Network
from e2ediff_testing import check_features
from random_weights import random_state
from tiny_recipe import tiny

from e2ediff.errors import DataError, RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe

HOST = load()
PARTS = {"dinov2": DINOv2, "clip": CLIP, "exported": Exported}


def dinov2_file(folder: Path, registers: int) -> str:
    """Random weights of a ViT of two blocks for 56 pixels."""
    shapes = {
        "patch_embed.proj.weight": torch.zeros(64, 3, 14, 14),
        "pos_embed": torch.zeros(1, 17, 64),
        "blocks.1.norm1.weight": torch.zeros(64),
    }
    if registers:
        shapes["register_tokens"] = torch.zeros(1, registers, 64)
    path = folder / f"dinov2-{registers}.pth"
    torch.save(random_state(DINOv2Network(shapes, "DINOv2", 56)), path)
    return str(path)


def clip_file(folder: Path) -> str:
    """Random weights of an encoder of two blocks for 56 pixels."""
    shapes = {
        "conv1.weight": torch.zeros(64, 3, 14, 14),
        "positional_embedding": torch.zeros(17, 64),
        "transformer.resblocks.1.ln_1.weight": torch.zeros(64),
        "proj": torch.zeros(64, 32),
    }
    state = random_state(CLIPNetwork(shapes, "CLIP"))
    torch.save({f"visual.{name}": value for name, value in state.items()}, folder / "clip.pt")
    return str(folder / "clip.pt")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [56, 70])
def test_dinov2_keeps_the_contract_with_registers_and_without(tmp_path, registers, size) -> None:
    config = DINOv2(weights=dinov2_file(tmp_path, registers), size=size)
    check_features(config)
    (patches,) = config.build()(torch.zeros(1, 3, 20, 20))
    assert patches.shape == (1, 64, size // 14, size // 14)


def test_clip_keeps_the_contract(tmp_path) -> None:
    check_features(CLIP(weights=clip_file(tmp_path)))


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_plugins_check_passes_with_weights(tmp_path) -> None:
    """It trains with a perceptual loss in the features."""
    weights = f"objective.reconstruction.perceptual.weights={clip_file(tmp_path)}"
    done = e2ediff("plugins", "check", "e2ediff-features", "--part", "clip", "--set", weights)
    assert done.code == 0, done.out


def test_cmmd_is_measured_in_the_features_of_clip(tmp_path) -> None:
    chance = np.random.default_rng(0)
    for name in ("made", "real"):
        array = chance.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    block = f"{{name: clip, weights: {clip_file(tmp_path)}}}"
    sets = (tmp_path / "made.npz", "--reference", tmp_path / "real.npz")
    done = e2ediff(
        "eval", *sets, "--features", block, "--metrics", "cmmd", "--out", tmp_path / "s"
    )
    assert done.code == 0, done.err
    assert "CMMD-CLIP" in done.out


@pytest.mark.parametrize("name", PARTS)
def test_weights_of_another_hash_are_refused_before_they_are_parsed(tmp_path, name) -> None:
    (tmp_path / "w.pt").write_bytes(b"no weights at all")
    found = hashlib.sha256(b"no weights at all").hexdigest()
    with pytest.raises(DataError, match=f"w.pt has sha256 {found}, the recipe expects 00"):
        PARTS[name](weights=str(tmp_path / "w.pt"), sha256="00" * 32).build()


@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_that_names_a_part_is_dumped_and_read_back_equal(name) -> None:
    assert HOST.registries["features"].get(name) is PARTS[name]
    block = json.dumps({"name": name, "weights": "w.pt"})
    text = tiny(scores=f"{{every: 8, features: {block}, metrics: [kid]}}")
    recipe = parse_recipe(HOST, text, "tiny")
    assert recipe.scores is not None
    assert recipe.scores.features == PARTS[name](weights="w.pt")
    assert parse_recipe(HOST, dump_recipe(HOST, recipe), "dumped") == recipe


@pytest.mark.parametrize("name", PARTS)
def test_weights_take_a_path_and_refuse_strange_addresses_with_their_line(name) -> None:
    assert PARTS[name](weights=Path("a/b.pt")).weights == "a/b.pt"
    for address in ("watched://x", "reference://::/x", "simplecache::s3://x", "nope://x"):
        block = json.dumps({"name": name, "weights": address})
        text = tiny(scores=f"{{every: 8, features: {block}, metrics: [kid]}}")
        with pytest.raises(RecipeError) as caught:
            parse_recipe(HOST, text, "tiny.yaml")
        (problem,) = caught.value.problems
        assert problem.where == "scores.features.weights"
        assert problem.line.startswith("tiny.yaml:")
        assert "protocol" in problem.what


def test_the_networks_that_read_a_file_of_weights_are_listed_with_those_of_e2ediff(tmp_path):
    np.savez(tmp_path / "made.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    words = (tmp_path / "made.npz", "--features", "random_projection", "--weights-file", "w.pt")
    done = e2ediff("eval", *words, "--reference", tmp_path / "made.npz")
    assert done.code == 5
    listed = "clip, dinov2, exported, inception2015, torchvision"
    assert f"name a network that reads one: {listed}\n" in done.err
