"""Times that differ by token, and a second time: a plugin trains with each."""

from __future__ import annotations

import pytest
import torch
from command_line import e2ediff
from e2ediff_testing import make_batch

import e2ediff as package
from e2ediff.backbone import Denoise
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.interpolant import spread
from e2ediff.model.build import build_nets
from e2ediff.parts.interpolants import Linear

# Each token has a time of its own, as in Diffusion Forcing (Chen et al. 2024, arXiv 2407.01392).
FORCING = """
import attrs
from e2ediff import hookimpl
from e2ediff.backbone import Decode, Denoise
from e2ediff.losses import PixelLoss, clean_loss
from e2ediff.objective import Objective, Terms, sg

@attrs.frozen(kw_only=True)
class Forcing(Objective):
    "A time for each token."

    def stops(self, phase):
        return ("denoising",)

    def terms(self, nets, batch, draw, phase):
        z = nets.online.encode(batch.x)
        t = draw.times.quantile(draw.uniform(*z.shape[:2]))  # (B, N)
        z_t = nets.path.mix(sg(z), draw.noise(z), t)
        x_hat, out = nets.online.run(
            Decode(z=z), Denoise(z_t=z_t, t=t, condition=draw.condition)
        )
        guess = nets.path.estimate(out, z_t, t, nets.predicts)
        losses = {
            "reconstruction": PixelLoss()(x_hat, batch.x, nets.frozen),
            "denoising": clean_loss(guess, sg(z), nets.path, t, "v", 25.0),
        }
        return Terms(losses, dict.fromkeys(losses, 1.0), z)

@hookimpl
def register(add):
    add("objectives", "forcing", Forcing)
"""
# The average velocity u between t and r, as in MeanFlow (Geng et al. 2025, arXiv 2505.13447):
# u = v + (r - t) du/dt with time counted from noise; the slope along the path is a difference.
MEAN_FLOW = """
from typing import ClassVar

import attrs
import torch
from e2ediff import hookimpl
from e2ediff.backbone import Decode, Denoise
from e2ediff.losses import PixelLoss
from e2ediff.objective import Objective, Terms, sg

@attrs.frozen(kw_only=True)
class MeanFlow(Objective):
    "The average velocity between two times, its slope taken over `step`."

    step: float = 0.01
    trains_averages = True
    trial: ClassVar[tuple[str, ...]] = ("predicts=v", "backbone.second_time=true")

    def stops(self, phase):
        return ("denoising",)

    def terms(self, nets, batch, draw, phase):
        z = nets.online.encode(batch.x)
        eps, t = draw.noise(z), draw.t * (1 - self.step)
        r = t + (1 - t) * draw.uniform(len(t))
        z_t, v = nets.path.mix(sg(z), eps, t), nets.path.velocity(sg(z), eps, t)
        x_hat, u = nets.online.run(
            Decode(z=z), Denoise(z_t=z_t, t=t, r=r, condition=draw.condition)
        )
        with torch.no_grad():
            later, passed = t + self.step, z_t + self.step * v
            ahead = Denoise(z_t=passed, t=later, r=torch.maximum(r, later),
                            condition=draw.condition)
            slope = (nets.online.run(ahead)[0] - u) / self.step
            target = v + (r - t)[:, None, None] * slope
        losses = {
            "reconstruction": PixelLoss()(x_hat, batch.x, nets.frozen),
            "denoising": (u - target).square().mean(),
        }
        return Terms(losses, dict.fromkeys(losses, 1.0), z)

    def problems(self, nets):
        if nets.online.second_time:
            return []
        return [("backbone.second_time", "the average velocity needs it; set it to true")]

@hookimpl
def register(add):
    add("objectives", "own_mean_flow", MeanFlow)
"""
SECOND = ("--set", "predicts=v", "--set", "backbone.second_time=true")


@pytest.fixture
def folder(tmp_path, tiny_text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    (tmp_path / "forcing.py").write_text(FORCING)
    (tmp_path / "own_mean_flow.py").write_text(MEAN_FLOW)
    return tmp_path


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("name", ["forcing", "own_mean_flow"])
def test_a_plugin_with_such_times_passes_every_check(folder, name) -> None:
    """Contract, resume bit for bit, bfloat16, compiled steps, two processes."""
    done = e2ediff("plugins", "check", f"{name}.py")
    assert done.code == 0, done.out + done.err


def test_times_of_tokens_train_and_sample(folder) -> None:
    words = ("--plugin", "forcing.py", "--set", "objective=forcing")
    done = e2ediff("run", "tiny.yaml", *words, "--out", "run")
    assert done.code == 0, done.err
    done = e2ediff("sample", "run", *words[:2], "--count", 2, "--format", "npz")
    assert done.code == 0, done.err


def test_an_average_velocity_is_sampled_in_one_step_between_its_times(folder, monkeypatch) -> None:
    """The sampler's step tells the network where it ends, with guidance as without."""
    words = ("--plugin", "own_mean_flow.py", "--set", "objective=own_mean_flow", *SECOND)
    done = e2ediff("run", "tiny.yaml", *words, "--set", "steps=40", "--out", "run")
    assert done.code == 0, done.err
    monkeypatch.setenv("E2EDIFF_PLUGIN_FILES", str(folder / "own_mean_flow.py"))
    plain = "sampler={name: euler, steps: 2}"
    model = package.load("run", device="cpu", overrides=[plain])
    seen = []

    def watched(*passes, run=model.net.outputs):
        asked = [p for p in passes if isinstance(p, Denoise)]
        seen.extend((float(p.t[0]), float((p.t if p.r is None else p.r)[0])) for p in asked)
        return run(*passes)

    monkeypatch.setattr(model.net, "outputs", watched)
    whole = model.sample([0, 1])
    assert seen == [(0.0, 0.5), (0.5, 1.0)]
    seen.clear()
    guided = package.load(
        "run", device="cpu", overrides=[plain, "guidance={name: classifier_free, scale: 2}"]
    )
    monkeypatch.setattr(guided.net, "outputs", watched)
    guided.sample([0, 1])
    assert {*seen} == {(0.0, 0.5), (0.5, 1.0)}
    for sampler, asked in {
        "average_velocity": [(0.0, 1.0)],
        "{name: heun, steps: 2}": [(0.0, 0.0), (0.5, 0.5), (0.5, 0.5)],
    }.items():
        seen.clear()
        other = package.load("run", device="cpu", overrides=[f"sampler={sampler}"])
        monkeypatch.setattr(other.net, "outputs", watched)
        other.sample([0, 1])
        assert seen == asked, "steps of higher order are made of velocities at single times"
    monkeypatch.undo()
    # The second time matters: without it the network is asked for the velocity at t.
    z, t = torch.randn(2, model.net.latent.tokens, model.net.latent.dim), torch.zeros(2)
    null = model.image.conditioning.null(2, torch.device("cpu"))
    with torch.no_grad():
        at, to = model.net.run(
            Denoise(z_t=z, t=t, condition=null), Denoise(z_t=z, t=t, r=t + 1, condition=null)
        )
    assert not torch.allclose(at, to)
    assert whole.isfinite().all()


def test_a_recipe_without_a_second_time_is_refused_by_what_needs_it(folder) -> None:
    words = (
        "--plugin",
        "own_mean_flow.py",
        "--set",
        "objective=own_mean_flow",
        "--set",
        "predicts=v",
    )
    done = e2ediff("check", "tiny.yaml", *words)
    assert (done.code, "backbone.second_time: the average velocity needs it" in done.err) == (
        3,
        True,
    )


def test_a_sampler_of_average_velocities_is_refused_by_a_network_with_one_time(folder) -> None:
    words = ("--set", "sampler=average_velocity")
    done = e2ediff("check", "tiny.yaml", *words)
    assert done.code == 3
    assert "sampler: follows average velocities" in done.err
    assert "choose another, such as euler" in done.err
    assert "or train with backbone.second_time: true" in done.err
    untrained = (*words, "--set", "backbone.second_time=true")
    done = e2ediff("check", "tiny.yaml", *untrained)
    assert done.code == 3, "its second time was never trained"
    assert e2ediff("run", "tiny.yaml", "--out", "run").code == 0
    done = e2ediff("sample", "run", *words, "--count", 2, "--format", "npz")
    assert done.code == 3
    assert "sampler: follows average velocities" in done.err


# Laws


@pytest.mark.parametrize("modulation", ["block", "shared", "lowrank"])
def test_times_of_tokens_that_are_equal_give_the_answer_of_one_time(tiny_text, modulation) -> None:
    host = load(entry_points=False)
    words = [
        "objective=detached",
        f"backbone.modulation={modulation}",
        "backbone.second_time=true",
    ]
    net = build_nets(parse_recipe(host, tiny_text, "tiny", words), torch.device("cpu"))[0].online
    with torch.no_grad():
        for p in net.parameters():  # blocks begin as the identity
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batch = make_batch(net.image)
    z, t = net.encode(batch.x), torch.linspace(0.1, 0.9, len(batch.x))
    one = Denoise(z_t=z, t=t, r=t + 0.05, condition=batch.condition)
    n = z.shape[1]
    each = Denoise(z_t=z, t=t[:, None].expand(-1, n), r=t + 0.05, condition=batch.condition)
    both = net.run(one, each)
    torch.testing.assert_close(*both)
    other = t[:, None].repeat(1, n)
    other[:, 0] = 0.0
    (out,) = net.run(Denoise(z_t=z, t=other, r=t + 0.05, condition=batch.condition))
    assert not torch.allclose(out, both[0])


def test_a_path_mixes_and_reads_back_each_token_at_its_own_time() -> None:
    path, g = Linear(), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 5, 2, generator=g), torch.randn(3, 5, 2, generator=g)
    t = torch.rand(3, 5, generator=g).clamp(0.1, 0.9)
    z_t = path.mix(x0, eps, t)
    for i in range(5):
        torch.testing.assert_close(
            z_t[:, i : i + 1], path.mix(x0[:, i : i + 1], eps[:, i : i + 1], t[:, i])
        )
    found = path.estimate(path.velocity(x0, eps, t), z_t, t, "v")
    torch.testing.assert_close(found.x0, x0)
    torch.testing.assert_close(found.eps, eps)
    assert spread(t, x0).shape == (3, 5, 1)
    assert spread(t[:, 0], x0).shape == (3, 1, 1)
