"""A stranger's diagnostic: shown, counted and reported as it declares, like one of ours."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from command_line import e2ediff
from PIL import Image

from e2ediff.errors import CollapseError
from e2ediff.figure import find
from e2ediff.host.recipe import Alarm
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.monitor.pictures import curves_png
from e2ediff.monitor.probe import figures_line
from e2ediff.store.earlier import earlier_figure
from e2ediff.store.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("drawn")

PLUGIN = """
from typing import ClassVar
import attrs
from e2ediff import hookimpl
from e2ediff.diagnostic import Diagnostic
from e2ediff.figure import Figure

PACE = [FIGURES]

@attrs.frozen(kw_only=True)
class Vigour(Diagnostic):
    "Has figures that say where they belong."
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("vigour", "vigour of the latents", "high", ".1f", ("line", "table", "charts"),
               "latents at work", short="vig", alarm="fall", dead_below=0.5),
        Figure("toil", "toil", "low", shown_on=("charts",), panel="latents at work"),
        Figure("haste", better="low"),
    )
    def measure(self, probe):
        value = PACE.pop(0) if len(PACE) > 1 else PACE[0]
        return {"vigour": value, "toil@0.5": 1.0, "haste": 2.0, "undeclared": 3.0}

@attrs.frozen(kw_only=True)
class Words(Diagnostic):
    "Declares what is no figure."
    figures = ("words",)
    def measure(self, probe):
        return {"words": 1.0}

@hookimpl
def register(add):
    add("diagnostics", "vigour", Vigour)
    add("diagnostics", "words", Words)
"""


@pytest.fixture
def call(inside, tiny_text):
    """Run the tiny recipe with the plugin's diagnostic alone, whose figures are these in turn."""

    def run(*words: str, pace: str = "8.0, 7.0, 6.5", chosen: str = "[vigour]", out: str = "out"):
        if not (inside.path / "vigours.py").exists():
            inside.install("vigours", PLUGIN.replace("FIGURES", pace))
            (inside.cwd / "tiny.yaml").write_text(tiny_text)
        changes = [
            "requires=[vigours]",
            f"diagnostics={chosen}",
            "steps=6",
            "cadence={log: 1, diagnose: 1, preview: 9, checkpoint: 9}",
            *words,
        ]
        given = [word for change in changes for word in ("--set", change)]
        return e2ediff("run", "tiny.yaml", *given, "--out", out)

    return run


def test_its_figures_show_where_they_are_declared_to(call) -> None:
    done = call()
    assert done.code == 0, done.err
    assert re.search(r"left \S+  vig [678]\.\d  ", done.err), done.err
    kept = RunDirectory.open("out").figures()
    assert [f.name for f in kept] == ["vigour", "toil", "haste"]
    with Image.open("out/curves.png") as picture:
        assert picture.width == 550  # losses and the one panel, above each other
    done = call("optimizer.lr=0.01", out="more")
    assert done.code == 0, done.err
    assert e2ediff("compare", "out", "more", "--out", "page.html").code == 0
    page, report = Path("page.html").read_text(), json.loads(Path("page.json").read_text())
    columns = {c["key"]: c for c in report["columns"]}
    assert columns["vigour"]["title"] == "vigour of the latents"
    assert [columns[key]["better"] for key in ("vigour", "toil@0.5", "haste", "undeclared")] == [
        "high", "low", "low", "",
    ]  # fmt: skip
    table = e2ediff("compare", "out", "more").out
    assert "vigour of the latents" in table
    assert "haste" not in table
    labels = re.findall('aria-label="([^"]*)"', page)
    assert any(label.startswith("vigour of the latents (high is better) over") for label in labels)
    assert any(label.startswith("toil@0.5 (low is better) over images") for label in labels)
    assert not any("haste" in label or "undeclared" in label for label in labels)
    said = e2ediff("report", "out")
    assert said.code == 0, said.err
    assert "Last measured: vigour of the latents 6.5." in Path("out/report.html").read_text()


def test_a_fall_of_its_figure_sounds_the_alarm_without_any_diagnostic_of_ours(call) -> None:
    done = call("alarm={policy: stop, window: 2}", pace="8.0, 8.0, 3.0, 3.0")
    assert done.code == CollapseError.exit_code
    assert "LATENT COLLAPSE: the vigour of the latents fell from 8 to 3" in done.err
    assert "none of the diagnostics judges its figures" not in done.err
    (event,) = [e for e in RunDirectory.open("out").read_events() if e["kind"] == "collapse"]
    assert event["step"] == 3  # two diagnoses with the sign


def test_its_own_bound_sounds_the_alarm_at_once(call) -> None:
    call("alarm={policy: stop, window: 4}", pace="8.0, 8.0, 0.4, 0.4")
    (event,) = [e for e in RunDirectory.open("out").read_events() if e["kind"] == "collapse"]
    assert event["step"] == 2


def test_the_recipes_share_counts_for_its_figure(call) -> None:
    done = call("alarm={policy: stop, window: 1, fall: 0.2}", pace="8.0, 8.0, 3.0, 3.0")
    assert done.code == 0, done.err


def test_one_that_declares_what_is_no_figure_is_left_out_and_named(call) -> None:
    done = call(chosen="[vigour, words]")
    assert done.code == 0, done.err
    (event,) = [e for e in RunDirectory.open("out").read_events() if e["kind"] == "diagnostic_off"]
    assert "vigours.Words failed" in event["text"]
    assert "figures holds 'words', which is no Figure" in event["text"]


# The diagnostics that ship


def declared(host):
    return [figure for part in host.registries["diagnostics"] for figure in part.cls.figures]


def test_the_progress_line_has_rank_std_and_psnr(host) -> None:
    values = {"rank": 5.123, "raw_std": 2.0, "latent_std": 0.98765, "psnr": 21.337}
    assert figures_line(values, declared(host)) == "rank 5.12  std 0.988  psnr 21.34"


def test_all_that_is_shown_or_counts_is_measured_by_the_name_that_is_declared(
    host, tmp_path, tiny_text
) -> None:
    from e2ediff.train.session import train

    (tmp_path / "tiny.yaml").write_text(tiny_text)
    train(host, str(tmp_path / "tiny.yaml"), ["steps=2"], str(tmp_path / "run"))
    run = RunDirectory.open(str(tmp_path / "run"))
    measured = {name for line in run.read_metrics() for name in line}
    for figure in declared(host):
        assert any(find(name, [figure]) for name in measured), figure.name


def test_a_run_from_before_shows_the_figures_that_are_declared_today(host) -> None:
    """By the list of names, which must not say otherwise."""
    for figure in declared(host):
        old = earlier_figure(figure.name)
        if figure.shown_on or old is not None:
            places = tuple(place for place in figure.shown_on if place != "line")
            assert (old.title, old.better, old.form, old.panel, old.of, old.shown_on) == (
                figure.title, figure.better, figure.form, figure.panel, figure.of, places,
            ), figure.name  # fmt: skip


def test_a_run_from_before_keeps_its_curves_when_it_goes_on(host, tmp_path, tiny_text) -> None:
    """Also those of scores that the continuation does not measure any more."""
    run = RunDirectory.create(str(tmp_path / "run"), "run", tiny_text, tiny_text, {})
    with run:
        run.log_metrics({"images": 8, "step": 1, "rank": 3.0, "gKD-Net": 0.1, "mine": 2.0})
        assert [f.name for f in run.figures()] == ["rank", "gKD-Net"]
        run.declare(declared(host))
        names = {f.name for f in run.figures()}
        assert {"rank", "psnr", "gKD-Net"} <= names
        assert "mine" not in names
        run.declare([])
        assert {f.name for f in RunDirectory.open(run.path).figures()} == names
        # Once figures are declared, a name alone says nothing.
        run.log_metrics({"images": 16, "step": 2, "gFD-Other": 0.1})
        assert "gFD-Other" not in {f.name for f in run.figures()}


def test_a_name_that_was_ours_does_not_make_a_strangers_figure_count() -> None:
    detector = CollapseDetector(Alarm(window=1))
    for value in (9.0, 0.1):
        assert detector.evaluate({"rank": value, "positional": 1.0}, []).signs == []
    assert figures_line({"rank": 3.0}, []) == ""
    metrics = [{"images": n, "rank": 1.0, "loss/a": 1.0} for n in (8, 16)]
    with Image.open(io.BytesIO(curves_png(metrics, "run", []))) as picture:
        assert picture.width == 550
