"""`compile: auto` compiles where the steps that are left would gain by it, and never ends a run.

Graphs go to a backend that runs torch's own kernels, so that no C++ compiler is needed. Most are
run as they were traced; where a whole step is compared with blocks, or activations are computed
again, forward and backward pass are graphs of their own ("aot_eager"), as they are for a compiler,
which takes three times as long. The network waits wherever it is not compiled, so that compiling
it always pays.
"""

from __future__ import annotations

import io
import json
import signal
import time
from functools import partial
from types import SimpleNamespace

import attrs
import pytest
import torch
from processes import together
from tiny_recipe import tiny
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor

from e2ediff import hookimpl
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.parts.backbones import ViT, ViTConfig
from e2ediff.parts.objectives import Detached
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own
LONG = "steps=1000000"
SECONDS = 0.04  # that a block waits where it is not compiled


def wait(module, args):
    if not torch.compiler.is_compiling():
        time.sleep(SECONDS)


class Net(ViT):
    def __init__(self, config, image):
        super().__init__(config, image)
        for block in self.blocks():
            block.register_forward_pre_hook(wait)


@attrs.frozen(kw_only=True)
class Waiting(ViTConfig):
    """A ViT that takes long unless it is compiled."""

    def build(self, image):
        return Net(self, image)


@attrs.frozen(kw_only=True)
class Own(Detached):
    """Draws from the generator itself, so that its step is not one graph."""

    def terms(self, nets, batch, draw, phase):
        torch.rand(2, generator=draw.generator)
        return super().terms(nets, batch, draw, phase)


OWN = "objective=own"
BACKBONE = "{name: waiting, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4}"


class Backend:
    """Compiles as the one it is made from; fails at its graph number `fails`, slow if `slow`."""

    def __init__(self, fails: int = -1, *, slow: bool = False, of: str = "eager") -> None:
        self.fails, self.slow, self.of, self.graphs = fails, slow, of, 0

    def __call__(self, graph, inputs):
        if self.graphs == self.fails:
            raise NotImplementedError("this compiler compiles no more")
        self.graphs += 1
        compiled = lookup_backend(self.of)(graph, inputs)

        def run(*args):
            time.sleep(4 * SECONDS)
            return compiled(*args)

        return torch.compiler.disable(run) if self.slow else compiled


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Put a backend in the place of torch's own; a program that does nothing is the compiler."""

    def use(backend: Backend) -> Backend:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
        return backend

    original = torch.compile
    use(Backend())
    with inductor.patch({"cpp.cxx": ("true",)}):
        yield use
    torch._dynamo.reset()


@pytest.fixture
def recipe(tmp_path) -> str:
    text = tiny(backbone=BACKBONE, compile="auto", cadence="{log: 1, checkpoint: 2}")
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def run(recipe, out, *changes, stop_at=4, resume=False, world=None):
    """Train up to step `stop_at` of many; what the last checkpoint holds."""

    @hookimpl
    def register(add):
        add("backbones", "waiting", Waiting)
        add("objectives", "own", Own)

    @hookimpl
    def step_ended(run, step):
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    host = load(SimpleNamespace(__name__="ours", register=register, step_ended=step_ended))
    said = io.StringIO()
    train(host, recipe, changes, str(out), resume=resume, progress=Progress(said), world=world)
    return opened(out)


def opened(out):
    found = open_checkpoint(Store(str(out)))
    tensors = {f"{file}:{k}": t for file in found.files for k, t in found.tensors(file).items()}
    return found, tensors


def events(out, kind="compile"):
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_long_run_compiles_the_whole_step(compiler, recipe, tmp_path) -> None:
    """Once, and computes as the run whose recipe says so."""
    backend = compiler(Backend(of="aot_eager"))
    found, ours = run(recipe, tmp_path / "auto", LONG, stop_at=2)
    assert backend.graphs == 1
    (chosen,) = events(tmp_path / "auto")
    assert chosen["choice"] == "step"
    assert found.kernels["compile"] == chosen["text"].removeprefix("compile: ")
    (made,) = events(tmp_path / "auto", "compiled")
    assert (made["step"], made["graphs"], made["breaks"]) == (1, 1, 0)
    assert_same(ours, run(recipe, tmp_path / "named", LONG, "compile=step", stop_at=2)[1])


def test_a_resumed_run_keeps_the_choice_and_asks_no_clock(compiler, recipe, tmp_path) -> None:
    """Of blocks, where the whole step cannot be one graph; to the bit."""
    more = ["checkpoint_activations=true"]
    compiler(Backend(of="aot_eager"))
    _, straight = run(recipe, tmp_path / "straight", LONG, OWN, *more)
    (chosen,) = events(tmp_path / "straight")
    assert chosen["choice"] == "blocks"
    assert "ms in place of" in chosen["text"]
    assert "not step: compile: step needs an objective that draws by" in chosen["text"]
    run(recipe, tmp_path / "cut", LONG, OWN, *more, stop_at=2)
    compiler(Backend(slow=True, of="aot_eager"))  # which timing would refuse
    _, again = run(recipe, tmp_path / "cut", LONG, OWN, *more, resume=True)
    assert_same(straight, again)
    assert len(events(tmp_path / "cut")) == 1


def test_a_short_run_compiles_nothing_and_asks_for_no_compiler(compiler, recipe, tmp_path) -> None:
    backend = compiler(Backend())
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        found, tensors = run(recipe, tmp_path / "auto", "steps=4")
    assert backend.graphs == 0
    assert found.kernels["compile"].startswith("off (the 4 steps left take ")
    assert_same(tensors, run(recipe, tmp_path / "off", "steps=4", "compile=off")[1])
    assert events(tmp_path / "auto", "compiled") == []


@pytest.mark.parametrize(
    ("fails", "slow", "changes", "said"),
    [
        (0, False, (), "this compiler compiles no more"),
        (-1, True, (), "ms in place of"),
        (-1, False, ("deterministic=true",), "deterministic: true leaves nothing to timing"),
    ],
    ids=["fails", "slower", "deterministic"],
)
def test_where_compiling_does_not_help_a_run_goes_on_with_the_numbers_of_off(
    fails, slow, changes, said, compiler, recipe, tmp_path
) -> None:
    changes = [LONG, OWN, "backbone.latent_norm=batch", *changes]
    compiler(Backend(fails, slow=slow))
    run(recipe, tmp_path / "auto", *changes)
    (event,) = events(tmp_path / "auto")
    assert event["choice"] == "off"
    assert said in event["text"]
    run(recipe, tmp_path / "off", *changes, "compile=off")
    assert_same(opened(tmp_path / "auto")[1], opened(tmp_path / "off")[1])


def test_a_machine_without_a_compiler_is_said_so(recipe, tmp_path) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        run(recipe, tmp_path / "auto", LONG)
    (event,) = events(tmp_path / "auto")
    assert event["text"].startswith("compile: off (no C++ compiler is found; install one")


def test_a_run_that_moved_to_where_compiling_fails_goes_on_uncompiled(
    compiler, recipe, tmp_path
) -> None:
    run(recipe, tmp_path / "run", LONG, OWN, stop_at=2)
    compiler(Backend(fails=0))
    found, _ = run(recipe, tmp_path / "run", LONG, OWN, resume=True)
    assert found.step == 4
    assert [event["choice"] for event in events(tmp_path / "run")] == ["blocks", "off"]


def test_a_compiler_that_fails_in_a_later_phase_ends_no_run(compiler, recipe, tmp_path) -> None:
    """The second stage is another graph; what it computes then is what it does uncompiled."""
    changes = ["objective=two_stage", "backbone.trunks=denoiser_apart", "steps=20000"]
    backend = compiler(Backend(fails=1, of="aot_eager"))
    run(recipe, tmp_path / "auto", *changes, stop_at=2)
    assert backend.graphs == 1
    # The first stage is over at once when the run is shortened.
    found, _ = run(recipe, tmp_path / "auto", *changes[:2], "steps=4", resume=True)
    assert found.step == 4
    assert [event["choice"] for event in events(tmp_path / "auto")] == ["step", "off"]
    assert "this compiler compiles no more" in events(tmp_path / "auto")[1]["text"]


@pytest.mark.parametrize(("parallel", "fails"), [("ddp", 0), ("fsdp2", 0), ("fsdp2", -1)], ids=str)
def test_processes_choose_the_same_also_if_the_compiler_fails_in_one(
    fails, parallel, compiler, recipe, tmp_path
) -> None:
    changes = [LONG, OWN, "microshards=2", f"parallel={parallel}"]

    def act(rank, name, changes=changes):
        compiler(Backend(fails if rank or parallel == "fsdp2" else -1))
        world = World.join()
        run(recipe, tmp_path / name, *changes, world=world)
        world.shutdown()
        return "done"

    assert together(partial(act, name="auto")) == ["done", "done"]
    (event,) = events(tmp_path / "auto")
    assert event["choice"] == "off" if fails == 0 else "blocks"
    assert ("not step" in event["text"]) == (parallel == "ddp")  # FSDP2 does not try it
    if fails == 0:
        assert together(partial(act, name="off", changes=[*changes, "compile=off"]))
        assert_same(*(opened(tmp_path / name)[1] for name in ("auto", "off")))
