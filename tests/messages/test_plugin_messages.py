"""Plugins that are wrong: what is said of them, and that nobody else is hurt."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import attrs
import click
import pytest
import torch
from tiny_parts import plugin

from e2ediff import hookimpl
from e2ediff.errors import DuplicateNameError, PluginError
from e2ediff.host.plugins import load
from e2ediff.times import TimeSampler


@attrs.frozen(kw_only=True)
class Uniform(TimeSampler):
    def quantile(self, u):
        return u


class Plain(TimeSampler):
    def quantile(self, u):
        return u


@attrs.frozen
class Unfinished(TimeSampler):
    pass


@attrs.frozen
class Named(Uniform):
    name: str = "x"


@attrs.frozen
class HoldsTensor(Uniform):
    weights: torch.Tensor | None = None


@attrs.frozen
class Unresolved(Uniform):
    weights: Nowhere = None  # noqa: F821


def times_plugin(name, cls, plugin_name="mine"):
    return plugin(plugin_name, time_samplers=[(name, cls)])


def refusal(*modules):
    with pytest.raises(PluginError) as caught:
        load(*modules, entry_points=False, builtins=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("Uniform", Uniform, "the name must be snake_case, such as 'variance_floor'"),
        ("log-normal", Uniform, "the name must be snake_case, such as 'variance_floor'"),
        ("x", int, "expected a subclass of e2ediff.times.TimeSampler, got <class 'int'>"),
        ("x", Uniform(), "expected a subclass of e2ediff.times.TimeSampler, got Uniform()"),
        ("x", Plain, "decorate Plain with @attrs.frozen(kw_only=True)"),
        ("x", Unfinished, "Unfinished does not implement quantile"),
        ("x", Named, "the option 'name' collides with the part's own name"),
        ("x", HoldsTensor, "a recipe cannot hold option 'weights' of type torch.Tensor | None"),
        (
            "x",
            Unresolved,
            "the types of Unresolved's options: NameError: name 'Nowhere' is not defined",
        ),
    ],
)
def test_a_class_that_is_no_part_is_refused_with_what_was_expected(name, cls, message):
    found = refusal(times_plugin(name, cls))
    assert found == f"plugin 'mine': time sampler {name!r} of plugin 'mine': {message}"


def test_a_misspelt_hook_is_named_with_the_right_one():
    @hookimpl
    def registr(add):
        pass

    found = refusal(SimpleNamespace(__name__="oops", registr=registr))
    assert found == (
        "plugin 'oops': unknown hook 'registr'. Did you mean 'register'? "
        "See docs/reference/hooks.md."
    )


def test_a_hook_of_an_earlier_version_is_told_what_to_write():
    @hookimpl
    def register_time_samplers(add):
        pass

    found = refusal(SimpleNamespace(__name__="old", register_time_samplers=register_time_samplers))
    assert found == (
        "plugin 'old': unknown hook 'register_time_samplers'. Write register(add) with "
        "add('time_samplers', NAME, CLASS). See docs/reference/hooks.md."
    )


@pytest.mark.parametrize(
    ("kind", "meant"),
    [
        ("objective", " Did you mean 'objectives'?"),
        ("time-samplers", " Did you mean 'time_samplers' or "),
        ("x", ""),
    ],
)
def test_a_misspelt_kind_is_named_with_the_right_one(kind, meant):
    found = refusal(plugin("mine", **{kind: [("x", Uniform)]}))
    assert found.startswith(
        f"plugin 'mine': add({kind!r}, 'x', ...): unknown kind {kind!r}.{meant}"
    )
    assert "commands" in found


def test_text_that_names_no_class_is_refused_at_once_and_a_class_that_is_not_there_when_named():
    found = refusal(times_plugin("x", "nowhere.Mine"))
    assert found == (
        "plugin 'mine': time sampler 'x' of plugin 'mine': expected a class or 'module:Class', "
        "got 'nowhere.Mine'"
    )
    host = load(
        times_plugin("x", "nowhere:Mine"), times_plugin("y", "math:pi", "other"),
        entry_points=False, builtins=False,
    )  # fmt: skip
    times = host.registries["time_samplers"]
    assert times.names() == ["x", "y"]
    with pytest.raises(PluginError) as caught:
        times.find("x")
    assert str(caught.value) == (
        "time sampler 'x' of plugin 'mine' cannot be imported from nowhere:Mine "
        "(ModuleNotFoundError: No module named 'nowhere')"
    )
    with pytest.raises(PluginError, match=r"expected a subclass of .*TimeSampler, got 3\.14"):
        times.find("y")
    assert [part.name for part in host.usable("time_samplers")] == []


def test_text_is_imported_when_the_part_is_named_and_not_before(tmp_path, monkeypatch):
    (tmp_path / "late_times.py").write_text(PART.partition("@hookimpl")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    host = load(
        times_plugin("late", "late_times:Mine"), times_plugin("early", Uniform, "other"),
        entry_points=False, builtins=False,
    )  # fmt: skip
    times = host.registries["time_samplers"]
    assert times.name_of(times.get("early")) == "early"
    assert "late_times" not in sys.modules
    assert times.name_of(times.get("late")) == "late"
    assert sys.modules.pop("late_times").Mine is times.get("late")


def test_a_hook_without_its_mark_is_not_passed_over():
    found = refusal(SimpleNamespace(__name__="mine", register=lambda add: None))
    assert found == "plugin 'mine': register is not marked with @e2ediff.hookimpl"


def test_a_plugin_without_hooks_is_an_error():
    assert refusal(SimpleNamespace(__name__="empty")) == (
        "plugin 'empty': has no hook: no function is marked with @e2ediff.hookimpl"
    )


def test_a_hook_with_a_foreign_argument_names_it():
    @hookimpl
    def run_started(run, speed):
        pass

    found = refusal(SimpleNamespace(__name__="fast", run_started=run_started))
    assert "speed" in found
    assert "\n" not in found


def test_a_hook_may_leave_arguments_out():
    seen = []

    @hookimpl
    def losses_logged(losses):
        seen.append(losses)

    host = load(SimpleNamespace(losses_logged=losses_logged), entry_points=False, builtins=False)
    host.hook.losses_logged(run=None, step=1, losses={"a": 1.0})
    assert seen == [{"a": 1.0}]


def test_hosts_share_nothing():
    full = load(times_plugin("x", Uniform), entry_points=False, builtins=False)
    empty = load(entry_points=False, builtins=False)
    assert full.registries["time_samplers"].get("x") is Uniform
    assert empty.registries["time_samplers"].names() == []
    assert empty.plugins == []


def test_an_unknown_name_suggests_the_known_ones():
    host = load(times_plugin("uniform", Uniform), entry_points=False, builtins=False)
    with pytest.raises(PluginError) as caught:
        host.registries["time_samplers"].get("unifrom")
    assert str(caught.value) == (
        "unknown time sampler 'unifrom'. Did you mean 'uniform'? Known: uniform."
    )


def test_a_name_registered_twice_is_an_error_only_when_it_is_used():
    one, two = times_plugin("x", Uniform, "one"), times_plugin("x", Uniform, "two")
    times = load(one, two, entry_points=False, builtins=False).registries["time_samplers"]
    assert times.names() == ["one:x", "two:x"]
    with pytest.raises(DuplicateNameError) as caught:
        times.get("x")
    assert str(caught.value) == (
        "time sampler 'x' is registered by both 'one' and 'two'; "
        "choose by writing 'one:x' or 'two:x', or block one with E2EDIFF_BLOCK=two"
    )


def test_the_name_of_a_built_in_part_cannot_be_taken():
    found = refusal(
        times_plugin("uniform", Uniform, "e2ediff"),
        times_plugin("uniform", Uniform, "copycat"),
    )
    assert "time sampler 'uniform' is registered by both 'e2ediff' and 'copycat'" in found


# Installed plugins: real files and real metadata, in directories of their own.


PART = """
import attrs
from e2ediff import hookimpl
from e2ediff.times import TimeSampler

@attrs.frozen
class Mine(TimeSampler):
    def quantile(self, u):
        return u

@hookimpl
def register(add):
    add("time_samplers", {name!r}, Mine)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a module as a plugin: its distribution and its entry point are called alike."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def add(name, source, *, entry="", requires=""):
        module = f"plugin_{name.replace('-', '_')}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        requires = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{requires}"
        )
        (info / "entry_points.txt").write_text(f"[e2ediff]\n{entry or name} = {module}\n")

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def installed():
    return load(builtins=False)


def test_a_plugin_that_fails_is_recorded_and_the_others_work(install):
    install("sound", PART.format(name="sound"))
    install("a-missing", "import not_a_module")
    install("a-exits", "raise SystemExit(3)")
    install("a-misspelt", PART.format(name="x") + "\n@hookimpl\ndef run_startd(run): pass\n")
    install("a-raises", PART.format(name="half") + "    raise RuntimeError('two\\nlines')\n")
    install("a-number", "thing = 3", entry="a-number")
    install("a-old", PART.format(name="old"), requires="e2ediff>=99")
    host = installed()
    assert host.registries["time_samplers"].names() == ["sound"]
    ours = {name: str(why) for name, why in host.broken.items() if name.startswith("a-")}
    assert ours == {
        "a-missing": "ModuleNotFoundError: No module named 'not_a_module'",
        "a-exits": "SystemExit: 3",
        "a-misspelt": "unknown hook 'run_startd'. Did you mean 'run_started'? "
        "See docs/reference/hooks.md.",
        "a-raises": "RuntimeError: two lines",
        "a-number": "has no hook: no function is marked with @e2ediff.hookimpl",
        "a-old": "needs e2ediff>=99, this is e2ediff 0.1.0",
    }
    plugin = next(p for p in host.plugins if p.name == "sound")
    assert str(plugin) == "'sound' (sound 1.2)"
    assert plugin.hooks == ("register",)


def test_two_distributions_with_one_entry_point_name_are_told_apart(install):
    install("dist-a", PART.format(name="x"), entry="same")
    install("dist-b", PART.format(name="x"), entry="same")
    times = installed().registries["time_samplers"]
    assert times.names() == ["dist-a/same:x", "dist-b/same:x"]
    assert times.get("dist-b:x").__module__ == "plugin_dist_b"
    with pytest.raises(DuplicateNameError, match=r"'dist-a/same' \(dist-a 1.2\) and "):
        times.get("x")


@pytest.mark.parametrize("word", ["same", "dist-a"])
def test_a_blocked_plugin_is_not_imported(install, monkeypatch, word):
    install("dist-a", "raise RuntimeError('imported')", entry="same")
    monkeypatch.setenv("E2EDIFF_BLOCK", f"other, {word}")
    assert str(installed().broken["same"]) == "blocked by E2EDIFF_BLOCK"


def test_a_required_plugin_that_is_installed_but_broken_says_why(install):
    install("dist-c", "import not_a_module", entry="cee")
    assert installed().missing_requirement("dist-c>=1") == (
        "plugin 'cee' was not loaded (ModuleNotFoundError: No module named 'not_a_module')."
    )


def test_what_plugins_print_stays_out_of_stdout(install, capsys):
    install("chatty", "print('hello')\n" + PART.format(name="x") + "    print('again')\n")
    installed()
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello\nagain\n" in err


def test_a_trace_names_every_hook_call_and_who_answers(install):
    env = {**os.environ, "E2EDIFF_TRACE": "1"}
    program = (
        "from e2ediff.host.plugins import load; h = load(entry_points=False, builtins=False);"
        "h.hook.step_ended(run=None, step=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == "e2ediff: step_ended(run, step) -> nobody\n"


def test_a_command_that_is_none_says_whose_it_is_and_two_of_one_name_are_refused():
    mine = plugin("mine", commands=[("hello", click.Command("hello")), ("number", 3)])
    host = load(mine, plugin("late", commands=[("lost", "nowhere:command")]), entry_points=False)
    assert host.command("hello").name == "hello"
    assert host.command("nothing") is None
    for name, said in (
        ("number", "command 'number' of plugin 'mine': expected a click command, got 3"),
        (
            "lost",
            "command 'lost' of plugin 'late': ModuleNotFoundError: No module named 'nowhere'",
        ),
    ):
        with pytest.raises(PluginError) as caught:
            host.command(name)
        assert str(caught.value) == said
    found = refusal(mine, plugin("other", commands=[("hello", click.Command("hello"))]))
    assert found.endswith("command 'hello' is registered by both 'mine' and 'other'")
