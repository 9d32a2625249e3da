"""The MoE side of a causal language model: where its parts are, found by structure; only here are family names."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
