"""Streaming statistics over records: sums by layer, or a few numbers per example; each yields a tidy table."""

from moe_lens.lens.needs import Statistic
from moe_lens.statistics.answer_probability import AnswerProbability
from moe_lens.statistics.attention_mass import AttentionMass, average_heads
from moe_lens.statistics.coactivation import CoActivation
from moe_lens.statistics.expert_outputs import ExpertSaliency, ExpertVocabulary, OutputSimilarity
from moe_lens.statistics.router_load import RouterLoad
from moe_lens.statistics.selected_experts import SelectedExperts
from moe_lens.statistics.usage import ExpertUsage
from moe_lens.statistics.vectors import RoutingVectors
from moe_lens.statistics.vocabulary import VocabularySpecialisation
from moe_lens.statistics.weights import weight_similarity

__all__ = [
    "AnswerProbability",
    "AttentionMass",
    "CoActivation",
    "ExpertSaliency",
    "ExpertUsage",
    "ExpertVocabulary",
    "OutputSimilarity",
    "RouterLoad",
    "RoutingVectors",
    "SelectedExperts",
    "Statistic",
    "VocabularySpecialisation",
    "average_heads",
    "weight_similarity",
]
