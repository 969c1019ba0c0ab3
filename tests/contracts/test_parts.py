"""Every registered part keeps its contract, and a recipe that names it reads back equal."""

from __future__ import annotations

from itertools import pairwise

import attrs
import e2ediff_testing as testing
import pytest
import torch
from command_line import needs
from declared_stops import holds_its_declaration
from part_checks import CHECKS
from pictures import write_tree

from e2ediff.data import ImageSpec
from e2ediff.diagnostic import Probe
from e2ediff.errors import DataError, ResourceError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Scores, dump_recipe, parse_recipe
from e2ediff.host.registry import options

HOST = load(entry_points=False)
PARTS = [(plural, part) for plural, registry in HOST.registries.items() for part in registry]
# Keys of a recipe that hold a part of this kind, where it is not the kind's own name.
KEYS = {
    "time_samplers": "times",
    "averages": "target",
    "sources": "data",
    "features": "objective",
    "metrics": "scores",
}
VIT = {"width": 16, "depth": 2, "heads": 2, "patch": 8, "latent_dim": 4}


def ids(parts):
    return [f"{plural}-{part.name}" for plural, part in parts]


@pytest.fixture(scope="module")
def required(tmp_path_factory):
    """Values of the options that have no default, by the part's name."""
    place = tmp_path_factory.mktemp("pictures")
    tree = write_tree(place / "tree", [3, 3], size=(40, 17))
    return {
        "vit": VIT,
        "image_folder": {"root": str(tree), "size": 16, "classes": 2},
        "inception2015": {"weights": "w.pth"},
    }


def test_every_kind_of_part_has_registered_parts() -> None:
    assert {plural for plural, _ in PARTS} == set(HOST.registries)


# A backbone has no sizes of its own to be checked with, and is checked further below.
CHECKED = [(plural, part) for plural, part in PARTS if plural in CHECKS and plural != "backbones"]


@pytest.mark.parametrize(("plural", "part"), CHECKED, ids=ids(CHECKED))
def test_a_registered_part_keeps_its_contract(plural, part, required) -> None:
    CHECKS[plural](part.cls(**required.get(part.name, {})))


@pytest.mark.parametrize("part", [*HOST.registries["objectives"]], ids=lambda part: part.name)
@pytest.mark.parametrize("trunks", ["one", "denoiser_apart"])
def test_an_objective_declares_all_losses_that_stop_and_no_other(part, trunks) -> None:
    if (part.name, trunks) == ("two_stage", "one"):
        return  # which it refuses
    vit = HOST.registries["backbones"].get("vit")(**VIT, trunks=trunks)
    holds_its_declaration(part.cls(), vit)


@pytest.mark.parametrize("changes", [
    {"steps": 1}, {"steps": 7}, {"steps": 20, "shift": 0.5}, {"steps": 20, "shift": 2.0},
])  # fmt: skip
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_sampler_keeps_its_contract_with_any_grid(name, changes) -> None:
    testing.check_sampler(HOST.registries["samplers"].get(name)(**changes))


VARIANTS = {
    "position norm": {"latent_norm": "position"},
    "batch norm": {"latent_norm": "batch"},
    "no norm": {"latent_norm": "none"},
    "affine norm": {"latent_norm": "affine"},
    "decoder apart": {"trunks": "decoder_apart"},
    "rope": {"position": "rope", "mlp": "gelu"},
    "learned, shared": {"position": "learned", "modulation": "shared"},
    "low rank, refined": {"modulation": "lowrank", "modulation_rank": 4, "refine": 4},
    "relu2, raw q and k": {"mlp": "relu2", "qk_norm": False},
    "normed prediction": {"norm_prediction": True},
    "modes of their own": {"mode_conditioning": "own"},
    "refined in squares": {"refine": 4, "refine_stride": 2, "refine_depth": 1},
    "skip": {"denoise_skip": True},
    "denoising decoder": {"decoder": "denoising", "decode_steps": 2, "refine": 4},
}


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(v, id=k) for k, v in {"plain": {}, **VARIANTS}.items()),
        pytest.param({"trunks": "denoiser_apart"}, id="denoiser apart"),
        pytest.param({"trunks": "three"}, id="three trunks"),
    ],
)
def test_the_vit_keeps_its_contract_in_every_variant(changes) -> None:
    vit = HOST.registries["backbones"].get("vit")
    testing.check_backbone(vit(**{**VIT, **changes}))


@pytest.mark.parametrize("image", [ImageSpec(1, 16, 24, 0), ImageSpec(3, 8, 32, 1)], ids=str)
def test_the_vit_takes_grey_oblong_and_unlabelled_images(image) -> None:
    testing.check_backbone(HOST.registries["backbones"].get("vit")(**VIT), image)


@pytest.mark.parametrize("norm", ["none", "layer", "batch", "position"])
def test_the_backbone_for_plugin_authors_keeps_the_contract_itself(norm) -> None:
    testing.check_backbone(testing.TinyBackbone(latent_norm=norm))


@pytest.mark.parametrize(
    "objective",
    ["coupled", "detached", "two_stage", pytest.param("kl", marks=needs("e2ediff-rivals"))],
)
def test_an_objective_keeps_its_contract_on_the_vit(objective) -> None:
    vit = HOST.registries["backbones"].get("vit")(**VIT, trunks="three", latent_norm="batch")
    testing.check_objective(load().registries["objectives"].get(objective)(), vit)


def test_a_diagnostic_lives_with_two_images_of_one_token() -> None:
    x, z = torch.zeros(2, 1, 8, 8), torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])
    probe = Probe(x, torch.zeros(2).long(), z, z, "x0", None, x, {0.5: z}, z)
    for part in HOST.registries["diagnostics"]:
        assert all(type(v) is float for v in part.cls().measure(probe).values())


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_tracker_takes_figures_and_pictures_and_can_be_opened_again(name, tmp_path) -> None:
    config = HOST.registries["trackers"].get(name)()
    try:
        config.check()
    except ResourceError as error:
        pytest.skip(str(error))
    tracker = config.open(str(tmp_path))
    for images in (8, 16):
        tracker.log(images, {"loss/denoising": 0.5, "rank": 3.0})
        tracker.picture(images, "samples", torch.zeros(2, 1, 8, 8))
        tracker.close()
        tracker = config.open(str(tmp_path))
    tracker.close()
    if name == "csv":
        rows = (tmp_path / "figures.csv").read_text().splitlines()
        assert rows[0] == "images,name,value"
        assert rows[1:3] == ["8,loss/denoising,0.5", "8,rank,3.0"]
        assert len(rows) == 5


FEATURES = {
    "torchvision": {"model": "squeezenet1_1", "nodes": ("features.2", "features.5")},
    "efficientnet_lite0": {},
    "random_projection": {"width": 12},
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_network_is_fixed_and_passes_gradients_to_images(name) -> None:
    try:
        net = HOST.registries["features"].get(name)(**FEATURES[name]).build()
    except DataError as error:
        pytest.skip(str(error))
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    for channels in (1, 3):
        x = (torch.rand(2, channels, 48, 40) * 2 - 1).requires_grad_()
        maps = net(x)
        assert all(m.shape[0] == 2 and m.isfinite().all() for m in maps)
        sides = [m.shape[-1] for m in maps]
        assert all(a >= b for a, b in pairwise(sides)), "from shallow to deep"
        vectors = net.vectors((x.detach() + 1) * 127.5, net.taps)
        assert set(vectors) == set(net.taps)
        assert all(v.shape[0] == 2 and v.ndim == 2 for v in vectors.values())
        (grad,) = torch.autograd.grad(sum(m.square().mean() for m in maps), x)
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


def test_a_random_feature_network_is_the_same_in_every_process() -> None:
    config = HOST.registries["features"].get("torchvision")(**FEATURES["torchvision"])
    state = torch.get_rng_state()
    first, second = config.build().state_dict(), config.build().state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("plural", "part"), PARTS, ids=ids(PARTS))
def test_a_recipe_that_names_a_part_is_dumped_and_read_back_equal(
    plural, part, required, tiny_text
) -> None:
    recipe = parse_recipe(HOST, tiny_text, "tiny")
    value = part.cls(**required.get(part.name, FEATURES.get(part.name, {})))
    key = KEYS.get(plural, plural.removesuffix("s"))
    if plural in ("regularizers", "diagnostics", "trackers"):
        key, value = plural, (value,)
    elif plural == "features":
        loss = attrs.evolve(recipe.objective.reconstruction, perceptual=value)
        value = attrs.evolve(recipe.objective, reconstruction=loss)
    elif plural == "metrics":
        features = HOST.registries["features"].get("random_projection")()
        value = Scores(every=8, features=features, metrics=(value,))
    recipe = attrs.evolve(recipe, **{key: value})
    text = dump_recipe(HOST, recipe)
    assert parse_recipe(HOST, text, "dumped") == recipe
    assert dump_recipe(HOST, parse_recipe(HOST, text, "dumped")) == text
    for option in options(part.cls):
        assert f"{option}:" in text, "a dumped recipe spells out every option"


def test_the_built_in_parts_load_without_any_plugin() -> None:
    assert [plugin.name for plugin in HOST.plugins] == ["e2ediff"]
