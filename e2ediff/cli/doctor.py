"""`e2ediff doctor`."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from e2ediff.terminal import echo

if TYPE_CHECKING:
    from e2ediff.doctor.finding import Finding

_NARROWEST = 20


@click.command("doctor")
@click.argument("run", required=False)
@click.option("--bundle", metavar="FILE.zip", help="Pack the result for a report of a bug.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(run: str | None, bundle: str | None, *, as_json: bool) -> int:
    """Check Python, torch, GPUs, kernels, disks, ports and plugins, and RUN if it is given.

    Each line is ok, a warning or a problem; the latter two with what to do.
    The bundle has these results, versions, the list of plugins, and of RUN its recipe, records,
    and the last lines of its events and figures; secrets, your user name, the host's name and the
    path of your home are left out.
    Exit code 8 if there is a problem.
    """
    import attrs

    from e2ediff.doctor.bundle import write_bundle
    from e2ediff.doctor.checks import examine
    from e2ediff.errors import ResourceError
    from e2ediff.host.plugins import load

    host = load()
    findings = examine(host, run)
    if as_json:
        echo(json.dumps([attrs.asdict(finding) for finding in findings], indent=1), lines=True)
    else:
        width = shutil.get_terminal_size().columns
        for line in _table(findings, width):
            echo(line)
    if bundle is not None:
        for name, size in write_bundle(bundle, host, findings, run):
            echo(f"{bundle}: {name}, {size:,} bytes", err=True)
        echo(
            f"{bundle}: read it before you send it; what is secret only to you cannot be known",
            err=True,
        )
    return ResourceError.exit_code if any(f.state == "problem" for f in findings) else 0


def _table(findings: list[Finding], width: int) -> Iterator[str]:
    """Yield lines of at most this width, where words are short enough."""
    name_width = max(len(finding.name) for finding in findings)
    margin = len("problem") + 2 + name_width + 2
    if width - margin < _NARROWEST:
        margin = 4
    room = max(_NARROWEST, width - margin)
    for finding in findings:
        state = f"{finding.state:<9}"
        words = textwrap.wrap(finding.what, room, break_on_hyphens=False)
        if finding.hint:
            words += textwrap.wrap(f"-> {finding.hint}", room, break_on_hyphens=False)
        if margin == 4:
            yield f"{state}{finding.name}"
            yield from (f"    {line}" for line in words)
            continue
        first, *rest = words or [""]
        yield f"{state}{finding.name:<{name_width}}  {first}"
        yield from (" " * margin + line for line in rest)
