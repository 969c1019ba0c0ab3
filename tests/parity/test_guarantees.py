"""The attacks of `benchmarks/reliability`, each with a small count.

`python -m benchmarks.reliability all --long` has the large ones; a trial that fails here is
repeated by `python -m benchmarks.reliability.NAME --only NUMBER`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from e2ediff.store import checkpoint as ck
from e2ediff.store.storage import Store

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that nothing there hides another module

from benchmarks.reliability import (  # noqa: E402
    faults,
    full_disk,
    fuzz,
    kills,
    mutations,
    object_store,
    resume_cuts,
    runs,
    signals,
    table,
    trials,
    two_ranks,
)
from benchmarks.reliability.__main__ import SUITES  # noqa: E402

Run = Callable[..., Counter[str]]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with trials.scratch() as place:
        yield place


@pytest.fixture(scope="module")
def attack(place: Path) -> Run:
    """Carries out trials of a suite, none of which may break a promise; returns their facts."""

    def attack(suite: trials.Suite, numbers: Iterable[int], **options: Any) -> Counter[str]:
        folder = place / suite.name
        setup = sys.modules[suite.trial.__module__].prepare(folder, **options)
        lines = trials.carry_out(suite, setup, [*numbers], 0, folder / "trials")
        shutil.rmtree(folder)
        broken = [
            (line["number"], promise, what) for line in lines for promise, what in line["broken"]
        ]
        assert not broken
        return sum((Counter(line["facts"]) for line in lines), Counter())

    return attack


def test_a_run_killed_at_any_moment_ends_as_the_straight_run(attack: Run) -> None:
    """Every second trial at a file operation, all kinds of moments, up to five in a row."""
    facts = attack(kills.SUITE, range(6))
    assert facts["finished"] == 6
    assert facts["kills"] >= 3  # at operations; the others depend on the machine


FILES = ("online", "optimizer-joint")


def content(images: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors whose every value tells which save they are from."""
    return {f: {"w": torch.full((300, 7), float(images + i))} for i, f in enumerate(FILES)}


def saved(store: Store, images: int) -> None:
    ck.save(store, images, images // 10, content(images), {"images": images}, keep=1)


class Kept(faults.Faults):
    """Copies a folder before each file operation, and in the middle of each write."""

    def __init__(self, folder: Path, kept: Path) -> None:
        super().__init__()
        self.folder, self.kept, self.copying = folder, kept, False

    def around(self, act: Callable[..., Any], *given: Any, **options: Any) -> Any:
        self.keep("before")
        return act(*given, **options)

    def write(self, act: Callable[..., int], *before: Any, data: Any, **options: Any) -> int:
        self.keep("before")
        view = memoryview(data).cast("B")
        first = act(*before, view[: len(view) // 2], **options)
        self.keep("middle")
        return first + act(*before, view[first:], **options)

    def keep(self, moment: str) -> None:
        if not self.copying:
            self.copying = True
            self.count += moment == "before"
            shutil.copytree(self.folder, self.kept / f"{self.count}-{moment}")
            self.copying = False


@pytest.mark.parametrize("then", [200, 100], ids=["growing", "replacing"])
def test_a_kill_at_any_operation_of_a_save_loses_no_committed_checkpoint(
    then: int, tmp_path: Path
) -> None:
    """At keep=1, between any two and in the middle of writes: the older or the newer is whole.

    A kill leaves what lies there at that moment, and that is copied.
    """
    run, kept = tmp_path / "run", tmp_path / "kept"
    saved(Store(str(run)), 100)

    def act() -> int:
        counter = Kept(run, kept)
        counter.install()
        saved(Store(str(run)), then)
        counter.keep("before")  # what lies there after an operation is what lies before the next
        return 0

    log = tmp_path / "log"
    ended = runs.wait(runs.begin(act, log), log, 0, 60)
    assert ended.code == 0, ended.said
    points, older = [*kept.iterdir()], 0
    assert len(points) > 40
    for point in points:
        store = Store(str(point))
        for name in ck.list_checkpoints(store):
            # Commits are renames, so a kill leaves no damaged one to be skipped either.
            found = ck.open_checkpoint(store, name)
            assert found.state == {"images": found.images}
            for file, tensors in content(found.images).items():
                assert torch.equal(found.tensors(file)["w"], tensors["w"])
        newest = ck.open_checkpoint(store)
        assert newest.images in (100, then)
        older += newest.images == 100
        saved(store, 300)
        assert not runs.leftovers(point)
        assert ck.list_checkpoints(store) == ["images-000000000300"]
    assert older > 30, "the kills missed the save"


def test_no_damaged_checkpoint_is_accepted(attack: Run) -> None:
    # In the last ones the files of one damaged checkpoint are put into another.
    facts = attack(mutations.SUITE, [*range(1, 801), 1641, 2084, 3878, 6553])
    assert {kind.__name__ for kind in mutations.KINDS} <= {*facts}
    assert facts["resumed by command"] == 800 // mutations.COMMANDS


# The others are cut in test_resume.py, as are three of these with further options.
CUT = {"pixel", "kl", "tweedie", "repa_e", "unified_latents", "unite", "variance_floor"}
CUT |= {"adversary", "genfirst", "ldm_is_ae", "mean_flow", "tuned_decoder"}
CUT |= {"micro-shards and averages", "diagnoses and pictures"}


def test_every_objective_continues_bit_for_bit_wherever_it_is_cut(attack: Run) -> None:
    """One cut of each here, and of fewer steps; some are cut again and again."""
    cases = [name for name in resume_cuts.cases() if name in CUT]
    facts = attack(resume_cuts.SUITE, range(len(cases)), steps=16, only=cases)
    assert all(facts[f"{name}: identical"] == 1 for name in cases)
    assert facts["cut more than once"] > 1


def test_a_full_disk_takes_nothing_away(attack: Run) -> None:
    facts = attack(full_disk.SUITE, range(4))
    assert facts["exit 8"] > 1


# `sample`, `eval` and `ablate` have their codes in tests/parity/test_signals.py.
SIGNALLED = (0, 2, 12, 24, 5)
"""TERM, INT and USR1 to forks, one with data workers; test_resume.py has whole processes."""


def test_signals_end_a_run_as_documented_and_it_continues(attack: Run) -> None:
    """Also while it starts, with data workers, and twice."""
    facts = attack(signals.SUITE, SIGNALLED, kinds=("run", "workers"))
    ends = {name: count for name, count in facts.items() if ": exit " in name}
    assert sum(ends.values()) == len(SIGNALLED)


def test_the_survivor_of_two_processes_ends_and_the_run_continues(attack: Run) -> None:
    """By DDP and FSDP2, in two processes and in one."""
    facts = attack(two_ranks.SUITE, range(3))
    assert facts["kills"] > 0


def test_a_killed_run_on_an_object_store_is_taken_up(attack: Run) -> None:
    numbers = [n for n in range(10) if object_store.KINDS[n] == "kill"]
    assert attack(object_store.SUITE, numbers)["kill: exit -9"] > 2


def test_odd_recipes_are_read_or_refused_with_their_place(attack: Run) -> None:
    facts = attack(fuzz.SUITE, [n for n in range(160) if n % 4 != 3], files=False)
    assert facts["recipes refused"] > 80
    assert facts["misspelt keys named"] > 15


def test_the_page_of_guarantees_has_the_tables_of_the_kept_results() -> None:
    text = table.PAGE.read_text()
    assert text == table.page(text, table.results())


def test_every_suite_is_a_command_with_a_place_on_the_page() -> None:
    assert {*SUITES} == {*table.ORDER}
    for name in SUITES:
        suite = importlib.import_module(f"benchmarks.reliability.{name}").SUITE
        assert (suite.name, bool(suite.title and suite.promises)) == (name, True)


def test_a_suite_that_a_machine_cannot_run_says_so_in_its_result_and_on_the_page(
    place: Path,
) -> None:
    def prepare(place: Path) -> None:
        raise trials.Skipped("no server here")

    suite = trials.Suite("made_up", "Made up", {"kept": "kept"}, prepare, lambda setup, one: None)
    result = place / "skipped.json"
    assert trials.command(suite, ["--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert (found["trials"], found["skipped"]) == (0, "no server here")
    assert "| Made up | 0 | not tried: no server here | |" in table.tables([found])


# The attacks find what they look for


def test_a_trial_depends_on_the_seed_and_its_number_alone() -> None:
    draws = [trials.chance_of(kills.SUITE, seed, n).random() for seed in (0, 0, 1) for n in (5, 6)]
    assert draws[:2] == draws[2:4]
    assert len({*draws}) == 4


def test_a_broken_promise_and_a_dead_process_are_reported_with_their_numbers(place: Path) -> None:
    def trial(setup: None, trial: trials.Trial) -> None:
        if trial.number == 2:
            os._exit(3)
        if trial.number == 1:
            trial.fail("kept", "it was not")
        trial.facts["done"] += 1

    suite = trials.Suite("made_up", "Made up", {"kept": "kept"}, lambda place: None, trial)
    journal = place / "made_up.json"
    found = trials.run_suite(suite, 4, 0, 1, 0, journal)
    assert (found["trials"], found["failed"], found["aborted"]) == (4, 2, 1)
    assert found["promises"] == {"kept": ["kept", 1]}
    assert found["facts"] == {"done": 3}
    assert [f["number"] for f in found["failures"]] == [1, 2]
    assert "--only 1: kept: it was not" in trials.readable(found)
    again = trials.run_suite(suite, 6, 0, 1, 0, journal)  # only the two that are missing
    assert (again["trials"], again["facts"]) == (6, {"done": 5})


def test_two_runs_that_differ_in_a_bit_are_told_apart(place: Path) -> None:
    recipe, one, two = place / "tiny.yaml", place / "one", place / "two"
    recipe.write_text(runs.recipe())
    ended = runs.fork(runs.train_words(recipe, one), place / "log", runs.without_drawing)
    assert ended.code == 0, ended.said
    shutil.copytree(one, two)
    assert runs.differences(one, two) == []
    newest = two / "checkpoints" / runs.names_of(two)[-1]
    data = bytearray((newest / "online.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "online.safetensors").write_bytes(data)
    assert "online.safetensors has another hash" in runs.differences(two, one)[0]
    shutil.rmtree(two)
    shutil.copytree(one, two)
    (two / "metrics.jsonl").write_bytes(
        (one / "metrics.jsonl").read_bytes().replace(b"0.4", b"0.5")
    )
    assert runs.differences(two, one)[0].startswith("metrics.jsonl differs")
    (two / "checkpoints/.tmp-x").touch()
    assert runs.leftovers(two) == ["checkpoints/.tmp-x"]
    shutil.rmtree(newest)
    assert "was saved; whole are" in runs.losses(two, 2, 4)[0]
