"""One CPU thread or all: chosen by timing, kept on resuming, and without a trace in weights."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import torch
from command_line import e2ediff
from e2ediff_testing import make_batch
from processes import together

from e2ediff.distributed.threads import PERIOD, Threads, threads_for
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.update import Update
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

ALL = 2


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads are all, on whatever machine the tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(ALL)
    yield
    torch.set_num_threads(before)


@attrs.define
class Work:
    """Work that takes a known time with each number of threads, by a clock of its own."""

    seconds: dict[int, float]
    runs: int = 0
    now: float = 0.0
    lines: list[str] = attrs.field(factory=list)

    def __call__(self) -> None:
        self.runs += 1
        self.now += self.seconds[torch.get_num_threads()]

    def chooser(self, **options) -> Threads:
        return Threads(self, self.report, clock=lambda: self.now, **options)

    def report(self, line: str, count: int, of: int) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("one", "both", "taken"),
    [(0.02, 0.012, 2), (0.012, 0.02, 1), (0.02, 0.0196, 1)],
    ids=["all are faster", "one is faster", "all gain less than 5 %"],
)
def test_the_faster_number_of_threads_is_taken(one, both, taken) -> None:
    work = Work({1: one, 2: both})
    threads = work.chooser()
    threads.begin()
    assert threads.count == torch.get_num_threads() == taken
    (line,) = work.lines
    assert line.startswith(f"CPU threads: {taken} of 2, by time: ")


def test_threads_are_compared_anew_when_the_pace_falls_by_half_and_not_before() -> None:
    work = Work({1: 0.02, 2: 0.01})
    threads = work.chooser()
    threads.begin()
    before = work.runs
    for _ in range(8):
        threads.done(10.0, 1.0)
    threads.done(10.0, 1.9)  # slower, by less than half
    assert (work.runs, threads.count) == (before, 2)
    work.seconds = {1: 0.01, 2: 0.05}  # another process has taken a core
    work.now += 60
    threads.done(10.0, 2.1)
    assert work.runs == before  # a single slow second is chance
    threads.done(10.0, 2.1)
    assert (threads.count, torch.get_num_threads()) == (1, 1)
    assert len(work.lines) == 2
    # The pace from here on is that of one thread.
    runs = work.runs
    threads.done(10.0, 4.0)
    threads.done(10.0, 7.9)
    threads.done(10.0, 7.9)
    assert work.runs == runs


def test_comparing_takes_at_most_a_twentieth_of_the_time_however_the_pace_goes() -> None:
    work = Work({1: 3.0, 2: 2.0})
    threads = work.chooser()
    threads.begin()
    began, spent = work.now, 0.0
    for i in range(2000):
        seconds = 2.0 if i % 4 < 2 else 6.0
        work.now += seconds
        before = work.now
        threads.done(1.0, seconds)
        spent += work.now - before
    assert 0 < spent < 0.05 * (work.now - began)


def test_a_number_that_is_hopeless_at_first_sight_is_timed_once() -> None:
    work = Work({1: 0.01, 2: 0.5})
    threads = work.chooser()
    threads.begin()
    assert threads.count == 1
    assert work.runs == 2
    assert work.lines == ["CPU threads: 1 of 2, by time: 10 ms with 1, 500 ms with 2"]
    # One look may be chance: another follows soon.
    work.seconds[2] = 0.005
    work.now += 45 * 0.51
    threads.done(10.0, 1.0)
    assert threads.count == 2


def test_threads_are_compared_anew_after_a_while_whatever_the_pace() -> None:
    """One thread is as fast beside another process as alone: its pace cannot tell."""
    work = Work({1: 0.01, 2: 0.05})
    threads = work.chooser()
    threads.begin()
    work.seconds = {1: 0.01, 2: 0.006}
    threads.done(10.0, 1.0)
    assert threads.count == 1
    work.now += PERIOD + 60
    threads.done(10.0, 1.0)
    assert threads.count == 2


def test_a_comparison_that_is_not_sure_is_repeated_soon_and_then_ever_more_seldom() -> None:
    """As where a machine had no second core to give for a moment."""
    work = Work({1: 0.01, 2: 0.0098})
    threads = work.chooser()
    threads.begin()
    compared, runs, began = [], work.runs, work.now
    while work.now < began + 4 * PERIOD:
        work.now += 1
        threads.done(10.0, 1.0)
        if work.runs > runs:
            compared.append(work.now - began)
            runs = work.runs
    waits = [b - a for a, b in itertools.pairwise([0.0, *compared])]
    assert 10 < waits[0] < 16
    assert all(3 < b / a < 5 for a, b in itertools.pairwise(waits[:3]))
    assert waits[-2:] == pytest.approx([PERIOD] * 2, rel=0.05)
    assert threads.count == 1
    work.seconds[2] = 0.007  # sure
    work.now += PERIOD
    threads.done(10.0, 1.0)
    assert threads.count == 2
    runs = work.runs
    for _ in range(int(0.9 * PERIOD)):
        work.now += 1
        threads.done(14.0, 1.0)
    assert work.runs == runs


def test_a_number_that_was_taken_stays_where_another_gains_less_than_five_percent() -> None:
    work = Work({1: 0.05, 2: 0.01})
    threads = work.chooser()
    threads.begin()
    work.seconds = {1: 0.0196, 2: 0.02}
    work.now += PERIOD + 60
    runs = work.runs
    threads.done(10.0, 1.0)
    assert work.runs > runs
    assert threads.count == 2
    assert len(work.lines) == 1


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "one core"])
def test_nothing_is_timed_where_there_is_nothing_to_choose(fixed) -> None:
    torch.set_num_threads(2 if fixed else 1)
    work = Work({1: 0.0, 2: 0.0})
    threads = work.chooser(fixed=fixed)
    threads.begin()
    threads.done(1.0, 2.0)
    threads.done(1.0, 9.0)
    assert (work.runs, work.lines) == (0, [])


def test_the_former_number_is_put_back() -> None:
    def work() -> None:
        time.sleep(0.001 if torch.get_num_threads() == 1 else 0.05)

    said: list[str] = []
    with threads_for(work, said.append, torch.device("cpu")):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert len(said) == 1


def test_processes_that_train_together_take_the_same_number() -> None:
    """By the slowest of them: for process 1 all threads are slower, for process 0 faster."""

    def act(rank: int) -> list[int]:
        world = World.join()
        torch.set_num_threads(2)
        work = Work({1: 0.02, 2: 0.012} if rank == 0 else {1: 0.02, 2: 0.04})
        threads = work.chooser(world=world)
        threads.begin()
        first = threads.count
        work.seconds = {1: 0.03, 2: 0.01}
        work.now += 60
        for i in range(60):  # the pace falls in process 1 alone
            threads.done(1.0, 0.1 if rank == 0 or i < 20 else 0.5)
        world.shutdown()
        return [first, threads.count]

    assert together(act) == [[1, 2], [1, 2]]


@pytest.mark.parametrize("count", [0, 2, 4], ids=["new", "resumed", "resumed with more"])
@pytest.mark.parametrize("there", [1, 3], ids=["one core there", "fewer there"])
def test_processes_on_unlike_machines_take_what_each_of_them_has(there, count) -> None:
    def act(rank: int) -> list[int]:
        world = World.join()
        torch.set_num_threads(4 if rank == 0 else there)
        work = Work({1: 0.04, 2: 0.03, 3: 0.02, 4: 0.01})
        threads = work.chooser(world=world, count=count)
        threads.begin()
        for _ in range(60):
            work.now += 60
            threads.done(1.0, 0.1)
        world.shutdown()
        return [threads.all, threads.count]

    found = together(act)
    assert found[0] == found[1]
    assert found[0][0] == there


def test_two_processes_of_a_run_choose_together_by_real_steps(tiny_recipe, tmp_path) -> None:
    def act(rank: int) -> int:
        world = World.join()
        torch.set_num_threads(2)
        out, quiet = str(tmp_path / "run"), Progress(io.StringIO())
        done = train(load(), tiny_recipe, ["microshards=2"], out, world=world, progress=quiet,
                     choose_threads=True)  # fmt: skip
        world.shutdown()
        return done.exit_code

    assert together(act) == [0, 0]
    event, *_ = chosen(tmp_path / "run")
    assert (event["step"], event["of"]) == (0, 2)


# In a run


def recipe_of(path: str, *changes: str):
    return load_recipe(load(), path, changes)


@pytest.mark.parametrize("changes", [(), ("compile=blocks",)], ids=["eager", "compiled"])
def test_timing_a_step_changes_nothing(changes, tiny_recipe) -> None:
    """No weight, no buffer, no gradient, and no number of torch's own generator."""
    if changes:
        pytest.importorskip("triton")
    recipe = recipe_of(tiny_recipe, *changes)
    parts = assemble(recipe, torch.device("cpu"))
    update = Update(recipe, parts, World(), lambda *a, **k: None)
    batch = make_batch(recipe.data.image, size=recipe.batch)
    held = {**parts.step.state_dict(), **parts.averages["target"].net.state_dict(prefix="target.")}
    before = {name: value.clone() for name, value in held.items()}
    state = torch.get_rng_state()
    update.rehearse(batch, 0)
    assert all(torch.equal(held[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in parts.step.parameters())


@pytest.fixture
def steady(monkeypatch) -> None:
    """A machine whose pace never falls, whatever else it does during the tests."""
    monkeypatch.setattr("e2ediff.distributed.threads._WINDOW", float("inf"))


def bits(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(Store(str(run)))
    files = [f.removesuffix(".safetensors") for f in checkpoint.files if "safetensors" in f]
    return {f"{f}/{k}": v for f in files for k, v in checkpoint.tensors(f).items()}


def chosen(run: Path) -> list[dict]:
    return [e for e in RunDirectory.open(str(run)).read_events() if e["kind"] == "threads"]


def test_a_run_that_chose_its_threads_equals_one_that_was_given_them(
    tiny_recipe, tmp_path, steady
) -> None:
    train(load(), tiny_recipe, [], str(tmp_path / "chose"), choose_threads=True)
    assert torch.get_num_threads() == 2
    (event,) = chosen(tmp_path / "chose")
    assert event["of"] == 2
    torch.set_num_threads(event["count"])
    train(load(), tiny_recipe, [], str(tmp_path / "given"))
    a, b = bits(tmp_path / "chose"), bits(tmp_path / "given")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("former", [1, 2])
def test_a_resumed_run_goes_on_with_its_own_number_of_threads(
    former, tiny_recipe, tmp_path, steady
) -> None:
    out = str(tmp_path / "run")
    torch.set_num_threads(former)
    train(load(), tiny_recipe, ["steps=6"], out)
    torch.set_num_threads(2)
    train(load(), tiny_recipe, [], out, resume=True, choose_threads=True)
    (event,) = chosen(tmp_path / "run")
    assert (event["count"], event["of"]) == (former, 2)
    assert event["text"] == f"CPU threads: {former} of 2, as before"


def test_a_run_whose_pace_falls_at_its_last_step_ends_as_any_other(
    tiny_recipe, tmp_path, monkeypatch
) -> None:
    """Every step is a window, and every window asks for a comparison; after the last is none."""
    monkeypatch.setattr("e2ediff.distributed.threads._WINDOW", 0.0)
    monkeypatch.setattr("e2ediff.distributed.threads._TRIAL", 0.0)
    monkeypatch.setattr("e2ediff.distributed.threads.PERIOD", -1e9)
    out = str(tmp_path / "run")
    assert train(load(), tiny_recipe, [], out, choose_threads=True).exit_code == 0


@pytest.mark.parametrize(
    "line", ["{torn", '{"kind": "threads", "images": "x"}', '{"kind": "threads", "count": "x"}']
)
def test_damaged_records_of_threads_keep_no_run_from_being_resumed(
    line, tiny_recipe, tmp_path
) -> None:
    out = tmp_path / "run"
    train(load(), tiny_recipe, ["steps=6"], str(out))
    events = out / "events.jsonl"
    events.write_text(f"{line}\n{events.read_text()}{line}\n")
    done = train(load(), tiny_recipe, [], str(out), resume=True, choose_threads=True)
    assert done.exit_code == 0


def test_a_run_resumed_with_another_number_records_it(tiny_recipe, tmp_path) -> None:
    out = str(tmp_path / "run")
    train(load(), tiny_recipe, ["steps=6"], out)
    torch.set_num_threads(1)
    train(load(), tiny_recipe, [], out, resume=True)
    (event,) = chosen(tmp_path / "run")
    assert (event["count"], event["step"]) == (1, 6)


# On the command line

COMPUTE = ["run", "sample", "eval", "reconstruct", "interpolate", "ablate"]


@pytest.mark.parametrize("command", COMPUTE)
def test_every_command_that_computes_takes_a_number_of_threads_or_auto(command) -> None:
    done = e2ediff(command, "--help")
    words = " ".join(done.out.split())
    assert "--threads N|auto" in words
    assert "[default: auto]" in words


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "", "1000000"])
def test_another_word_is_refused(value, tiny_recipe) -> None:
    done = e2ediff("run", tiny_recipe, "--threads", value)
    assert done.code == 2
    what = "expected a number of threads from 1 to 1024, or auto"
    assert done.err == f"error: --threads {value!r}: {what}\n"


def test_commands_say_which_number_they_took(tiny_recipe, tmp_path, steady) -> None:
    run = tmp_path / "run"
    done = e2ediff("run", tiny_recipe, "--out", run)
    assert done.err.count("CPU threads: ") == 1, done.err
    for words in [("sample", run, "--count", 1), ("reconstruct", run, "--count", 4)]:
        done = e2ediff(*words)
        assert done.err.count("CPU threads: ") == 1, done.err
        done = e2ediff(*words, "--threads", 1, *(["--overwrite"] if words[0] == "sample" else []))
        assert "CPU threads" not in done.err
        torch.set_num_threads(ALL)


def test_an_image_is_the_same_with_one_thread_and_with_two(tiny_recipe, tmp_path) -> None:
    run, sets = tmp_path / "run", []
    e2ediff("run", tiny_recipe, "--out", run, "--threads", 1)
    for n in (1, 2):
        out = tmp_path / f"set{n}"
        done = e2ediff("sample", run, "--count", 2, "--threads", n, "--out", out)
        assert done.code == 0, done.err
        made = json.loads((out / "set.json").read_text())["made"]
        assert made["threads"] == n
        torch.set_num_threads(ALL)
        sets.append(sorted(p.read_bytes() for p in (out / "images").rglob("*.png")))
    assert sets[0] == sets[1]


def test_a_set_says_how_many_threads_were_chosen(tiny_recipe, tmp_path, steady) -> None:
    run, out = tmp_path / "run", tmp_path / "set"
    e2ediff("run", tiny_recipe, "--out", run, "--threads", 1)
    torch.set_num_threads(ALL)
    done = e2ediff("sample", run, "--count", 1, "--out", out)
    made = json.loads((out / "set.json").read_text())["made"]
    assert f"CPU threads: {made['threads']} of 2" in done.err
    again = e2ediff("sample", run, "--count", 1, "--out", out)
    assert "CPU threads" not in again.err  # there is nothing left to make


# Waiting

_ASK = (
    "import os; from e2ediff.distributed.openmp import let_waiting_threads_sleep as f; f(); "
    "print(os.environ.get('OMP_WAIT_POLICY'))"
)


def asked(**environment: str) -> str:
    held = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", _ASK], env=held | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="needs Linux")
def test_waiting_threads_sleep_where_other_processes_compute() -> None:
    spin = [sys.executable, "-Sc", "print(flush=True)\nwhile True: pass"]
    number = 2 * (os.cpu_count() or 1)
    others = [subprocess.Popen(spin, stdout=subprocess.PIPE) for _ in range(number)]
    try:
        assert all(other.stdout.readline() for other in others)
        assert asked() == "PASSIVE"
        assert asked(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
        assert asked(GOMP_SPINCOUNT="100") == "None"
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_the_policy_is_set_before_torch_is_loaded() -> None:
    """OpenMP reads it once."""
    code = (
        "import sys; from e2ediff.distributed.openmp import let_waiting_threads_sleep as f; f(); "
    )
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
