"""From tables to figures and pages, and one prompt as an interactive view; drawing needs no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
