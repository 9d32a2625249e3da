"""Do experts cause what a model does: answers under interventions, scored; and every expert's own effect."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
