"""`benchmarks/parity.py` on a checkout that looks like SiT, and its words where it cannot run."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("forks")

# SiT's network as the formulas of `tests/support/published.py`, with the released code's names.
MODELS = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
import torch
from published import random_state, sit, sit_shapes
from torch import nn

class SiT(nn.Module):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 num_classes):
        super().__init__()
        self.sizes = dict(heads=num_heads, patch=patch_size, depth=depth)
        with torch.device("cpu"):
            state = random_state(
                sit_shapes(hidden_size, depth, patch_size, in_channels, num_classes))
        for name, w in state.items():
            *above, last = name.split(".")
            module = self
            for part in above:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(w))

    def forward(self, x, t, y):
        return sit(dict(self.named_parameters()), x, t, y, **self.sizes)

SiT_models = {{"SiT-B/2": lambda input_size, num_classes: SiT(input_size, 2, 4, 24, 1, 2, 9)}}
"""
KNOWN = (
    "is no checkout of LDMisAE, UNITE, MeanFlow, py-meanflow, REPA-E, JiT, SiT or "
    "taming-transformers."
)
TRANSPORT = """
import torch

class Transport:
    def training_losses(self, net, x1, options):
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        at = t[:, None, None, None]
        v = net((1 - at) * x0 + at * x1, t, **options)
        return {"loss": (v - (x1 - x0)).square().mean(dim=(1, 2, 3))}

def create_transport():
    return Transport()
"""


@pytest.fixture
def sit(tmp_path: Path) -> Path:
    root = tmp_path / "sit"
    (root / "transport").mkdir(parents=True)
    (root / "models.py").write_text(MODELS)
    (root / "transport" / "__init__.py").write_text(TRANSPORT)
    return root


def parity(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "parity.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_project_with_the_same_formulas_is_within_the_bar(sit) -> None:
    done = parity("--peer", sit, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["benchmark"], found["peer"], found["commit"]) == ("parity", "SiT", "")
    whats = [one["what"] for one in found["checks"]]
    # two layers of time, six a block, and what is before and after them: weights and biases
    tensors = 2 * (2 + 5 * 6 + 1 + 2) + 1
    assert whats == ["answer", "loss of velocities", f"gradients of {tensors} tensors"]
    assert all(0 <= one["difference"] <= found["bar"] == 1e-5 for one in found["checks"])
    # Where all is equal nothing was compared; other sums in another order round otherwise.
    assert found["checks"][0]["difference"] > 0


def test_another_formula_ends_it_with_one_and_is_named(sit) -> None:
    text = MODELS.replace("t, y, **self", "1.001 * t, y, **self")
    assert text != MODELS
    (sit / "models.py").write_text(text)
    done = parity("--peer", sit)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("above 1e-05: answer; loss of velocities; gradients of ")
    row = next(line for line in done.stdout.splitlines() if line.startswith("| answer |"))
    assert row.endswith("| NO |")


def test_it_says_in_words_which_checkout_or_package_is_missing(tmp_path, sit) -> None:
    for place, words in (
        (tmp_path / "nowhere", "there is no such folder."),
        (
            tmp_path,
            KNOWN,
        ),
    ):
        done = parity("--peer", place)
        assert done.returncode == 2
        assert f"--peer {place}: {words}" in done.stderr
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "lightningdit.py").touch()
    assert KNOWN in parity("--peer", tmp_path).stderr
    (sit / "models.py").write_text("import a_package_of_nobody\n")
    done = parity("--peer", sit)
    assert done.returncode == 2
    assert f"{sit} needs a_package_of_nobody: pip install a_package_of_nobody" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def module(monkeypatch) -> Iterator[ModuleType]:
    names = ("parity", "peer_weights", "peers")  # other folders have such names
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    yield importlib.import_module("parity")
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def test_it_says_how_to_install_our_side_of_a_project(module, monkeypatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # nothing is installed
    with pytest.raises(click.UsageError, match=r"pip install .* plugins/e2ediff-jit$"):
        module.has_plugin("JiT")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_not_within_the_bar(module, bad) -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    wanted = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    assert module.gradients_apart(net, wanted).holds
    net[0].weight.grad[0, 1] = bad
    assert not module.gradients_apart(net, wanted).holds
