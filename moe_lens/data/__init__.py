"""From files and data sets to examples, and from examples to tokens with context and answer spans."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
