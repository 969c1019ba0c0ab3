"""A run never begins again in silence, and what it recorded is moved, never deleted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from command_line import Done, e2ediff
from processes import together
from resealing import edit_json
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import Outcome, train

STEPS = 6
TEXT = tiny(steps=f"{STEPS}", post_hoc="{every: 2}", checkpoint="{keep: 3}")
LAST = "images-000000000048"


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A whole run, at `run` beside its recipe; copied by those who change it."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.yaml").write_text(TEXT)
    assert e2ediff("run", folder / "tiny.yaml", "--out", folder / "run").code == 0
    return folder / "run"


@pytest.fixture
def place(straight, tmp_path, monkeypatch) -> Path:
    """A working directory with the recipe and the whole run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    Path("tiny.yaml").write_text(TEXT)
    shutil.copytree(straight, "run")
    return tmp_path


def again(*words: object) -> Done:
    return e2ediff("run", "tiny.yaml", "--out", "run", *words)


def content(folder: Path | str) -> dict[str, str]:
    """A hash of every file below, but for locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def figures(out: Path | str) -> list[dict[str, object]]:
    lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("wall_")} for line in lines]


def weights(out: Path | str, name: str = LAST) -> dict[str, str]:
    found = content(Path(out, "checkpoints", name))
    return {file: text for file, text in found.items() if file != "MANIFEST.json"}


def assert_same_run(out: Path | str, straight: Path) -> None:
    assert figures(out) == figures(straight)
    assert weights(out) == weights(straight)


# Checkpoints that vanished


def only(*kept: str) -> Callable[[], None]:
    """Removes the checkpoints, and of all that tells of them everything else."""

    def harm() -> None:
        shutil.rmtree("run/checkpoints")
        for name in {"status.json", "events.jsonl", "metrics.jsonl", "samples", "post_hoc"} - {
            *kept
        }:
            path = Path("run", name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def without_manifests() -> None:
    for path in Path("run/checkpoints").rglob("MANIFEST.json"):
        path.unlink()


def emptied() -> None:
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints/abandoned-images-000000000016").mkdir(parents=True)


def on_a_disk_that_is_not_mounted() -> None:
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").symlink_to("/nowhere/at/all")


def with_damaged_records() -> None:
    shutil.rmtree("run/checkpoints")
    Path("run/status.json").write_text("{")
    text = Path("run/events.jsonl").read_bytes()
    Path("run/events.jsonl").write_bytes(b"\xff[\n" + text + b'{"kind": "sa')


EVENTS_SAY = f"events.jsonl says that {LAST} was saved"


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (only("status.json", "events.jsonl", "metrics.jsonl", "samples"), EVENTS_SAY),
        (only("events.jsonl"), EVENTS_SAY),
        (only("status.json"), f"status.json says that {LAST} was saved"),
        (only("metrics.jsonl"), "the run was at step 6, and a checkpoint was due at step 2"),
        (only("samples"), "samples/step-00000006.png exists, and a checkpoint was due at step 2"),
        (only("post_hoc"), "images-000000000032 exists, and a checkpoint was due at step 2"),
        (without_manifests, EVENTS_SAY),
        (emptied, EVENTS_SAY),
        (on_a_disk_that_is_not_mounted, EVENTS_SAY),
        (with_damaged_records, EVENTS_SAY),
    ],
    ids=["all", "events", "status", "metrics", "pictures", "snapshots", "without manifests",
         "abandoned only", "not mounted", "damaged records"],
)  # fmt: skip
def test_a_run_whose_checkpoints_vanished_is_not_begun_again(place, harm, why) -> None:
    """Whatever still tells of them; and nothing in the directory is touched."""
    harm()
    before = content("run")
    done = again("--resume")
    assert (done.code, done.out) == (6, "")
    assert done.err == (
        f"error: run/checkpoints: there is no finished checkpoint, but {why}. Restore it (is a "
        "disk not mounted?), or start again with --restart, which keeps what is left of this "
        "attempt in attempts/.\n"
    ).replace("but images", "but post_hoc/checkpoints/images")
    after = content("run")
    if harm is with_damaged_records:  # a torn last line goes, as at every start
        before.pop("events.jsonl"), after.pop("events.jsonl")
    assert after == before


def test_a_run_without_a_whole_checkpoint_says_how_to_begin_again(place) -> None:
    for path in Path("run/checkpoints").rglob("online.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    done = again("--resume")
    assert done.code == 6
    assert "no checkpoint is intact" in done.err
    assert "start again with --restart" in done.err
    status = RunDirectory.open("run").status()
    assert (status["state"], status["step"], status["last_checkpoint"]) == ("failed", STEPS, LAST)


def test_a_resume_that_fails_before_training_leaves_word_of_the_last_checkpoint(place) -> None:
    """It asks for scores by a network whose weights are not there."""
    scores = "{every: 8, features: {name: inception2015, weights: nowhere.pt}, metrics: [fid]}"
    assert again("--resume", "--set", f"scores={scores}").code == 5
    status = RunDirectory.open("run").status()
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert (status["step"], status["images"], status["last_checkpoint"]) == (6, 48, LAST)


def killed(recipe: str, out: str, step: int, *changes: str) -> None:
    """What a kill leaves after a step: a copy of the directory of a run that goes on."""

    @hookimpl
    def step_ended(run, step):
        if step == at:
            shutil.copytree("going", out, ignore=shutil.ignore_patterns(".lock"))

    at = step
    host = load(SimpleNamespace(__name__="copier", step_ended=step_ended))
    train(host, recipe, changes, "going", progress=Progress(io.StringIO()))
    shutil.rmtree("going")


def test_a_run_that_never_saved_begins_again_and_says_so(place, straight) -> None:
    """Killed before its first checkpoint was due, also under a cadence that changed meanwhile."""
    shutil.rmtree("run")
    killed("tiny.yaml", "run", 4, "cadence.checkpoint=5", "cadence.log=1")
    assert not Path("run/checkpoints").exists()
    assert len(figures("run")) > 3
    done = again("--resume")
    assert done.code == 0
    assert "has no checkpoint yet, so it starts again" in done.err
    assert_same_run("run", straight)


@pytest.mark.parametrize("recorded", [False, True])
def test_on_an_object_store_a_save_that_never_finished_is_no_checkpoint(
    place, straight, recorded
) -> None:
    """Objects without a manifest: the run begins again, unless a finished one was recorded."""
    url = f"memory://{place}/{recorded}"
    store = Store(url)
    killed("tiny.yaml", "started", 1)
    source = "run" if recorded else "started"
    for path in Path(source).rglob("*"):
        if path.is_file() and path.name not in (".lock", "MANIFEST.json"):
            store.write(str(path.relative_to(source)), path.read_bytes())
    store.write("checkpoints/images-000000000016/online.safetensors", b"half")
    done = e2ediff("run", "tiny.yaml", "--out", url, "--resume")
    if recorded:
        assert done.code == 6
        assert EVENTS_SAY in done.err
        return
    assert done.code == 0, done.err
    assert "has no checkpoint yet, so it starts again" in done.err
    fsspec.filesystem("memory").get(store._root, "fetched", recursive=True)
    assert_same_run("fetched", straight)


# Going on from an earlier one


def damage() -> None:
    file = Path("run/checkpoints", LAST, "online.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "state"),
    [(lambda: shutil.rmtree(f"run/checkpoints/{LAST}"), "is not there"), (damage, "is damaged")],
    ids=["vanished", "damaged"],
)
def test_going_on_from_an_earlier_checkpoint_is_said_and_keeps_the_later_figures(
    place, straight, harm, state
) -> None:
    """And pictures and snapshots; the run then is what it was, and a second time says nothing."""
    store = Store("run/post_hoc")
    later = "post_hoc/checkpoints/images-000000000032"
    harm()
    shutil.rmtree("run/checkpoints/images-000000000032")
    before = content("run")
    done = again("--resume")
    assert done.code == 0
    assert (
        f"{LAST}, which was saved later, {state}: the run goes back to images-000000000016; "
        "what was recorded since is kept in run/attempts/1\n"
    ) in done.err
    assert_same_run("run", straight)
    assert store.list("checkpoints") == ["images-000000000016", "images-000000000032"]
    kept = content("run/attempts/1")
    assert set(kept) > {"metrics.jsonl", "events.jsonl", "status.json", "run.json", "recipe.yaml"}
    assert {f"samples/step-0000000{n}.png" for n in (4, 6)} < set(kept)
    assert f"{later}/MANIFEST.json" in kept
    assert all(before[name] == text for name, text in kept.items())
    (event,) = [e for e in RunDirectory.open("run").read_events() if e["kind"] == "lost"]
    assert (event["name"], event["to"]) == (LAST, "images-000000000016")
    assert "saved later" not in again("--resume").err
    assert os.listdir("run/attempts") == ["1"]


def test_a_run_that_goes_on_puts_checkpoints_that_do_not_verify_aside(place) -> None:
    """With all that they hold; nothing else does, and temporary files of a kill go."""
    damage()
    held = content(f"run/checkpoints/{LAST}")
    for folder in (
        "checkpoints/.tmp-images-000000000048-0123abcd",
        "post_hoc/checkpoints/.trash-x",
    ):
        Path("run", folder).mkdir(parents=True)
    assert e2ediff("sample", "run", "--count", 1).code == 0
    assert Path("run/checkpoints", LAST).exists()
    done = again("--resume")
    assert done.code == 0, done.err
    (kept,) = (p for p in Path("run/checkpoints").iterdir() if p.name.startswith("."))
    assert kept.name.startswith(f".bad-{LAST}-")
    assert content(kept) == held
    assert f"{LAST} is kept as run/checkpoints/{kept.name}\n" in done.err
    (event,) = [e for e in RunDirectory.open("run").read_events() if e["kind"] == "quarantined"]
    assert (event["name"], event["kept"]) == (LAST, kept.name)
    assert "online.safetensors has" in event["reason"]
    assert not Store("run/post_hoc").list("checkpoints")[0].startswith(".")


def test_a_checkpoint_that_cannot_be_read_is_put_aside_before_it_could_be_replaced(place) -> None:
    file = Path("run/checkpoints", LAST, "online.safetensors")
    data = file.read_bytes()
    file.unlink()
    file.symlink_to(file.name)  # the system refuses to open it
    done = again("--resume")
    assert done.code == 0, done.err
    (kept,) = (p for p in Path("run/checkpoints").iterdir() if p.name.startswith(".bad-"))
    assert (kept / "online.safetensors").is_symlink()
    assert file.read_bytes() == data, "trained again"


def test_on_an_object_store_what_does_not_verify_is_put_aside_too(place) -> None:
    """It would be replaced by the next save of as many images; a save that never finished goes."""
    damage()
    url = f"memory://{place}/aside"
    store = Store(url)
    for path in Path("run").rglob("*"):
        if path.is_file() and path.name != ".lock":
            store.write(str(path.relative_to("run")), path.read_bytes())
    store.write("checkpoints/images-000000000056/online.safetensors", b"half")
    half = store.read(f"checkpoints/{LAST}/online.safetensors")
    done = e2ediff("run", "--resume", url)
    assert done.code == 0, done.err
    (kept,) = (name for name in store.list("checkpoints") if name.startswith("."))
    assert kept.startswith(f".bad-{LAST}-")
    assert store.read(f"checkpoints/{kept}/online.safetensors") == half
    (event,) = [e for e in RunDirectory.open(url).read_events() if e["kind"] == "quarantined"]
    assert (event["name"], event["kept"]) == (LAST, kept)
    assert e2ediff("ckpt", "verify", url, LAST).code == 0
    assert e2ediff("ckpt", "prune", url, "--bad").code == 0
    assert kept not in store.list("checkpoints")


def test_a_quarantined_checkpoint_shows_that_there_was_one(place) -> None:
    only()()
    Path(f"run/checkpoints/.bad-{LAST}-0123abcd").mkdir(parents=True)
    done = again("--resume")
    assert done.code == 6
    assert f".bad-{LAST}-0123abcd was one, and did not verify" in done.err


def test_a_run_does_not_go_on_before_a_checkpoint_of_a_newer_format(place, straight) -> None:
    """It would replace it, when it comes to its step; `list` says of none that it is taken."""
    edit_json(Path("run/checkpoints", LAST), "MANIFEST.json", lambda b: b.update(format_version=9))
    before = content("run")
    done = again("--resume")
    assert done.code == 6
    assert f"checkpoints/{LAST}: was written by a newer e2ediff" in done.err
    assert "To go on from images-000000000032 instead, move it" in done.err
    kept = content("run")
    assert all(kept[name] == before[name] for name in before if name != "status.json")
    assert "--resume takes it" not in e2ediff("ckpt", "list", "run").out
    Path("run/checkpoints", LAST).rename("newer")
    assert again("--resume").code == 0
    assert_same_run("run", straight)


def test_a_bit_that_makes_the_format_a_later_one_is_damage(place, straight) -> None:
    manifest = Path("run/checkpoints", LAST, "MANIFEST.json")
    text = manifest.read_text()
    assert '"format_version": 1' in text
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    done = again("--resume")
    assert done.code == 0, done.err
    assert f"{LAST} is kept as run/checkpoints/.bad-{LAST}-" in done.err


def test_a_checkpoint_that_was_set_aside_by_a_return_was_not_lost(place, straight) -> None:
    """A kill after the earlier one was saved anew, and before that was noted."""
    with Path("run/events.jsonl").open("a") as file:
        entry = {"kind": "rewound", "to": "images-000000000016", "step": 6, "attempt": 1}
        file.write(json.dumps(entry) + "\n")
    for name in (LAST, "images-000000000032"):
        Path("run/checkpoints", name).rename(Path("run/checkpoints", f"abandoned-{name}"))
    done = again("--resume")
    assert done.code == 0
    assert "saved later" not in done.err
    assert not Path("run/attempts").exists()


# Beginning again


def test_restart_begins_again_and_keeps_the_former_attempt_as_a_run_of_its_own(
    place, straight
) -> None:
    """Whatever lies in the directory; twice; and each attempt can be compared and resumed."""
    Path("run/figures.csv").write_text("a tracker's")
    before = content("run")
    shutil.rmtree("run/checkpoints")
    done = again("--restart", "--set", "seed=1", "--set", "steps=2")
    assert (done.code, done.out) == (0, "run\n")
    assert "the former content of run is kept in run/attempts/1\n" in done.err
    assert sorted(os.listdir("run/attempts")) == ["1"]
    kept = {name: text for name, text in before.items() if not name.startswith("checkpoints/")}
    assert content("run/attempts/1") == kept
    assert [line["step"] for line in figures("run")][-1] == 2
    assert RunDirectory.open("run").read_events()[0]["kept"] == "attempts/1"
    second = content("run")
    done = again("--restart")
    assert done.code == 0
    assert_same_run("run", straight)
    first = {f"attempts/1/{name}": text for name, text in kept.items()}
    assert {**first, **content("run/attempts/2")} == second
    assert content("run/attempts/1") == kept
    assert e2ediff("compare", "run", "run/attempts/1", "run/attempts/2").code == 0
    went = e2ediff("run", "tiny.yaml", "--out", "run/attempts/2", "--resume", "--set", "seed=1")
    assert (went.code, figures("run/attempts/2")[-1]["step"]) == (0, STEPS)


def test_restart_needs_no_run_to_begin_with_and_finds_the_newest(place, straight) -> None:
    shutil.rmtree("run")
    assert e2ediff("run", "tiny.yaml", "--restart").out == "runs/tiny\n"
    assert not Path("runs/tiny/attempts").exists()
    assert e2ediff("run", "tiny.yaml", "--restart").out == "runs/tiny\n"
    assert_same_run("runs/tiny", straight)
    assert_same_run("runs/tiny/attempts/1", straight)
    Path("run").mkdir()
    assert again("--restart").code == 0
    assert not Path("run/attempts").exists()


def test_restart_and_resume_exclude_each_other(place) -> None:
    before = content("run")
    done = again("--restart", "--resume")
    assert done.code == 2
    assert "--resume continues a run and --restart starts it over" in done.err
    assert content("run") == before


def test_a_run_that_is_being_trained_is_not_restarted(place) -> None:
    with RunDirectory.open("run") as directory:
        directory.lock()
        done = again("--restart")
    assert done.code == 6
    assert "is training in it" in done.err
    assert not Path("run/attempts").exists()


def restart_killed_after(moves: int) -> int:
    """The exit code of a fork that restarts the run; 9 if it was killed before a further move."""
    pid = os.fork()
    if pid == 0:
        left, rename = [moves], os.rename

        def counted(old: str, new: str) -> None:
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            rename(old, new)

        code = 1
        try:
            os.rename = counted
            RunDirectory.create("run", "tiny", TEXT, "resolved", {}, restart=True)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_restart_killed_between_any_two_moves_is_finished_by_another(place, straight) -> None:
    """`run` and `--resume` say so, and do not take what is left for a run or for nothing."""
    before = content("run")
    names = {path.name for path in Path("run").iterdir()} - {".lock"}
    shutil.move("run", "saved")
    for count in range(len(names) + 1):
        shutil.copytree("saved", "run")
        assert restart_killed_after(count) == (9 if count < len(names) else 0)
        if 0 < count < len(names):
            for words in ([], ["--resume"]):
                done = again(*words)
                assert done.code == 6
                assert "If --restart was interrupted here, repeat it" in done.err
        RunDirectory.create("run", "tiny", TEXT, "resolved", {}, restart=True).unlock()
        assert {path.name for path in Path("run").iterdir()} == {
            ".lock", "attempts", "recipe.yaml", "resolved.yaml", "run.json", "events.jsonl", "seal"
        }  # fmt: skip
        assert content("run/attempts/1") == before
        assert ("2" in os.listdir("run/attempts")) == (count == len(names))
        shutil.rmtree("run")


def test_restart_on_an_object_store_moves_every_object(place, straight) -> None:
    url = f"memory://{place}/restarted"
    store = Store(url)
    for path in Path("run").rglob("*"):
        if path.is_file() and path.name != ".lock":
            store.write(str(path.relative_to("run")), path.read_bytes())
    assert e2ediff("run", "tiny.yaml", "--out", url, "--restart").code == 0
    fsspec.filesystem("memory").get(store._root, "fetched", recursive=True)
    assert content("fetched/attempts/1") == content("run")
    assert_same_run("fetched", straight)


def in_two(**given: bool) -> list[object]:
    """Exit codes, or errors, of two processes that train together."""

    def act(rank: int) -> int:
        world = World.join()
        shown = Progress(io.StringIO())
        changes = ["microshards=2"]
        ended: Outcome = train(
            load(), "tiny.yaml", changes, "two", progress=shown, world=world, **given
        )
        world.shutdown()
        return ended.exit_code

    return together(act)


def test_several_processes_refuse_and_begin_again_as_one_does(place) -> None:
    assert in_two() == [0, 0]
    before = content("two")
    shutil.rmtree("two/checkpoints")
    first, second = in_two(resume=True)
    assert EVENTS_SAY in str(first)
    assert EVENTS_SAY in str(second)
    assert in_two(restart=True) == [0, 0]
    kept = {name: text for name, text in before.items() if not name.startswith("checkpoints/")}
    assert content("two/attempts/1") == kept
    assert figures("two") == figures("two/attempts/1")


@pytest.mark.usefixtures("forks")
def test_the_launcher_hands_on_that_a_run_begins_again(place) -> None:
    command = [sys.executable, "-m", "e2ediff", "run", "tiny.yaml", "--out", "run", "--nproc", "2"]
    command += ["--threads", "1", "--restart", "--set", "microshards=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr
    assert done.stderr.count("the former content of run is kept in run/attempts/1") == 1


@pytest.mark.usefixtures("forks")
def test_a_run_of_an_ablation_whose_checkpoints_vanished_fails_and_says_why(place) -> None:
    words = ("ablate", "tiny.yaml", "--vary", "optimizer.lr=0.001,0.002", "--seeds", "0")
    assert e2ediff(*words, "--out", "group").code == 0
    (cell, _) = sorted(Path("group/runs").iterdir())
    status = json.loads((cell / "status.json").read_text())
    (cell / "status.json").write_text(json.dumps({**status, "state": "preempted"}))
    shutil.rmtree(cell / "checkpoints")
    done = e2ediff(*words, "--out", "group", "--resume")
    assert done.code == 6
    assert f"failed: {cell.name}: group/runs/{cell.name}/checkpoints: there is no" in done.err
    assert len(figures(cell)) > STEPS


# Temporary files


def test_temporary_files_of_a_kill_go_when_the_run_goes_on(place, straight) -> None:
    """Those of files that the run alone writes: a report may be in the writing."""
    ours = ["status.json", "metrics.jsonl", "curves.png", "samples/step-00000002.png"]
    for name in [*ours, "report.html", "mine"]:
        folder, _, file = name.rpartition("/")
        Path("run", folder, f".tmp-{file}-0123abcd").write_text("half")
    assert again("--resume").code == 0
    left = sorted(path.name for path in Path("run").rglob(".tmp-*"))
    assert left == [".tmp-mine-0123abcd", ".tmp-report.html-0123abcd"]


def test_temporary_files_of_a_killed_set_of_images_go_when_the_set_is_whole(place) -> None:
    words = ("sample", "run", "--count", "1", "--out", "set")
    assert e2ediff(*words).code == 0
    before = content("set")
    Path("set/images/000001.png").unlink()
    half = Path("set/images/.tmp-000001.png-0123abcd")
    half.write_text("half")
    os.utime(half, (0, 0))
    assert e2ediff(*words).code == 0
    assert {k: v for k, v in content("set").items() if k != "set.json"} == {
        k: v for k, v in before.items() if k != "set.json"
    }
