from .attention import attention_rows as attention_rows
from .delta import apply_delta as apply_delta, save_delta as save_delta, weights_digest as weights_digest
from .interventions import MODES as MODES, Intervention as Intervention, Renormalize as Renormalize, Reroute as Reroute, Rows as Rows, Zero as Zero
from .lens import MoELens as MoELens
from .needs import Needs as Needs, Statistic as Statistic
from .record import CAPTURES as CAPTURES, Capture as Capture, Record as Record
