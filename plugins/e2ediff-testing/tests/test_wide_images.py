"""Methods train, stop, resume and sample on images that are not square."""

from __future__ import annotations

import pytest
import torch
from command_line import needs
from e2ediff_testing.tiny import make_batch, make_nets
from e2ediff_testing.trials import Trial, latent_contract, save_and_resume

from e2ediff.data import ImageSpec
from e2ediff.host.plugins import load
from e2ediff.sample.load import load_model

UNITE = ("unite", "width=16", "depth=2", "heads=2", "patch=8", "registers=4", "latent_dim=4",
         "context=2", "context_start=1")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "backbone"),
    [
        pytest.param("dsd", (16, 24), (), marks=needs("e2ediff-dsd")),
        pytest.param("unite", (24, 16), UNITE, marks=needs("e2ediff-unite")),
        pytest.param("pixel", (16, 24), (), marks=needs("e2ediff-jit")),
        pytest.param("ldm_is_ae", (16, 24), (), marks=needs("e2ediff-ldm-is-ae")),
    ],
)
def test_a_run_resumes_bit_for_bit_and_samples_in_its_shape(
    name, size, backbone, tmp_path
) -> None:
    host, (network, *options) = load(), backbone or ("",)
    part = next(p for p in host.registries["objectives"] if p.name == name)
    words = [f"backbone={network}"] if network else []
    words += [*(f"backbone.{option}" for option in options), f"data.size={[*size]}"]
    trial = Trial.prepare(host, "objectives", part, words, tmp_path)
    save_and_resume(trial)
    latent_contract(trial)
    model, shape = load_model(str(tmp_path / "whole"), device="cpu", host=host), (1, 3, *size)
    assert model.sample([0]).shape == shape
    assert model.reconstruct(torch.zeros(shape)).shape == shape


@needs("e2ediff-jit")
def test_jit_returns_every_pixel_to_its_place() -> None:
    from e2ediff_jit.backbone import JiTConfig

    config = JiTConfig(width=16, depth=2, heads=2, patch=8, context=2, context_start=1)
    image = ImageSpec(3, 16, 24, 4)
    net, batch = make_nets(config, image=image).online, make_batch(image)
    assert torch.equal(net.decode(net.encode(batch.x)), batch.x)
