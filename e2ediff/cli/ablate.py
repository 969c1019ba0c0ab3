"""`e2ediff ablate`."""

from __future__ import annotations

import shlex

import click

from e2ediff.cli import options
from e2ediff.terminal import echo, echo_path

_STOPPING = (
    "stopping: runs that are training finish their step and save; interrupt again to end them "
    "at once without saving"
)


@click.command("ablate")
@click.argument("recipe")
@click.option(
    "--vary",
    multiple=True,
    metavar="PATH=A,B",
    help="An axis of the grid: --vary objective=coupled,detached. Values are YAML; a value may "
    "bring settings: objective=two_stage+backbone.trunks=denoiser_apart.",
)
@click.option(
    "--seeds", default="0,1,2", show_default=True, help="Each cell is trained with each of these."
)
@options.overrides()
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at once.")
@options.threads_text()
@click.option(
    "--out", metavar="DIR", help="The ablation's directory. Default: groups/<recipe's name>."
)
@click.option(
    "--baseline", metavar="CELL", help="What cells are compared with. Default: the first."
)
@click.option(
    "--match",
    type=click.Choice(["steps", "compute"]),
    default="steps",
    show_default=True,
    help="compute: each cell is trained for as many steps as the baseline's FLOPs allow.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check and count all cells; train and write nothing."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the ablation in --out, or the newest one; --seeds may name more seeds.",
)
@click.pass_context
def command(
    context: click.Context,
    recipe: str,
    vary: tuple[str, ...],
    seeds: str,
    overrides: tuple[str, ...],
    jobs: int,
    threads: str,
    out: str | None,
    baseline: str | None,
    match: str,
    dry_run: bool,
    resume: bool,
) -> int:
    """Train RECIPE with every combination of values and every seed, and report on it.

    All cells are checked before the first run starts.
    Cells share the order of images, noise and labels of a seed, so that they are compared by
    pairs.
    The group's directory is printed at the end, on stdout; `report.html` is in it.
    A run that fails is reported and does not stop the others; the exit code is then its own.
    """
    from e2ediff.distributed.signals import Stop

    # First of all, because the imports below take seconds.
    stop = context.with_resource(Stop(at_once=True, words=_STOPPING))

    from typing import cast

    from e2ediff.ablate.group import Group
    from e2ediff.ablate.plan import Match, plan_ablation, plan_lines
    from e2ediff.ablate.train import STOPPED, exit_code, train_all
    from e2ediff.distributed.openmp import all_threads, threads_of
    from e2ediff.host.plugins import load
    from e2ediff.report.gather import gather
    from e2ediff.report.write import write_report
    from e2ediff.store.environment import describe_environment
    from e2ediff.train.progress import Progress

    number, host = threads_of(threads), load()
    with Progress() as shown, shown.doing("checking every cell with every seed"):
        plan = plan_ablation(
            host, recipe, vary, seeds, overrides, baseline, cast(Match, match), progress=shown
        )
    if dry_run:
        for line in plan_lines(plan):
            echo(line)
        for line in plan.remarks():
            echo(line, err=True)
        return 0
    place = Group.latest(plan) if resume and not out else out
    if resume and place and not Group.never_began(place):
        group = Group.open(place)
        group.refuse_other(plan)
    else:
        environment = describe_environment(
            plugins={p.distribution or p.name: p.version for p in host.used},
            argv=plan.command(),
        )
        group = Group.create(place, plan, environment)
    share = max(1, all_threads() // jobs)
    with group, Progress() as progress:
        stop.write = progress.interject
        stop.defer()
        group.extend(plan)
        progress.say(f"ablation {group.path}: {len(plan.cells)} cells, {len(plan.jobs)} runs")
        for line in plan.remarks():
            progress.say(line)
        ended = train_all(
            group, plan.jobs, at_once=jobs, threads=number, share=share, progress=progress,
            stop=stop,
        )  # fmt: skip
        code = exit_code(ended, stop)
        progress.say("writing the report")
        written, sentences = write_report(gather(host, group.path))
    for sentence in sentences:
        echo(sentence, err=True)
    for one in ended:
        if one.exit_code not in (0, *STOPPED):
            echo(f"failed: {one.job.place}: {one.error}", err=True, lines=True)
    if code in STOPPED:
        again = shlex.join([*plan.command(), "--out", group.path, "--resume"])
        echo(f"{group.path}: interrupted; saved\ncontinue with: {again}", err=True, lines=True)
    echo(f"report: {written.html}", err=True)
    echo_path(group.path)
    return code
