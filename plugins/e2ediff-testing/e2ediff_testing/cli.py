"""`e2ediff plugins new` and `e2ediff plugins check`."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import click

from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from e2ediff_testing.kit import Verdict


@click.command("new")
@click.argument("name")
@click.option("--kind", required=True, help="What the part is; an unknown KIND lists all.")
@click.option("--out", metavar="DIR", help="A new folder. Default: e2ediff-NAME.")
def new(name: str, kind: str, out: str | None) -> None:
    """Write a complete plugin with a part NAME of one kind: a module, a test, a README.

    It passes `check` and trains as it stands; change it from there.
    """
    from e2ediff.host.checkout import pip_install
    from e2ediff_testing.scaffold import assignment, template_kinds, write_plugin

    kind = kind.replace("-", "_").replace(" ", "_")
    if kind not in template_kinds():
        raise click.UsageError(f"--kind {kind}: expected one of {', '.join(template_kinds())}")
    folder = write_plugin(kind, name, out)
    part = name.replace("-", "_")
    recipe = "recipes/quickstart.yaml"
    recipe = recipe if os.path.exists(recipe) else "RECIPE.yaml"
    echo(
        f"next: {pip_install(folder)} && e2ediff plugins check {part}\n"
        f"then: e2ediff run {recipe} --set {shlex.quote(assignment(kind, part))}",
        err=True,
        lines=True,
    )
    echo_path(folder)


@click.command("check")
@click.argument("plugin", metavar="PATH|NAME")
@click.option("--part", default="", help="Check one part only.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change the small recipe that each part is tried in, as for `run`.",
)
def check(plugin: str, part: str, overrides: tuple[str, ...]) -> None:
    """Check every part of a plugin: a folder with a pyproject.toml, a file, or an installed name.

    Each part is put into a small recipe and trained for a few seconds. Checked are shapes, types,
    gradients, what stops them, determinism, resume, bfloat16, torch.compile, and two processes.
    Commands are imported.
    Each failure says what to change; the exit code is then 4.
    """
    from e2ediff.errors import PluginError
    from e2ediff.host.plugin_file import giving
    from e2ediff.host.plugins import load
    from e2ediff_testing.kit import Verdict, check_plugin
    from e2ediff_testing.source import Source, unbounded

    source, verdicts = None, []
    if os.path.isdir(plugin):
        source = Source.read(plugin)
        host, names = source.host(), [*source.entries]
        verdicts += [Verdict(source.name, "package", what) for what in source.problems()]
    elif plugin.endswith(".py"):
        click.get_current_context().with_resource(giving([plugin]))
        host = load()
        names = [p.name for p in host.plugins if p.file == os.path.abspath(plugin)]
    else:
        host, names = load(), []
        for entry in host.entries_named(plugin):
            if entry.name in host.broken:
                raise PluginError(f"plugin {entry.name!r}: {host.broken[entry.name]}")
            names.append(entry.name)
            what = unbounded(entry.requires)
            verdicts += [Verdict(entry.name, "package", problem) for problem in what]
    for verdict in verdicts:
        _tell(verdict)
    for name in names:
        for verdict in check_plugin(host, name, overrides, source=source, only=part):
            _tell(verdict)
            verdicts.append(verdict)
    failed = [verdict for verdict in verdicts if verdict.problem]
    if not any(verdict.check == "contract" for verdict in verdicts) and not failed:
        raise PluginError(f"{plugin}: has no part {part!r}" if part else f"{plugin}: has no part")
    if failed:
        raise PluginError(f"{plugin}: {len(failed)} of {len(verdicts)} checks failed")
    echo(f"{len(verdicts)} checks passed")


def _tell(verdict: Verdict) -> None:
    state = "FAIL" if verdict.problem else "ok"
    what = f": {verdict.problem}" if verdict.problem else ""
    echo(f"{state:<4}  {verdict.part}  {verdict.check}{what}")
