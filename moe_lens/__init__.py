"""moe_lens: which experts of a Mixture-of-Experts language model do a thing, and whether they cause it."""

import sys

if sys.argv[:1] == ["-m"] and any(word.partition(".")[0] == "moe_lens" for word in sys.orig_argv):
    # a command, whose imports are still to come
    from moe_lens.interruption import tell_interruption

    tell_interruption()

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
