"""The tutorials on plugins, command by command, in a fresh environment with a wheel of e2ediff."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorial"
FIRST, SECOND = TUTORIALS / "write-an-objective.md", TUTORIALS / "write-a-plugin.md"
PIP = ["-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]

# Runs modules of that environment as forks of a process that has imported torch.
SERVER = """
import json, subprocess, sys
sys.path.append(sys.argv[1])
import forked, torch._inductor.pattern_matcher, torch.distributed
subprocess.Popen = forked.Forked
forked.MODULES += ("pytest",)
print(forked.e2ediff.__file__, flush=True)
for line in sys.stdin:
    words = [sys.executable, "-P", "-m", *json.loads(line)]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
"""


def commands(page: Path) -> list[str]:
    """Every line that the page has after a prompt."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with wheels of e2ediff, its DSD plugin and its kit for authors.

    What they need lies in this one's.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=find_spec("pip") is None)
    python, pip = folder / "bin" / "python", folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{python}" -m pip "$@"\n')
    pip.chmod(0o755)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    copies = []
    plugins = [ROOT / "plugins" / name for name in ("e2ediff-dsd", "e2ediff-testing")]
    for source in (ROOT, *plugins):
        copy = folder / "source" / source.name
        keep = shutil.ignore_patterns(".*", "build", "dist", "runs", "plugins", "tests")
        shutil.copytree(source, copy, ignore=keep)
        copies.append(copy)
    wheels = folder / "wheels"
    words = [python, *PIP, "wheel", *OFFLINE, "--wheel-dir", wheels, *copies]
    for command in (words, [python, *PIP, "install", *OFFLINE, "--force-reinstall", wheels]):
        if command is not words:
            command[-1:] = sorted(wheels.glob("*.whl"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_tutorials_works_as_printed(
    environment: Path, tmp_path: Path
) -> None:
    """In this order, in an empty folder with the quickstart's recipe.

    Those of `e2ediff` and pytest as forks of a process of the environment, all others in a shell.
    """
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", tmp_path)
    (module,) = re.findall(r"```python\n(.*?)```", FIRST.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_objective.py").write_text(module)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "E2EDIFF_BLOCK")}
    env |= {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        # What pip would fetch to build a wheel is here already.
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    words = [environment / "bin" / "python", "-P", "-c", SERVER, ROOT / "tests" / "support"]
    server = subprocess.Popen(
        words, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    said = {}
    with server:
        own = sysconfig.get_path("purelib", vars={"base": str(environment)})
        assert server.stdout.readline().strip() == str(Path(own, "e2ediff", "__init__.py"))
        for command in [*commands(FIRST), *commands(SECOND)]:
            words = shlex.split(command)
            words = words[2:] if words[:2] == ["python", "-m"] else words
            if words[0] in ("e2ediff", "pytest") and words[1:3] != ["plugins", "new"]:
                server.stdin.write(json.dumps(words) + "\n")
                server.stdin.flush()
                code, out, err = json.loads(server.stdout.readline())
            else:
                done = subprocess.run(
                    command, shell=True, env=env, cwd=tmp_path, capture_output=True, text=True,
                    timeout=600,
                )  # fmt: skip
                code, out, err = done.returncode, done.stdout, done.stderr
            assert code == 0, f"{command}\n{out}{err}"
            said[command] = out
    assert re.search(
        r"^even_floor +ok +e2ediff-even-floor 0.1.0 +objectives: even_floor$",
        said["e2ediff plugins list"],
        re.MULTILINE,
    )
    assert said["e2ediff plugins check my_objective.py"].endswith("8 checks passed\n")
    assert (tmp_path / "runs/mine/plugins/my_objective.py").read_text() == module
    assert said["e2ediff plugins check even_floor"].endswith("8 checks passed\n")
    assert (tmp_path / "runs/even/samples/seed-0/grid.png").exists()
    assert list((tmp_path / "dist").glob("e2ediff_even_floor-0.1.0-*.whl"))


def test_the_tutorial_has_the_commands_that_its_test_looks_at() -> None:
    words = [command.split()[:3] for command in [*commands(FIRST), *commands(SECOND)]]
    for expected in (["e2ediff", "plugins", "new"], ["e2ediff", "plugins", "check"],
                     ["e2ediff", "run", "quickstart.yaml"], ["e2ediff", "sample", "runs/even"],
                     ["pip", "install", "./e2ediff-even-floor"],
                     ["e2ediff", "sample", "runs/mine"]):  # fmt: skip
        assert expected in words


def test_the_first_file_has_fewer_than_forty_lines() -> None:
    (module,) = re.findall(r"```python\n(.*?)```", FIRST.read_text(encoding="utf-8"), re.DOTALL)
    assert module.count("\n") < 40
