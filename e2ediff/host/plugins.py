"""Loading plugins: `load` returns a `Host`, and nothing about it is global."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from types import ModuleType

import attrs
import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import e2ediff
from e2ediff.errors import PluginError
from e2ediff.host import hookspecs
from e2ediff.host.checkout import uninstalled_plugins
from e2ediff.host.discovery import BUILTIN, Entry, installed, version_of, words
from e2ediff.host.guard import cause, guarded, time_limit
from e2ediff.host.registry import KINDS, Plugin, Registry, closest, did_you_mean
from e2ediff.host.survey import Finding, survey


@attrs.frozen(eq=False)
class Host:
    """The parts by kind, the plugins that were imported, and those that are of no use.

    `registries` has a registry for each plural of `KINDS`.
    `entries` are the installed plugins.
    One is imported when a recipe requires its distribution or names a part of it, and when
    E2EDIFF_LOAD lists it; until then nothing of it has run in this process.
    `broken` maps the name of each plugin that was refused or failed to the reason, in one line,
    and `errors` to the exception; `printed` has what a plugin wrote to stdout.
    """

    registries: Mapping[str, Registry]
    manager: pluggy.PluginManager
    plugins: list[Plugin] = attrs.field(factory=list)
    broken: dict[str, str] = attrs.field(factory=dict)
    entries: Sequence[Entry] = ()
    errors: dict[str, BaseException] = attrs.field(factory=dict)
    printed: dict[str, str] = attrs.field(factory=dict)
    _findings: dict[str, Finding] = attrs.field(factory=dict)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls the observers: `host.hook.step_ended(run=run, step=3)`."""
        return self.manager.hook

    def registry_of(self, contract: type) -> Registry | None:
        """The registry of the parts that keep this contract, if it is one."""
        for registry in self.registries.values():
            if registry.contract is contract:
                return registry
        return None

    # Plugins that are installed

    def load_plugin(self, name: str) -> None:
        """Import an installed plugin in its guard; one that fails joins `broken`."""
        (entry,) = [e for e in self.entries if e.name == name]
        if name in self.broken or any(p.name == name for p in self.plugins):
            return
        plugin = Plugin(name, entry.distribution, entry.version)
        try:
            with guarded(time_limit()) as aside:
                self._register(entry.load(), plugin)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # the plugin boundary: SystemExit and stranger ones, too
            what, missing = cause(exc), entry.missing()
            if isinstance(exc, ImportError) and missing:
                what += f"; run: {_install(missing)}"
            self.broken[name], self.errors[name] = what, exc
        else:
            if aside.first:
                self.printed[name] = aside.first

    def load_all(self) -> None:
        """Import every installed plugin that a survey finds sound."""
        for name, found in self.survey().items():
            if not found.broken:
                self.load_plugin(name)

    def survey(self, *, fresh: bool = False) -> Mapping[str, Finding]:
        """What installed plugins bring that are not imported yet, found in another process.

        Args:
            fresh: Whatever was found earlier.
        """
        known = {p.name for p in self.plugins} | {*self.broken}
        wanted = [
            e
            for e in self.entries
            if e.name not in known and (fresh or e.name not in self._findings)
        ]
        for name, found in survey(wanted, fresh=fresh).items():
            self._findings[name] = found
            if found.broken:
                self.broken[name] = found.broken
        return self._findings

    def seek(self, registry: Registry, name: str) -> None:
        """Import every plugin that registers this name, be it `name` or `plugin:name`.

        An earlier finding is believed when it has the name, and is found anew when it has not.
        """
        bare = name.rpartition(":")[2]
        for fresh in (False, True):
            for plugin, found in dict(self.survey(fresh=fresh)).items():
                if bare in found.parts.get(registry.plural, ()) and not found.broken:
                    self.load_plugin(plugin)
            loaded = {p.name for p in self.plugins}
            kept = [n for n, found in self._findings.items() if found.kept and n not in loaded]
            if not kept or any(part.answers(name) for part in registry):
                return

    def why_unknown(self, registry: Registry, name: str, place: str = "") -> str:
        """What to do about a name that a registry lacks, for the end of an error message.

        `place` is where in a recipe the name stands.
        """
        brought = [n for f in self._findings.values() for n in f.parts.get(registry.plural, ())]
        lost = [f" Plugin {n!r} was not loaded ({why})." for n, why in sorted(self.broken.items())]
        bare = name.rpartition(":")[2]
        for found in uninstalled_plugins([_file(place)]):
            if found.registers(registry.plural, bare):
                lost.append(f" {found.name} brings it and is not installed. Run: {found.install}")
                break
        return did_you_mean(name, {*registry.names(), *brought}) + "".join(lost)

    def unmet(self, requirement: str, place: str = "") -> str:
        """Why this entry of a recipe's `requires` is not met, and the way out; "" if it is.

        The plugins of a distribution that is there are imported.
        `place` is where in a recipe the entry stands.
        """
        try:
            wanted = Requirement(requirement)
        except InvalidRequirement as exc:
            reason = str(exc).splitlines()[0]
            return f"{requirement[:60]!r} is no requirement such as 'numpy>=2' ({reason})."
        if wanted.marker and not wanted.marker.evaluate():
            return ""
        install = f"Run: {_install(requirement, [_file(place)])}"
        try:
            found = version_of(wanted.name)
        except metadata.PackageNotFoundError:
            return f"{wanted.name} is not installed. {install}"
        except PluginError as exc:
            return f"{exc}."
        if not wanted.specifier.contains(found, prereleases=True):
            return f"{wanted.name} {found} is installed, not {requirement}. {install}"
        for entry in self.entries:
            if canonicalize_name(entry.distribution) == canonicalize_name(wanted.name):
                self.load_plugin(entry.name)
                if entry.name in self.broken:
                    return f"plugin {entry.name!r} was not loaded ({self.broken[entry.name]})."
        return ""

    def meant(self, word: str) -> str:
        """Which plugins there are instead of one that is not installed, for an error message."""
        known = did_you_mean(word, [entry.name for entry in self.entries], "Installed")
        beside = next((found for found in uninstalled_plugins() if found.answers(word)), None)
        return f"{known} Run: {beside.install}" if beside else known

    # Hooks

    def register_commands(self, group: object) -> None:
        """Let plugins add commands to a click group; one that fails joins `broken`."""
        for name, found in self.survey().items():
            if "register_commands" in found.hooks:
                self.load_plugin(name)
        for plugin in self.plugins:
            if "register_commands" not in plugin.hooks:
                continue
            try:
                with guarded(time_limit()):
                    self._call("register_commands", plugin, group=group)
            except KeyboardInterrupt:
                raise
            except BaseException as exc:  # the plugin boundary
                self.broken[plugin.name] = cause(exc)

    def owner_of(self, error: BaseException) -> str:
        """The plugin in whose code an exception was raised, with file and line; "" for none.

        Also where its code called ours or torch's, and these raised.
        """
        owners = {
            part.cls.__module__.partition(".")[0]: part.plugin
            for registry in self.registries.values()
            for part in registry
            if part.plugin.name != BUILTIN
        }
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            return ""
        for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
            owner = owners.get(str(frame.f_globals.get("__name__")).partition(".")[0])
            if owner:
                file = os.path.basename(frame.f_code.co_filename)
                return f"plugin {owner}, {file} line {line}"
        return ""

    def observe(self, hook: str, **arguments: object) -> list[tuple[str, BaseException]]:
        """Call an observer hook of every plugin, and return who raised what.

        One that raises does not keep the next from being called.
        """
        failed: list[tuple[str, BaseException]] = []
        if not getattr(self.hook, hook).get_hookimpls():
            return failed
        for plugin in [p for p in self.plugins if hook in p.hooks]:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    self._call(hook, plugin, **arguments)
            except (Exception, SystemExit) as exc:  # the plugin boundary
                failed.append((plugin.name, exc))
        return failed

    def _call(self, hook: str, plugin: Plugin, **arguments: object) -> None:
        others = [m for n, m in self.manager.list_name_plugin() if n != plugin.name]
        self.manager.subset_hook_caller(hook, others)(**arguments)

    def add(self, module: object, plugin: Plugin) -> None:
        """Register a plugin that is imported already.

        Raises:
            PluginError: It is wrong.
        """
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._register(module, plugin)
        except Exception as exc:  # the plugin boundary
            raise PluginError(f"plugin {plugin.name!r}: {cause(exc)}") from exc

    def _register(self, module: object, plugin: Plugin) -> None:
        """Register a module's hooks and parts, all or none of them."""
        try:
            self.manager.register(module, plugin.name)
            plugin = attrs.evolve(plugin, hooks=_hooks(self.manager, module))
            for plural, registry in self.registries.items():
                if f"register_{plural}" in plugin.hooks:
                    add = partial(_add, registry, plugin)
                    self._call(f"register_{plural}", plugin, add=add)
        except BaseException:
            if self.manager.get_plugin(plugin.name) is module:
                self.manager.unregister(module)
                for registry in self.registries.values():
                    registry.remove(plugin)
            raise
        self.plugins.append(plugin)


def load(*modules: object, entry_points: bool = True, builtins: bool = True) -> Host:
    """A host with the built-in parts and the modules given; installed plugins wait until needed.

    Plugins named in the environment variable E2EDIFF_BLOCK (by entry point or distribution,
    separated by commas) are left out, those in E2EDIFF_LOAD are imported at once.
    An installed plugin that fails is recorded in `Host.broken` and hurts nobody else.
    E2EDIFF_TRACE=1 reports every hook call on stderr, and at the command line the traceback of
    what a plugin raised in a run.

    Args:
        modules: Further plugins: modules, or any objects with hooks.
        entry_points: Whether installed plugins can be found.
        builtins: Whether to load the parts that ship with e2ediff.

    Raises:
        PluginError: One of `modules` is wrong, or one that E2EDIFF_LOAD lists.
    """
    manager = pluggy.PluginManager("e2ediff")
    manager.add_hookspecs(hookspecs)
    if os.environ.get("E2EDIFF_TRACE") == "1":
        manager.add_hookcall_monitoring(_trace, lambda *_: None)
    registries = {plural: Registry(kind, plural, of) for plural, kind, of in KINDS}
    host = Host(registries, manager, entries=installed() if entry_points else ())
    if builtins:
        from e2ediff.host import builtin  # imports every part, and those import this package

        host._register(builtin, Plugin(BUILTIN, "e2ediff", e2ediff.__version__))
    if host.entries:
        for registry in registries.values():
            registry.seekers.append(host.seek)
        host.broken.update({e.name: why for e in host.entries if (why := e.refusal())})
        _load_listed(host)
    for module in modules:
        if manager.is_registered(module):
            continue
        name = getattr(module, "__name__", type(module).__name__)
        if module.__hash__ is None:  # a SimpleNamespace; pluggy keeps plugins in sets
            namespace, module = module, ModuleType(name)
            vars(module).update(vars(namespace))
        host.add(module, Plugin(name))
    return host


def _load_listed(host: Host) -> None:
    for word in words("E2EDIFF_LOAD"):
        meant = [e.name for e in host.entries if e.answers(word)]
        if not meant:
            raise PluginError(f"E2EDIFF_LOAD: there is no plugin {word!r}. {host.meant(word)}")
        for name in meant:
            host.load_plugin(name)
            if name in host.broken:
                raise PluginError(f"E2EDIFF_LOAD: plugin {name!r}: {host.broken[name]}")


def _hooks(manager: pluggy.PluginManager, module: object) -> tuple[str, ...]:
    """Names of a module's hooks.

    Raises:
        PluginError: A hook is misspelt or not marked, or there is none.
    """
    known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "e2ediff_spec")]
    found = sorted(caller.name for caller in manager.get_hookcallers(module) or [])
    for name in found:
        if name not in known:
            near = closest(name, known)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise PluginError(f"unknown hook {name!r}.{meant} See docs/reference/hooks.md.")
    for name in known:
        if name.startswith("register_") and name not in found and hasattr(module, name):
            raise PluginError(f"{name} is not marked with @e2ediff.hookimpl")
    if not found:
        raise PluginError("has no hook: no function is marked with @e2ediff.hookimpl")
    return tuple(found)


def _install(requirement: str, near: Sequence[str] = ()) -> str:
    """The command that installs a distribution: from its folder, if that is known."""
    with contextlib.suppress(InvalidRequirement):
        wanted = Requirement(requirement)
        for found in uninstalled_plugins(near):
            if found.satisfies(wanted):
                return found.install
    return f"pip install {shlex.quote(requirement)}"


def _file(place: str) -> str:
    """The file of a place such as `recipes/quickstart.yaml:7:12`."""
    return place.rsplit(":", 2)[0]


def _add(registry: Registry, plugin: Plugin, name: str, cls: type) -> None:
    registry.add(name, cls, plugin)


def _trace(hook: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, object]) -> None:
    who = ", ".join(impl.plugin_name for impl in impls) or "nobody"
    sys.stderr.write(f"e2ediff: {hook}({', '.join(arguments)}) -> {who}\n")
