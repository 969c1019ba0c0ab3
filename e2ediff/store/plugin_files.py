"""Copy single-file plugins into a run's directory, and require them when the run is used."""

from __future__ import annotations

from e2ediff.errors import PluginError
from e2ediff.host.plugin_file import HASHED
from e2ediff.host.plugins import Host
from e2ediff.store.run_directory import PLUGINS, RunDirectory


def copies(host: Host) -> dict[str, bytes]:
    """Return the copies of single-file plugins for a run's directory, by path in it."""
    return {f"{PLUGINS}/{p.name}.py": p.text for p in host.used if p.file}


def refuse_other_plugin_files(
    host: Host, directory: RunDirectory, *, may_change: bool = False
) -> None:
    """Refuse to use a run without the plugin files that it was trained with.

    The copies in the run's directory are not loaded automatically: a run may come from anyone.
    With `may_change` a file may be another one than the run's, as it is for a restart.

    Raises:
        PluginError: A file was not given, or has changed since.
    """
    recorded = directory.environment().get("plugins", {})
    for name, version in recorded.items() if isinstance(recorded, dict) else ():
        if not str(version).startswith(HASHED):
            continue
        copy = directory.store.where(f"{PLUGINS}/{name}.py")
        given = [p for p in host.plugins if p.name == name and p.file]
        if not given:
            raise PluginError(
                f"{directory.path} was trained with the plugin file {name}.py: add --plugin "
                f"{name}.py. The run keeps a copy as it was then, {copy}; if others made the run, "
                "read it before you give it."
            )
        if given[0].version != version and not may_change:
            raise PluginError(
                f"{given[0].file} has changed since {directory.path} began (it was {version}, is "
                f"{given[0].version}). Give the run's copy, --plugin {copy}, or train another run."
            )
