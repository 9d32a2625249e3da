from .checkpoint import Checkpoints as Checkpoints
from .loop import DevScore as DevScore, fit as fit, log_table as log_table
from .low_rank import TuneLowRank as TuneLowRank
from .merging import save_merged as save_merged
from .methods import Method as Method, Trainable as Trainable, TuneAll as TuneAll, TuneExperts as TuneExperts, TuneRouters as TuneRouters, router_parameters as router_parameters, save_trained as save_trained
from .schedule import Schedule as Schedule
from .training import Tuned as Tuned, tune as tune
