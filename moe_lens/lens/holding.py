"""How a model is held while it is measured: in evaluation mode, its outputs plain; afterwards it is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moe_lens.architecture.discovery import pretrained, text_config
from moe_lens.architecture.listed.proof import evaluating

PLAIN_OUTPUTS = {
    "output_router_logits": False,  # for these some models compute a loss, over a mask that generation does not have
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
"""Settings of a configuration that change what a forward pass returns."""


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and returns its logits and nothing beside them that costs.

    Afterwards each of its modules is in its own mode again, and its configuration says what it said.
    """
    with plain_outputs(module), evaluating(module):
        yield


@contextmanager
def plain_outputs(module: nn.Module) -> Iterator[None]:
    """Inside the block a forward pass of the model returns its logits by name, and nothing beside them that costs."""
    configs = {id(config): config for config in (pretrained(module).config, text_config(module))}
    changed = [
        (config, name, value)
        for config in configs.values()
        for name, plain in PLAIN_OUTPUTS.items()
        if (value := getattr(config, name, plain)) != plain
    ]
    try:
        for config, name, _ in changed:
            setattr(config, name, PLAIN_OUTPUTS[name])
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, value)
