"""Views show a prompt's routing and attention as they are, in a real browser too, and hold any text."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Renormalize, Zero
from moe_lens.report import (
    attention_of_tokens,
    attention_view,
    citations_view,
    experts_of_tokens,
    routing_view,
    show,
)
from moe_lens.report.views import token_texts

EXAMPLE = Example(
    id="0", context="The capital of Arland is Belmor.", question="What is the capital of Arland?", answers=("Belmor",)
)
HOSTILE = "</script><script>document.title='broken'</script> & <b>\"bold\"</b> €😀 مرحبا\n"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def in_browser(page: str, path, *, keys: tuple[str, ...] = ()) -> str:
    """The page's DOM after its code has run and the keys were pressed."""
    press = "".join(
        f"<script>root.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))</script>" for key in keys
    )
    path.write_text(page.replace("</body>", f"{press}</body>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


@pytest.fixture
def record(olmoe):
    [record] = olmoe.records([EXAMPLE, "Arland"], capture=("routing", "attention"), progress=False)
    return record


def test_experts_of_tokens_are_the_records_without_pads(olmoe, record):
    for row, ids in enumerate(record.ids):
        table = experts_of_tokens(record, olmoe.tokenizer, row=row)
        width, length = record.input_ids.shape[1], int(record.attention_mask[row].sum())
        assert length < width or ids == "0"
        assert sorted(set(table["position"])) == list(range(length))
        for (layer, position), part in table.groupby(["layer", "position"]):
            routing = record.routing[layer]
            chosen = routing.indices[row, width - length + position].tolist()
            weights = dict(zip(chosen, routing.weights[row, width - length + position].tolist(), strict=True))
            assert dict(zip(part["expert"], part["weight"], strict=True)) == pytest.approx(weights)
            assert part.sort_values("rank")["weight"].is_monotonic_decreasing


def test_parts_of_the_prompt_are_named_where_they_stand(olmoe, record):
    tokens = experts_of_tokens(record, olmoe.tokenizer).drop_duplicates("position")
    texts = tokens.groupby("part")["token"].agg("".join)
    assert texts["answer"].strip() == "Belmor"
    assert texts["question"].strip() == EXAMPLE.question
    assert "".join(tokens["token"]).count(EXAMPLE.context) == 1


def test_attention_of_tokens_is_the_mean_over_heads_and_sums_to_one(olmoe, record):
    table = attention_of_tokens(record, olmoe.tokenizer, row=1)
    assert table.groupby("layer")["attention"].sum().tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    last = record.attention_rows[2][1, :, -1].mean(0)
    n = int(record.attention_mask[1].sum())
    torch.testing.assert_close(torch.tensor(table.query("layer == 2")["attention"].to_list()), last[-n:])


@pytest.mark.parametrize("kept", ["all", "answer"])
def test_attention_of_tokens_is_the_prompts_last_tokens_where_answers_follow_it(olmoe, kept):
    [alone] = olmoe.records([EXAMPLE], capture=("attention",), progress=False)
    expected = attention_of_tokens(alone, olmoe.tokenizer)
    asked = {"capture": ("attention",), "with_answer": True, "positions": kept, "progress": False}
    [answered] = olmoe.records([EXAMPLE], **asked)
    table = attention_of_tokens(answered, olmoe.tokenizer)
    prompt = table[table["position"] <= expected["position"].max()].reset_index(drop=True)
    pd.testing.assert_frame_equal(prompt, expected, atol=1e-6)
    assert (table["attention"].sum() - prompt["attention"].sum()) == pytest.approx(0)
    [elsewhere] = olmoe.records([EXAMPLE], **asked | {"positions": (-1,)})
    with pytest.raises(MoELensError, match=r"ask for positions=\(0,\)"):
        attention_of_tokens(elsewhere, olmoe.tokenizer)


def test_attention_to_more_than_the_tokens_is_not_shown_as_theirs(olmoe):
    [record] = olmoe.records([EXAMPLE], capture=("attention",), progress=False)
    wider = {layer: F.pad(rows, (0, 2)) for layer, rows in record.attention_rows.items()}
    with pytest.raises(MoELensError, match="2 summaries of several positions"):
        attention_of_tokens(replace(record, captured={"attention": wider}), olmoe.tokenizer)


@pytest.mark.parametrize("text", [HOSTILE, "plain words", "मानक हिन्दी", "a\n\n\tb"])
def test_token_texts_make_up_the_text(olmoe, text):
    ids = olmoe.tokenizer(text)["input_ids"]
    texts = token_texts(ids, olmoe.tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts).replace("\N{REPLACEMENT CHARACTER}", "") == text


def test_view_holds_every_weight_and_the_interventions_panel(olmoe):
    used = olmoe.records([EXAMPLE], progress=False)
    expert = int(next(used).routing[1].indices[0, -1, 0])
    page = show(olmoe, EXAMPLE, under=[Zero(ExpertSet.of({1: [expert]}))]).html
    data = data_of(page)
    assert [panel["name"] for panel in data["panels"]] == ["without intervention", "under Zero"]
    before, after = (dict(panel["layers"][1][-1]) for panel in data["panels"])
    assert before[expert] > 0
    assert after[expert] == 0
    assert not olmoe._stack.layers


def test_view_compares_two_models(lenses):
    data = data_of(show(lenses["olmoe"], "Arland", against=lenses["mixtral"]).html)
    assert [panel["name"] for panel in data["panels"]] == ["this model", "the other model"]
    assert data["panels"][0]["layers"] != data["panels"][1]["layers"]


def test_each_panel_is_headed_by_every_intervention_in_force(olmoe, lenses):
    [record] = olmoe.records([EXAMPLE], progress=False)
    outer, inner = record.routing[1].indices[0, -1, :2].tolist()
    with olmoe.intervene(Zero(ExpertSet.of({1: [outer]}))):
        data = data_of(show(olmoe, EXAMPLE, under=[Renormalize(ExpertSet.of({1: [inner]}))]).html)
        alone = data_of(show(olmoe, EXAMPLE).html)
        models = data_of(show(olmoe, "Arland", against=lenses["mixtral"], under=[Zero(ExpertSet.of({0: [0]}))]).html)
    assert [panel["name"] for panel in data["panels"]] == ["under Zero", "under Zero, under Renormalize"]
    before, after = (dict(panel["layers"][1][-1]) for panel in data["panels"])
    assert before[outer] == after[outer] == after[inner] == 0
    assert before[inner] > 0
    assert [panel["name"] for panel in alone["panels"]] == ["under Zero"]
    assert [panel["name"] for panel in models["panels"]] == ["this model, under Zero", "the other model, under Zero"]


def test_panels_of_different_prompts_are_refused(olmoe):
    tables = {}
    for text in ("Arland", "Belmor is"):
        [record] = olmoe.records([text], progress=False)
        tables[text] = experts_of_tokens(record, olmoe.tokenizer)
    with pytest.raises(MoELensError, match="one prompt"):
        routing_view(tables)


def attention_table(values: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "position": range(3),
            "token": ["a", "b", "c"],
            "part": ["context", "answer", ""],
            "layer": 5,
            "attention": values,
        }
    )


def test_attention_views_of_other_tokens_are_refused():
    with pytest.raises(MoELensError, match="same tokens"):
        attention_view(attention_table([0.5, 0.3, 0.2]), attention_table([0.5, 0.3, 0.2]).assign(token="z"))


def test_a_view_is_whole_in_a_notebook_and_loads_nothing(olmoe, tmp_path):
    view = show(olmoe, HOSTILE)
    assert view._repr_html_().startswith("<iframe srcdoc=")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", view.html)
    assert view.save(tmp_path / "deep" / "v.html").read_text(encoding="utf-8") == view.html


@needs_browser
def test_hostile_text_is_shown_as_text(olmoe, tmp_path):
    dom = in_browser(show(olmoe, HOSTILE).html, tmp_path / "v.html")
    assert "<title>Which experts each token takes</title>" in dom
    shown = re.search(r'<div class="text">(.*?)</div>', dom, re.DOTALL)[1]
    assert "<b>" not in shown
    assert "&lt;" in shown


@needs_browser
def test_keys_move_the_chosen_expert_and_token(olmoe, tmp_path):
    page = show(olmoe, "Arland and Belmor").html
    heading = re.compile(r"Gating weight of layer (\d+), expert (\d+)")
    _, expert = heading.search(in_browser(page, tmp_path / "v.html")).groups()
    dom = in_browser(page, tmp_path / "v.html", keys=("ArrowRight", "ArrowDown"))
    assert int(heading.search(dom)[2]) == (int(expert) + 1) % 8
    assert f"token 0 {json.dumps(data_of(page)['tokens'][0])}" in dom  # down from the last is the first


CITED = pd.DataFrame(
    [
        (1, "second", HOSTILE, "none", 0, "It is red.", None),
        (0, "first", "Which?", "red", 1, "It is blue.", -0.5),
        (0, "first", "Which?", "red", 0, HOSTILE, 2.0),
    ],
    columns=["place", "id", "question", "answer", "sentence", "text", "attribution"],
)


def test_the_view_of_citations_holds_every_sentence_in_its_place():
    assert data_of(citations_view(CITED).html)["cases"] == [
        {"id": "first", "question": "Which?", "answer": "red", "texts": [HOSTILE, "It is blue."], "values": [2, -0.5]},
        {"id": "second", "question": HOSTILE, "answer": "none", "texts": ["It is red."], "values": [None]},
    ]
    with pytest.raises(MoELensError, match="no attribution"):
        citations_view(CITED.drop(columns="attribution"))


@needs_browser
def test_citations_are_coloured_by_what_they_add_one_example_at_a_time(tmp_path):
    page = citations_view(CITED).html
    dom = in_browser(page, tmp_path / "v.html")
    assert "1 of 2, first" in dom
    assert 'style="background: rgb(0, 114, 178); color: rgb(255, 255, 255);">&lt;/script&gt;' in dom
    assert 'style="background: rgb(245, 215, 191); color: rgb(34, 34, 34);">It is blue.</span>' in dom
    moved = in_browser(page, tmp_path / "v.html", keys=("ArrowRight",))
    assert "2 of 2, second" in moved
    assert "no sentence of this context was left out" in moved
    assert '<span class="token">It is red.</span>' in moved


@needs_browser
def test_attention_view_says_what_is_gained(tmp_path):
    page = attention_view(attention_table([0.5, 0.2, 0.3]), attention_table([0.2, 0.6, 0.2]), note="Both answers").html
    dom = in_browser(page, tmp_path / "v.html")
    assert "Both answers" in dom
    assert "0.70 → 0.80 (+14 %)" in dom  # the context, answer included
    assert "0.20 → 0.60 (+200 %)" in dom
    assert 'style="background: rgb(0, 114, 178); color: rgb(255, 255, 255);">b</span>' in dom
