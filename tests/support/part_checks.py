"""The conformance kit's check of a part of each kind that has one."""

from __future__ import annotations

import e2ediff_testing as testing

CHECKS = {
    "backbones": testing.check_backbone,
    "interpolants": testing.check_interpolant,
    "time_samplers": testing.check_times,
    "objectives": testing.check_objective,
    "regularizers": testing.check_regularizer,
    "guidance": testing.check_guidance,
    "samplers": testing.check_sampler,
    "sources": testing.check_source,
    "optimizers": testing.check_optimizer,
    "diagnostics": testing.check_diagnostic,
    "metrics": testing.check_metric,
    "averages": testing.check_averaging,
}
