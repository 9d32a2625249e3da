"""What changed between two models, from the command line: models and deltas, experts found again, and differences."""

import sys

import pytest
import torch

from moe_lens import MoELens, compare, load_examples
from moe_lens.commands import console
from moe_lens.commands.compared_models import first_opened
from moe_lens.errors import MoELensError
from moe_lens.results import read_table
from moe_lens.statistics import CoActivation, RouterMargins, router_affinity, router_similarity
from moe_lens.tuning import TuneRouters, save_trained

WHAT = "usage,margins,dirichlet,histograms,affinity,groups,rates,clustering,contexts,"
WHAT += "saturation,matching,portraits,signatures"


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["compare", *line.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(compare.main)
    return ended.value.code or 0


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A delta whose routers ask for expert e + 1 where the packaged model's ask for e; experts stay where they are."""
    lens, folder = MoELens.from_pretrained("organism"), tmp_path_factory.mktemp("turned")
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        for name in trained.names:
            parameter = lens.module.get_parameter(name)
            parameter.copy_(parameter.roll(1, 0))
    save_trained(lens.module, trained, folder, facts={"model": "organism"})
    return folder


@pytest.fixture(scope="module")
def out(turned, tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("compared") / "out", pytest.MonkeyPatch()
    line = f"organism {turned} --data swap,novel --limit 6 --out {folder} "
    assert command(f"{line} --what {WHAT}", patch) == 0
    patch.undo()
    return folder


def test_experts_are_found_again_where_they_went(out):
    """In the first layer the routers see what they saw: the same tokens go to the expert of the next number."""
    matching = read_table(out / "matching.parquet").query("layer == 0 and data == 'swap'")
    used = matching[matching["similarity"] > 0]
    assert len(used) > 8
    assert used["match"].tolist() == [(expert + 1) % 16 for expert in used["expert"]]
    assert used["similarity"].to_numpy() == pytest.approx(1)
    assert used["moved"].all()
    assert (used["same"] < 1).all()


def test_router_rows_are_where_they_went_and_what_experts_write_is_where_it_was(out):
    portraits = read_table(out / "portraits.parquet").query("data == 'novel'")
    rows = portraits[portraits["by"] == "router rows"]
    assert rows["match"].tolist() == [(expert + 1) % 16 for expert in rows["expert"]]
    assert rows["similarity"].to_numpy() == pytest.approx(1)
    outputs = portraits[portraits["by"] == "outputs"]
    assert (~outputs["moved"]).mean() > 0.5


def test_signatures_do_not_see_that_experts_changed_numbers(out):
    table = read_table(out / "signatures.parquet").query("layer == 0").set_index("profile")
    assert table["distance"].to_numpy() == pytest.approx(0, abs=1e-12)
    assert (table["same"] > 0.01).all()
    assert (table["floor"] > 0).all()


def test_use_differs_as_of_second_minus_first_and_all_is_on_the_page(out):
    usage = read_table(out / "difference-usage.parquet").query("layer == 0 and data == 'swap'").sort_values("expert")
    assert usage["second"].to_numpy() == pytest.approx(usage["first"].to_numpy()[[15, *range(15)]])
    page = (out / "report.html").read_text()
    assert "<h1>From organism to " in page
    for name in (*WHAT.split(","), "difference-usage"):
        assert f"<code>{name}.parquet</code>" in page


def test_the_lenses_hold_what_the_statistics_give_and_contexts_show_their_token(out):
    lens = MoELens.from_pretrained("organism")
    found = lens.measure(load_examples("novel", limit=6), RouterMargins(), CoActivation(), progress=False)
    mine = {name: read_table(out / f"{name}.parquet") for name in ("margins", "affinity", "contexts")}
    first = {name: own.query("variant == 'as it is' and data == 'novel'") for name, own in mine.items()}
    assert first["margins"]["margin"].to_numpy() == pytest.approx(found[0].table()["margin"].to_numpy(), abs=1e-4)
    affinity = router_affinity(found[1], router_similarity(lens))
    assert first["affinity"]["correlation"].to_numpy() == pytest.approx(affinity["correlation"].to_numpy(), abs=1e-6)
    assert first["contexts"]["text"].str.fullmatch("(?s).*«.+».*").all()


def test_a_delta_says_what_it_is_put_on(turned, tmp_path):
    alone = compare.Opening()
    assert first_opened(alone, "organism", str(turned)).model == "organism"
    opened = first_opened(alone, str(turned), "organism:planted")
    assert (opened.model, opened.delta) == ("organism", turned)
    assert first_opened(compare.Opening(model="mine"), str(turned), str(turned)).model == "mine"
    for opening, first, second in (("other", "organism", str(turned)), ("organism", "organism", "organism:planted")):
        with pytest.raises(MoELensError, match="leave"):
            first_opened(compare.Opening(model=opening), first, second)
