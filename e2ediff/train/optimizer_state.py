"""Convert an optimizer's state to named tensors and JSON, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from e2ediff.distributed.tensors import is_split, split_as
from e2ediff.errors import CheckpointError
from e2ediff.optimizer import OptimizerConfig
from e2ediff.store.manifest import plain
from e2ediff.store.storage import JSON

# The choice of kernels belongs to the machine, not to the state.
_KERNELS = frozenset({"foreach", "fused", "capturable", "differentiable"})

# Options of torch's optimizers that are no state, for checkpoints that do not say what was given.
_OPTIONS = frozenset(
    {"betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "ns_steps"}
    | {"adjust_lr_fn", "initial_lr"}
)


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Return an optimizer's state as tensors `{parameter name}.{key}`, and the rest as JSON.

    Raises:
        CheckpointError: a value is neither a tensor nor JSON, or two tensors get one name.
    """
    tensors: dict[str, Tensor] = {}

    def split(prefix: str, values: Mapping[str, Any]) -> dict[str, JSON]:
        rest: dict[str, JSON] = {}
        held: dict[str, str] = {}
        for key, value in values.items():
            where = f"{prefix}.{key}"
            if not isinstance(value, Tensor):
                rest[key] = plain(value, f"optimizer: {where}")
            elif where in tensors:
                raise CheckpointError(f"optimizer: {where!r} names two tensors of the state.")
            else:
                tensors[where] = value
                held[key] = where
        return {"values": rest, "tensors": held}

    groups: list[JSON] = []
    states: dict[str, JSON] = {}
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
        options["given"] = _given(group)
        members = [names[p] for p in group["params"]]
        groups.append({"parameters": members, **split(f"group-{i}", options)})
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            away = [k for k, v in state.items() if isinstance(v, Tensor) and v.device != p.device]
            states[names[p]] = {"shape": [*p.shape], "away": away, **split(names[p], state)}
    return tensors, {"groups": groups, "states": states}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    expected: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Restore what `flatten_optimizer` returned, bit for bit; on an error nothing changes.

    Unlike torch's `load_state_dict` nothing is cast to the parameter's dtype. Options that
    only choose kernels (`fused`, `foreach`, ...) stay those of this optimizer, and so do those
    that the recipe gives another value than it gave the saved one.

    `expected` has what the optimizer usually keeps of a parameter, as `usual_state` returns it.

    Raises:
        CheckpointError: parameters, groups, shapes or types are not those of this optimizer.
    """
    groups: list[dict[str, Any]] = []
    restored: dict[nn.Parameter, dict[str, Any]] = {}
    try:
        parts = [*state["groups"], *state["states"].values()]
        _same("tensors", {n for part in parts for n in part["tensors"].values()}, set(tensors))
        live = {f"group {i}" for i in range(len(optimizer.param_groups))}
        _same("groups", live, {f"group {i}" for i in range(len(state["groups"]))})
        for i, (group, saved) in enumerate(
            zip(optimizer.param_groups, state["groups"], strict=True)
        ):
            members = {names[p] for p in group["params"]}
            _same(f"parameters of group {i}", members, set(saved["parameters"]))
            options: dict[str, Any] = {k: tensors[n].clone() for k, n in saved["tensors"].items()}
            now = _given(group)
            then = {key: value for key, value in saved["values"].items() if key in _OPTIONS}
            then = saved["values"].get("given", then)
            # Of the rate the saved one stays, which the last step had: each step sets its own.
            both = now.keys() & then.keys() - {"lr"}
            kept = {key for key in both if now[key] != then[key]}
            options |= {key: group["given"][key] for key in kept}
            for key, value in saved["values"].items():
                if key not in _KERNELS | kept | {"given"}:
                    options[key] = _like(group[key], value, key) if key in group else value
            groups.append(options)
            for p in group["params"]:
                name = names[p]
                usual = (expected or {}).get(name, {})
                restored[p] = _state_of(p, name, group, tensors, state["states"][name], usual)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"optimizer: its saved state is incomplete or damaged: {error}."
        ) from error
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    optimizer.state.clear()
    optimizer.state.update({p: values for p, values in restored.items() if values})


def usual_state(
    config: OptimizerConfig,
    named: Sequence[tuple[str, nn.Parameter]],
    names: Mapping[nn.Parameter, str],
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that an optimizer keeps of each parameter, by the names of `names`.

    Found by a step on small parameters of as many dimensions: shape and type are those of the real
    state where the shape is the small parameter's, whose sides all differ.
    Empty for an optimizer that cannot take such a step.
    """
    small = {
        name: nn.Parameter(torch.zeros([*range(2, 2 + p.dim())], dtype=p.dtype))
        for name, p in named
    }
    try:
        optimizer = config.build([*small.items()])
        for p in small.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return {
            names[p]: {
                key: value
                for key, value in optimizer.state[small[name]].items()
                if isinstance(value, Tensor)
            }
            for name, p in named
        }
    except Exception:  # an optimizer of a plugin; its state is checked less closely then
        return {}


def _like(live: object, value: Any, key: str) -> Any:
    """Return a group's saved option if it is of the kind that the optimizer has.

    Raises:
        TypeError: It is of another kind.
    """
    if isinstance(live, tuple) and isinstance(value, list):  # JSON has lists only
        value = tuple(value)
    number = (int, float)
    same = type(value) in number if type(live) in number else type(value) is type(live)
    if isinstance(live, tuple) and same:
        same = len(value) == len(live) and all(map(_alike, live, value))
    if not same and live is not None and value is not None:
        raise TypeError(f"{key} is {value!r}, expected something like {live!r}")
    return value


def _alike(live: object, value: object) -> bool:
    number = (int, float)
    return type(value) is type(live) or (type(live) in number and type(value) in number)


def _check(where: str, value: Tensor, p: nn.Parameter, usual: Tensor | None) -> None:
    """Refuse a tensor of state that the optimizer cannot have written.

    Raises:
        ValueError: Its type or shape is another one, or its count of steps is no count.
    """
    if usual is not None:
        shape = p.shape if usual.dim() and [*usual.shape] == [*range(2, 2 + p.dim())] else None
        shape = torch.Size() if not usual.dim() else shape
        if value.dtype != usual.dtype:
            raise ValueError(f"{where} is {value.dtype}, expected {usual.dtype}")
        if shape is not None and value.shape != shape:
            raise ValueError(f"{where} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    if where.endswith(".step") and not value.dim():
        steps = float(value)
        if steps < 0 or steps != int(steps):
            raise ValueError(f"{where} is {steps:g}, expected a number of steps")


def _given(group: Mapping[str, Any]) -> dict[str, JSON]:
    """Return the options that a recipe gave a group, as JSON; empty if they are unknown."""
    given = group.get("given", {}).items()
    known = {k: v for k, v in given if k not in _KERNELS and not isinstance(v, Tensor)}
    return {key: plain(value, f"optimizer: {key}") for key, value in known.items()}


def _state_of(
    p: nn.Parameter,
    name: str,
    group: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    usual: Mapping[str, Tensor],
) -> dict[str, Any]:
    if saved["shape"] != [*p.shape]:
        raise CheckpointError(
            f"optimizer: the state of {name} is for shape {tuple(saved['shape'])}, "
            f"the parameter has {tuple(p.shape)}. Resume with the recipe it was trained with."
        )
    state: dict[str, Any] = dict(saved["values"])
    for key, where in saved["tensors"].items():
        value = tensors[where].detach()
        _check(f"{name}.{key}", value, p, usual.get(key))
        host = key in saved["away"]
        if key == "step" and not value.dim():  # as in torch, whatever device it was saved on
            host = not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if host else p.device
        # Fused kernels read memory in order, so strides must match the parameter's.
        like = p.detach() if value.shape == p.shape else value
        if is_split(like):
            state[key] = split_as(value, like)
        else:
            state[key] = torch.empty_like(like, dtype=value.dtype, device=device).copy_(value)
    return state


def _same(what: str, expected: set[str], found: set[str]) -> None:
    if expected != found:
        missing, extra = (
            ", ".join(sorted(s)[:3]) or "-" for s in (expected - found, found - expected)
        )
        raise CheckpointError(
            f"optimizer: its {what} are not those that were saved: "
            f"missing {missing}; unexpected {extra}. "
            "Resume with the recipe it was trained with."
        )
