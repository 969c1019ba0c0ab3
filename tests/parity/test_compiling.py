"""Blocks that are compiled and computed again in the backward pass: both together, counted.

Graphs go to a backend that counts them and runs torch's own kernels, so that no C++ compiler is
needed and values can be compared. What is computed again is decided where the backward pass
becomes a graph of its own ("aot_eager"), which takes most of a compilation; graphs of a step that
keeps its activations are the same without it ("eager"). Tests of bfloat16 and of memory take the
first.
"""

from __future__ import annotations

import io
import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import e2ediff, needs, needs_dsd
from e2ediff_testing import make_batch
from half_only import offer_half_only
from processes import together
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from e2ediff.distributed.world import World
from e2ediff.errors import ResourceError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.compiling import recompute
from e2ediff.step.draws import draw_for
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

CPU = torch.device("cpu")
AGAIN = "checkpoint_activations=true"
pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own
ONE = "backbone.depth=1"  # a whole step takes long to trace, and as long again for each block
DSD = ["objective={name: dsd, draws: 2}", "backbone.latent_norm=layer"]


class Counter:
    """Counts graphs; `breaks` are the places where a compiler gave up and went on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compile, self.patch = torch.compile, monkeypatch
        self.restart()

    def restart(self, backend: str = "aot_eager") -> None:
        torch._dynamo.reset()
        counters.clear()
        self.backend = CompileCounterWithBackend(backend)
        self.patch.setattr(torch, "compile", partial(self.compile, backend=self.backend))

    @property
    def graphs(self) -> int:
        return self.backend.frame_count

    @property
    def breaks(self) -> int:
        return sum(counters["graph_break"].values())


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch):
    yield Counter(monkeypatch)
    torch._dynamo.reset()


def assembled(text, *changes):
    """The parts, and a function that computes the loss of one step."""
    recipe = parse_recipe(load(), text, "tiny", list(changes))
    parts = assemble(recipe, CPU)
    # Zero-initialised gates would leave most of the blocks' weights without a gradient.
    with torch.no_grad():
        for i, p in enumerate(parts.nets.online.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    batch = make_batch(recipe.data.image, size=8)
    draw = partial(draw_for, recipe, batch.condition, "draw")
    return parts, lambda: parts.step(batch, draw(), "joint")[0]


def gradients(parts, loss):
    loss().backward()
    named = parts.step.named_parameters()
    return {k: p.grad.clone() for k, p in named if p.grad is not None}


def assert_near(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(
            ours[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


# One process


@pytest.mark.parametrize(
    ("what", "precision", "changes"),
    [
        ("blocks", "float32", ["backbone.depth=10"]),  # which share one graph
        ("blocks", "bfloat16", []),
        pytest.param("blocks", "float32", DSD, marks=needs_dsd),
        ("step", "float32", [ONE]),
        ("step", "bfloat16", [ONE]),
        pytest.param("step", "float32", [*DSD, ONE], marks=needs_dsd),
    ],
    ids=str,
)
def test_as_many_graphs_are_compiled_whether_or_not_they_are_computed_again(
    what, precision, changes, counter, tiny_text, monkeypatch
) -> None:
    """Where attention chooses its kernel by type, too."""
    if precision == "bfloat16":
        offer_half_only(monkeypatch)
    changes = [*changes, f"precision={precision}"]
    plain = gradients(*assembled(tiny_text, *changes))
    assert counter.graphs == 0
    found = []
    for more in ([], [AGAIN]):
        counter.restart("aot_eager" if more or precision == "bfloat16" else "eager")
        parts, loss = assembled(tiny_text, *changes, f"compile={what}", *more)
        found.append((gradients(parts, loss), counter.graphs, counter.breaks))
    (kept, *counts), (again, *counts_again) = found
    assert counts_again == counts
    assert counts[0] == 1 if what == "step" else counts[0] > 0
    assert counts[1] == 0
    assert_near(again, kept, 1e-6)
    if precision == "float32":  # in bfloat16 a compiler rounds less often
        assert_near(again, plain, 1e-5)


@pytest.mark.parametrize("what", ["blocks", "step"])
def test_compiled_blocks_save_nothing_but_their_inputs_and_compute_the_rest_again(
    what, counter, tiny_text
) -> None:
    saved, products = {}, {}
    for kind in ("off", what):
        for more in ([], [AGAIN]):
            parts, loss = assembled(tiny_text, f"compile={kind}", *more)
            loss().backward()  # compiles
            weights, sizes = {p.data_ptr() for p in parts.step.parameters()}, {}

            def pack(t, weights=weights, sizes=sizes):
                if t.data_ptr() not in weights:
                    sizes[t.untyped_storage().data_ptr()] = t  # kept: no address is used twice
                return t

            with saved_tensors_hooks(pack, lambda t: t), profile() as calls:
                loss().backward()
            saved[kind, bool(more)] = sum(t.untyped_storage().nbytes() for t in sizes.values())
            count = {event.key: event.count for event in calls.key_averages()}
            products[kind, bool(more)] = count["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert saved["off", True] < 0.4 * saved["off", False]
    assert saved[what, True] < 0.4 * saved[what, False]
    assert saved[what, True] < 1.1 * saved["off", True]
    assert products["off", False] == products[what, False]
    assert products["off", True] == products[what, True] > products[what, False]


def test_names_stay_with_both(counter, tiny_text) -> None:
    plain, _ = assembled(tiny_text)
    for what in ("blocks", "step"):
        parts, _ = assembled(tiny_text, f"compile={what}", AGAIN)
        assert parts.step.state_dict().keys() == plain.step.state_dict().keys()
        names = [dict(p.parallel.step.named_parameters()).keys() for p in (parts, plain)]
        assert names[0] == names[1]


def test_without_gradients_compiled_blocks_compute_once(counter, tiny_text) -> None:
    _, loss = assembled(tiny_text, "compile=blocks", AGAIN)
    _, wanted = assembled(tiny_text)
    with torch.no_grad():
        torch.testing.assert_close(loss(), wanted(), rtol=1e-5, atol=1e-6)
    assert counter.graphs > 0
    assert counter.breaks == 0


class InTwo(nn.Module):
    """A block in the middle of which a compiler has to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, *, scale=1.0):
        h = torch.tanh(self.one(x))
        torch._dynamo.graph_break()
        return x + scale * self.two(h)


def test_a_block_that_is_compiled_in_pieces_is_so_when_computed_again(counter) -> None:
    found = []
    for again in (False, True):
        counter.restart()
        torch.manual_seed(0)
        block = InTwo()
        if again:
            recompute([block], compiled=True)
        block.compile()
        for size in (3, 5, 2):  # a compiler makes sizes dynamic at the second
            block(torch.ones(size, 4), scale=torch.tensor(0.5)).square().sum().backward()
        found.append((counter.graphs, block.one.weight.grad))
    assert found[0][0] == found[1][0] > 0
    assert torch.equal(found[0][1], found[1][1])


NETWORKS = {
    "dsd": ("quickstart", []),
    "unite": ("unite_quickstart", ["backbone.context=2", "backbone.context_start=1"]),
    "jit": ("jit_quickstart", ["backbone.context=2", "backbone.context_start=1"]),
    "ldm_is_ae": ("ldm_is_ae_quickstart", ["backbone.context=2", "backbone.context_start=0"]),
}
GRAPHS = {"dsd": 3, "unite": 4, "jit": 2, "ldm_is_ae": 3}
"""Blocks are compiled once for each kind of pass that they are in: with gradients or without."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dsd", marks=needs_dsd),
        pytest.param("unite", marks=needs("e2ediff-unite")),
        pytest.param("jit", marks=needs("e2ediff-jit")),
        pytest.param("ldm_is_ae", marks=needs("e2ediff-ldm-is-ae")),
    ],
)
def test_blocks_of_a_shipped_network_are_compiled_in_the_first_step_without_a_break(
    name, counter, tmp_path
) -> None:
    """As its recipe trains it, at a small width; eight steps, with looks between them."""
    counter.restart("eager")
    recipe, own = NETWORKS[name]
    sets = [
        "compile=blocks",
        "backbone.width=32",
        "backbone.depth=2",
        "backbone.heads=2",
        "batch=8",
        "steps=8",
        "cadence={log: 4, diagnose: 4, preview: 8}",
        "preview.rows=1",
        "sampler.steps=2",
        "probe={images: 8, calibration: 8}",
        *own,
    ]
    path = Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml"
    train(load(), str(path), sets, str(tmp_path / "run"), progress=Progress(io.StringIO()))
    text = (tmp_path / "run" / "events.jsonl").read_text()
    (event,) = [e for e in map(json.loads, text.splitlines()) if e["kind"] == "compiled"]
    assert (event["step"], event["graphs"], event["breaks"]) == (1, GRAPHS[name], 0)
    assert (counter.graphs, counter.breaks) == (GRAPHS[name], 0)


# Settings of the compiler


def failing(graph, inputs):
    raise NotImplementedError("this compiler compiles nothing")


@pytest.mark.parametrize("what", ["blocks", "step"])
def test_what_a_compiler_fails_on_is_an_error(what, tiny_text, monkeypatch) -> None:
    """What was silently left uncompiled would look as if it were slow."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=failing))
    logger = logging.getLogger("torch._dynamo")
    before = logger.level, torch._dynamo.config.suppress_errors, torch._dynamo.config.optimize_ddp
    _, loss = assembled(tiny_text, f"compile={what}", AGAIN)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="compiles nothing"):
        loss()
    after = logger.level, torch._dynamo.config.suppress_errors, torch._dynamo.config.optimize_ddp
    assert after == before
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["blocks", "step"])
def test_a_run_ends_with_what_the_compiler_said_and_what_to_set(
    what, tiny_recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=failing))
    done = e2ediff(
        "run",
        tiny_recipe,
        "--out",
        tmp_path / "run",
        "--set",
        f"compile={what}",
        "--set",
        "steps=1",
    )
    assert done.code == ResourceError.exit_code
    other = "off" if what == "blocks" else "blocks"
    assert f"compile: {what}: the compiler failed: " in done.err
    assert "this compiler compiles nothing" in done.err
    assert f"set `compile: {other}`" in done.err
    assert "Traceback" not in done.err
    torch._dynamo.reset()


# Runs


@pytest.mark.parametrize(("what", "graphs"), [("blocks", 2), ("step", 1)])
def test_a_run_records_what_was_compiled_and_compiles_nothing_after_the_first_step(
    what, graphs, counter, tiny_recipe, tmp_path
) -> None:
    """Blocks once for each size of batch; eight steps, with looks between them."""
    counter.restart("eager")
    lines = [ONE, f"compile={what}", "steps=8", "cadence.diagnose=2", "cadence.preview=4"]
    train(load(), tiny_recipe, lines, str(tmp_path / "run"), progress=Progress(io.StringIO()))
    text = (tmp_path / "run" / "events.jsonl").read_text()
    (event,) = [e for e in map(json.loads, text.splitlines()) if e["kind"] == "compiled"]
    assert (event["step"], event["graphs"], event["breaks"]) == (1, graphs, 0)
    assert event["seconds"] > 0
    assert counter.graphs == graphs


def run(recipe, out, *changes, world=None):
    """Train two steps, with looks before and after; the last checkpoint's tensors."""
    lines = ["steps=2", "microshards=2", "optimizer.eps=0.001", "cadence.preview=1",
             "preview.rows=1", *changes]  # fmt: skip
    train(load(), recipe, lines, str(out), progress=Progress(io.StringIO()), world=world)
    opened = open_checkpoint(Store(str(out)))
    return {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}


@pytest.fixture(scope="module")
def graphs_of_one() -> dict[str, int]:
    """Graphs of one process that keeps its activations, by what is compiled."""
    return {}


WIDE = ["backbone.width=192"]  # a block has more than the megabyte that DDP sends first


@pytest.mark.parametrize(
    ("kind", "backend", "changes"),
    [
        ("one", "aot_eager", ["compile=blocks"]),
        ("one", "aot_eager", ["compile=step", ONE]),
        ("ddp", "eager", ["compile=blocks"]),
        ("ddp", "aot_eager", ["compile=blocks", *WIDE]),
        ("ddp", "eager", ["compile=step", ONE]),
        ("fsdp2", "eager", ["compile=blocks"]),
        ("fsdp2", "aot_eager", ["compile=blocks", "precision=bfloat16"]),
    ],
    ids=str,
)
def test_a_run_compiles_and_computes_again_however_it_is_spread(
    kind, backend, changes, counter, tiny_recipe, tmp_path, graphs_of_one
) -> None:
    """By DDP as many graphs as in one process, and by FSDP2 as many whether or not again.

    The backward pass is a graph of its own in one case of each kind, of DDP with several buckets.
    """
    counts = []
    for name, more in (("kept", []), ("again", [AGAIN])):
        counter.restart(backend if more else "eager")
        if kind == "one":
            run(tiny_recipe, tmp_path / name, *changes, *more)
            counts.append(counter.graphs)
            continue
        if kind == "ddp" and name == "kept" and changes[0] in graphs_of_one:
            counts.append([graphs_of_one[changes[0]]] * 2)
            continue

        def act(rank, name=name, more=more):
            world = World.join()
            lines = [*changes, *more, f"parallel={kind}"]
            run(tiny_recipe, tmp_path / name, *lines, world=world)
            world.shutdown()
            return counter.graphs

        counts.append(together(act, seconds=600))
    assert counts[0] == counts[1]
    if kind == "one":
        graphs_of_one[changes[0]] = counts[0]
    one = counts[0] if kind == "one" else counts[0][0]
    assert one == (2 if "compile=blocks" in changes else 1)  # one for each size of batch
    theirs = run(tiny_recipe, tmp_path / "plain", *(c for c in changes if "compile" not in c))
    opened = open_checkpoint(Store(str(tmp_path / "again")))
    ours = {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}
    assert_near(ours, theirs, 1e-5)
