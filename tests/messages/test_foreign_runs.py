"""A run that was not made here opens no network of its maker's choice unless the user agrees."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import fsspec
import pytest
from command_line import e2ediff, needs, trained
from fsspec.implementations.memory import MemoryFileSystem
from tiny_recipe import tiny

import e2ediff as package
from e2ediff.errors import RunDirectoryError
from e2ediff.store.provenance import key_file, seal
from e2ediff.store.run_directory import RunDirectory

pytestmark = needs("e2ediff-sampling")
WEAK = "hf://user/weak"  # an address that files may have
GUIDED = f"{{name: autoguidance, scale: 2, run: '{WEAK}'}}"
VGG = {"name": "torchvision", "weights": "hf://user/vgg.pt"}
SCORES = f"scores={json.dumps({'every': 1000, 'features': VGG, 'metrics': ['kid']})}"
NOT_OURS = "was not made here by you, and names other files to open: "


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """What was looked up at addresses of `hf`."""
    opened: list[str] = []

    class Watched(MemoryFileSystem):
        protocol = "hf"
        cachable = False

        def __init__(self, *args: object, **kwargs: object) -> None:
            opened.append("made")
            super().__init__(*args, **kwargs)

    fsspec.register_implementation("hf", Watched, clobber=True)
    yield opened
    import_module("fsspec.registry")._registry.pop("hf")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with such guidance, which training does not open."""
    return trained(tmp_path_factory.mktemp("guided"), tiny(steps="2", guidance=GUIDED))


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, "run")
    return "run"


@pytest.fixture
def foreign(run: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on another machine, where there is a key, too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("state").absolute()))
    assert seal(b"any")
    return run


def test_a_run_that_was_made_here_opens_what_its_recipe_names(run: str, opened: list) -> None:
    done = e2ediff("sample", run, "--count", 1)
    assert f"{WEAK}: not a run directory" in done.err
    assert opened


@pytest.mark.parametrize(
    "words",
    [
        ("sample",),
        ("interpolate", "--seeds", "1", "2"),
        ("reconstruct", "--count", "2"),
        ("eval", "--features", "random_projection", "--count", "8"),
        pytest.param(("sweep", "--features", "random_projection"), marks=needs("e2ediff-sweep")),
        ("run", "--resume"),
        ("run", "--restart"),
    ],
)
def test_a_foreign_run_is_refused_before_anything_is_opened(
    foreign: str, opened: list, words: tuple[str, ...]
) -> None:
    done = e2ediff(*words, foreign)
    assert done.code == 6, done
    assert f"error: run: {NOT_OURS}guidance" in done.err
    assert f"'{WEAK}'" in done.err
    assert "--trust opens it" in done.err
    assert opened == []


def test_so_is_one_that_is_loaded_in_python(foreign: str, opened: list) -> None:
    with pytest.raises(RunDirectoryError, match="was not made here"):
        package.load(foreign)
    assert opened == []
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        package.load(foreign, trust=True)
    assert opened


def test_the_flag_opens_it(foreign: str, opened: list) -> None:
    assert f"{WEAK}: not a run directory" in e2ediff("sample", foreign, "--trust").err
    assert opened
    done = e2ediff("run", "--resume", foreign, "--trust", "--set", "steps=3")
    assert done.code == 0, done.err


def test_an_address_that_was_typed_is_opened_and_no_other(foreign: str, opened: list) -> None:
    typed = f"guidance={{name: autoguidance, scale: 2, run: '{WEAK}2'}}"
    assert f"{WEAK}2: not a run directory" in e2ediff("sample", foreign, "--set", typed).err
    assert opened
    opened.clear()
    for other in ("sampler.steps=3", "guidance.scale=3", f"guidance.checkpoint={WEAK}x"):
        assert NOT_OURS in e2ediff("sample", foreign, "--set", other).err
    assert e2ediff("sample", foreign, "--count", 1, "--set", "guidance=null").code == 0
    assert opened == []


def test_an_earlier_checkpoint_of_the_run_itself_needs_no_flag(foreign: str) -> None:
    own = "guidance={name: autoguidance, scale: 2}"
    assert e2ediff("sample", foreign, "--count", 1, "--set", own).code == 0


# The seal


def test_a_seal_of_another_recipe_of_another_key_or_none_does_not_serve(run: str) -> None:
    assert RunDirectory.open(run).is_made_here()
    seal, resolved = Path(run, "seal"), Path(run, "resolved.yaml")
    good, text = seal.read_bytes(), resolved.read_text()
    resolved.write_text(text.replace("hf://user/weak", "hf://user/evil"))
    assert not RunDirectory.open(run).is_made_here()
    resolved.write_text(text)
    assert RunDirectory.open(run).is_made_here()
    for bad in (b"", b"\n", b"0" * 64, good[:-2], "é".encode(), good * 100, b"\xff" * 65):
        seal.write_bytes(bad)
        assert not RunDirectory.open(run).is_made_here()
    seal.unlink()
    assert not RunDirectory.open(run).is_made_here()
    assert e2ediff("sample", run).code == 6


def test_the_key_is_the_users_alone(foreign: str) -> None:
    directory, key = RunDirectory.open(foreign), Path(key_file())
    directory.replace_resolved(directory.resolved())
    assert directory.is_made_here()
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    assert [p.name for p in key.parent.iterdir()] == ["key"]
    key.chmod(0o644)  # others may have read it
    assert not directory.is_made_here()
    key.chmod(0o600)
    assert directory.is_made_here()
    key.rename(key.with_name("elsewhere"))
    assert not directory.is_made_here()
    key.symlink_to(key.with_name("elsewhere"))
    assert not directory.is_made_here()
    key.unlink()
    os.mkfifo(key, 0o600)
    assert not directory.is_made_here()


def test_without_a_key_nothing_fails_and_a_run_counts_as_foreign(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert NOT_OURS in e2ediff("sample", run).err
    Path(run, "seal").unlink()
    directory = RunDirectory.open(run)
    directory.replace_resolved(directory.resolved())
    assert not Path(run, "seal").exists()
    assert not directory.is_made_here()


def test_a_run_that_goes_on_with_a_change_stays_ones_own(run: str) -> None:
    assert e2ediff("run", "--resume", run, "--set", "steps=3").code == 0
    assert "steps: 3" in Path(run, "resolved.yaml").read_text()
    assert RunDirectory.open(run).is_made_here()
    assert e2ediff("run", "--restart", run).code == 0
    assert RunDirectory.open(run).is_made_here()
    assert RunDirectory.open(f"{run}/attempts/1").is_made_here()


def test_a_kill_between_seal_and_recipe_leaves_both_recipes_sealed(run: str) -> None:
    directory = RunDirectory.open(run)
    former = directory.resolved()
    directory.replace_resolved(former.replace("steps: 2", "steps: 3"))
    assert directory.is_made_here()
    Path(run, "resolved.yaml").write_text(former)
    assert directory.is_made_here()


# What else a recipe names


def test_weights_of_feature_networks_count_when_training_goes_on(
    foreign: str, opened: list
) -> None:
    set_guidance = ("--set", "guidance=null")
    path = Path(foreign, "resolved.yaml")
    text = path.read_text()
    assert "scores: null" in text
    path.write_text(text.replace("scores: null", SCORES.replace("=", ": ")))
    done = e2ediff("run", "--resume", foreign, *set_guidance)
    assert f"{NOT_OURS}scores.features.weights ('hf://user/vgg.pt')" in done.err
    assert opened == []
    assert e2ediff("sample", foreign, "--count", 1, *set_guidance).code == 0
    assert opened == []
    done = e2ediff("run", "--resume", foreign, *set_guidance, "--trust")
    assert NOT_OURS not in done.err


def test_sampling_opens_no_weights_of_a_loss(foreign: str, opened: list) -> None:
    """The frozen networks of an objective serve training alone."""
    path = Path(foreign, "resolved.yaml")
    text = path.read_text()
    assert "perceptual: null" in text
    path.write_text(text.replace("perceptual: null", f"perceptual: {json.dumps(VGG)}"))
    done = e2ediff("sample", foreign, "--count", 1, "--set", "guidance=null")
    assert (done.code, opened) == (0, []), done.err
