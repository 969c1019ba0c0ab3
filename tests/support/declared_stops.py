"""An objective declares neither more nor less than what its losses leave alone."""

from __future__ import annotations

import attrs
import pytest
from e2ediff_testing import check_objective, make_batch, make_draw, make_nets

from e2ediff.backbone import BackboneConfig
from e2ediff.objective import Objective


def declaring(objective: Objective, phase: str, loss: str) -> Objective:
    """The same objective, which declares for this phase that one loss stops."""

    def stops(self: Objective, now: str) -> tuple[str, ...]:
        return (loss,) if now == phase else ()

    cls = attrs.frozen(type("Declaring", (type(objective),), {"stops": stops}))
    return cls(**{a.name: getattr(objective, a.name) for a in attrs.fields(type(objective))})


def holds_its_declaration(objective: Objective, backbone: BackboneConfig | None = None) -> None:
    """`check_objective` passes what is declared, and refuses the declaration of any other loss."""
    cls = type(objective)
    assert cls.stops is not Objective.stops, f"{cls.__name__} leaves open what stops"
    check_objective(objective, backbone)
    nets, batch = make_nets(backbone, objective), make_batch()
    for phase in objective.phases:
        losses = objective.terms(nets, batch, make_draw(batch), phase).losses
        for loss in {*losses} - {*objective.stops(phase)}:
            with pytest.raises(AssertionError, match=f"loss '{loss}' reaches .* stops"):
                check_objective(declaring(objective, phase, loss), backbone)
