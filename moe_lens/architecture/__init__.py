"""The MoE side of a causal language model: where its parts are, found by structure; only here are family names."""

from moe_lens.architecture.discovery import MoEArchitecture
from moe_lens.architecture.moe_layer import Inputs, MoELayer

__all__ = ["Inputs", "MoEArchitecture", "MoELayer"]
