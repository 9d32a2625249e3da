"""ParameterCounts: how many parameters a Mixture-of-Experts model has, and how many of them a token uses."""

from dataclasses import dataclass

from torch import nn

from moe_lens.architecture.discovery import MoEArchitecture, pretrained


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model; those that modules share count once.

    total: all of them. activated: what one token uses, that is all but the routed experts it is not sent to.
    embedding: the token embedding, also the head where both are tied; some authors leave it out of their counts.
    head: the head where it has weights of its own, else 0.
    """

    total: int
    activated: int
    embedding: int
    head: int


def parameter_counts(model: nn.Module, architecture: MoEArchitecture | None = None) -> ParameterCounts:
    """Count a model's parameters; it may be on the meta device.

    architecture: of `model`, where it is known already.
    Routed experts of a layer are taken to be of one size. Raises MoELensError as `MoEArchitecture.of` does.
    """
    architecture = architecture or MoEArchitecture.of(model)
    routed = sum(_count(model.get_submodule(site.experts)) for site in architecture.moe)
    idle = routed - routed * architecture.top_k // architecture.n_experts
    total = _count(model)
    embedding, head = pretrained(model).get_input_embeddings(), model.get_submodule(architecture.head)
    own_head = _count(nn.ModuleList([embedding, head])) - _count(embedding)
    return ParameterCounts(total=total, activated=total - idle, embedding=_count(embedding), head=own_head)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
