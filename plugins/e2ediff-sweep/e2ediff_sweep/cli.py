"""`e2ediff sweep`."""

from __future__ import annotations

import itertools
import shlex

import click

from e2ediff.distributed.signals import keeping
from e2ediff.terminal import echo


@click.command("sweep")
@click.argument("run")
@click.option(
    "--vary",
    multiple=True,
    metavar="PATH=A,B",
    help="An axis: --vary weights=target,ema:0.1 --vary guidance.scale=1,2. Values are as for "
    "`ablate`. Default: weights, guidance scale and interval, sampler with its "
    "steps, spacing of times.",
)
@click.option("--grid", is_flag=True, help="Every combination, not one axis after another.")
@click.option(
    "--rounds", type=click.IntRange(1), default=1, show_default=True, help="Passes over the axes."
)
@click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="For all candidates.")
@click.option("--weights", help="For all candidates that no axis gives others.")
@click.option("--checkpoint", help="Name of a checkpoint. Default: the newest.")
@click.option(
    "--count", type=click.IntRange(3), default=512, show_default=True, help="Images a candidate."
)
@click.option(
    "--reference",
    metavar="PLACE",
    default="data",
    show_default=True,
    help="As for `eval`; of `data` and `held-out` a random part of ten times --count is used.",
)
@click.option("--features", metavar="NAME|BLOCK", help="Feature network, as for `eval`.")
@click.option("--weights-file", metavar="PATH|URL", help="Weights of the feature network.")
@click.option("--sha256", metavar="HASH", help="Hash that --weights-file must have.")
@click.option("--convention", default="e2ediff", show_default=True, help="As for `eval`.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--threads",
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="CPU threads of each process; auto: one or all, whichever is faster by timing.",
)
@click.option("--trust", is_flag=True, help="As for `sample`.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--cache", metavar="DIR", help="Features of references. Default: $E2EDIFF_CACHE.")
@click.option("--dry-run", is_flag=True, help="Check everything and list axes; score nothing.")
@click.option(
    "--full", type=click.IntRange(2), metavar="N", help="Evaluate the best one on N images."
)
@click.option("--out", metavar="DIR", help="Default: RUN/sweep.")
@click.pass_context
@keeping("the scores so far are kept, and the same command measures the others")
def command(
    context: click.Context,
    run: str,
    vary: tuple[str, ...],
    grid: bool,
    rounds: int,
    sets: tuple[str, ...],
    weights: str | None,
    checkpoint: str | None,
    count: int,
    reference: str,
    features: str | None,
    weights_file: str | None,
    sha256: str | None,
    convention: str,
    seed: int,
    batch: int,
    processes: int,
    threads: str,
    trust: bool,
    device: str,
    cache: str | None,
    dry_run: bool,
    full: int | None,
    out: str | None,
) -> None:
    """Search the weights, guidance and sampler that suit RUN, on few samples each.

    Every candidate has the same noise and labels, and a kernel distance to real images whose
    error is known; candidates that are statistically tied with the best are marked.
    All are checked before the first one starts, and a sweep that was interrupted goes on when
    the command is given again.
    Writes `sweep.csv` and a score file for each candidate, and prints the table and the command
    of a full evaluation of the best; `--full N` runs it.
    """
    from e2ediff.distributed.openmp import prepare_threads

    number = prepare_threads(threads)
    from e2ediff.addresses import cache_folder
    from e2ediff.distributed.threads import threads_for
    from e2ediff.evaluate.conventions import convention as named
    from e2ediff.evaluate.network import feature_network
    from e2ediff.evaluate.request import Request
    from e2ediff.host.plugins import load
    from e2ediff.model.build import choose_device
    from e2ediff.sample.load import ModelRef
    from e2ediff.store.known_runs import folder_in
    from e2ediff.store.storage import Store
    from e2ediff.train.progress import Progress
    from e2ediff_sweep.axes import check, default_axes, parse_axes
    from e2ediff_sweep.candidates import open_run
    from e2ediff_sweep.reference import open_subset
    from e2ediff_sweep.search import Search, every, one_by_one
    from e2ediff_sweep.table import as_csv, cheapest, lines, ranked

    if sha256 and not weights_file:
        raise click.UsageError("--sha256 is the hash of --weights-file; give both")
    host, rules = load(), named(convention)
    with Progress() as progress:
        ref = ModelRef(
            run=run,
            weights=weights,
            checkpoint=checkpoint,
            device=device,
            overrides=sets,
            trust=trust,
        )
        swept = open_run(host, ref, progress.say)
        axes = parse_axes(vary) if vary else default_axes(swept)
        check(swept, axes)
        if dry_run:
            for axis in axes:
                for value in axis.values:
                    echo(" ".join(str(a) for a in value.assignments))
            return
        network = feature_network(host, features, weights_file, sha256).build()
        request = Request(
            target=swept.ref,
            network=network,
            metrics=(),
            conventions=[rules],
            count=count,
            seed=seed,
            batch=batch,
            processes=processes,
            cache=cache or cache_folder(),
            choose_threads=number is None,
        )
        store = Store(out or folder_in(run, "sweep", "scores"))
        real = open_subset(swept, reference, 10 * count, seed)
        search = Search(swept, request, real, store, progress.say, progress.update)
        search.begin()
        scored = (
            map(search.score, every(swept, axes))
            if grid
            else one_by_one(swept, axes, rounds, search.score)
        )
        fixed = number is not None or processes > 1
        on = choose_device(device)
        with threads_for(search.attempt, progress.say, on, fixed=fixed) as finished:
            for scored_so_far, _ in enumerate(scored, 1):
                store.write("sweep.csv", as_csv(ranked([*search.found.values()])).encode())
                finished(scored_so_far)
    rows = ranked([*search.found.values()])
    for line in lines(rows):
        echo(line)
    best = rows[0].result.candidate
    if (cheap := cheapest(rows)).result.calls < rows[0].result.calls:
        echo(f"tied, at {cheap.result.calls:g} calls: {cheap.result.candidate.words}")
    options = {
        "--checkpoint": swept.checkpoint.name,
        "--count": full or rules.count,
        "--seed": seed + 1,  # not the noise that the best one was chosen by
        "--features": features,
        "--weights-file": weights_file,
        "--sha256": sha256,
        "--convention": convention,
        "--reference": reference,
    }
    given = [(name, str(value)) for name, value in options.items() if value is not None]
    words = ["eval", run, *best.options, *itertools.chain(*given)]
    words += ["--trust"] if trust else []
    echo(f"table: {store.where('sweep.csv')}")
    echo(f"full evaluation: {shlex.join(['e2ediff', *words])}")
    if full:
        group = context.find_root().command
        assert isinstance(group, click.Group)
        group.main(words, prog_name="e2ediff", standalone_mode=False)
