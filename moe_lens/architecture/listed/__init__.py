"""MoE blocks whose experts are a list of modules, as files of transformers-4 style have them, made readable.

Such a block chooses and calls its experts inside its own forward pass, often without gradients, so that nothing can
be read or changed there. `normalize` gives its gate and its experts the protocol of transformers >= 5: the router
returns (logits, weights, indices), the experts take (hidden_states, top_k_index, top_k_weights). Only the classes of
the modules are exchanged: parameters and their names stay, and a saved model has its original layout. A block is
exchanged only when its output on random input is reproduced and gradients reach the router and the experts.
"""

from moe_lens.architecture.listed.normalizing import normalize
from moe_lens.architecture.listed.readable import IndexedExperts, restore

__all__ = ["IndexedExperts", "normalize", "restore"]
