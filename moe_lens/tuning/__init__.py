"""Training: which parameters a method trains, the loop, and the choice of a learning rate on the dev split."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
