"""An image of a set is the same however, wherever and in how many pieces it is made."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from command_line import needs, trained
from PIL import Image
from tiny_recipe import tiny

from e2ediff.condition import ClassLabels
from e2ediff.errors import DataError
from e2ediff.host.plugins import load
from e2ediff.model.inference import Model
from e2ediff.parts.sources import ImageFolder
from e2ediff.sample.load import ModelRef, load_model
from e2ediff.sample.request import SampleRequest
from e2ediff.sample.sample_set import make_set

TINY = tiny(
    data="{name: synthetic, size: 16, classes: 5, count: 64}",
    backbone="{name: vit, width: 32, depth: 2, heads: 2, patch: 4, latent_dim: 6, refine: 4}",
    optimizer="{name: adamw, lr: 0.01}",
    ema="[{name: slow, decay: 0.9}]",
    sampler="{name: heun, steps: 3}",
    guidance="{name: classifier_free, scale: 2.0}",
    cadence="{log: 4, diagnose: 4, preview: 4, checkpoint: 2}",
)
LABELS = [i % 6 for i in range(71)]  # 5 is the null label


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(trained(tmp_path_factory.mktemp("sets"), TINY))


@pytest.fixture(scope="module")
def model(run: str) -> Model:
    return load_model(run)


@pytest.fixture(scope="module")
def whole(model: Model) -> torch.Tensor:
    return model.sample(LABELS, seed=3)


def made(folder: Path) -> list[bytes]:
    """Files of the images of a PNG set, in order."""
    return [path.read_bytes() for path in sorted((folder / "images").iterdir())]


def pixels(x: torch.Tensor) -> np.ndarray:
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


# In one process


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_an_image_is_the_same_to_the_bit_for_any_number_made_at_once(model, whole, at_once):
    places = range(0, len(LABELS), at_once)
    some = places if at_once > 1 else [0, 5, 31, 32, 40, 70]
    for first in some:
        labels = LABELS[first : first + at_once]
        x = model.sample(labels, seed=3, first=first)
        assert torch.equal(x, whole[first : first + at_once])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_other_rows_move_an_image_by_rounding_alone_and_its_bytes_only_at_an_edge(
    run, whole, rows
):
    """On a CPU: 2e-6 are some tens of float32's steps; an edge is where bytes round up or down."""
    x = load_model(run, rows=rows, device="cpu").sample(LABELS, seed=3)
    torch.testing.assert_close(x, whole, rtol=0.0, atol=2e-6)
    y = ((whole.double() + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    at_edge = np.abs(y % 1 - 0.5) < 127.5 * 4e-6
    ours, theirs = (pixels(a).astype(int) for a in (x, whole))
    assert np.array_equal(ours[~at_edge], theirs[~at_edge])
    assert np.abs(ours - theirs).max() <= 1
    assert at_edge.mean() < 0.002  # so the claim is of almost all bytes


@needs("e2ediff-sampling")
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "sde", "rk4"])
@pytest.mark.parametrize("guidance", ["apg", "cfg_zero_star, zero_until: 0"])
def test_that_holds_for_samplers_and_guidance_with_memory_or_noise(run, sampler, guidance):
    given = (f"sampler={{name: {sampler}, steps: 3}}", f"guidance={{name: {guidance}, scale: 2}}")
    model = load_model(run, overrides=given)
    whole = model.sample(LABELS[:40], seed=1)
    for first in (0, 33):
        x = model.sample(LABELS[first : first + 3], seed=1, first=first)
        assert torch.equal(x, whole[first : first + 3])


@needs("e2ediff-sampling")
def test_images_that_share_their_steps_depend_on_their_tile_alone(run):
    """dopri5: whole tiles are equal to the bit, parts of one to the tolerance."""
    model = load_model(run, overrides=["sampler={name: dopri5, rtol: 0.01, atol: 0.01}"])
    whole = model.sample(LABELS[:64], seed=3)
    assert torch.equal(model.sample(LABELS[32:64], seed=3, first=32), whole[32:])
    part = model.sample(LABELS[32:40], seed=3, first=32)
    torch.testing.assert_close(part, whole[32:40], rtol=0.0, atol=0.2)


def test_seeds_and_numbers_give_different_images(model, whole):
    assert (model.sample(LABELS[:4], seed=4) - whole[:4]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    again = model.sample([0, 0], seed=3)
    assert (again[0] - again[1]).abs().max() > 1e-3


def test_classes_may_be_given_by_name_and_nothing_gives_nothing(model):
    assert torch.equal(model.sample(["none"], seed=2), model.sample([5], seed=2))
    assert model.sample([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("label", [99, -1, 6, 3.7, None, torch.tensor(3.7), "99", "²"])
def test_a_class_that_is_not_there_is_refused_with_those_that_are(model, label):
    for ask in (
        lambda: model.sample([0, label]),
        lambda: model.interpolate((0, 1), label),
        lambda: model.denoise(model.latents(torch.zeros(1, 3, 16, 16)), 0.5, [label]),
    ):
        with pytest.raises(DataError, match=r": no such class\. Expected an in.* from 0 to 4"):
            ask()


def test_classes_may_be_integers_of_any_kind(model):
    known = model.sample([2, 5])
    for labels in (torch.tensor([2, 5]), np.array([2, 5], np.uint8), (2, "none")):
        assert torch.equal(model.sample(labels), known)


def test_a_pass_for_two_answers_counts_twice(model):
    (tile,) = model.tiles([0, 1], seed=0)
    # three steps of heun, whose last is one call; each asks with and without the class
    assert (tile.calls, tile.passes) == (5, 10.0)
    (tile,) = attrs.evolve(model, guidance=None).tiles([0, 1])
    assert (tile.calls, tile.passes) == (5, 5.0)


# Sets


def request_of(run: str, out: Path, **changes) -> SampleRequest:
    own = {key: changes.pop(key) for key in ("overrides", "rows") if key in changes}
    model = ModelRef(run=run, device="cpu", **own)
    return SampleRequest(model=model, seed=3, labels=tuple(LABELS), out=str(out), **changes)


def make(one: SampleRequest, processes: int = 1, **options) -> str:
    def silent(line: str) -> None:
        pass

    return make_set(
        one, load(), processes=processes, threads=1, say=silent, update=silent, **options
    )


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_a_set_does_not_depend_on_the_batch(run, whole, tmp_path, batch):
    make(request_of(run, tmp_path / "set", batch=batch))
    found = np.stack(
        [np.array(Image.open(tmp_path / f"set/images/{i:06d}.png")) for i in range(71)]
    )
    assert np.array_equal(found, pixels(whole))


@pytest.mark.usefixtures("forks")
def test_two_processes_make_the_set_of_one(run, whole, tmp_path):
    make(request_of(run, tmp_path / "two", batch=32, format="npz"), processes=2)
    with np.load(tmp_path / "two/samples.npz") as found:
        assert np.array_equal(found["arr_0"], pixels(whole))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", ["png", "npz", "zip", "tar"])
def test_an_interrupted_set_is_continued_and_equals_the_uninterrupted_one(run, tmp_path, kind):
    def stop(line: str) -> None:
        raise Stopped

    say: list[str] = []
    started = request_of(run, tmp_path / "a", format=kind, batch=32)
    with pytest.raises(Stopped):
        make_set(started, load(), threads=1, say=say.append, update=stop)
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()}
    make_set(started, load(), threads=1, say=say.append, update=lambda line: None)
    assert say == [f"{tmp_path / 'a'}: 32 of 71 images are there already"]
    kept = [p for p, when in there.items() if p.exists() and p.stat().st_mtime_ns == when]
    assert len(kept) >= (32 if kind == "png" else 0)
    make(request_of(run, tmp_path / "b", format=kind, batch=32))
    files = {
        root: {
            str(p.relative_to(tmp_path / root)): p.read_bytes()
            for p in (tmp_path / root).rglob("*")
            if p.is_file() and p.name != "set.json"
        }
        for root in ("a", "b")
    }
    assert files["a"] == files["b"]
    assert not (tmp_path / "a/parts").exists()


def test_a_finished_set_is_left_alone_and_its_lost_images_are_made_again(run, tmp_path):
    place = make(request_of(run, tmp_path / "set"))
    before, record = made(tmp_path / "set"), (tmp_path / "set/set.json").read_bytes()
    assert make(request_of(run, tmp_path / "set")) == place
    assert (tmp_path / "set/set.json").read_bytes() == record
    (tmp_path / "set/images/000040.png").unlink()
    make(request_of(run, tmp_path / "set"))
    assert made(tmp_path / "set") == before


@pytest.mark.parametrize(("law", "former"), [("balanced", "repeated"), ("uniform", "random")])
def test_a_set_that_was_begun_under_a_former_word_for_its_law_goes_on(run, tmp_path, law, former):
    place = make(request_of(run, tmp_path / "set", law=law))
    before, record = made(tmp_path / "set"), tmp_path / "set/set.json"
    written = json.loads(record.read_text())
    assert written["labels"]["law"] == law
    written["labels"]["law"] = former
    record.write_text(json.dumps(written))
    (tmp_path / "set/images/000040.png").unlink()
    assert make(request_of(run, tmp_path / "set", law=law)) == place
    assert made(tmp_path / "set") == before


# What lies where


def test_an_npz_is_laid_out_as_adm_s_evaluator_reads_it(run, whole, tmp_path):
    place = make(request_of(run, tmp_path / "set", format="npz", batch=32))
    with np.load(place) as found:
        assert found.files == ["arr_0", "arr_1"]
        assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (71, 16, 16, 3))
        assert np.array_equal(found["arr_0"], pixels(whole))
        assert found["arr_1"].tolist() == LABELS


def test_a_tar_is_a_webdataset(run, whole, tmp_path):
    make(request_of(run, tmp_path / "set", format="tar", batch=32))
    shards = sorted((tmp_path / "set/shards").iterdir())
    assert [s.name for s in shards] == [
        "000000000-000000032.tar", "000000032-000000064.tar", "000000064-000000071.tar",
    ]  # fmt: skip
    seen = 0
    for shard in shards:
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            for image, label in zip(names[::2], names[1::2], strict=True):
                assert (image, label) == (f"{seen:09d}.png", f"{seen:09d}.cls")
                x = np.array(Image.open(tar.extractfile(image)))
                assert np.array_equal(x, pixels(whole[seen : seen + 1])[0])
                assert int(tar.extractfile(label).read()) == LABELS[seen]
                seen += 1
    assert seen == 71


def test_a_zip_has_a_folder_a_class_and_is_read_as_class_folders_are(run, whole, tmp_path):
    place = make(request_of(run, tmp_path / "set", format="zip"))
    with zipfile.ZipFile(place) as found:
        listed = json.loads(found.read("dataset.json"))["labels"]
        assert [label for _, label in listed] == LABELS
        for i in (0, 70):
            x = np.array(Image.open(found.open(listed[i][0])))
            assert np.array_equal(x, pixels(whole[i : i + 1])[0])
    source = ImageFolder(root=f"zip://::{place}", size=16, classes=6).open()
    x, label = source.read([0])
    assert len(source) == 71
    assert label.tolist() == [0]
    assert np.array_equal(x[0].permute(1, 2, 0).numpy(), pixels(whole[:1])[0])


def test_the_record_says_all_that_decides_the_images(run, model, tmp_path):
    make(request_of(run, tmp_path / "set"))
    record = json.loads((tmp_path / "set/set.json").read_text())
    assert record["weights"]["weights"] == "slow"
    assert record["weights"]["checkpoint"] == "images-000000000032"
    assert len(record["weights"]["sha256"]) == 64
    assert record["sampler"]["name"] == "heun"
    assert record["guidance"] == {
        "name": "classifier_free", "scale": 2.0, "t_min": 0.0, "t_max": 1.0,
        "exclusive": False,
    }  # fmt: skip
    assert (record["made"]["calls_per_image"], record["made"]["passes_per_image"]) == (5, 10)
    assert (record["seed"], record["images"], record["labels"]["classes"]) == (3, 71, 6)


def test_sets_go_to_other_file_systems(run, whole):
    import fsspec

    make(attrs.evolve(request_of(run, Path("x"), format="npz", batch=32), out="memory://sets/one"))
    fs = fsspec.filesystem("memory")
    assert sorted(p.rpartition("/")[2] for p in fs.ls("/sets/one", detail=False)) == [
        "grid.png", "samples.npz", "set.json",
    ]  # fmt: skip
    with fs.open("/sets/one/samples.npz") as file, np.load(file) as found:
        assert np.array_equal(found["arr_0"], pixels(whole))
    fs.rm("/sets", recursive=True)


# Other weights, other networks


def test_any_average_can_be_sampled(run, whole):
    other = load_model(run, weights="online").sample(LABELS[:4], seed=3)
    assert (other - whole[:4]).abs().max() > 1e-4


# torch says that an RMS norm of mixed types is slower; its result is the same
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_networks_may_compute_in_bfloat16(run, whole):
    x = load_model(run, precision="bfloat16").sample(LABELS[:32], seed=3)
    assert x.dtype == torch.float32
    # three significant digits, through five passes, guidance and a decoder
    assert 1e-5 < (x - whole[:32]).abs().mean() < 0.05


@needs("e2ediff-sampling")
def test_autoguidance_asks_an_earlier_checkpoint_of_the_run(run, model):
    """With an equal network it changes nothing; with another what its formula says."""
    earlier = "checkpoint: images-000000000016"
    auto = "guidance={name: autoguidance, scale: 2.0"
    weak = load_model(run, overrides=[f"{auto}, {earlier}}}"])
    same = load_model(run, overrides=[auto + "}"])
    plain = load_model(run, overrides=["guidance=null"])
    labels = LABELS[:3]
    torch.testing.assert_close(same.sample(labels), plain.sample(labels), rtol=0.0, atol=1e-5)
    assert (weak.sample(labels) - plain.sample(labels)).abs().max() > 1e-3
    (tile,) = weak.tiles(labels)
    assert (tile.calls, tile.passes) == (10, 10.0)
    assert [other.origin.checkpoint for other in weak.others] == ["images-000000000016"]
    z = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(0))
    condition = ClassLabels(plain.image.classes).accept(torch.tensor(labels), "the test")
    older = load_model(run, checkpoint="images-000000000016", overrides=["guidance=null"])
    x0, base = (m.denoiser()(z, 0.5, condition).x0 for m in (plain, older))
    torch.testing.assert_close(weak.denoiser()(z, 0.5, condition).x0, base + 2 * (x0 - base))


# Between images


def test_the_ends_of_an_interpolation_are_the_samples_of_its_seeds(model):
    strip = model.interpolate((3, 4), 2, frames=5)
    assert strip.shape == (5, 3, 16, 16)
    assert torch.equal(strip[0], model.sample([2], seed=3)[0])
    assert torch.equal(strip[-1], model.sample([2], seed=4)[0])
    jumps = strip.diff(dim=0).flatten(1).norm(dim=1)
    assert jumps.max() < 0.9 * (strip[0] - strip[-1]).norm(), "the way is gone in steps"


def test_a_reconstruction_does_not_depend_on_its_neighbours(model):
    x = torch.rand(37, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = model.reconstruct(x)
    assert torch.equal(model.reconstruct(x[:1]), whole[:1])


# The pipeline


def test_the_pipeline_makes_the_model_s_images_as_pil(run, model):
    import e2ediff

    pipe = e2ediff.pipeline(run).to("cpu")
    found = pipe([0, 3], seed=5).images
    assert [image.size for image in found] == [(16, 16), (16, 16)]
    assert np.array_equal(np.stack([*map(np.array, found)]), pixels(model.sample([0, 3], seed=5)))
    x = pipe(1, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    wanted = model.with_steps(2).with_options("guidance", scale=1.0).sample([1])
    assert torch.equal(x, (wanted + 1) / 2)
    g = (torch.Generator().manual_seed(9) for _ in range(2))
    one, two = (pipe(0, generator=next(g), output_type="pt").images for _ in range(2))
    assert torch.equal(one, two)
    assert (one - pipe(0, output_type="pt").images).abs().max() > 1e-3
