"""Trials: short trainings with a part, each of which checks one promise."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff import hookimpl
from e2ediff.errors import PluginError
from e2ediff.host.discovery import Plugin
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe, dump_recipe, parse_recipe
from e2ediff.host.registry import Part, options
from e2ediff.loading.batches import fixed_images
from e2ediff.model.build import check_fits
from e2ediff.sample.load import load_model
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.compiling import compile_step, recompute
from e2ediff.step.draws import draw_for
from e2ediff.step.one_graph import Tracing, UnforeseenDrawError
from e2ediff.step.sharding import cast_layers
from e2ediff.step.step import Step
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train
from e2ediff_testing.kinds import kind_of
from e2ediff_testing.networks import shake

RECIPE = """\
e2ediff: 1
name: trial
steps: 4
batch: 8
data: {name: synthetic, size: 16, classes: 4, count: 60}
backbone: {name: vit, width: 16, depth: 1, heads: 2, patch: 8, latent_dim: 6, latent_norm: batch}
interpolant: linear
times: logit_normal
objective: detached
target: {decay: 0.9}
optimizer: {name: adamw, lr: 0.002}
sampler: {name: euler, steps: 2}
cadence: {log: 1, diagnose: 4, preview: 1000, checkpoint: 1000}
probe: {images: 16, times: [0.5], calibration: 16}
preview: {rows: 1, classes: 2}
device: cpu
"""
"""The recipe in which parts are tried: synthetic images of 16 pixels, a ViT of one block.

A part that does not fit there as it stands lists what to change, as `--set` takes it, in a class
attribute:

    trial: ClassVar[tuple[str, ...]] = ("backbone.latent_norm=none", "objective.width=8")
"""


_LOSS = "loss of "


@attrs.frozen
class Trial:
    """A part in its place in a recipe, with a folder to train in."""

    host: Host
    part: Part
    plural: str
    recipe: Recipe
    folder: Path

    @classmethod
    def prepare(
        cls, host: Host, plural: str, part: Part, overrides: Sequence[str], folder: Path
    ) -> Trial:
        """Put a part into the recipe, with its own changes and then with `overrides`.

        Raises:
            PluginError: Its `trial` is no sequence of assignments.
            RecipeError: It does not fit there.
        """
        name = host.registries[plural].name_of(part.cls)
        words = [kind_of(plural).assignment(name), *_changes(part.cls), *overrides]
        recipe = parse_recipe(host, RECIPE, "the trial's recipe", words)
        check_fits(recipe, "the trial's recipe")
        return cls(host, part, plural, recipe, folder)

    @property
    def value(self) -> object:
        """The part's instance in the recipe."""
        return kind_of(self.plural).value(self.recipe)

    def train(
        self, name: str, *, stop_at: int = 0, resume: bool = False, **changes: object
    ) -> str:
        """Train in a folder of this name; with `stop_at` it is asked to stop after that step."""
        stopper = _Stopper(stop_at)
        self.host.add(stopper, Plugin(f"stopper {id(stopper)}"))
        path = self.folder / f"{name}.yaml"
        recipe = attrs.evolve(self.recipe, **changes)  # type: ignore[arg-type]
        path.write_text(dump_recipe(self.host, recipe), encoding="utf-8")
        out = str(self.folder / name)
        train(self.host, str(path), out=out, resume=resume, progress=Progress(io.StringIO()))
        stopper.at = 0
        return out


def _changes(cls: type) -> Sequence[str]:
    """Return what a part's `trial` changes in the recipe; an option may have this name too."""
    trial = () if "trial" in options(cls) else getattr(cls, "trial", ())
    if not isinstance(trial, tuple | list) or not all(isinstance(word, str) for word in trial):
        what = "expected a tuple of assignments, as --set takes them"
        raise PluginError(f"{cls.__name__}.trial is {trial!r}: {what}")
    return trial


class _Stopper:
    """An observer that asks the run to stop after a step; 0 is none."""

    def __init__(self, at: int) -> None:
        self.at = at

    @hookimpl
    def step_ended(self, step: int) -> None:
        """Stop as a batch system would."""
        if step == self.at:
            signal.raise_signal(signal.SIGTERM)


def contract(trial: Trial) -> None:
    """Check shapes, types, finite gradients, stop-gradients, determinism given the draw."""
    kind_of(trial.plural).check(trial.value, trial.recipe)


def documentation(trial: Trial) -> None:
    """Check for a sentence on what it is, and every option by name."""
    cls = trial.part.cls
    first = (cls.__doc__ or "").strip().partition("\n")[0]
    assert first.endswith((".", ":")), (
        f"{cls.__name__} has no docstring whose first line is a sentence; say what it is for"
    )
    text = "\n".join(c.__doc__ or "" for c in cls.__mro__ if c is not object)
    missing = [f"`{o.name}`" for o in options(cls).values() if not _describes(text, o.name)]
    assert not missing, f"the docstring of {cls.__name__} does not describe {', '.join(missing)}"


def _describes(text: str, option: str) -> bool:
    """Return whether a docstring has the option in backticks, or lists `option: What it is.`."""
    listed = rf"^\s*(?:\w+, )*{option}(?:, \w+)*:"
    return f"`{option}`" in text or re.search(listed, text, re.MULTILINE) is not None


def round_trip(trial: Trial) -> None:
    """Check that a recipe that names it is written and read back equal."""
    text = dump_recipe(trial.host, trial.recipe)
    again = parse_recipe(trial.host, text, "the written recipe")
    assert again == trial.recipe, (
        f"{trial.part.cls.__name__} is read back as another value; make it a frozen attrs class "
        "whose options are its only state"
    )
    assert dump_recipe(trial.host, again) == text, "the recipe changes each time it is written"


def save_and_resume(trial: Trial) -> None:
    """Check that a run stopped and resumed ends as one that was not, bit for bit."""
    whole = trial.train("whole")
    half = trial.train("half", stop_at=2)
    seen = open_checkpoint(Store(half)).step
    assert seen == 2, f"the run stopped after step {seen}, not after step 2"
    trial.train("half", resume=True)
    one, two = open_checkpoint(Store(whole)), open_checkpoint(Store(half))
    for file in one.files:
        other = two.tensors(file)
        differ = [k for k, v in one.tensors(file).items() if not torch.equal(v, other[k])]
        assert not differ, (
            f"after a stop and a resume {file}: {differ[0]} differs; draw from the generator "
            "that is given, and keep no state but buffers and the optimizer's"
        )
    lines = [_figures(Path(out) / "metrics.jsonl") for out in (whole, half)]
    assert lines[0] == lines[1], "after a stop and a resume the figures differ"


def latent_contract(trial: Trial) -> None:
    """Check that the checkpoint's latent contract is that of the loaded model."""
    out = str(trial.folder / "whole")
    model = load_model(out, device="cpu", host=trial.host)
    said = open_checkpoint(Store(out)).latent("target")
    fresh = model.net.contract(model.contract.scale)
    assert said == fresh, (
        f"the checkpoint has {said}, the loaded network {fresh}; keep the latent norm's "
        "statistics in `latent_norm`, as buffers"
    )
    data = trial.recipe.data
    images = fixed_images(data.open(), data.image.conditioning, 4, 0, "trial", torch.device("cpu"))
    latents = model.latents(images.x)
    size = (4, fresh.tokens, fresh.dim)
    assert latents.z.shape == size, f"latents are {tuple(latents.z.shape)}, the contract {size}"
    assert model.decode(latents).isfinite().all(), "decoded latents are not finite"
    x = model.sample(model.image.conditioning.example(2))
    assert x.isfinite().all(), "samples are not finite"


def half_precision(trial: Trial) -> None:
    """Check for finite losses and gradients of a run in bfloat16, and of every phase's step.

    A backbone's blocks must take the weights of their layers as autocast casts them.
    """
    trial.train("bfloat16", precision="bfloat16", steps=1)
    recipe, losses = attrs.evolve(trial.recipe, precision="bfloat16"), dict[str, Tensor]()
    found = gradients(recipe, assemble(recipe, torch.device("cpu")), losses)
    for key, value in {**losses, **found}.items():
        assert value.isfinite().all(), (
            f"in bfloat16 {_title(key)} is not finite; take losses in float32, with .float()"
        )
    if trial.plural == "backbones":
        plain, rounded = _rounded(recipe, layers=False), _rounded(recipe, layers=True)
        changed = [key for key, value in plain.items() if not torch.equal(value, rounded[key])]
        assert not changed, (
            f"in bfloat16 {_title(changed[0])} depends on digits of a block's weights that FSDP2 "
            "does not send: compute its nn.Linear and convolutions under autocast, or derive a "
            "class from theirs"
        )


def _rounded(recipe: Recipe, *, layers: bool) -> dict[str, Tensor]:
    """Return the losses of moved weights, those of blocks' `layers` rounded to bfloat16 or not."""
    losses, parts = dict[str, Tensor](), assemble(recipe, torch.device("cpu"))
    shake(parts.nets)  # blocks that start as identities would depend on no weight
    if layers:
        for block in parts.nets.online.blocks():
            for p in chain.from_iterable(layer.parameters() for layer in cast_layers(block)):
                p.data = p.data.bfloat16().float()
    gradients(recipe, parts, losses)
    return losses


def compiled(trial: Trial) -> None:
    """Check that a compiled step has the plain one's losses and gradients.

    The step is compiled whole, and where the part has blocks or heads of its own, by these; a
    backbone's blocks are tried with activations that are kept and that are computed again.
    """
    losses, parts = dict[str, Tensor](), assemble(trial.recipe, torch.device("cpu"))
    gradients(trial.recipe, parts)  # constants may be computed once, and be kept
    plain, others = gradients(trial.recipe, parts, losses, around=_NoNumbers), dict[str, Tensor]()
    # What is traced once would not be seen to ask.
    found = gradients(trial.recipe, parts, others, around=_as_if_compiling)
    compare({**losses, **plain}, {**others, **found}, "torch.compiler.is_compiling()")
    by_block, again_by_block, as_whole = (False, False), (False, True), (True, False)
    ways = [by_block, as_whole] if parts.nets.heads else [as_whole]
    if trial.plural == "backbones":
        ways = [by_block, again_by_block, as_whole]
    for whole, again in ways:
        parts, others = assemble(trial.recipe, torch.device("cpu")), dict[str, Tensor]()
        nets = parts.nets
        if again:
            recompute(nets.online.blocks())
        backend = "aot_eager"  # traces as on a GPU, without a C++ compiler
        if whole:
            compile_step(parts.step, Tracing(), backend=backend)
        else:
            for module in (*nets.online.blocks(), *nets.heads.values()):
                module.compile(backend=backend)
        try:
            found = gradients(trial.recipe, parts, others)
        except UnforeseenDrawError:
            continue  # it may use the generator itself, but for `compile: step`, which says so
        finally:
            torch._dynamo.reset()
        where = "torch.compile with checkpoint_activations" if again else "torch.compile"
        compare({**losses, **plain}, {**others, **found}, where)


@contextlib.contextmanager
def _as_if_compiling() -> Iterator[None]:
    """Make `torch.compiler.is_compiling()` true, while nothing is compiled."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


class _NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to read a number from a tensor, for which a step on a GPU would wait."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError(
                "a step reads a number from a tensor, by .item(), float(), bool() or an `if`; "
                f"compute with the tensor itself, torch.where for `if` ({_caller()})"
            )
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """Return the file and line of the code outside of torch that runs now."""
    frames = [f for f in traceback.extract_stack()[:-2] if f"{os.sep}torch{os.sep}" not in f[0]]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


def gradients(
    recipe: Recipe,
    parts: Assembly,
    losses: dict[str, Tensor] | None = None,
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    shares: Sequence[int] = (0, 1),
    wrap: Callable[[Step], nn.Module] = lambda step: step,
) -> dict[str, Tensor]:
    """Return the gradients of one step of every phase by name, from the two halves of a batch.

    The losses, summed over the halves, are added to `losses`; they are computed in `around()`.
    `shares` are the halves that are taken; `wrap` makes of the step what is called in each phase.
    """
    source, kind = recipe.data.open(), recipe.data.image.conditioning
    batch = fixed_images(source, kind, recipe.batch, recipe.seed, "trial", torch.device("cpu"))
    found, size = dict[str, Tensor](), len(batch.x) // 2
    losses = {} if losses is None else losses
    for phase in recipe.objective.phases:
        step = wrap(parts.step)
        step.zero_grad()
        for shard in shares:
            part = batch.rows(slice(shard * size, (shard + 1) * size))
            draw = draw_for(recipe, part.condition, f"trial-{phase}", 0, shard)
            with around():
                total, terms, _ = step(part, draw, phase)
            (total / len(shares)).backward()
            for name, loss in terms.items():
                key = f"{_LOSS}{phase}: {name}"
                losses[key] = losses.get(key, torch.zeros(())) + loss
        for prefix, module in (("", parts.nets.online), ("heads.", parts.nets.heads)):
            for key, p in module.named_parameters():
                if p.grad is not None and p.grad.any():  # one that is zero counts as none
                    found[f"{phase}: {prefix}{key}"] = p.grad.clone()
    return found


def compare(plain: dict[str, Tensor], other: dict[str, Tensor], where: str) -> None:
    """Fail where losses or gradients differ by more than sums in another order do."""
    assert set(plain) == set(other), (
        f"there is {_title(sorted(set(plain) ^ set(other))[0])} with {where} or without it, not "
        "both; let nothing depend on how a step is run"
    )
    for key, mine in plain.items():
        # float32: 1e-4 of the largest entry is a hundred times what reordering costs
        gap, size = (mine - other[key]).abs().max(), mine.abs().max()
        assert gap <= 1e-4 * size + 1e-7, (
            f"{where} changes {_title(key)} by {float(gap / size):.1g} of its size; "
            "make the part a function of its arguments alone"
        )


def _title(key: str) -> str:
    """Say in words what `gradients` found."""
    return f"the {key}" if key.startswith(_LOSS) else f"the gradient of {key}"


def _figures(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("wall_")} for line in lines]
