from .discovery import MoEArchitecture as MoEArchitecture
from .moe_layer import Inputs as Inputs
from .moe_layer import MoELayer as MoELayer
from .moe_layer import Moment as Moment
from .sizes import ParameterCounts as ParameterCounts
from .sizes import parameter_counts as parameter_counts
