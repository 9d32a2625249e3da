"""Training: which parameters a method trains, the loop, and the choice of a learning rate on the dev split."""

from moe_lens.tuning.loop import Schedule, fit
from moe_lens.tuning.router import RouterTuning, router_parameters, tune_router

__all__ = ["RouterTuning", "Schedule", "fit", "router_parameters", "tune_router"]
