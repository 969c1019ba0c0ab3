"""The quality benchmark: its distances against closed forms, its script on tiny runs."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from command_line import needs_dsd
from PIL import Image

from e2ediff.ablate.cost import cost_of
from e2ediff.parts.sources import ImageFolder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = (
    "steps=20",
    "batch=16",
    "data.size=28",
    "backbone.patch=14",
    "backbone.width=32",
    "backbone.depth=2",
    "backbone.heads=2",
    "sampler.steps=3",
    "probe.images=32",
    "probe.calibration=64",
    "preview.rows=1",
)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import judge

    return judge


@pytest.fixture
def score(judge: ModuleType) -> ModuleType:
    import score

    return score


@pytest.fixture
def quality(judge: ModuleType) -> ModuleType:
    import quickstart_quality

    return quickstart_quality


def with_moments(mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Rows whose sample mean is `mean` and whose sample covariance is `root root^T`, exactly."""
    g = torch.Generator().manual_seed(0)
    white = torch.randn(50, len(mean), generator=g, dtype=torch.float64)
    white = white - white.mean(dim=0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(white.T.cov()), white.T, upper=False
    ).T
    return white @ root.T + mean


def test_reconstructions_are_as_sharp_as_the_high_frequencies_that_they_keep(
    judge: ModuleType, score: ModuleType
) -> None:
    judges = [judge.Judge(3, 8).eval()]
    x = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = score.score_reconstructions(0.5 * x, x, judges)
    assert found["sharpness"] == pytest.approx(0.25)
    flat = score.score_reconstructions(x.mean((2, 3), keepdim=True).expand_as(x), x, judges)
    assert flat["sharpness"] == pytest.approx(0.0, abs=1e-9)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 1, 4, 4)  # all 8 from neighbours
    assert float(score.high_frequencies(board)) == pytest.approx(64.0)


def test_reconstructions_are_compared_with_their_own_originals_by_each_judge(
    judge: ModuleType, score: ModuleType
) -> None:
    torch.manual_seed(0)
    judges = [judge.Judge(3, 8).eval() for _ in range(2)]
    x = torch.rand(100, 3, 8, 8) * 2 - 1
    assert score.score_reconstructions(x, x, judges) == pytest.approx(
        {"psnr": 100.0, "reconstruction_frechet": 0.0, "sharpness": 1.0}, abs=1e-2
    )
    one, other, both = (
        score.score_reconstructions(x / 2, x, some)["reconstruction_frechet"]
        for some in (judges[:1], judges[1:], judges)
    )
    assert both == pytest.approx((one + other) / 2)
    assert both > 0


def test_frechet_distance_has_the_closed_form_of_commuting_gaussians(judge: ModuleType) -> None:
    turn = torch.linalg.qr(torch.tensor([[1.0, 2, 0], [0, 1, 3], [2, 0, 1]], dtype=torch.float64))
    a, b = torch.tensor([1.0, 2, 0.5]).double(), torch.tensor([2.0, 0.5, 0.0]).double()
    mean = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    first = with_moments(torch.zeros(3).double(), turn.Q * a)
    second = with_moments(mean, turn.Q * b)
    expected = mean.square().sum() + (a - b).square().sum()
    assert judge.frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_agrees_with_scipy_where_covariances_do_not_commute(
    judge: ModuleType,
) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    zero = torch.zeros(4).double()
    cross = linalg.sqrtm((a @ a.T @ b @ b.T).numpy()).real.trace()
    expected = float((a @ a.T + b @ b.T).trace()) - 2 * cross
    found = judge.frechet_distance(with_moments(zero, a), with_moments(zero, b))
    assert found == pytest.approx(expected, rel=1e-7)


def test_the_distance_of_pixels_sees_brightness_and_is_the_whole_one_with_all_components(
    judge: ModuleType,
) -> None:
    g = torch.Generator().manual_seed(0)
    train = torch.randn(400, 1, 3, 4, generator=g)
    brighter = train[:200] + 0.5
    found = judge.pixel_distance(brighter, train, judge.pixel_components(train, 12))
    whole = judge.frechet_distance(*(x.flatten(1).double() for x in (brighter, train)))
    assert found == pytest.approx(whole, rel=1e-6)  # an orthogonal change of coordinates
    assert whole > 12 * 0.5**2 * 0.9
    # Along one axis, what the mean moved by is the square of its part on that axis.
    mean, axes = judge.pixel_components(train, 1)
    shifted = judge.pixel_distance(train + 0.5, train, (mean, axes))
    assert shifted == pytest.approx(float(0.5 * axes[:, 0].sum()) ** 2, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_if_its_covariance_is_singular(
    judge: ModuleType,
) -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    assert judge.frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert judge.frechet_distance(x.flip(0), x) == pytest.approx(0, abs=1e-5)


def test_nearest_distance_is_zero_for_copies_and_grows_with_the_difference(
    judge: ModuleType,
) -> None:
    train = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert judge.nearest_distance(train[:5], train) == pytest.approx(0, abs=1e-3)
    assert judge.nearest_distance(train[:5] + 0.1, train) == pytest.approx(0.8, abs=1e-3)


def test_a_judge_has_64_features_and_is_decided_by_its_seed(
    judge: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = judge.load_images
    monkeypatch.setattr(judge, "load_images", lambda *a, **k: everything(*a, **k).first(128))
    x = everything(judge.FashionMNIST(size=32), held_out=True).x[:7]
    state = torch.random.get_rng_state()
    first = judge.train_judge(0, tmp_path / "a", epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = judge.train_judge(0, tmp_path / "b", epochs=1)
    cached = judge.train_judge(0, tmp_path / "a", epochs=1)
    other = judge.train_judge(1, tmp_path / "a", epochs=1)
    f = judge.features(first, x)
    assert f.shape == (7, 64)
    assert torch.equal(judge.features(again, x), f)
    assert torch.equal(judge.features(cached, x), f)
    assert not torch.equal(judge.features(other, x), f)
    assert sorted(p.suffix for p in (tmp_path / "a").iterdir()) == [".safetensors"] * 2


@needs_dsd
def test_objectives_share_the_options_that_they_have_in_common(quality: ModuleType) -> None:
    host, recipe = quality.load(), str(BENCHMARKS.parent / "recipes" / "quickstart.yaml")
    sets = ["objective.draws=2", "objective.reconstruction.kind=l2", "steps=100"]
    names = ["dsd", "coupled", "two_stage"]
    jobs = quality.study_of(host, recipe, names, sets).plan(host, [3], sets).jobs
    dsd, coupled, stages = (quality.load_recipe(host, recipe, j.overrides) for j in jobs)
    assert dsd == quality.load_recipe(host, recipe, [*sets, "seed=3"])
    assert coupled.objective.reconstruction == dsd.objective.reconstruction
    assert stages.objective.draws == 2
    assert stages.backbone.trunks == "denoiser_apart"
    assert coupled.backbone == dsd.backbone
    assert {r.total_steps for r in (dsd, coupled, stages)} == {100}
    matched = quality.study_of(host, recipe, ["two_stage"], sets, match_compute=True)
    (other,) = matched.plan(host, [3], sets).costs.values()
    assert other.total_steps > 100
    assert other.total == pytest.approx(cost_of(dsd).total, rel=0.02)


def test_a_summary_has_mean_deviation_and_range(score: ModuleType) -> None:
    assert score.summary([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0 (1.0..3.0)"
    assert score.summary([1.0, 2.0, 3.0], ".1f", deviation=False) == "2.0 ± 1.0"
    assert score.summary([1.0], ".1f") == "1.0"


@needs_dsd
@pytest.mark.usefixtures("forks")
def test_the_script_ends_in_a_table_of_figures_from_the_runs(
    score: ModuleType, quality: ModuleType, tmp_path: Path
) -> None:
    """Trains two tiny runs; done ones are not trained again, and figures are what files say."""
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "quickstart_quality.py"), "--out", str(out)]
    command += ["--objectives", "dsd,coupled", "--seeds", "0", "--count", "40"]
    command += ["--judge-epochs", "1"]
    for change in TINY:
        command += ["--set", change]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    rows = {r["objective"]: r["figures"] for r in results["runs"]}
    assert set(rows) == {"dsd", "coupled"}
    text = (out / "table.md").read_text()
    assert text in done.stdout
    for name, figures in rows.items():
        assert 0 <= figures["agreement"] <= 1
        assert figures["train_seconds"] > 0
        assert f"| {name} | {figures['agreement']:.3f} |" in text
        assert f"| {name} | {figures['rank']:.2f} |" in text
    assert rows["dsd"]["flops_per_image"] > rows["coupled"]["flops_per_image"]
    assert results["real"]["0"]["frechet_images"] == 40
    assert (out / "grids.png").read_bytes().startswith(b"\x89PNG")

    run = out / "runs" / "coupled-seed0"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "rank" in line][-1]
    assert rows["coupled"]["rank"] == last["rank"]
    last["rank"] = 12.34
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score.final_health(run)["rank"] == 12.34

    before = (run / "run.json").stat().st_mtime_ns, (run / "status.json").stat().st_mtime_ns
    again = CliRunner().invoke(quality.main, command[2:])
    assert again.exit_code == 0, again.stderr
    assert "coupled-seed0: done before" in again.stderr
    refused = CliRunner().invoke(quality.main, [*command[2:], "--set", "optimizer.lr=0.5"])
    assert refused.exit_code == 1
    assert re.search(r"--set: was .* is .*optimizer.lr=0.5", refused.stderr)
    after = (run / "run.json").stat().st_mtime_ns, (run / "status.json").stat().st_mtime_ns
    assert before == after


@needs_dsd
def test_parts_that_do_not_fit_are_named_before_anything_is_made(
    quality: ModuleType, tmp_path: Path
) -> None:
    words = ["--out", str(tmp_path / "out"), "--set", "backbone.patch=7"]
    refused = CliRunner().invoke(quality.main, words)
    assert refused.exit_code == 1
    assert "backbone.patch: " in refused.stderr
    assert not (tmp_path / "out").exists()


def test_training_time_is_that_of_all_sessions_up_to_their_last_save(
    score: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    times = [("kernels", 0), ("saved", 10), ("saved", 20), ("kernels", 100), ("committed", 105)]
    (tmp_path / "events.jsonl").write_text(
        "".join(
            json.dumps({"time": f"2026-01-01T00:{s // 60:02}:{s % 60:02}.000+00:00", "kind": k})
            + "\n"
            for k, s in times
        )
    )
    assert score.training_seconds(tmp_path) == 25


def test_the_first_held_out_images_are_of_all_classes_where_a_source_sorts_them(
    judge: ModuleType, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "sorted.zip", "w") as file:
        for i in range(40):
            png = io.BytesIO()
            Image.new("RGB", (16, 16), (6 * i, i // 20, 0)).save(png, "PNG")
            for part in ("train", "test"):
                file.writestr(f"{part}/{i // 20}/{i:02}.png", png.getvalue())
    folder = f"zip://{{}}::{tmp_path}/sorted.zip"
    source = ImageFolder(
        root=folder.format("train"), held_out=folder.format("test"), size=16, classes=2
    )
    plain = judge.load_images(source)
    assert plain.label.tolist() == [0] * 20 + [1] * 20
    held_out = judge.load_images(source, held_out=True)
    first = held_out.first(20)
    assert 4 < first.label.sum() < 16
    # Still each image has its own label, and none is lost.
    green = (held_out.x[:, 1, 0, 0] + 1) * 127.5
    assert green.round().tolist() == held_out.label.tolist()
    assert sorted(held_out.x[:, 0, 0, 0].tolist()) == sorted(plain.x[:, 0, 0, 0].tolist())
