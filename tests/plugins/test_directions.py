"""Which way a score is better: what its metric declares, wherever the score goes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import e2ediff
from PIL import Image

from e2ediff.errors import PluginError, RunDirectoryError
from e2ediff.evaluate.passport import Card, Passport, Score, parse_card
from e2ediff.evaluate.ranking import rank
from e2ediff.figure import Figure, find
from e2ediff.host.discovery import Plugin
from e2ediff.host.plugins import load
from e2ediff.store.earlier import earlier_direction, earlier_figure
from e2ediff.store.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("drawn")

PLUGIN = """
import attrs
from e2ediff import hookimpl
from e2ediff.metric import MetricValue, Metric

@attrs.frozen(kw_only=True)
class SWD(Metric):
    "Low is better."
    better = "low"
    moments = ("pool",)
    def measure(self, made, real):
        gap = made.moments["pool"].mean - real.moments["pool"].mean
        return {"swd": MetricValue(float(gap.abs().mean()))}

@attrs.frozen(kw_only=True)
class Ring(Metric):
    "High is better, of all but one figure."
    better = "high"
    moments = ("pool",)
    def measure(self, made, real):
        gap = float((made.moments["pool"].mean - real.moments["pool"].mean).abs().mean())
        return {"ring": MetricValue(-gap), "far": MetricValue(gap, better="low")}

@attrs.frozen(kw_only=True)
class Sideways(Metric):
    "Is better in no way that there is."
    better = "sideways"
    moments = ("pool",)
    def measure(self, made, real):
        return {"sideways": MetricValue(1.0)}

@hookimpl
def register(add):
    for cls in (SWD, Ring, Sideways):
        add("metrics", cls.__name__.lower(), cls)
"""
WAYS = {
    "gswd-RandomProjection4": "low",
    "rswd-RandomProjection4": "low",
    "g_ring-RandomProjection4": "high",
    "r_ring-RandomProjection4": "high",
    "gfar-RandomProjection4": "low",
    "rfar-RandomProjection4": "low",
}
FEATURES = "{name: random_projection, width: 4, side: 4}"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where what `runs` has trained for the first test is kept for the others."""
    return tmp_path_factory.mktemp("kept") / "runs"


@pytest.fixture
def runs(inside, tiny_text, kept) -> list[str]:
    """Two short runs that differ in what they learn, scored by a stranger's metrics."""
    inside.install("scores-it", PLUGIN)
    if kept.exists():
        shutil.copytree(kept, inside.cwd, dirs_exist_ok=True)
        return ["slow", "fast"]
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    scores = f"{{every: 8, images: 8, features: {FEATURES}, metrics: [swd, ring, sideways]}}"
    for name, lr in (("slow", "1e-4"), ("fast", "1e-2")):
        done = e2ediff(
            "run", "tiny.yaml", "--set", "requires=[scores-it]", "--set", "steps=3",
            "--set", f"scores={scores}", "--set", f"optimizer.lr={lr}", "--out", name,
        )  # fmt: skip
        assert done.code == 0, done.err
    shutil.copytree(inside.cwd, kept)
    return ["slow", "fast"]


def last(run: str, figure: str) -> float:
    return [m[figure] for m in RunDirectory.open(run).read_metrics() if figure in m][-1]


def test_a_strangers_scores_are_kept_charted_and_judged_as_they_declare(runs) -> None:
    for run in runs:
        kept = {f.name: f.better for f in RunDirectory.open(run).figures()}
        assert {name: kept[name] for name in WAYS} == WAYS
        (off,) = [e for e in RunDirectory.open(run).read_events() if e["kind"] == "metric_off"]
        assert "Sideways" in off["text"]
    # Losses, rank, variance, PSNR and a panel for each of three scores: four columns of two.
    with Image.open("slow/curves.png") as picture:
        assert picture.width == 2200
    done = e2ediff("compare", *runs, "--out", "page.html")
    assert done.code == 0, done.err
    report = json.loads(Path("page.json").read_text())
    columns = {c["key"]: c["better"] for c in report["columns"]}
    assert {name: columns[name] for name in WAYS} == WAYS
    assert report["judged"] == "gfar-RandomProjection4"
    labels = re.findall('aria-label="([^"]*)"', Path("page.html").read_text())
    for name, better in WAYS.items():
        assert any(label.startswith(f"{name} ({better} is better)") for label in labels), name
    for name in ("gswd-RandomProjection4", "g_ring-RandomProjection4"):
        low = WAYS[name] == "low"
        best = (min if low else max)(runs, key=lambda run: last(run, name))
        said = e2ediff("compare", *runs, "--judge", name).err
        assert said.startswith(f"{best} has the {'lowest' if low else 'highest'} {name}:")


def test_score_files_of_a_strangers_metrics_are_ranked_as_they_declare(runs) -> None:
    words = [
        "--metrics",
        "swd,ring",
        "--features",
        FEATURES,
        "--count",
        "8",
        "--reference",
        "data",
    ]
    done = e2ediff("eval", "slow", *words)
    assert done.code == 0, done.err
    (file,) = Path("slow/scores").glob("*.json")
    kept = json.loads(file.read_text())
    ways = {name.partition("-")[0]: score["better"] for name, score in kept["scores"].items()}
    assert ways == {"swd": "low", "ring": "high", "far": "low"}
    for place, value in (("a.json", 3.0), ("b.json", 1.0), ("c.json", 2.0)):
        for score in kept["scores"].values():
            score["value"] = value
        Path(place).write_text(json.dumps(kept))
    lines = e2ediff("compare", "a.json", "b.json", "c.json").out.splitlines()
    name, order = "", dict[str, list[str]]()
    for line in lines:
        if line.startswith("  "):
            order[name].append(line.split()[-1])
        else:
            name = line.partition("-")[0]
            order[name] = []
    assert order["swd"] == order["far"] == ["b.json", "c.json", "a.json"]
    assert order["ring"] == ["a.json", "c.json", "b.json"]
    # A report takes them up with their direction.
    shutil.rmtree("fast/scores", ignore_errors=True)
    e2ediff("compare", *runs, "--out", "page.html")
    columns = json.loads(Path("page.json").read_text())["columns"]
    found = {c["key"].partition("-")[0]: c["better"] for c in columns if "@" in c["key"]}
    assert ways.items() <= found.items()


def test_an_evaluation_refuses_a_metric_without_a_direction(runs) -> None:
    done = e2ediff("eval", "slow", "--metrics", "sideways", "--features", FEATURES, "--count", "8")
    assert done.code == PluginError.exit_code
    assert (
        "metric Sideways: better is 'sideways'; its author must write 'low' or 'high'" in done.err
    )


def test_a_metric_that_declares_no_direction_is_not_registered() -> None:
    import attrs

    from e2ediff.metric import Metric

    @attrs.frozen(kw_only=True)
    class Silent(Metric):
        def measure(self, made, real):
            return {}

    with pytest.raises(PluginError, match="Silent does not implement better"):
        load(entry_points=False).registries["metrics"].add("silent", Silent, Plugin("mine"))


# What was written before figures said what they are


def card(place: str, **values: tuple[float, str | None]) -> Card:
    scores = {
        name: Score(v, better=way, metric={"name": name}) for name, (v, way) in values.items()
    }
    return Card(place, Passport({"convention": "adm"}, {}, {}), scores)


def earlier(card: Card) -> Card:
    """As a version wrote it that kept no direction."""
    content = json.loads(card.text())
    for score in content["scores"].values():
        del score["better"]
    return parse_card(json.dumps(content).encode(), card.place)


def test_score_files_from_before_are_ranked_by_the_names_that_our_metrics_had() -> None:
    two = [
        earlier(card(p, FID=(v, "low"), recall=(v, "high"))) for p, v in (("a", 2.0), ("b", 1.0))
    ]
    assert [line.split()[-1] for line in rank(two, "FID")[1:]] == ["b", "a"]
    assert [line.split()[-1] for line in rank(two, "recall")[1:]] == ["a", "b"]


def test_a_score_of_unknown_direction_is_listed_and_not_ranked() -> None:
    two = [earlier(card(place, swd=(v, "low"))) for place, v in (("a", 2.0), ("b", 1.0))]
    head, *rows = rank(two, "swd")
    assert head == (
        "swd, not ranked: the files do not say whether a low or a high value is better"
    )
    assert [row.split()[-1] for row in rows] == ["a", "b"]
    # One file that says it speaks for the same measurement of the others.
    assert [r.split()[-1] for r in rank([*two, card("c", swd=(0.0, "low"))], "swd")[1:]] == [
        "c", "b", "a",
    ]  # fmt: skip
    apart = [card("a", swd=(2.0, "low")), card("b", swd=(1.0, "high"))]
    assert "not ranked" in rank(apart, "swd")[0]


@pytest.mark.parametrize(
    ("score", "better"),
    [
        ("FID", "low"), ("sFD-Net", "low"), ("KD-EfficientNetLite0", "low"), ("CMMD-CLIP", "low"),
        ("rFD-Net", "low"), ("rsFID", "low"), ("r_precision-Net", "high"), ("IS", "high"),
        ("LPIPS", "low"), ("perceptual-Net", "low"), ("PSNR", "high"), ("copied", "low"),
        ("probe_mean", "high"), ("swd", None), ("FIDelity", None), ("g_swd-Net", None),
    ],
)  # fmt: skip
def test_names_of_our_own_scores_have_a_known_direction_and_no_others(score, better) -> None:
    assert earlier_direction(score) == better


def test_every_score_of_ours_is_among_the_names_with_a_known_direction(host) -> None:
    """Else a file of today, with `better` taken out, would be ranked otherwise."""
    names = {"FID": ["FD", "FID"], "SpatialFID": ["sFD", "sFID"], "KID": ["KD", "KID"],
             "InceptionScore": ["IS"], "PrecisionRecall": ["precision", "recall"],
             "DensityCoverage": ["density", "coverage"], "CMMD": ["CMMD"]}  # fmt: skip
    for part in host.registries["metrics"]:
        for name in names[part.cls.__name__]:
            assert earlier_direction(name) == part.cls.better
            for kind, of in (("g", "samples"), ("r", "reconstructions")):
                joint = "" if part.cls.better == "low" else "_"
                figure = earlier_figure(f"{kind}{joint}{name}-Net")
                assert (figure.better, figure.of, figure.panel) == (
                    part.cls.better, of, f"{name}-Net",
                )  # fmt: skip
    assert earlier_figure("g_swd-Net") is None


def test_a_run_from_before_is_reported_by_the_names_of_its_figures(runs) -> None:
    Path("slow/figures.json").unlink()
    Path("fast/figures.json").unlink()
    e2ediff("compare", *runs, "--out", "page.html")
    report = json.loads(Path("page.json").read_text())
    columns = {c["key"]: c["better"] for c in report["columns"]}
    assert columns["psnr"] == "high"
    assert {columns[name] for name in WAYS} == {""}
    assert report["judged"] == "psnr"
    said = e2ediff("compare", *runs, "--judge", "gswd-RandomProjection4").err
    assert "has no better direction, so no cell is called best" in said


def test_runs_that_disagree_about_a_direction_are_not_judged_by_it(runs) -> None:
    file = Path("fast/figures.json")
    file.write_text(file.read_text().replace('"low"', '"high"'))
    said = e2ediff("compare", *runs, "--judge", "gswd-RandomProjection4").err
    assert "has no better direction, so no cell is called best" in said


def test_a_damaged_list_of_figures_says_what_to_do(runs) -> None:
    for text in ('{"gswd": 3}', "[]", '{"gswd": {"name": "gswd", "shown_on": ["moon"]}}', "{"):
        Path("fast/figures.json").write_text(text)
        done = e2ediff("compare", *runs)
        assert done.code == RunDirectoryError.exit_code, done.err
        assert "figures.json" in done.err
        assert "Traceback" not in done.err


def test_a_family_is_declared_by_what_stands_before_its_sign() -> None:
    figures = [Figure("gap", "the gap", better="low"), Figure("gap@1", "at the end")]
    assert find("gap@0.5", figures) == Figure(
        "gap@0.5", "the gap@0.5", better="low", panel="the gap"
    )
    assert find("gap@1", figures).title == "at the end"
    assert find("gape", figures) is None
