"""moe_lens: which experts of a Mixture-of-Experts language model do a thing, and whether they cause it."""

__version__ = "0.1.0"
