"""What `plan` forecasts is what a real step of the engine takes."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from command_line import needs, needs_dsd
from e2ediff_plan.devices import Device
from e2ediff_plan.flops import count_inference, count_passes
from e2ediff_plan.memory import _fake, follow
from e2ediff_plan.plan import Plan, make_plan
from e2ediff_plan.rehearsal import _Kept
from e2ediff_plan.sampling import Calls, count_calls
from e2ediff_plan.spread import BLOCKS, spread
from half_only import offer_half_only
from real_steps import CPU, OBJECTIVES, engine_of, recipe_with, take_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.host.plugins import Host
from e2ediff.host.recipe import load_recipe
from e2ediff.monitor.scores import Scorer
from e2ediff.step.count import count
from e2ediff.store.checkpoint import open_checkpoint

SHALLOW = "backbone.depth=1"  # where a claim is not about depth: a forecast takes as long as that


@pytest.fixture
def recipe_of(host: Host):
    return partial(recipe_with, host)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counted_flops_are_those_of_the_engine_s_step(
    host: Host, recipe_of, tmp_path: Path, name: str
) -> None:
    """With attention as plain products: the counter does not know the CPU's fused kernel."""
    recipe = recipe_of(name)
    engine = engine_of(host, recipe, tmp_path / "run")
    batch = next(iter(engine._batches()))
    for phase, cost in count_passes(recipe).items():
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            take_step(engine, phase, batch)
        found = counter.get_total_flops() / recipe.batch
        assert cost.per_image.total == pytest.approx(found, rel=0.02)
        assert cost.per_image.total == pytest.approx(count(recipe).flops[phase], rel=1e-9)


def test_every_step_of_a_decoder_that_denoises_is_counted(recipe_of) -> None:
    """In samples, and in a training step that decodes: by its own steps, there and back."""
    denoising = (SHALLOW, "backbone.decoder=denoising")
    found = {}
    for steps in (1, 5):
        recipe = recipe_of("detached", *denoising, f"backbone.decode_steps={steps}")
        found[steps] = count_inference(recipe), count_passes(recipe)["joint"].passes["decode"]
        assert count_calls(recipe).decode == 1
    assert found[5][0]["decode"] == pytest.approx(5 * found[1][0]["decode"])
    assert found[5][0]["denoise"] == found[1][0]["denoise"]
    assert found[5][1].forward == pytest.approx(5 * found[1][1].forward)
    assert found[5][1].backward > 4 * found[1][1].backward


def test_a_pass_owns_its_forward_and_its_backward_flops(recipe_of) -> None:
    """Twice the forward's, but for what needs no gradient: images, and a stopped encoder."""
    joint = count_passes(recipe_of("dsd"))["joint"].passes
    assert {*joint} == {"encode", "encode target", "decode", "denoise", "heads"}
    assert joint["encode target"].forward == joint["encode"].forward
    assert joint["encode target"].backward == 0
    assert 1.9 < joint["encode"].backward / joint["encode"].forward < 2
    for name in ("decode", "denoise", "heads"):
        assert joint[name].backward / joint[name].forward == pytest.approx(2, rel=0.01)
    first, second = (cost.passes for cost in count_passes(recipe_of("two_stage")).values())
    assert {*first} == {"encode", "decode"}
    assert {*second} == {"encode", "denoise"}
    assert second["encode"].backward == 0
    draws = count_passes(recipe_of("detached"))["joint"].passes
    assert draws["denoise"].forward == pytest.approx(2 * joint["denoise"].forward, rel=1e-9)


def test_a_perceptual_network_is_counted_without_its_weights(recipe_of) -> None:
    """The real image goes forward, the reconstruction forward and back to the image."""
    network = "{name: torchvision, model: squeezenet1_1, nodes: [features.4], weights: /nowhere}"
    passes = count_passes(
        recipe_of("detached", f"objective.reconstruction={{perceptual: {network}}}")
    )["joint"].passes
    assert passes["perceptual"].backward == pytest.approx(passes["perceptual"].forward / 2)


@needs("e2ediff-rivals")
def test_a_step_with_forward_mode_derivatives_is_counted_and_followed(recipe_of) -> None:
    """The derivative is a pass of values and one of tangents, which are left without a graph."""
    changes = ("predicts=v", "backbone.second_time=true")
    recipe = recipe_of("detached", "objective=mean_flow", *changes)
    mine, plain = (
        count_passes(r)["joint"].passes["denoise"]
        for r in (recipe, recipe_of("detached", "objective.draws=1", *changes))
    )
    assert mine.forward == pytest.approx(3 * plain.forward, rel=1e-9)
    assert mine.backward == pytest.approx(plain.backward, rel=1e-9)
    assert follow(recipe).passing > 0


# On a CPU a norm of bfloat16 says that it has no fused kernel.
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_forecast_peak_is_the_allocator_s_within_two_percent(
    host: Host, recipe_of, tmp_path: Path, name: str, precision: str, recomputed: bool
) -> None:
    """Over every allocation that torch's profiler sees from the engine's making on."""
    more = ["checkpoint_activations=true"] * recomputed
    recipe = recipe_of(name, f"precision={precision}", *more)
    # An earlier engine that is freed in here would count as memory given back by this one.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine = engine_of(host, recipe, tmp_path / "run")
        batch = next(iter(engine._batches()))
        for turn in ("first", "second"):
            with record_function(turn):
                for phase in recipe.objective.phases:
                    take_step(engine, phase, batch)
    events = seen.profiler.kineto_results.events()
    (second,) = (e.start_ns() for e in events if e.name() == "second")
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if event.start_ns() >= second else peak
    assert follow(recipe).peak == pytest.approx(peak, rel=0.02)


def test_a_forecast_in_bfloat16_measures_no_kernel(recipe_of, monkeypatch) -> None:
    half_only = offer_half_only(monkeypatch)
    memories = [
        follow(
            recipe_of("detached", SHALLOW, "precision=bfloat16", f"backbone.attention={kernel}")
        )
        for kernel in ("auto", "sdpa_flash")
    ]
    assert memories[0] == memories[1]
    assert half_only.answered == []


def test_the_peak_at_another_micro_shard_is_that_of_a_recipe_that_has_it(recipe_of) -> None:
    known, other = (follow(recipe_of("detached", SHALLOW, f"microshards={m}")) for m in (2, 4))
    assert known.rows == 2 * other.rows
    assert known.peak_at(other.rows) == pytest.approx(other.peak, rel=0.01)
    for usable in (known.peak, known.peak + 10 * known.per_image):
        rows = known.rows_that_fit(usable)
        assert known.peak_at(rows) <= usable < known.peak_at(rows + 1)


def test_memory_that_is_saved_counts_a_storage_once_and_weights_never() -> None:
    w = torch.ones(3, requires_grad=True)
    x = torch.ones(5, 3)
    kept = _Kept([w])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        y = w * x  # keeps w and x
        loss = (y * y + x[1:].sum() * y.exp()).sum()  # keeps y twice, a sum, exp(y)
    assert kept.bytes == 4 * (15 + 15 + 1 + 15)
    del y, loss
    assert kept.bytes == 4 * 15, "x lives on; what was dropped is no longer kept"


def test_an_rms_norm_on_cuda_keeps_its_input_in_float32_and_one_number_a_row() -> None:
    """As aten::_fused_rms_norm's derivative has it, under autocast; and gradients come through."""
    with _fake(like_cuda=True):
        norm, x = torch.nn.RMSNorm(8), torch.zeros(5, 8, dtype=torch.bfloat16, requires_grad=True)
        kept = _Kept([norm.weight])
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            y = norm(x)
        assert kept.bytes == 4 * (5 * 8 + 5)
        y.sum().backward()
        assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
        assert norm.weight.grad.shape == (8,)


@needs_dsd
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_for_a_gpu_too_recomputed_activations_are_not_kept(recipe_of, precision: str) -> None:
    """The norms that a block computes again in the backward pass are those of CUDA as well."""
    recipe = recipe_of("dsd", f"precision={precision}")
    kept, again = (
        follow(attrs.evolve(recipe, checkpoint_activations=value), like_cuda=True)
        for value in (False, True)
    )
    assert sum(again.saved.values()) < 0.5 * sum(kept.saved.values())
    assert again.peak < kept.peak


def test_fsdp2_splits_what_stays_and_gathers_blocks_and_ddp_adds_its_buckets(recipe_of) -> None:
    """On four devices; of several micro-shards on a device the gradients are whole as well."""
    recipe = recipe_of("detached", "microshards=4")
    alone = follow(recipe, gpus=4)
    ddp = spread(alone, recipe, 4)
    assert ddp.passing == alone.passing + alone.state["gradients"]
    assert (ddp.updating, dict(ddp.state)) == (alone.updating, dict(alone.state))
    fsdp2 = spread(alone, attrs.evolve(recipe, parallel="fsdp2"), 4)
    for name in ("weights", "gradients", "optimizer joint", "average target", "average slow"):
        assert fsdp2.state[name] == alone.state[name] // 4
    assert fsdp2.state["images of the probe"] == alone.state["images of the probe"]
    gathered = alone.outside_blocks + BLOCKS * alone.largest_block
    stays = [v for k, v in alone.state.items() if k not in ("gradients", "images of the probe")]
    assert fsdp2.passing == alone.passing - sum(stays) + sum(stays) // 4 + gathered
    two = spread(alone, attrs.evolve(recipe, parallel="fsdp2"), 2)
    assert two.state["gradients"] == alone.state["gradients"] * 3 // 2
    assert spread(alone, recipe, 1) is alone


# Hidden matrices of the network above: two blocks and the trunk's last modulation.
HIDDEN = [(192, 64), (64, 64), (336, 64), (64, 168), (384, 64)] * 2 + [(128, 64)]


@pytest.mark.parametrize("optimizer", ["adamw", "{name: sgd, momentum: 0.5}", "muon"])
def test_an_optimizer_s_state_is_what_that_optimizer_keeps(recipe_of, optimizer: str) -> None:
    """AdamW two numbers a parameter, SGD one; Muon one for a hidden matrix and two for others."""
    memory = follow(recipe_of("detached", f"optimizer={optimizer}"))
    gradients = memory.state["gradients"]
    hidden = 4 * sum(rows * columns for rows, columns in HIDDEN)
    kept = {"adamw": 2 * gradients, "muon": 2 * gradients - hidden}.get(optimizer, gradients)
    # AdamW also counts its steps, for each tensor.
    assert memory.state["optimizer joint"] == pytest.approx(kept, abs=1000)
    # Five times X X^T, its square, and their product with X.
    flops = sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in HIDDEN)
    assert memory.optimizer_flops["joint"] == (flops if optimizer == "muon" else 0)


def test_a_forecast_checkpoint_is_as_large_as_one(host: Host, recipe_of, tmp_path: Path) -> None:
    recipe = recipe_of("two_stage", SHALLOW, "cadence.checkpoint=1", "backbone.latent_norm=batch")
    engine = engine_of(host, recipe, tmp_path / "run")
    batch = next(iter(engine._batches()))
    for phase in recipe.objective.phases:
        take_step(engine, phase, batch)
    engine.saver.save()
    found = open_checkpoint(engine.directory.store)
    tensors = [t for file in found.files for t in found.tensors(file).values()]
    assert follow(recipe).checkpoint == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("overrides", "calls"),
    [
        (["sampler={name: euler, steps: 7}"], 7),
        (["sampler={name: heun, steps: 7}"], 13),
        (["sampler={name: euler, steps: 7}", "guidance={name: classifier_free, scale: 2.0}"], 14),
        (
            [
                "sampler={name: euler, steps: 10}",
                "guidance={name: classifier_free, scale: 2.0, t_min: 0.25, t_max: 0.55}",
            ],
            13,
        ),
    ],
)
def test_network_calls_of_a_sample_are_the_sampler_s_and_the_guidance_s(
    recipe_of, overrides: list[str], calls: int
) -> None:
    assert count_calls(recipe_of("detached", *overrides)) == Calls(denoise=calls, decode=1)


@pytest.fixture(scope="module")
def plan(host: Host) -> Plan:
    """Two stages on one H200 at half of its ceiling."""
    recipe = recipe_with(host, "two_stage", "batch=24", "microshards=12")
    return make_plan(host, recipe, "tiny", device="h200", fraction=0.5)


def test_time_is_work_over_the_pace_of_all_devices(plan: Plan) -> None:
    stages = [cost.per_image.total for cost in plan.phases.values()]
    assert plan.flops == pytest.approx(sum(stages) / 2)
    assert plan.pace == 0.5 * 67e12
    assert plan.images_per_second == pytest.approx(plan.pace / plan.flops)
    assert plan.training_seconds == pytest.approx(12 * 24 * plan.flops / plan.pace)
    two = attrs.evolve(plan, gpus=2)
    assert two.training_seconds == pytest.approx(plan.training_seconds / 2)
    assert two.looking_seconds == plan.looking_seconds, "one device looks, the other waits"
    sample = 3 * plan.inference["denoise"] + plan.inference["decode"]  # heun, two steps
    assert plan.evaluation_seconds == pytest.approx(50_000 * sample / plan.pace)


@needs_dsd
def test_looking_at_the_quickstart_costs_less_than_one_percent_of_its_work(host: Host) -> None:
    recipe = load_recipe(host, Path(__file__).parents[3] / "recipes" / "quickstart.yaml")
    plan = make_plan(host, recipe, "quickstart", device="h200", fraction=0.5)
    spent = sum(plan.looks[k].times * plan.looks[k].flops for k in ("diagnose", "survey"))
    assert spent < 0.01 * recipe.total_images * plan.flops


@pytest.mark.parametrize(
    "changes",
    [
        ["cadence.diagnose=4", "cadence.survey=3", "scores.every=20"],
        ["cadence.diagnose=5", "scores.every=3", "probe.glance=99", "diagnostics=[spread]"],
    ],
)
def test_looks_are_as_many_and_cost_what_the_engine_s_do(
    host: Host, recipe_of, tmp_path: Path, changes: list[str]
) -> None:
    scores = "scores={every: 24, images: 16, features: random_projection, metrics: [fid]}"
    norm = "backbone.latent_norm=batch"  # so that it is calibrated
    recipe = recipe_of(
        "detached", norm, "probe={images: 16, glance: 6, calibration: 8}", scores, *changes
    )
    engine = engine_of(host, recipe, tmp_path / "run")
    plan, monitor = make_plan(host, recipe, "tiny"), engine.monitor
    steps = range(1, recipe.total_steps + 1)
    surveys = [0, *filter(monitor._survey_due, steps)]
    assert plan.looks["survey"].times == len(surveys)
    assert plan.looks["diagnose"].times == len([*filter(monitor.due, steps)]) - len(surveys) + 1
    assert plan.looks["scores"].times == len([*filter(monitor.scores_due, steps)])
    phases = recipe.objective.phases
    between = recipe.cadence.diagnose * (2 if recipe.cadence.diagnose == 4 else 1)
    for name, work in (
        ("diagnose", lambda: monitor.diagnose(between, phases)),
        ("survey", lambda: monitor.diagnose(0, phases)),
        ("scores", monitor.score),
        ("scores' reference", lambda: Scorer.open(recipe, recipe.data.open(), CPU)),
    ):
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            work()
        found, forecast = counter.get_total_flops(), plan.looks[name].flops
        # Products of latents or features with one another are left out; here images are tiny.
        close = 0.2 if name == "scores' reference" else 0.05
        assert forecast == pytest.approx(found, rel=close), name
    assert plan.looking_seconds == pytest.approx(
        sum(look.times * look.flops for look in plan.looks.values()) / plan.pace
    )


def test_micro_shards_that_fit_are_the_fewest_that_do(plan: Plan) -> None:
    """Of 24 images on two devices: multiples of two that divide the batch."""
    plan = attrs.evolve(plan, gpus=2)
    for rows, shards in ((1, 24), (2, 12), (3, 8), (5, 6), (11, 4), (12, 2), (13, 2)):
        memory = plan.memory.peak_at(rows) + 1
        roomy = attrs.evolve(plan, device=Device("cpu", {}, memory, ""))
        assert roomy.microshards_that_fit == shards
    none = attrs.evolve(plan, device=Device("cpu", {}, plan.memory.peak_at(0), ""))
    assert none.microshards_that_fit is None


def test_a_measured_plan_times_a_real_step(host: Host, recipe_of) -> None:
    """No faster than the products of matrices that its ceiling was taken from."""
    recipe = recipe_of("detached", "backbone.depth=1")
    plan = make_plan(host, recipe, "tiny", device="measured")
    assert plan.measured is not None
    assert 0 < plan.fraction < 1
    assert plan.measured.rows == 4
    per_second = plan.measured.rows / plan.measured.seconds
    assert plan.images_per_second == pytest.approx(per_second, rel=1e-6)
    assert "timed just now" in plan.device.source
