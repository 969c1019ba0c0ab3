"""Convert an optimizer's state to named tensors and JSON, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from e2ediff.distributed.tensors import is_split, split_as
from e2ediff.errors import CheckpointError
from e2ediff.store.manifest import plain
from e2ediff.store.storage import JSON

# The choice of kernels belongs to the machine, not to the state.
_KERNELS = frozenset({"foreach", "fused", "capturable", "differentiable"})


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
) -> None:
    """Restore what `flatten_optimizer` returned, bit for bit; on an error nothing changes.

    Unlike torch's `load_state_dict` nothing is cast to the parameter's dtype. Options that
    only choose kernels (`fused`, `foreach`, ...) stay those of this optimizer.

    Raises:
        CheckpointError: parameters, groups or shapes are not those of this optimizer.
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
            for key, value in saved["values"].items():
                if key not in _KERNELS:
                    pair = isinstance(group.get(key), tuple)  # JSON has lists only
                    options[key] = tuple(value) if pair else value
            groups.append(options)
            for p in group["params"]:
                restored[p] = _state_of(p, names[p], group, tensors, state["states"][names[p]])
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"optimizer: its saved state is incomplete: {error!r}.") from error
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    optimizer.state.clear()
    optimizer.state.update({p: values for p, values in restored.items() if values})


def _state_of(
    p: nn.Parameter,
    name: str,
    group: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    if saved["shape"] != [*p.shape]:
        raise CheckpointError(
            f"optimizer: the state of {name} is for shape {tuple(saved['shape'])}, "
            f"the parameter has {tuple(p.shape)}. Resume with the recipe it was trained with."
        )
    state: dict[str, Any] = dict(saved["values"])
    for key, where in saved["tensors"].items():
        value = tensors[where].detach()
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
