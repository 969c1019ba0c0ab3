"""What `--allow-change` lets a run change takes effect, and is recorded; the rest is refused."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from command_line import e2ediff
from torch import nn

from e2ediff import hookimpl
from e2ediff.errors import RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.objective import Objective
from e2ediff.parts.objectives import Detached
from e2ediff.step.assembly import assemble
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.optimizer_state import flatten_optimizer, restore_optimizer
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

BASE = [
    "cadence={log: 1, diagnose: 1000, preview: 1000, checkpoint: 1000}",
    "steps=4",
    "objective=detached",
    "regularizers=[vicreg]",
]
STARTS = {
    "adamw": ["optimizer.groups=[{match: 'online.trunks.*', factor: 0.5}]"],
    "sgd": ["optimizer={name: sgd, lr: 0.01}"],
    "muon": ["optimizer={name: muon, lr: 0.001}"],
}


def run(recipe, out, *changes: str, stop_at: int = 0, resume=False, allow=(), register=None):
    """Train in this process; with `stop_at` a plugin sends the signal after that step."""

    @hookimpl
    def step_ended(run, step):
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    hooks = {"register": hookimpl(register)} if register else {}
    host = load(SimpleNamespace(__name__="stopper", step_ended=step_ended, **hooks))
    progress = Progress(io.StringIO())
    return train(host, recipe, changes, str(out), resume=resume, allow=allow, progress=progress)


@pytest.fixture(scope="module")
def cut(tmp_path_factory, tiny_text):
    """The recipe, and a run of each optimizer that was stopped after two of four steps."""
    place, made = tmp_path_factory.mktemp("cut"), {}
    (place / "tiny.yaml").write_text(tiny_text)

    def of(name: str) -> tuple[str, Path]:
        if name not in made:
            made[name] = place / name
            run(str(place / "tiny.yaml"), made[name], *BASE, *STARTS[name], stop_at=2)
        return str(place / "tiny.yaml"), made[name]

    return of


def changed(cut, tmp_path, name: str, *changes: str, allow=()) -> Path:
    """Continue a copy of the stopped run with these changes, to its end."""
    recipe, before = cut(name)
    out = Path(shutil.copytree(before, tmp_path / "run"))
    more = [*BASE, *STARTS[name], *changes]
    assert run(recipe, out, *more, resume=True, allow=allow).exit_code == 0
    return out


def groups(out: Path) -> list[dict[str, object]]:
    saved = open_checkpoint(Store(str(out))).state["optimizers"]["joint"]["groups"]
    return [group["values"] for group in saved]


def rates(out: Path, name: str = "lr") -> list[float]:
    return [m[name] for m in RunDirectory.open(str(out)).read_metrics() if name in m]


@pytest.mark.parametrize(
    ("name", "change", "key", "was", "now"),
    [
        ("adamw", "optimizer.weight_decay=0.5", "weight_decay", 0.0, 0.5),
        ("adamw", "optimizer.betas=[0.8, 0.9]", "betas", [0.9, 0.95], [0.8, 0.9]),
        ("adamw", "optimizer.eps=0.001", "eps", 1e-8, 0.001),
        ("sgd", "optimizer.momentum=0.5", "momentum", 0.9, 0.5),
        ("muon", "optimizer.momentum=0.5", "momentum", 0.95, 0.5),
        ("muon", "optimizer.steps=3", "ns_steps", 5, 3),
    ],
)
def test_an_option_of_the_optimizer_is_the_new_one_from_then_on(
    name, change, key, was, now, cut, tmp_path
) -> None:
    """A checkpoint holds the old one, which must not come back."""
    assert groups(cut(name)[1])[0][key] == was
    path = change.partition("=")[0]
    out = changed(cut, tmp_path, name, change, allow=[path])
    assert groups(out)[0][key] == now
    (event,) = [e for e in RunDirectory.open(str(out)).read_events() if e["kind"] == "continued"]
    assert event["changes"] == {path: [json.dumps(was), json.dumps(now)]}
    recipe = parse_recipe(load(), (out / "resolved.yaml").read_text(), "resolved")
    value = getattr(recipe.optimizer, path.partition(".")[2])
    assert (list(value) if isinstance(value, tuple) else value) == now


@pytest.mark.parametrize(
    ("change", "allow", "figure", "expected"),
    [
        ("optimizer.lr=0.0005", "optimizer.lr", "lr", [0.002, 0.002, 0.0005, 0.0005]),
        ("optimizer.schedule=linear", "optimizer", "lr", [0.002, 0.002, 0.001, 0.0005]),
        (
            "optimizer.groups=[{match: 'online.trunks.*', factor: 0.25}]",
            "optimizer.groups",
            "lr/online.trunks.*",
            [0.001, 0.001, 0.0005, 0.0005],
        ),
    ],
)
def test_a_learning_rate_or_its_schedule_takes_effect(
    change, allow, figure, expected, cut, tmp_path
) -> None:
    out = changed(cut, tmp_path, "adamw", change, allow=[allow])
    assert rates(out, figure) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "allow"),
    [
        ("optimizer.clip=0.001", "optimizer.clip"),
        ("regularizers=[{name: vicreg, weight: 0.5}]", "regularizers.0.weight"),
        ("objective.denoising_weight=0.5", "objective"),
        ("label_drop=0.9", "label_drop"),
        ("times=uniform", "times"),
    ],
)
def test_other_numbers_take_effect(change, allow, cut, tmp_path) -> None:
    out = changed(cut, tmp_path, "adamw", change, allow=[allow])
    plain = changed(cut, tmp_path / "plain", "adamw")
    one, other = (open_checkpoint(Store(str(place))).tensors("online") for place in (out, plain))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert rates(out, "loss/denoising")[:2] == rates(plain, "loss/denoising")[:2]


def test_a_change_outlives_a_run_that_was_killed_before_it_saved(cut, tmp_path) -> None:
    """And a rollback to a checkpoint from before it: what a checkpoint was given is compared."""
    out = Path(shutil.copytree(cut("adamw")[1], tmp_path / "run"))
    text = (out / "resolved.yaml").read_text()
    (out / "resolved.yaml").write_text(text.replace("lr: 0.002", "lr: 0.0005"))
    assert run(None, out, resume=True).exit_code == 0
    assert rates(out) == pytest.approx([0.002, 0.002, 0.0005, 0.0005])


@pytest.mark.parametrize("given", [True, False], ids=["now", "checkpoints from before"])
def test_state_that_an_optimizer_keeps_in_its_groups_is_restored(given, tiny_text) -> None:
    """Not what a recipe gives: a counter, as optimizers of plugins have."""

    def optimizer(*changes: str):
        parts = assemble(parse_recipe(load(), tiny_text, "t", [*changes]), torch.device("cpu"))
        (found,) = parts.optimizers.values()
        return found, {p: name for name, p in parts.step.named_parameters()}

    one, names = optimizer()
    for group in one.param_groups:
        group["counter"] = 7
    tensors, state = flatten_optimizer(one, names)
    state = json.loads(json.dumps(state))
    if not given:
        for group in state["groups"]:
            del group["values"]["given"]
    other, names = optimizer("optimizer.weight_decay=0.5")
    for group in other.param_groups:
        group["counter"] = 0
        group["given"]["counter"] = 0
    restore_optimizer(other, names, tensors, state)
    assert [group["counter"] for group in other.param_groups] == [7, 7]
    assert [group["weight_decay"] for group in other.param_groups] == [0.5, 0.0]


# What is refused


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "batch=4",
        "microshards=2",
        "backbone.width=64",
        "predicts=v",
        "objective=coupled",
        "optimizer=sgd",
        "optimizer.groups=[]",
        "optimizer.groups=[{match: 'online.*', factor: 0.5}]",
        "target.decay=0.5",
        "regularizers=[]",
        "data.count=61",
    ],
)
def test_what_changes_shapes_data_or_parts_is_refused_with_the_flag_too(change, cut) -> None:
    recipe, out = cut("adamw")
    path = change.partition("=")[0]
    with pytest.raises(RecipeError, match="A run cannot change it") as it:
        run(recipe, out, *BASE, *STARTS["adamw"], change, resume=True, allow=[path])
    assert any(problem.where.startswith(path) for problem in it.value.problems)


def test_a_number_that_changes_a_shape_is_refused(cut, tmp_path) -> None:
    @attrs.frozen(kw_only=True)
    class Headed(Detached):
        width: int = 4
        scale: float = 1.0

        def heads(self, backbone):
            return nn.ModuleDict({"probe": nn.Linear(self.width, 1)})

    def register(add):
        add("objectives", "headed", Headed)

    recipe, out = cut("adamw")[0], tmp_path / "headed"
    assert issubclass(Headed, Objective)
    run(recipe, out, *BASE, "objective=headed", stop_at=1, register=register)
    for change, allowed in (("objective.width=5", False), ("objective.scale=2", True)):
        with pytest.raises(RecipeError) as it:
            run(recipe, out, *BASE, "objective=headed", change, resume=True, register=register)
        assert ("add --allow-change objective." in str(it.value)) == allowed


@pytest.mark.parametrize(
    ("changes", "allow", "said"),
    [
        (
            [],
            ["optimizer.lr"],
            "--allow-change optimizer.lr: is not needed: of the recipe, nothing",
        ),
        (
            ["optimizer.lr=0.1"],
            ["optimizer.lr", "label_drop"],
            "--allow-change label_drop: is not needed: of the recipe, optimizer.lr differs from",
        ),
    ],
)
def test_a_flag_that_allows_nothing_is_refused(changes, allow, said, cut) -> None:
    recipe, out = cut("adamw")
    with pytest.raises(RecipeError) as it:
        run(recipe, out, *BASE, *STARTS["adamw"], *changes, resume=True, allow=allow)
    assert said in str(it.value)


def test_the_command_takes_it_with_resume_alone(cut, tmp_path) -> None:
    out = Path(shutil.copytree(cut("adamw")[1], tmp_path / "run"))
    words = ("--set", "optimizer.lr=0.001", "--allow-change", "optimizer.lr")
    assert e2ediff("run", "--resume", out, *words).code == 0
    assert rates(out)[2:] == pytest.approx([0.001, 0.001])
    refused = e2ediff("run", "recipe.yaml", *words)
    assert (refused.code, "give --resume" in refused.err) == (2, True)
