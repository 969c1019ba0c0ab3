"""Load plugins: `load` returns a `Host`, without global state."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

import attrs
import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import e2ediff
from e2ediff.errors import PluginError
from e2ediff.host import builtin, hookspecs
from e2ediff.host.checkout import install_command, uninstalled_plugins
from e2ediff.host.discovery import BUILTIN, Plugin, installed, version_of, words
from e2ediff.host.guard import Hung, StdoutToStderr, time_limit
from e2ediff.host.plugin_file import given_files, read_plugin_file
from e2ediff.host.registry import (
    KINDS,
    Part,
    Registry,
    boundary,
    closest,
    did_you_mean,
    import_named,
)
from e2ediff.terminal import echo

GROUPS = ("ckpt", "plugins")
"""The built-in commands that are groups, to which plugins may add subcommands."""


@attrs.frozen(eq=False)
class Host:
    """The parts by kind, the loaded plugins, and the broken ones.

    `registries` has a registry for each plural of `KINDS`.
    `entries` are the installed plugins; each is loaded in a guard.
    `broken` maps the name of each plugin that was refused or failed to the reason, in one line;
    `printed` has what a plugin wrote to stdout.
    `commands` maps further commands to what `register` was given for them.
    `inferred_data` has the data blocks that were inferred from images, by what was known of them.
    """

    registries: Mapping[str, Registry]
    manager: pluggy.PluginManager
    plugins: list[Plugin] = attrs.field(factory=list)
    broken: dict[str, PluginError] = attrs.field(factory=dict)
    entries: list[Plugin] = attrs.field(factory=list)
    printed: dict[str, str] = attrs.field(factory=dict)
    commands: dict[str, tuple[object, Plugin]] = attrs.field(factory=dict)
    inferred_data: dict[str, Any] = attrs.field(factory=dict)
    _used: set[str] = attrs.field(factory=set)
    _required: set[str] = attrs.field(factory=set)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls the observers: `host.hook.step_ended(run=run, step=3)`."""
        return self.manager.hook

    @property
    def used(self) -> list[Plugin]:
        """Return the plugins that count for a run.

        These are the built-in one, those that a recipe requires or names a part of, those in
        E2EDIFF_LOAD, and those given as a module or a file.
        """
        return [plugin for plugin in self.plugins if plugin.name in self._used]

    def parts(self, kind: str) -> Iterator[Part]:
        """Yield parts of a kind from the `used` plugins, which are what "all" means in a run."""
        return (p for p in self.registries[kind] if p.plugin.name in self._used)

    def usable(self, kind: str) -> Iterator[Part]:
        """Yield all parts of a kind whose class can be imported."""
        for part in self.registries[kind]:
            with contextlib.suppress(PluginError):
                _ = part.cls
                yield part

    def registry_of(self, contract: type) -> Registry | None:
        """Return the registry of the parts of this contract; None for other classes."""
        return next((r for r in self.registries.values() if r.contract is contract), None)

    # Messages about plugins

    def explain_unknown(
        self, plural: str, name: str, known: Collection[str], place: str = "", *, within: str = ""
    ) -> str:
        """Return advice about an unknown part or command, for the end of an error message.

        `plural` is its kind as `add` takes it, `known` the names of that kind, and `place` where
        in a recipe the name stands.
        `within` is what `add` takes before the name of a subcommand: "plugins " for example.
        """
        lost = [f" Plugin {n!r} was not loaded ({why})." for n, why in sorted(self.broken.items())]
        bare = within + name.rpartition(":")[2]
        for found in uninstalled_plugins([_file(place)]):
            if bare in found.parts(plural):
                lost.append(
                    f" {found.name} provides it but is not installed. Run: {found.install}"
                )
                break
        return did_you_mean(name, known) + "".join(lost)

    def missing_requirement(self, requirement: str, place: str = "") -> str:
        """Explain why an entry of `requires` is not met, with advice; "" if it is met.

        `place` is where in a recipe the entry stands.
        """
        try:
            wanted = Requirement(requirement)
        except InvalidRequirement as exc:
            reason = str(exc).splitlines()[0]
            return (
                f"{requirement[:60]!r} is not a valid requirement such as 'numpy>=2' ({reason})."
            )
        if wanted.marker and not wanted.marker.evaluate():
            return ""
        install = f"Run: {install_command(requirement, [_file(place)])}"
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
                if entry.name in self.broken:
                    return f"plugin {entry.name!r} was not loaded ({self.broken[entry.name]})."
                self._used.add(entry.name)
                self._required.add(entry.name)
        return ""

    def entries_named(self, word: str) -> list[Plugin]:
        """Return the installed plugins whose entry point or distribution has this name.

        Raises:
            PluginError: There is none.
        """
        found = [entry for entry in self.entries if entry.matches(word)]
        if not found:
            raise PluginError(f"there is no plugin and no folder {word!r}. {self.meant(word)}")
        return found

    def meant(self, word: str) -> str:
        """Suggest plugins in place of one that is not installed, for an error message."""
        known = did_you_mean(word, [entry.name for entry in self.entries], "Installed")
        beside = next((found for found in uninstalled_plugins() if found.matches(word)), None)
        return f"{known} Run: {beside.install}" if beside else known

    def owner_of(self, error: BaseException) -> str:
        """Return the plugin whose code raised an exception, with file and line; "" for none.

        Calls from its code into ours or torch's count, too.
        """
        owners = {
            part.cls.__module__.partition(".")[0]: part.plugin
            for registry in self.registries.values()
            for part in registry
            if part.plugin.name != BUILTIN and part.imported
        }
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            return ""
        for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
            owner = owners.get(str(frame.f_globals.get("__name__")).partition(".")[0])
            if owner:
                file = os.path.basename(frame.f_code.co_filename)
                return f"plugin {owner}, {file} line {line}"
        return ""

    # Commands and observers

    def command(self, name: str) -> Any:
        """Return the click command that a plugin registered under this name; `None` if none did.

        Raises:
            PluginError: It cannot be imported, or is not a command.
        """
        if name not in self.commands:
            return None
        target, plugin = self.commands[name]
        title = f"command {name!r} of plugin {plugin}: "
        if isinstance(target, str):
            with boundary(plugin, title):
                target = import_named(target)
        if not callable(getattr(target, "main", None)):
            raise PluginError(f"{title}expected a click command, got {target!r}")
        return target

    def observers(self, hook: str) -> list[Plugin]:
        """Return the plugins that are used and observe this hook."""
        used = self._used
        return [p for p in self.plugins if hook in p.hooks and p.name in used]

    def observe(self, hook: str, **arguments: object) -> list[tuple[str, BaseException]]:
        """Call an observer hook of every plugin that is used, and return their errors by plugin.

        An error in one does not stop the others from being called.
        """
        failed: list[tuple[str, BaseException]] = []
        for plugin in self.observers(hook):
            try:
                with contextlib.redirect_stdout(StdoutToStderr()):
                    self._call(hook, plugin, **arguments)
            except (Exception, SystemExit) as exc:  # the plugin boundary
                failed.append((plugin.name, exc))
        return failed

    def _call(self, hook: str, plugin: Plugin, **arguments: object) -> None:
        others = [m for n, m in self.manager.list_name_plugin() if n != plugin.name]
        self.manager.subset_hook_caller(hook, others)(**arguments)

    # Registration

    def add(self, module: object, plugin: Plugin) -> None:
        """Register an imported plugin, and count it among the `used` ones.

        Raises:
            PluginError: It is wrong.
        """
        with boundary(plugin, f"plugin {plugin.name!r}: "):
            self._register(module, plugin)
        self._used.add(plugin.name)

    def _load(self, plugin: Plugin, refusal: str) -> None:
        """Import an installed plugin, unless it is refused; one that fails is in `broken`."""
        try:
            if refusal:
                raise PluginError(refusal)
            with boundary(plugin) as diverted:
                plugin = self._register(plugin.load(), plugin)
            if diverted.first:
                self.printed[plugin.name] = diverted.first
        except PluginError as exc:
            self.broken[plugin.name] = exc
            if isinstance(exc.__cause__, Hung):  # explain the delay, which every command has
                echo(f"plugin {plugin.name!r} {exc}", err=True)
        self.entries.append(plugin)

    def _register(self, module: object, plugin: Plugin) -> Plugin:
        """Register a module's hooks and parts, all or none; return the plugin with its hooks."""
        if other := [known for known in self.plugins if known.name == plugin.name]:
            raise PluginError(f"its name is taken by plugin {other[0]}; choose another one")
        try:
            self.manager.register(module, plugin.name)
            plugin = attrs.evolve(plugin, hooks=_hooks(self.manager, module))
            if "register" in plugin.hooks:
                self._call("register", plugin, add=partial(self._add, plugin))
        except BaseException:
            if self.manager.get_plugin(plugin.name) is module:
                self.manager.unregister(module)
                for registry in self.registries.values():
                    registry.remove(plugin)
                for name, (_, owner) in list(self.commands.items()):
                    if owner.name == plugin.name:
                        del self.commands[name]
            raise
        self.plugins.append(plugin)
        return plugin

    def _add(self, plugin: Plugin, kind: str, name: str, target: Any) -> None:
        """Add a part or command; passed to a plugin's `register` as `add`."""
        if kind == "commands":
            if name in self.commands:
                other = self.commands[name][1]
                raise PluginError(f"command {name!r} is registered by both {other} and {plugin}")
            if " " in name and (within := name.rpartition(" ")[0]) not in GROUPS:
                known = did_you_mean(within, GROUPS, "Groups")
                raise PluginError(f"command {name!r}: there is no group {within!r}. {known}")
            self.commands[name] = (target, plugin)
        elif kind in self.registries:
            self.registries[kind].add(name, target, plugin)
        else:
            known = did_you_mean(str(kind), [*self.registries, "commands"], "Kinds")
            raise PluginError(f"add({kind!r}, {name!r}, ...): unknown kind {kind!r}. {known}")


def load(
    *modules: object,
    entry_points: bool = True,
    builtins: bool = True,
    instead: Mapping[str, str] | None = None,
) -> Host:
    """Return a host with the built-in parts, the installed plugins, and the given modules.

    Plugins named in the environment variable E2EDIFF_BLOCK (by entry point or distribution,
    separated by commas) are left out.
    An installed plugin that fails is recorded in `Host.broken` and affects nothing else; one that
    takes longer to import than E2EDIFF_PLUGIN_TIMEOUT, 10 seconds by default, counts as failed.
    Plugins in E2EDIFF_LOAD must work, and their observers are called in every run.
    E2EDIFF_PLUGIN_FILES lists plugins that are one file, as `--plugin` does.
    E2EDIFF_TRACE=1 reports every hook call on stderr, and at the command line the traceback of
    what a plugin raised in a run.

    Args:
        modules: Further plugins: modules, or any objects with hooks.
        entry_points: Whether installed plugins and those of E2EDIFF_PLUGIN_FILES are loaded.
        builtins: Whether to load the parts that ship with e2ediff.
        instead: Installed plugins that are left out, by name or distribution, and why.

    Raises:
        PluginError: One of `modules` or files is wrong, or one that E2EDIFF_LOAD lists, or
            E2EDIFF_PLUGIN_TIMEOUT is no number of seconds.
    """
    time_limit()  # a wrong value is refused once, not by each plugin
    manager = pluggy.PluginManager("e2ediff")
    manager.add_hookspecs(hookspecs)
    if os.environ.get("E2EDIFF_TRACE") == "1":
        manager.add_hookcall_monitoring(_trace, lambda *_: None)
    required, used = set[str](), set[str]()
    registries = {plural: Registry(kind, plural, of, required, used) for plural, kind, of in KINDS}
    host = Host(registries, manager, required=required, used=used)
    if builtins:
        host.add(builtin, Plugin(BUILTIN, "e2ediff", e2ediff.__version__))
    for plugin in installed() if entry_points else ():
        left_out = [why for word, why in (instead or {}).items() if plugin.matches(word)]
        host._load(plugin, "".join(left_out[:1]) or plugin.refusal())
    if entry_points:
        _use_listed(host)
        for path in given_files():
            host.add(*read_plugin_file(path))
    for module in modules:
        if manager.is_registered(module):
            continue
        name = getattr(module, "__name__", type(module).__name__)
        if module.__hash__ is None:  # as a SimpleNamespace; pluggy keeps plugins in sets
            namespace, module = module, ModuleType(name)
            vars(module).update(vars(namespace))
        host.add(module, Plugin(name))
    return host


def _use_listed(host: Host) -> None:
    for word in words("E2EDIFF_LOAD"):
        meant = [e.name for e in host.entries if e.matches(word)]
        if not meant:
            raise PluginError(f"E2EDIFF_LOAD: there is no plugin {word!r}. {host.meant(word)}")
        for name in meant:
            if name in host.broken:
                raise PluginError(f"E2EDIFF_LOAD: plugin {name!r}: {host.broken[name]}")
            host._used.add(name)


def _hooks(manager: pluggy.PluginManager, module: object) -> tuple[str, ...]:
    """Return the names of a module's hooks.

    Raises:
        PluginError: A hook is misspelt or not marked, or there is none.
    """
    known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "e2ediff_spec")]
    found = sorted(caller.name for caller in manager.get_hookcallers(module) or [])
    for name in found:
        if name not in known:
            kind = name.removeprefix("register_")
            near = closest(name, known)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            if kind in {plural for plural, _, _ in KINDS}:
                meant = f" Write register(add) with add({kind!r}, NAME, CLASS)."
            raise PluginError(f"unknown hook {name!r}.{meant} See docs/reference/hooks.md.")
    if "register" not in found and callable(getattr(module, "register", None)):
        raise PluginError("register is not marked with @e2ediff.hookimpl")
    if not found:
        raise PluginError("has no hook: no function is marked with @e2ediff.hookimpl")
    return tuple(found)


def _file(place: str) -> str:
    """Return the file of a place such as `recipes/quickstart.yaml:7:12`."""
    return place.rsplit(":", 2)[0]


def _trace(hook: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, object]) -> None:
    who = ", ".join(impl.plugin_name for impl in impls) or "nobody"
    echo(f"e2ediff: {hook}({', '.join(arguments)}) -> {who}", err=True)
