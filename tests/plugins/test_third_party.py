"""A stranger's plugin: one small file, its own distribution, installed beside e2ediff and used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import OURS

from e2ediff.store.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
VARFLOOR = ROOT / "plugins" / "e2ediff-varfloor"
OTHERS = f"{OURS},brokenplug"  # with the broken one of these tests


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed varfloor, and where a broken plugin lies too."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--disable-pip-version-check", "--no-cache-dir"]
    done = subprocess.run(
        [*pip, "--target", folder, VARFLOOR], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (folder / "brokenplug.py").write_text("import not_a_module\n")
    info = folder / "brokenplug-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenplug\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[e2ediff]\nbrokenplug = brokenplug\n")
    return folder


@pytest.fixture
def call(site: Path, tmp_path: Path, tiny_recipe: str):
    """The command line in a process of its own, in an empty directory, with these plugins."""

    def e2ediff(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "e2ediff", *words],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return e2ediff


def test_the_whole_plugin_is_one_file_of_under_50_lines() -> None:
    """Found by its entry point, and depending on nothing but e2ediff."""
    (module,) = [p for p in VARFLOOR.rglob("*.py") if "build" not in p.parts]
    assert module.name == "e2ediff_varfloor.py"
    assert len(module.read_text().splitlines()) < 50
    project = tomllib.loads((VARFLOOR / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"e2ediff": {"varfloor": "e2ediff_varfloor"}}
    assert [d.partition(">")[0] for d in project["dependencies"]] == ["e2ediff"]


@pytest.mark.usefixtures("forks")
def test_plugins_lists_a_stranger_with_its_version_and_parts_and_a_broken_one_once(call) -> None:
    done = call("plugins")
    assert done.returncode == 0, done.stderr
    lines = [re.split("  +", line) for line in done.stdout.splitlines()]
    assert ["varfloor", "ok", "e2ediff-varfloor 0.1.0", "objectives: variance_floor"] in lines
    assert [line for line in lines if "brokenplug" in line] == [
        ["brokenplug", "broken", "brokenplug 1.2",
         "ModuleNotFoundError: No module named 'not_a_module'"]
    ]  # fmt: skip
    assert "brokenplug" not in done.stderr


def test_the_help_shows_each_plugin_with_the_line_of_its_metadata(call):
    done = call("--help")
    assert re.search(r"\n  varfloor +A variance floor for latents", done.stdout)


@pytest.mark.usefixtures("forks")
def test_parts_shows_a_stranger_s_options_as_ours(call) -> None:
    done = call("parts", "objectives")
    assert done.returncode == 0, done.stderr
    assert "\n  variance_floor  [varfloor]  Reconstruct, denoise a stopped latent" in done.stdout
    assert "\n      floor: float = 1.0\n      floor_weight: float = 0.1\n" in done.stdout
    assert "brokenplug" not in done.stdout + done.stderr


@pytest.mark.usefixtures("forks")
def test_a_stranger_s_objective_trains_and_samples_with_a_broken_plugin_beside_it(
    call, tmp_path: Path
) -> None:
    done = call(
        "run", "tiny.yaml", "--set", "objective={name: variance_floor, floor: 0.5}",
        "--set", "steps=5", "--set", 'requires=["e2ediff-varfloor>=0.1"]', "--out", "run",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr
    assert "brokenplug" not in done.stderr
    run = RunDirectory.open(str(tmp_path / "run"))
    assert run.environment()["plugins"]["e2ediff-varfloor"] == "0.1.0"
    assert run.read_metrics()[-1]["step"] == 5
    assert any("loss/variance" in entry for entry in run.read_metrics())
    done = call("sample", "run", "--count", "1", "--label", "0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/samples/seed-0/grid.png").exists()
    # Without the plugin the run says what it needs.
    plain = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = call("sample", "run", **plain, E2EDIFF_BLOCK="varfloor")
    assert done.returncode == 3
    if find_spec("e2ediff_varfloor"):  # else it is not there to be blocked
        assert "plugin 'varfloor' was not loaded (blocked by E2EDIFF_BLOCK)" in done.stderr
    else:
        assert "Run: pip install 'e2ediff-varfloor>=0.1'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("forks")
def test_an_unknown_name_tells_of_the_plugin_that_was_not_loaded(call, tmp_path: Path) -> None:
    """Perhaps it would have brought the part."""
    done = call("run", "tiny.yaml", "--set", "objective=brokn")
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if "brokn" in line]
    assert line.startswith("  --set 1: objective: unknown objective 'brokn'. ")
    assert line.endswith(
        "Plugin 'brokenplug' was not loaded (ModuleNotFoundError: No module named 'not_a_module')."
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("forks")
def test_core_alone_trains_without_any_plugin(call) -> None:
    """The shipped quickstart, less what it requires, with the plugins blocked."""
    done = call(
        "run", str(ROOT / "recipes" / "quickstart.yaml"), "--set", "objective=detached",
        "--set", "requires=[]", "--set", "steps=2", "--set", "probe={images: 16, calibration: 16}",
        "--set", "preview.rows=1", "--set", "sampler.steps=2",
        E2EDIFF_BLOCK=OTHERS,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "runs/quickstart\n"), done.stderr
    listed = call("plugins", E2EDIFF_BLOCK=OTHERS).stdout.splitlines()
    state = dict(line.split()[:2] for line in listed)
    assert state.pop("e2ediff") == "ok"
    assert set(state.values()) == {"blocked"}
    assert "varfloor" in state
