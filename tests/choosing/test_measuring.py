"""Scores as tables: taken from any statistic, measured once for each model that they are about, and kept."""

import pickle
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_methods import TEXTS
from training_cases import EXAMPLES, fresh

from moe_lens import SCORES, ExpertSaliency, ExpertSet, ExpertUsage, MoELens, MoELensError
from moe_lens.causal import Attribution
from moe_lens.choosing import Ground, Models, Procedure, Score, Top, choices, parse, score_named, score_tables
from moe_lens.choosing.contrast import load_prompts
from moe_lens.choosing.measuring import is_parted, passes_of, tables_on_parts
from moe_lens.choosing.procedures import Attributed, SingleEffects
from moe_lens.lens.delta import with_delta
from moe_lens.lens.interventions import Force
from moe_lens.lens.needs import Needs
from moe_lens.results import read_provenance
from moe_lens.statistics.accumulators import LayerSums
from moe_lens.tuning import TuneRouters, save_trained


@pytest.fixture
def routers(tokenizer, tmp_path):
    """A delta of routers with other weights than the base's, and the lens that has them."""
    lens = fresh(tokenizer)
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        for name in trained.names:
            lens.module.get_parameter(name).neg_()
    save_trained(lens.module, trained, tmp_path / "routers", facts={"method": "router"})
    return tmp_path / "routers", lens


@pytest.fixture
def models(lenses) -> Models:
    """Any two models of one shape."""
    return Models(base=lambda: nullcontext(lenses["olmoe"]), tuned=lambda: nullcontext(lenses["qwen3_moe"]))


@pytest.fixture
def passes(lenses, monkeypatch) -> list[tuple[str, list[str]]]:
    """What is measured from now on: the model, and the statistics of that pass."""
    made = []
    names = {id(lenses["olmoe"]): "base", id(lenses["qwen3_moe"]): "tuned"}
    measure = MoELens.measure

    def counted(self, examples, *statistics, **rest):
        made.append((names[id(self)], [type(statistic).__name__ for statistic in statistics]))
        return measure(self, examples, *statistics, **rest)

    monkeypatch.setattr(MoELens, "measure", counted)
    return made


MEASURED = [score for score in SCORES.values() if not isinstance(score.measured_by(), Procedure)]
"""Those of a statistic."""


def refused():
    raise AssertionError("a model was opened that no score asks for")


def test_scores_are_usage_of_tuned_base_or_their_difference_and_saliency(models, lenses):
    tables = score_tables(MEASURED, models, EXAMPLES)
    columns = ("layer", "expert", "score")
    assert {tuple(table.columns) for table in tables.values()} == {columns, (*columns, "score_low", "score_high")}
    scores = {name: table["score"] for name, table in tables.items()}
    for end in ("", "-last", "-question", "-mass"):
        assert scores[f"ce-gain{end}"].to_numpy() == pytest.approx((scores[f"ce{end}"] - scores[f"oe{end}"]).to_numpy())
    assert scores["ce"].sum() == pytest.approx(3.0)  # frequencies sum to 1 in each layer
    assert len({tuple(score) for score in scores.values()}) == len(MEASURED)
    usage, saliency = lenses["olmoe"].measure(EXAMPLES, ExpertUsage(), ExpertSaliency())
    assert scores["oe"].to_numpy() == pytest.approx(usage.table()["score"].to_numpy())
    for name in ("reap", "ean"):
        assert scores[name].to_numpy() == pytest.approx(saliency.table()[name].to_numpy())


def test_forced_is_what_the_answers_gain_when_an_expert_is_always_selected(models, lenses):
    lens, examples = lenses["olmoe"], EXAMPLES[::4]
    table = score_tables([score_named("forced")], models, examples)["forced"].set_index(["layer", "expert"])
    assert len(table) == 3 * 8
    asked = {"batch_size": 8, "progress": False}
    before = torch.tensor(lens.answer_log_probabilities(examples, **asked))
    for layer, expert in ((0, 1), (2, 5)):
        with lens.intervene(Force(ExpertSet.of({layer: [expert]}))):
            gain = torch.tensor(lens.answer_log_probabilities(examples, **asked)) - before
        row = table.loc[(layer, expert)]
        assert row["score"] == pytest.approx(gain.mean().item(), abs=1e-4)
        assert row["score_low"] <= row["score"] <= row["score_high"]
    assert table["score"].abs().max() > 1e-3


def test_each_statistic_is_measured_once_and_each_model_in_one_pass(models, passes):
    score_tables([*MEASURED, SCORES["ce"]], models, EXAMPLES)
    assert [(model, len(statistics)) for model, statistics in passes] == [("base", 7), ("tuned", 4)]
    assert passes[0][1].count("ExpertSaliency") == 1  # of which reap and ean are two columns


@pytest.mark.parametrize(("names", "asked"), [
    (["ce", "ce-mass"], "tuned"), (["oe", "esft-token", "reap"], "base"),
])  # fmt: skip
def test_a_model_that_no_score_asks_for_is_not_opened(models, passes, names, asked):
    other = "base" if asked == "tuned" else "tuned"
    tables = score_tables([SCORES[name] for name in names], replace(models, **{other: refused}), EXAMPLES)
    assert list(tables) == names
    assert [model for model, _ in passes] == [asked]
    with pytest.raises(AssertionError, match="no score asks for"):
        score_tables([SCORES["ce-gain"]], replace(models, **{other: refused}), EXAMPLES)
    assert score_tables([], Models(refused, refused), EXAMPLES) == {}


def test_tables_are_kept_and_only_what_is_missing_is_measured(models, passes, tmp_path):
    def asked(*names: str, by: str = "a") -> dict[str, pd.DataFrame]:
        passes.clear()
        return score_tables([SCORES[n] for n in names], models, EXAMPLES, out=tmp_path, made_by={"model": by})

    first = asked("ce", "reap")
    assert {file.name for file in tmp_path.iterdir()} == {"score-ce.parquet", "score-reap.parquet"}
    assert read_provenance(tmp_path / "score-ce.parquet")["model"] == "a"
    again = asked("reap", "ce")
    assert not passes
    for name, table in again.items():
        pd.testing.assert_frame_equal(table, first[name])
    more = asked("ce", "oe", "reap")
    assert passes == [("base", ["ExpertUsage"])]
    gain = asked("ce-gain", "ce")["ce-gain"]
    assert [model for model, _ in passes] == ["base", "tuned"]
    assert gain["score"].to_numpy() == pytest.approx((more["ce"]["score"] - more["oe"]["score"]).to_numpy())
    (tmp_path / "score-ce.parquet").unlink()
    asked("ce", "oe", "reap")
    assert passes == [("tuned", ["ExpertUsage"])]
    with pytest.raises(MoELensError, match="another run: its model is a, here it is b"):
        asked("ce", "reap", by="b")
    assert not passes


class Probability(LayerSums):
    """The mean probability that the router gives each expert."""

    def __init__(self) -> None:
        super().__init__(Needs.of({"routing"}, "all"), {})

    def sums(self, record):
        kept = record.position_mask("all")
        return {
            layer: {"sum": routing.probabilities()[kept].double().sum(0), "tokens": kept.sum().double()}
            for layer, routing in record.routing.items()
        }

    def table(self) -> pd.DataFrame:
        rows = [
            (layer, expert, probability)
            for layer, sums in self.layer_sums().items()
            for expert, probability in enumerate((sums["sum"] / sums["tokens"]).tolist())
        ]
        return pd.DataFrame(rows, columns=["layer", "expert", "probability"])


@pytest.mark.parametrize(("statistic", "column"), [
    (Probability, "probability"), (ExpertSaliency, "tokens"), (lambda: ExpertSaliency("last"), "ean"),
])  # fmt: skip
def test_any_statistic_with_a_row_for_each_expert_makes_a_score(models, lenses, statistic, column):
    [base], [tuned] = (lenses[name].measure(EXAMPLES, statistic()) for name in ("olmoe", "qwen3_moe"))
    by_hand = {"base": base.table(), "tuned": tuned.table()}
    for of, table in by_hand.items():
        score = Score("mine", "my own", of, statistic, column)
        found = score_tables([score], models, EXAMPLES)
        assert found["mine"]["score"].to_numpy() == pytest.approx(table[column].to_numpy())
        [choice] = choices([Top(score, 2)], Ground(lenses["olmoe"].architecture, "olmoe", found))
        assert (choice.name, choice.experts) == ("mine:2", ExpertSet.top(table, 2, score=column))
    gain = score_tables([Score("mine", "my own", "gain", statistic, column)], models, EXAMPLES)["mine"]["score"]
    assert gain.to_numpy() == pytest.approx((by_hand["tuned"][column] - by_hand["base"][column]).to_numpy())


def test_a_score_that_came_to_mean_something_else_is_no_longer_the_one_that_is_kept(models, tmp_path):
    mine = Score("mine", "my own", "base", ExpertSaliency, "reap")
    first = score_tables([mine], models, EXAMPLES, out=tmp_path, made_by={"model": "m"})["mine"]
    for other in (replace(mine, column="ean"), replace(mine, statistic=lambda: ExpertSaliency("last"))):
        with pytest.raises(MoELensError, match="holds the results of another run"):
            score_tables([other], models, EXAMPLES, out=tmp_path, made_by={"model": "m"})
        assert tuple(score_tables([other], models, EXAMPLES)["mine"]["score"]) != tuple(first["score"])


def test_attribution_to_another_function_of_the_same_name_is_another_score(models, tmp_path):
    def target(logits, examples):
        return logits[:, 0]

    first = Score("mine", "my own", "model", lambda own=target: Attributed(Attribution(target=own)))

    def target(logits, examples):
        return logits[:, 1]

    second = Score("mine", "my own", "model", lambda own=target: Attributed(Attribution(target=own)))
    kept = {"out": tmp_path, "made_by": {"model": "m"}}
    score_tables([first], models, EXAMPLES, **kept)
    with pytest.raises(MoELensError, match="holds the results of another run"):
        score_tables([second], models, EXAMPLES, **kept)


def test_ceft_ranks_by_the_tuned_model_and_esft_by_the_base_which_is_left_alone(tokenizer, routers):
    folder, tuned = routers
    lens = fresh(tokenizer)
    before, _ = lens.run_with_cache(TEXTS)
    [ratio] = tuned.measure(EXAMPLES, ExpertUsage(), progress=False)
    [count] = lens.measure(EXAMPLES, ExpertUsage("token"), progress=False)

    @contextmanager
    def with_routers():
        with with_delta(lens.module, folder):
            yield lens

    models = Models(base=lambda: nullcontext(lens), tuned=with_routers)
    tables = score_tables([SCORES[name] for name in ("ce", "ce-gain", "esft-token")], models, EXAMPLES)
    ground = Ground(lens.architecture, "m", tables)
    [ce], [esft] = (choices(parse(text), ground) for text in ("ce:2", "esft-token:p=0.4"))
    assert ce.experts == ExpertSet.top(ratio.table(), 2) != ExpertSet.top(count.table(), 2)
    assert esft.experts == ExpertSet.cumulative(count.table(), 0.4)
    assert torch.equal(lens.run_with_cache(TEXTS)[0], before)


def test_one_model_may_stand_for_both(olmoe):
    models = Models(base=lambda: nullcontext(olmoe), tuned=lambda: nullcontext(olmoe))
    tables = score_tables([SCORES["ce"], SCORES["ce-gain"], SCORES["oe"]], models, EXAMPLES)
    pd.testing.assert_frame_equal(tables["ce"], tables["oe"])
    assert not tables["ce-gain"]["score"].any()


def test_what_is_kept_needs_a_provenance(models, tmp_path):
    for wrong in ({"out": tmp_path}, {"made_by": {"model": "m"}}):
        with pytest.raises(MoELensError, match="out and made_by belong together"):
            score_tables([SCORES["ce"]], models, EXAMPLES, **wrong)


def test_what_scores_are_on_parts_comes_from_the_passes_over_all_and_is_what_parts_alone_give(lenses, models, passes):
    names = ("oe", "esft-token", "reap", "attribution-last(answer)", "attribution-add(answer)")
    scores = [score_named(name) for name in names]
    assert all(map(is_parted, scores))
    assert not is_parted(SCORES["step"])
    tokens = []
    embedding = lenses["olmoe"].module.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, inputs: tokens.append(int(inputs[0].shape[0])))
    found = tables_on_parts(scores, models, EXAMPLES, parts=3, batch_size=2)
    hook.remove()
    assert sum(tokens) == 2 * len(EXAMPLES), "statistics once and attribution once, which share no pass"
    apart = [EXAMPLES, *(EXAMPLES[number::3] for number in range(3))]
    for own, examples in zip(found, apart, strict=True):
        for name, table in score_tables(scores, models, examples, batch_size=2).items():
            pd.testing.assert_frame_equal(own[name], table, rtol=1e-4, atol=1e-6)


def test_what_measuring_will_take_is_about_what_it_takes(lenses, models):
    lens, runs = lenses["olmoe"], []
    hook = lens.module.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: runs.append(inputs[0].shape[0])
    )
    for names in (["oe", "reap"], ["contrast", "contrast-all"], ["attribution-integrated(answer)"], ["step"]):
        scores = [score_named(name) for name in names]
        runs.clear()
        score_tables(scores, models, EXAMPLES)
        said = passes_of(scores, lens, EXAMPLES, load_prompts)
        assert sum(runs) / len(EXAMPLES) == said, names
    hook.remove()
    one = [SingleEffects()]
    experts = len(lens.architecture.moe_layers) * lens.architecture.n_experts
    assert SingleEffects.passes(one, lens, EXAMPLES, load=load_prompts) == 1 + experts


def test_a_score_is_found_again_by_another_process():
    for score in (*SCORES.values(), score_named("attribution-last(answer)"), score_named("contrast(novel;swap)")):
        assert pickle.loads(pickle.dumps(score)) == score
