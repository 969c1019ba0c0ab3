"""The objective of the page on critics trains, and passes every check."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import e2ediff, needs, needs_dsd

from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "adversarial.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (module,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "adversarial.py").write_text(module)
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@needs_dsd
def test_the_command_of_the_page_trains_two_phases_with_an_optimizer_each(folder) -> None:
    (command,) = re.findall(r"^\$ e2ediff (run .*)$", PAGE, re.MULTILINE)
    words = re.findall(r"'[^']*'|\S+", command)
    done = e2ediff(*(word.strip("'") for word in words), "--threads", 1)
    assert done.code == 0, done.err
    lines = [
        json.loads(line)
        for line in (folder / "runs/adversarial/metrics.jsonl").read_text().splitlines()
    ]
    (last,) = [line for line in lines if line["step"] == 30 and "loss/critic" in line]
    assert {"loss/critic", "loss/adversarial", "loss/reconstruction"} <= {*last}
    saved = open_checkpoint(Store(folder / "runs/adversarial"))
    assert {"optimizer-critic", "optimizer-generator", "heads"} <= {*saved.files}
    assert all(name.startswith("heads.") for name in saved.tensors("optimizer-critic"))


@needs_dsd
@needs("e2ediff-rivals")
def test_the_critic_of_the_page_s_block_fits_its_recipe(folder) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipe, given = ((folder / "quickstart.yaml").read_text(), yaml.safe_load(block))
    (folder / "critic.yaml").write_text(yaml.safe_dump({**yaml.safe_load(recipe), **given}))
    done = e2ediff("check", "critic.yaml")
    assert done.code == 0, done.err
    assert "critic" in done.out


@pytest.mark.usefixtures("forks")
def test_it_passes_every_check(folder) -> None:
    done = e2ediff("plugins", "check", "adversarial.py")
    assert done.code == 0, done.out + done.err
