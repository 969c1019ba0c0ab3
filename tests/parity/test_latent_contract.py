"""The latent contract travels with every checkpoint, and other latents are refused."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch

from e2ediff.condition import Labels
from e2ediff.errors import CheckpointError, LatentError
from e2ediff.host.plugins import load
from e2ediff.latent import TIME
from e2ediff.sample.load import load_model
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.manifest import sealed
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

HOST = load(entry_points=False)
X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_text):
    """A run of two steps for each norm, and one of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(tiny_text)
    found = {}
    for name, overrides in {
        "batch": ["ema=[{name: slow, decay: 0.99, warmup: false}]"],
        "other": ["seed=1"],
        "layer": ["backbone.latent_norm=layer"],
        "none": ["backbone.latent_norm=none"],
    }.items():
        words = ["steps=2", "objective=detached", *overrides]
        out = str(folder / name)
        train(HOST, str(folder / "tiny.yaml"), words, out, progress=Progress(io.StringIO()))
        found[name] = out
    return found


def model(run, **options):
    return load_model(run, device="cpu", host=HOST, **options)


def test_the_manifest_describes_the_latents_of_every_set_of_weights(runs) -> None:
    opened = open_checkpoint(Store(runs["batch"]))
    path = f"{runs['batch']}/checkpoints/{opened.name}/MANIFEST.json"
    with open(path) as file:
        found = json.load(file)["latent"]
    assert set(found) == {"online", "target", "slow"}
    hashes = {body.pop("statistics") for body in found.values()}
    assert len(hashes) == 3, "each set of weights has statistics of its own"
    for body in found.values():
        assert body == {"tokens": 4, "dim": 6, "norm": "batch", "grid": [2, 2], "scale": 1.0,
                        "time": TIME}  # fmt: skip
    for weights in ("online", "target", "slow"):
        loaded = model(runs["batch"], weights=weights)
        assert loaded.contract == opened.latent(weights) == loaded.net.contract()


def test_the_scale_of_latents_without_a_norm_is_measured(runs) -> None:
    loaded = model(runs["none"])
    source = loaded.recipe.data.open()
    x = source.read(range(len(source)))[0].float() / 127.5 - 1
    std = float(loaded.encode(x).std())
    assert loaded.contract.scale == pytest.approx(std, rel=0.2)  # 16 images against 60
    assert loaded.contract.scale != 1.0


def test_latents_pass_through_their_own_model_as_through_its_networks(runs) -> None:
    one = model(runs["batch"])
    latents = one.latents(X)
    assert torch.equal(one.decode(latents), one.reconstruct(X))
    labels = torch.arange(4)
    clean = one.denoise(latents, 0.9, labels)
    condition = Labels(labels, one.image.classes)
    assert torch.equal(clean.z, one.denoiser()(latents.z, 0.9, condition).x0.detach())
    assert clean.contract == one.contract


@pytest.mark.parametrize("use", ["decode", "denoise"])
@pytest.mark.parametrize(("theirs", "field"), [("other", "statistics"), ("layer", "norm, stat")])
def test_latents_of_another_run_are_refused_with_both_contracts(runs, theirs, field, use) -> None:
    mine, other = model(runs["batch"]), model(runs[theirs])
    call = {
        "decode": mine.decode,
        "denoise": lambda latents: mine.denoise(latents, 0.5, torch.arange(4)),
    }[use]
    with pytest.raises(LatentError) as caught:
        call(other.latents(X))
    said = str(caught.value)
    assert f"differ in {field}" in said
    assert str(mine.contract) in said
    assert str(other.contract) in said


def test_weights_do_not_load_into_a_network_of_another_norm(runs, tmp_path) -> None:
    """Without a contract they would: neither norm has anything to be loaded."""
    run = tmp_path / "run"
    shutil.copytree(runs["layer"], run)
    resolved = run / "resolved.yaml"
    text = resolved.read_text()
    assert "latent_norm: layer" in text
    resolved.write_text(text.replace("latent_norm: layer", "latent_norm: none"))
    with pytest.raises(LatentError, match="differ in norm") as caught:
        model(str(run))
    assert "norm layer" in str(caught.value)
    assert "norm none" in str(caught.value)


def test_a_checkpoint_without_a_contract_still_loads_and_a_mangled_one_does_not(
    runs, tmp_path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["layer"], run)
    (manifest,) = run.glob("checkpoints/*/MANIFEST.json")
    body = json.loads(manifest.read_bytes())
    del body["sha256"]
    body["latent"]["target"]["tokens"] = 9
    manifest.write_bytes(sealed(body))
    with pytest.raises(LatentError, match="differ in tokens"):
        model(str(run))
    del body["latent"]["target"]["tokens"]
    manifest.write_bytes(sealed(body))
    with pytest.raises(CheckpointError, match="the latents of 'target' are not described"):
        model(str(run))
    del body["latent"]
    manifest.write_bytes(sealed(body))
    assert model(str(run)).contract.norm == "layer"
