"""A model opened: what its experts do is recorded, and changed by interventions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
