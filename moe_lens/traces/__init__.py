"""What serving engines say of routing: traces read and refused, measured without a model, and compared."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
