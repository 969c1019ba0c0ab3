"""`e2ediff ckpt`: list, verify, info, prune, export, import and migrate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from e2ediff.cli import options
from e2ediff.terminal import echo, echo_path

if TYPE_CHECKING:
    from e2ediff.store.run_directory import RunDirectory
    from e2ediff.store.storage import Store

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_run = click.argument("run")


@click.group("ckpt")
def command() -> None:
    """List, verify, prune, export and import checkpoints of a run."""


def _open(run: str) -> RunDirectory:
    from e2ediff.store.run_directory import RunDirectory

    return RunDirectory.open(run)


def _open_damaged(run: str) -> tuple[RunDirectory, str]:
    """Open a run; where that fails, a folder with checkpoints, and say what is wrong with it."""
    from e2ediff.errors import RunDirectoryError
    from e2ediff.store.manifest import FOLDER
    from e2ediff.store.run_directory import RunDirectory
    from e2ediff.store.storage import Store

    try:
        return RunDirectory.open(run), ""
    except RunDirectoryError as error:
        store = Store(run)
        if not store.list(FOLDER):
            raise
        return RunDirectory(store, run), str(error)


def _say(line: str) -> None:
    echo(line, err=True)


def size_text(size: int) -> str:
    """Return bytes in words: `12.3 MB`."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


@command.command("list", short_help="Print a line on each checkpoint.")
@_run
@_as_json
def list_(run: str, *, as_json: bool) -> int:
    """Print a line on each checkpoint of RUN.

    Names and sizes of files are checked; `verify` hashes them. Exit code 6 if the run itself
    cannot be opened; its checkpoints are listed all the same.
    """
    import attrs

    from e2ediff.errors import RunDirectoryError
    from e2ediff.host.listing import aligned
    from e2ediff.store.audit import missing, survey

    directory, wrong = _open_damaged(run)
    found = [*survey(directory.store, verify=False), *missing(directory)]
    code = RunDirectoryError.exit_code if wrong else 0
    if wrong:
        _say(wrong)
        found = [attrs.evolve(one, resumed=False) for one in found]
    if as_json:
        echo(json.dumps([attrs.asdict(one) for one in found], indent=1), lines=True)
        return code
    if not found:
        _say(f"{run} has no checkpoint")
        return code
    rows = [("name", "step", "images", "created", "size", "state", "")]
    for one in found:
        created = (one.created or "-").replace("T", " ").partition("+")[0]
        counts = ["-" if n is None else f"{n:,}" for n in (one.step, one.images)]
        mark = "--resume takes it" if one.resumed else ""
        step, images = counts
        rows.append((one.name, step, images, created, size_text(one.bytes), one.state, mark))
    for line in aligned(rows, right=(1, 2, 4)):
        echo(line.rstrip())
    for one in found:
        if one.reason and one.state != "quarantined":
            _say(one.reason)
    return code


@command.command("verify", short_help="Hash every file of the checkpoints.")
@_run
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_as_json
def verify(run: str, names: tuple[str, ...], *, as_json: bool) -> int:
    """Read every file of RUN's checkpoints and compare its SHA-256; or only those of NAMEs.

    Snapshots of `post_hoc` count too.
    Exit code 6 if a checkpoint does not verify, if the newest that was saved is not there, or if
    the run itself cannot be opened.
    """
    import attrs

    from e2ediff.errors import CheckpointError
    from e2ediff.host.listing import aligned
    from e2ediff.host.registry import did_you_mean
    from e2ediff.store.audit import missing, survey

    directory, wrong = _open_damaged(run)
    if wrong:
        _say(wrong)
    places = _places(directory)
    found = {
        prefix + one.name: one
        for prefix, store in places.items()
        for one in survey(store, verify=True)
        if one.state != "quarantined"
    }
    if wrong:
        found = {name: attrs.evolve(one, resumed=False) for name, one in found.items()}
    found |= {one.name: one for one in missing(directory)}
    for name in names:
        if name not in found:
            raise CheckpointError(f"{run}: no checkpoint '{name}'. {did_you_mean(name, found)}")
    found = {name: one for name, one in found.items() if not names or name in names}
    if not found:
        raise CheckpointError(f"{run} has no checkpoint")
    bad = {name: one.reason for name, one in found.items() if one.reason}
    if as_json:
        echo(
            json.dumps({name: attrs.asdict(one) for name, one in found.items()}, indent=1),
            lines=True,
        )
        return CheckpointError.exit_code if bad or wrong else 0
    rows = [(n, "BAD" if n in bad else "ok", size_text(one.bytes)) for n, one in found.items()]
    for line in aligned(rows, right=(2,)):
        echo(line)
    for reason in bad.values():
        _say(reason)
    _say(
        f"{len(found) - len(bad)} of {len(found)} verify. SHA-256 beside the data shows that "
        "nothing changed since it was written, not who wrote it"
    )
    return CheckpointError.exit_code if bad or wrong else 0


def _places(directory: RunDirectory) -> dict[str, Store]:
    """Return the stores that have checkpoints, by what comes before their names."""
    from e2ediff.train.snapshot import snapshots

    return {"": directory.store, "post_hoc/": snapshots(directory.store)}


@command.command("info", short_help="Print what a checkpoint holds.")
@_run
@click.argument("name", required=False)
@_as_json
def info(run: str, name: str | None, *, as_json: bool) -> None:
    """Print what a checkpoint of RUN holds; by default the newest intact one."""
    from e2ediff.host.leaves import leaves_of
    from e2ediff.host.listing import aligned
    from e2ediff.sample.post_hoc import stored_weights
    from e2ediff.store.checkpoint import open_checkpoint
    from e2ediff.store.run_directory import RESOLVED

    directory = _open(run)
    found = open_checkpoint(directory.store, name, warn=_say, use="give {}")
    leaves = leaves_of(directory.resolved(), directory.store.where(RESOLVED))
    laws = ("target", "ema", "post_hoc")
    weights: dict[str, dict[str, object]] = {}
    for file in stored_weights(found):
        tensors = found.tensors(file)
        weights[file] = {
            "tensors": len(tensors),
            "values": sum(t.numel() for t in tensors.values()),
            "types": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
            "latent": found.latents.get(file),
            "updates": found.state.get("averages", {}).get(file),
        }
    content = {
        "name": found.name,
        "step": found.step,
        "images": found.images,
        "format": found.about.version,
        "created": found.about.created,
        "parent": found.about.parent,
        "versions": dict(found.about.environment),
        "files": list(found.files),
        "averages": {p: v for p, v in leaves.items() if p.partition(".")[0] in laws},
        "weights": weights,
    }
    if as_json:
        echo(json.dumps(content, indent=1), lines=True)
        return
    versions = ", ".join(f"{k} {v}" for k, v in found.about.environment.items())
    rows = [
        ("step, images", f"{found.step:,}, {found.images:,}"),
        ("created", found.about.created),
        ("parent", found.about.parent or "none"),
        ("format", str(found.about.version)),
        ("versions", versions),
        ("files", ", ".join(found.files)),
    ]
    rows += [(path, value) for path, value in leaves.items() if path.partition(".")[0] in laws]
    echo(found.path, bold=True)
    for line in aligned(rows):
        echo(f"  {line}")
    for file, held in weights.items():
        echo(
            f"{file}: {held['values']:,} values in {held['tensors']} tensors, "
            f"{', '.join(held['types'])}"  # type: ignore[arg-type]
            + ("" if held["updates"] is None else f"; {held['updates']} updates")
        )
        contract = found.latent(file)
        echo(f"  latents: {contract or 'not described'}")


@command.command("prune", short_help="Delete old checkpoints.")
@_run
@click.option("--keep", type=click.IntRange(1), help="How many of the newest intact ones stay.")
@click.option("--bad", is_flag=True, help="Delete those that were put aside as damaged, too.")
@click.option("--dry-run", is_flag=True, help="Delete nothing; print what would be deleted.")
def prune(run: str, keep: int | None, *, bad: bool, dry_run: bool) -> None:
    """Delete old checkpoints of RUN, which no process may be training.

    They are verified first; the last intact one always stays, and so does the one to which a run
    with `alarm.policy: rollback` would go back.
    """
    from e2ediff.store.audit import prune as prune_

    if keep is None and not bad:
        raise click.UsageError("give --keep N, --bad, or both")
    total = 0
    with _open(run) as directory:
        directory.lock()
        gone = prune_(directory.store, keep, bad=bad, dry_run=dry_run, warn=_say)
        for name, size in gone:
            total += size
            echo(f"{name}  {size_text(size)}")
    done = f"{size_text(total)} {'would be' if dry_run else 'were'} freed"
    _say(f"{run}: {done if total else 'there is nothing to delete'}")


@command.command("export", short_help="Write weights to one safetensors file.")
@_run
@click.argument("file", metavar="FILE.safetensors")
@options.weights
@options.checkpoint
def export(run: str, file: str, weights: str | None, checkpoint: str | None) -> None:
    """Write a set of weights of RUN to one safetensors file, whose path is printed.

    Its tensors have the names of the network, so `safetensors.torch.load_file` and
    `load_state_dict` read it; its metadata have the run's name, the recipe's hash, the step and
    the latent contract.
    """
    from e2ediff.errors import CheckpointError
    from e2ediff.host.plugins import load
    from e2ediff.host.recipe import parse_recipe
    from e2ediff.sample.load import ModelRef
    from e2ediff.sample.post_hoc import stored_weights, width_of
    from e2ediff.store.checkpoint import open_checkpoint
    from e2ediff.store.exporting import export as export_
    from e2ediff.store.run_directory import RESOLVED

    directory = _open(run)
    if weights is None:
        place = directory.store.where(RESOLVED)
        weights = parse_recipe(load(), directory.resolved(), place).default_weights
    found = open_checkpoint(directory.store, checkpoint, warn=_say)
    known = stored_weights(found)
    if width_of(weights) is not None:
        reference = ModelRef(
            run=run, weights=weights, checkpoint=found.name, device="cpu",
            overrides=["guidance=null"],
        )  # fmt: skip
        model = reference.load(warn=_say)
        tensors, contract = model.net.state_dict(), model.latent
    elif weights in known:
        tensors, contract = dict(found.tensors(weights)), found.latent(weights)
    else:
        raise CheckpointError(f"{found.path}: no weights '{weights}'; it has {', '.join(known)}.")
    sha256 = export_(directory, found, weights, tensors, contract, file)
    _say(f"{weights} of {found.path}; sha256 {sha256}")
    echo_path(file)


@command.command("import", short_help="Begin a run with the weights in a file.")
@click.argument("recipe")
@click.argument("file")
@click.argument("out")
@options.overrides()
@click.option(
    "--map",
    "renames",
    multiple=True,
    metavar="OLD=NEW",
    help="Replace the beginning OLD of names in FILE by NEW; may be repeated.",
)
def import_(
    recipe: str, file: str, out: str, overrides: tuple[str, ...], renames: tuple[str, ...]
) -> None:
    """Make a run OUT by RECIPE, before its first step, with the weights in FILE.

    FILE is a safetensors file, or a `.pt` of tensors by the names of the network; nothing else is
    unpickled. Online and averaged weights are set; `sample OUT` and `run --resume OUT` go on.
    """
    from e2ediff.host.plugins import load
    from e2ediff.train.importing import import_weights

    pairs = [text.partition("=") for text in renames]
    for text, (old, equals, _) in zip(renames, pairs, strict=True):
        if not (old and equals):
            raise click.UsageError(f"--map {text}: expected OLD=NEW, as in --map model.=")
    place = import_weights(
        load(),
        recipe,
        file,
        out,
        overrides=overrides,
        renames={old: new for old, _, new in pairs},
        warn=_say,
    )
    echo_path(place)


@command.command("migrate", short_help="Rewrite checkpoints of earlier formats.")
@_run
def migrate(run: str) -> int:
    """Write checkpoints of RUN that have an earlier format anew in the present one.

    That is not needed to use them: they are converted each time they are opened.
    """
    from e2ediff.errors import CheckpointError
    from e2ediff.store.checkpoint import list_checkpoints
    from e2ediff.store.migration import FORMAT_VERSION
    from e2ediff.store.rewriting import rewrite

    changed, bad = 0, 0
    with _open(run) as directory:
        directory.lock()
        for prefix, store in _places(directory).items():
            for name in list_checkpoints(store):
                try:
                    former = rewrite(store, name, _say)
                except CheckpointError as error:
                    bad += 1
                    _say(str(error))
                    continue
                if former != FORMAT_VERSION:
                    changed += 1
                    echo(f"{prefix}{name}: format {former} is now {FORMAT_VERSION}")
    if not changed and not bad:
        _say(f"nothing to do: checkpoints of {run} have format {FORMAT_VERSION}, the present one")
    return CheckpointError.exit_code if bad else 0
