"""The model organism: a small MoE language model whose unfaithfulness to the context, and its cure, are known."""
