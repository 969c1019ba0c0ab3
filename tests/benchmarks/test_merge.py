"""Results of parts of a study are put together, and those of other studies are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

REAL = {"accuracy": 0.9, "frechet": 2.5, "pixel_frechet": 1.7, "nearest": 8.3}


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import merge

    return merge


def part(tmp_path, name: str, runs, **changes) -> str:
    figures = {
        "agreement": 0.9, "agreement_to_real": 1.0, "pixel_frechet": 2.0, "nearest": 8.0,
        "psnr": 28.0, "collapse_signs": [], "steps": 10, "parameters": 1e6,
        "flops_per_image": 1e6, "flops_total": 1e12, "train_seconds": 1.0, "sample_seconds": 1.0,
    }  # fmt: skip
    body = {
        "recipe": "r", "sampler": "heun 20", "count": 100, "match_compute": False,
        "judge_epochs": 16, "train_images": 8000, "held_out_images": 1000, "jobs": 1,
        "threads": 1, "date": "2026-11-30T10:00:00", "real": {"0": REAL, "1": REAL},
        "machine": {"cpu": name, "cores": 2, "device": "cpu"}, "seeds": [0],
        "runs": [
            {
                "objective": o,
                "seed": s,
                "overrides": [*(options or [f"objective={o}"]), f"seed={s}"],
                "figures": {**figures, "frechet": value},
            }
            for o, s, value, *options in runs
        ],
        **changes,
    }  # fmt: skip
    (tmp_path / f"{name}.json").write_text(json.dumps(body))
    return str(tmp_path / f"{name}.json")


def test_parts_become_one_table_whose_shared_runs_are_the_first_part_s(merge, tmp_path) -> None:
    a = part(tmp_path, "Xeon", [("dsd", 0, 10.0), ("unite", 0, 20.0)])
    b = part(tmp_path, "EPYC", [("unite", 0, 99.0), ("unite", 1, 24.0), ("dsd", 2, 14.0)])
    done = CliRunner().invoke(merge.main, [a, b, "--out", str(tmp_path / "all.json")])
    assert done.exit_code == 0, done.output
    assert "Seeds 0, 1, 2;" in done.output
    assert "12.0 ± 2.8 (10.0..14.0)" in done.output
    assert "22.0 ± 2.8 (20.0..24.0)" in done.output
    assert "Xeon and EPYC" in done.output
    again = json.loads((tmp_path / "all.json").read_text())
    assert [(r["objective"], r["seed"]) for r in again["runs"]] == [
        ("dsd", 0), ("dsd", 2), ("unite", 0), ("unite", 1),
    ]  # fmt: skip
    c = part(tmp_path, "again", [("dsd", 3, 12.0)], machine={**again["machine"], "cpu": "EPYC"})
    merged = CliRunner().invoke(
        merge.main, [str(tmp_path / "all.json"), c, "--out", str(tmp_path / "all.json")]
    )
    assert ", Xeon and EPYC, 2 cores" in merged.output, "each once"


def test_a_variant_of_other_options_is_refused_by_name(merge, tmp_path) -> None:
    a = part(tmp_path, "a", [("dsd", 0, 10.0), ("unite", 0, 20.0)])
    b = part(tmp_path, "b", [("unite", 1, 20.0, "objective.weight=v"), ("kl", 0, 5.0)])
    refused = CliRunner().invoke(merge.main, [a, b, "--out", str(tmp_path / "all.json")])
    assert refused.exit_code == 1
    assert "different studies: options of unite differ" in refused.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 50}, "count differ"),
        ({"recipe": "other"}, "recipe"),
        ({"real": {}}, "judges"),
        ({"real": {"0": REAL, "1": {**REAL, "frechet": 2.6}}}, "judges"),
    ],
)
def test_parts_of_other_studies_are_refused(merge, tmp_path, changes, said) -> None:
    a = part(tmp_path, "a", [("dsd", 0, 10.0)])
    b = part(tmp_path, "b", [("dsd", 1, 10.0)], **changes)
    refused = CliRunner().invoke(merge.main, [a, b, "--out", str(tmp_path / "all.json")])
    assert refused.exit_code == 1
    assert said in refused.output
    assert not (tmp_path / "all.json").exists()


OTHERS = {"0": {**REAL, "frechet": 3.1}, "1": {**REAL, "frechet": 3.2}}


def test_judges_of_another_machine_are_kept_apart_and_are_the_same_for_a_seed(
    merge, tmp_path
) -> None:
    a = part(tmp_path, "a", [("dsd", 0, 10.0), ("unite", 0, 20.0)])
    b = part(tmp_path, "b", [("dsd", 1, 12.0), ("unite", 1, 22.0)], real=OTHERS)
    both = str(tmp_path / "both.json")
    done = CliRunner().invoke(merge.main, [a, b, "--judges-apart", "--out", both])
    assert done.exit_code == 0, done.output
    assert "judges that are the same for every run of a seed, 4 in all" in done.output
    again = json.loads((tmp_path / "both.json").read_text())
    assert again["real"] == {"0": REAL, "1": REAL, "2": OTHERS["0"], "3": OTHERS["1"]}
    judges = {(r["objective"], r["seed"]): r["judges"] for r in again["runs"]}
    assert judges["dsd", 0] == judges["unite", 0] == ["0", "1"]
    assert judges["dsd", 1] == judges["unite", 1] == ["2", "3"]

    more = part(tmp_path, "more", [("kl", 1, 30.0)], real=OTHERS)
    done = CliRunner().invoke(merge.main, [both, more, "--judges-apart", "--out", both])
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "both.json").read_text())
    assert len(again["real"]) == 4
    assert again["runs"][-1]["judges"] == ["2", "3"]

    import power

    pairs = CliRunner().invoke(power.main, [both])
    assert pairs.exit_code == 0
    assert "Seeds have different judges" in pairs.output
    assert "sd of a judge" not in pairs.output


def test_runs_of_one_seed_that_different_judges_scored_are_refused(merge, tmp_path) -> None:
    a = part(tmp_path, "a", [("dsd", 0, 10.0), ("unite", 1, 20.0)])
    b = part(tmp_path, "b", [("dsd", 1, 12.0)], real=OTHERS)
    out = ["--judges-apart", "--out", str(tmp_path / "both.json")]
    refused = CliRunner().invoke(merge.main, [a, b, *out])
    assert refused.exit_code == 1
    assert "dsd and unite of seed 1 have different judges" in refused.output
    assert not (tmp_path / "both.json").exists()
