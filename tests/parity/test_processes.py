"""Several processes compute what one computes, end together, and one of them speaks.

Real processes over gloo on this machine. A process has one micro-shard here: the same two
numbers are added then, in one process or in two, so every bit must agree.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import attrs
import pytest
import torch
import torch.distributed as dist
from command_line import needs
from processes import together
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff import hookimpl
from e2ediff.distributed.signals import Stop
from e2ediff.distributed.world import World
from e2ediff.errors import E2EDiffError, RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe, parse_recipe
from e2ediff.loading.batches import fixed_images
from e2ediff.parts.objectives import Coupled
from e2ediff.sample.load import load_model
from e2ediff.step.assembly import assemble
from e2ediff.step.parallel import check_shares
from e2ediff.step.sharding import cast_layers
from e2ediff.step.update import Update
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

CPU = torch.device("cpu")
STEPS = 4
EVERY = ["microshards=2", f"steps={STEPS}", "cadence.diagnose=3", "probe.images=8"]
PROFILES = "post_hoc={every: 2, precision: float16}"
# The latents' norm cancels the bias before it: without this, Adam makes steps of its rounding.
DAMPED = "optimizer.eps=0.001"
LDM_IS_AE = (
    "backbone={name: ldm_is_ae, width: 16, depth: 3, encoder_depth: 1, heads: 2, patch: 8, "
    "latent_dim: 4, context_start: 1}"
)
RUNS = {
    # statistics of a micro-shard, a further average, a loss of the latents
    "coupled": [
        "ema=[{name: slow, decay: 0.99}]",
        "regularizers=[vicreg]",
        "batch=12",
        PROFILES,
        DAMPED,
    ],
    # a phase that leaves most parameters without a gradient
    "two_stage": ["objective=two_stage", "backbone.trunks=denoiser_apart"],
    # heads, a target encoder, augmentation, noise before decoding
    "dsd": [
        "objective={name: dsd, augmentation: {jitter: 0.2}, decode_noise: {probability: 1.0}}",
        "backbone.latent_norm=position",
        DAMPED,
    ],
    # two optimizers as one, of which one multiplies whole matrices
    "muon": ["optimizer={name: muon, lr: 0.01, exclude: [embed, head, modulation]}", "steps=1"],
    # a critic with an optimizer of its own, which learns from the images of all processes
    "adversary": [
        "objective={name: adversary, of: detached, layers: 1, channels: 8, critic_start: 0, "
        "start: 0}",
        "optimizers={critic: adamw}",
        DAMPED,
    ],
    # a last phase of the decoder alone, on latents that the denoiser made
    "tuned_decoder": [
        "objective={name: tuned_decoder, of: detached, share: 0.5}",
        "backbone.trunks=decoder_apart",
        DAMPED,
    ],
    # a derivative along the path, in forward mode
    "mean_flow": ["objective=mean_flow", "predicts=v", "backbone.second_time=true", DAMPED],
    # two phases with other weights, and no latent norm
    "genfirst": ["objective=genfirst", "backbone.latent_norm=none"],
    # a decoder that denoises images
    "denoising_decoder": [
        "objective={name: unified_latents, decoder: diffusion}",
        "backbone.latent_norm=none",
        "backbone.decoder=denoising",
    ],
    # passes of the denoiser through an image, whose encoder learns from late times alone
    "ldm_is_ae": [LDM_IS_AE, "objective=ldm_is_ae"],
    # and from all times, as FSDP2 insists
    "ldm_is_ae_all": [LDM_IS_AE, "objective={name: ldm_is_ae, encoder_from: 0}"],
}
PLUGINS = {
    "dsd": "e2ediff-dsd",
    **dict.fromkeys(["ldm_is_ae", "ldm_is_ae_all"], "e2ediff-ldm-is-ae"),
    **dict.fromkeys(
        ["adversary", "tuned_decoder", "mean_flow", "genfirst", "denoising_decoder"],
        "e2ediff-rivals",
    ),
}

# Two micro-shards a process, in bfloat16, and blocks that a phase does not use.
HALF = ["precision=bfloat16", "microshards=4", *RUNS["two_stage"], "steps=2"]


def runs(*names):
    """These of the runs, each skipped where its plugin is not installed."""
    return [
        pytest.param(name, marks=needs(PLUGINS[name]) if name in PLUGINS else ()) for name in names
    ]


def run(recipe, out, *changes, world=None, resume=False, host=None):
    """Train in this process, quietly."""
    quiet = Progress(io.StringIO())
    changes = [*EVERY, *changes]
    host = host or load()
    return train(host, recipe, changes, str(out), resume=resume, progress=quiet, world=world)


def run_in_two(recipe, out, *changes, resume=False):
    """Train in two processes; the exit code of each, or the error's text."""

    def act(rank):
        world = World.join()
        code = run(recipe, out, *changes, world=world, resume=resume).exit_code
        world.shutdown()
        return code

    return together(act)


def tensors(out):
    opened = open_checkpoint(Store(str(out)))
    return {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}


def fingerprint(out):
    """A hash of every tensor's bytes, and every figure but times."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    figures = [
        {k: v for k, v in json.loads(line).items() if not k.startswith("wall_")} for line in lines
    ]
    weights = {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in tensors(out).items()}
    return weights, figures


def files(out):
    """What is in a run's directory."""
    return sorted(str(p.relative_to(out)) for p in Path(out).rglob("*"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_text):
    """Runs of one process with two micro-shards, made when asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def get(name):
        if name not in made:
            recipe = folder / f"{name}.yaml"
            recipe.write_text(tiny_text)
            run(str(recipe), folder / name, *(RUNS | {"half": HALF})[name])
            made[name] = folder / name
        return made[name]

    return get


@pytest.mark.parametrize("name", runs(*RUNS))
def test_two_processes_equal_one_with_two_micro_shards_bit_for_bit(
    name, alone, tiny_recipe, tmp_path
) -> None:
    """Weights, averages, optimizer, statistics of latent norms, and every logged figure."""
    assert run_in_two(tiny_recipe, tmp_path / "run", *RUNS[name]) == [0, 0]
    assert fingerprint(tmp_path / "run") == fingerprint(alone(name))
    assert files(tmp_path / "run") == files(alone(name))


@pytest.mark.parametrize(
    "name", runs("half", *(name for name in RUNS if name not in ("two_stage", "ldm_is_ae")))
)
def test_fsdp2_equals_one_process_and_saves_whole_tensors(
    name, alone, tiny_recipe, tmp_path
) -> None:
    out = tmp_path / "run"
    more = ["parallel=fsdp2", "checkpoint_activations=true"]
    assert run_in_two(tiny_recipe, out, *(RUNS | {"half": HALF})[name], *more) == [0, 0]
    ours, theirs = tensors(out), tensors(alone(name))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if name == "muon" and value.is_floating_point():
            # It makes matrices orthogonal in bfloat16, whose last bits may flip. Were shares of
            # a matrix made orthogonal each, a step would move it by percents elsewhere.
            gap = (ours[key] - value).norm() / value.norm().clamp(min=1e-6)
            assert gap < 2e-3, f"{key}: {gap:.2g}"
            continue
        # blocks that are called twice add their gradients in another order
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert load_model(str(out), device="cpu").sample([0], seed=1).shape == (1, 3, 16, 16)


class Gathered(TorchDispatchMode):
    """Type and size of everything that FSDP2 gathers in one message."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[str, int]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_allgather_base" in str(func):
            self.sizes.add((str(args[0].dtype), args[0].numel()))
        return func(*args, **(kwargs or {}))


def test_fsdp2_sends_the_layers_of_blocks_in_bfloat16_and_the_rest_in_float32(
    tiny_recipe, tmp_path
) -> None:
    """Of the network and of its average, also where diagnoses compute in float32."""
    changes = ["precision=bfloat16", "parallel=fsdp2", "steps=1"]

    def act(rank):
        world = World.join()
        with Gathered() as gathered:
            run(tiny_recipe, tmp_path / "run", *changes, world=world)
        world.shutdown()
        return sorted(gathered.sizes)

    def sent(parameters):
        """Elements of two equal shares of rows."""
        return sum(p[0].numel() * (len(p) + len(p) % 2) for p in parameters)

    step = assemble(load_recipe(load(), tiny_recipe, changes), CPU).step
    blocks = [b for net in (step.online, *step.averages.values()) for b in net.blocks()]
    layers = [[p for m in cast_layers(b) for p in m.parameters()] for b in blocks]
    rest = set(step.parameters()).difference(*layers)
    expected = {("torch.bfloat16", sent(p)) for p in layers} | {("torch.float32", sent(rest))}
    assert together(act) == [[list(pair) for pair in sorted(expected)]] * 2


@attrs.frozen(kw_only=True)
class WithoutAutocast(Coupled):
    """Disables autocast around the network."""

    def terms(self, nets, batch, draw, phase):
        with torch.autocast("cpu", enabled=False):
            return super().terms(nets, batch, draw, phase)


def test_fsdp2_in_bfloat16_refuses_to_train_a_block_without_autocast(
    tiny_recipe, tmp_path
) -> None:
    """Its weights would come in bfloat16, and the objective asks for float32."""

    def act(rank):
        @hookimpl
        def register(add):
            add("objectives", "exact", WithoutAutocast)

        world = World.join()
        changes = ["precision=bfloat16", "parallel=fsdp2", "objective=exact"]
        host = load(SimpleNamespace(__name__="exact", register=register))
        try:
            run(tiny_recipe, tmp_path / "run", *changes, "diagnostics=[]", world=world, host=host)
        except E2EDiffError as error:
            return str(error)
        return "ended well"

    first, second = together(act)
    assert first == second
    assert first.startswith("Block: trained without autocast, but with `parallel: fsdp2` and")


@pytest.mark.parametrize("order", [(2, 1), (1, 2)], ids=str)
def test_a_run_goes_on_in_another_number_of_processes(order, alone, tiny_recipe, tmp_path) -> None:
    """Saved after half of the steps and in the middle of an epoch."""
    out, changes = tmp_path / "run", RUNS["coupled"]
    for processes, length in zip(order, ("steps=2", f"steps={STEPS}"), strict=True):
        begun = length == f"steps={STEPS}"
        if processes == 2:
            assert run_in_two(tiny_recipe, out, *changes, length, resume=begun) == [0, 0]
        else:
            run(tiny_recipe, out, *changes, length, resume=begun)
    weights, figures = fingerprint(alone("coupled"))
    found, continued = fingerprint(out)
    assert found == weights
    losses = [{k: v for k, v in f.items() if k.startswith("loss/")} for f in figures]
    assert [f for f in losses if f] == [
        f for f in ({k: v for k, v in c.items() if k.startswith("loss/")} for c in continued) if f
    ]


def test_fsdp2_goes_on_from_one_process_and_back(alone, tiny_recipe, tmp_path) -> None:
    out, changes = tmp_path / "run", RUNS["coupled"]
    run(tiny_recipe, out, *changes, "steps=1")
    spread = [*changes, "parallel=fsdp2", "steps=3"]
    assert run_in_two(tiny_recipe, out, *spread, resume=True) == [0, 0]
    run(tiny_recipe, out, *changes, resume=True)
    ours, theirs = tensors(out), tensors(alone("coupled"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_fsdp2_measures_the_scale_of_latents_without_a_norm_as_one_process_does(
    tiny_recipe, tmp_path
) -> None:
    """By encoding, for which weights outside of blocks must be gathered too."""
    changes = [*RUNS["coupled"], "backbone.latent_norm=none", "steps=1"]
    run(tiny_recipe, tmp_path / "one", *changes)
    assert run_in_two(tiny_recipe, tmp_path / "two", *changes, "parallel=fsdp2") == [0, 0]
    one, two = (open_checkpoint(Store(str(tmp_path / out))).latents for out in ("one", "two"))
    assert one.keys() == two.keys() > {"online", "target"}
    for name, contract in one.items():
        assert two[name]["scale"] == pytest.approx(contract["scale"], rel=1e-5)
        assert contract["scale"] != 1.0


# Parameters that a step does not use


@attrs.frozen(kw_only=True)
class Changing(Coupled):
    """From the middle of training on, the second process uses a head no longer, or only then.

    With `only_last` it does so in the second micro-shard of a step alone.
    """

    at_first: bool = True
    only_last: bool = False
    pieces: list[float] = attrs.field(factory=list, init=False, eq=False)  # of the second half
    static_graph: ClassVar[bool] = True

    def heads(self, backbone):
        return nn.ModuleDict({"extra": nn.Linear(1, 1)})

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        progress = float(draw.progress)
        changed = dist.get_rank() == 1 and progress >= 0.5
        if changed and self.only_last:
            self.pieces.append(progress)
            changed = self.pieces.count(progress) == 2
        one = terms.z.new_ones(1)
        loss = one.sum() if self.at_first == changed else nets.heads["extra"](one).square().sum()
        losses, weights = {**terms.losses, "extra": loss}, {**terms.weights, "extra": 1.0}
        return attrs.evolve(terms, losses=losses, weights=weights)


@attrs.frozen(kw_only=True)
class Derived(Changing):
    """The same, which declares nothing itself."""


def changing():
    """The parts of a session, and the two above."""

    @hookimpl
    def register(add):
        add("objectives", "changing", Changing)
        add("objectives", "derived", Derived)

    return load(SimpleNamespace(__name__="changing", register=register))


@pytest.mark.parametrize(
    ("objective", "searches"),
    [("coupled", False), ("two_stage", True), ("changing", False), ("derived", True)],
)
def test_ddp_searches_for_unused_parameters_only_where_steps_may_differ(
    objective, searches, tiny_text
) -> None:
    """The token of hidden patches is never used by the first, which has no search either."""
    changes = [f"objective={objective}", "backbone.trunks=denoiser_apart", "microshards=2"]

    def act(rank):
        world = World.join()
        recipe = parse_recipe(changing(), tiny_text, "tiny", changes)
        update = Update(recipe, assemble(recipe, CPU, world), world, lambda *a, **k: None)
        kind = recipe.data.image.conditioning
        batch = fixed_images(recipe.data.open(), kind, recipe.batch, 0, "trial", CPU)
        for step in range(2):
            update(batch.rows(update.rows), recipe.batch * step)
        unused = [n for n, p in update.parts.step.named_trained("joint") if p.grad is None]
        world.shutdown()
        return [update.parts.parallel.searches, "online.mask_token" in unused]

    assert together(act) == [[searches, True]] * 2


MISSED = "no gradient, and one when the run began"
LATE = "a gradient, and none when the run began"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"heads.extra.weight, heads.extra.bias got {MISSED}"),
        (["objective.at_first=false"], f"heads.extra.weight, heads.extra.bias got {LATE}"),
        (["microshards=4", "steps=3"], f"heads.extra.weight, heads.extra.bias got {MISSED}"),
        (
            ["microshards=4", "steps=3", "objective.only_last=true"],
            f"a parameter got {MISSED}",
        ),
    ],
    ids=["missed", "late", "in both micro-shards", "in the last micro-shard"],
)
def test_a_gradient_that_ddp_would_not_sum_ends_the_run_with_what_to_do(
    words, says, tiny_recipe, tmp_path
) -> None:
    """In one process alone, while the other waits for it."""

    def act(rank):
        world = World.join()
        changes = ["objective=changing", "diagnostics=[]", "steps=2", *words]
        try:
            run(tiny_recipe, tmp_path / "run", *changes, world=world, host=changing())
        except E2EDiffError as error:
            return [error.exit_code, str(error)]
        return "ended well"

    first, second = together(act)
    assert first == second
    assert first[0] == 4
    assert first[1].startswith(f"objective Changing: {says}")
    assert "take `static_graph = True` out of the class Changing" in first[1]


def test_processes_that_may_change_what_they_use_train_on_unless_they_declare_the_opposite(
    tiny_recipe, tmp_path
) -> None:
    def act(rank):
        world = World.join()
        changes = ["objective=derived", "diagnostics=[]"]
        ended = run(tiny_recipe, tmp_path / "run", *changes, world=world, host=changing())
        world.shutdown()
        return ended.exit_code

    assert together(act) == [0, 0]


def test_three_processes_that_continue_equal_three_that_were_not_stopped(
    tiny_recipe, tmp_path
) -> None:
    """The order of three numbers in a sum counts, and with it the place in DDP's buckets."""
    changes = ["microshards=3", "batch=12"]

    def act(rank):
        world = World.join()
        for name, steps in (("whole", "3"), ("half", "1"), ("half", "3")):
            out, resume = tmp_path / name, (name, steps) == ("half", "3")
            run(tiny_recipe, out, *changes, f"steps={steps}", world=world, resume=resume)
        world.shutdown()

    assert together(act, size=3) == [None] * 3
    whole, half = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    assert whole.keys() == half.keys()
    assert [key for key, value in whole.items() if not torch.equal(value, half[key])] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    number, tiny_recipe, tmp_path
) -> None:
    """The second process is told; the first one saves."""
    out = tmp_path / "run"

    def act(rank):
        world = World.join()

        @hookimpl
        def step_ended(run, step):
            if step == 2:
                os.kill(other, number)

        other = int(world.total(torch.tensor([os.getpid() * rank])))
        host = load(SimpleNamespace(__name__="stopper", step_ended=step_ended))
        ended = run(tiny_recipe, out, "steps=1000", world=world, host=host)
        world.shutdown()
        return ended.exit_code

    assert together(act) == [75, 75]
    status = json.loads((out / "status.json").read_text())
    # the signal may arrive while the step after it is computed
    assert status["step"] in (2, 3)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert open_checkpoint(Store(str(out))).step == status["step"]


def test_a_request_to_stop_that_arrives_twice_is_one_request() -> None:
    """From a batch system and from the launcher; later a second one leaves at once."""
    with Stop(grace=60.0) as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1
    with Stop(grace=0.0):
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_an_error_in_one_process_ends_all_and_is_said_once(tiny_recipe, tmp_path) -> None:
    """The second process cannot read its third batch, while the first waits for gradients."""
    out = tmp_path / "run"

    def act(rank):
        from e2ediff.errors import DataError
        from e2ediff.parts.sources import Synthetic

        source = type(Synthetic(size=16, count=60).open())
        plain, reads = source.read, 0

        def read(self, indices):
            nonlocal reads
            reads += 1
            if rank == 1 and reads > 4:
                raise DataError("b/broken.png: cannot be read")
            return plain(self, indices)

        source.read = read  # in this process, which ends with the test
        world = World.join()
        said = []
        try:
            run(tiny_recipe, out, world=world)
        except E2EDiffError as caught:
            error = world.attribute_error(caught)
            world.report_once(lambda: said.append(str(error)))
            return [error.exit_code, said]
        return "ended well"

    assert together(act) == [[5, []], [5, ["b/broken.png: cannot be read"]]]
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert status["reason"] == "b/broken.png: cannot be read"


def test_a_killed_process_ends_the_others_with_what_to_do(tiny_recipe, tmp_path) -> None:
    def act(rank):
        @hookimpl
        def step_ended(run, step):
            if step == 2:
                os.kill(other, signal.SIGKILL)

        world = World.join()
        other = int(world.total(torch.tensor([os.getpid() * rank])))
        host = load(SimpleNamespace(__name__="killer", step_ended=step_ended))
        try:
            run(tiny_recipe, tmp_path / "run", world=world, host=host)
        except E2EDiffError as error:
            return [error.exit_code, str(error)]
        return "ended well"

    first, second = together(act)
    assert second == -signal.SIGKILL
    assert first[0] == 8
    assert first[1].startswith("process 0 of 2 lost another process of the run")
    assert first[1].endswith("continue with --resume")


@pytest.mark.parametrize(
    ("batch", "shards", "size", "way_out"),
    [
        (8, 1, 2, "Set microshards: 2, or use a number of processes that divides 1."),
        (96, 4, 3, "Set microshards: 6, or use a number of processes that divides 4."),
        (8, 8, 3, "Use fewer processes, or set batch: 9 and microshards: 3."),
        (4, 4, 8, "Use fewer processes, or set batch: 8 and microshards: 8."),
    ],
)
def test_shares_that_do_not_come_out_even_are_refused_with_ones_that_do(
    batch, shards, size, way_out, tiny_recipe
) -> None:
    recipe = load_recipe(load(), tiny_recipe, [f"batch={batch}", f"microshards={shards}"])
    with pytest.raises(RecipeError) as caught:
        check_shares(recipe, World(size=size), "tiny.yaml")
    (problem,) = caught.value.problems
    assert problem.where == "microshards"
    assert str(problem).endswith(way_out)


@pytest.mark.usefixtures("forks")
def test_the_launcher_hands_on_a_signal_and_the_exit_code(tiny_recipe, tmp_path) -> None:
    """`e2ediff run --nproc 2`, as a batch system warns it; test_orphans.py starts whole ones."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "e2ediff", "run", tiny_recipe, "--nproc", "2"]
    command += ["--threads", "1", "--out", str(out), "--set", "microshards=2"]
    with subprocess.Popen(
        [*command, "--set", "steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        log = out / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        said_out, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert said_out == f"{out}\n"
    assert "on 2 processes (ddp) on cpu" in said
    assert "Traceback" not in said
    again = f"e2ediff run --resume {out} --nproc 2"
    assert said.endswith(f"{out}: terminated; saved\ncontinue with: {again}\n")
    steps = json.loads((out / "status.json").read_text())["step"] + 1
    more = [*again.split()[1:], "--threads", "1", "--set", f"steps={steps}"]
    done = subprocess.run(
        [sys.executable, "-m", "e2ediff", *more], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "on 2 processes (ddp) on cpu" in done.stderr
    assert said.count("stopping: ") == 1


@pytest.mark.usefixtures("forks")
def test_torchrun_needs_no_launcher_of_ours_and_one_process_speaks(tiny_recipe, tmp_path) -> None:
    """A recipe that two processes cannot share, under plain torchrun."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "e2ediff", "run", tiny_recipe, "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # torchrun's own, whatever its processes end with
    assert done.stderr.count("error: ") >= 1
    assert done.stderr.count("Set microshards: 2") == 1
    assert not (tmp_path / "run").exists()
