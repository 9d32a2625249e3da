from .discovery import MoEArchitecture as MoEArchitecture
from .moe_layer import Inputs as Inputs, MoELayer as MoELayer, Moment as Moment
from .sizes import ParameterCounts as ParameterCounts, parameter_counts as parameter_counts
