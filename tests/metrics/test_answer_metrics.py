"""BLEU, METEOR, ROUGE-L and SQuAD's scores: worked by hand, against other implementations, and without the packages."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from moe_lens import metrics
from moe_lens.choosing.scores import SCORES
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.metrics import METRICS, exact_match, f1, metrics_named
from moe_lens.metrics.catalogue import Metric, expect_single
from moe_lens.metrics.pooled import corpus_bleu_shares, group_shares
from moe_lens.metrics.text import bleu, meteor, rouge_l, rouge_l_unicode
from moe_lens.metrics.wordnet import DEBIAN, read_wordnet, wordnet

SHARED = os.environ.get("MOE_LENS_SHARED")


def perturbed(answer: str, other: str, random_: random.Random) -> str:
    """The answer with one of the changes that models make."""
    words = answer.split()
    return random_.choice([
        answer, f"the {answer}.", answer.upper(), " ".join(words[1:]), f"{answer} and {other}", other, "",
        f"It was {answer}!", answer.replace(" ", "  "), "".join(answer.split("-")), f"“{answer}”",
        " ".join(words[::-1]),
    ])  # fmt: skip


def agree_with_torchmetrics(pairs: list[tuple[str, list[str]]]) -> None:
    """Each pair by itself, so that no two errors can cancel out."""
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    for prediction, answers in pairs:
        theirs = squad(
            {"prediction_text": prediction, "id": "0"},
            {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "0"},
        )
        assert exact_match(prediction, answers) == pytest.approx(float(theirs["exact_match"]) / 100), prediction
        assert f1(prediction, answers) == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6), prediction


def test_em_and_f1_are_torchmetrics():
    golds = [["Belmor", "the city of Belmor"], ["1,234"], ["an A-team", "a team"], ["Éire"], ["U.S."], ["東京 都"]]
    random_ = random.Random(0)
    agree_with_torchmetrics([(perturbed(g[0], "Paris", random_), g) for g in golds for _ in range(12)])


@pytest.mark.skipif(SHARED is None, reason="real SQuAD examples are in MOE_LENS_SHARED only")
def test_em_and_f1_are_torchmetrics_on_a_thousand_real_pairs():
    file = Path(SHARED) / "data" / "squad" / "dev.json"
    rows = json.loads(file.read_text(encoding="utf-8"))[:1001]
    answers = [row["answer"] for row in rows]
    random_ = random.Random(0)
    golds = [answers[i : i + 1 + i % 2] for i in range(1000)]  # one gold answer, or two
    pairs = [(perturbed(gold[-1], answers[i - 1], random_), gold) for i, gold in enumerate(golds)]
    scores = [exact_match(*pair) for pair in pairs]
    assert 0.2 < sum(scores) / 1000 < 0.8, "the pairs do not tell scorers apart"
    agree_with_torchmetrics(pairs)


def test_identical_texts_score_one_and_strangers_nothing():
    text = "police killed the gunman in the old town"
    for score in (bleu, rouge_l):
        assert score(text, ["something", text]) == pytest.approx(1)
        assert score("", [text]) == 0
        assert score("unrelated", [text]) == 0


def test_rouge_l_is_the_subsequences_f():
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(3 / 4)  # Lin (2004), 3.2
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(2 / 4)


@pytest.mark.parametrize("text", ["नई दिल्ली", "東京は首都です", "São Paulo", "Zürich", "שלֹום רב", "서울에서"])
def test_rouge_l_unicode_knows_every_scripts_words(text):
    assert rouge_l_unicode(text, [text]) == 1
    assert rouge_l_unicode("xyz", [text]) == 0


def test_rouge_l_unicode_counts_words_and_characters_where_none_are_spaced():
    assert rouge_l_unicode("So Paulo", ["São Paulo"]) == pytest.approx(1 / 2)
    assert rouge_l_unicode("ＳÃＯ paulo", ["São Paulo"]) == 1
    assert rouge_l_unicode("東京の首都", ["東京は首都です"]) == pytest.approx(2 * 4 / (5 + 7))
    for said in ("police kill the gunman", "the gunman kill police"):
        assert rouge_l_unicode(said, ["Police killed the gunman."]) == rouge_l(said, ["Police killed the gunman."])


def test_bleu_is_the_geometric_mean_of_precisions():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples; no quadruple of 3, smoothed to 1/2 of one; no brevity penalty.
    expected = (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** (1 / 4)
    assert bleu("the cat sat on a mat", ["the cat is on a mat"]) == pytest.approx(expected)
    assert bleu("the cat sat on a mat", ["the cat sat on a mat"]) == 1.0  # no rounding above it


SAID = ["the cat sat on a mat", "police killed the gunman", "", "two words", "a quite different sentence was said here"]
GOLDS = [
    ["the cat is on a mat", "a cat sat on the mat"],
    ["police kill the gunman"],
    ["something"],
    ["two words more", "two"],
    ["a quite different thing was said there"],
]


def test_corpus_bleu_is_sacrebleus_own_and_each_number_what_leaving_the_sentence_out_changes():
    shares = corpus_bleu_shares(SAID, GOLDS)
    whole = sacrebleu_of(SAID, GOLDS)
    assert np.mean(shares) == pytest.approx(whole, abs=1e-12)
    assert np.mean(shares) != pytest.approx(np.mean([bleu(*pair) for pair in zip(SAID, GOLDS, strict=True)]), abs=0.02)
    without = [sacrebleu_of(SAID[:i] + SAID[i + 1 :], GOLDS[:i] + GOLDS[i + 1 :]) for i in range(len(SAID))]
    spread = (len(SAID) - 1) / len(SAID) * np.sum((without - np.mean(without)) ** 2)  # the jackknife's variance
    assert np.var(shares, ddof=1) / len(SAID) == pytest.approx(spread)
    assert corpus_bleu_shares(SAID[:1], GOLDS[:1]) == [pytest.approx(sacrebleu_of(SAID[:1], GOLDS[:1]))]


def sacrebleu_of(said: list[str], golds: list[list[str]]) -> float:
    """By `corpus_bleu` itself, which wants as many references of each: missing ones are None."""
    most = max(map(len, golds))
    columns = [[own[place] if place < len(own) else None for own in golds] for place in range(most)]
    return float(sacrebleu.corpus_bleu(said, columns).score) / 100


def test_two_scores_of_a_metric_differ_by_no_more_than_its_bounds_are_apart():
    assert METRICS["em"].bounds_of_difference == (-1, 1)
    for metric in METRICS.values():
        if metric.bounds is not None:
            low, high = metric.bounds
            assert metric.bounds_of_difference == (low - high, high - low)


def test_shares_of_groups_average_to_the_mean_of_their_means_with_the_error_of_a_stratified_mean():
    scores, groups = [1, 0, 0, 0, 1, 1, float("nan")], ["a", "a", "a", "a", "b", "b", "b"]
    shares = group_shares(scores, groups)
    assert np.isnan(shares[6])
    assert np.mean(shares[:6]) == pytest.approx((1 / 4 + 1) / 2)
    # (1 / g^2) sum of s^2 / n within groups, s^2 with n: 3/16 / 4 of a, 0 of b
    assert np.var(shares[:6]) / 6 == pytest.approx((3 / 16 / 4 + 0) / 4)
    assert group_shares([1, 0, 1], ["", "", ""]) == [1, 0, 1]


def test_a_metric_of_all_answers_together_is_refused_where_one_answer_is_scored():
    [metric] = metrics_named(["corpus_bleu"])
    with pytest.raises(MoELensError, match="corpus_bleu is of all answers together; choose a metric"):
        expect_single(metric)
    asked = [Example(str(i), "", "q", tuple(golds)) for i, golds in enumerate(GOLDS)]
    assert metric.scores(SAID, asked) == corpus_bleu_shares(SAID, GOLDS)


def no_wordnet() -> str | None:
    try:
        wordnet()
    except MoELensError as error:
        return str(error)
    return None


@pytest.mark.skipif(no_wordnet() is not None, reason="there is no WordNet here")
def test_meteor_matches_synonyms_and_punishes_pieces():
    # All of three words match, in one piece, "car" by WordNet: 1 - 0.5 (1/3)^3; by Banerjee and Lavie's formula.
    assert meteor("red car stopped", ["red auto stopped"]) == pytest.approx(1 - 0.5 / 27)
    assert meteor("stopped auto red", ["red auto stopped"]) == pytest.approx(1 - 0.5)
    assert meteor("xyzzy", ["red auto stopped"]) == 0


@pytest.mark.skipif(not Path(DEBIAN).exists(), reason="Debian's wordnet-base is not installed")
def test_plain_wordnet_files_are_read_without_nltks_own_list():
    dog = read_wordnet(Path(DEBIAN)).synsets("dogs")[0]
    assert "domestic_dog" in dog.lemma_names()


def run(code: str, **environment: str) -> str:
    """What the code prints in a Python of its own."""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_missing_packages_and_data_are_named_when_they_are_needed():
    said = run(
        "import sys\n"
        "for name in ('nltk', 'sacrebleu', 'rouge_score', 'openai'): sys.modules[name] = None\n"
        "from moe_lens.errors import MoELensError\n"
        "from moe_lens.metrics import text\n"
        "from moe_lens.causal.judge import Judge\n"
        "from moe_lens.data import Example\n"
        "for call in (lambda: text.bleu('a', ['a']), lambda: text.meteor('a', ['a']),\n"
        "             lambda: text.rouge_l('a', ['a']),\n"
        "             lambda: Judge('m', 'http://x').verdicts([Example('1', '', 'q', ('a',))], ['a'])):\n"
        "    try: call()\n"
        "    except MoELensError as error: print(error)\n"
    )
    lines = said.splitlines()
    assert [line.count("moe_lens[text]") for line in lines] == [1, 1, 1, 0]
    assert "moe_lens[judge]" in lines[3]


def test_missing_wordnet_is_one_clear_error(tmp_path):
    said = run(
        "import nltk\n"
        "from moe_lens.errors import MoELensError\n"
        "from moe_lens.metrics import wordnet\n"
        f"nltk.data.path[:] = []; wordnet.DEBIAN = {str(tmp_path)!r}\n"
        "try: wordnet.wordnet()\n"
        "except MoELensError as error: print(error)\n",
        WNHOME=str(tmp_path),
    )
    assert "apt install wordnet-base" in said


def test_metrics_are_found_by_name():
    assert [metric.name for metric in metrics_named(["f1", "em", "f1"])] == ["f1", "em"]
    for names in ([], ["em", "nonsense"]):
        with pytest.raises(MoELensError, match="metrics must be of em, f1"):
            metrics_named(names)


def length(prediction: str, example: Example) -> int:
    return len(prediction)


def words(prediction: str, example: Example) -> str:
    return prediction


def test_a_function_of_ones_own_is_a_metric_by_itself_or_by_where_it_is():
    asked = Example("a", "", "q", ("x",))
    named, imported = metrics_named([length, f"{__name__}:length"])
    assert (named.name, imported.name) == ("length", f"{__name__}:length")
    assert [metric.score("four", asked) for metric in (named, imported)] == [4.0, 4.0]
    with pytest.raises(MoELensError, match="words must give a number for each prediction and example; got 'a'"):
        metrics_named([words])[0].score("a", asked)
    for wrong in ("nowhere:length", f"{__name__}:nothing", f"{__name__}:__name__"):
        with pytest.raises(MoELensError, match=r"package\.module:function|is no function"):
            metrics_named([wrong])
    with pytest.raises(MoELensError, match="a named function"):
        metrics_named([lambda prediction, example: 0.0])
    with pytest.raises(MoELensError, match="different metrics need different names"):
        metrics_named(["f1", f1])


def extras_asked_for(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of this package, by the message of a metric whose own packages are missing."""
    wordnet.cache_clear()
    for package in ("sacrebleu", "nltk", "rouge_score", "rouge_score.rouge_scorer", "openai"):
        monkeypatch.setitem(sys.modules, package, None)
    try:
        metric.prepare()
    except MoELensError as error:
        return re.findall(r"moe_lens\[(\w+)\]", str(error))
    return []


def test_the_page_of_metrics_says_what_the_code_does(monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    found = {
        part.splitlines()[0]: [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines()
            if line.startswith("| `")
        ]
        for part in page.split("\n## ")[1:]
    }
    rows, tables, scores = (found[title] for title in ("Scores of answers", "From tables", "Scores of experts"))
    assert [row[0].strip("`") for row in rows] == list(METRICS)
    for (_, about, source, needs, without), metric in zip(rows, METRICS.values(), strict=True):
        assert (about, source) == (metric.about, metric.source)
        extras = extras_asked_for(metric, monkeypatch)
        assert re.findall(r"moe_lens\[(\w+)\]", needs) == extras
        assert ("refused before anything is computed" in without) == bool(extras)
    assert scores == [[f"`{score.name}`", score.about] for score in SCORES.values()]
    listed = {name for row in tables for name in re.findall(r"`(\w+)`", row[0])}
    assert listed == {name for name in metrics.__all__ if name[0].islower()}
