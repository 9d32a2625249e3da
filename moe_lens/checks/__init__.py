"""Checks of a lens on its own model: what it records and changes is compared with the bare model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
