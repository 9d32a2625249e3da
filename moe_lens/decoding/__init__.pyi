from .context_aware import CAD as CAD
from .context_aware import AdaCAD as AdaCAD
from .plain import PLAIN as PLAIN
from .plain import Decoding as Decoding
from .spelling import parse_decoding as parse_decoding
