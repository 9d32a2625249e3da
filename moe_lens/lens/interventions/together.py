"""What several interventions ask of one model together: contradictions are refused before anything runs."""

from collections.abc import Sequence

from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.per_row import Rows
from moe_lens.lens.interventions.protocol import Intervention, Placed, acts_in


def check_interventions(interventions: Sequence[Intervention], architecture: MoEArchitecture) -> None:
    """MoELensError unless the model has what they act on, and its routers can do all that they ask for at once.

    Whether two of them ever act at the same position is not looked at: what contradicts anywhere is refused.
    """
    for intervention in interventions:
        _expect_intervention(intervention)
        intervention.check(architecture)
    stacks = _by_row(interventions)
    for layer in architecture.moe_layers:
        acting = [own for own in interventions if acts_in(own, layer)]
        if not any(own.routes for own in acting):
            continue
        asked = [own.asks(layer, architecture.n_experts) for own in acting]
        together = RouterChange.together(asked)
        fixed = architecture.at(layer).fixed_selection
        if fixed and (together.reselects or any(own.selects for own in acting)):
            raise MoELensError(f"the selection of layer {layer} cannot be replaced: {fixed}; leave that layer out")
        fewest, most = _sizes(acting, asked, architecture.top_k)
        if together.excluded is not None:
            _check_left(together.excluded, layer, architecture, most)
        if together.forced is not None:
            _check_forced(together.forced, together.excluded, layer, fewest)
        if any(own.selects for own in acting):
            _check_given(stacks, layer, architecture)


def _by_row(interventions: Sequence[Intervention]) -> list[tuple[Intervention, ...]]:
    """What acts in each row, each different stack once; MoELensError for `Rows` of different lengths."""
    lengths = {len(own.interventions) for own in interventions if isinstance(own, Rows)}
    if len(lengths) > 1:
        raise MoELensError(f"Rows of different lengths cannot act together; got {sorted(lengths)}")
    found = {}
    for row in range(*lengths) if lengths else range(1):
        of_row = (own.interventions[row] if isinstance(own, Rows) else own for own in interventions)
        stack = tuple(own for own in of_row if own is not None)
        found[tuple(map(id, stack))] = stack
    return list(found.values())


def _sizes(acting: Sequence[Intervention], asked: Sequence[RouterChange], top_k: int) -> tuple[int, int]:
    """The fewest and the most experts that some token gets. top_k: the model's own number."""
    sizes, everywhere = set(), False
    for own, change in zip(acting, asked, strict=True):
        if change.top_k is not None:
            sizes |= {int(k) or top_k for k in change.top_k.flatten()}
            everywhere |= isinstance(own, Placed) and own.positions == own.steps == "all"
    sizes |= set() if everywhere else {top_k}
    return min(sizes), max(sizes)


def _check_left(excluded: Tensor, layer: int, architecture: MoEArchitecture, most: int) -> None:
    """MoELensError unless enough experts are left for tokens that need `most`.

    With group-limited routing a token may be sent to the groups with the fewest experts left, so those have to suffice.
    """
    if architecture.at(layer).observed.chooses_by_token:
        raise MoELensError(
            f"layer {layer} selects experts by a fixed table of token ids, so there is no next expert to reroute "
            "to; use Zero or Renormalize there"
        )
    groups, taken = architecture.groups or (1, 1)
    per_group = (~excluded).reshape(-1, groups, architecture.n_experts // groups).sum(-1)  # [batch, group]
    fewest = int(per_group.sort(-1).values[:, :taken].sum(-1).min())
    if fewest < most:
        where = f" in some {taken} of its {groups} groups" if architecture.groups else ""
        raise MoELensError(
            f"rerouting in layer {layer} leaves {fewest} experts{where}, fewer than the "
            f"{most} that each token needs; remove fewer experts, or use Zero"
        )


def _check_forced(forced: Tensor, excluded: Tensor | None, layer: int, fewest: int) -> None:
    """MoELensError for more forced experts than some token gets, or experts that are both forced and taken away."""
    assert forced is not None
    most = int(forced.sum(-1).max())
    if most > fewest:
        raise MoELensError(f"{most} experts are forced in layer {layer}, where a token gets {fewest}; force fewer")
    both = None if excluded is None else forced & excluded
    if both is not None and both.any():
        experts = sorted(set(both.nonzero()[:, -1].tolist()))
        raise MoELensError(
            f"experts {experts} of layer {layer} are forced and rerouted at once; leave them out of one of the two"
        )


def _check_given(stacks: Sequence[Sequence[Intervention]], layer: int, architecture: MoEArchitecture) -> None:
    """MoELensError where a row has a selection given and something else that decides which experts are selected."""
    for stack in stacks:
        acting = [own for own in stack if acts_in(own, layer)]
        if not any(own.selects for own in acting):
            continue
        for own in acting:
            asked = own.asks(layer, architecture.n_experts)
            others = own.replaces_routers or any(
                part is not None for part in (asked.excluded, asked.forced, asked.top_k)
            )
            if others:
                raise MoELensError(
                    f"layer {layer} cannot get the selection of another run and {own!r}, which both say what is "
                    "selected; leave one of the two out"
                )


def _expect_intervention(value: object) -> None:
    """MoELensError unless it is an intervention."""
    if isinstance(value, ExpertSet):
        raise MoELensError(
            f"got experts, {value.brief()}, without what to do to them; give an intervention such as Zero(experts), "
            "Renormalize(experts) or Reroute(experts)"
        )
    if not isinstance(value, Intervention):
        raise MoELensError(f"expected an intervention such as Zero(experts); got {value!r:.80}")
