"""The command line as a user meets it: what it says, how it exits, what it leaves behind.

`e2ediff` runs a command in this process and lets every exception through that a user would see
as a traceback, so each test here also claims that there is none.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from command_line import OURS, Done, e2ediff, needs, needs_dsd
from PIL import Image
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.tracker import Tracker, TrackerConfig
from e2ediff.train.session import Outcome, train

RECIPES = Path(__file__).parents[2] / "recipes"

TINY = tiny()

FIRST, LAST = "images-000000000016", "images-000000000032"
AS_IT_WAS = "continue this one as it was: e2ediff run --resume runs/tiny"
NEVER = f"A run cannot change it. Start another run, or {AS_IT_WAS}"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on images whose classes have names; copied by each test that needs it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    clothes = ("--set", "data={name: fashion_mnist, size: 32}")
    done = e2ediff("run", recipe, *clothes, "--out", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def run(trained: Path) -> str:
    """The finished run, at runs/tiny, with checkpoints FIRST and LAST."""
    shutil.copytree(trained, "runs/tiny")
    return "runs/tiny"


def refused(code: int, *words: object) -> list[str]:
    """Lines of the message of a command that must fail with this exit code."""
    done = e2ediff(*words)
    assert done.code == code, done
    assert done.out == ""
    text = done.err[done.err.index("error: ") :]
    return text.removeprefix("error: ").splitlines()


def nothing_made() -> bool:
    return sorted(p.name for p in Path().iterdir()) == ["tiny.yaml"]


def status(path: str) -> dict[str, object]:
    return RunDirectory.open(path).status()


# Finding one's way


def test_help_answers_at_once_without_torch() -> None:
    """That of the whole and of every command; in CPU time, for machines that do more than this."""
    program = (
        "import sys\n"
        "from e2ediff.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'fsspec', 'rich', 'matplotlib'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    seconds = []
    for words in (
        [],
        ["run"],
        ["sample"],
        ["reconstruct"],
        ["interpolate"],
        ["check"],
        ["parts"],
        ["plugins"],
        ["ablate"],
        ["report"],
        ["compare"],
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program, *words, "--help"], capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: e2ediff")
    assert min(seconds) < 0.25


def test_help_shows_two_commands_to_begin_with_and_lists_all() -> None:
    done = e2ediff("--help")
    assert (
        "  e2ediff run recipes/quickstart.yaml\n"
        "  e2ediff sample runs/quickstart --label sneaker\n" in done.out
    )
    for name in ("run", "sample", "reconstruct", "check", "parts", "plugins"):
        assert f"\n  {name} " in done.out


def test_an_unknown_command_suggests_the_one_that_was_meant(monkeypatch) -> None:
    monkeypatch.setenv("E2EDIFF_BLOCK", OURS)
    done = e2ediff("sampel")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(
        "Error: unknown command 'sampel'. Did you mean 'sample'? "
        "Known: ablate, check, ckpt, compare, doctor, eval, interpolate, parts, plugins, "
        "reconstruct, report, run, sample."
    )


def test_an_unknown_kind_of_parts_suggests_the_one_that_was_meant() -> None:
    done = e2ediff("parts", "objektives")
    assert done.code == 2
    assert "unknown kind 'objektives'. Did you mean 'objectives'?" in done.err


def test_parts_shows_one_part_with_its_documentation_and_suggests_the_one_that_was_meant() -> None:
    shown = e2ediff("parts", "objectives", "detached").out
    assert shown.startswith("detached  [e2ediff]  The denoiser learns the latents, and ")
    assert "\n    denoising_weight: float = 1.0\n" in shown
    assert "\n    `draws` " in shown
    assert "coupled" not in shown.split("\n")[0]
    done = e2ediff("parts", "objectives", "detatched")
    assert done.code == 2
    assert "unknown objective 'detatched'. Did you mean 'detached'?" in done.err


# Recipes


def test_all_that_is_wrong_in_a_recipe_and_in_set_is_said_at_once_and_nothing_is_made(
    monkeypatch,
) -> None:
    """A key, a type, a name and a value, two of them in the file and two on the command line."""
    others = sorted({point.name for point in metadata.entry_points(group="e2ediff")})
    monkeypatch.setenv("E2EDIFF_BLOCK", ",".join(others))
    text = TINY.replace("steps: 4\n", "steps: 4.5\n").replace("depth: 1", "depht: 1")
    Path("tiny.yaml").write_text(text)
    given = ("--set", "interpolant=liner", "--set", "optimizer.lr=-1")
    lines = refused(3, "run", "tiny.yaml", *given)
    assert lines[0] == "tiny.yaml: 4 problems"
    assert lines[1] == "  tiny.yaml:3:8: steps: expected int, got float 4.5."
    assert lines[2].startswith(
        "  tiny.yaml:6:34: backbone: unknown option 'depht'. Did you mean 'depth'? Options: "
    )
    blocked = [f" Plugin {name!r} was not loaded (blocked by E2EDIFF_BLOCK)." for name in others]
    assert lines[3] == (
        "  --set 1: interpolant: unknown interpolant 'liner'. Did you mean 'linear'? "
        "Known: cosine, linear, ve." + "".join(blocked)
    )
    assert lines[4] == "  --set 2: optimizer.lr: 'lr' must be > 0: -1.0"
    assert len(lines) == 5
    assert nothing_made()


def test_a_recipe_that_is_not_there_is_said() -> None:
    assert refused(3, "run", "tyni.yaml") == [
        "tyni.yaml: 1 problem",
        "  tyni.yaml: recipe: there is no such file.",
    ]
    assert nothing_made()


def test_parts_that_do_not_fit_one_another_are_said_before_anything_is_made() -> None:
    (_, line) = refused(3, "run", "tiny.yaml", "--set", "backbone.patch=5")
    assert "backbone.patch: " in line
    assert "5" in line
    assert nothing_made()


def test_a_missing_plugin_is_named_with_its_pip_install_line() -> None:
    Path("tiny.yaml").write_text(TINY + 'requires: ["e2ediff-nowhere>=2"]\n')
    assert refused(3, "run", "tiny.yaml") == [
        "tiny.yaml: 1 problem",
        "  tiny.yaml:16:12: requires.0: e2ediff-nowhere is not installed. "
        "Run: pip install ./e2ediff-nowhere in the folder that contains it; plugins of e2ediff "
        "itself are in plugins/ of its repository, and on no package index",
    ]
    assert nothing_made()


@pytest.mark.skipif(torch.cuda.is_available(), reason="claims what is said where CUDA is absent")
def test_cuda_that_is_absent_is_said_before_anything_is_made(run: str) -> None:
    said = (
        "device: cuda is not available here; set `device: auto` or `device: cpu`, or check "
        "the driver with `nvidia-smi`"
    )
    assert refused(8, "run", "tiny.yaml", "--set", "device=cuda", "--out", "x") == [said]
    assert not Path("x").exists()
    assert refused(8, "sample", run, "--device", "cuda") == [said]


# Data


@needs_dsd
def test_a_recipe_without_its_data_says_what_is_missing_and_how_to_give_it() -> None:
    assert refused(5, "run", RECIPES / "dsd_in256.yaml") == [
        "data.root: no folder data/imagenet/train. It must hold one folder of images for each "
        "class (for ImageNet: train/n01440764/*.JPEG, ...). Give its path or URL with "
        "`--set data.root=/path/to/train`."
    ]
    assert nothing_made()


def test_fewer_images_than_a_batch_are_refused_before_anything_is_made() -> None:
    assert refused(5, "run", "tiny.yaml", "--set", "data.count=4") == [
        "data: 4 images are fewer than one batch of 8; lower `batch` or give more images"
    ]
    assert nothing_made()


@pytest.fixture
def folder() -> Path:
    """Two classes of ten small JPEGs, and a recipe of them."""
    g = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        Path("images", name).mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(0, 255, (20, 24, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(f"images/{name}/{i}.jpg")
    source = "data: {name: image_folder, root: images, size: 16, classes: 2, workers: 0}"
    lines = [source if line.startswith("data:") else line for line in TINY.splitlines()]
    Path("folder.yaml").write_text("\n".join(lines))
    return Path("images")


def damage(image: Path) -> None:
    data = image.read_bytes()
    image.write_bytes(data[: len(data) // 2])


def zipped(folder: Path) -> str:
    with zipfile.ZipFile("images.zip", "w") as file:
        for path in sorted(folder.rglob("*.jpg")):
            file.write(path)
    return "data={name: image_folder, root: 'zip://images::images.zip', size: 16, classes: 2}"


def test_a_folder_and_a_zip_of_the_same_images_train_alike(folder: Path) -> None:
    """In this process and in two workers; the losses are equal to the last digit."""
    given = ("--set", zipped(folder), "--set", "data.workers=2")
    assert e2ediff("run", "folder.yaml", "--out", "a").code == 0
    assert e2ediff("run", "folder.yaml", *given, "--out", "b").code == 0
    losses = [
        [entry["loss/denoising"] for entry in RunDirectory.open(path).read_metrics()
         if "loss/denoising" in entry]
        for path in ("a", "b")
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_another_number_of_class_folders_is_said_with_the_folders_found(folder: Path) -> None:
    assert refused(5, "run", "folder.yaml", "--set", "data.classes=3") == [
        "data.root: images holds 2 class folders (cat, dog), the recipe says data.classes: 3; "
        "give the folder that holds the classes, or `--set data.classes=2`"
    ]
    assert refused(5, "run", "folder.yaml", "--set", "data.root=images/cat") == [
        "data.root: images/cat holds no images in class folders "
        "(looked for <class>/<name> with .jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .gif, .tif, "
        ".tiff)"
    ]
    assert not Path("runs").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(folder: Path, workers: int) -> None:
    """Also when a worker process meets it in the middle of training."""
    shutil.copytree(folder, "good")
    damage(folder / "cat/3.jpg")
    given = ("data.held_out=good", "probe.calibration=1", "steps=10", f"data.workers={workers}")
    words = [word for one in given for word in ("--set", one)]
    assert refused(5, "run", "folder.yaml", *words, "--out", "x") == [
        "images/cat/3.jpg: damaged image (Truncated File Read); remove or replace it, or set "
        "`data.on_bad_image: skip`"
    ]
    assert status("x")["exit_code"] == 5
    assert status("x")["state"] == "failed"


def test_a_damaged_image_in_a_zip_is_named_by_its_address(folder: Path) -> None:
    damage(folder / "dog/7.jpg")
    given = ("run", "folder.yaml", "--set", zipped(folder), "--set")
    (line,) = refused(5, *given, "probe={images: 20, calibration: 20}")
    assert line == (
        "zip://images/dog/7.jpg::images.zip: damaged image (Truncated File Read); "
        "remove or replace it, or set `data.on_bad_image: skip`"
    )


# Run directories, resuming


def test_an_out_that_exists_is_left_alone(run: str) -> None:
    before = sorted(Path(run).rglob("*"))
    assert refused(6, "run", "tiny.yaml", "--out", run) == [
        "runs/tiny: exists and is not empty. "
        "Choose another --out, or continue the run in it: e2ediff run --resume runs/tiny"
    ]
    assert sorted(p for p in Path(run).rglob("*") if p.name != ".lock") == [
        p for p in before if p.name != ".lock"
    ]


def test_what_is_no_run_is_said() -> None:
    """To sample from, to reconstruct with, to resume by name and by --out."""
    Path("empty").mkdir()
    none = (
        ": not a run directory: no such directory, or it is empty. "
        "Give the directory that e2ediff printed when the run began."
    )
    assert refused(6, "sample", "nowhere") == [f"nowhere{none}"]
    assert refused(6, "reconstruct", "empty") == [f"empty{none}"]
    assert refused(6, "run", "tiny.yaml", "--resume", "--out", "nowhere") == [f"nowhere{none}"]
    assert refused(6, "run", "tiny.yaml", "--resume") == [
        "--resume: no run of 'tiny' to continue; start one without --resume, or give its "
        "directory: e2ediff run --resume DIR"
    ]
    Path("empty").rmdir()
    assert nothing_made()


CLOTHES = ("run", "tiny.yaml", "--set", "data={name: fashion_mnist, size: 32}", "--resume")


def test_a_resumed_recipe_that_computes_something_else_is_refused_key_by_key(run: str) -> None:
    changes = ("backbone.width=32", "objective=coupled", "optimizer.lr=0.1")
    words = [word for one in changes for word in ("--set", one)]
    assert refused(3, *CLOTHES, *words) == [
        "tiny.yaml (--resume): 3 problems",
        f"  backbone.width: was 16 in runs/tiny, is 32 here. {NEVER}",
        f'  objective.name: was "detached" in runs/tiny, is "coupled" here. {NEVER}',
        "  optimizer.lr: was 0.001 in runs/tiny, is 0.1 here. To go on with it, add "
        f"--allow-change optimizer.lr; or {AS_IT_WAS}",
    ]
    assert status(run)["state"] == "done"


def test_a_run_may_be_resumed_with_more_steps(run: str) -> None:
    done = e2ediff(*CLOTHES, "--set", "steps=6")
    assert (done.code, done.out) == (0, "runs/tiny\n")
    assert "resumed runs/tiny at step 4" in done.err
    assert status(run)["step"] == 6


# Checkpoints and weights


def flip_bit(name: str) -> None:
    file = Path(f"runs/tiny/checkpoints/{name}/target.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGED = (
    f"runs/tiny/checkpoints/{LAST}: the checkpoint is damaged: target.safetensors does not "
    "match its hash in MANIFEST.json."
)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_it(run: str) -> None:
    flip_bit(LAST)
    done = e2ediff("sample", run, "--count", 1, "--label", 0)
    assert (done.code, done.out) == (0, "runs/tiny/samples/seed-0\n")
    assert done.err.splitlines()[0] == f"skipped {DAMAGED}"
    assert Path("runs/tiny/samples/seed-0/images/000000.png").exists()


def test_a_damaged_checkpoint_asked_for_by_name_is_refused_with_one_that_serves(run: str) -> None:
    flip_bit(LAST)
    for command in ("sample", "reconstruct"):
        assert refused(6, command, run, "--checkpoint", LAST) == [
            f"{DAMAGED} {FIRST} is intact: use --checkpoint {FIRST}."
        ]
    assert not Path("runs/tiny/samples/seed-0").exists()


@needs("e2ediff-sampling")
def test_a_damaged_checkpoint_that_guides_is_refused_with_what_to_write_in_the_guidance(
    run: str,
) -> None:
    flip_bit(LAST)
    guided = f"guidance={{name: autoguidance, scale: 2, checkpoint: {LAST}}}"
    (line,) = refused(6, "sample", run, "--checkpoint", FIRST, "--set", guided)
    assert line == f"{DAMAGED} {FIRST} is intact: give the guidance `checkpoint: {FIRST}`."


def test_an_unknown_label_suggests_the_one_that_was_meant(run: str) -> None:
    (line,) = refused(5, "sample", run, "--label", "sneakr")
    assert line.startswith(
        "--label sneakr: no such class. Did you mean 'sneaker'? "
        "Expected an index from 0 to 9 or one of t-shirt, trouser,"
    )
    (line,) = refused(5, "sample", run, "--label", "10")
    assert line.startswith("--label 10: no such class. Expected an index from 0 to 9")


def test_unknown_weights_are_said_with_those_that_are_there(run: str) -> None:
    assert refused(6, "sample", run, "--weights", "slow") == [
        f"runs/tiny/checkpoints/{LAST}: no weights 'slow'; it has online, target"
    ]


# While training


def test_a_full_disk_ends_the_run_and_spares_what_was_saved(run: str) -> None:
    """EFBIG: files may not grow beyond what the weights need; then there is space again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        done = e2ediff(*CLOTHES, "--set", "steps=6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 8
    (line,) = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert line.startswith("error: runs/tiny/checkpoints/")
    assert "cannot write: File too large (needed: " in line
    assert line.endswith("or choose another --out; what was saved before is intact.")
    assert status(run)["exit_code"] == 8
    assert open_checkpoint(Store(run)).name == LAST
    assert not list(Path(run).rglob(".tmp-*"))
    assert e2ediff(*CLOTHES, "--set", "steps=6").code == 0


WILD = ("run", "tiny.yaml", "--set", "optimizer={name: adamw, lr: 1e6, clip: 0}", "--set")


DEAF = (
    "warning: none of the diagnostics judges its figures, so the alarm cannot detect a collapse "
    "before every loss is close to zero; add latent_health to diagnostics"
)
RARE = (
    "warning: alarm.window is 2, but the number of diagnoses in 4 steps is 1, so alarm.policy "
    "stop acts on a complete collapse only; lower cadence.diagnose or alarm.window"
)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (["diagnostics=[]"], DEAF),
        (["diagnostics=[reconstruction, rank_gap]"], DEAF),
        (["alarm.policy=stop", "cadence={diagnose: 9}"], RARE),
        (["diagnostics=[latent_health]"], ""),
        (["cadence={diagnose: 9}"], ""),
        (["alarm={policy: stop, window: 1}", "cadence={diagnose: 9}"], ""),
        ([], ""),
    ],
)
def test_an_alarm_that_could_not_sound_is_said_by_check(changes, warning) -> None:
    done = e2ediff("check", "tiny.yaml", *(w for c in changes for w in ("--set", c)))
    assert done.code == 0
    slow = "building the networks and counting "  # said where that takes a second
    said = [line for line in done.err.splitlines() if not line.startswith(slow)]
    assert said == [warning] * bool(warning)
    assert done.out.endswith("ok\n")


def test_an_alarm_that_could_not_sound_is_said_when_a_run_begins() -> None:
    done = e2ediff("run", "tiny.yaml", "--set", "diagnostics=[]", "--out", "run")
    assert (done.code, done.err.count(DEAF)) == (0, 1)
    assert "warning" not in e2ediff("run", "tiny.yaml", "--out", "other").err


def test_a_diverging_run_names_the_loss_and_the_last_good_checkpoint() -> None:
    """And `status.json` has it for whoever was not there."""
    cadence = "cadence={log: 1, diagnose: 1000, checkpoint: 2}"
    (line,) = refused(7, *WILD, cadence, "--set", "steps=100")
    _, step, _ = line.split(" ", 2)
    assert line.startswith(f"step {step} ")
    assert f"The last good checkpoint is {FIRST}." in line
    assert line.endswith(
        "Lower the learning rate (optimizer.lr), or give optimizer.clip a smaller norm."
    )
    found = status("runs/tiny")
    assert (found["state"], found["exit_code"]) == ("failed", 7)
    assert found["reason"] == f"DivergedError: {line}"
    assert found["last_checkpoint"] == FIRST
    assert open_checkpoint(Store("runs/tiny")).name == FIRST


@pytest.mark.parametrize(
    ("cadence", "policy", "what"),
    [
        ("log: 1, diagnose: 1000", "stop", "loss/reconstruction, loss/denoising are not finite."),
        ("log: 1000, diagnose: 1", "skip", "of the probe images: not finite."),
    ],
)
def test_divergence_is_told_by_whoever_looks_first(cadence: str, policy: str, what: str) -> None:
    """The losses of a bad step where the guards stop, or the probe where it is measured."""
    words = (f"cadence={{{cadence}}}", f"guards.non_finite={policy}", "steps=1000")
    (line,) = refused(7, *WILD[:-1], *(word for one in words for word in ("--set", one)))
    assert what in line
    assert "There is no checkpoint yet." in line


def test_a_tracker_that_cannot_write_is_switched_off_and_training_goes_on(run: str) -> None:
    """A directory lies where the CSV file should."""
    Path("runs/tiny/figures.csv").mkdir()
    done = e2ediff(*CLOTHES, "--set", "steps=6", "--set", "trackers=[csv]")
    assert done.code == 0
    (line,) = [text for text in done.err.splitlines() if text.startswith("tracker ")]
    assert line.startswith("tracker CSV is switched off: IsADirectoryError: ")
    assert line.endswith(". Figures are still written to metrics.jsonl.")
    directory = RunDirectory.open(run)
    assert [e["tracker"] for e in directory.read_events() if e["kind"] == "tracker_off"] == ["CSV"]
    assert directory.read_metrics()[-1]["step"] == 6


class _Fails(Tracker):
    def log(self, images, values):
        raise RuntimeError("the service is down")

    def picture(self, images, name, x):
        raise AssertionError("it was switched off before")

    def close(self):
        raise AssertionError("it was switched off before")


@attrs.frozen(kw_only=True)
class Fails(TrackerConfig):
    """Opens, and fails at the first figure."""

    def open(self, directory):
        return _Fails()


def trained_with(plugin: object, *overrides: str) -> Outcome:
    host = load(plugin, entry_points=False)
    return train(host, "tiny.yaml", overrides)


def test_a_plugin_s_tracker_that_fails_later_is_switched_off_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @hookimpl
    def register(add):
        add("trackers", "fails", Fails)

    plugin = SimpleNamespace(__name__="service", register=register)
    assert trained_with(plugin, "trackers=[fails]").exit_code == 0
    assert capsys.readouterr().err.count("tracker ") == 1
    assert RunDirectory.open("runs/tiny").read_metrics()[-1]["step"] == 4


def test_observers_that_raise_do_not_stop_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of them, at every call; the hook and the error are named."""
    names = ("run_started", "step_ended", "losses_logged", "diagnosed", "checkpoint_saved",
             "sampled", "run_ended")  # fmt: skip

    def raising(name):
        def observer(run):
            raise RuntimeError(f"no {name}")

        return hookimpl(observer)

    plugin = SimpleNamespace(__name__="rude", **{name: raising(name) for name in names})
    outcome = trained_with(plugin)
    assert (outcome.exit_code, status(outcome.path)["state"]) == (0, "done")
    said = capsys.readouterr().err
    for name in names:
        assert f"plugin 'rude': {name} failed: RuntimeError: no {name}\n" in said


# What comes out


def test_results_go_to_stdout_and_all_else_to_stderr(run: str) -> None:
    """So that `e2ediff sample "$(e2ediff run recipe.yaml)"` works."""
    done: Done = e2ediff("run", "tiny.yaml", "--out", "again", "--set", "steps=1")
    assert (done.code, done.out) == (0, "again\n")
    assert "next: e2ediff sample again\n" in done.err
    done = e2ediff("sample", run, "--label", "bag", "--label", "none", "--count", 2, "--out", "s")
    assert done.out == "s\n"
    listed = json.loads(Path("s/samples.json").read_text())
    assert [entry["label"] for entry in listed] == [8, 10, 8, 10]
    for entry in listed:
        with Image.open(f"s/{entry['file']}") as image:
            assert image.size == (32, 32)
    done = e2ediff("reconstruct", run, "--count", 3)
    psnr, path = done.out.splitlines()
    assert psnr.startswith("psnr ")
    assert psnr.endswith(" dB over 3 images")
    assert Path(path).exists()


ENDING = """
import atexit, sys, threading
from e2ediff.__main__ import program

def later():
    threading.main_thread().join()  # however long the command takes
    print("waited for")

class Taken:
    def __del__(self):
        print("taken down")

threading.Thread(target=threading.Event().wait, daemon=True).start()  # never ends
if {thread}:
    threading.Thread(target=later).start()
atexit.register(print, "registered")
taken = Taken()
sys.argv = ["e2ediff", *{words}]
program()
"""


@pytest.mark.parametrize(
    ("words", "thread", "code", "last"),
    [
        (["--version"], False, 0, ["registered"]),
        (["check", "nowhere.yaml"], False, 3, ["registered"]),
        (["--version"], True, 0, ["waited for", "registered", "taken down"]),
    ],
)
def test_a_command_ends_without_taking_the_interpreter_down(
    words: list[str], thread: bool, code: int, last: list[str]
) -> None:
    """What is registered for the end is done, and threads are waited for."""
    text = ENDING.format(thread=thread, words=words)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-len(last) :] == last


CALLED = """
import sys
from e2ediff.__main__ import main

sys.argv = ["e2ediff", "--version"]
try:
    main()
except SystemExit as ended:
    print("ended with", ended.code)
"""


def test_a_script_that_calls_the_command_line_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", CALLED], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "ended with 0"


def test_a_command_can_be_profiled(tmp_path: Path) -> None:
    file = tmp_path / "profile"
    words = [sys.executable, "-m", "cProfile", "-o", file, "-m", "e2ediff", "--version"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size > 1000


def test_output_that_cannot_be_written_at_the_end_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "e2ediff", "--version"], stdout=full)
    assert done.returncode != 0
