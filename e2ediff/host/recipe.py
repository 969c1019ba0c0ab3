"""The recipe: its options, and how it is read from and written to YAML."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import attrs
from attrs.validators import deep_iterable, ge, gt, le, lt, min_len, optional

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.averaging import WIDEST, Averaging
from e2ediff.backbone import BackboneConfig
from e2ediff.data import SourceConfig
from e2ediff.diagnostic import Diagnostic
from e2ediff.errors import Problem, RecipeError
from e2ediff.features import FeatureConfig
from e2ediff.guidance import Guidance
from e2ediff.host.data_block import (
    DataAddress,
    ShowsProgress,
    data_address,
    infer,
    shadowed_folder,
)
from e2ediff.host.plugins import Host
from e2ediff.host.registry import FLAT
from e2ediff.host.structure import show, structured, unstructure
from e2ediff.host.suggestions import recipes_in, similar_recipes
from e2ediff.host.yaml import MAX_BYTES, Node, dump_yaml, parse_yaml, path_join, set_value
from e2ediff.interpolant import Interpolant, Kind
from e2ediff.metric import Metric
from e2ediff.objective import Objective
from e2ediff.optimizer import OptimizerConfig
from e2ediff.regularizer import Regularizer
from e2ediff.sampler import Sampler
from e2ediff.times import TimeSampler
from e2ediff.tracker import TrackerConfig

VERSION = 1
"""Version of the recipe's schema, its key `e2ediff`."""

_FRACTION = (ge(0.0), lt(1.0))


def _plain_name(instance: object, field: attrs.Attribute[str], value: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", value):
        raise ValueError(
            f"{value[:60]!r} cannot name a directory or file: at most 100 lower-case letters, "
            "digits, '-' and '_', the first one a letter or digit."
        )


def _version_problem(value: int) -> str:
    if value == VERSION:
        return ""
    way_out = "Upgrade e2ediff." if value > VERSION else f"Write `e2ediff: {VERSION}`."
    return f"is schema {value}, and this e2ediff reads schema {VERSION}. {way_out}"


def _one_version(instance: object, field: attrs.Attribute[int], value: int) -> None:
    if problem := _version_problem(value):
        raise ValueError(problem)


@attrs.frozen(kw_only=True)
class NamedAverage:
    """A further average of the weights, only to sample from.

    `name` is that of the weights; the options of its `kind` stand beside it, as in
    `{name: slow, kind: power, width: 0.1}`.
    """

    name: str = attrs.field(validator=_plain_name)
    averaging: Averaging = attrs.field(metadata=FLAT)

    @name.validator
    def _not_taken(self, field: attrs.Attribute[str], value: str) -> None:
        if value in ("online", "target"):
            raise ValueError(f"{value!r} is the name of weights that every run has.")


@attrs.frozen(kw_only=True)
class PostHoc:
    """Averages from which those of other widths are reconstructed after training.

    `widths` are the tracked ones, at least two: the standard deviation of an average's profile
    over training time, as a share of the time so far, in (0, 0.288].
    `every` is the number of optimizer steps between their snapshots, by default a 32nd of the
    training; `keep` is the number of snapshots that stay, the newest, and 0 keeps all;
    `precision` is that of their files.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3.
    """

    widths: tuple[float, ...] = attrs.field(
        default=(0.05, 0.1), validator=(min_len(2), deep_iterable((gt(0.0), le(WIDEST))))
    )
    every: int | None = attrs.field(default=None, validator=optional(gt(0)))
    keep: int = attrs.field(default=0, validator=ge(0))
    precision: Literal["float32", "float16"] = "float32"

    @widths.validator
    def _apart(self, field: attrs.Attribute[tuple[float, ...]], value: tuple[float, ...]) -> None:
        if len({f"{width:g}" for width in value}) < len(value):
            raise ValueError(f"the widths {', '.join(map(str, value))} are not all different.")


@attrs.frozen(kw_only=True)
class Cadence:
    """How often things happen, each in optimizer steps.

    `log` reads the losses, `diagnose` measures the diagnostics that look at latents alone,
    `survey` measures all of them (by default every tenth diagnosis, and always at the first and
    last step), `preview` samples images, `checkpoint` saves; a run also saves after its first
    minute of training, if it has no checkpoint yet, and when it ends.
    """

    log: int = attrs.field(default=25, validator=gt(0))
    diagnose: int = attrs.field(default=250, validator=gt(0))
    survey: int | None = attrs.field(default=None, validator=optional(gt(0)))
    preview: int = attrs.field(default=500, validator=gt(0))
    checkpoint: int = attrs.field(default=1000, validator=gt(0))

    @property
    def survey_every(self) -> int:
        """Return the steps between surveys, by default ten diagnoses."""
        return self.survey or 10 * self.diagnose


@attrs.frozen(kw_only=True)
class ProbeSettings:
    """What diagnostics are measured on.

    `images` is the number of held-out images that diagnostics may ask for, `glance` the number
    of those that every diagnosis encodes and a survey decodes and denoises, `times` the times at
    which they are denoised (0 is noise, 1 is data), `calibration` the number of training images
    from which batch normalisation takes its statistics before weights are saved or sampled from.
    A quarter of the glance, at least 16 images, also pass the trained network's encoder.
    """

    images: int = attrs.field(default=256, validator=gt(0))
    glance: int = attrs.field(default=64, validator=gt(1))
    times: tuple[float, ...] = attrs.field(
        default=(0.1, 0.5, 0.9), validator=deep_iterable((gt(0.0), lt(1.0)))
    )
    calibration: int = attrs.field(default=1024, validator=gt(0))

    @property
    def trained(self) -> int:
        """Return the number of images that a diagnosis also encodes with the trained network."""
        return min(self.images, self.glance, max(16, self.glance // 4))


@attrs.frozen(kw_only=True)
class Preview:
    """The sheet of samples: `rows` images for each of the first `classes` classes."""

    rows: int = attrs.field(default=4, validator=gt(0))
    classes: int = attrs.field(default=10, validator=gt(0))


@attrs.frozen(kw_only=True)
class Scores:
    """Cheap scores of reconstructions and of samples, side by side, while a run goes.

    Every `every` training images, and at the end, `images` held-out images are reconstructed and
    as many are sampled, of classes in turn and with noise that never changes; both are compared
    with the held-out images in the features of the network `features` by `metrics`.
    With few images a Fréchet distance is far too large, and comparable only at equal `images`;
    a kernel distance is not biased.
    """

    every: int = attrs.field(validator=gt(0))
    features: FeatureConfig
    metrics: tuple[Metric, ...]
    images: int = attrs.field(default=512, validator=gt(1))


@attrs.frozen(kw_only=True)
class Retention:
    """Which checkpoints stay: the last `keep`."""

    keep: int = attrs.field(default=2, validator=gt(0))


@attrs.frozen(kw_only=True)
class Alarm:
    """What a run does when its latents collapse, or when all losses vanish.

    `policy`: `warn` says so and goes on; `stop` saves a checkpoint and ends the run with exit
    code 7; `rollback` goes back to the last regular checkpoint from before the first sign and
    draws other times and noise from there, at most `attempts` times in a run, and then stops.
    `window` is the number of diagnoses in a row that must show a sign of collapse; a complete
    collapse needs one.
    Signs are what the diagnostics say of their figures, a rank below the share `fall` of the
    largest that the run has had, a `latent_std` below the share `shrink` of its largest (these
    and any others that a diagnostic declares so), and losses that are all below `silence`.
    """

    policy: Literal["warn", "stop", "rollback"] = "warn"
    window: int = attrs.field(default=2, validator=gt(0))
    fall: float = attrs.field(default=0.5, validator=_FRACTION)
    shrink: float = attrs.field(default=0.1, validator=_FRACTION)
    silence: float = attrs.field(default=1e-6, validator=ge(0.0))
    attempts: int = attrs.field(default=3, validator=ge(0))


@attrs.frozen(kw_only=True)
class Guards:
    """What a run does when a step's numbers are bad: not finite, or far above the usual.

    The weighted loss and the norm of its gradient are judged before every update, over all
    processes together. A bad step makes no update: weights and optimizer state stay as they are,
    while the position, schedules, the order of images and averages go on.
    `non_finite` is what follows if one of the two is NaN or infinite, `spike` if one exceeds
    `factor` times the median of its absolute value in the last `window` updates; `off` judges no
    spikes, and before there were so many updates there are none.
    `skip` goes on with the next step; `rewind` goes back to the last regular checkpoint, draws
    other times and noise from there, and skips the step when it comes to it again; `stop` ends the
    run with exit code 7.
    `limit` is the largest number of bad steps in a row, and of returns in a run, `share` the
    largest share of the last 1,000 steps that may be bad; beyond them the run ends, too.
    """

    non_finite: Literal["skip", "rewind", "stop"] = "skip"
    spike: Literal["off", "skip", "rewind", "stop"] = "off"
    factor: float = attrs.field(default=6.0, validator=gt(1.0))
    window: int = attrs.field(default=200, validator=(gt(1), le(100_000)))
    limit: int = attrs.field(default=3, validator=ge(0))
    share: float = attrs.field(default=0.1, validator=(ge(0.0), le(1.0)))

    @property
    def rewinds(self) -> bool:
        """Return whether a bad step may send the run back to a checkpoint."""
        return "rewind" in (self.non_finite, self.spike)


@attrs.frozen(kw_only=True)
class Recipe:
    """Everything that decides what a run computes, and what it records.

    `e2ediff` is the version of the schema, 1.
    `name` becomes the name of the run's directory.
    `requires` lists the distributions that bring further parts, as pip takes them; their plugins
    are imported first, and their observers are called.
    `seed` is the source of all randomness.
    `images` or `steps` is the length of training, in training images or optimizer steps; exactly
    one of them is given.
    `batch` is the number of images in a step, over all devices; `microshards` is the number of
    equal shares that it is computed in, one after another or on several devices.
    `data`, `backbone`, `interpolant`, `objective`, `optimizer`, `sampler` and `guidance` are
    parts; `times` is the law of training times.
    `data` may also be the address of images alone, or a block whose `name` is one: the source, its
    size, channels and classes are then inferred from the images.
    `predicts` is what the denoiser's output stands for.
    `regularizers` are losses of the latents, added to those of the objective.
    `label_drop` is the probability, in [0, 1), of training the denoiser without the condition.
    `target` is the average of the weights that objectives may compare with, `ema` lists further
    ones to sample from, each of a `kind` (by default `constant`); `post_hoc` tracks further ones
    still, from which any width can be reconstructed after training.
    `optimizers` replaces `optimizer` in the phases it names.
    `diagnostics` are measured on `probe`; without the key, all that are registered by e2ediff and
    by the plugins that the recipe needs.
    `alarm` is what follows from signs of collapse, `guards` from numbers that are not finite.
    `trackers` receive figures and pictures besides the run's directory.
    `scores` measures distances of reconstructions and samples while training; off by default.
    `cadence`, `preview` and `checkpoint` say how often and how much is recorded.
    `precision` is the network's; losses, averages and conversions are always float32. In float32
    products of matrices use no TF32 unless torch was told so, and convolutions on CUDA use it.
    `compile` has torch.compile work on the backbone's `blocks`, or make one graph of the whole
    `step`, for which the objective's draws are made beforehand; what cannot be compiled ends the
    run. Graphs, breaks and later compilations are recorded. `auto` compiles as much as pays: it
    times the first step, forecasts what the steps that are left would gain, and tries; where there
    is no compiler or it fails, the run goes on uncompiled. The choice stays when a run resumes;
    with `deterministic: true` it is `off`.
    `checkpoint_activations` computes the blocks' activations again in the backward pass instead
    of keeping them: less memory, about a third more time, the same gradients. Both go together:
    a compiled block, or step, is one graph, activations computed again or not.
    `parallel` is how several processes share the work: `ddp` keeps all weights in each, `fsdp2`
    splits weights, averages and optimizer state over them; one process needs neither.
    `device` is where the run takes place; `auto` takes a GPU if there is one.
    `deterministic` has the same run give the same bits again on CUDA too, slower: torch then uses
    algorithms that add in a fixed order, and what has none is refused by name. Kernels and the
    number of CPU threads are not chosen by timing: a new run's attention is torch's own, and a CPU
    uses one thread unless `--threads` says how many.
    """

    e2ediff: int = attrs.field(validator=_one_version)
    name: str = attrs.field(validator=_plain_name)
    requires: tuple[str, ...] = ()
    seed: int = attrs.field(default=0, validator=(ge(0), lt(2**63)))
    images: int | None = attrs.field(default=None)
    steps: int | None = attrs.field(default=None)
    batch: int = attrs.field(validator=gt(0))
    microshards: int = attrs.field(default=1, validator=gt(0))
    data: SourceConfig
    backbone: BackboneConfig
    interpolant: Interpolant
    times: TimeSampler
    predicts: Kind = "x0"
    objective: Objective
    regularizers: tuple[Regularizer, ...] = ()
    label_drop: float = attrs.field(default=0.1, validator=_FRACTION)
    target: Averaging
    ema: tuple[NamedAverage, ...] = attrs.field(default=())
    post_hoc: PostHoc | None = None
    optimizer: OptimizerConfig
    optimizers: dict[str, OptimizerConfig] = attrs.field(factory=dict)
    sampler: Sampler
    guidance: Guidance | None = None
    diagnostics: tuple[Diagnostic, ...] | None = None
    alarm: Alarm = Alarm()
    guards: Guards = Guards()
    trackers: tuple[TrackerConfig, ...] = ()
    scores: Scores | None = None
    cadence: Cadence = Cadence()
    probe: ProbeSettings = ProbeSettings()
    preview: Preview = Preview()
    checkpoint: Retention = Retention()
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["off", "auto", "blocks", "step"] = "off"
    checkpoint_activations: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False

    @images.validator
    @steps.validator
    def _one_length(self, field: attrs.Attribute[int | None], value: int | None) -> None:
        if value is not None and value <= 0:
            raise ValueError(f"{field.name!r} must be > 0: {value}")
        if field.name == "steps" and (self.images is None) == (value is None):
            given = "neither is" if value is None else "both are"
            raise ValueError(f"give either 'steps' or 'images'; {given} given.")

    @microshards.validator
    def _divides(self, field: attrs.Attribute[int], value: int) -> None:
        if value > 0 and self.batch % value:
            raise ValueError(f"{value} microshards do not divide a batch of {self.batch} images.")

    @ema.validator
    def _distinct(
        self, field: attrs.Attribute[tuple[NamedAverage, ...]], value: tuple[NamedAverage, ...]
    ) -> None:
        names = [average.name for average in value]
        if len(set(names)) < len(names):
            raise ValueError(f"the names {', '.join(names)} are not all different.")

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the training; `images` is rounded up to whole batches."""
        if self.steps is not None:
            return self.steps
        assert self.images is not None
        return -(-self.images // self.batch)

    @property
    def total_images(self) -> int:
        """Return the images of the training, in whole batches: at least `images`."""
        return self.total_steps * self.batch

    @property
    def default_weights(self) -> str:
        """Return the default weights to sample from: the first of `ema`, or `target`."""
        return self.ema[0].name if self.ema else "target"

    @property
    def snapshot_steps(self) -> int:
        """Return the optimizer steps between snapshots of `post_hoc`; 0 if there are none."""
        if self.post_hoc is None:
            return 0
        return self.post_hoc.every or max(1, self.total_steps // 32)


def load_recipe(
    host: Host,
    path: Address,
    overrides: Sequence[str] = (),
    *,
    named: Callable[[str], Node | None] | None = None,
    progress: ShowsProgress | None = None,
) -> Recipe:
    """Read a recipe from a file or from any URL that fsspec knows.

    `data` may be the address of images alone: the block that describes them is then inferred by
    looking at them, and is part of the recipe that is returned.

    Args:
        host: Knows the parts.
        path: The recipe.
        overrides: Assignments such as `objective.floor=0.5`, as given to `--set`, in order.
        named: Called with the recipe's name before its parts are looked up; returns the data
            block of the run that the recipe continues, None if there is none.
        progress: Where to report what was inferred from the images; by default nowhere.

    Raises:
        RecipeError: The recipe is wrong; has every problem, with its line.
        DuplicateNameError: A name in it is registered by two plugins.
        DataError: What is to be inferred cannot be: the images are missing or damaged.
    """
    source = addresses.plain(path)
    if what := addresses.refusal(source, typed=True):
        raise RecipeError(source, [Problem("recipe", f"cannot be read: {what}.", source)])
    try:
        with addresses.open_file(source, typed=True) as file:
            data = file.read(MAX_BYTES + 1)
    except Exception as exc:  # fsspec has dozens of file systems, with errors of their own
        raise RecipeError(source, [_unreadable(source, exc)]) from exc
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        column = exc.start - (data.rfind(b"\n", 0, exc.start) + 1) + 1
        problem = Problem("recipe", "is not UTF-8 text.", f"{source}:{line}:{column}")
        raise RecipeError(source, [problem]) from exc
    return parse_recipe(host, text, source, overrides, named=named, progress=progress)


def _unreadable(source: str, error: Exception) -> Problem:
    """Explain why no recipe can be read from an address, and what may have been meant."""
    if isinstance(error, IsADirectoryError | FileNotFoundError) and os.path.isdir(source):
        run = os.path.join(source, "resolved.yaml")
        if os.path.isfile(run):
            hint = (
                f"Give the recipe in it, {run}, which has all its settings; to continue the run: "
                f"e2ediff run --resume {shlex.quote(source)}."
            )
            return Problem("recipe", "is the directory of a run, not a recipe.", source, hint)
        hint = _meant(recipes_in(source) or similar_recipes(source))
        return Problem("recipe", "is a folder, not a recipe.", source, hint)
    if isinstance(error, FileNotFoundError):
        hint = _meant(similar_recipes(source))
        return Problem("recipe", "there is no such file.", source, hint)
    what = f"cannot be read ({type(error).__name__}: {error})."
    return Problem("recipe", what, source)


def _meant(near: Sequence[str]) -> str:
    return f"Did you mean {' or '.join(near)}?" if near else ""


def parse_recipe(
    host: Host,
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    *,
    named: Callable[[str], Node | None] | None = None,
    progress: ShowsProgress | None = None,
) -> Recipe:
    """Read a recipe from a text as `load_recipe` does; `source` is the prefix of positions."""
    root, problems = parse_yaml(text, source)
    if root is None or not isinstance(root.value, dict):
        found = "is empty." if root is None else f"expected 'key: value' lines, got {show(root)}."
        place = root.place if root else f"{source}:1:1"
        hint = "Start from a file in recipes/."
        raise RecipeError(source, [Problem("recipe", found, place, hint)])
    for number, assignment in enumerate(overrides, start=1):
        problems += set_value(root, _with_literal_address(assignment), f"--set {number}")
        key, sign, _ = assignment.partition("=")
        other = {"steps": "images", "images": "steps"}.get(key.strip())
        if sign and other and root.value.get(key, root).value is not None:
            root.value.pop(other, None)
    version = root.value.get("e2ediff")
    if version and type(version.value) is int and (what := _version_problem(version.value)):
        # The other keys of another schema are not known here.
        raise RecipeError(source, [Problem("e2ediff", what, version.place)])
    name = root.value.get("name")
    earlier = None
    if named and name and isinstance(name.value, str):
        earlier = named(name.value)
    missing = list(_missing(host, root))
    problems = [*missing, *problems]
    data = root.value.get("data")
    images = data_address(host, data, earlier)
    if isinstance(images, Problem):
        problems.append(images)
        root.value["data"] = Node(None, images.line, reported=True)
    elif images:
        root.value["data"] = images.node
    elif progress:
        typed = [text.removeprefix("data=") for text in overrides if text.startswith("data=")]
        if note := shadowed_folder(host, [data.value if data else None, *typed]):
            progress.say(note)
    recipe: Recipe = structured(host, root, Recipe, source, problems, excused=bool(missing))
    if isinstance(images, DataAddress):
        recipe = attrs.evolve(recipe, data=infer(host, recipe.data, images, progress))
    return recipe


def _with_literal_address(assignment: str) -> str:
    """Quote the address in `data=ADDRESS`, in which YAML would read `#`, `*` or a number.

    A block and a quoted text stay as they are, unless a path of that name exists.
    """
    key, sign, text = assignment.partition("=")
    text = text.strip()
    block = text.startswith(("{", '"', "'")) or re.match(r"\w+:(\s|$)", text)
    if not sign or key.strip() != "data" or not text:
        return assignment
    if block and not os.path.lexists(text):
        return assignment
    return f"data={json.dumps(text, ensure_ascii=False)}"


def dump_recipe(host: Host, recipe: Recipe) -> str:
    """Format a recipe as YAML with every default; reading it gives an equal recipe.

    Raises:
        PluginError: The recipe holds a part that `host` does not know.
    """
    return dump_yaml(unstructure(host, recipe, Recipe))


def _missing(host: Host, root: Node) -> Iterator[Problem]:
    """Yield requirements that are not met."""
    listed = root.value.get("requires") if isinstance(root.value, dict) else None
    items = listed.value if listed and isinstance(listed.value, list) else []
    for i, item in enumerate(items):
        if not isinstance(item.value, str):
            continue  # reported by the structurer
        what = host.missing_requirement(item.value, item.place)
        if what:
            yield Problem(path_join("requires", i), what, item.place)
