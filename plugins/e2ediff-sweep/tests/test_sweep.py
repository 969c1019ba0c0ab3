"""`sweep` as a user meets it: what is scored, what is kept, what is refused before it starts."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import OURS, e2ediff, needs, trained
from e2ediff_sweep import search
from e2ediff_sweep.axes import parse_axes
from e2ediff_sweep.candidates import open_run
from half_only import offer_half_only
from tiny_recipe import tiny

from e2ediff.evaluate.images import Samples
from e2ediff.evaluate.passport import read_card
from e2ediff.host.plugins import load
from e2ediff.sample.load import ModelRef

TINY = tiny(
    steps="12",
    data="{name: fashion_mnist, size: 32}",
    post_hoc="{every: 1}",
    optimizer="{name: adamw, lr: 0.01}",
    sampler="{name: euler, steps: 4}",
    guidance="{name: classifier_free, scale: 1.5}",
    cadence="{log: 12, diagnose: 100, preview: 100, checkpoint: 100}",
)
FEW = ("--count", 8, "--features", "random_projection")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), TINY)


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(finished.parent / "cache"))
    shutil.copytree(finished, "run")
    return "run"


def table(place: str = "run/sweep") -> list[dict[str, str]]:
    return list(csv.DictReader(Path(place, "sweep.csv").read_text().splitlines()))


def scored(place: str = "run/sweep") -> set[str]:
    return {p.name for p in Path(place, "scores").iterdir()}


# What is scored


def test_axes_are_searched_one_after_another_from_the_recipes_settings(run: str) -> None:
    done = e2ediff("sweep", run, *FEW, "--vary", "weights=target,ema:0.1,online",
                   "--vary", "guidance.scale=1,3", "--vary", "sampler.steps=2")  # fmt: skip
    assert done.code == 0, done.err
    rows = table()
    assert len(rows) == 3 + 2 + 1
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    calls = {row["settings"]: float(row["network_calls"]) for row in rows}
    assert calls["guidance.scale=1"] == 4
    assert calls["guidance.scale=3"] == 8
    assert rows[0]["tied"] == "yes"
    for row in rows:
        assert float(row["low"]) < float(row["score"]) < float(row["high"])
        behind, error = float(row["behind"]), float(row["behind_error"])
        assert (row["tied"] == "yes") == (behind <= 1.96 * error)


def test_a_grid_scores_every_combination_once(run: str) -> None:
    done = e2ediff("sweep", run, *FEW, "--grid", "--vary", "guidance.scale=1,2",
                   "--vary", "sampler={name: heun, steps: 2},{name: euler, steps: 3}")  # fmt: skip
    assert done.code == 0, done.err
    found = {(row["settings"], row["network_calls"]) for row in table()}
    heun, euler = "sampler={name: heun, steps: 2}", "sampler={name: euler, steps: 3}"
    assert found == {
        (f"{heun} guidance.scale=1", "3.0"), (f"{heun} guidance.scale=2", "6.0"),
        (f"{euler} guidance.scale=1", "3.0"), (f"{euler} guidance.scale=2", "6.0"),
    }  # fmt: skip


def test_each_score_has_a_passport_and_the_best_one_a_command(run: str) -> None:
    words = ("--vary", "weights=ema:0.1", "--vary", "guidance.scale=3", "--full", 16)
    words += ("--reference", "held-out")  # fewer images: full scores compare all pairs
    done = e2ediff("sweep", run, *FEW, *words)
    assert done.code == 0, done.err
    (best, *_) = table()
    card = read_card(f"run/sweep/scores/{best['file']}")
    assert card.scores["KD-RandomProjection128"].value == pytest.approx(float(best["score"]))
    assert card.passport.subject["weights"] == best["weights"]
    width = 0.1 if best["weights"] == "ema:0.1" else None
    assert card.passport.subject["ema_width"] == width
    assert card.passport.protocol["images"] == 8
    assert card.passport.protocol["reference_images"] == 80
    line = next(text for text in done.out.splitlines() if text.startswith("full evaluation"))
    command = shlex.split(line.partition(": ")[2])[1:]
    assert command[:4] == ["eval", "run", "--weights", best["weights"]]
    assert command[command.index("--seed") + 1] == "1"
    assert len(list(Path("run/scores").iterdir())) == 1  # --full ran it
    full = read_card(str(next(Path("run/scores").iterdir())))
    assert full.passport.protocol["images"] == 16
    assert full.passport.subject["weights_sha256"] == card.passport.subject["weights_sha256"]
    assert full.passport.protocol["guidance"] == card.passport.protocol["guidance"]


def test_an_interrupted_sweep_goes_on_and_gives_the_same_table(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sweep", run, *FEW, "--vary", "guidance.scale=1,2,3")
    assert e2ediff(*words, "--out", "whole").code == 0
    whole, passes = scored("whole"), search.feature_pass

    def interrupted(*args, **options):
        if len(list(Path("run/sweep/scores").glob("*"))) == 2:
            raise KeyboardInterrupt
        return passes(*args, **options)

    with monkeypatch.context() as during:
        during.setattr(search, "feature_pass", interrupted)
        assert e2ediff(*words).code == 130
    assert len(scored()) == 2
    kept = {name: Path("run/sweep/scores", name).stat().st_mtime_ns for name in scored()}
    done = e2ediff(*words)
    assert "2 candidates are scored already" in done.err
    assert all(Path("run/sweep/scores", n).stat().st_mtime_ns == t for n, t in kept.items())
    assert scored() == whole
    assert Path("run/sweep/sweep.csv").read_text() == Path("whole/sweep.csv").read_text()


def test_another_process_samples_what_this_one_does(run: str) -> None:
    """Processes load their own model, from what is sent to them."""
    here = Samples(ModelRef(run=run, weights="ema:0.07", overrides=("sampler.steps=2",)), [1, 2])
    there = pickle.loads(pickle.dumps(here))
    (ours,), (theirs,) = here.batches(0, 2, 2), there.batches(0, 2, 2)
    assert torch.equal(ours, theirs)
    assert there.model.recipe.sampler.steps == 2


def test_what_is_set_for_all_holds_in_every_block(run: str) -> None:
    swept = open_run(load(), ModelRef(run=run, overrides=("sampler.steps=3",)), print)
    (axis,) = parse_axes(["sampler=heun,euler+guidance.scale=1"])
    candidates = [swept.candidate([value]) for value in axis.values]
    assert [swept.recipe_of(c).sampler.steps for c in candidates] == [3, 3]
    assert candidates[0].words == "--weights target --set sampler=heun --set sampler.steps=3"
    # Scale 1 is no guidance, at whatever times.
    (axis,) = parse_axes(["guidance.scale=1,1+guidance.t_min=0.2,2"])
    assert len({swept.key(swept.candidate([value])) for value in axis.values}) == 2


def test_without_axes_widths_guidance_and_samplers_are_searched(run: str) -> None:
    lines = e2ediff("sweep", run, "--dry-run").out.splitlines()
    assert {"weights=ema:0.1", "weights=target", "guidance.scale=2"} < {*lines}
    assert "guidance.t_min=0.2 guidance.t_max=0.8" in lines
    assert "sampler={name: heun, steps: 2}" in lines
    assert lines[-1] == "sampler.spacing=karras"
    assert not Path("run/sweep").exists()
    fixed = ("--set", "guidance=null", "--set", "sampler.steps=2", "--weights", "target")
    assert e2ediff("sweep", run, "--dry-run", *fixed).out == ""


@needs("e2ediff-sampling")
def test_samplers_that_do_not_suit_the_guidance_are_not_searched(run: str) -> None:
    suited = e2ediff("sweep", run, "--dry-run", "--set", "guidance=cfg_plus_plus").out
    assert "sampler={name: dpmpp_2m, steps: 4}" in suited
    assert "heun" not in suited


def test_samplers_that_are_not_installed_are_not_searched(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2EDIFF_BLOCK", "further_sampling")
    lines = e2ediff("sweep", run, "--dry-run").out.splitlines()
    assert "sampler={name: heun, steps: 2}" in lines
    assert not [line for line in lines if "dpmpp_2m" in line]


def test_a_run_may_be_given_as_a_path(run: str) -> None:
    swept = open_run(load(), ModelRef(run=Path(run)), print)
    assert swept.directory.path == open_run(load(), ModelRef(run=run), print).directory.path


@pytest.mark.parametrize("kernel", ["auto", "sdpa_flash"])
def test_a_run_in_bfloat16_is_swept_where_its_kernel_exists_for_half_types_alone(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_half_only(monkeypatch)
    half = trained(tmp_path, tiny(
        precision="bfloat16",
        data="{name: synthetic, size: 16, classes: 2, count: 64}",
        backbone="{name: vit, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4, "
        f"latent_norm: batch, attention: {kernel}}}",
        post_hoc="{every: 1}",
    ))  # fmt: skip
    done = e2ediff("sweep", half, *FEW, "--vary", "weights=target,ema:0.1")
    assert done.code == 0, done.err


# How it is called


def test_help_answers_without_torch() -> None:
    program = (
        "import sys\n"
        "from e2ediff.cli import main\n"
        "try: main(['sweep', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'fsspec', 'rich', 'matplotlib'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    others = ",".join(name for name in OURS.split(",") if name != "sweep")
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "E2EDIFF_BLOCK": others},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert words.startswith("Usage: e2ediff sweep [OPTIONS] RUN")
    assert "--threads N|auto" in words
    assert "[default: auto]" in words


def test_the_plugin_passes_its_check() -> None:
    done = e2ediff("plugins", "check", "sweep")
    assert (done.code, done.out) == (0, "ok    command sweep  contract\n1 checks passed\n")


def test_a_run_trained_with_a_plugin_file_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_objective.py").write_text(
        "from e2ediff import hookimpl\n"
        "@hookimpl\n"
        "def register(add):\n"
        "    add('objectives', 'mine', 'e2ediff.parts.objectives:Detached')\n"
    )
    Path("tiny.yaml").write_text(tiny(steps="2"))
    mine = ("--plugin", "my_objective.py")
    done = e2ediff("run", "tiny.yaml", "--set", "objective=mine", "--out", "run", *mine)
    assert done.code == 0, done.err
    words = ("sweep", "run", "--vary", "sampler.steps=1,2", "--dry-run")
    done = e2ediff(*words)
    assert done.code == 4
    assert "add --plugin my_objective.py" in done.err
    done = e2ediff(*words, *mine)
    assert (done.code, done.out) == (0, "sampler.steps=1\nsampler.steps=2\n"), done.err


# What is refused


@pytest.mark.parametrize("folder", ["sweep", "sweep/scores"])
def test_scores_in_a_run_of_someone_else_are_not_written_behind_a_link(
    run: str, folder: str, tmp_path
) -> None:
    place = Path("strange")
    shutil.copytree(run, place)
    (place / "seal").unlink()
    shutil.rmtree(place / "sweep", ignore_errors=True)
    (place / folder).parent.mkdir(exist_ok=True)
    (tmp_path / "mine").mkdir()
    (place / folder).symlink_to(tmp_path / "mine")
    done = e2ediff("sweep", place, "--vary", "sampler.steps=1,2", *FEW)
    assert (done.code, [*(tmp_path / "mine").iterdir()]) == (6, []), done.err
    assert f"strange/{folder}: is a link to {tmp_path}/mine" in done.err


@pytest.mark.parametrize(
    "address", ["reference://::memory://x", "simplecache::reference://x", "REFERENCE://x"]
)
def test_an_address_that_is_never_opened_is_refused(run: str, address: str) -> None:
    for words in ((run, "--out", address), (run, "--reference", address), (address,)):
        done = e2ediff("sweep", *words, *FEW, "--vary", "weights=target")
        assert done.code in (3, 5, 6), (words, done)
        assert "is never opened" in done.err, (words, done)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--vary", "objective=dsd"], 2, "objective belongs to training; a sweep varies weights"),
        (["--vary", "weights.x=1"], 2, "weights.x belongs to training"),
        (["--vary", "guidance.scale"], 2, "write PATH=VALUE,VALUE"),
        (["--vary", "sampler.steps=2", "--vary", "sampler.steps=3"], 2, "is given twice"),
        (["--vary", "weights=target,traget"], 3, "no weights 'traget'; it has ema-0.05"),
        (["--vary", "weights=ema:0.001"], 3, "width 0.001 cannot be reconstructed"),
        (["--vary", "sampler=euler,hoin"], 3, "unknown sampler 'hoin'"),
        (["--vary", "guidance.scale=1,-2"], 3, "--vary guidance.scale=-2"),
        (["--vary", "guidance.power=1"], 3, "unknown option 'power'"),
        (["--vary", "guidance=null", "--vary", "guidance.scale=2"], 3, "guidance"),
        pytest.param(
            ["--vary", "sampler=euler,heun", "--vary", "guidance=cfg_plus_plus"], 3,
            "guidance.strength: cfg_plus_plus scales by a step's length",
            marks=needs("e2ediff-sampling")),
        pytest.param(
            ["--vary", "sampler=euler,heun", "--vary",
             "weights=target,online+guidance=cfg_plus_plus"], 3,
            "guidance.strength: cfg_plus_plus scales by a step's length",
            marks=needs("e2ediff-sampling")),
        (["--vary", "weights=target", "--convention", "adn"], 5, "Did you mean 'adm'?"),
        (["--vary", "weights=target", "--sha256", "ab"], 2, "give both"),
        (["--vary", "weights=target", "--reference", "nowhere"], 5, "no such file or folder"),
        (["--vary", "weights=target", "--reference",
          "{name: synthetic, size: 16, classes: 2, count: 9}"], 5, "16 x 16 x 3 values, those of"),
        (["--vary", "weights=online", "--set", "sampler.stops=2"], 3, "unknown option 'stops'"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused_before_the_first_candidate(
    run: str, words: list[str], code: int, said: str
) -> None:
    done = e2ediff("sweep", run, *FEW, *words)
    assert (done.code, done.out) == (code, ""), done.err
    assert said in done.err
    assert not Path("run/sweep").exists()


def test_all_wrong_candidates_are_named_at_once(run: str) -> None:
    done = e2ediff("sweep", run, "--vary", "weights=a,b", "--vary", "sampler=c,euler")
    assert done.code == 3
    assert re.findall(r"--vary (\w+=\w+)", done.err) == ["weights=a", "weights=b", "sampler=c"]


def test_another_sweep_is_not_mixed_with_the_one_that_lies_there(run: str) -> None:
    words = ("sweep", run, *FEW, "--vary", "guidance.scale=1")
    assert e2ediff(*words).code == 0
    done = e2ediff(*words, "--seed", 3)
    assert done.code == 6
    assert "seed: 0 there, 3 here" in done.err
    Path("other").mkdir()
    Path("other/file").write_text("x")
    done = e2ediff(*words, "--out", "other")
    assert done.code == 6
    assert "holds no sweep.json of a sweep" in done.err
    spec = json.loads(Path("run/sweep/sweep.json").read_text())
    assert spec["images"] == 8
