"""The alarm's policies in runs, and that looking leaves training alone.

A diagnostic that shows a sign at chosen looks stands in for a collapse.
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
from command_line import e2ediff
from saves import await_checkpoint

from e2ediff import hookimpl
from e2ediff.backbone import Denoise
from e2ediff.data import ImageSpec
from e2ediff.diagnostic import Diagnostic
from e2ediff.errors import CheckpointError, CollapseError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.interpolant import Interpolant
from e2ediff.model.calibration import at_rest, own_latents
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.monitor.probe import Observer, chosen_diagnostics
from e2ediff.objective import Objective
from e2ediff.parts.objectives import Coupled, Detached
from e2ediff.step.assembly import assemble
from e2ediff.step.draws import draw_for
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import _spares_encoder, train

CADENCE = "cadence={log: 1, diagnose: 2, preview: 1000, checkpoint: 2}"
TRAPPED = ["objective=detached", "diagnostics=[trap, latent_health]", CADENCE]


class Run:
    """Runs of the tiny recipe that share a count of looks, as one run and its continuations."""

    def __init__(self, recipe: str, out: Path, signs: set[int]) -> None:
        self.recipe, self.out, self.steps, self.said = recipe, out, 0, io.StringIO()
        looks = iter(range(10**6))

        @attrs.frozen(kw_only=True)
        class Trap(Diagnostic):
            def measure(self, probe):
                return {"trap": float(next(looks) in signs)}

            def verdict(self, values):
                return ["it snapped shut"] if values.get("trap") else []

        self.trap = Trap

    def train(self, *changes: str, resume: bool = False, stop_after: int = 0):
        @hookimpl
        def register(add):
            add("diagnostics", "trap", self.trap)

        @hookimpl
        def step_ended(run, step):
            self.steps += 1
            if self.steps == stop_after:
                signal.raise_signal(signal.SIGINT)

        hooks = SimpleNamespace(__name__="trap", register=register, step_ended=step_ended)
        changes = (*TRAPPED, *changes)
        shown = Progress(self.said)
        return train(
            load(hooks), self.recipe, changes, str(self.out), resume=resume, progress=shown
        )

    def events(self, kind: str):
        lines = (self.out / "events.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["kind"] == kind]

    def status(self):
        return json.loads((self.out / "status.json").read_text())

    def figures(self):
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in line.items() if not k.startswith("wall_")}
            for line in map(json.loads, lines)
        ]

    def losses(self):
        return {f["step"]: f["loss/denoising"] for f in self.figures() if "loss/denoising" in f}


def fingerprint(out: Path) -> dict[str, object]:
    found = open_checkpoint(Store(str(out)))
    tensors = {
        f"{file}:{name}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
        for file in found.files
        for name, t in found.tensors(file).items()
    }
    return {"step": found.step, "state": found.state, **tensors}


@pytest.fixture
def trapped(tiny_recipe, tmp_path):
    def of(*signs: int, name: str = "run") -> Run:
        return Run(tiny_recipe, tmp_path / name, set(signs))

    return of


# Looks are taken at steps 0, 2, 4, ...: look 3 is step 6.


def test_warn_says_so_once_goes_on_and_tells_of_the_recovery(trapped) -> None:
    run = trapped(2, 3, 4)
    assert run.train().exit_code == 0
    assert [e["step"] for e in run.events("collapse")] == [6]
    assert [e["step"] for e in run.events("recovered")] == [10]
    assert run.said.getvalue().count("LATENT COLLAPSE: it snapped shut") == 1


def test_stop_saves_says_why_and_exits_with_seven(trapped) -> None:
    run = trapped(2, 3, 4, 5)
    with pytest.raises(CollapseError, match="step 6: it snapped shut") as caught:
        run.train("alarm.policy=stop")
    assert caught.value.exit_code == 7
    status = run.status()
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 7, 6)
    assert "it snapped shut" in status["reason"]
    assert "alarm.policy=warn" in status["reason"]
    assert fingerprint(run.out)["step"] == 6
    assert (run.out / "curves.png").exists()
    # It stands where it stood, without another step, and a warning lets it go on.
    with pytest.raises(CollapseError, match="step 6: the latents have collapsed"):
        run.train("alarm.policy=stop", resume=True)
    assert run.train("alarm.policy=warn", resume=True).exit_code == 0
    assert fingerprint(run.out)["step"] == 12


def test_a_run_stopped_at_its_last_step_is_not_done_until_a_warning_suffices(trapped) -> None:
    run = trapped(5, 6)  # look 6 is step 12, the last
    for resume in (False, True):
        with pytest.raises(CollapseError, match="step 12"):
            run.train("alarm.policy=stop", resume=resume)
        assert (run.status()["state"], run.status()["exit_code"]) == ("failed", 7)
    assert run.train("alarm.policy=warn", resume=True).exit_code == 0
    assert run.status()["state"] == "done"
    assert fingerprint(run.out)["step"] == 12
    assert (run.out / "samples" / "step-00000012.png").exists()


def test_the_command_says_it_in_a_sentence_and_exits_with_seven(tiny_recipe, tmp_path) -> None:
    strict = "diagnostics=[{name: latent_health, rank_fraction: 1.0}]"
    words = ("run", tiny_recipe, "--out", tmp_path / "run", "--set", strict)
    done = e2ediff(*words, "--set", "alarm.policy=stop")
    assert (done.code, done.out) == (7, "")
    assert "error: step 8: effective rank" in done.err
    regardless = f"e2ediff run --resume {tmp_path / 'run'} --set alarm.policy=warn"
    assert done.err.endswith(f"or continue regardless: {regardless}\n")


STRICT = "diagnostics=[{name: latent_health, rank_fraction: 1.0}]"
SINCE = "the latents have been collapsed since step"


def test_a_run_that_ends_collapsed_says_so_last_in_its_status_and_when_it_is_resumed(
    tiny_recipe, tmp_path
) -> None:
    """With the objective to try where every loss reaches the encoder, and general words else."""
    out = tmp_path / "run"
    words = ("run", tiny_recipe, "--out", out, "--set", STRICT, "--set", "objective=coupled")
    for more in ((), ("--resume",)):
        done = e2ediff(*words, *more)
        assert done.code == 0
        *_, ended, collapse, following = done.err.splitlines()
        assert ended.startswith("done. Curves: ")
        assert collapse.startswith(f"LATENT COLLAPSE: {SINCE} 8. Do not trust its samples or ")
        for page in ("how-to/collapse-alarm.md", "explanation/collapse.md"):
            assert f"docs/{page}" in collapse
            assert (Path(__file__).parents[2] / "docs" / page).exists()
        assert following == (
            f"next: e2ediff run {tiny_recipe} --set '{STRICT}' --set objective=detached"
        )
        status = RunDirectory.open(str(out)).status()
        assert (status["state"], status["collapsed"]) == ("done", f"{SINCE} 8")
        assert status["reason"] == f"all steps done; {SINCE} 8"
    other = ("run", tiny_recipe, "--out", tmp_path / "other", "--set", "objective=detached")
    done = e2ediff(*other, "--set", STRICT)
    assert done.err.splitlines()[-1] == "next: try another objective, latent norm or learning rate"


def test_an_objective_that_the_recipe_would_refuse_is_not_the_one_to_try(
    tiny_recipe, tmp_path
) -> None:
    """It names an optimizer for a phase that no built-in objective has."""

    @attrs.frozen(kw_only=True)
    class Alone(Coupled):
        phases = ("alone",)

    @attrs.frozen(kw_only=True)
    class Spared(Detached):
        phases = ("alone",)

    def advice(*objectives: type, out: str) -> str:
        @hookimpl
        def register(add):
            for cls in objectives:
                add("objectives", cls.__name__.lower(), cls)

        hooks = SimpleNamespace(__name__="alone", register=register)
        changes = [STRICT, "objective=alone", "optimizers={alone: {name: adamw, lr: 0.002}}"]
        ended = train(load(hooks, entry_points=False), tiny_recipe, changes, str(tmp_path / out),
                      progress=Progress(io.StringIO()))  # fmt: skip
        assert ended.collapsed
        return ended.advice

    @attrs.frozen(kw_only=True)
    class Around(Alone):
        """Stops a loss of its own, and none of the one inside."""

        of: Objective = attrs.field(factory=Alone)

        def stops(self, phase: str) -> tuple[str, ...]:
            return ("own",)

    assert not _spares_encoder(Around())
    assert _spares_encoder(Around(of=Spared()))
    assert advice(Alone, out="general") == ""
    assert advice(Alone, Spared, out="fitting") == "objective=spared"


def test_a_run_that_recovered_or_never_collapsed_says_nothing_of_it(trapped) -> None:
    for signs, name in (((2, 3, 4), "recovered"), ((), "healthy")):
        run = trapped(*signs, name=name)
        ended = run.train()
        assert (ended.collapsed, ended.advice, ended.reason) == ("", "", "all steps done")
        assert (run.status()["collapsed"], run.status()["reason"]) == ("", "all steps done")


def test_since_when_latents_are_collapsed_outlives_a_stop(trapped) -> None:
    run = trapped(*range(2, 1000))
    stopped = run.train(stop_after=9)
    assert (stopped.exit_code, stopped.collapsed) == (130, f"{SINCE} 6")
    assert stopped.reason == f"interrupted; saved; {SINCE} 6"
    assert run.train(resume=True).collapsed == f"{SINCE} 6"
    assert [e["step"] for e in run.events("collapse")] == [6]


@pytest.mark.usefixtures("forks")
def test_an_ablation_says_which_of_its_runs_ended_collapsed(tiny_recipe, tmp_path) -> None:
    words = ("ablate", tiny_recipe, "--vary", "objective=coupled", "--seeds", "0")
    done = e2ediff(*words, "--set", STRICT, "--threads", "1", "--out", tmp_path / "group")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if ": done after " in line]
    assert line.endswith(f", but {SINCE} 8")


def test_rollback_returns_to_before_the_first_sign_and_draws_otherwise(trapped) -> None:
    plain, run = trapped(name="plain"), trapped(3, 4)
    plain.train("alarm.policy=rollback")
    assert run.train("alarm.policy=rollback").exit_code == 0
    (event,) = run.events("rewound")
    assert (event["step"], event["images"]) == (8, 64)
    assert (event["to"], event["attempt"]) == ("images-000000000032", 1)
    assert fingerprint(run.out)["state"]["alarm"]["attempt"] == 1
    assert run.status()["state"] == "done"
    before, after = plain.losses(), run.losses()
    assert list(after) == list(range(1, 13))
    assert {k: after[k] for k in range(1, 5)} == {k: before[k] for k in range(1, 5)}
    assert all(after[k] != before[k] for k in range(5, 13))


def test_what_was_recorded_before_a_return_is_kept(trapped) -> None:
    run = trapped(3, 4)
    run.train("alarm.policy=rollback")
    (event,) = run.events("rewound")
    kept = run.out / event["kept"]
    assert kept == run.out / "attempts" / "1"
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    abandoned = {m["step"]: m["loss/denoising"] for m in lines if "loss/denoising" in m}
    assert list(abandoned) == list(range(1, 9))
    assert abandoned[8] != run.losses()[8]
    kinds = [event["kind"] for event in RunDirectory.open(str(kept)).read_events()]
    assert kinds.index("collapse") > len(kinds) - 3, "a save in flight may be recorded after it"
    assert f"What was recorded since is kept in {kept}" in run.said.getvalue()


def test_returns_are_counted_and_then_the_run_stops(trapped) -> None:
    """And stands: resuming it takes no step."""
    run = trapped(*range(2, 1000))
    rollback = "alarm={policy: rollback, attempts: 2}"
    with pytest.raises(CollapseError, match="was rolled back twice and collapsed again"):
        run.train(rollback)
    steps, figures = run.steps, run.figures()
    with pytest.raises(CollapseError, match="was rolled back twice and collapsed again"):
        run.train(rollback, resume=True)
    assert (run.steps, run.figures()) == (steps, figures)
    assert run.status()["exit_code"] == 7
    assert [e["attempt"] for e in run.events("rewound")] == [1, 2]
    assert run.status()["exit_code"] == 7
    assert len({e["to"] for e in run.events("rewound")}) == 1


@pytest.mark.parametrize("change", ["alarm.attempts=3", "alarm.fall=0.4"])
def test_a_run_that_the_alarm_stopped_takes_no_step_until_its_alarm_lets_it(
    change, trapped
) -> None:
    """Another bound is tried at once, and this one finds the same collapse."""
    run = trapped(*range(2, 1000))
    with pytest.raises(CollapseError):
        run.train("alarm.policy=stop")
    steps = run.steps
    with pytest.raises(CollapseError, match="alarm\\.policy=warn"):
        run.train("alarm.policy=stop", change, resume=True)
    assert (run.steps, run.status()["exit_code"]) == (steps, 7)
    assert run.train("alarm.policy=warn", resume=True).exit_code == 0
    assert run.steps == 12


def test_a_stopped_run_goes_on_where_other_bounds_find_no_collapse(trapped) -> None:
    run = trapped(*range(2, 1000))
    with pytest.raises(CollapseError):
        run.train("alarm.policy=stop")
    assert run.train("alarm={policy: stop, window: 99}", resume=True).exit_code == 0


def test_further_returns_are_made_before_a_step_is_taken(trapped) -> None:
    run = trapped(2, 3, 5, 6)
    with pytest.raises(CollapseError):
        run.train("alarm={policy: rollback, attempts: 1}")
    steps = run.steps
    assert run.train("alarm={policy: rollback, attempts: 2}", resume=True).exit_code == 0
    second = run.events("rewound")[1]
    assert second["step"] > int(second["to"][-12:]) // 8
    assert run.steps == steps + 12 - int(second["to"][-12:]) // 8


def test_a_collapse_at_the_first_looks_goes_back_to_the_very_beginning(trapped) -> None:
    run = trapped(1, 2)
    assert run.train("alarm.policy=rollback").exit_code == 0
    (event,) = run.events("rewound")
    assert event["to"] == "images-000000000000"


def test_the_checkpoint_to_return_to_outlives_retention(trapped) -> None:
    """A window of four looks with a save at each, of which two stay."""
    run = trapped(3, 4, 5, 6)
    assert run.train("alarm={policy: rollback, window: 4}", "steps=16").exit_code == 0
    (event,) = run.events("rewound")
    assert (event["step"], event["to"]) == (12, "images-000000000032")
    kept = list_checkpoints(Store(str(run.out)))
    assert kept == ["images-000000000112", "images-000000000128"]


ROLLBACK = ("alarm.policy=rollback", "checkpoint.keep=1")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_text) -> Run:
    """A run that goes back from step 8 to step 4, and is not cut."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.yaml").write_text(tiny_text)
    run = Run(str(folder / "tiny.yaml"), folder / "run", {3, 4})
    assert run.train(*ROLLBACK).exit_code == 0
    return run


@pytest.mark.parametrize(
    "cuts",
    [(3,), (7,), (8,), (9,), (10,), (5, 7, 8, 9, 13)],
    ids=["before", "pending", "at the return", "after it", "at a save", "again and again"],
)
def test_a_run_that_goes_back_resumes_bit_for_bit(cuts, straight, trapped) -> None:
    """Cuts count steps taken: the eighth ends in the return from step 8 to step 4."""
    run = trapped(3, 4)
    for i, cut in enumerate(cuts):
        assert run.train(*ROLLBACK, resume=i > 0, stop_after=cut).exit_code == 130
    assert run.train(*ROLLBACK, resume=True).exit_code == 0
    a, b = fingerprint(straight.out), fingerprint(run.out)
    assert [k for k in a if a[k] != b[k]] == []
    assert straight.figures() == run.figures()
    assert len(run.events("rewound")) == 1


def test_a_run_taken_up_at_its_beginning_has_its_first_figures_once(trapped) -> None:
    """It is stopped as it returns there, from step 4."""
    whole, run = trapped(1, 2, name="whole"), trapped(1, 2)
    whole.train("alarm.policy=rollback")
    assert run.train("alarm.policy=rollback", stop_after=4).exit_code == 130
    assert fingerprint(run.out)["step"] == 0
    assert run.train("alarm.policy=rollback", resume=True).exit_code == 0
    assert run.figures() == whole.figures()
    assert fingerprint(whole.out) == fingerprint(run.out)


def test_a_return_to_a_checkpoint_that_is_gone_is_an_error_that_names_it(trapped) -> None:
    run, signs = trapped(3, 4), []

    def verdict(self, values):
        if not values.get("trap"):
            return []
        if not signs:
            await_checkpoint(run.out, "images-000000000032")
        signs.append("it snapped shut")
        for name in list_checkpoints(Store(str(run.out))):
            (run.out / "checkpoints" / name / "MANIFEST.json").unlink(missing_ok=True)
        return ["it snapped shut"]

    run.trap.verdict = verdict
    with pytest.raises(CheckpointError, match="images-000000000032"):
        run.train("alarm.policy=rollback", "checkpoint.keep=9")


def test_a_damaged_checkpoint_to_return_to_is_said_with_what_a_run_can_do(trapped) -> None:
    """It has no option for another one."""
    run = trapped(3, 4)

    def verdict(self, values):
        if not values.get("trap"):
            return []
        await_checkpoint(run.out, "images-000000000032")
        (run.out / "checkpoints/images-000000000032/online.safetensors").write_bytes(b"")
        return ["it snapped shut"]

    run.trap.verdict = verdict
    with pytest.raises(CheckpointError, match=r" is intact: continue with --resume\.$"):
        run.train("alarm.policy=rollback", "checkpoint.keep=9")


def test_looking_at_every_step_moves_no_weight(tiny_recipe, tmp_path) -> None:
    """All diagnostics, with gradients of every term, against none."""
    host, prints = load(), []
    often = ["cadence={log: 1, diagnose: 1, survey: 1, preview: 1000, checkpoint: 1000}"]
    never = ["cadence={log: 1, diagnose: 1000, preview: 1000, checkpoint: 1000}", "diagnostics=[]"]
    for name, changes in (("often", often), ("never", never)):
        shared = ["microshards=2", "backbone.latent_norm=batch"]
        out = tmp_path / name
        quiet = Progress(io.StringIO())
        train(host, tiny_recipe, [*shared, *changes], str(out), progress=quiet)
        prints.append(fingerprint(out))
        prints[-1].pop("state")
    assert len(prints[0]) > 50
    assert prints[0] == prints[1]


def test_surveys_come_at_their_cadence_and_at_both_ends(tiny_recipe, tmp_path) -> None:
    changes = ["steps=7", "cadence={log: 1, diagnose: 2, survey: 3, preview: 99, checkpoint: 99}"]
    out = tmp_path / "run"
    train(load(), tiny_recipe, changes, str(out), progress=Progress(io.StringIO()))
    lines = RunDirectory.open(str(out)).read_metrics()
    assert [m["step"] for m in lines if "rank" in m] == [0, 2, 3, 4, 6, 7]
    for figure in ("psnr", "knn", "rank_gap@0.5", "encoder_grad/denoising"):
        assert [m["step"] for m in lines if figure in m] == [0, 3, 6, 7]


def test_between_surveys_one_small_encoding_is_all_that_a_diagnosis_costs(host, tiny_recipe):
    recipe = load_recipe(host, tiny_recipe, ["probe={images: 48, glance: 40, times: [0.5]}"])
    parts = assemble(recipe, torch.device("cpu"))
    data = recipe.data.open()
    chosen = chosen_diagnostics(host, recipe)
    observer = Observer.open(recipe, chosen, data, data, torch.device("cpu"))
    passed: list[tuple[str, int]] = []
    for net in (parts.nets.target, parts.nets.online):
        net.outputs = _counting(net.outputs, passed)
    observer.measure(parts.step, recipe.objective.phases, survey=False)
    assert passed == [("Encode", 40), ("Encode", 16)], "averaged, and a few before averaging"
    passed.clear()
    observer.measure(parts.step, recipe.objective.phases, survey=True)
    assert passed[:3] == [("Encode", 48), ("Decode", 40), ("Denoise", 40)]
    assert passed[-1] == ("Encode", 16)


def test_a_network_that_collapsed_behind_its_slow_average_is_heard_within_two_windows(
    host, tiny_recipe
) -> None:
    """An average of 0.9999 still is what it was when the trained weights have fallen."""
    slow = ["target={decay: 0.9999, warmup: false}", "probe={images: 64, glance: 64}"]
    recipe = load_recipe(host, tiny_recipe, slow)
    parts = assemble(recipe, torch.device("cpu"))
    data = recipe.data.open()
    chosen = chosen_diagnostics(host, recipe)
    observer = Observer.open(recipe, chosen, data, data, torch.device("cpu"))
    detector, said, figures = CollapseDetector(recipe.alarm, observer.figures), [], {}

    def looks(count: int) -> None:
        for _ in range(count):
            for _ in range(25):
                parts.averages["target"].update()
            phases = recipe.objective.phases
            figures.update(observer.measure(parts.step, phases, survey=False))
            said.append(detector.evaluate(figures, observer.verdict(figures)))

    looks(3)
    assert [found.signs for found in said] == [[], [], []]
    with torch.no_grad():  # two of six channels stay, which is no complete collapse
        head = parts.nets.online.head_latent
        for tensor in (head.weight, head.bias):
            tensor.copy_(tensor[[0, 1, 0, 1, 0, 1]])
    looks(2)
    assert [found.change for found in said[3:]] == ["", "collapse"]
    assert figures["rank_fraction"] > 0.8
    assert figures["rank_fraction_online"] < 0.34
    assert all("before averaging" in sign for sign in said[-1].signs)


def test_latents_that_no_one_learns_are_not_encoded_twice(host, tiny_recipe) -> None:
    recipe = load_recipe(host, tiny_recipe, ["probe={images: 16, glance: 16, times: [0.5]}"])
    parts = assemble(recipe, torch.device("cpu"))
    fixed = attrs.evolve(parts.nets.online.latent, learned=False)
    parts.nets.online.latent = parts.nets.target.latent = fixed
    data = recipe.data.open()
    observer = Observer.open(recipe, [], data, data, torch.device("cpu"))
    passed: list[tuple[str, int]] = []
    for net in (parts.nets.target, parts.nets.online):
        net.outputs = _counting(net.outputs, passed)
    assert observer.measure(parts.step, recipe.objective.phases, survey=False) == {}
    assert passed == [("Encode", 16)]


@attrs.frozen
class UntilLate(Coupled):
    """Trains its denoiser up to t = 0.6."""

    def trained_until(self, path: Interpolant) -> float:
        return 0.6


def test_a_denoiser_is_diagnosed_at_no_later_time_than_it_is_trained(host, tiny_recipe) -> None:
    recipe = load_recipe(host, tiny_recipe, ["probe={images: 16, times: [0.3, 0.9]}"])
    recipe = attrs.evolve(recipe, objective=UntilLate())
    parts = assemble(recipe, torch.device("cpu"))
    data = recipe.data.open()
    chosen = chosen_diagnostics(host, recipe)
    observer = Observer.open(recipe, chosen, data, data, torch.device("cpu"))
    net, asked = parts.nets.target, []
    own = net.outputs

    def noting(*passes):
        asked.extend(float(p.t[0]) for p in passes if isinstance(p, Denoise))
        return own(*passes)

    net.outputs = noting
    figures = observer.measure(parts.step, recipe.objective.phases, survey=True)
    assert asked == pytest.approx([0.3, 0.6])
    assert {"unexplained@0.3", "unexplained@0.9"} <= figures.keys()


def _counting(outputs, passed):
    def counted(*passes):
        passed.extend((type(p).__name__, len(attrs.astuple(p, recurse=False)[0])) for p in passes)
        return outputs(*passes)

    return counted


def test_the_norm_of_a_probe_has_the_statistics_of_its_own_images(host, tiny_recipe) -> None:
    net = load_recipe(host, tiny_recipe).backbone.build(ImageSpec(3, 16, 16, 4))
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with at_rest(net):
        z, raw = own_latents(net, x)
    assert z.mean(dim=(0, 1)).abs().max() < 1e-5
    assert torch.allclose(z.var(dim=(0, 1), correction=0), torch.ones(6), atol=2e-2)
    assert torch.allclose(net.latent_norm.mean, raw.mean(dim=(0, 1)), atol=1e-6)
    assert net.training


def test_gradients_of_the_probe_are_those_of_a_step_and_leave_no_trace(host, tiny_recipe) -> None:
    recipe = load_recipe(host, tiny_recipe)
    parts = assemble(recipe, torch.device("cpu"))
    data = recipe.data.open()
    observer = Observer.open(recipe, [], data, data, torch.device("cpu"))
    before = {k: v.clone() for k, v in parts.step.state_dict().items()}
    state = torch.get_rng_state()
    found = observer.gradients(parts.step, recipe.objective.phases)
    again = observer.gradients(parts.step, recipe.objective.phases)
    assert set(found) == {"reconstruction", "denoising"}
    assert found["denoising"].abs().sum() > 0
    assert all(torch.equal(found[k], again[k]) for k in found)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in parts.step.parameters())
    assert all(torch.equal(v, before[k]) for k, v in parts.step.state_dict().items())
    # The naive objective's gradient through z alone, by hand.
    part = observer.probe.rows(slice(16))
    terms = parts.step.terms(part, draw_for(recipe, part.condition, "probe-draw"), "joint")
    (expected,) = torch.autograd.grad(terms.losses["denoising"], terms.z)
    assert torch.equal(found["denoising"], expected)
