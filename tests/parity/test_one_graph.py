"""`compile: step` is one graph of what the objective computes, and draws as the plain step does.

Graphs go to a backend that runs torch's own kernels, so that no C++ compiler is needed. Most are
run as they were traced; where a test asks for it, forward and backward pass are graphs of their
own ("aot_eager"), as they are for a compiler, which takes three times as long.
"""

from __future__ import annotations

import io
from functools import partial

import attrs
import pytest
import torch
from command_line import e2ediff, needs, needs_dsd
from e2ediff_testing import make_batch
from processes import together
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from e2ediff import hookimpl
from e2ediff.distributed.world import World
from e2ediff.errors import ResourceError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.parts.objectives import Detached
from e2ediff.step.assembly import assemble
from e2ediff.step.draws import draw_for
from e2ediff.step.one_graph import UnforeseenDrawError
from e2ediff.step.splitting import part_of
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

CPU = torch.device("cpu")
STEP = "compile=step"
SMALL = "backbone.depth=1"
pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture
def backend() -> str:
    return "eager"


as_for_a_compiler = pytest.mark.parametrize("backend", ["aot_eager"])


@pytest.fixture(autouse=True)
def graphs(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Counts graphs."""
    found = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@attrs.frozen(kw_only=True)
class Own(Detached):
    """Draws from the generator itself."""

    def terms(self, nets, batch, draw, phase):
        torch.rand(2, generator=draw.generator)
        return super().terms(nets, batch, draw, phase)


@attrs.frozen(kw_only=True)
class Reading(Detached):
    """Reads a number."""

    def terms(self, nets, batch, draw, phase):
        float(batch.x.mean())
        return super().terms(nets, batch, draw, phase)


class Rebinding(nn.Module):
    """A network of which a step replaces a buffer, or changes it in place."""

    def __init__(self, net, *, rebinds: bool) -> None:
        super().__init__()
        self.net, self.rebinds = net, rebinds
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *args):
        if self.rebinds:
            self.count = self.count + 1
        else:
            self.count += 1
        return self.net(*args)


CALLS = []


@attrs.frozen(kw_only=True)
class Fickle(Detached):
    """Draws something else whenever it is run again."""

    def terms(self, nets, batch, draw, phase):
        CALLS.append(draw.uniform(1 + len(CALLS)).shape)
        return super().terms(nets, batch, draw, phase)


class Plugin:
    """Registers these."""

    @staticmethod
    @hookimpl
    def register(add):
        for part in (Own, Reading, Fickle):
            add("objectives", part.__name__.lower(), part)


def made(text, *changes):
    recipe = parse_recipe(load(Plugin), text, "tiny", [SMALL, *changes])
    parts = assemble(recipe, CPU)
    # Zero-initialised gates would leave most of the blocks' weights without a gradient.
    with torch.no_grad():
        for i, p in enumerate(parts.step.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return recipe, parts


def computed(recipe, parts, phase, number=0, rows=slice(None), size=4):
    """The loss and its gradients, by name; one that is None is left out."""
    batch = make_batch(recipe.data.image, size=size)
    draw = draw_for(recipe, batch.condition, "draw", number)
    if rows != slice(None):
        batch, draw = batch.rows(rows), part_of(draw, rows)
    parts.step.zero_grad()
    total, losses, info = parts.step(batch, draw, phase)
    total.backward()
    named = parts.step.named_parameters()
    found = {key: p.grad.clone() for key, p in named if p.grad is not None}
    return {"total": total.detach(), **losses, **info, **found}


OBJECTIVES = [
    pytest.param(["objective=coupled", "regularizers=[vicreg]"], id="coupled"),
    pytest.param(["objective={name: detached, draws: 2, decode_noise: {probability: 1.0}}"],
                 id="detached"),
    pytest.param(["objective=two_stage", "backbone.trunks=denoiser_apart"],
                 id="two_stage"),
    pytest.param(
        ["objective={name: dsd, draws: 2, augmentation: {jitter: 0.2, mask_probability: 0.5}}",
         "backbone.latent_norm=position"], id="dsd", marks=needs_dsd),
    pytest.param(["objective={name: unite, draws: 2}", "label_drop=0.5"], id="unite",
                 marks=needs("e2ediff-unite")),
    *(pytest.param([f"objective={name}"], id=name, marks=needs("e2ediff-rivals"))
      for name in ("kl", "tweedie", "unified_latents")),
    pytest.param(["objective=mean_flow", "predicts=v", "backbone.second_time=true"],
                 id="mean_flow", marks=needs("e2ediff-rivals")),
    pytest.param(
        ["objective=ldm_is_ae",
         "backbone={name: ldm_is_ae, width: 16, depth: 3, encoder_depth: 1, heads: 2, patch: 8, "
         "latent_dim: 6, bottleneck: 8, context: 2, context_start: 1, eight_bit: true}"],
        id="ldm_is_ae", marks=needs("e2ediff-ldm-is-ae")),
    pytest.param(["objective={name: adversary, of: detached, layers: 1, channels: 8}",
                  "optimizers={critic: adamw}"], id="adversary", marks=needs("e2ediff-rivals")),
]  # fmt: skip


@as_for_a_compiler
@pytest.mark.parametrize("changes", OBJECTIVES)
def test_one_graph_a_phase_has_the_losses_and_gradients_of_the_plain_step(
    changes, graphs, tiny_text
) -> None:
    """In every step, whose draws differ; a weight without a gradient has none either way."""
    (recipe, plain), (_, whole) = made(tiny_text, *changes), made(tiny_text, *changes, STEP)
    for count, phase in enumerate(recipe.objective.phases, start=1):
        values: list[tuple[float, float]] = []
        for number in range(3):
            theirs = computed(recipe, plain, phase, number)
            ours = computed(recipe, whole, phase, number)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(
                    ours[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
                )
            values.append((float(ours["total"]), float(theirs["total"])))
        assert len({ours for ours, _ in values}) == len({theirs for _, theirs in values})
        assert graphs.frame_count == count


def test_parts_of_a_micro_shard_are_a_graph_each_size_and_draw_as_parts_of_it(
    graphs, tiny_text
) -> None:
    (recipe, plain), (_, whole) = made(tiny_text), made(tiny_text, STEP)
    for rows in (slice(0, 2), slice(2, 4), slice(0, 1)):
        theirs, ours = (computed(recipe, p, "joint", rows=rows) for p in (plain, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 2


def test_learning_what_is_drawn_leaves_no_trace(graphs, tiny_text) -> None:
    """Neither in torch's generator, nor in buffers, nor in gradients."""
    recipe, parts = made(tiny_text, "backbone.latent_norm=batch", STEP)
    before = {name: b.clone() for name, b in parts.step.named_buffers()}
    state = torch.get_rng_state()
    first = computed(recipe, parts, "joint")
    again = computed(recipe, parts, "joint")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in parts.step.named_buffers())
    assert all(torch.equal(first[key], again[key]) for key in first)


@as_for_a_compiler
def test_a_buffer_that_steps_change_in_place_counts_every_step(tiny_text) -> None:
    recipe, parts = made(tiny_text, STEP)
    net = parts.step.online
    net.head_latent = Rebinding(net.head_latent, rebinds=False)
    for number in range(3):
        computed(recipe, parts, "joint", number)
    assert net.head_latent.count == 3


def test_a_buffer_that_a_step_replaces_is_refused(tiny_text) -> None:
    recipe, parts = made(tiny_text, STEP)
    net = parts.step.online
    net.head_latent = Rebinding(net.head_latent, rebinds=True)
    with pytest.raises(
        ResourceError, match=r"place of the buffer online.head_latent.count, which"
    ):
        computed(recipe, parts, "joint")


def test_an_objective_that_draws_from_the_generator_itself_is_refused(tiny_text) -> None:
    recipe, parts = made(tiny_text, "objective=own", STEP)
    with pytest.raises(UnforeseenDrawError, match=r"this one uses `draw.generator`"):
        computed(recipe, parts, "joint")


def test_an_objective_that_draws_otherwise_in_another_step_is_refused(tiny_text) -> None:
    recipe, parts = made(tiny_text, "objective=fickle", STEP)
    with pytest.raises(UnforeseenDrawError, match=r"asked for uniform \(2,\) where it had .*\(1,"):
        computed(recipe, parts, "joint")


def run(recipe, out, *changes, resume=False, world=None):
    lines = [SMALL, STEP, "steps=4", "microshards=2", "cadence.checkpoint=2", *changes]
    train(load(Plugin), recipe, lines, str(out), resume=resume, progress=Progress(io.StringIO()),
          world=world)  # fmt: skip
    opened = open_checkpoint(Store(str(out)))
    return {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}


def test_a_run_that_goes_on_computes_what_the_straight_one_does_bit_for_bit(
    tiny_recipe, tmp_path
) -> None:
    """Although it learns what is drawn in the middle."""
    straight = run(tiny_recipe, tmp_path / "straight")
    run(tiny_recipe, tmp_path / "cut", "steps=2", "images=null")
    found = run(tiny_recipe, tmp_path / "cut", resume=True)
    assert [key for key in straight if not torch.equal(straight[key], found[key])] == []


def test_an_objective_that_reads_a_number_ends_the_run_with_what_to_set(
    tiny_recipe, tmp_path
) -> None:
    file = tmp_path / "reading.py"
    file.write_text(
        "import attrs\nfrom e2ediff import hookimpl\n"
        "from e2ediff.parts.objectives import Detached\n"
        "@attrs.frozen(kw_only=True)\nclass Reading(Detached):\n    '''Reads a number.'''\n"
        "    def terms(self, nets, batch, draw, phase):\n        float(batch.x.mean())\n"
        "        return super().terms(nets, batch, draw, phase)\n"
        "@hookimpl\ndef register(add):\n    add('objectives', 'reading', Reading)\n"
    )
    words = ("run", tiny_recipe, "--plugin", file, "--set", "objective=reading", "--set", STEP)
    done = e2ediff(*words, "--out", tmp_path / "run")
    assert done.code == 8
    assert "compile: step traces a step on tensors that hold no numbers" in done.err
    assert "fails there: reading.py:8: " in done.err
    assert "Read no number of a tensor in a step, or set `compile: blocks`" in done.err
    assert "Traceback" not in done.err


def test_with_fsdp2_a_whole_step_is_refused_before_a_directory_is_made(
    tiny_recipe, tmp_path
) -> None:
    def act(rank):
        run(tiny_recipe, tmp_path / "run", "parallel=fsdp2", world=World.join())

    for said in together(act):
        assert said.startswith("RecipeError: ")
        assert "compile: step makes one graph" in said
        assert "Set compile: blocks, or parallel: ddp." in said
    assert not (tmp_path / "run").exists()
