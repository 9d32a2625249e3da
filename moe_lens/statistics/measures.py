"""MEASURES: all that the command `measure` can be asked for, by name, each with its statistic and its tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.metrics import (
    domain_specialisation,
    example_means,
    paired_difference,
    risk_difference,
    router_saturation,
    routing_divergence,
)
from moe_lens.metrics.clusters_of_examples import routing_clusters
from moe_lens.metrics.information import domain_information
from moe_lens.metrics.matched_experts import matched_by_tokens, signature_distance
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.activation_rates import ActivationRates
from moe_lens.statistics.affinity import router_affinity
from moe_lens.statistics.answer_probability import AnswerProbability
from moe_lens.statistics.attention_mass import AttentionMass
from moe_lens.statistics.coactivation import CoActivation
from moe_lens.statistics.communities import expert_groups
from moe_lens.statistics.expert_outputs import ExpertSaliency, ExpertVocabulary, OutputSimilarity
from moe_lens.statistics.expert_paths import ExpertPaths
from moe_lens.statistics.expert_portraits import ExpertPortraits
from moe_lens.statistics.logit_spread import LogitSpread
from moe_lens.statistics.pairs import pairs_table
from moe_lens.statistics.router_histograms import RouterHistograms
from moe_lens.statistics.router_load import RouterLoad
from moe_lens.statistics.router_margins import RouterMargins
from moe_lens.statistics.saved import Storable
from moe_lens.statistics.selected_experts import SelectedExperts
from moe_lens.statistics.shared_share import SharedShare
from moe_lens.statistics.token_baseline import TokenBaseline
from moe_lens.statistics.top_contexts import TopContexts
from moe_lens.statistics.usage import ExpertUsage
from moe_lens.statistics.vectors import RoutingVectors
from moe_lens.statistics.vocabulary import VocabularySpecialisation
from moe_lens.statistics.weights import router_similarity

ROUTING, WEIGHTS = "routing", "weights"
"""The measures that have no statistic: rows that are streamed, and what needs no data."""


@dataclass(frozen=True)
class Measure:
    """Something that can be measured of a model on data.

    about: what it is, in some words. make: the statistic at the positions; the lens is None where a saved one is read
        again.
    table: what one model shows on one data set, given the lens too; None for what takes more than that.
    across: what one model shows on all data sets together, given by their names.
    between: what two models differ by on all data sets together, as `against`.
    against: what two models differ by on the same examples, given n_experts too, a difference being second minus
        first; None where no interval of it is known.
    reads: what of the model the table needs again: its "tokens", which all variants of a run share, or its "weights".
    """

    about: str
    make: Callable[[MoELens | None, Positions], Storable]
    table: Callable[[Storable, MoELens | None], pd.DataFrame] | None
    against: Callable[[Storable, Storable, int], pd.DataFrame] | None = None
    reads: Literal["", "tokens", "weights"] = ""
    across: Callable[[Mapping[str, Storable]], pd.DataFrame] | None = None
    between: Callable[[Mapping[str, Storable], Mapping[str, Storable], int], pd.DataFrame] | None = None

    @property
    def takes_two(self) -> bool:
        """Whether it is of two models only."""
        return self.table is None and self.across is None


def _differences(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """One row per number and layer, expert or pair: number, layer, …, first, second, difference, its ends."""
    assert isinstance(first, GroupSums), "what _grouped makes"
    assert isinstance(second, GroupSums), "what _grouped makes"
    parts = [
        _rows(layer, values).assign(number=number)
        for layer, numbers in first.differences(second).items()
        for number, values in numbers.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[["number", *(name for name in table if name != "number")]]


def _rows(layer: int, values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Numbers of a layer [], its experts [expert] or pairs of them [expert, expert] as rows."""
    axes = next(iter(values.values())).ndim
    if axes == 2:
        return pairs_table(layer, dict(values))
    experts = {"expert": np.arange(len(next(iter(values.values()))))} if axes else {}
    return pd.DataFrame({"layer": layer, **experts, **values}, index=None if axes else [0])


def _own(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    return statistic.table()


def _estimates(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    assert isinstance(statistic, GroupSums), "what _grouped makes"
    return pd.concat([_rows(layer, found) for layer, found in statistic.estimates().items()], ignore_index=True)


def _grouped(about: str, make: Callable[[Positions], GroupSums], estimates: bool = False) -> Measure:
    """A measure whose sums are kept by groups of examples; estimates: whether its own table lacks the intervals."""
    table = _estimates if estimates else _own
    return Measure(about, lambda lens, positions: make(positions), table, _differences)


def _by_example(
    about: str, make: Callable[[MoELens | None, Positions], Storable], *, value: str, by: tuple[str, ...]
) -> Measure:
    """A measure that has a share of every example."""
    return Measure(
        about,
        make,
        lambda statistic, lens: example_means(statistic.table(), value=value, by=by),
        lambda first, second, n_experts: paired_difference(first.table(), second.table(), value=value, by=by),
    )


def _specialisation(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    return domain_specialisation(statistic.table().assign(domain="")).drop(columns="domain")


def _rates(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """The difference of activation rates: its first side is what has been added to, the second model."""
    found = risk_difference(second.table(), first.table())
    names = {"first": "second", "second": "first"}
    names |= {f"risk_difference{end}": f"difference{end}" for end in ("", "_low", "_high")}
    return found.rename(columns=names)


def _saturation(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    return router_saturation(first.table(), second.table(), n_experts=n_experts)


def _matching(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    return matched_by_tokens(first.table(), second.table(), n_experts=n_experts)


def _portraits(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    assert isinstance(first, ExpertPortraits), "what `portraits` makes"
    assert isinstance(second, ExpertPortraits), "what `portraits` makes"
    return first.matched(second)


def _signatures(first: Mapping[str, Storable], second: Mapping[str, Storable], n_experts: int) -> pd.DataFrame:
    one, other = ({name: own.table() for name, own in statistics.items()} for statistics in (first, second))
    return signature_distance(one, other, n_experts=n_experts)


def _worded(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """The table with the text of each token after its id."""
    table, lens = statistic.table(), opened(lens)
    ids = sorted(set(table["token_id"].tolist()))
    texts = dict(zip(ids, (lens.tokenizer.decode([one]) for one in ids), strict=True))
    table.insert(table.columns.get_loc("token_id") + 1, "token", table["token_id"].map(texts))
    return table


def _places(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """The table with the text around each place, its token between « and », in the place of their ids and weights."""
    table, tokenizer = statistic.table(), opened(lens).tokenizer
    cuts = zip(table["token_ids"], table["place"], strict=True)
    parts = [(list(ids[:place]), [ids[place]], list(ids[place + 1 :])) for ids, place in cuts]
    before, own, after = zip(*(map(tokenizer.decode, part) for part in parts), strict=True)
    texts = [f"{first}«{word}»{last}" for first, word, last in zip(before, own, after, strict=True)]
    return table.drop(columns=["token_ids", "weights", "place"]).assign(text=texts)


def _affinity(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    assert isinstance(statistic, CoActivation), "what `affinity` makes"
    return router_affinity(statistic, router_similarity(opened(lens)))


def _groups(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    assert isinstance(statistic, CoActivation), "what `groups` makes"
    return expert_groups(statistic)


def _histograms(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    assert isinstance(statistic, RouterHistograms), "what `histograms` makes"
    return statistic.histograms()


def _of_domains(about: str, metric: Callable[[pd.DataFrame], pd.DataFrame]) -> Measure:
    """A measure of all data sets together, each being a domain."""

    def across(statistics: Mapping[str, Storable]) -> pd.DataFrame:
        return metric(pd.concat([own.table().assign(domain=name) for name, own in statistics.items()]))

    return Measure(about, lambda lens, at: RoutingVectors(positions=at), None, across=across)


def opened(lens: MoELens | None) -> MoELens:
    """The lens; MoELensError where there is none."""
    if lens is None:
        raise MoELensError("this takes the model's tokens or weights again; give --model")
    return lens


def _written(lens: MoELens | None, positions: Positions) -> ExpertVocabulary:
    head = torch.nn.Identity() if lens is None else lens.module.get_submodule(lens.architecture.head)
    return ExpertVocabulary(head, positions=positions)


def _answers(lens: MoELens | None, positions: Positions) -> AnswerProbability:
    return AnswerProbability(torch.nn.Identity() if lens is None else lens.project_on_vocab)


MEASURES: Mapping[str, Measure] = {
    "usage": _grouped(
        "the share of selections that each expert has (Eq. 8)", lambda at: ExpertUsage(positions=at), True
    ),
    "load": _grouped("entropy of the routers, and how evenly they load experts", RouterLoad),
    "spread": _grouped("how far apart router logits are", LogitSpread),
    "margins": _grouped("how decided routers are: from the last expert chosen to the first that is not", RouterMargins),
    "dirichlet": _grouped("how concentrated router probabilities are, and how far a Dirichlet fits", RouterHistograms),
    "histograms": Measure(
        "histograms of router probabilities, beside a Dirichlet's",
        lambda lens, at: RouterHistograms(at),
        _histograms,
    ),
    "coactivation": _grouped("which experts are selected together", CoActivation),
    "affinity": Measure(
        "whether experts that the router asks for alike are selected together",
        lambda lens, at: CoActivation(at),
        _affinity,
        reads="weights",
    ),
    "groups": Measure("groups of experts that are selected together", lambda lens, at: CoActivation(at), _groups),
    "paths": Measure("which experts of the next layer follow an expert", lambda lens, at: ExpertPaths(at), _own),
    "rates": _grouped("how often, how strongly and how decidedly tokens take each expert", ActivationRates),
    "specialisation": Measure(
        "how often each expert is active on each data set",
        lambda lens, at: RoutingVectors(positions=at),
        _specialisation,
        _rates,
    ),
    "information": _of_domains("how much experts tell of which data set a text is from", domain_information),
    "clustering": _of_domains("whether clusters of examples by their experts are data sets", routing_clusters),
    "baseline": Measure(
        "how much of each expert's use is told by the token alone", lambda lens, at: TokenBaseline(at), _own
    ),
    "contexts": Measure(
        "the places at which each expert has most weight",
        lambda lens, at: TopContexts(positions=at),
        _places,
        reads="tokens",
    ),
    "tokens": Measure(
        "which experts a token goes to where it is read",
        lambda lens, at: VocabularySpecialisation("input", positions=at),
        _worded,
        reads="tokens",
    ),
    "predictions": Measure(
        "which experts are active where a token is found most likely next",
        lambda lens, at: VocabularySpecialisation("predicted", positions=at),
        _worded,
        reads="tokens",
    ),
    "saliency": _grouped("how much each expert adds to the stream (REAP, EAN)", ExpertSaliency),
    "shared": _grouped("how shared and routed experts divide the work", SharedShare),
    "similarity": _grouped("how alike the outputs of two experts are", OutputSimilarity),
    "vocabulary": Measure("which tokens each expert writes towards", _written, _worded, reads="weights"),
    "attention": _by_example(
        "attention of the prompt's last token to the context and to the answer in it",
        lambda lens, at: AttentionMass(),
        value="mass",
        by=("layer", "step", "target"),
    ),
    "answer": _by_example(
        "the answer's probability after each layer (logit lens)",
        _answers,
        value="probability",
        by=("layer", "tokens"),
    ),
    "saturation": Measure(
        "the share of a token's experts that two models have in common",
        lambda lens, at: SelectedExperts(at),
        None,
        _saturation,
    ),
    "divergence": Measure(
        "how differently two models use experts",
        lambda lens, at: RoutingVectors(positions=at),
        None,
        lambda first, second, n_experts: routing_divergence(first.table(), second.table()),
    ),
    "matching": Measure(
        "which expert of one model is chosen by the tokens that choose an expert of the other",
        lambda lens, at: SelectedExperts(at),
        None,
        _matching,
    ),
    "portraits": Measure(
        "which expert of one model has the router row, and writes, what an expert of the other does",
        ExpertPortraits,
        None,
        _portraits,
    ),
    "signatures": Measure(
        "how far what two models use their experts for is apart, whatever the experts' numbers",
        lambda lens, at: SelectedExperts(at),
        None,
        between=_signatures,
    ),
}
"""By name, in the order in which a page shows them."""
