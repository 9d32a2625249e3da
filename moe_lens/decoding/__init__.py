"""Answers by other means than the model's own most likely tokens: each a `Decoding`, for any lens and intervention."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
