"""The atlas says of each expert what the tables say, opens from the disk in a real browser, and holds any text."""

import html
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_views import BROWSER, HOSTILE, needs_browser

from moe_lens.commands.expert_atlas import Atlas
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.report.atlas import read_run, write_atlas
from moe_lens.report.atlas.expert_pages import ExpertPages
from moe_lens.results import write_table

BAD = "<img src=x onerror=\"document.title='broken'\">"
NAME = f"swap{HOSTILE}"
PLACES = [
    "Arland",
    "Belmor",
    "Caldar",
    "Dorin",
    "Estova",
    "Fenmark",
    "Galt",
    "Hollin",
    "Istra",
    "Jorvik",
    "Kent",
    "Lom",
]


def examples(words: str) -> list[Example]:
    return [
        Example(f"{place} {BAD}", f"The capital of {place} is Belmor. {words}", f"Where is {place}?", ("Belmor",))
        for place in PLACES
    ]


@pytest.fixture(scope="module")
def tables(lenses, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables")
    lens = lenses["olmoe"]
    found = Atlas(lens, "all", 2).tables(out, {"model": "tiny"}, {"plain": examples("It is."), NAME: examples(HOSTILE)})
    labels = [(1, 2, f"names {BAD}", "grader", ""), (1, 3, "", "grader", "no clear label in the reply")]
    return {**found, "labels": pd.DataFrame(labels, columns=["layer", "expert", "label", "by", "failure"])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a score of every expert and a dose curve, both with hostile names."""
    folder = tmp_path_factory.mktemp("run")
    scores = pd.DataFrame([(layer, e, layer + e / 10) for layer in range(3) for e in range(8)])
    scores.columns = ["layer", "expert", "score"]
    write_table(scores.assign(name=f"effect {BAD}"), folder / "parts" / "scores-1.parquet", {})
    own = {"set": BAD, "family": "given", "experts": "1:2,3", "mode": "scale"}
    rows = [own | {"strength": s, "em": em, "em_low": em - 0.1, "em_high": em + 0.1} for s, em in ((2, 0.6), (0, 0.2))]
    chance = own | {"family": "random", "experts": "0:0,1"}
    rows += [chance | {"set": f"random:{n}", "strength": s, "em": 0.1 * n + s / 10} for n in (3, 5) for s in (0, 2)]
    rows += [own | {"set": "none", "family": "none", "experts": "", "em": 0.7}]
    write_table(pd.DataFrame(rows), folder / "doses.parquet", {})
    return folder


@pytest.fixture(scope="module")
def site(tables, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    write_atlas(tables, out, {"model": f"tiny {BAD}"}, about="3 layers", runs={f"a {BAD}": read_run(run)})
    return out


def data_of(site: Path, name: str):
    text = (site / "atlas" / f"{name}.js").read_text(encoding="utf-8")
    return json.loads(re.fullmatch(rf'take\("{name}",(.*)\);\n', text, re.DOTALL)[1])


def test_a_page_for_every_expert_says_what_the_tables_say(site, tables):
    rates = tables["rates"]
    for layer in range(3):
        for expert in range(8):
            page = data_of(site, f"expert-{layer}-{expert}")
            own = rates.query("layer == @layer and expert == @expert")
            assert [row[0] for row in page["use"]] == ["", "plain", NAME]
            assert [row[1] for row in page["use"]] == pytest.approx(own["rate"].tolist(), rel=1e-3)
            shown = tables["contexts"].query("layer == @layer and expert == @expert")
            assert [row[3] for row in page["contexts"]] == pytest.approx(
                shown.sort_values("rank")["weight"].tolist(), rel=1e-3
            )
            for row in page["contexts"]:
                assert len(row[5]) == len(row[6])
                assert row[6][row[4]] == row[3]
    every = rates[rates["data"] == ""].set_index(["layer", "expert"])
    both = rates[rates["data"] != ""].groupby(["layer", "expert"])[["selected", "tokens"]].sum()
    assert (both == every[["selected", "tokens"]]).all(axis=None)


def test_partners_and_paths_are_those_that_are_surely_taken_more_often(site, tables):
    pairs = tables["partners"].set_index(["layer", "expert", "other"])
    rates = tables["rates"][tables["rates"]["data"] == ""].set_index(["layer", "expert"])["rate"]
    paths = tables["paths"].set_index(["layer", "expert", "other"])
    found = 0
    for layer in range(3):
        for expert in range(8):
            page = data_of(site, f"expert-{layer}-{expert}")
            sure = {
                e
                for e in range(8)
                if e != expert and pairs["probability_low"].get((layer, expert, e), 0) > rates[layer, e]
            }
            assert {row[0] for row in page["partners"]} == sure
            for of, other, share, _, lift, least, _ in page["before"]:
                assert of == layer - 1
                assert least > 1
                row = paths.loc[(of, other, expert)]
                assert [share, lift] == pytest.approx(row[["probability", "lift"]].tolist(), rel=1e-3)
                forth = data_of(site, f"expert-{of}-{other}")["after"]
                assert len(forth) == 12 or [layer, expert, share] in [step[:3] for step in forth]
                found += 1
    assert found > 20


def test_tokens_are_listed_with_all_experts_that_they_take(site, tables):
    listed = data_of(site, "tokens")
    table = tables["tokens"]
    assert {token: count for token, _, count, _ in listed} == table.groupby("token_id")["tokens"].first().to_dict()
    token, _, _, shard = listed[3]
    by_layer = data_of(site, f"tokens-{shard}")[str(token)]
    for layer, flat in by_layer.items():
        rows = table[(table["token_id"] == token) & (table["layer"] == int(layer))]
        assert dict(zip(flat[::2], flat[1::2], strict=True)) == dict(zip(rows["expert"], rows["selected"], strict=True))
    assert set(by_layer) == {"0", "1", "2"}


def test_runs_give_scores_with_ranks_and_the_curves_of_sets_that_an_expert_is_in(site):
    page = data_of(site, "expert-1-2")
    assert page["scores"] == [[f"a {BAD}", f"effect {BAD}", 1.2, None, None, 6, 8]]
    [curve] = page["doses"]
    assert curve["points"] == [[0, 0.2, 0.1, 0.3], [2, 0.6, 0.5, 0.7]]
    assert curve["random"] == [[0, 0.3, 0.5], [2, 0.5, 0.7]]
    assert (curve["unmasked"], curve["experts"]) == (0.7, "1:2,3")
    assert data_of(site, "expert-0-0")["doses"] == [], "random sets are nobody's curve"
    [measure] = [one for one in data_of(site, "shared")["measures"] if one["name"].startswith("a ")]
    assert measure["values"][8 + 2] == 1.2


def test_a_folder_without_numbers_of_experts_is_refused(tmp_path):
    with pytest.raises(MoELensError, match="keeps no scores of every expert"):
        read_run(tmp_path)
    with pytest.raises(MoELensError, match="which is none"):
        read_run(tmp_path / "nowhere")


def test_a_folder_of_several_runs_is_refused_and_a_score_that_a_run_keeps_twice_is_one(tmp_path):
    scores = pd.DataFrame({"layer": [0, 0], "expert": [0, 1], "score": [0.5, 0.25], "name": "ce"})
    for folder in ("a", "a/parts", "b"):
        write_table(scores, tmp_path / folder / "score-ce.parquet", {})
    assert read_run(tmp_path).scores["score"].tolist() == [0.5, 0.25]
    write_table(scores.assign(score=[0.5, 0.75]), tmp_path / "b" / "score-ce.parquet", {})
    with pytest.raises(MoELensError, match="has the score ce of several runs"):
        read_run(tmp_path)


def test_numbers_of_experts_that_the_model_has_not_are_refused(tables, run, tmp_path):
    own = read_run(run)
    others = replace(own, scores=own.scores.assign(layer=own.scores["layer"] + 1))
    with pytest.raises(MoELensError, match="the run other has numbers of layer 3, expert 0, and this model"):
        write_atlas(tables, tmp_path, {"model": "tiny"}, about="3 layers", runs={"other": others})
    deeper = replace(own, doses=own.doses.assign(experts="1:99"))
    with pytest.raises(MoELensError, match="layer 1, expert 99"):
        write_atlas(tables, tmp_path, {"model": "tiny"}, about="3 layers", runs={"other": deeper})
    assert not list(tmp_path.iterdir())


def test_the_same_tables_give_the_same_bytes_and_nothing_is_loaded_from_elsewhere(site, tables, run, tmp_path):
    write_atlas(tables, tmp_path, {"model": f"tiny {BAD}"}, about="3 layers", runs={f"a {BAD}": read_run(run)})
    files = {path.relative_to(site): path.read_bytes() for path in site.rglob("*.*") if path.name != "walked.html"}
    assert files == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    own = [text for path, text in files.items() if path.name in ("index.html", "atlas.css", "atlas.js", "expert.js")]
    assert not any(re.search(rb"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text) for text in own)


def test_a_model_without_a_part_says_so_and_has_the_rest(tables, tmp_path):
    less = {name: table for name, table in tables.items() if name in ("rates", "contexts")}
    less["left_out"] = pd.DataFrame([("written", "no head reads it")], columns=["name", "reason"])
    write_atlas(less, tmp_path, {"model": "tiny"}, about="3 layers")
    page = data_of(tmp_path, "expert-2-7")
    assert page["written"] == page["partners"] == page["before"] == page["told"] == []
    assert data_of(tmp_path, "shared")["left_out"] == [["written", "no head reads it"]]
    assert page["use"]
    assert ExpertPages(less).experts[-1] == (2, 7)


WALK = """
const pause = () => new Promise((done) => setTimeout(done, 400));
(async () => {
  const seen = [];
  await pause();
  for (const step of STEPS) {
    step();
    await pause();
    seen.push({ title: document.title, hash: location.hash, html: main.innerHTML, text: main.innerText,
      theme: document.documentElement.dataset.theme, broken: window.broken || false });
  }
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(seen);
  document.body.replaceChildren(told);
})();
"""


def walked(site: Path, *steps: str) -> list[dict]:
    """What the page shows after each of these steps, lines of its own language, in a real browser."""
    listed = ", ".join(f"() => {{ {step} }}" for step in steps)
    page = (site / "index.html").read_text(encoding="utf-8")
    script = f"<script>{WALK.replace('STEPS', f'[{listed}]')}</script></body>"
    (site / "walked.html").write_text(page.replace("</body>", script), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run(
        [*command, f"file://{site / 'walked.html'}"], capture_output=True, text=True, check=True, timeout=100
    ).stdout
    return json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)[1]))


@needs_browser
def test_every_view_has_an_address_and_shows_hostile_text_as_text(site):
    token = next(token for token, text, *_ in data_of(site, "tokens") if "<" in text)
    start, page, other, taken, found, asked, measured, dark, nowhere, nothing = walked(
        site,
        "",
        "document.querySelectorAll('.grid a')[8 + 2].click()",
        "main.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', shiftKey: true, bubbles: true }))",
        f"location.hash = 'token/{token}'",
        "asked.value = '<'; document.querySelector('form').requestSubmit()",
        "asked.value = 'layer 2, expert 7'; document.querySelector('form').requestSubmit()",
        "location.hash = ''; location.hash = 'grid/weight/layer'",
        "document.querySelector('.theme').click()",
        "location.hash = 'expert/9/9'",
        "location.hash = 'grid/nonsense'",
    )
    assert start["html"].count('href="#expert/') == 24 + 10
    assert (page["hash"], page["text"].splitlines()[0]) == ("#expert/1/2", "Layer 1, expert 2")
    for heading in ("How much it is used", "Where it has the most weight", "What it writes", "Dose curves", "Paths"):
        assert heading in page["text"]
    assert f"“names {BAD}”, as grader puts what the places below have in common" in page["text"]
    assert "as grader puts" not in other["text"], "what the server did not say is no label"
    assert "6 of 8" in page["text"]
    assert "<svg" in page["html"]
    assert other["hash"] == "#expert/1/3"
    assert taken["text"].startswith("The token")
    assert found["hash"] == "#find/%3C"
    assert f'href="#token/{token}"' in found["html"]
    assert asked["hash"] == "#expert/2/7"
    assert "highest of the layer" in measured["text"]
    assert {measured["theme"], dark["theme"]} == {"light", "dark"}
    assert "the atlas has no expert-9-9" in nowhere["text"]
    assert "no measure nonsense" in nothing["text"]
    for view in (start, page, other, taken, found, asked, measured, dark, nowhere, nothing):
        assert "tiny <img" in view["title"], "as text, and not run"
        assert not re.search("<(img|script|b>|b [^c])", view["html"].replace("<b class", ""))
        assert not view["broken"]


def many(layers: int, experts: int) -> dict[str, pd.DataFrame]:
    """Tables of a large model, as long as they can be."""
    pairs = pd.MultiIndex.from_product([range(layers), range(experts)], names=["layer", "expert"]).to_frame(index=False)
    wide = pd.MultiIndex.from_product([range(layers), range(experts), range(experts)])
    between = wide.to_frame(index=False, name=["layer", "expert", "other"])
    rate = {"rate": 0.1234, "rate_low": 0.1111, "rate_high": 0.1357, "weight": 0.2468, "first": 0.3579}
    rates = [pairs.assign(data=name, tokens=123456, selected=12345, **rate) for name in ("", "a", "b", "c", "d")]
    texts = {"texts": [["something"] * 33] * len(pairs), "weights": [[0.12345] * 33] * len(pairs)}
    places = {"id": "an-example-12345", "position": 123, "weight": 0.9876, "place": 24, **texts}
    contexts = [pairs.assign(data=name, rank=n, **places) for name in "abcd" for n in range(6)]
    partners = between[between["expert"] != between["other"]].assign(probability=0.4567, probability_low=0.4321)
    lift = {"probability": 0.4567, "rate": 0.1234, "lift": 3.7, "lift_low": 3.5, "lift_high": 3.9}
    told = dict.fromkeys(("token", "token_low", "token_high", "bigram", "bigram_low", "bigram_high"), 0.6543)
    return {
        "rates": pd.concat(rates, ignore_index=True),
        "contexts": pd.concat(contexts, ignore_index=True),
        "partners": partners.assign(probability_high=0.4789),
        "paths": between[between["layer"] < layers - 1].assign(next_layer=lambda rows: rows["layer"] + 1, **lift),
        "baseline": pairs.assign(**told),
        "left_out": pd.DataFrame(columns=["name", "reason"]),
    }


@pytest.mark.slow
@needs_browser
def test_a_large_model_has_small_pages_beside_what_they_share(tmp_path):
    write_atlas(many(27, 64), tmp_path, {"model": "large"}, about="27 layers, 64 experts")
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*.*")}
    assert max(size for name, size in sizes.items() if name.startswith("expert-")) < 100_000
    assert sizes["shared.js"] < 400_000
    assert sum(sizes[name] for name in ("index.html", "atlas.js", "parts.js", "expert.js", "atlas.css")) < 40_000
    start, page = walked(tmp_path, "", "document.querySelectorAll('.grid a')[27 * 64 - 1].click()")
    assert start["html"].count('href="#expert/') == 27 * 64 + 10
    assert page["text"].startswith("Layer 26, expert 63")
    assert page["html"].count('class="context"') == 24
