"""Training: which parameters a method trains, the loop, and the choice of a learning rate on the dev split."""

from moe_lens.tuning.checkpoint import Checkpoints
from moe_lens.tuning.loop import DevScore, fit, log_table
from moe_lens.tuning.low_rank import TuneLowRank
from moe_lens.tuning.merging import save_merged
from moe_lens.tuning.methods import (
    Method,
    Trainable,
    TuneAll,
    TuneExperts,
    TuneRouters,
    router_parameters,
    save_trained,
)
from moe_lens.tuning.router import tune_router
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.training import Tuned, tune

__all__ = [
    "Checkpoints",
    "DevScore",
    "Method",
    "Schedule",
    "Trainable",
    "TuneAll",
    "TuneExperts",
    "TuneLowRank",
    "TuneRouters",
    "Tuned",
    "fit",
    "log_table",
    "router_parameters",
    "save_merged",
    "save_trained",
    "tune",
    "tune_router",
]
