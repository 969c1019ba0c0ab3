"""Build all that a step works on from a recipe: networks, optimizers and averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch

from e2ediff.distributed.world import World
from e2ediff.host.recipe import Recipe
from e2ediff.model.averages import Average
from e2ediff.model.build import DTYPES, averagings, fresh_nets
from e2ediff.objective import Nets
from e2ediff.step.compiling import Compilation
from e2ediff.step.parallel import Parallel
from e2ediff.step.step import Step


def tf32() -> str:
    """Say which float32 operations torch may compute in TF32 on CUDA, of 10 bits in place of 23.

    Both are torch's settings: off for products of matrices and on for convolutions, unless a user
    or a package has set them.
    """
    asked: dict[str, Callable[[], bool]] = {
        "products of matrices": lambda: torch.get_float32_matmul_precision() != "highest",
        "convolutions": lambda: torch.backends.cudnn.allow_tf32,
    }
    said = []
    for what, allowed in asked.items():
        try:
            said.append(f"{what}: {'yes' if allowed() else 'no'}")
        except RuntimeError:  # torch cannot tell where its older and newer settings are mixed
            said.append(f"{what}: as set by `fp32_precision`")
    return ", ".join(said)


@attrs.frozen(eq=False)
class Assembly:
    """What a run trains: the step, one optimizer for each phase, and the averages by name.

    `choices` says how the machine computes it, by topic, and is kept in checkpoints.
    """

    step: Step
    optimizers: Mapping[str, torch.optim.Optimizer]
    averages: Mapping[str, Average]
    choices: dict[str, str]
    parallel: Parallel
    compilation: Compilation

    @property
    def nets(self) -> Nets:
        """Return the networks that the objective computes with."""
        return self.step.nets


def assemble(
    recipe: Recipe,
    device: torch.device,
    world: World | None = None,
    kernels: Mapping[str, str] | None = None,
) -> Assembly:
    """Build all that a run trains, on its device, spread over the processes of `world`.

    `kernels` are the `choices` of the run so far, for a run that goes on.
    With `compile: auto` nothing is compiled yet.
    """
    world = world or World()
    online, heads, frozen = fresh_nets(recipe, device)
    precision = DTYPES[recipe.precision]
    # Before copying, so that the averages use the kernels that are chosen here.
    online.kernels_before = kernels or {}
    choices = dict(world.on_leader(lambda: [*online.prepare(device, precision).items()]))
    if not world.is_leader:  # timing would have each process choose for itself
        online.kernels_before = choices
        online.prepare(device, precision)
    if device.type == "cuda":
        choices["TF32 where float32 is asked for"] = tf32()
    if recipe.compile == "auto" and kernels and "compile" in kernels:
        choices["compile"] = kernels["compile"]
    averages = {name: Average(online, law) for name, law in averagings(recipe).items()}
    target = averages["target"].net
    nets = Nets(online, target, recipe.interpolant, recipe.predicts, heads, frozen)
    copies = {name: average.net for name, average in averages.items()}
    step = Step(recipe.objective, nets, precision, recipe.regularizers, copies)
    compilation = Compilation(step, again=recipe.checkpoint_activations)
    if recipe.compile != "auto":
        compilation.use(recipe.compile)
    parallel = Parallel(step, recipe.parallel if world.size > 1 else "one", world, device)
    for average in averages.values():
        average.bind()
    optimizers = {}
    for phase in recipe.objective.phases:
        config = recipe.optimizers.get(phase, recipe.optimizer)
        optimizer = config.build(step.named_trained(phase))
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            # What the recipe gave: a run may continue with other options (`optimizer_state.py`).
            group["given"] = {key: value for key, value in group.items() if key != "params"}
        optimizers[phase] = optimizer
    return Assembly(step, optimizers, averages, choices, parallel, compilation)
