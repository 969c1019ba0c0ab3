"""Numbers that are not finite, or far above the usual, change no weight; a run goes on without.

One image of a plugin's source is NaN, so that the steps that read it are bad.
"""

from __future__ import annotations

import hashlib
import io
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from processes import together
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff import hookimpl
from e2ediff.data import Batch, DataSource, ImageSpec, SourceConfig
from e2ediff.distributed.signals import Stop
from e2ediff.distributed.tensors import clip_gradients
from e2ediff.distributed.world import World
from e2ediff.errors import DivergedError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, load_recipe, parse_recipe
from e2ediff.loading.batches import batches
from e2ediff.parts.sources.synthetic import Synthetic
from e2ediff.step.assembly import assemble
from e2ediff.step.guard import Guard, Share
from e2ediff.step.update import Update
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.engine import Engine
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

pytestmark = pytest.mark.usefixtures("drawn")

CPU = torch.device("cpu")
CADENCE = "cadence={log: 5, diagnose: 1000, preview: 1000, checkpoint: 3}"


@attrs.frozen(kw_only=True)
class Poisoned(SourceConfig):
    """The synthetic images, of which some are not a number."""

    images: tuple[int, ...] = (29,)  # of steps 4 and 12, and of no calibration
    count: int = 60

    @property
    def image(self) -> ImageSpec:
        return self._clean.image

    @property
    def _clean(self) -> Synthetic:
        return Synthetic(size=16, classes=4, count=self.count)

    def open(self, *, held_out: bool = False) -> DataSource:
        return _Poisoned(self._clean.open(held_out=held_out), () if held_out else self.images)


class _Poisoned(DataSource):
    def __init__(self, clean: DataSource, bad: tuple[int, ...]) -> None:
        self.clean, self.bad = clean, bad

    def __len__(self) -> int:
        return len(self.clean)

    def read(self, indices):
        x, labels = self.clean.read(indices)
        x = x.float()
        for row, index in enumerate(indices):
            if index in self.bad:
                x[row, 0, 3, 3] = torch.nan
        return x, labels


class Run:
    """A run of the tiny recipe on poisoned images, and its continuations."""

    def __init__(self, recipe: str, out: Path) -> None:
        self.recipe, self.out, self.said = recipe, out, io.StringIO()

    def host(self, stop_at: int = 0):
        @hookimpl
        def register(add):
            add("sources", "poisoned", Poisoned)

        @hookimpl
        def step_ended(run, step):
            if step == stop_at:
                signal.raise_signal(signal.SIGINT)

        return load(SimpleNamespace(__name__="poison", register=register, step_ended=step_ended))

    def train(self, *changes: str, data: str = "poisoned", resume=False, stop_at=0, world=None):
        return train(
            self.host(stop_at), self.recipe, [f"data={data}", CADENCE, *changes], str(self.out),
            resume=resume, progress=Progress(self.said), world=world,
        )  # fmt: skip

    def events(self, kind: str):
        lines = (self.out / "events.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["kind"] == kind]

    def fingerprint(self) -> dict[str, object]:
        found = open_checkpoint(Store(str(self.out)))
        tensors = {
            f"{file}:{name}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
            for file in found.files
            for name, t in found.tensors(file).items()
        }
        return {"step": found.step, "state": found.state, **tensors}

    def figures(self):
        lines = [json.loads(x) for x in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in m.items() if not k.startswith("wall_")} for m in lines]


@pytest.fixture
def poisoned(tiny_recipe, tmp_path):
    return lambda name="run": Run(tiny_recipe, tmp_path / name)


# One step


def updates(text: str, *changes: str):
    """Return what takes steps, and a batch with a finite and one with a poisoned image."""
    recipe = parse_recipe(load(), text, "tiny", list(changes))
    parts = assemble(recipe, CPU)
    options = {"seed": 0, "first": 0, "last": 1, "flip": False, "workers": 0, "device": CPU}
    good = next(batches(recipe.data.open(), recipe.data.image, batch=recipe.batch, **options))
    x = good.x.clone()
    x[3, 0, 0, 0] = torch.inf
    return Update(recipe, parts, World(), lambda *a, **k: None), good, Batch(x, good.condition)


def held(update: Update) -> dict[str, torch.Tensor]:
    """Copies of the trained weights and of the optimizers' state."""
    found = {name: p.detach().clone() for name, p in update.parts.step.online.named_parameters()}
    for phase, optimizer in update.parts.optimizers.items():
        for i, state in enumerate(optimizer.state.values()):
            found |= {f"{phase}.{i}.{k}": v.clone() for k, v in state.items()}
    return found


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


OPTIMIZERS = ["adamw", "{name: sgd, clip: 0}", "muon"]


@pytest.mark.parametrize("waits", [True, False], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_changes_neither_weights_nor_optimizer(optimizer, waits, tiny_text) -> None:
    """In the first update of a run, where optimizers make their state, and in a later one."""
    update, good, bad = updates(tiny_text, f"optimizer={optimizer}", "microshards=2")
    update.guard.waits = waits
    before = held(update)
    update(bad, 0)
    after = held(update)
    assert_same(before, {name: after[name] for name in before})
    assert all((after[name] == 0).all() for name in after.keys() - before.keys())
    update(good, 8)
    before = held(update)
    assert all(t.isfinite().all() for t in before.values())
    update(bad, 16)
    assert_same(before, held(update))
    (first, second) = update.guard.take()
    assert (first.images, second.images) == (0, 16)
    assert [share.losses["denoising"].isfinite().item() for share in second.shares] == [
        False,
        True,
    ]
    update(good, 24)
    assert any(not torch.equal(before[name], held(update)[name]) for name in before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_flag_on_the_device_gives_the_bits_of_an_update_that_is_not_called(
    optimizer, tiny_text
) -> None:
    found = []
    for waits in (True, False):
        changes = [f"optimizer={optimizer}", "guards={spike: skip, window: 2, factor: 500}"]
        changes += ["optimizer.clip=0"]  # the norm is computed otherwise on a GPU
        update, good, bad = updates(tiny_text, *changes)
        update.guard.waits = waits
        for i, batch in enumerate([good, good, bad, good, good, good]):
            update(batch, 8 * i)
        found.append(held(update))
        assert len(update.guard.state()["joint"]) == 2
        assert [judged.images for judged in update.guard.take()] == [16]
    assert_same(*found)


class Reads(TorchDispatchMode):
    """Counts values that are read from a device to decide something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reading = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in reading
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "waits", "expected"),
    [
        (["microshards=2"], False, 0),
        (["optimizer={name: sgd, clip: 0}"], False, 0),
        (["guards={spike: rewind, window: 3}"], False, 0),
        (["optimizer=muon"], False, 1),  # which cannot be told on the device
        ([], True, 3),  # on a CPU: the norm for clipping, and both numbers of the verdict
    ],
    ids=["adamw", "sgd", "spikes", "muon", "cpu"],
)
def test_a_step_on_a_gpu_waits_for_nothing(changes, waits, expected, tiny_text) -> None:
    update, good, _ = updates(tiny_text, *changes)
    update.guard.waits = waits
    update(good, 0)  # the first update makes the optimizer's state
    with Reads() as reads:
        update(good, 8)
    assert reads.count == expected


@pytest.mark.parametrize("waits", [True, False], ids=["cpu", "as on a gpu"])
def test_statistics_that_a_forward_pass_keeps_in_buffers_are_put_back(waits, tiny_text) -> None:
    update, good, bad = updates(tiny_text)
    update.guard.waits = waits
    net = update.parts.step.online
    net.register_buffer("seen", torch.zeros(()))

    def keep(module, given, z) -> None:
        net.seen.add_(z.detach().mean())

    net.embed_pixels.register_forward_hook(keep)
    update(good, 0)
    seen = net.seen.clone()
    assert seen != 0
    update(bad, 8)
    assert net.seen == seen


def test_a_finite_gradient_whose_squares_exceed_float32_has_a_norm(tiny_text) -> None:
    update, _, _ = updates(tiny_text)
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3e25, 4e25])
    assert float(clip_gradients([p], 0.0, update.world)) == pytest.approx(5e25)


# Spikes


def guard(tiny_text, **options) -> tuple[Guard, torch.optim.Optimizer]:
    text = ", ".join(f"{key}: {value}" for key, value in options.items())
    recipe = parse_recipe(load(), tiny_text, "tiny", [f"guards={{{text}}}"])
    return Guard(recipe, World(), CPU), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def judge(one: Guard, optimizer, loss: float, norm: float, step: int) -> bool:
    """Whether a step with these numbers makes no update."""
    one.update(
        optimizer, "joint", step, [Share(8, torch.tensor(loss), {})], torch.tensor(norm).double()
    )
    return bool(one.take())


def test_a_spike_is_what_exceeds_the_median_of_a_full_window_by_the_factor(tiny_text) -> None:
    one, optimizer = guard(tiny_text, spike="skip", window=5, factor=3)
    assert not any(judge(one, optimizer, 1.0, norm, 0) for norm in (1.0, 90.0, 2.0, 1.0, 3.0))
    assert judge(one, optimizer, 1.0, 6.1, 5)  # the median is 2
    assert not judge(one, optimizer, 1.0, 5.5, 6)
    assert judge(one, optimizer, 3.1, 1.0, 7)
    assert judge(one, optimizer, -3.1, 1.0, 8)  # an adversarial loss may be negative
    assert [norm for _, norm in one.state()["joint"]] == [90.0, 2.0, 1.0, 3.0, 5.5]


def test_spikes_do_not_enter_the_window_and_it_is_restored(tiny_text) -> None:
    one, optimizer = guard(tiny_text, spike="skip", window=3, factor=3)
    for step in range(4):
        judge(one, optimizer, 1.0, 1.0 + step, step)
    state = json.loads(json.dumps(one.state()))
    assert state == {"joint": [[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]]}
    assert judge(one, optimizer, 1.0, 100.0, 4)
    assert one.state() == state
    for window, kept in ((3, 3), (2, 2), (9, 3)):
        other, _ = guard(tiny_text, spike="skip", window=window, factor=3)
        other.restore(state)
        assert other.state() == {"joint": state["joint"][-kept:]}
        assert judge(other, optimizer, 1.0, 100.0, 4) == (window < 9)
    off, _ = guard(tiny_text)
    off.restore(state)
    assert off.state() == {}


# Runs


def test_a_run_with_one_bad_image_goes_on_without_the_steps_that_read_it(poisoned) -> None:
    run = poisoned()
    assert run.train("microshards=2").exit_code == 0
    first, second = run.events("skipped_step")
    assert (first["step"], first["images"], second["step"]) == (4, 32, 12)
    assert (first["why"], first["losses"]) == ("non_finite", ["reconstruction", "denoising"])
    assert (first["loss"], first["grad_norm"]) == ("nan", "nan")
    assert (first["microshards"], first["processes"]) == ([0], [0])
    assert first["samples"] == [22, 29, 38, 45]
    assert "step 4: made no update, because loss/reconstruction, loss/denoising are not" in (
        run.said.getvalue()
    )
    assert "2 of 12 steps made no update" in run.said.getvalue()
    assert [m["step"] for m in run.figures() if "loss/denoising" in m] == [5, 10]
    # The last step was logged too, without the figures that are not finite.
    assert [m["step"] for m in run.figures() if "lr" in m] == [5, 10, 12]


@pytest.mark.parametrize(("policy", "cuts"), [("skip", (4,)), ("rewind", (5, 11))])
def test_a_run_with_a_bad_image_resumes_bit_for_bit(policy, cuts, poisoned) -> None:
    guards = f"guards={{non_finite: {policy}, spike: skip, window: 4, factor: 1.5, limit: 9}}"
    whole, run = poisoned("whole"), poisoned()
    whole.train(guards)
    for i, cut in enumerate(cuts):
        assert run.train(guards, resume=i > 0, stop_at=cut).exit_code == 130
    assert run.train(guards, resume=True).exit_code == 0
    assert whole.fingerprint() == run.fingerprint()
    assert whole.figures() == run.figures()


def test_a_run_stopped_after_a_bad_step_does_not_return_to_it(poisoned) -> None:
    """Steps 4, at which a checkpoint is due, and 6 are bad: both go back to the beginning."""
    changes = ("guards={non_finite: rewind, limit: 9}", "cadence={log: 1, checkpoint: 4}",
               "data.images=[29, 17]")  # fmt: skip
    whole, run = poisoned("whole"), poisoned()
    whole.train(*changes)
    assert run.train(*changes, stop_at=4).exit_code == 130
    assert run.train(*changes, resume=True).exit_code == 0
    returns = [[(e["step"], e["to"]) for e in r.events("rewound")] for r in (whole, run)]
    assert returns[0][:2] == [(4, "images-000000000000"), (6, "images-000000000000")]
    assert returns[0] == returns[1]
    assert whole.fingerprint() == run.fingerprint()
    assert whole.figures() == run.figures()


def test_a_run_that_stops_says_how_to_go_on_and_does(poisoned) -> None:
    run, other = poisoned(), poisoned("other")
    with pytest.raises(DivergedError) as caught:
        run.train("guards.non_finite=stop")
    assert str(caught.value) == (
        "step 4: loss/reconstruction, loss/denoising are not finite. The last good checkpoint is "
        "images-000000000024. To skip such steps: `e2ediff run --resume "
        f"{run.out} --set guards.non_finite=skip`. Lower the learning rate (optimizer.lr), or "
        "give optimizer.clip a smaller norm."
    )
    assert json.loads((run.out / "status.json").read_text())["exit_code"] == 7
    assert list_checkpoints(Store(str(run.out))) == ["images-000000000024"]
    with pytest.raises(DivergedError, match="step 4"):
        run.train("guards.non_finite=stop", resume=True)
    assert run.train("guards.non_finite=skip", resume=True).exit_code == 0
    other.train()
    assert run.fingerprint() == other.fingerprint()
    (event,) = run.events("continued")
    assert event["changes"] == {"guards.non_finite": ['"stop"', '"skip"']}


def test_a_run_that_rewinds_draws_anew_and_skips_what_it_met(poisoned) -> None:
    run, clean = poisoned(), poisoned("clean")
    assert run.train("guards.non_finite=rewind", "cadence.log=1").exit_code == 0
    assert [(e["step"], e["to"]) for e in run.events("rewound")] == [
        (4, "images-000000000024"), (12, "images-000000000072"),
    ]  # fmt: skip
    assert [(e["step"], e["why"]) for e in run.events("skipped_step")] == [
        (4, "non_finite"), (4, "known"), (12, "non_finite"), (12, "known"),
    ]  # fmt: skip
    clean.train("cadence.log=1", "steps=5", data="{name: poisoned, images: []}")
    one, other = ({m["step"]: m.get("loss/denoising") for m in r.figures()} for r in (run, clean))
    assert [one[k] == other[k] for k in (1, 2, 3, 5)] == [True, True, True, False]
    assert "rollback 1 of at most 3 because loss/reconstruction" in run.said.getvalue()


def test_returns_have_a_limit(poisoned) -> None:
    run = poisoned()
    with pytest.raises(DivergedError, match=r"rolled back 1 times, guards\.limit, and again loss"):
        run.train("guards={non_finite: rewind, limit: 1}")
    assert [e["step"] for e in run.events("rewound")] == [4]


@pytest.mark.parametrize(
    ("guards", "images", "said"),
    [
        (
            "limit: 1",
            "[22, 59]",
            "step 5: 2 steps in a row made no updates, more than guards.limit",
        ),
        ("limit: 0", "[29]", r"step 4: the step made no update, more than guards.limit \(0\)"),
        ("share: 0.001", "[29]", "step 12: 2 of the last 1,000 steps made no update"),
    ],
)
def test_too_many_bad_steps_end_a_run(guards, images, said, poisoned) -> None:
    run = poisoned()
    with pytest.raises(DivergedError, match=said) as caught:
        run.train(f"guards={{{guards}}}", data=f"{{name: poisoned, images: {images}}}")
    assert "--allow-change KEY" in str(caught.value)


def test_no_checkpoint_is_written_after_a_bad_step_but_after_the_next_good_one(poisoned) -> None:
    run = poisoned()
    run.train("cadence.checkpoint=4", "checkpoint.keep=9")
    names = list_checkpoints(Store(str(run.out)))
    assert names == [f"images-{8 * step:012d}" for step in (5, 8, 12)]


def test_bad_images_among_those_of_calibration_and_probe_are_left_out(poisoned) -> None:
    run = poisoned()
    run.train(data="{name: poisoned, images: [29, 39]}")  # one of them calibrates
    (event,) = run.events("images_left_out")
    assert event["text"].startswith("1 of 16 calibration images hold values that are not finite")


def test_a_run_as_on_a_gpu_learns_of_bad_steps_where_it_waits_anyway(
    tiny_recipe, tmp_path
) -> None:
    """At logged steps and saves; its weights are those of a run that learns at once."""
    prints = []
    for name, waits in (("cpu", True), ("gpu", False)):
        run = Run(tiny_recipe, tmp_path / name)
        changes = ["data=poisoned", CADENCE, "cadence.checkpoint=1000"]
        recipe = load_recipe(run.host(), tiny_recipe, changes)
        text = dump_recipe(run.host(), recipe)
        directory = RunDirectory.create(str(run.out), "run", text, text, {})
        sources = (recipe.data.open(), recipe.data.open(held_out=True))
        with directory:
            shown = Progress(run.said)
            engine = Engine(run.host(), recipe, directory, CPU, sources, shown)
            engine.update.guard.waits = waits
            engine.run(Stop())
        prints.append(run.fingerprint())
        assert [e["step"] for e in run.events("skipped_step")] == [4, 12]
    assert prints[0] == prints[1]


# Several processes


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_processes_skip_together_what_one_of_them_meets(parallel, tiny_recipe, tmp_path) -> None:
    """Image 53 is in the second micro-shard of step 4."""
    changes = ["microshards=2", "steps=6", f"parallel={parallel}", "cadence.log=1"]
    data = "{name: poisoned, images: [53]}"
    run, alone = Run(tiny_recipe, tmp_path / "run"), Run(tiny_recipe, tmp_path / "alone")

    def act(rank):
        world = World.join()
        code = run.train(*changes, data=data, world=world).exit_code
        world.shutdown()
        return code

    assert together(act) == [0, 0]
    (event,) = run.events("skipped_step")
    assert (event["step"], event["microshards"], event["processes"]) == (4, [1], [1])
    assert event["samples"] == [11, 1, 41, 53]
    alone.train(*changes, data=data)
    one, other = run.fingerprint(), alone.fingerprint()
    same = [k for k in one if k.startswith("online:")]
    assert len(same) > 20
    if parallel == "ddp":
        assert [k for k in same if one[k] != other[k]] == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_the_flag_on_the_device_works_on_what_processes_share(parallel, tiny_text) -> None:
    changes = ["microshards=2", f"parallel={parallel}", "optimizer.clip=0.5"]

    def act(rank):
        world = World.join()
        found = []
        recipe = parse_recipe(load(), tiny_text, "tiny", changes)
        options = {"seed": 0, "first": 0, "last": 1, "flip": False, "workers": 0, "device": CPU}
        whole = next(batches(recipe.data.open(), recipe.data.image, batch=recipe.batch, **options))
        for waits in (True, False):
            torch.manual_seed(0)
            update = Update(recipe, assemble(recipe, CPU, world), world, lambda *a, **k: None)
            update.guard.waits = waits
            for step in range(4):
                x = whole.x.clone()
                if step == 2:
                    x[-1, 0, 0, 0] = torch.nan  # of the second process
                update(Batch(x, whole.condition).rows(update.rows), 8 * step)
            parameters = update.parts.nets.online.parameters()
            with update.parts.parallel.whole():
                found.append(float(sum(p.detach().double().abs().sum() for p in parameters)))
            assert [judged.images for judged in update.guard.take()] == [16]
        world.shutdown()
        return found

    for found in together(act):
        assert found[0] == found[1]  # each has its part of the weights under FSDP2
