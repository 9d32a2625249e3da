"""MEASURES: all that the command `measure` can be asked for, by name, each with its statistic and its tables."""

from collections.abc import Mapping

from moe_lens.metrics import UNBOUNDED, routing_divergence
from moe_lens.metrics.clusters_of_examples import routing_clusters
from moe_lens.metrics.information import domain_information
from moe_lens.statistics.activation_rates import ActivationRates
from moe_lens.statistics.attention_mass import AttentionMass
from moe_lens.statistics.coactivation import CoActivation
from moe_lens.statistics.expert_outputs import ExpertSaliency, OutputSimilarity
from moe_lens.statistics.expert_paths import ExpertPaths
from moe_lens.statistics.expert_portraits import ExpertPortraits
from moe_lens.statistics.logit_spread import LogitSpread
from moe_lens.statistics.measure_kinds import Measure, by_example, grouped, of_domains, own
from moe_lens.statistics.router_histograms import RouterHistograms
from moe_lens.statistics.router_load import RouterLoad
from moe_lens.statistics.router_margins import RouterMargins
from moe_lens.statistics.selected_experts import SelectedExperts
from moe_lens.statistics.shared_share import SharedShare
from moe_lens.statistics.tables_of_measures import (
    answered,
    apart,
    beside_rows,
    binned,
    grouped_experts,
    in_text,
    in_words,
    matched_portraits,
    matched_tokens,
    rate_difference,
    shared_selections,
    specialised,
    written_by,
)
from moe_lens.statistics.token_baseline import TokenBaseline
from moe_lens.statistics.top_contexts import TopContexts
from moe_lens.statistics.usage import ExpertUsage
from moe_lens.statistics.vectors import RoutingVectors
from moe_lens.statistics.vocabulary import VocabularySpecialisation

ROUTING, WEIGHTS = "routing", "weights"
"""The measures that have no statistic: rows that are streamed, and what needs no data."""


MEASURES: Mapping[str, Measure] = {
    "usage": grouped(
        "the share of selections that each expert has (Eq. 8)", lambda at: ExpertUsage(positions=at), True
    ),
    "load": grouped("entropy of the routers, and how evenly they load experts", RouterLoad),
    "spread": grouped("how far apart router logits are", LogitSpread),
    "margins": grouped("how decided routers are: from the last expert chosen to the first that is not", RouterMargins),
    "dirichlet": grouped("how concentrated router probabilities are, and how far a Dirichlet fits", RouterHistograms),
    "histograms": Measure(
        "histograms of router probabilities, beside a Dirichlet's",
        lambda lens, at: RouterHistograms(at),
        binned,
    ),
    "coactivation": grouped("which experts are selected together", CoActivation),
    "affinity": Measure(
        "whether experts that the router asks for alike are selected together",
        lambda lens, at: CoActivation(at),
        beside_rows,
        reads="weights",
    ),
    "groups": Measure(
        "groups of experts that are selected together", lambda lens, at: CoActivation(at), grouped_experts
    ),
    "paths": Measure("which experts of the next layer follow an expert", lambda lens, at: ExpertPaths(at), own),
    "rates": grouped("how often, how strongly and how decidedly tokens take each expert", ActivationRates),
    "specialisation": Measure(
        "how often each expert is active on each data set",
        lambda lens, at: RoutingVectors(positions=at),
        specialised,
        rate_difference,
    ),
    "information": of_domains("how much experts tell of which data set a text is from", domain_information),
    "clustering": of_domains("whether clusters of examples by their experts are data sets", routing_clusters),
    "baseline": Measure(
        "how much of each expert's use is told by the token alone", lambda lens, at: TokenBaseline(at), own
    ),
    "contexts": Measure(
        "the places at which each expert has most weight",
        lambda lens, at: TopContexts(positions=at),
        in_text,
        reads="tokens",
    ),
    "tokens": Measure(
        "which experts a token goes to where it is read",
        lambda lens, at: VocabularySpecialisation("input", positions=at),
        in_words,
        reads="tokens",
    ),
    "predictions": Measure(
        "which experts are active where a token is found most likely next",
        lambda lens, at: VocabularySpecialisation("predicted", positions=at),
        in_words,
        reads="tokens",
    ),
    "saliency": grouped("how much each expert adds to the stream (REAP, EAN)", ExpertSaliency),
    "shared": grouped("how shared and routed experts divide the work", SharedShare),
    "similarity": grouped("how alike the outputs of two experts are", OutputSimilarity),
    "vocabulary": Measure("which tokens each expert writes towards", written_by, in_words, reads="weights"),
    "attention": by_example(
        "attention of the prompt's last token to the context and to the answer in it",
        lambda lens, at: AttentionMass(),
        values={"mass": (0, 1)},
        by=("layer", "step", "target"),
    ),
    "answer": by_example(
        "the answer's probability after each layer (logit lens)",
        answered,
        values={"probability": (0, 1), "log_probability": UNBOUNDED},
        by=("layer", "tokens"),
    ),
    "saturation": Measure(
        "the share of a token's experts that two models have in common",
        lambda lens, at: SelectedExperts(at),
        None,
        shared_selections,
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
        matched_tokens,
    ),
    "portraits": Measure(
        "which expert of one model has the router row, and writes, what an expert of the other does",
        ExpertPortraits,
        None,
        matched_portraits,
    ),
    "signatures": Measure(
        "how far what two models use their experts for is apart, whatever the experts' numbers",
        lambda lens, at: SelectedExperts(at),
        None,
        between=apart,
    ),
}
"""By name, in the order in which a page shows them."""
