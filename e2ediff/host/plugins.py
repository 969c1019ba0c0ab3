"""Loading plugins: `load` returns a `Host`, and nothing about it is global."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from e2ediff.host.registry import BUILTIN, KINDS, Plugin, Registry, closest, did_you_mean

GROUP = "e2ediff"


@attrs.frozen(eq=False)
class Host:
    """What was loaded: the parts by kind, the plugins, and those that could not be loaded.

    `registries` has a registry for each plural of `KINDS`; `broken` maps the name of each plugin
    that was not loaded to the reason, in one line.
    """

    registries: Mapping[str, Registry]
    manager: pluggy.PluginManager
    plugins: list[Plugin] = attrs.field(factory=list)
    broken: dict[str, str] = attrs.field(factory=dict)

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

    def why_unknown(self, registry: Registry, name: str) -> str:
        """What to do about a name that a registry lacks, for the end of an error message."""
        lost = [f" Plugin {n!r} was not loaded ({why})." for n, why in sorted(self.broken.items())]
        return did_you_mean(name, registry.names()) + "".join(lost)

    def unmet(self, requirement: str) -> str:
        """Why this entry of a recipe's `requires` is not met, and the way out; "" if it is."""
        try:
            wanted = Requirement(requirement)
        except InvalidRequirement as exc:
            reason = str(exc).splitlines()[0]
            return f"{requirement[:60]!r} is no requirement such as 'numpy>=2' ({reason})."
        if wanted.marker and not wanted.marker.evaluate():
            return ""
        install = f"Run: pip install {shlex.quote(requirement)}"
        try:
            found = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            return f"{wanted.name} is not installed. {install}"
        if not wanted.specifier.contains(found.version, prereleases=True):
            return f"{wanted.name} {found.version} is installed, not {requirement}. {install}"
        for entry in found.entry_points.select(group=GROUP):
            for name in (entry.name, f"{found.name}/{entry.name}"):
                if name in self.broken:
                    return f"plugin {name!r} was not loaded ({self.broken[name]})."
        return ""

    def register_commands(self, group: object) -> None:
        """Let plugins add commands to a click group; one that fails joins `broken`."""
        for plugin in self.plugins:
            if "register_commands" not in plugin.hooks:
                continue
            try:
                self._call("register_commands", plugin, group=group)
            except (Exception, SystemExit) as exc:  # the plugin boundary
                self.broken[plugin.name] = cause(exc)

    def _call(self, hook: str, plugin: Plugin, **arguments: object) -> None:
        others = [m for n, m in self.manager.list_name_plugin() if n != plugin.name]
        with contextlib.redirect_stdout(sys.stderr):
            self.manager.subset_hook_caller(hook, others)(**arguments)

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
    """Load the built-in parts, then installed plugins, then the modules given.

    Plugins named in the environment variable E2EDIFF_BLOCK (by entry point or distribution,
    separated by commas) are left out.
    An installed plugin that fails is recorded in `Host.broken` and hurts nobody else.
    E2EDIFF_TRACE=1 reports every hook call on stderr.

    Args:
        modules: Further plugins: modules, or any objects with hooks.
        entry_points: Whether to load installed plugins.
        builtins: Whether to load the parts that ship with e2ediff.

    Raises:
        PluginError: One of `modules` is wrong.
    """
    manager = pluggy.PluginManager("e2ediff")
    manager.add_hookspecs(hookspecs)
    if os.environ.get("E2EDIFF_TRACE") == "1":
        manager.add_hookcall_monitoring(_trace, lambda *_: None)
    registries = {plural: Registry(kind, plural, of) for plural, kind, of in KINDS}
    host = Host(registries, manager)
    if builtins:
        from e2ediff.host import builtin  # imports every part, and those import this package

        host._register(builtin, Plugin(BUILTIN, "e2ediff", e2ediff.__version__))
    if entry_points:
        _load_installed(host)
    for module in modules:
        if manager.is_registered(module):
            continue
        name = getattr(module, "__name__", type(module).__name__)
        if module.__hash__ is None:  # a SimpleNamespace; pluggy keeps plugins in sets
            namespace, module = module, ModuleType(name)
            vars(module).update(vars(namespace))
        try:
            host._register(module, Plugin(name))
        except Exception as exc:  # the plugin boundary
            raise PluginError(f"plugin {name!r}: {cause(exc)}") from exc
    return host


def cause(exc: BaseException) -> str:
    """An exception in one line: `ModuleNotFoundError: No module named 'x'`."""
    text = " ".join(str(exc).split())
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if isinstance(exc, PluginError) else f"{type(exc).__name__}: {text}"


def _load_installed(host: Host) -> None:
    blocked = {n.strip() for n in os.environ.get("E2EDIFF_BLOCK", "").split(",") if n.strip()}
    for name, entry in _installed():
        distribution = entry.dist.name if entry.dist else ""
        version = entry.dist.version if entry.dist else ""
        if blocked & {name, entry.name, distribution}:
            host.broken[name] = "blocked by E2EDIFF_BLOCK"
            continue
        try:
            _check_version(entry)
            with contextlib.redirect_stdout(sys.stderr):
                module = entry.load()
            host._register(module, Plugin(name, distribution, version))
        except (Exception, SystemExit) as exc:  # the plugin boundary
            host.broken[name] = cause(exc)


def _installed() -> Iterator[tuple[str, metadata.EntryPoint]]:
    """Entry points in a fixed order, by names of which no two are equal."""
    entries = sorted(
        metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.dist.name if e.dist else "")
    )
    count = Counter([BUILTIN, *(e.name for e in entries)])
    for entry in entries:
        shared = count[entry.name] > 1
        yield f"{entry.dist.name}/{entry.name}" if shared and entry.dist else entry.name, entry


def _check_version(entry: metadata.EntryPoint) -> None:
    """Refuse a plugin whose own metadata says that it is for another version of e2ediff."""
    for line in (entry.dist.requires or []) if entry.dist else []:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if canonicalize_name(wanted.name) != "e2ediff":
            continue
        if not wanted.specifier.contains(e2ediff.__version__, prereleases=True):
            raise PluginError(f"needs {line}, this is e2ediff {e2ediff.__version__}")


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
            raise PluginError(f"unknown hook {name!r}.{meant} See e2ediff/host/hookspecs.py.")
    for name in known:
        if name.startswith("register_") and name not in found and hasattr(module, name):
            raise PluginError(f"{name} is not marked with @e2ediff.hookimpl")
    if not found:
        raise PluginError("has no hook: no function is marked with @e2ediff.hookimpl")
    return tuple(found)


def _add(registry: Registry, plugin: Plugin, name: str, cls: type) -> None:
    registry.add(name, cls, plugin)


def _trace(hook: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, object]) -> None:
    who = ", ".join(impl.plugin_name for impl in impls) or "nobody"
    sys.stderr.write(f"e2ediff: {hook}({', '.join(arguments)}) -> {who}\n")
