"""Streaming statistics over records: sums by layer, or a few numbers per example; each yields a tidy table."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
