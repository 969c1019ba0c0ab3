"""The recipe's `scores`: off by default, on their own cadence, and without touching training."""

from __future__ import annotations

import json

import pytest

from e2ediff.errors import DataError, RecipeError
from e2ediff.host.recipe import parse_recipe
from e2ediff.train.session import train

SCORES = """\
scores:
  every: 24
  images: 12
  features: {name: random_projection, width: 4, side: 4}
  metrics: [fid, {name: kid, subsets: 3}]
"""


def trained(host, tmp_path, text, name):
    (tmp_path / f"{name}.yaml").write_text(text)
    out = str(tmp_path / name)
    train(host, str(tmp_path / f"{name}.yaml"), ["steps=5"], out)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_scores_come_in_pairs_on_their_cadence_and_move_no_trained_number(
    host, tmp_path, tiny_text
) -> None:
    without = trained(host, tmp_path, tiny_text, "without")
    with_scores = trained(host, tmp_path, tiny_text + SCORES, "with")
    names = {f"{kind}{d}-RandomProjection4" for kind in "rg" for d in ("FD", "KD")}
    scored = [line for line in with_scores if "wall_score_seconds" in line]
    assert [line["images"] for line in scored] == [24, 40]  # 3 and 5 steps of 8 images
    assert all(names <= set(line) for line in scored)
    assert scored[0]["rFD-RandomProjection4"] > 0

    def trainings(lines):
        return [
            {k: v for k, v in line.items() if not k.startswith("wall_")}
            for line in lines
            if "lr" in line
        ]

    assert trainings(without) == trainings(with_scores)
    assert not any("wall_score_seconds" in line for line in without)


def test_scores_repeat_and_are_drawn(host, tmp_path, tiny_text) -> None:
    runs = [trained(host, tmp_path, tiny_text + SCORES, name) for name in ("one", "other")]
    one, other = (
        [line["gFD-RandomProjection4"] for line in run if "wall_score_seconds" in line]
        for run in runs
    )
    assert one == other
    from e2ediff.report.charts import panels
    from e2ediff.report.gather import gather

    drawn = "".join(panels(gather(host, str(tmp_path / "one")).cells, over="images"))
    assert "gFD-RandomProjection4" in drawn


def test_scores_of_too_few_images_and_of_another_network_are_refused(
    host, tmp_path, tiny_text
) -> None:
    few = SCORES.replace("images: 12", "images: 3").replace("[fid,", "[{name: precision_recall},")
    with pytest.raises(DataError, match=r"scores.images: 3, and the metrics need 4; raise it"):
        trained(host, tmp_path, tiny_text + few, "few")
    clip = SCORES.replace("[fid,", "[cmmd,")
    with pytest.raises(DataError, match="CMMD needs a clip network in"):
        trained(host, tmp_path, tiny_text + clip, "clip")
    with pytest.raises(RecipeError, match="scores: 'metrics' is missing"):
        parse_recipe(host, tiny_text + "scores: {every: 8, features: random_projection}\n", "r")
