"""The page and its tables: they agree, say what is so, and need nothing but themselves."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import attrs
import pytest
from command_line import e2ediff
from PIL import Image

from e2ediff.errors import DataError
from e2ediff.figure import Figure
from e2ediff.report.charts import Line, chart
from e2ediff.report.gather import final_figures, gather, gather_runs
from e2ediff.report.sheets import data_uri, rows
from e2ediff.report.summary import judged_of, number, signed, summarize
from e2ediff.report.tables import csv_text, tex, tex_text
from e2ediff.report.verdict import verdict
from e2ediff.store.curves import Figures
from e2ediff.store.earlier import earlier_figure

pytestmark = pytest.mark.usefixtures("drawn")

VOID = {"meta", "img", "br", "line", "path", "polyline"}


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def check_page(path: Path) -> Page:
    """What holds for every page."""
    text = path.read_text(encoding="utf-8")
    assert len(text) < 15_000_000
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(names)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "action", "srcset", "data", "xlink:href"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
        if tag == "img":
            assert attributes["alt"].strip()
        if tag == "svg":
            assert attributes.get("aria-hidden") or attributes["aria-label"].strip()
    assert not re.search(r"url\(|@import", text)
    assert "https://" not in text
    assert "prefers-color-scheme: dark" in text
    return page


def test_the_page_of_an_ablation_has_every_cell_and_no_address_but_its_own(made):
    page = check_page(made.path / "report.html")
    for cell in json.loads((made.path / "spec.json").read_text())["cells"]:
        assert cell in page.text
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len(pictures) >= 4  # samples and reconstructions of two cells
    assert any("samples: coupled, seed 0, step 8" in a["alt"] for a in pictures)
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    for figure in ("rank", "deviation", "positional", "PSNR", "loss: reconstruction"):
        assert any(figure in label and "images seen" in label for label in labels)
        assert any(figure in label and "FLOPs" in label for label in labels)
    assert "e2ediff ablate tiny.yaml --vary" in page.text
    assert "objective.name" in page.text
    assert "no folder <script>alert(1)</script>" in page.text  # as text


def test_a_page_survives_hostile_names(group):
    """Of a directory, and in what a run's files say."""
    evil = Path("x<img src=y onerror=z>&\"'{{7*7}}%_#$\\")
    shutil.copytree(group / "runs" / "coupled-seed0", evil)
    with (evil / "events.jsonl").open("a") as events:
        events.write('{"kind": "</table><script>", "time": 3, "signs": "<b>"}\n')
        events.write('{"kind": "collapse", "signs": ["</svg><script>x</script>"]}\n')
    known = json.loads((evil / "run.json").read_text())
    (evil / "run.json").write_text(json.dumps({**known, "git": {"</dd><script>": "x"}}))
    done = e2ediff("compare", evil, group / "runs" / "detached-seed0", "--out", "out/page.html")
    assert done.code == 0, done.err
    page = check_page(Path("out/page.html"))
    assert str(evil) in page.text
    assert "</table><script>" in page.text
    assert "</svg><script>x</script>" in page.text
    (table, _) = read_csv(Path("out/page.csv"))
    assert table["cell"] == str(evil)
    line = next(t for t in Path("out/page.tex").read_text().splitlines() if t.startswith("x<img"))
    assert line.startswith(r"x<img src=y onerror=z>\&\"'".replace(r"\"", '"'))
    assert r"\{\{7*7\}\}\%\_\#\$\textbackslash{} & " in line


def test_csv_and_latex_agree_with_the_json(made):
    report = json.loads((made.path / "report.json").read_text())
    lines = {row["cell"]: row for row in read_csv(made.path / "table.csv")}
    latex = (made.path / "table.tex").read_text().splitlines()
    assert list(lines) == [cell["name"] for cell in report["cells"]]
    for cell in report["cells"]:
        line = lines[cell["name"]]
        assert int(line["counted"]) == cell["counted"]
        for key, figure in cell["figures"].items():
            assert float(line[f"{key} mean"]) == figure["mean"]
            assert line[f"{key} std"] == ("" if figure["std"] is None else str(figure["std"]))
            difference = figure["difference"]
            if difference is None:
                assert line[f"{key} difference"] == ""
                continue
            assert float(line[f"{key} difference"]) == difference["mean"]
            low = difference["low"]
            assert line[f"{key} difference_low"] == ("" if low is None else str(low))
        if cell["counted"]:
            (row,) = [t for t in latex if t.startswith(f"{tex(cell['name'])} &")]
            psnr = cell["figures"]["psnr"]
            assert f"{psnr['mean']:.2f} $\\pm$ {psnr['std']:.2f}" in row
    assert len({t.count(" & ") for t in latex if t.endswith(r"\\")}) == 1


def test_figures_are_those_of_the_runs(made):
    """Means, standard deviations and differences, once more by hand from metrics.jsonl."""
    report = json.loads((made.path / "report.json").read_text())
    last = {}
    for run in report["runs"][:4]:
        path = made.path / run["path"] / "metrics.jsonl"
        metrics = [json.loads(line) for line in path.read_text().splitlines()]
        last[run["cell"], run["seed"]] = [m["psnr"] for m in metrics if "psnr" in m][-1]
    own, base = ([last[c, s] for s in (0, 1)] for c in ("detached", "coupled"))
    figure = report["cells"][1]["figures"]["psnr"]
    assert figure["mean"] == pytest.approx(sum(own) / 2)
    assert figure["std"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
    pairs = [a - b for a, b in zip(own, base, strict=True)]
    half = 12.706204736432095 * abs(pairs[0] - pairs[1]) / 2  # t of one degree of freedom
    difference = figure["difference"]
    assert difference["mean"] == pytest.approx(sum(pairs) / 2)
    assert difference["high"] - difference["mean"] == pytest.approx(half)
    assert report["cells"][1]["figures"]["parameters"]["difference"]["low"] is None


def test_the_report_of_one_run(group):
    done = e2ediff("report", group / "runs" / "detached-seed1")
    assert (done.code, done.out) == (0, f"{group}/runs/detached-seed1/report.html\n")
    assert "All of its steps are done: step 8 of 8, 64 images." in done.err
    assert "Its latents show no sign of collapse." in done.err
    page = check_page(group / "runs" / "detached-seed1" / "report.html")
    assert "backbone.latent_dim" in page.text  # the whole recipe


def test_the_report_of_an_ablation_can_lie_elsewhere(group):
    done = e2ediff("report", group, "--out", "elsewhere/all.html")
    assert (done.code, done.out) == (0, "elsewhere/all.html\n")
    found = sorted(p.name for p in Path("elsewhere").iterdir())
    assert found == ["all.csv", "all.html", "all.json", "all.tex"]


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("report", "nothing"), 6, "nothing: neither a run nor an ablation: no such directory"),
        (("report", "groups"), 6, "it has neither run.json nor spec.json"),
        (("report", "groups/tiny", "--out", "x.pdf"), 2, "ends in .html"),
        (("compare", "groups/tiny/runs/coupled-seed0"), 2, "two runs or more"),
        (("compare", "groups/tiny/runs/coupled-seed0", "nothing"), 6, "not a run directory"),
    ],
)
def test_what_is_no_run_is_refused(group, words, code, what):
    done = e2ediff(*words)
    assert (done.code, done.out) == (code, "")
    assert what in done.err


def test_compare_prints_figures_and_what_differs(group):
    places = [group / "runs" / f"{c}-seed{s}" for s in (0, 1) for c in ("coupled", "detached")]
    done = e2ediff("compare", *places)
    assert done.code == 0
    lines = [re.split(r"\s{2,}", line) for line in done.out.splitlines()]
    assert lines[0] == ["", "coupled", "detached"]
    assert lines[1] == ["runs", "2 of 2", "2 of 2"]
    table = {line[0]: line[1:] for line in lines}
    assert table["objective.name"] == ["coupled", "detached"]
    assert "±" in table["PSNR (dB)"][0]
    assert "seed" not in table
    assert "interval" in done.err


# What the verdict claims


def told(
    group: Path, host, judged: str | None = None, figure: str = "psnr", **found: list[float]
) -> str:
    """The verdict on cells with these figures, a seed each."""
    gathered = gather_runs(host, [str(group / "runs" / "coupled-seed0")])
    (one,) = gathered.runs
    cells = {
        cell: [
            attrs.evolve(
                one,
                cell=cell,
                seed=seed,
                figures={figure: value, "psnr": value},
                described={name: earlier_figure(name) for name in (figure, "psnr")},
                events=[],
            )
            for seed, value in enumerate(values)
        ]
        for cell, values in found.items()
    }
    made = attrs.evolve(gathered, kind="group", cells=cells, baseline=next(iter(cells)))
    return " ".join(verdict(made, summarize(made, judged)))


def test_the_verdict_calls_real_what_more_seeds_would_repeat(group, host):
    said = told(group, host, base=[20.0, 20.5, 19.5], new=[21.0, 21.6, 20.4])
    assert said.startswith("new has the highest PSNR (dB): 21.00 ± 0.60 over 3 seeds.")
    assert "new minus base: +1.00, 95% interval [+0.75, +1.25] over 3 seeds." in said
    assert "the difference is more than chance between seeds" in said


def test_the_verdict_is_about_samples_where_all_cells_have_a_distance_of_theirs(group, host):
    cells = {"base": [20.0, 20.5, 19.5], "new": [21.0, 21.6, 20.4]}
    said = told(group, host, figure="gKD-Net", **cells)
    assert said.startswith("base has the lowest gKD-Net: 20 ± 0.5 over 3 seeds.")
    assert "It is the baseline; the next is new. new minus base: +1," in said
    assert told(group, host, judged="psnr", figure="gKD-Net", **cells).startswith("new has the hi")
    said = told(group, host, figure="rFD-Net", **cells)  # of reconstructions
    assert said.startswith("new has the highest PSNR (dB)")
    assert "does not judge samples, which `scores` in the recipe and e2ediff eval do." in said


def test_an_evaluation_decides_before_a_score_of_the_training():
    shared = {"psnr": 0, "gKD-Net": 0, "FD-Net@adm-1a2b3c4d": 0, "rFD-Net@adm-1a2b3c4d": 0}
    described = {name: earlier_figure(name) for name in ("psnr", "gKD-Net")}
    for name, of in (("FD-Net", "samples"), ("rFD-Net", "reconstructions")):
        name = f"{name}@adm-1a2b3c4d"
        described[name] = Figure(name, better="low", shown_on=("table",), of=of)
    assert judged_of([shared, shared], described) == "FD-Net@adm-1a2b3c4d"
    assert judged_of([shared, {"psnr": 0, "gKD-Net": 0}], described) == "gKD-Net"
    assert judged_of([shared, {"psnr": 0}], described) == "psnr"
    assert judged_of([], described) == "psnr"


def test_a_figure_that_no_run_has_cannot_be_judged_by(group):
    done = e2ediff("report", group, "--judge", "fid")
    assert (done.code, done.out) == (2, "")
    assert "--judge fid: no run has this figure. There are: " in done.err
    assert "psnr" in done.err


def test_the_verdict_admits_chance(group, host):
    assert "do not show a real difference" in told(group, host, base=[20.0, 21], new=[21.0, 21.1])
    said = told(group, host, base=[20.0], new=[30.0])
    assert "With fewer than two seeds no interval can be given" in said
    assert "more than chance" not in said


def test_the_verdict_corrects_for_the_best_of_many(group, host):
    near = [20.6, 21.2, 20.3]  # real alone, not as the best of twenty
    many = {f"c{i}": [10.0, 11.0, 9.0] for i in range(20)}
    base = [20.0, 20.5, 19.5]
    assert "more than chance" in told(group, host, base=base, new=near)
    assert "may be the luckiest of several" in told(group, host, base=base, new=near, **many)


def test_the_verdict_names_the_next_where_the_baseline_is_best(group, host):
    said = told(group, host, base=[30.0, 30.1], a=[10.0, 10.2], b=[20.0, 20.3])
    assert "It is the baseline; the next is b. b minus base: −9.90" in said  # noqa: RUF001


def test_a_collapsed_cell_is_not_called_best(group, host):
    gathered = gather(host, str(group))
    event = {"kind": "collapse", "step": 3, "signs": ["flat"]}
    best = max(("coupled", "detached"), key=lambda c: gathered.cells[c][0].figures["psnr"])
    worse = {"coupled": "detached", "detached": "coupled"}[best]
    cells = {
        **gathered.cells,
        best: [attrs.evolve(run, events=[event]) for run in gathered.cells[best]],
    }
    gathered = attrs.evolve(gathered, cells=cells)
    sentences = " ".join(verdict(gathered, summarize(gathered)))
    assert f"{worse} has the highest PSNR (dB) among the cells that did not collapse" in sentences
    assert f"Latents collapsed: {best} in 2 of 2 runs." in sentences


# Parts


def test_a_loss_is_the_mean_of_its_last_tenth_and_a_diagnostic_its_last_value():
    metrics = [{"step": i, "loss/a": float(i), "psnr": float(i), "lr": 1.0} for i in range(20)]
    assert final_figures(Figures(metrics)) == {"loss/a": 18.5, "psnr": 19.0}
    assert final_figures(Figures([{"psnr": float("nan")}])) == {}


def test_a_figure_that_a_cell_lacks_leaves_its_place_empty(group, host):
    gathered = gather(host, str(group))
    first = gathered.cells["coupled"]
    lacking = [attrs.evolve(run, figures={}) for run in first]
    three = {**gathered.cells, "coupled": lacking, "other": gathered.cells["detached"]}
    gathered = attrs.evolve(gathered, cells=three)
    summary = summarize(gathered)
    row = next(csv.DictReader(io.StringIO(csv_text(summary))))
    assert row["psnr mean"] == ""
    assert "coupled & 2 & 0 of 2 &  &" in tex_text(summary)
    assert "no difference can be given" in " ".join(verdict(gathered, summary))


def test_charts_survive_constant_tiny_and_missing_values():
    flat = [(0.0, 1.0), (1.0, 1.0)]
    for values in (flat, [(0.0, 0.0), (1.0, 0.0)], [(0.0, 1e-30), (1.0, 1e30)], [(5.0, -1.0)] * 2):
        svg = chart([Line("a", 0, [values])], "<t>", "x", log=True)
        assert Page(svg).tags[0][0] == "svg"
        assert "nan" not in svg
        assert "<t>" not in svg
    assert chart([Line("a", 0, [[]])], "t", "x") == ""
    assert chart([Line("a", 0, [[(1.0, 2.0)]])], "t", "x") == ""


def test_a_charts_colours_are_the_pages_and_its_names_are_nobodys():
    """Whatever the reader's scheme, and however many charts stand on one page."""
    cells = [Line(f"cell {i}", i, [[(0.0, 1.0 + i), (9.0, 2.0)]] * 2) for i in range(10)]
    svg = chart(cells, "$x_2$ of #14171a", "x")
    styles = "; ".join(of.get("style", "") for _, of in Page(svg).tags)
    colours = set(re.findall(r"(?:fill|stroke): *([^;]+)", styles))
    fixed = {colour for colour in colours if not colour.startswith("var(--")}
    assert fixed == {"none"}
    assert {f"var(--c{i})" for i in range(8)} <= set(re.findall(r"var\(--c\d\)", svg))
    assert "var(--ink)" in svg
    assert "stroke-dasharray" in svg
    assert not re.search(r"\bid=|url\(|<use|<style|http", svg)
    assert "$x_2$ of #14171a" in Page(svg).text
    assert svg == chart(cells, "$x_2$ of #14171a", "x")


@pytest.mark.parametrize(
    ("low", "high"), [(1e-9, 2e-9), (1e-30, 1e30), (1e7, 1.0001e7), (99.5, 100)]
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_can_be_told_apart(low, high, log):
    svg = chart([Line("a", 0, [[(0.0, low), (1.0, high)]])], "", "", log=log)
    ticks = re.findall(r">([^<>]*[0-9][^<>]*)</text>", svg)
    across = ticks[: ticks.index("1") + 1]
    upwards = ticks[len(across) :]
    assert 3 <= len(upwards) <= 10
    assert len({*upwards}) == len(upwards)


def test_numbers_read_well():
    assert number(12.7e12, "si") == "12.7 T"
    assert number(942, "si") == "942"
    assert number(1234.5, ".0f") == "1,234"
    assert signed(-0.5, ".2f") == "\N{MINUS SIGN}0.50"
    assert signed(0.5, ".2f") == "+0.50"


def test_pictures_are_made_to_fit(tmp_path):
    noise = Image.effect_noise((1500, 900), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    assert data_uri(buffer.getvalue(), 10**7, "x.png").startswith("data:image/png;base64,")
    small = data_uri(buffer.getvalue(), 60_000, "x.png")
    assert small.startswith("data:image/webp;base64,")
    assert len(small) < 80_100
    with pytest.raises(DataError, match=r"^x\.png: damaged image"):
        data_uri(b"no picture", 100, "x.png")


def test_pictures_at_equal_compute_are_of_earlier_steps_where_steps_cost_more(group, host):
    gathered = gather(host, str(group))
    (cheap, *_), (dear, *_) = gathered.cells["coupled"], gathered.cells["detached"]
    double = {name: 2 * flops for name, flops in dear.cost.flops.items()}
    dear = attrs.evolve(dear, cost=attrs.evolve(dear.cost, flops=double))
    found = {
        row.title: [s.caption for s in row.sheets] for row in rows({"a": [cheap], "b": [dear]})
    }
    steps = {t: [re.search("step (.)", c)[1] for c in cs] for t, cs in found.items()}
    assert steps["samples at equal steps"] == ["8", "8"]
    assert steps["samples at equal compute"] == ["8", "4"]


def test_a_damaged_picture_and_a_damaged_run_are_said_to_be_so(group, host):
    (group / "runs/coupled-seed0/samples/step-00000008.png").write_bytes(b"no picture")
    (group / "runs/detached-seed1/run.json").write_text("{")
    done = e2ediff("report", group)
    assert done.code == 0
    page = check_page(group / "report.html")
    assert "step-00000008.png cannot be shown" in page.text
    assert "run.json: is damaged" in page.text
