"""`plugins new` writes what passes `plugins check`, and `check` says what to change in a part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import attrs
import e2ediff_testing.kit as kit
import pytest
import torch
from command_line import e2ediff, needs
from e2ediff_testing.kinds import KINDS, kind_of
from e2ediff_testing.scaffold import assignment, template_kinds, write_plugin
from e2ediff_testing.source import Source, unbounded
from e2ediff_testing.trials import Trial
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.errors import PluginError
from e2ediff.host import discovery
from e2ediff.host.discovery import Plugin
from e2ediff.host.plugins import load
from e2ediff.host.registry import KINDS as REGISTRIES
from e2ediff.nn.layers import MLP
from e2ediff.objective import Terms
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.objectives import Detached, TwoStage
from e2ediff.parts.optimizers.scheduled import SGD

KIT = Path(__file__).parents[1]
OURS = ("dsd", "unite", "jit", "ldm_is_ae", "rivals", "varfloor")
TITLES = ("documentation", "contract", "recipe round trip", "save and resume", "latent contract",
          "bfloat16")  # fmt: skip


@pytest.fixture(autouse=True)
def forget():
    """What a check imports from a folder."""
    path, modules = [*sys.path], {*sys.modules}
    yield
    sys.path[:] = path
    for name in {*sys.modules} - modules:
        if name.startswith(("e2ediff_my_", "e2ediff_broken")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """Where a plugin is written."""

    def write(kind, name=""):
        return write_plugin(kind, name or f"my_{kind}", str(tmp_path / f"my-{kind}"))

    return write


def only(monkeypatch, *checks):
    """Of all checks these, by title; those that train or start processes take seconds."""
    monkeypatch.setattr(kit, "_ALWAYS", [c for c in kit._ALWAYS if c[0] in checks])
    monkeypatch.setattr(kit, "_TRAINED", [c for c in kit._TRAINED if c[0] in checks])
    if "two processes" not in checks:
        monkeypatch.setattr(kit, "two_processes", lambda trial, source: None)


def test_every_kind_of_part_has_a_row_and_a_template() -> None:
    assert sorted(row.plural for row in KINDS) == sorted(plural for plural, _, _ in REGISTRIES)
    for row in KINDS:
        kind = row.plural if row.plural == "guidance" else row.plural.removesuffix("s")
        assert kind in template_kinds()
        if not row.block:
            assert assignment(kind, "x") == row.assignment("x")
    assert len(template_kinds()) == len(KINDS)


@pytest.mark.parametrize("kind", template_kinds())
def test_a_new_plugin_of_any_kind_passes_the_checks(folder, monkeypatch, kind) -> None:
    """The others are passed by one of them, below."""
    only(monkeypatch, "documentation", "contract", "recipe round trip", "bfloat16")
    source = Source.read(folder(kind))
    assert list(source.problems()) == []
    verdicts = list(kit.check_plugin(source.host(), f"my_{kind}", source=source))
    assert len(verdicts) in (4, 5)
    assert [v for v in verdicts if v.problem] == []


def test_the_command_checks_a_folder_and_says_what_it_checked(folder, monkeypatch) -> None:
    """The tutorial's test runs it with compiled blocks and two processes."""
    only(monkeypatch, *TITLES)
    done = e2ediff("plugins", "check", folder("objective"))
    assert done.code == 0, done.out + done.err
    *checks, last = done.out.splitlines()
    found = [line.removeprefix("ok    objective my_objective  ") for line in checks]
    assert found == [*TITLES, "two processes"]
    assert last == "7 checks passed"


def problems(part, plural):
    """What the checks say of a part, by check."""

    def register(add):
        add(plural, "broken", part)

    host, module = load(entry_points=False), ModuleType("broken")
    module.register = hookimpl(register)
    host.add(module, Plugin("broken"))
    return {v.check: v.problem for v in kit.check_plugin(host, "broken") if v.problem}


@attrs.frozen(kw_only=True)
class Undocumented(Detached):
    """Nothing of its option."""

    speed: float = 1.0


@attrs.frozen(kw_only=True)
class LeaksGradient(Detached):
    """Declares that denoising stops, and lets it through."""

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        losses = {**terms.losses, "denoising": terms.losses["denoising"] + terms.z.mean()}
        return Terms(losses, terms.weights, terms.z)


@attrs.frozen(kw_only=True)
class Counts(SGD):
    """Its factor hangs on how often it was asked, which no checkpoint has."""

    calls: list[int] = attrs.field(factory=list, eq=False, init=False)

    def factor(self, images, total):
        self.calls.append(1)
        return 1 / len(self.calls)


@attrs.frozen(kw_only=True)
class Overflows(Detached):
    """Its loss is no number in half precision."""

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        if torch.is_autocast_enabled("cpu"):
            return Terms({k: v / 0 for k, v in terms.losses.items()}, terms.weights, terms.z)
        return terms


@attrs.frozen(kw_only=True)
class OverflowsLate(TwoStage):
    """So is that of its second phase, which no first step has."""

    trial: ClassVar[Sequence[str]] = ("backbone.trunks=denoiser_apart",)

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        if torch.is_autocast_enabled("cpu") and phase != self.phases[0]:
            return Terms({k: v / 0 for k, v in terms.losses.items()}, terms.weights, terms.z)
        return terms


@attrs.frozen(kw_only=True)
class Reads(Detached):
    """Reads a number from a tensor in every step."""

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        assert terms.z.mean().item() < 1e9
        return terms


@attrs.frozen(kw_only=True)
class Asks(Detached):
    """Weighs losses otherwise where it is compiled."""

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        factor = 5 if torch.compiler.is_compiling() else 1
        losses = {k: factor * v for k, v in terms.losses.items()}
        return Terms(losses, terms.weights, terms.z)


@attrs.frozen(kw_only=True)
class TakesLess(Detached):
    """Lacks an argument."""

    def terms(self, nets, batch):
        return None


@attrs.frozen(kw_only=True)
class TossesACoin(Detached):
    """Decodes only with some draws, and declares the opposite."""

    static_graph: ClassVar[bool] = True

    def terms(self, nets, batch, draw, phase):
        terms = super().terms(nets, batch, draw, phase)
        decodes = float(draw.t[0]) < 0.5
        return Terms(terms.losses, {"reconstruction": float(decodes), "denoising": 1.0}, terms.z)


class InFloat32(MLP):
    """A perceptron that is computed in float32 under autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@attrs.frozen(kw_only=True)
class UsesEveryDigit(ViTConfig):
    """Its blocks have layers that look like those that autocast casts."""

    trial: ClassVar[Sequence[str]] = tuple(
        f"backbone.{key}" for key in ("width=16", "depth=1", "heads=2", "patch=8", "latent_dim=6")
    )

    def build(self, image):
        net = super().build(image)
        for block in net.blocks():
            block.mlp = InFloat32(self.width, 4.0, "gelu")
        return net


@pytest.mark.parametrize(
    ("part", "plural", "check", "says"),
    [
        (Undocumented, "objectives", "documentation", "does not describe `speed`"),
        (LeaksGradient, "objectives", "contract", "wrap its latent in sg(...), or take it out"),
        (Counts, "optimizers", "save and resume", "keep no state but buffers"),
        (Overflows, "objectives", "bfloat16", "take losses in float32"),
        (
            OverflowsLate,
            "objectives",
            "bfloat16",
            "in bfloat16 the loss of denoiser: denoising is",
        ),
        (TossesACoin, "objectives", "contract", "or use it in every step"),
        (UsesEveryDigit, "backbones", "bfloat16", "that FSDP2 does not send: compute"),
        (Reads, "objectives", "compile", "(test_new_and_check.py:1"),
        (Asks, "objectives", "compile", "is_compiling() changes the loss of joint: "),
        (TakesLess, "objectives", "contract", "it is called as docs/reference/contracts.md says"),
    ],
)
def test_a_broken_part_fails_its_check_and_is_told_what_to_change(
    monkeypatch, part, plural, check, says
) -> None:
    only(monkeypatch, "contract", check)
    found = problems(part, plural)
    assert set(found) == {check}
    assert says in found[check]
    assert "\n" not in found[check]


def test_commands_are_imported() -> None:
    """Of a plugin that may have nothing else."""

    def register(add):
        add("commands", "lost", "nowhere:command")
        add("commands", "check", "e2ediff_testing.cli:check")

    host, module = load(entry_points=False), ModuleType("careless")
    module.register = hookimpl(register)
    host.add(module, Plugin("careless", "careless", "1.2"))
    verdict, fine = kit.check_plugin(host, "careless")
    assert (verdict.part, verdict.check) == ("command lost", "contract")
    assert verdict.problem == (
        "command 'lost' of plugin 'careless' (careless 1.2): "
        "ModuleNotFoundError: No module named 'nowhere'"
    )
    assert [*kit.check_plugin(host, "careless", only="check")] == [fine]
    assert fine == kit.Verdict("command check", "contract")


@pytest.mark.usefixtures("forks")
def test_a_step_that_knows_its_process_is_found_out(folder, monkeypatch) -> None:
    only(monkeypatch, "two processes")
    path = folder("objective", "my_odd")
    module = path / "e2ediff_my_odd.py"
    text = module.read_text()
    odd = (
        "        import torch.distributed as d\n"
        "        odd = 2.0 if d.is_initialized() and d.get_rank() == 1 else 1.0\n"
        "        losses = {k: v * odd for k, v in losses.items()}\n"
        "        return Terms("
    )
    module.write_text(text.replace("        return Terms(", odd))
    source = Source.read(path)
    (verdict,) = kit.check_plugin(source.host(), "my_odd", source=source)
    assert verdict.check == "two processes"
    assert "DDP of two processes changes the gradient of joint: " in verdict.problem


def test_a_part_that_does_not_fit_the_small_recipe_says_what_it_needs(folder, monkeypatch) -> None:
    only(monkeypatch, "documentation")
    source = Source.read(folder("backbone"))
    module = source.folder / "e2ediff_my_backbone.py"
    module.write_text(module.read_text().replace("default=8", "default=7"))
    host = source.host()
    (verdict,) = kit.check_plugin(host, "my_backbone")
    assert verdict.check == "fits a recipe"
    assert (
        "backbone.patch: 7 does not divide the image, 16 x 16 (height x width); expected a "
        "divisor of both: 1, 2, 4, 8, 16" in verdict.problem
    )
    assert verdict.problem.endswith("Give what it needs in its `trial`, or with --set.")
    verdicts = list(kit.check_plugin(host, "my_backbone", ["data.size=21"]))
    assert [v.problem for v in verdicts] == ["", ""]


@attrs.frozen(kw_only=True)
class Particular(Detached):
    """Fits where it says."""

    trial: ClassVar[Sequence[str]] = ("backbone.latent_norm=none", "objective.draws=2")


def test_a_part_says_what_it_is_tried_in_and_set_has_the_last_word(monkeypatch, tmp_path) -> None:
    host = load(entry_points=False)
    host.registries["objectives"].add("particular", Particular, Plugin("mine"))
    part = next(p for p in host.registries["objectives"] if p.name == "particular")
    for overrides, draws in ([], 2), (["objective.draws=3"], 3):
        recipe = Trial.prepare(host, "objectives", part, overrides, tmp_path).recipe
        assert (recipe.backbone.latent_norm, recipe.objective.draws) == ("none", draws)
    monkeypatch.setattr(Particular, "trial", "backbone.latent_norm=none")
    (verdict,) = kit.check_plugin(host, "mine")
    assert verdict.problem.startswith("Particular.trial is 'backbone.latent_norm=none': expected")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs(f"e2ediff-{n}".replace("_", "-"))) for n in OURS],
)
def test_every_part_of_our_plugins_fits_the_small_recipe_and_keeps_its_contract(
    monkeypatch, name
) -> None:
    """By what it says itself, without `--set`."""
    only(monkeypatch, "contract")
    host = load()
    verdicts = list(kit.check_plugin(host, name))
    assert verdicts
    assert [v for v in verdicts if v.problem] == []


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs(f"e2ediff-{n}".replace("_", "-"))) for n in OURS],
)
def test_a_part_of_each_of_our_plugins_passes_what_trains(monkeypatch, name) -> None:
    """Two processes and compiled steps, which take longest, are in the tutorial's test."""
    only(monkeypatch, *TITLES)
    host = load()
    kinds = [r for plural, r in host.registries.items() if kind_of(plural).trained]
    parts = [p.name for r in kinds for p in r if p.plugin.name == name]
    part = min(parts, key=parts.count)  # a backbone and an objective share one
    done = e2ediff("plugins", "check", name, "--part", part)
    assert done.code == 0, done.out + done.err
    found = [line.rpartition("  ")[2] for line in done.out.splitlines()[:-1]]
    assert found == [*TITLES, "two processes"] * parts.count(part)


def test_the_command_names_what_fails_and_ends_with_4(folder, monkeypatch) -> None:
    only(monkeypatch, "contract")
    path = folder("interpolant")
    module = path / "e2ediff_my_interpolant.py"
    module.write_text(module.read_text().replace("return -self.alpha_dot(t)", "return t"))
    shutil.rmtree(path / "tests")
    done = e2ediff("plugins", "check", path)
    assert done.code == 4
    assert "FAIL  e2ediff-my-interpolant  package: there is no test; call a check of" in done.out
    assert (
        "FAIL  interpolant my_interpolant  contract: MyInterpolant: sigma_dot is off" in done.out
    )
    assert done.err.startswith(f"error: {path}: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["new", "x", "--kind", "objectiv"], "--kind objectiv: expected one of average, "),
        (["new", "Not-Snake!", "--kind", "objective"], "the name must be snake_case"),
        (["check", "no-such-plugin"], "there is no plugin and no folder 'no-such-plugin'."),
        (["check", "."], "no such file, so this folder is not a plugin"),
    ],
)
def test_a_mistaken_command_says_what_to_do(tmp_path, monkeypatch, words, says) -> None:
    monkeypatch.chdir(tmp_path)
    done = e2ediff("plugins", *words)
    assert done.code in (2, 4)
    assert says in done.err


@pytest.mark.parametrize("form", [str, Path])
def test_a_plugin_is_written_where_a_path_of_any_type_says(tmp_path, form) -> None:
    assert write_plugin("metric", "own", form(tmp_path / "plugin")) == tmp_path / "plugin"


def test_new_does_not_write_into_a_folder_that_holds_something(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        e2ediff("plugins", "new", "my-part", "--kind", "time-sampler").out == "e2ediff-my-part\n"
    )
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == [
        "e2ediff-my-part/README.md",
        "e2ediff-my-part/e2ediff_my_part.py",
        "e2ediff-my-part/pyproject.toml",
        "e2ediff-my-part/tests/test_my_part.py",
    ]
    done = e2ediff("plugins", "new", "my-part", "--kind", "sampler")
    assert (done.code, "is not empty" in done.err) == (4, True)


@pytest.mark.parametrize(
    ("requires", "says"),
    [
        (["torch", "e2ediff>=0.1,<0.2"], []),
        (["e2ediff~=0.1.0"], []),
        (["E2EDiff<=0.1.9"], []),
        (["e2ediff===0.1.0"], []),
        (["e2ediff==0.1.*"], []),
        (["e2ediff==0.*"], ["has no upper bound"]),
        (["e2ediff~=0.1"], ["has no upper bound"]),
        (["e2ediff>=0.1"], ["has no upper bound"]),
        (["e2ediff !!"], ["is no requirement as pip takes it", "does not depend on e2ediff"]),
        ([], ["does not depend on e2ediff"]),
    ],
)
def test_a_package_states_the_e2ediff_it_is_for(requires, says) -> None:
    found = list(unbounded(tuple(requires)))
    assert len(found) == len(says)
    assert all(word in text for word, text in zip(says, found, strict=True))


def test_a_folder_whose_module_is_imported_from_elsewhere_is_refused(folder, tmp_path) -> None:
    path, elsewhere = folder("guidance"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(path / "e2ediff_my_guidance.py", elsewhere)
    sys.path.insert(0, str(path))  # so that it is not put in front again
    sys.path.insert(0, str(elsewhere))
    with pytest.raises(PluginError, match="check the installed plugin by its name instead"):
        Source.read(path).host()


@pytest.mark.parametrize("word", ["new", "check"])
def test_without_the_kit_its_commands_are_unknown_and_name_it(monkeypatch, tmp_path, word) -> None:
    """With the line that installs it, from wherever they are called; the others are there."""
    found_before = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == "e2ediff-testing":
            raise metadata.PackageNotFoundError(name)
        return found_before(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(discovery, "_entries", lambda: iter(()))
    for here, shown in ((KIT.parents[1], "plugins/e2ediff-testing"), (tmp_path, str(KIT))):
        monkeypatch.chdir(here)
        done = e2ediff("plugins", word, "my_objective.py")
        assert done.code == 2
        assert f"Error: unknown command 'plugins {word}'. " in done.err
        assert done.err.endswith(
            f" e2ediff-testing provides it but is not installed. Run: pip install {shown}\n"
        )
    assert e2ediff("plugins", "list").code == 0


# What `plugins new` prints


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("", "pip install ./e2ediff-my-way"),
        ("it's new", "pip install './it'\"'\"'s new'"),
        ("-x", "pip install ./-x"),
        ("below/that", "pip install below/that"),
        ("a[b]", "pip install file://{}/here/a%5Bb%5D"),
        ("{}/absolute", "pip install {}/absolute"),
    ],
    ids=["default", "quotes", "dash", "below", "brackets", "absolute"],
)
def test_what_new_prints_installs_what_it_wrote(out, words, tmp_path, monkeypatch) -> None:
    """As a shell takes it, from the folder in which the user stands; pip fetches nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = [f"--out={out.format(tmp_path)}"] if out else []
    done = e2ediff("plugins", "new", "my-way", "--kind", "objective", *given)
    assert done.code == 0
    following, then = done.err.splitlines()
    command, _, check = following.removeprefix("next: ").rpartition(" && ")
    assert (command, check) == (words.format(tmp_path), "e2ediff plugins check my_way")
    assert then == "then: e2ediff run RECIPE.yaml --set objective=my_way"
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    options = "--no-deps --no-index --no-build-isolation --disable-pip-version-check --quiet"
    target = tmp_path / "target"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@" {options} --target {target}\n')
    pip.chmod(0o755)
    path = f"{pip.parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert (target / "e2ediff_my_way.py").exists()


def test_new_names_a_recipe_that_is_there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text(tiny())
    done = e2ediff("plugins", "new", "mine", "--kind", "regularizer")
    assert done.err.splitlines()[-1] == (
        "then: e2ediff run recipes/quickstart.yaml --set 'regularizers=[mine]'"
    )
