"""Training: which parameters a method trains, the loop, and the choice of a learning rate on the dev split."""

from moe_lens.tuning.checkpoint import Checkpoints
from moe_lens.tuning.loop import DevScore, fit, log_table
from moe_lens.tuning.router import Router, router_parameters, tune_router
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.tuned import Tuned, tune

__all__ = [
    "Checkpoints",
    "DevScore",
    "Router",
    "Schedule",
    "Tuned",
    "fit",
    "log_table",
    "router_parameters",
    "tune",
    "tune_router",
]
