"""Records of a run that someone else wrote are refused in a line, or passed over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command_line import e2ediff

from e2ediff.ablate.cost import TrainingCost
from e2ediff.distributed.threads import former_threads
from e2ediff.errors import RunDirectoryError
from e2ediff.host.plugins import Host
from e2ediff.monitor.pictures import curves_png
from e2ediff.report.gather import read_run
from e2ediff.report.page import event_lines
from e2ediff.store.records import newest_saved
from e2ediff.store.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("drawn")

RUN = Path(__file__).parents[1] / "golden" / "format_1"
HUGE = f"1{'0' * 400}"

METRICS = {
    "infinite": '{"images": 1e999, "step": 1e999, "rank": 1e999, "wall_images_per_second": 1e999}',
    "text": '{"step": "x", "images": "y", "rank": "z"}',
    "lists": '{"step": [1], "images": {"a": 1}, "rank": [[1]]}',
    "nan": '{"step": NaN, "images": NaN, "loss/denoising": NaN}',
    "names of nan": '{"step": "nan", "images": "inf"}',
    "below zero": '{"step": -5, "images": -40}',
    "a part of a step": '{"step": 1.5, "images": 12}',
    "true": '{"step": true, "images": 8}',
    "no object": "[1, 2]",
    "nested": "[" * 100_000,
}

PASSED_OVER = {
    "figures of text": '{"step": 3, "images": 24, "rank": "z", "psnr": [1], "lr": null}',
    "huge figures": f'{{"step": 3, "images": 24, "rank": {HUGE}, "loss/denoising": {HUGE}}}',
    "infinite figures": '{"step": 3, "images": 24, "rank": 1e999, "loss/denoising": "nan"}',
}

EVENTS = [
    '{"kind": [1], "step": {}, "time": 5}',
    '{"kind": "collapse", "signs": 5, "step": [1]}',
    '{"kind": "collapse", "signs": [1, [2]], "step": 1e999}',
    '{"kind": "saved", "name": [1]}',
    '{"kind": "rewound", "to": 5, "attempt": "x", "step": NaN, "kept": 3}',
    '{"kind": "continued", "changes": [1]}',
    '{"kind": "continued", "changes": {"cadence.checkpoint": [{}, "9999999999999999999999"]}}',
    '{"kind": "schedule", "phases": 5, "step": "x", "text": [1]}',
]

KINDS = {
    "run.json": ['{"argv": 5}', '{"name": [1]}', '{"hardware": 5}', '{"plugins": "x"}', "[]"],
    "status.json": ['{"state": [1]}', '{"step": "x"}', '{"images": 1e999}', '{"reason": 5}', "5"],
    "figures.json": [
        '{"rank": 5}', '{"rank": {"name": "rank", "shown_on": [], "title": 5}}',
        '{"rank": {"name": [1], "shown_on": []}}',
        '{"rank": {"name": "rank", "shown_on": [], "form": ".999999999f"}}',
        '{"rank": {"name": "rank", "shown_on": [], "dead_above": [1]}}',
    ],
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


COSTS: dict[str, TrainingCost] = {}
"""Of the one recipe, counted once."""


def reported(host: Host, run: Path) -> None:
    """What `report` and `compare` read of a run."""
    list(event_lines(read_run(host, run, "", COSTS)))


def resumed(run: Path) -> None:
    """What a run that goes on does with its records."""
    with RunDirectory.open(run) as directory:
        directory.lock()
        newest_saved(directory)
        directory.set_aside(8, 1)
        directory.rewind(24)
        former_threads(directory, 24)
        directory.set_status("running")
        directory.read_metrics()
        directory.read_events()


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


@pytest.mark.parametrize("line", METRICS.values(), ids=METRICS.keys())
def test_a_line_of_figures_of_no_step_is_refused_with_its_number(host, run, line) -> None:
    """By those that read; a run that goes on drops it, as every damaged line."""
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    append(run / "metrics.jsonl", line)
    with pytest.raises(RunDirectoryError, match=rf"metrics\.jsonl:{lines + 1}: .*Delete that"):
        reported(host, run)
    resumed(run)
    reported(host, run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == lines


@pytest.mark.parametrize("line", PASSED_OVER.values(), ids=PASSED_OVER.keys())
def test_figures_that_are_no_numbers_are_passed_over(host, run, line) -> None:
    append(run / "metrics.jsonl", line)
    reported(host, run)
    resumed(run)
    figures = RunDirectory.open(run)
    assert curves_png(figures.read_metrics(), "x", figures.figures())


@pytest.mark.parametrize("line", EVENTS)
def test_events_of_odd_content_are_shown_as_they_are(host, run, line) -> None:
    append(run / "events.jsonl", line)
    reported(host, run)
    resumed(run)


@pytest.mark.parametrize(("file", "text"), [(f, t) for f, texts in KINDS.items() for t in texts])
def test_records_of_another_kind_are_refused_in_a_line(host, run, file, text) -> None:
    (run / file).write_text(text)
    with pytest.raises(RunDirectoryError, match=rf"{file}: ") as caught:
        reported(host, run)
    assert "\n" not in str(caught.value)
    done = e2ediff("ckpt", "list", run)
    assert done.code == (6 if file == "run.json" else 0)


@pytest.mark.parametrize("file", ["resolved.yaml", "run.json", "figures.json", "status.json"])
def test_a_record_that_is_no_text_is_refused_in_a_line_with_the_way_out(run, file) -> None:
    """By every command that reads it."""
    (run / file).write_bytes(b"\xff\xfename: x\n")
    way_out = "Remove it" if file == "figures.json" else "Restore it from a copy"
    refused = 0
    for words in (
        ["report", run], ["compare", run, RUN], ["ckpt", "info", run],
        ["ckpt", "export", run, run.parent / "w.safetensors"],
        ["sample", run, "--out", run.parent / "set"],
    ):  # fmt: skip
        done = e2ediff(*words)
        if done.code != 0:
            refused += 1
            assert done.code == 6, done.err
            assert f"{file}: is damaged" in done.err
            assert way_out in done.err
    assert (
        refused == {"resolved.yaml": 5, "run.json": 5, "figures.json": 2, "status.json": 2}[file]
    )


@pytest.mark.parametrize("count", ["-5", "1e999", "true", '"x"', "1000000000000000000000"])
def test_a_number_of_threads_that_is_none_is_chosen_anew(run, count) -> None:
    hardware = f'{{"cpus": {os.cpu_count()}, "threads": {count}}}'
    (run / "run.json").write_text(f'{{"name": "x", "hardware": {hardware}}}')
    append(run / "events.jsonl", f'{{"kind": "threads", "images": 0, "count": {count}}}')
    assert former_threads(RunDirectory.open(run), 24)[0] == 0
