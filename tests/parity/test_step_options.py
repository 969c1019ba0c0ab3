"""What saves memory or time leaves the step as it is: parts of a micro-shard, activations
computed again, compiled blocks, bfloat16 around float32 weights, the gradient's norm.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from command_line import needs
from e2ediff_testing import make_batch
from half_only import offer_half_only
from processes import together
from torch import nn

from e2ediff import hookimpl
from e2ediff.distributed.tensors import clip_gradients
from e2ediff.distributed.world import World
from e2ediff.errors import ResourceError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.loading.batches import batches
from e2ediff.model.build import check_precision, choose_device, problems
from e2ediff.parts.objectives import Detached
from e2ediff.step.assembly import assemble, tf32
from e2ediff.step.draws import draw_for
from e2ediff.step.splitting import UnclearDrawError, part_of
from e2ediff.step.update import Update
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

CPU = torch.device("cpu")
DSD = [
    "objective={name: dsd, draws: 2, augmentation: {jitter: 0.2, mask_probability: 0.5},"
    " decode_noise: {probability: 0.5}}",
    "backbone.latent_norm=layer",
]


@attrs.frozen(kw_only=True)
class Hungry(Detached):
    """`detached` on a device that holds the activations of only `most` images at once.

    `rank` is the only process that it happens in, if not -1; with `compares` a loss depends on
    all images of a micro-shard.
    """

    most: int
    rank: int = -1
    compares: bool = False

    def terms(self, nets, batch, draw, phase):
        here = torch.distributed.get_rank() if torch.distributed.is_initialized() else self.rank
        if torch.is_grad_enabled() and len(batch.x) > self.most and self.rank in (-1, here):
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        terms = super().terms(nets, batch, draw, phase)
        if not self.compares:
            return terms
        spread = (terms.z - terms.z.mean(dim=0)).square().mean()
        return attrs.evolve(
            terms,
            losses={**terms.losses, "spread": spread},
            weights={**terms.weights, "spread": 1.0},
        )


def with_hungry():
    @hookimpl
    def register(add):
        add("objectives", "hungry", Hungry)

    return load(SimpleNamespace(__name__="hungry", register=register))


def run(recipe, out, *changes, world=None):
    quiet, host = Progress(io.StringIO()), with_hungry()
    train(host, recipe, ["steps=3", *changes], str(out), progress=quiet, world=world)
    opened = open_checkpoint(Store(str(out)))
    return {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}


def events(out, kind):
    lines = (Path(out) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def assert_near(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(
            ours[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


# Memory

# No diagnostics: those of gradients compute 16 images at once, which is not what is tested.
HUNGRY = ["backbone.latent_norm=layer", "optimizer.eps=0.001", "diagnostics=[]"]


def test_without_memory_a_micro_shard_is_computed_in_parts_to_the_same_result(
    tiny_recipe, tmp_path
) -> None:
    """From 8 images at once to 4 and 2; both runs draw the same times, noise and labels."""
    plain = run(tiny_recipe, tmp_path / "all", *HUNGRY, "objective={name: hungry, most: 8}")
    found = run(tiny_recipe, tmp_path / "parts", *HUNGRY, "objective={name: hungry, most: 3}")
    assert_near(found, plain, 1e-6)
    told = events(tmp_path / "parts", "memory")
    assert [(e["step"], e["microshard"], e["images_at_once"]) for e in told] == [
        (0, 8, 4),
        (0, 8, 2),
    ]
    assert events(tmp_path / "all", "memory") == []


@pytest.mark.parametrize("most", [3, 8])
def test_a_choice_of_what_is_compiled_waits_until_it_is_known_how_much_fits(
    tiny_recipe, tmp_path, most
) -> None:
    """A run whose memory does not suffice for a whole micro-shard goes on as without a choice."""
    objective = f"objective={{name: hungry, most: {most}}}"
    plain = run(tiny_recipe, tmp_path / "off", *HUNGRY, objective)
    found = run(tiny_recipe, tmp_path / "auto", *HUNGRY, objective, "compile=auto")
    assert_near(found, plain, 0.0)
    sizes = [event["images_at_once"] for event in events(tmp_path / "auto", "memory")]
    assert sizes == ([4, 2] if most == 3 else [])
    (chosen,) = events(tmp_path / "auto", "compile")
    assert chosen["choice"] == "off"
    assert chosen["step"] == (1 if most == 3 else 0)


def test_that_parts_change_nothing_is_found_in_float32_beside_a_kernel_for_half_types(
    tiny_recipe, tmp_path, monkeypatch
) -> None:
    kernel = offer_half_only(monkeypatch)
    run(tiny_recipe, tmp_path / "run", *HUNGRY, "objective={name: hungry, most: 3}",
        "precision=bfloat16", "steps=1")  # fmt: skip
    assert [e["images_at_once"] for e in events(tmp_path / "run", "memory")] == [4, 2]
    assert set(kernel.answered) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["backbone.latent_norm=batch"], "backbone.latent_norm: batch takes its statistics from"),
        (["regularizers=[vicreg]"], "the regularizer vicreg compares them"),
        (["objective.compares=true"], "the loss 'spread' would be 0."),
        (["objective.most=0"], "a single image does not fit"),
    ],
    ids=["norm", "regularizer", "loss", "one image"],
)
def test_what_compares_images_is_not_computed_in_parts_but_refused(
    changes, why, tiny_recipe, tmp_path
) -> None:
    given = [*HUNGRY, "objective={name: hungry, most: 3}", *changes]
    with pytest.raises(ResourceError) as caught:
        run(tiny_recipe, tmp_path / "run", *given)
    said = str(caught.value)
    assert said.startswith("out of memory: a micro-shard of 8 images does not fit")
    assert f"in parts is not possible: {why}" in said
    assert "Set microshards: 2 (another run: it changes the draws)" in said
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 8)


def test_if_one_of_two_processes_lacks_memory_both_compute_in_parts(tiny_recipe, tmp_path) -> None:
    """Found out before the first step, when no process waits for another's gradients."""
    changes = [*HUNGRY, "microshards=2"]
    plain = run(tiny_recipe, tmp_path / "one", *changes, "objective={name: hungry, most: 8}")
    hungry = "objective={name: hungry, most: 3, rank: 1}"

    def act(rank):
        world = World.join()
        run(tiny_recipe, tmp_path / "two", *changes, hungry, world=world)
        world.shutdown()
        return "well"

    assert together(act) == ["well", "well"]
    opened = open_checkpoint(Store(str(tmp_path / "two")))
    ours = {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}
    assert_near(ours, plain, 1e-6)
    assert [e["images_at_once"] for e in events(tmp_path / "two", "memory")] == [2]


def first_batch(recipe):
    options = {"seed": 0, "first": 0, "last": 1, "flip": False, "workers": 0, "device": CPU}
    return next(batches(recipe.data.open(), recipe.data.image, batch=recipe.batch, **options))


UNITE = ["objective={name: unite, draws: 3}", "label_drop=0.5"]


@pytest.mark.parametrize(
    "changes",
    [
        DSD,
        ["objective={name: detached, draws: 2}"],
        pytest.param(UNITE, marks=needs("e2ediff-unite")),
    ],
)
def test_parts_of_a_draw_are_the_rows_of_the_whole_draw(changes, tiny_text) -> None:
    """Every loss, weighted by images, over unequal parts of 7 images and 1."""
    if changes is DSD:
        pytest.importorskip("e2ediff_dsd", reason="the plugin e2ediff-dsd is not installed")
    recipe = parse_recipe(load(), tiny_text, "tiny", [*changes, "backbone.latent_norm=layer"])
    parts = assemble(recipe, CPU)
    batch = first_batch(recipe)
    whole = parts.step.terms(batch, draw_for(recipe, batch.condition, "draw", 0), "joint")
    sums = dict.fromkeys(whole.losses, 0.0)
    for rows in (slice(0, 7), slice(7, 8)):
        part = batch.rows(rows)
        draw = part_of(draw_for(recipe, batch.condition, "draw", 0), rows)
        for name, value in parts.step.terms(part, draw, "joint").losses.items():
            sums[name] += float(value.detach()) * len(part.x) / 8
    assert sums == pytest.approx({k: float(v.detach()) for k, v in whole.losses.items()}, rel=1e-5)


def test_a_draw_that_cannot_be_cut_says_so(tiny_text) -> None:
    recipe = parse_recipe(load(), tiny_text, "tiny")
    draw = part_of(draw_for(recipe, make_batch(size=8).condition, "draw", 0), slice(0, 2))
    with pytest.raises(UnclearDrawError, match=r"\(2, 2\)"):
        draw.uniform(2, 2)


# Activations computed again, and compiled blocks


def one_step(text, *changes):
    """The gradients of one step, its losses and figures, and the assembly."""
    recipe = parse_recipe(load(), text, "tiny", list(changes))
    assert problems(recipe) == []
    parts = assemble(recipe, CPU)
    # Zero-initialised gates would leave most of the blocks' weights without a gradient.
    with torch.no_grad():
        for i, p in enumerate(parts.nets.online.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    batch = first_batch(recipe)
    update = Update(recipe, parts, World(), lambda *a, **k: None)
    record = update(batch, 0)
    grads = {k: p.grad for k, p in parts.step.named_parameters() if p.grad is not None}
    return grads, record, parts


def test_activations_computed_again_give_the_same_gradients_and_names(tiny_text) -> None:
    plain, losses, parts = one_step(tiny_text)
    again, losses_again, recomputed = one_step(tiny_text, "checkpoint_activations=true")
    assert losses == losses_again
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[k], plain[k]) for k in plain)
    assert recomputed.step.state_dict().keys() == parts.step.state_dict().keys()


def test_activations_are_really_computed_again(tiny_text) -> None:
    """Each block runs twice for every pass with a gradient."""
    counts = []
    for wanted in ("false", "true"):
        recipe = parse_recipe(load(), tiny_text, "tiny", [f"checkpoint_activations={wanted}"])
        parts, calls = assemble(recipe, CPU), []
        parts.nets.online.blocks()[0].mlp.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        batch = make_batch(recipe.data.image, size=2)
        draw = draw_for(recipe, batch.condition, "draw")
        parts.step.terms(batch, draw, "joint").total.backward()
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("what", ["blocks", "step"])
def test_compiling_changes_no_name_in_a_checkpoint(what, tiny_text) -> None:
    """What is compiled is compiled when it is first called, so this is quick."""
    texts = [f"compile={kind}" for kind in ("off", what)]
    plain, compiled = (assemble(parse_recipe(load(), tiny_text, "t", [c]), CPU) for c in texts)
    if what == "blocks":
        blocks = compiled.nets.online.blocks()
        assert all(block._compiled_call_impl is not None for block in blocks)
    else:
        assert "forward" in vars(compiled.step)  # in the place of the class's own
        assert "forward" not in vars(plain.step)
    assert compiled.step.state_dict().keys() == plain.step.state_dict().keys()
    ours, theirs = (parts.averages["target"].net.state_dict() for parts in (compiled, plain))
    assert ours.keys() == theirs.keys()


# Compares a block of a recipe, its answer and gradients, uncompiled and compiled by torch's
# own compiler, without vectors, which would take twice as long.
COMPILES = """
import sys
import torch
from torch._inductor import config as inductor
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble

answers = []
for changes in ([], ["compile=blocks"], ["compile=blocks", "checkpoint_activations=true"]):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    parts = assemble(parse_recipe(load(), sys.argv[1], "t", changes), torch.device("cpu"))
    block, g = parts.nets.online.blocks()[0], torch.Generator().manual_seed(0)
    with torch.no_grad():  # gates that are zero would hide the rest
        for p in block.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    x, c = torch.randn(3, 4, 32, generator=g), torch.randn(3, 32, generator=g)
    with inductor.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 1, "cpp.threads": 1}):
        out = block(x, c, None, None)
        out.square().sum().backward()
    answers.append([out.detach(), *(p.grad for p in block.parameters())])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(bool(changes))
for a, *others in zip(*answers, strict=True):
    for b in others:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # fused kernels round otherwise
print("the same")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_block_computes_what_it_does_uncompiled(tiny_text) -> None:
    """In a process of its own: the compiler imports much, under this one's filters of warnings."""
    words = [sys.executable, "-c", COMPILES, tiny_text]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (0, "the same\n")


def test_blocks_are_asked_for_where_there_are_none(tiny_text, monkeypatch) -> None:
    recipe = parse_recipe(
        load(), tiny_text, "tiny", ["compile=blocks", "checkpoint_activations=true"]
    )
    monkeypatch.setattr(type(recipe.backbone.build(recipe.data.image)), "blocks", lambda self: ())
    assert [p.where for p in problems(recipe)] == ["compile", "checkpoint_activations"]


# Precision


@pytest.mark.parametrize(
    "changes",
    [
        ["objective=coupled"],
        pytest.param(["objective=kl"], marks=needs("e2ediff-rivals")),
        DSD,
    ],
    ids=str,
)
def test_bfloat16_leaves_weights_losses_norms_and_averages_in_float32(changes, tiny_text) -> None:
    if changes is DSD:
        pytest.importorskip("e2ediff_dsd", reason="the plugin e2ediff-dsd is not installed")
    seen = set()
    text = tiny_text.replace("latent_norm: batch", "latent_norm: layer")
    more = ["precision=bfloat16", "regularizers=[variance_expansion]"]
    recipe = parse_recipe(load(), text, "tiny", [*changes, *more])
    parts = assemble(recipe, CPU)
    for block in parts.nets.online.blocks():
        block.mlp.inner.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    batch = make_batch(recipe.data.image, size=8)
    terms = parts.step.terms(batch, draw_for(recipe, batch.condition, "draw"), "joint")
    assert seen == {torch.bfloat16}
    assert {v.dtype for v in terms.losses.values()} == {torch.float32}
    assert terms.z.dtype == terms.total.dtype == torch.float32
    terms.total.backward()
    (optimizer,) = parts.optimizers.values()
    norm = clip_gradients(list(parts.step.parameters()), 1.0, World())
    optimizer.step()
    for average in parts.averages.values():
        average.update()
    assert norm.dtype == torch.float64
    floats = [*parts.step.parameters(), *parts.nets.target.parameters()]
    floats += [p.grad for p in parts.step.parameters() if p.grad is not None]
    floats += [v for s in optimizer.state.values() for v in s.values()]
    assert {v.dtype for v in floats} == {torch.float32}


def test_a_device_without_bfloat16_is_refused_before_training() -> None:
    gpu = torch.device("cuda")
    with pytest.raises(ResourceError) as caught:
        check_precision("bfloat16", gpu, supported=False)
    assert str(caught.value) == (
        "precision: bfloat16 needs a GPU that computes in it (compute capability 8.0, Ampere, or "
        "newer), and this one does not; set `precision: float32`"
    )
    check_precision("bfloat16", gpu, supported=True)
    check_precision("float32", gpu, supported=False)
    check_precision("bfloat16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_every_process_computes_on_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto", 3) == CPU
    with pytest.raises(ResourceError, match="device: cuda is not available here"):
        choose_device("cuda", 0)


# The gradient's norm


@pytest.mark.parametrize("largest", [0.1, 100.0], ids=["clipped", "left"])
def test_clipping_is_torchs_own_with_squares_added_in_float64(largest) -> None:
    def gradients():
        g = torch.Generator().manual_seed(0)
        found = [nn.Parameter(torch.zeros(shape)) for shape in [(300, 200), (7,), (1,), ()]]
        for p in found[:-1]:  # one without a gradient
            p.grad = torch.randn(p.shape, generator=g) * 0.01
        return found

    ours, theirs = gradients(), gradients()
    norm = clip_gradients(ours, largest, World())
    expected = nn.utils.clip_grad_norm_(theirs, largest)
    exact = torch.cat([p.grad.double().flatten() for p in gradients()[:-1]]).norm()
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, exact, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(norm.float(), expected, rtol=1e-6, atol=0.0)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0.0)
    assert ours[-1].grad is None


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_the_norm_of_millions_of_gradients_has_seven_right_digits(transposed) -> None:
    """One sum in float32 over as many, as torch's own, is 4e-5 too small."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(3072, 768, generator=g)
    p = nn.Parameter(torch.zeros(values.T.shape if transposed else values.shape))
    p.grad = values.T if transposed else values
    norm = clip_gradients([p], 1e9, World())
    torch.testing.assert_close(norm, values.double().norm(), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("size", [16, 33, 1000, 36864, 70000])
def test_a_norm_is_the_same_to_the_bit_wherever_gradients_lie_in_memory(size) -> None:
    """In the buckets of DDP they follow one another without a gap."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    norms = set()
    for offset in range(17):
        memory = torch.empty(size + 32)
        start = -(memory.data_ptr() // 4) % 16 + offset
        p = nn.Parameter(torch.zeros(size))
        p.grad = memory[start : start + size].copy_(values)
        norms.add(float(clip_gradients([p], 0.0, World())))
    assert len(norms) == 1


def test_gradients_of_a_part_that_is_frozen_only_at_first_do_not_add_up(tiny_text) -> None:
    """As a plugin may thaw it; the second gradient of the same batch is not the sum of both."""
    still = ["optimizer={name: adamw, lr: 1e-30, clip: 0.0}"]
    recipe = parse_recipe(load(), tiny_text, "tiny", still)
    parts = assemble(recipe, CPU)
    update = Update(recipe, parts, World(), lambda *_, **__: None)
    part, batch = parts.nets.online.blocks()[0], first_batch(recipe)
    part.requires_grad_(requires_grad=False)
    update(batch, 0)
    part.requires_grad_(requires_grad=True)
    norms = [float(update(batch, 0)["grad_norm"]) for _ in range(3)]
    assert norms[1:] == norms[:1] * 2


def test_gradients_below_the_bound_are_left_and_others_are_not() -> None:
    for value, bound, kept in [(3.0, 5.0, True), (3.0, 2.0, False), (torch.nan, 5.0, False)]:
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([value, 1.0])
        before = p.grad.clone()
        clip_gradients([p], bound, World())
        assert torch.equal(p.grad, before) == kept


def test_what_is_said_of_tf32_ends_no_run_where_torchs_settings_are_mixed(monkeypatch) -> None:
    """Torch raises where it is asked by its older settings and was told by its newer ones."""

    def mixed():
        raise RuntimeError("mix of the legacy and new APIs to set the TF32 status")

    assert tf32() == "products of matrices: no, convolutions: yes"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert tf32() == "products of matrices: as set by `fp32_precision`, convolutions: yes"
