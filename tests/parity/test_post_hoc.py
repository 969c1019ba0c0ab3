"""Averages of any width after training: what runs store, and what is made of it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import e2ediff
from safetensors import safe_open
from safetensors.torch import load_file

from e2ediff.host.plugins import load
from e2ediff.sample.load import load_model
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

SETS = ["post_hoc={widths: [0.05, 0.1], every: 3}", "steps=36", "cadence.checkpoint=10"]
SETS += ["cadence.diagnose=100", "target={decay: 0.9}", "backbone.width=16", "backbone.depth=1"]
SETS += ["backbone.heads=1"]


def run(recipe: Path, out: Path, *changes: str, resume: bool = False) -> None:
    quiet = Progress(io.StringIO())
    train(load(), str(recipe), [*SETS, *changes], str(out), resume=resume, progress=quiet)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_text) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(tiny_text)
    return path


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    run(recipe, recipe.parent / "run")
    return recipe.parent / "run"


def weights(run: Path, name: str, checkpoint: str | None = None) -> dict[str, torch.Tensor]:
    return load_model(str(run), weights=name, checkpoint=checkpoint).net.state_dict()


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5


def snapshots(run: Path) -> list[int]:
    return [int(p.name[-12:]) // 8 for p in sorted((run / "post_hoc/checkpoints").iterdir())]


def test_snapshots_have_a_cadence_of_their_own_and_outlive_checkpoints(trained) -> None:
    assert snapshots(trained) == list(range(3, 36, 3))
    assert len(list((trained / "checkpoints").iterdir())) == 2
    one = trained / "post_hoc/checkpoints/images-000000000024"
    assert {p.name for p in one.iterdir()} == {
        "MANIFEST.json", "state.json", "ema-0.05.safetensors", "ema-0.1.safetensors",
    }  # fmt: skip


def test_a_tracked_width_is_returned_to_the_bit(trained) -> None:
    """The latent norm's statistics, too: they are those of the same training images."""
    stored, made = weights(trained, "ema-0.1"), weights(trained, "ema:0.1")
    assert all(torch.equal(stored[name], made[name]) for name in stored)


def test_an_untracked_width_is_that_of_a_run_that_tracked_it(trained, recipe, tmp_path) -> None:
    run(recipe, tmp_path / "run", "post_hoc.widths=[0.05, 0.1, 0.15]")
    tracked, made = weights(tmp_path / "run", "ema-0.15"), weights(trained, "ema:0.15")
    near = weights(trained, "ema:0.1")

    assert apart(tracked, made) < 0.02 * apart(tracked, near)


def test_a_width_is_exported_as_it_is_sampled(trained, tmp_path) -> None:
    place = tmp_path / "w.safetensors"
    done = e2ediff("ckpt", "export", trained, place, "--weights", "ema:0.08")
    assert done.code == 0, done.err
    exported, made = load_file(place), weights(trained, "ema:0.08")
    assert all(torch.equal(exported[name], made[name]) for name in made)
    assert apart(made, weights(trained, "ema:0.1")) > 0
    with safe_open(place, "pt") as file:
        said = file.metadata()
    assert (said["weights"], json.loads(said["latent"])["tokens"] > 0) == ("ema:0.08", True)


def test_a_width_belongs_to_its_checkpoint(trained) -> None:
    """Snapshots of later steps are not used."""
    early = "images-000000000240"
    made, later = weights(trained, "ema:0.08", early), weights(trained, "ema:0.08")
    lower, upper = (weights(trained, f"ema-{w}", early) for w in (0.05, 0.1))
    assert apart(made, lower) < apart(upper, lower) < apart(made, later)


def test_a_run_that_was_interrupted_continues_the_averages_and_snapshots(
    trained, recipe, tmp_path
) -> None:
    """Snapshots after the checkpoint it goes on from are made anew, with the same bits."""
    out = tmp_path / "run"
    run(recipe, out, "steps=20", "post_hoc.every=3")
    assert snapshots(out) == [3, 6, 9, 12, 15, 18]
    shutil.rmtree(out / "checkpoints/images-000000000160")  # back to step 10
    shutil.copytree(
        trained / "post_hoc/checkpoints/images-000000000264",
        out / "post_hoc/checkpoints/images-000000000264",
    )
    run(recipe, out, resume=True)
    assert snapshots(out) == snapshots(trained)
    for name in ("ema-0.05", "ema-0.1", "ema:0.07"):
        there, here = weights(trained, name), weights(out, name)
        assert all(torch.equal(there[k], here[k]) for k in there)


def test_training_is_the_same_with_and_without_profiles(trained, recipe, tmp_path) -> None:
    run(recipe, tmp_path / "run", "post_hoc=null")
    for name in ("online", "target"):
        there, here = weights(trained, name), weights(tmp_path / "run", name)
        assert all(torch.equal(there[k], here[k]) for k in there)
    assert not (tmp_path / "run/post_hoc").exists()
    done = e2ediff("sample", tmp_path / "run", "--weights", "ema:0.08")
    assert done.code == 6
    assert "tracked no profiles. It has online, target; train with `post_hoc: {}`" in done.err


def test_half_precision_halves_the_snapshots(trained, recipe, tmp_path) -> None:
    run(recipe, tmp_path / "run", "post_hoc.precision=float16", "post_hoc.keep=8")
    assert snapshots(tmp_path / "run") == list(range(12, 36, 3))
    file = "post_hoc/checkpoints/images-000000000144/ema-0.1.safetensors"
    sizes = [(place / file).stat().st_size for place in (trained, tmp_path / "run")]
    assert sizes[1] < 0.6 * sizes[0]
    there, here = (weights(place, "ema:0.08") for place in (trained, tmp_path / "run"))
    for name in there:
        torch.testing.assert_close(there[name], here[name], rtol=2e-3, atol=2e-3)


# Messages


@pytest.mark.parametrize(
    ("width", "said"),
    [
        ("0.28", "width 0.28 cannot be reconstructed: the nearest mixture of widths 0.05, 0.1"),
        ("wide", "expected a width in (0, 0.289], as in ema:0.08"),
        ("0.5", "expected a width in (0, 0.289], as in ema:0.08"),
    ],
)  # fmt: skip
def test_a_width_out_of_reach_is_refused_with_what_can_be_had(trained, width, said) -> None:
    done = e2ediff("sample", trained, "--weights", f"ema:{width}")
    assert (done.code, done.out) == (6, "")
    assert said in done.err


def test_too_few_snapshots_are_told_with_the_widths_in_reach(trained, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/post_hoc")
    assert weights(tmp_path / "run", "ema:0.06")  # of the checkpoint's own averages
    done = e2ediff("sample", tmp_path / "run", "--weights", "ema:0.15")
    assert done.code == 6
    assert "at 1 moments misses" not in done.err
    assert "at 1 moment misses its profile by 25%" in done.err
    assert "more snapshots (a smaller `post_hoc.every`) reach further" in done.err


def test_damaged_snapshots_are_refused_or_left_out(trained, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    folder = tmp_path / "run/post_hoc/checkpoints"
    (folder / "images-000000000024/MANIFEST.json").unlink()
    said: list[str] = []
    assert load_model(str(tmp_path / "run"), weights="ema:0.08", warn=said.append)
    assert len(said) == 1
    assert "MANIFEST.json is missing" in said[0]
    file = folder / "images-000000000048/ema-0.1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = e2ediff("sample", tmp_path / "run", "--weights", "ema:0.08")
    assert done.code == 6
    assert "ema-0.1.safetensors does not match its hash" in done.err


def test_reconstructed_weights_say_in_the_set_what_they_are(trained, tmp_path) -> None:
    done = e2ediff("sample", trained, "--label", 1, "--count", 1, "--weights", "ema:0.08",
                   "--out", tmp_path / "set")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "set/set.json").read_text())["weights"]
    assert found["weights"] == "ema:0.08"
    assert len(found["sha256"]) == 64
    assert Store(str(tmp_path / "set")).exists("images/000000.png")
