"""`sample --compile` makes the same images but for rounding, and its set says that it did."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from command_line import e2ediff
from tiny_recipe import tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor

import e2ediff as package
from e2ediff.errors import ResourceError

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny(guidance="{name: classifier_free, scale: 2.0}"))
    assert e2ediff("run", "tiny.yaml", "--out", "run").code == 0
    torch._dynamo.reset()
    yield tmp_path
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs, which run by torch's own kernels; the compiler is a program that is there."""
    found = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    with inductor.patch({"cpp.cxx": ("true",)}):
        yield found


def test_compiled_images_are_those_of_the_plain_network_but_for_rounding(run, graphs) -> None:
    plain = package.load("run", rows=4).sample([0, 1, 2])
    assert graphs.frame_count == 0
    made = package.load("run", rows=4, compile=True).sample([0, 1, 2])
    assert graphs.frame_count > 0
    torch.testing.assert_close(made, plain, rtol=0, atol=1e-5)


def test_a_set_says_that_it_was_compiled_and_is_not_continued_otherwise(run, graphs) -> None:
    words = ("sample", "run", "--count", "1", "--out", "set")
    assert e2ediff(*words, "--compile").code == 0
    assert json.loads((run / "set/set.json").read_text())["compile"] is True
    done = e2ediff(*words)
    assert done.code == 6
    assert "compile: true there, null here" in done.err


def test_without_a_compiler_it_ends_with_what_to_do(run) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        done = e2ediff("sample", "run", "--count", "1", "--compile")
    assert done.code == ResourceError.exit_code
    assert "cannot compile: no C++ compiler is found" in done.err
    assert "Traceback" not in done.err
