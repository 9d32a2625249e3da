"""Pure formulas: scores of answers, what is uncertain, how experts rank, and how models differ in saved tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
