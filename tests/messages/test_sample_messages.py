"""`sample`, `interpolate`, `reconstruct` as a user meets them: messages, exits, what is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from command_line import e2ediff, needs, trained
from PIL import Image
from tiny_recipe import tiny

from e2ediff.errors import ResourceError
from e2ediff.host.plugins import load
from e2ediff.parts.sources.own_images import list_images, read_images
from e2ediff.sample.load import ModelRef, load_model
from e2ediff.sample.request import SampleRequest
from e2ediff.sample.sample_set import make_set
from e2ediff.sample.set_record import check_space

TINY = tiny(
    steps="2",
    data="{name: fashion_mnist, size: 32}",
    cadence="{log: 2, diagnose: 2, preview: 2, checkpoint: 2}",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), TINY)


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    return "run"


def refused(code: int, *words: object) -> list[str]:
    done = e2ediff(*words)
    assert done.code == code, done
    assert done.out == ""
    return done.err[done.err.index("rror: ") + 6 :].splitlines()


# Which images


def test_classes_are_given_by_index_name_and_range(run: str) -> None:
    words = ("--label", "bag", "--labels", "0-2,sneaker, none", "--count", 2, "--out", "s")
    assert e2ediff("sample", run, *words).out == "s\n"
    found = [entry["label"] for entry in json.loads(Path("s/samples.json").read_text())]
    assert found == [8, 0, 1, 2, 7, 10] * 2


def test_balanced_and_random_sets_follow_their_laws(run: str) -> None:
    words = ("--format", "npz", "--steps", 1)
    assert e2ediff("sample", run, "--balanced", 45, *words, "--out", "b").out == "b/samples.npz\n"
    with np.load("b/samples.npz") as found:
        counts = np.bincount(found["arr_1"])
    assert counts.tolist() == [5] * 5 + [4] * 5
    drawn = []
    for seed in (0, 0, 1):
        out = f"r{len(drawn)}"
        e2ediff("sample", run, "--random", 40, *words, "--seed", seed, "--out", out)
        with np.load(f"{out}/samples.npz") as found:
            drawn.append(found["arr_1"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 5
    record = json.loads(Path("r0/set.json").read_text())
    assert record["labels"]["law"] == "uniform"


def test_a_class_that_is_not_there_is_said_with_the_one_that_was_meant(run: str) -> None:
    (line,) = refused(5, "sample", run, "--labels", "0-3,sneakr")
    assert line.startswith("--labels sneakr: no such class. Did you mean 'sneaker'? Expected an ")
    (line,) = refused(5, "sample", run, "--labels", "8-12")
    assert line.startswith("--labels 12: no such class. Expected an index from 0 to 9 or one of")
    assert refused(5, "sample", run, "--labels", "5-2") == [
        "--labels 5-2: runs backwards; write 2-5."
    ]
    for text in ("²", "9" * 5000, "٣"):
        (line,) = refused(5, "sample", run, "--label", text)
        assert line.startswith(f"--label {text}: no such class. Expected an index from 0 to 9")
    assert not Path(run, "samples/seed-0").exists()


def test_two_numbers_of_images_are_refused(run: str) -> None:
    assert refused(2, "sample", run, "--count", 2, "--balanced", 10) == [
        "give only one of --count, --balanced and --random"
    ]


# Made with what


@needs("e2ediff-sampling")
def test_guidance_that_the_sampler_would_change_is_refused(run: str) -> None:
    """By `sample`, and by `check` of a recipe."""
    given = ("--set", "sampler=heun", "--set", "guidance=cfg_plus_plus")
    for words in (("sample", run), ("check", Path(run) / "resolved.yaml")):
        head, line = refused(3, *words, *given)
        assert head.endswith("resolved.yaml: 1 problem")
        assert "guidance.strength: cfg_plus_plus scales by a step's length" in line
        assert "choose euler, dpmpp_2m or unipc" in line


def test_guidance_away_from_an_answer_that_was_never_taught_is_refused(tmp_path: Path) -> None:
    """Without dropped labels a network has no answer without one; training says so first."""
    text = tiny(steps="1", label_drop="0.0")
    run = trained(tmp_path, text)
    guided = ("--set", "guidance={name: classifier_free, scale: 2.0}")
    for words in (
        ("sample", run, "--count", "1", "--out", tmp_path / "set", *guided),
        ("check", tmp_path / "tiny.yaml", *guided),
    ):
        done = e2ediff(*words)
        assert done.code == 3
        assert "guidance: it needs the answer without a condition, which nothing" in done.err
        assert "set guidance: null, or train with label_drop: 0.1" in done.err
    for harmless in ("guidance={name: classifier_free, scale: 1.0}", "guidance=null"):
        done = e2ediff("check", tmp_path / "tiny.yaml", "--set", harmless)
        assert done.code == 0, done.err


def test_set_changes_the_sampler_and_the_guidance_and_nothing_else(run: str) -> None:
    guidance = "guidance={name: classifier_free, scale: 3}"
    given = ("--set", "sampler={name: euler, steps: 3}", "--set", guidance)
    assert e2ediff("sample", run, "--count", 1, *given, "--out", "s").code == 0
    record = json.loads(Path("s/set.json").read_text())
    assert record["sampler"]["name"] == "euler"
    assert record["guidance"]["scale"] == 3.0
    assert record["made"]["passes_per_image"] == 6.0
    assert refused(3, "sample", run, "--set", "backbone.width=8", "--set", "seed=1") == [
        "sampling: 2 problems",
        "  --set 1: backbone.width: belongs to training and cannot be changed now. "
        "Only sampler and guidance can.",
        "  --set 2: seed: belongs to training and cannot be changed now. "
        "Only sampler and guidance can.",
    ]
    (_, line) = refused(3, "sample", run, "--set", "sampler=huen")
    assert "unknown sampler 'huen'. Did you mean 'heun'?" in line


@needs("e2ediff-sampling")
def test_steps_of_a_sampler_that_chooses_its_own_are_refused(run: str) -> None:
    (_, line) = refused(3, "sample", run, "--set", "sampler=dopri5", "--steps", 9)
    assert "sampler: unknown option 'steps'" in line


@needs("e2ediff-sampling")
def test_a_weak_network_of_other_latents_is_refused(run: str) -> None:
    text = Path(run, "resolved.yaml").read_text()
    Path("other.yaml").write_text(text.replace("latent_dim: 4", "latent_dim: 8"))
    assert e2ediff("run", "other.yaml", "--out", "other").code == 0
    auto = "guidance={name: autoguidance, run: other}"
    first, theirs, expected, way_out = refused(6, "sample", run, "--set", auto)
    assert first == (
        "latents of run, which other is to guide, differ in dim from what is expected here."
    )
    assert theirs.startswith("  theirs:   16 tokens x 4 on a grid of 4 x 4, norm layer")
    assert expected.startswith("  expected: 16 tokens x 8 on a grid of 4 x 4, norm layer")
    assert way_out.startswith("  Decode and denoise latents with the weights that encoded them")
    Path("paths.yaml").write_text(text.replace("name: linear", "name: cosine"))
    assert e2ediff("run", "paths.yaml", "--out", "paths").code == 0
    (_, line) = refused(3, "sample", run, "--set", "guidance={name: autoguidance, run: paths}")
    assert line.startswith("  guidance: paths has other interpolant: Cosine()")
    assert line.endswith("Give a run that was trained on the same latents.")
    auto = "guidance={name: autoguidance, run: nowhere}"
    (line,) = refused(6, "sample", run, "--set", auto)
    assert line.startswith("nowhere: not a run directory")


@needs("e2ediff-sampling")
def test_a_weak_network_of_classes_with_other_names_is_refused(run: str) -> None:
    shutil.copytree(run, "other")
    record = json.loads(Path(run, "run.json").read_text())
    names = [f"class {i}" for i in range(10)]
    swapped = [*names[:3], names[4], names[3], *names[5:]]
    sample = ("sample", run, "--count", 1, "--set", "guidance={name: autoguidance, run: other}")
    for place, given in ((run, names), ("other", swapped)):
        Path(place, "run.json").write_text(json.dumps({**record, "class_names": given}))
    assert refused(3, *sample) == [
        "sampling: 1 problem",
        "  guidance: other has other classes: 3 is 'class 4' there, 'class 3' here. "
        "Give a run whose classes have the same numbers.",
    ]
    Path("other", "run.json").write_text(json.dumps({**record, "class_names": names}))
    assert e2ediff(*sample).code == 0


@needs("e2ediff-sampling")
def test_statistics_of_the_norm_may_differ_within_a_run_and_not_between_runs(run: str) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        changes = ("--set", "backbone.latent_norm=batch", "--set", f"seed={seed}")
        assert e2ediff("run", Path(run, "recipe.yaml"), *changes, "--out", name).code == 0
    shutil.copytree("one", "copy")
    own = e2ediff("sample", "one", "--count", 1, "--weights", "online", "--out", "own")
    assert own.code == 0
    for weak, weights, code in (
        ("two", "target", 6),
        ("copy", "target", 0),  # the same latents, in another place
        ("copy", "online", 6),
        ("./one", "online", 0),  # the run itself, whose averages have statistics of their own
    ):
        auto = f"guidance={{name: autoguidance, run: {weak}, weights: {weights}}}"
        out = f"{weak}-{weights}"
        done = e2ediff("sample", "one", "--count", 1, "--set", auto, "--out", out)
        assert (done.code, "differ in statistics from" in done.err) == (code, code == 6), done.err


# Where they go


def test_without_out_each_set_has_its_own_place_and_the_same_command_the_same(run: str) -> None:
    first = e2ediff("sample", run, "--count", 1).out
    other = e2ediff("sample", run, "--count", 1, "--steps", 1).out
    again = e2ediff("sample", run, "--count", 1).out
    assert (first, other, again) == (
        "run/samples/seed-0\n", "run/samples/seed-0-2\n", "run/samples/seed-0\n",
    )  # fmt: skip


def test_without_out_a_set_killed_at_its_beginning_is_taken_up(run: str) -> None:
    killed = Path("run/samples/seed-5")
    killed.mkdir(parents=True)
    (killed / ".tmp-set.json-0123abcd").write_text("{")
    done = e2ediff("sample", run, "--count", 1, "--seed", 5)
    assert (done.code, done.out) == (0, f"{killed}\n"), done.err
    assert (killed / "images/000000.png").exists()


def test_another_set_in_out_is_refused_field_by_field_and_replaced_when_told(run: str) -> None:
    sample = ("sample", run, "--label", 0, "--count", 3, "--out", "s")
    assert e2ediff(*sample).code == 0
    lines = refused(6, *sample, "--steps", 1, "--seed", 7)
    assert lines == [
        "s: holds another set of images:",
        "  sampler.steps: 2 there, 1 here",
        "  seed: 0 there, 7 here",
        "  Choose another --out, or give --overwrite.",
    ]
    before = Path("s/images/000000.png").read_bytes()
    assert e2ediff(*sample, "--seed", 7, "--overwrite").code == 0
    assert Path("s/images/000000.png").read_bytes() != before
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("")
    said = "mine: is not empty, and holds no set of images made by e2ediff."
    assert refused(6, "sample", run, "--out", "mine")[0] == said
    (line,) = refused(6, "sample", run, "--out", "mine", "--overwrite")
    assert "--overwrite does not touch it" in line
    assert Path("mine/thesis.txt").exists()


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(run: str) -> None:
    """EFBIG when the blocks are assembled: the file of 96 images is larger than any block."""
    sample = ("sample", run, "--balanced", 96, "--batch", 32, "--format", "npz", "--out", "s")
    with _largest_file(60_000):
        (line,) = [text for text in refused(8, *sample) if "cannot write" in text]
    assert line.startswith("s/samples.npz: cannot write: File too large (needed: 98,304 bytes")
    assert line.endswith("or choose another --out; what was saved before is intact.")
    assert len(os.listdir("s/parts")) == 3
    done = e2ediff(*sample)
    assert done.out == "s/samples.npz\n"
    assert "s: 96 of 96 images are there already" in done.err
    with np.load("s/samples.npz") as found:
        assert len(found["arr_0"]) == 96
    assert not Path("s/parts").exists()


def _files(place: str) -> dict[str, bytes]:
    """Content by path; the description without what was found by making it."""
    found = {str(f.relative_to(place)): f.read_bytes() for f in Path(place).rglob("*.*")}
    record = json.loads(found.pop("set.json"))
    record.pop("made", None)
    return {**found, "set.json": json.dumps(record).encode()}


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["png", "npz", "zip", "tar"])
def test_a_disk_that_fills_in_the_middle_of_a_block_loses_nothing(run: str, kind: str) -> None:
    """The same command goes on, and the set is that of a disk with space, byte for byte."""
    host, quiet = load(), lambda _: None
    request = SampleRequest(
        model=ModelRef(run=run, device="cpu"), labels=(3,) * 96, batch=32, format=kind, out="whole"
    )
    make_set(request, host, threads=1, say=quiet, update=quiet)
    whole = _files("whole")
    first = 32  # number of the first image that is lost
    if kind == "png":  # the first image of the second block fits, and a later one does not
        sizes = [len(whole[f"images/{i:06d}.png"]) for i in range(96)]
        size = sizes[32]
        first = next(i for i in range(32, 64) if sizes[i] > size)
        refused_path, needed = f"s/images/{first:06d}.png", sizes[first]
    else:  # a block is one file, of which the first third can be written
        size = sum(map(len, (whole[n] for n in whole if n.startswith(("samples", "shards"))))) // 9
        block = {"npz": "parts/{}.npy", "zip": "parts/{}.zip", "tar": "shards/{}.tar"}[kind]
        refused_path, needed = f"s/{block.format('000000032-000000064')}", size + 1

    request, limit = attrs.evolve(request, out="s"), ExitStack()

    def fill(line: str) -> None:
        if line.startswith("32/96"):  # the first block is stored
            limit.enter_context(_largest_file(size))

    with limit, pytest.raises(ResourceError) as caught:
        make_set(request, host, threads=1, say=quiet, update=fill)
    said = str(caught.value)
    assert said.startswith(f"{refused_path}: cannot write: File too large (needed: ")
    assert int(said.partition("needed: ")[2].split()[0].replace(",", "")) >= needed
    assert said.endswith("or choose another --out; what was saved before is intact.")
    assert "\n" not in said
    left = _files("s")
    assert not [name for name in left if ".tmp-" in name]
    assert all(whole.get(name, content) == content for name, content in left.items())
    assert request.output(request.model.load(host)).finished() == set(range(first))

    told: list[str] = []
    make_set(request, host, threads=1, say=told.append, update=quiet)
    # A tile that was begun is made again.
    assert told == ["s: 32 of 96 images are there already"]
    assert _files("s") == whole


def test_a_set_that_cannot_fit_is_refused_before_anything_is_computed(run: str) -> None:
    output = SampleRequest(
        model=ModelRef(run=run), labels=(0,) * 10, format="npz", out="s"
    ).output(load_model(run))
    assert output.bytes_needed(missing=4) == (4 + 10) * 32 * 32
    free = shutil.disk_usage(".").free
    with pytest.raises(ResourceError, match=f"s: the set needs {2 * free:,} bytes and "):
        check_space(output.store, 2 * free)
    check_space(output.store, output.bytes_needed(missing=4))


@pytest.mark.usefixtures("forks")
@needs("e2ediff-sampling")
def test_what_fails_in_a_process_is_said_as_in_one(run: str) -> None:
    Path("s").mkdir()
    given = ("--set", "sampler={name: dopri5, rtol: 1e-9, atol: 1e-9, max_calls: 20}")
    words = ("--balanced", 64, "--batch", 32, "--processes", 2, "--threads", 1, "--out", "s")
    (_, line) = refused(3, "sample", run, *given, *words)
    assert line.startswith("  sampler.max_calls: 19 network calls have reached t = ")
    assert line.endswith("Raise it, or rtol and atol.")


@pytest.mark.usefixtures("forks")
def test_a_process_that_dies_is_said_and_the_same_command_goes_on(run: str) -> None:
    """Killed by the system, as for want of memory; both, once the first tile is stored."""
    request = SampleRequest(
        model=ModelRef(run=run, device="cpu"), labels=(0,) * 128, batch=8, out="s"
    )
    host, said = load(), []

    def kill(line: str) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(ResourceError, match=r"ended with code -9, .* the same command makes "):
        make_set(request, host, processes=2, threads=1, say=said.append, update=kill)
    there = len(os.listdir("s/images"))
    assert 8 <= there < 128
    request = attrs.evolve(request, batch=16)
    assert make_set(request, host, threads=1, say=said.append, update=said.append) == "s"
    assert said[0].endswith(" of 128 images are there already")
    kept = int(said[0].split()[1])
    assert 8 <= kept <= there  # tiles of which only some images were stored are made again
    assert len([n for n in os.listdir("s/images") if n.endswith(".png")]) == 128


# Interpolations and reconstructions


@pytest.fixture
def photos() -> Path:
    g = torch.Generator().manual_seed(0)
    Path("photos/deeper").mkdir(parents=True)
    for name, size in (("a.png", (40, 50)), ("deeper/b.jpg", (33, 70)), ("c.png", (32, 32))):
        noise = torch.randint(256, (*size, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(Path("photos", name))
    return Path("photos")


def test_an_interpolation_is_a_strip_for_each_class(run: str) -> None:
    done = e2ediff("interpolate", run, "--seeds", 3, 4, "--label", "bag", "--label", 0,
                   "--frames", 5)  # fmt: skip
    assert done.out == "run/samples/interpolation-3-4.png\n"
    with Image.open("run/samples/interpolation-3-4.png") as image:
        # A border of eight and a caption; each strip has a title, and frames enlarged to 128.
        assert image.size == (5 * 132 + 16, 32 + 2 * (16 + 132 + 8))


def test_images_are_interpolated_through_the_encoder(run: str, photos: Path) -> None:
    words = (photos / "a.png", photos / "c.png", "--frames", 3, "--out", "strip.png")
    assert e2ediff("interpolate", run, *words).out == "strip.png\n"
    with Image.open("strip.png") as image:
        strip = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    model = load_model(run)
    x = read_images(["photos/a.png", "photos/c.png"], model.recipe.data.image)
    ends = model.reconstruct(x)[:, 0]
    top = strip.shape[0] - 8 - 130  # below the caption and a title: frames enlarged to 128
    for i, place in ((0, 10), (1, 10 + 2 * 132)):
        shown = strip[top : top + 128 : 4, place : place + 128 : 4]
        shown = shown if shown.ndim == 2 else shown[..., 0]
        torch.testing.assert_close(shown, ends[i], rtol=0.0, atol=0.01)


def test_an_interpolation_of_nothing_or_of_both_is_refused(run: str, photos: Path) -> None:
    both = ("--seeds", 1, 2, photos / "a.png", photos / "c.png")
    for words in ((), both, (photos / "a.png",)):
        assert refused(2, "interpolate", run, *words)[-1] == "give --seeds A B, or two images"
    words = (photos / "a.png", photos / "c.png", "--label", 0)
    assert refused(2, "interpolate", run, *words)[-1] == (
        "--label and --set concern sampling; images are only decoded"
    )


def test_one_s_own_images_are_reconstructed_each_with_its_psnr(run: str, photos: Path) -> None:
    done = e2ediff("reconstruct", run, photos)
    psnr, place = done.out.splitlines()
    assert place == "run/reconstructions/reconstructions.png"
    listed = json.loads(Path("run/reconstructions/psnr.json").read_text())
    names = [entry["image"].rpartition("photos/")[2] for entry in listed]
    assert names == ["a.png", "c.png", "deeper/b.jpg"]
    model = load_model(run)
    x = read_images(list_images([str(photos)]), model.recipe.data.image)
    mean_square = (model.reconstruct(x) - x).div(2).square().mean(dim=(1, 2, 3))
    for entry, error in zip(listed, mean_square.tolist(), strict=True):
        assert entry["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
        with Image.open(f"run/reconstructions/{entry['file']}") as image:
            assert image.size == (32, 32)
    assert psnr == f"psnr {np.mean([e['psnr'] for e in listed]):.2f} dB over 3 images"


def test_images_that_are_missing_or_damaged_are_named(run: str, photos: Path) -> None:
    (line,) = refused(5, "reconstruct", run, "nowhere")
    assert line.startswith("nowhere: no such file or folder; give an image, a folder of")
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("")
    (line,) = refused(5, "reconstruct", run, "empty")
    assert line.startswith("empty: holds no images")
    data = (photos / "c.png").read_bytes()
    (photos / "c.png").write_bytes(data[: len(data) // 2])
    (line,) = refused(5, "reconstruct", run, photos)
    assert "photos/c.png: damaged image" in line
    assert not Path("run/reconstructions").exists()
