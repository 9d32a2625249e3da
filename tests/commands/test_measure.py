"""Measuring from the command line: equal to the statistics in Python, resumed, in shards, and against another model."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import ExpertUsage, MoELens, MoELensError, load_examples, measure
from moe_lens.commands import console
from moe_lens.commands.shards import merged
from moe_lens.commands.statistic_passes import Measuring
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Scale
from moe_lens.lens.loading import expect_model
from moe_lens.results import claim, read_provenance, read_table
from moe_lens.rows_on_disk import ROWS, growing_table, parts_of
from moe_lens.statistics import RouterLoad
from moe_lens.statistics.measures import MEASURES
from moe_lens.tuning import TuneRouters, save_trained

ALIKE = "--model organism --data swap,novel --limit 4 --batch-size 1 --what {} --out {}"


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["measure", *line.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(measure.main)
    return ended.value.code or 0


@pytest.fixture(scope="module")
def lens():
    return MoELens.from_pretrained("organism")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run over all examples, two over shards of them, and these merged; all but what is told in tokens."""
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    what = "usage,load,spread,coactivation,specialisation,saliency,similarity,attention,answer,weights,routing,"
    what += "paths,information,baseline"
    assert command(ALIKE.format(what, folder / "whole"), patch) == 0
    for number in (0, 1):
        assert command(f"{ALIKE.format(what, folder / str(number))} --shard {number}/2", patch) == 0
    assert command(f"--merge {folder / '0'} {folder / '1'} --out {folder / 'merged'}", patch) == 0
    patch.undo()
    return folder


def test_tables_hold_what_the_statistics_give_for_each_data_set(runs, lens):
    usage, load = (read_table(runs / "whole" / f"{name}.parquet") for name in ("usage", "load"))
    for data in ("swap", "novel"):
        found = lens.measure(load_examples(data, limit=4), ExpertUsage(), RouterLoad(), batch_size=1, progress=False)
        own = usage[usage["data"] == data]
        np.testing.assert_allclose(own["score"], found[0].table()["score"], atol=1e-6)
        assert (own["score_low"] <= own["score"]).all()
        assert (own["score_high"] >= own["score"]).all()
        columns = found[1].table().columns
        mine = load.loc[load["data"] == data, columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, found[1].table(), rtol=1e-4, atol=1e-6)
    assert set(usage["variant"]) == {"as it is"}


def test_shards_that_are_merged_equal_one_run(runs):
    names = sorted(path.name for path in (runs / "whole").glob("*.parquet"))
    assert len(names) == 14
    for name in names:
        whole, merged = (read_table(runs / folder / name) for folder in ("whole", "merged"))
        if name == "routing.parquet":
            key = ["data", "id", "layer", "position", "rank"]
            whole, merged = (table.sort_values(key, ignore_index=True) for table in (whole, merged))
        for column in whole:
            if whole[column].dtype.kind == "f":
                # to rounding: each run has loaded the weights anew, whose place in memory decides the order of sums
                np.testing.assert_allclose(merged[column], whole[column], rtol=1e-4, atol=1e-5, err_msg=name)
            else:
                assert merged[column].tolist() == whole[column].tolist(), (name, column)


def test_the_rows_of_routing_are_what_the_routers_decided(runs, lens):
    rows = read_table(runs / "whole" / "routing.parquet").query("data == 'novel'")
    example = load_examples("novel", limit=4)[2]
    [record] = lens.records([example], positions="all", progress=False)
    own = rows[rows["id"] == example.id].sort_values(["layer", "position", "rank"])
    for layer, routing in record.routing.items():
        mine = own[own["layer"] == layer]
        weights, order = routing.weights[0].sort(dim=-1, descending=True)
        experts = routing.indices[0].gather(-1, order)
        assert mine["expert"].tolist() == experts.flatten().tolist()
        np.testing.assert_allclose(mine["weight"], weights.flatten(), rtol=1e-5)
        np.testing.assert_allclose(mine["logit"], routing.logits[0].gather(-1, experts).flatten(), rtol=1e-4, atol=1e-5)
    assert own.query("layer == 0 and rank == 0")["token_id"].tolist() == record.input_ids[0].tolist()
    assert not list((runs / "whole" / "parts").glob("*routing*")), "they would take the room twice"


def test_every_table_is_on_the_page_and_says_where_it_came_from(runs):
    page = (runs / "whole" / "report.html").read_text()
    for path in (runs / "whole").glob("*.parquet"):
        assert path.stem == "routing" or f"<code>{path.name}</code>" in page
    made_by = read_provenance(runs / "merged" / "load.parquet")
    assert made_by["shard"] == "0/2+1/2"
    assert made_by["data"]["examples"] == 8


def test_the_same_command_goes_on_without_measuring_again(runs, monkeypatch, capsys):
    line = ALIKE.format("usage,load,routing", runs / "again")
    assert command(line, monkeypatch) == 0
    first = {path.name: path.read_bytes() for path in (runs / "again").glob("*.parquet")}
    next((runs / "again" / "parts").glob("*~novel~load.parquet")).unlink()
    measured = []
    usual = MoELens.measure

    def counted(self, examples, *statistics, **named):
        measured.append([type(one).__name__ for one in statistics])
        return usual(self, examples, *statistics, **named)

    monkeypatch.setattr(MoELens, "measure", counted)
    assert command(line, monkeypatch) == 0
    assert measured == [["RouterLoad"]]
    assert {path.name: path.read_bytes() for path in (runs / "again").glob("*.parquet")} == first
    assert command(line.replace("--limit 4", "--limit 3"), monkeypatch) == 2
    assert "another run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def compared(tmp_path_factory, lens):
    """The model against one with other routers, and under an intervention."""
    folder, patch = tmp_path_factory.mktemp("compared"), pytest.MonkeyPatch()
    other = MoELens.from_pretrained("organism")
    with TuneRouters().attached(other) as trained, torch.no_grad():
        for name in trained.names:
            other.module.get_parameter(name).mul_(0.5)
    save_trained(other.module, trained, folder / "halved", facts={})
    Scale(ExpertSet.of({1: range(16)}), 0.0).save(folder / "silent")
    what = "usage,load,saturation,divergence,specialisation,answer,vocabulary,tokens"
    line = ALIKE.format(what, folder / "out").replace("swap,novel", "swap")
    assert command(f"{line} --against {folder / 'halved'} --intervention {folder / 'silent'}", patch) == 0
    patch.undo()
    return folder / "out", other


def test_what_two_models_differ_by_is_paired_and_second_minus_first(compared, lens):
    out, other = compared
    table = read_table(out / "difference-load.parquet").query("variant == 'halved'").set_index(["number", "layer"])
    examples = load_examples("swap", limit=4)
    found = [one.measure(examples, RouterLoad(), batch_size=1, progress=False)[0] for one in (lens, other)]
    before, after = (one.table().set_index("layer") for one in found)
    for layer in lens.architecture.moe_layers:
        row = table.loc[("entropy", layer)]
        assert row["first"] == pytest.approx(before.loc[layer, "entropy"])
        assert row["second"] == pytest.approx(after.loc[layer, "entropy"])
        assert row["difference"] == pytest.approx(after.loc[layer, "entropy"] - before.loc[layer, "entropy"])
        width = row["difference_high"] - row["difference_low"]
        alone = [one.loc[layer, "entropy_high"] - one.loc[layer, "entropy_low"] for one in (before, after)]
        assert width < sum(alone), "texts are left out of both at once"


def test_an_intervention_is_a_variant_and_the_model_is_as_it_was_after_it(compared):
    out, _ = compared
    answer = read_table(out / "difference-answer.parquet")
    assert set(answer["variant"]) == {"silent", "halved"}
    silent = answer.query("variant == 'silent'").set_index("layer")
    assert silent.loc[0, "difference"].eq(0).all(), "before layer 1 nothing differs"
    assert silent.loc[1, "difference"].ne(0).any()
    saturation = read_table(out / "saturation.parquet").set_index(["variant", "layer"])
    assert saturation.loc[("silent", 1), "saturation"] == 1, "its router decides before it is silenced"
    assert read_table(out / "divergence.parquet").query("variant == 'halved'")["divergence"].max() > 0
    words = read_table(out / "vocabulary.parquet")
    assert words["token"].map(len).min() > 0


@pytest.mark.slow
def test_a_model_against_itself_differs_by_nothing(tmp_path, monkeypatch):
    line = ALIKE.format("usage,load,answer,saturation", tmp_path).replace("swap,novel", "swap")
    assert command(f"{line} --against organism", monkeypatch) == 0
    for path in tmp_path.glob("difference-*.parquet"):
        assert read_table(path)["difference"].abs().max() < 1e-5, path.name
    assert read_table(tmp_path / "saturation.parquet")["saturation"].eq(1).all()


def test_the_help_lists_all_measures_and_says_what_takes_two_models():
    assert ", ".join(MEASURES) == measure.MEASURED
    assert [name for name, one in MEASURES.items() if one.takes_two] == list(MEASURES)[-5:]
    told = measure.main.__annotations__["what"].__metadata__[0].help
    assert re.search(r"\(the last five with --against or --intervention;", told)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--what nonsense", "--what names, with commas, usage, load"),
        ("--what saturation", "saturation compares two models; give --against"),
        ("--what load,information", "information tells data sets apart; give --data two or more"),
        ("--what load --shard 2/2", "--shard is I/N"),
        ("--what load --positions nowhere", "positions must be one of"),
        ("--what load --against organism --intervention missing", "expected a saved intervention"),
        ("--what load --limit 2 --shard 2/3", "of 2 examples the shard 2/3 has none; take fewer shards"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_opened(more, says, tmp_path, monkeypatch, capsys):
    assert command(f"--model {tmp_path}/nowhere --data swap --out {tmp_path}/out {more}", monkeypatch) == 2
    assert says in capsys.readouterr().err


def test_a_second_model_that_is_not_there_is_told_before_the_first_is_measured(tmp_path, monkeypatch, capsys):
    line = f"--model organism --data swap --limit 2 --what load --out {tmp_path / 'out'}"
    assert command(f"{line} --against {tmp_path / 'nowhere'}", monkeypatch) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert command(f"{line} --positions -900", monkeypatch) == 2
    assert "no example of swap has a token at the positions -900" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "else the corrected command would be another run"
    expect_model("organism:planted")


def test_every_variant_and_data_set_has_a_file_of_its_own_with_a_name_that_is_not_too_long(tmp_path):
    part = Measuring(["load"], "all", tmp_path, {}).part
    names = ["a/b", "a_b", "a b", "é" * 300, "é" * 299, "📄", "🦁", "a~b", "..", "."]
    files = {part("as it is", name, "load") for name in names}
    assert len(files) == len(names)
    assert {file.parent for file in files} == {tmp_path / "parts"}
    assert max(len(file.name.encode()) for file in files) < 200


def test_rows_that_cannot_be_written_are_told_and_an_error_inside_stays_its_own(tmp_path):
    rows = pd.DataFrame({"value": [1]})
    (tmp_path / "file").touch()
    with pytest.raises(MoELensError, match="cannot write"), growing_table(tmp_path / "file" / "rows.parquet", {}):
        pass
    with pytest.raises(MoELensError, match="cannot write"), growing_table(tmp_path / "rows.parquet", {}) as file:
        (tmp_path / file._path.name).mkdir()
        file.add(rows)
    with pytest.raises(FileNotFoundError), growing_table(tmp_path / "others.parquet", {}) as file:
        file.add(rows)
        (tmp_path / "nowhere").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shard_that_comes_twice_and_a_run_of_something_else_are_not_merged(runs, tmp_path, monkeypatch, capsys):
    assert command(f"--merge {runs / '0'} {runs / '0'} --out {tmp_path / 'a'}", monkeypatch) == 2
    assert "each example may come once: expected different shards I/N of one N; got 0/2, 0/2" in capsys.readouterr().err
    assert command(f"--merge {runs / '0'} {runs / 'again'} --out {tmp_path / 'b'}", monkeypatch) == 2
    assert "holds the results of another run" in capsys.readouterr().err
    assert command(f"--merge {runs / '0'} {runs / '1'} --what load --out {tmp_path / 'c'}", monkeypatch) == 2
    assert "leave --data, --trace, --what" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a" / "run.json").exists()


def test_what_is_told_in_tokens_is_merged_by_the_model_that_was_measured_alone(tmp_path, lens):
    facts = {"what": ["tokens"], "shard": "0/2", "sets": {}, "positions": "all", "weights": "other"}
    for number in (0, 1):
        claim(tmp_path / str(number), facts | {"shard": f"{number}/2"})
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(MoELensError, match="give --model too"):
        merged(folders, tmp_path / "out", None)
    with pytest.raises(MoELensError, match="not the one that the shards measured"):
        merged(folders, tmp_path / "out", lens)


@pytest.mark.slow
def test_all_leaves_out_with_a_note_what_the_data_lack(tmp_path, monkeypatch, capsys):
    line = f"--model organism --data closed_book --limit 3 --what all --out {tmp_path}"
    assert command(line, monkeypatch) == 0
    said = capsys.readouterr().err
    assert re.search("left out attention: .*no example with what it measures", said)
    there = {path.stem for path in tmp_path.glob("*.parquet")}
    assert there == {*MEASURES, "weights"} - {"attention", "shared", "information", "clustering", *list(MEASURES)[-5:]}


def test_a_growing_table_is_whole_sealed_and_read_in_parts(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = pd.DataFrame({"id": ["a"] * (ROWS + 2), "value": np.arange(ROWS + 2)})
    with pytest.raises(KeyboardInterrupt), growing_table(path, {"model": "m"}) as file:
        file.add(rows)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir()), "nothing is left of a half one"
    with growing_table(path, {"model": "m"}) as file:
        file.add(rows.iloc[:5])
        file.add(rows.iloc[:0])
        file.add(rows.iloc[5:])
    pd.testing.assert_frame_equal(read_table(path), rows)
    assert [len(part) for part in parts_of(path)] == [ROWS, 2]
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(MoELensError, match="is damaged"):
        next(parts_of(path))
