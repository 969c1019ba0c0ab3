"""Train from a recipe as a user asks: start or resume, train, and report the outcome."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import attrs
import torch

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import DataSource, ImageSpec, left_out_text
from e2ediff.distributed.signals import (
    BEFORE,
    SAVED,
    UNSAVED,
    Stop,
    Stopped,
    exit_code_of,
    write_now,
)
from e2ediff.distributed.threads import restored_threads
from e2ediff.distributed.world import ElsewhereError, World, is_broken_collective
from e2ediff.errors import (
    CheckpointError,
    DataError,
    E2EDiffError,
    PluginError,
    ResourceError,
    RunDirectoryError,
)
from e2ediff.host.guard import cause
from e2ediff.host.leaves import addresses_in
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from e2ediff.host.yaml import Node
from e2ediff.loading.bad_images import BAD_IMAGES, open_source
from e2ediff.loading.batches import LostReaderError, check_enough
from e2ediff.loading.classes import check_same_classes, empty_classes
from e2ediff.loading.shared_memory import divide, remedy, shortage, usable
from e2ediff.model.build import (
    check_fits,
    check_precision,
    choose_device,
    idle_guidance,
    problems,
)
from e2ediff.model.fixed_networks import random_networks
from e2ediff.model.labels import without_images
from e2ediff.model.repeatable import repeatable
from e2ediff.monitor.alarm import alarm_blind_spot
from e2ediff.objective import Objective
from e2ediff.step.compiling import compile_failure
from e2ediff.step.parallel import check_shares
from e2ediff.store.attempts import ATTEMPTS
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.environment import describe_environment
from e2ediff.store.known_runs import latest_run, own_recipe
from e2ediff.store.manifest import FOLDER, Checkpoint
from e2ediff.store.plugin_files import copies, refuse_other_plugin_files
from e2ediff.store.provenance import is_sealed, refuse_networks
from e2ediff.store.quarantine import put_aside, refuse_newer
from e2ediff.store.records import images_of, newest_saved, refuse_vanished
from e2ediff.store.run_directory import RECIPE, RESOLVED, STACKS, RunDirectory, State, is_run
from e2ediff.store.storage import JSON, Store
from e2ediff.train.continuation import (
    class_names,
    continue_command,
    data_block,
    refuse_other_recipe,
)
from e2ediff.train.engine import Engine, Prepared
from e2ediff.train.progress import Progress
from e2ediff.train.schedule import report_schedule, unreached_rates

_STATES: dict[int, State] = {75: "preempted", 130: "interrupted"}
_GRACE = 5.0  # seconds in which the same request to stop may reach a process twice


@attrs.frozen
class Outcome:
    """Address of a run and how it ended; `exit_code` is 0 when it is done.

    `collapsed` says since when its latents are collapsed, "" if they are not; `advice` is a remedy
    to try, as an assignment for `--set`, "" if none is known.
    """

    path: str
    exit_code: int
    reason: str
    collapsed: str = ""
    advice: str = ""


def train(
    host: Host,
    recipe_path: Address | None,
    overrides: Sequence[str] = (),
    out: Address | None = None,
    *,
    resume: bool | Literal["auto"] = False,
    restart: bool = False,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
    world: World | None = None,
    stop: Stop | None = None,
    choose_threads: bool = False,
    trust: bool = False,
) -> Outcome:
    """Train from a recipe, from the start or from a run's last checkpoint.

    Args:
        host: Knows the parts.
        recipe_path: Path or URL of a recipe; None for that of the run in `out`, which is resumed
            or restarted.
        overrides: Assignments, as for `--set`.
        out: The run's directory; by default `runs/<name>`, or with `resume` or `restart` the
            newest of that name.
        resume: Continue the run in that directory; `auto` starts it where a recipe is given and
            there is no run to continue.
        restart: Start again in that directory; its content moves to `attempts/`.
        allow: Keys and blocks of the recipe that may differ from the run's on `resume`, besides
            those that always may.
        progress: Where to show progress; by default stderr.
        world: The processes that train together; by default only this one. All of them call
            this with the same arguments; the first one writes.
        stop: Receives signals, inside its `with`; by default a new one.
        choose_threads: Use one CPU thread or all, whichever timing finds faster; by default
            torch's number stays.
        trust: Whether to open the networks that the recipe of a run names which was not made
            here; by default it is refused, unless `overrides` name them.

    Raises:
        Stopped: A signal came before training began, or a second one during it.
        E2EDiffError: Whatever is wrong with the recipe, the data, the directory or the machine;
            once a directory exists its `status.json` has it too.
    """
    world = world or World()
    progress = progress or Progress(None if world.is_leader else _Nowhere())
    if stop is None:
        with Stop(at_once=True) as stop:
            return train(
                host, recipe_path, overrides, out, resume=resume, restart=restart, allow=allow,
                progress=progress, world=world, stop=stop, choose_threads=choose_threads,
                trust=trust,
            )  # fmt: skip
    if world.size > 1:  # processes must agree before leaving
        stop.grace, stop.quiet = _GRACE, not world.is_leader
        stop.defer()
    stop.write = progress.interject
    own = recipe_path is None
    if own:
        resume = bool(resume)
    recipe_path, as_given = _recipe_files(recipe_path, out)

    def resumed(name: str) -> Node | None:
        """Return the data block of the run; refuse missing plugin files, whose parts it names.

        Decides `auto`, too: in the first process, because others may see the disk later.
        """
        nonlocal resume
        place = out or latest_run(name)
        if resume == "auto":
            resume = world.on_leader(lambda: place is not None and RunDirectory.is_begun(place))
        if not (place and is_run(place) and (resume or own)):
            return None
        directory = RunDirectory.open(place)
        refuse_other_plugin_files(host, directory, may_change=restart)
        return data_block(directory) if resume else None

    recipe = load_recipe(host, recipe_path, overrides, named=resumed, progress=progress)
    if own and out is not None and not is_sealed(Store(own_recipe(out)), RESOLVED):
        # Its data have to be read; networks are only what it says that it needs.
        found = [(path, one) for path, one in addresses_in(recipe) if not path.startswith("data.")]
        refuse_networks(addresses.plain(out), found, overrides, trust=trust)
    check_fits(recipe, recipe_path)
    check_shares(recipe, world, recipe_path)
    device = choose_device(recipe.device, world.local if world.size > 1 else None)
    check_precision(recipe.precision, device)
    for tracker in recipe.trackers:
        tracker.check()
    # Open the data first: create nothing for a run that cannot start.
    with _naming_the_folder(recipe, again=own):
        training = open_source(recipe.data)
    check_enough(training, recipe.batch)
    # Without a held-out set reuse the training images: listing a large folder takes minutes.
    held_out = training
    if recipe.data.has_held_out:
        with _naming_the_folder(recipe, again=own):
            held_out = open_source(recipe.data, held_out=True)
        check_same_classes(training, held_out)
    sources = (training, held_out)
    names, empty = class_names(recipe, training), empty_classes(training, recipe.data.image)
    image = attrs.evolve(recipe.data.image, class_names=names, empty_classes=empty)
    exact, compiled = recipe.deterministic, recipe.compile in ("blocks", "step")
    computing = partial(repeatable, deterministic=exact, compiled=compiled)
    prepared = None
    if not resume:
        # For the same reason build all that can be built: packages and weights may be missing.
        if out is not None:
            world.on_leader(partial(RunDirectory.refuse_taken, out, restart=restart))
        try:
            with computing():
                prepared = Prepared.build(host, recipe, sources, device, world)
        except BaseException as caught:
            error = _in_words(host, recipe, caught)
            if error is caught:
                raise
            raise error from caught
    # Barrier: create nothing unless every process opened its data and none was stopped.
    if asked := world.highest(stop.signal or 0):
        raise Stopped(asked, BEFORE)

    locked: list[RunDirectory] = []
    former: list[Recipe] = []  # of a run that continues with a change

    def begin() -> list[JSON]:
        place = out or (latest_run(recipe.name) if resume or restart else None)
        begun_before = bool(resume) and not (place and RunDirectory.never_began(place))
        if begun_before:
            directory, before = _continued(host, recipe, recipe_path, place, sources, allow)
            locked.append(directory)
            former.extend(before)
        else:
            if resume:
                progress.say(f"{place}: a run was killed here before it began; it starts now")
            locked.append(
                _new(host, recipe, as_given, place, device, world, image, restart=restart)
            )
            if locked[0].kept:
                progress.say(f"the former content of {place} is kept in {place}/{locked[0].kept}")
        return [locked[0].path, begun_before]

    path, begun_before = world.on_leader(begin)
    world.on_hang(partial(_report_hang, str(path)))
    directory = locked[0] if locked else RunDirectory.open(str(path), silent=True)
    with directory, progress as shown, restored_threads():
        engine = None
        try:
            with computing():
                if exact and choose_threads and device.type == "cpu":
                    torch.set_num_threads(1)  # timing would decide about bits
                if prepared is None:
                    known = partial(_kernels, directory, device, recipe, former)
                    kernels = dict(world.on_leader(known))
                    prepared = Prepared.build(host, recipe, sources, device, world, kernels)
                ready = Engine(
                    host, recipe, directory, device, sources, shown, world,
                    choose_threads=choose_threads and not exact, prepared=prepared,
                )  # fmt: skip
                if begun_before:
                    _restore(ready, directory, shown)
                engine = ready
                world.watch(directory.store.local_path(STACKS), lambda: ready.position.step)
                _greet(shown, engine, image)
                _name_left_out(shown, directory, recipe, sources)
                for before in former:
                    report_schedule(engine.recorder, before, engine.parts.optimizers)
                stop.defer()
                engine.run(stop)
        except BaseException as caught:
            error = world.attribute_error(_in_words(host, recipe, caught))
            saved = engine is not None and engine.saver.is_saved
            if isinstance(error, Stopped) and error.when == UNSAVED and saved:
                # The second signal may come when the checkpoint is written, during a preview.
                error = Stopped(error.number, SAVED)
            code = exit_code_of(error)
            named = isinstance(error, Stopped | ElsewhereError)
            reason = str(error) if named else f"{type(error).__name__}: {error}"
            set_status = engine.set_status if engine else directory.set_status
            set_status(_STATES.get(code, "failed"), code, reason)
            if isinstance(error, Stopped):
                error.args = (f"{directory.path}: {error}",)
                error.command = continue_command(directory.path)
            if error is caught:
                raise
            raise error from caught
        return _end(directory, engine, stop)


def _report_hang(path: str, text: str) -> None:
    """Write into the status why a run is ended; its own process may be the one that hangs."""
    RunDirectory.open(path).set_status("failed", ResourceError.exit_code, text)
    write_now(sys.stderr, f"error: {text}\n")


def _recipe_files(recipe_path: Address | None, out: Address | None) -> tuple[str, str]:
    """Return the addresses of the recipe to read, and of the recipe as a user wrote it."""
    if recipe_path is not None:
        return addresses.plain(recipe_path), addresses.plain(recipe_path)
    if out is None:
        raise RunDirectoryError("give a recipe, or the directory of a run to resume or restart")
    store = Store(own_recipe(out))
    written = RECIPE if store.exists(RECIPE) else RESOLVED
    return store.where(RESOLVED), store.where(written)


def _in_words(host: Host, recipe: Recipe, error: BaseException) -> BaseException:
    """Turn failures of the machine or of a plugin outside a training step into user errors."""
    if isinstance(error, LostReaderError):
        return ResourceError(f"{error}. What was saved is intact: continue with --resume")
    if said := compile_failure(recipe, error):
        return ResourceError(said)
    if not isinstance(error, torch.OutOfMemoryError):
        known = isinstance(error, E2EDiffError) or is_broken_collective(error)
        if known or not (owner := host.owner_of(error)):
            return error
        return PluginError(
            f"{owner}: {cause(error)}. What was saved is intact; E2EDIFF_TRACE=1 prints the "
            "traceback"
        )
    return ResourceError(
        f"out of memory: {str(error).partition('. ')[0]}. A diagnosis processes "
        "probe.images images at once, and a preview preview.rows x preview.classes; lower these, "
        "or use parallel: fsdp2 on several GPUs. What was saved is intact"
    )


class _Nowhere(io.StringIO):
    """Discards the progress of all processes but the first."""

    def write(self, text: str) -> int:
        return len(text)


def _continued(
    host: Host,
    recipe: Recipe,
    recipe_path: Address,
    place: Address | None,
    sources: tuple[DataSource, DataSource],
    allow: Sequence[str],
) -> tuple[RunDirectory, list[Recipe]]:
    """Open and lock the directory of a run to resume; return its former recipe, if it changes."""
    if place is None:
        raise RunDirectoryError(
            f"--resume: no run of '{recipe.name}' to continue; start one without --resume, or "
            "give its directory: e2ediff run --resume DIR"
        )
    directory = RunDirectory.open(place)
    refuse_other_plugin_files(host, directory)
    changes = refuse_other_recipe(host, recipe, directory, recipe_path, sources, allow)
    directory.lock()
    try:
        if not list_checkpoints(directory.store, finished=True):
            refuse_vanished(directory, recipe, changes)
    except BaseException:
        directory.unlock()
        raise
    if not changes:
        return directory, []
    before = parse_recipe(host, directory.resolved(), directory.store.where(RESOLVED))
    directory.event("continued", changes=changes)
    directory.replace_resolved(dump_recipe(host, recipe))
    return directory, [before]


def _new(
    host: Host,
    recipe: Recipe,
    as_given: str,
    place: Address | None,
    device: torch.device,
    world: World,
    image: ImageSpec,
    *,
    restart: bool,
) -> RunDirectory:
    """Create and lock a new run's directory."""
    with addresses.open_file(as_given, typed=True) as file:
        text = file.read().decode()
    environment = describe_environment(
        seeds={"seed": recipe.seed},
        plugins={p.distribution or p.name: p.version for p in host.used},
        device=str(device),
    )
    environment["processes"] = world.size
    resolved = dump_recipe(host, recipe)
    record = {
        **environment,
        "class_names": list(image.class_names),
        "empty_classes": list(image.empty_classes),
    }
    return RunDirectory.create(
        place, recipe.name, text, resolved, record, copies(host), restart=restart
    )


@contextlib.contextmanager
def _naming_the_folder(recipe: Recipe, *, again: bool) -> Iterator[None]:
    """Say where a run's relative paths count from if its data are not found when it goes on.

    Raises:
        DataError: That of the block, with this added.
    """
    try:
        yield
    except DataError as error:
        given = (getattr(recipe.data, option, None) for option in recipe.data.movable)
        missing = [
            path
            for path in given
            if isinstance(path, str) and "://" not in path and not os.path.isabs(path)
        ]
        if not again or not missing or any(map(os.path.exists, missing)):
            raise
        raise DataError(
            f"{error} Relative paths of a run count from the current folder, now {os.getcwd()}."
        ) from error


def _kernels(
    directory: RunDirectory, device: torch.device, recipe: Recipe, former: Sequence[Recipe]
) -> list[tuple[str, str]]:
    """Return the kernels of a run that goes on here, by topic; none where it may choose anew."""
    if any(before.precision != recipe.precision for before in former):
        return []
    try:
        found = open_checkpoint(directory.store, verify=False, warn=lambda text: None).kernels
    except CheckpointError:
        return []  # it is reported when the run is restored, or the run starts again
    # A CPU has one kernel: for a GPU that was no choice.
    moved = device.type == "cuda" and found.get("attention", "").endswith("for cpu)")
    return [] if moved else [*found.items()]


def _restore(engine: Engine, directory: RunDirectory, progress: Progress) -> None:
    """Continue from the newest intact checkpoint; a run without one starts again."""

    def newest() -> str:
        if not list_checkpoints(directory.store, finished=True):
            return ""
        try:
            found = open_checkpoint(directory.store, warn=progress.say)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}\n  Restore an intact one, or start again with --restart, which "
                f"keeps this attempt in {ATTEMPTS}/."
            ) from error
        refuse_newer(directory.store, found.name)
        _keep_figures(directory, found, progress)
        for bad, reason, kept in put_aside(directory.store, found.name, progress.say):
            directory.event("quarantined", name=bad, reason=reason, kept=kept)
            progress.say(f"{bad} is kept as {directory.store.where(FOLDER)}/{kept}")
        return found.name

    name = engine.world.on_leader(newest)
    if name:
        # It was verified when opened; its files are hashed again as they are read.
        found = open_checkpoint(directory.store, name, verify=False)
        try:
            engine.saver.restore(found)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}\n  To continue from an older checkpoint, move {found.path} to another "
                "place, or start again with --restart."
            ) from error
        progress.say(f"resumed {directory.path} at step {engine.position.step}")
        if engine.position.step >= (total := engine.recipe.total_steps):
            progress.say(f"{directory.path}: all {total} steps are done; nothing is left to train")
    else:
        progress.say(f"{directory.path} has no checkpoint yet, so it starts again")
    if engine.position.step == 0:
        engine.saver.rewind(-1)  # what is measured before the first step is measured again


def _keep_figures(directory: RunDirectory, found: Checkpoint, progress: Progress) -> None:
    """Keep what the run recorded after this checkpoint if a later one is lost, and report it."""
    lost = newest_saved(directory)
    if images_of(lost) <= found.images:
        return
    kept = directory.set_aside(found.images, found.step)
    directory.event("lost", name=lost, to=found.name, kept=kept)
    state = "is damaged" if lost in list_checkpoints(directory.store) else "is not there"
    where = f"; what was recorded since is kept in {directory.store.where(kept)}" if kept else ""
    progress.say(
        f"{lost}, which was saved later, {state}: the run goes back to {found.name}{where}"
    )


def _greet(progress: Progress, engine: Engine, image: ImageSpec) -> None:
    """Report the run's directory, device and kernels, and classes without images."""
    nets = engine.parts.nets
    parameters = sum(p.numel() for net in (nets.online, nets.heads) for p in net.parameters())
    progress.say(
        f"run {engine.directory.path}: {parameters:,} parameters, "
        f"{engine.recipe.total_steps} steps of {engine.recipe.batch} images on {_place(engine)}"
    )
    for topic, choice in engine.parts.choices.items():
        progress.say(f"{topic}: {choice}")
    engine.directory.event("kernels", **engine.parts.choices)
    if missing := without_images(image, range(image.classes)):
        progress.say(f"warning: {missing} ({len(image.empty_classes)} of {image.classes} classes)")
        engine.directory.event("empty_classes", classes=list(image.empty_classes))
    if warning := _shared_memory_warning(engine):
        progress.say(f"warning: {warning}")
    warning = alarm_blind_spot(engine.recipe, engine.monitor.observer.diagnostics)
    if warning and engine.parts.nets.online.latent.learned:
        progress.say(f"warning: {warning}")
    recipe = engine.recipe
    warnings = (*idle_guidance(recipe), *unreached_rates(recipe))
    for warning in (*warnings, *random_networks(recipe.objective, "objective")):
        progress.say(f"warning: {warning}")


def _shared_memory_warning(engine: Engine) -> str:
    """Warn of less shared memory than the data workers of all processes here need."""
    r, world = engine.recipe, engine.world
    workers, here = usable(r.data.workers), world.highest(world.local) + 1
    division = divide(r.data.image, r.batch, r.microshards, workers, world.size)
    needed = division.needed * here // world.size
    found = shortage(needed)
    return found and f"{found}; the run ends if it is full: {remedy(needed, 'data.workers')}"


def _name_left_out(
    progress: Progress, directory: RunDirectory, recipe: Recipe, sources: Sequence[DataSource]
) -> None:
    """Report the files among the images that are not read."""
    names = ("data", "held-out data") if recipe.data.has_held_out else ("data",)
    for name, source in zip(names, sources, strict=False):
        if source.left_out:
            progress.say(f"{name}: {left_out_text(source.left_out)}")
            listed = [attrs.asdict(one) for one in source.left_out]
            directory.event("left_out", of=name, files=listed)


def _place(engine: Engine) -> str:
    """Describe the device and, for several processes, their number and how they share the work."""
    size = engine.world.size
    if size == 1:
        return str(engine.device)
    return f"{size} processes ({engine.recipe.parallel}) on {engine.device.type}"


def _end(directory: RunDirectory, engine: Engine, stop: Stop) -> Outcome:
    """Record the end of a run that did not fail."""
    stop.finish()
    if engine.position.step >= engine.recipe.total_steps:
        state: State = "done"
        code, reason = 0, "all steps done"
    elif stop.signal == signal.SIGINT:
        state, code, reason = "interrupted", 130, "interrupted; saved"
    else:
        state, code, reason = "preempted", 75, "terminated; saved"
    if collapsed := engine.detector.collapsed:
        reason = f"{reason}; {collapsed}"
    engine.set_status(state, code, reason)
    if count := len(engine.recorder.bad_images.listed()):
        place = directory.store.where(BAD_IMAGES)
        engine.progress.say(f"skipped {count} damaged or too large images; see {place}")
    if count := engine.bad_steps.count:
        engine.progress.say(
            f"{count} of {engine.position.step:,} steps made no update, as their numbers were "
            "bad; see skipped_step in events.jsonl"
        )
    return Outcome(directory.path, code, reason, collapsed, _advice(engine) if collapsed else "")


def _advice(engine: Engine) -> str:
    """If every loss reaches the encoder, advise a compatible objective that detaches one."""
    recipe = engine.recipe
    if _spares_encoder(recipe.objective):
        return ""
    for part in engine.host.parts("objectives"):
        # A part may need an option, and a plugin may fail: neither may end a finished run.
        with contextlib.suppress(Exception):
            objective = part.cls()
            if _spares_encoder(objective) and not problems(
                attrs.evolve(recipe, objective=objective)
            ):
                return f"objective={part.name}"
    return ""


def _spares_encoder(objective: Objective) -> bool:
    """Whether a loss does not train the encoder; of an objective around another, that one's."""
    cls: type = type(objective)
    if attrs.has(cls):
        parts = (getattr(objective, field.name) for field in attrs.fields(cls))
        for inner in parts:
            if isinstance(inner, Objective):
                return _spares_encoder(inner)
    return any(objective.stops(phase) for phase in objective.phases)
