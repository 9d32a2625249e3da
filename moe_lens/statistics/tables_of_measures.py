"""The tables of measures that are no statistic's own: of what two models share, and of what takes the model again."""

from collections.abc import Mapping

import pandas as pd
import torch

from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.metrics import domain_specialisation, risk_difference, router_saturation
from moe_lens.metrics.matched_experts import matched_by_tokens, signature_distance
from moe_lens.statistics.affinity import router_affinity
from moe_lens.statistics.answer_probability import AnswerProbability
from moe_lens.statistics.coactivation import CoActivation
from moe_lens.statistics.communities import expert_groups
from moe_lens.statistics.expert_outputs import ExpertVocabulary
from moe_lens.statistics.expert_portraits import ExpertPortraits
from moe_lens.statistics.router_histograms import RouterHistograms
from moe_lens.statistics.saved import Storable
from moe_lens.statistics.weights import router_similarity


def specialised(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """Activation rates on one data set, with intervals over examples."""
    return domain_specialisation(statistic.table().assign(domain="")).drop(columns="domain")


def rate_difference(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """The difference of activation rates: its first side is what has been added to, the second model."""
    found = risk_difference(second.table(), first.table())
    names = {"first": "second", "second": "first"}
    names |= {f"risk_difference{end}": f"difference{end}" for end in ("", "_low", "_high")}
    return found.rename(columns=names)


def shared_selections(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """`router_saturation` of two models."""
    return router_saturation(first.table(), second.table(), n_experts=n_experts)


def matched_tokens(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """`matched_by_tokens` of two models."""
    return matched_by_tokens(first.table(), second.table(), n_experts=n_experts)


def matched_portraits(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """Two models' experts matched by their router rows and mean outputs."""
    assert isinstance(first, ExpertPortraits), "what `portraits` makes"
    assert isinstance(second, ExpertPortraits), "what `portraits` makes"
    return first.matched(second)


def apart(first: Mapping[str, Storable], second: Mapping[str, Storable], n_experts: int) -> pd.DataFrame:
    """`signature_distance` of two models, on all data sets."""
    one, other = ({name: own.table() for name, own in statistics.items()} for statistics in (first, second))
    return signature_distance(one, other, n_experts=n_experts)


def in_words(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """The table with the text of each token after its id."""
    table, lens = statistic.table(), opened(lens)
    ids = sorted(set(table["token_id"].tolist()))
    texts = dict(zip(ids, (lens.tokenizer.decode([one]) for one in ids), strict=True))
    table.insert(table.columns.get_loc("token_id") + 1, "token", table["token_id"].map(texts))
    return table


def in_text(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """The table with the text around each place, its token between « and », in the place of their ids and weights."""
    table, tokenizer = statistic.table(), opened(lens).tokenizer
    cuts = zip(table["token_ids"], table["place"], strict=True)
    parts = [(list(ids[:place]), [ids[place]], list(ids[place + 1 :])) for ids, place in cuts]
    before, own, after = zip(*(map(tokenizer.decode, part) for part in parts), strict=True)
    texts = [f"{first}«{word}»{last}" for first, word, last in zip(before, own, after, strict=True)]
    return table.drop(columns=["token_ids", "weights", "place"]).assign(text=texts)


def beside_rows(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """`router_affinity`, with the rows of the model's routers."""
    assert isinstance(statistic, CoActivation), "what `affinity` makes"
    return router_affinity(statistic, router_similarity(opened(lens)))


def grouped_experts(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """`expert_groups` of co-activation."""
    assert isinstance(statistic, CoActivation), "what `groups` makes"
    return expert_groups(statistic)


def binned(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """The histograms, instead of the fit's numbers."""
    assert isinstance(statistic, RouterHistograms), "what `histograms` makes"
    return statistic.histograms()


def opened(lens: MoELens | None) -> MoELens:
    """The lens; MoELensError where there is none."""
    if lens is None:
        raise MoELensError("this takes the model's tokens or weights again; give --model")
    return lens


def written_by(lens: MoELens | None, positions: Positions) -> ExpertVocabulary:
    """The statistic with the model's head; for one that is read again any will do."""
    head = torch.nn.Identity() if lens is None else lens.module.get_submodule(lens.architecture.head)
    return ExpertVocabulary(head, positions=positions)


def answered(lens: MoELens | None, positions: Positions) -> AnswerProbability:
    """The statistic with the model's logit lens; for one that is read again any will do."""
    return AnswerProbability(torch.nn.Identity() if lens is None else lens.project_on_vocab)
